"""From dataset folder to batches."""
