"""The strategies, one file each: file name = registry name = YAML `balancing.name`."""
