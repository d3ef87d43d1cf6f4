"""Raw logs to dataset folders: common machinery, and one file per dataset. Imports no torch."""
