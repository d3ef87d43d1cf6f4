"""The datasets: one file each, found by name. Each declares its raw files, columns, tasks and scenarios."""
