"""Raw files: where they lie, what they hold in which format, and complaints that name file and line."""
