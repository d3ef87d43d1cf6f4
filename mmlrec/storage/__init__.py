"""Where datasets and runs lie: a disk of this machine, or an object store."""
