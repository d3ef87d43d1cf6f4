"""`--download`: raw files from a dataset's home, or from its second source."""
