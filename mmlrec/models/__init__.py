"""The methods: one file each, file name = registry name."""
