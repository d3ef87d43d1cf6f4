"""The configuration of `python -m preprocessing table`: which files, and what their columns mean."""
