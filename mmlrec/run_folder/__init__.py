"""What a run leaves behind: its small files and its checkpoints."""
