"""Optimizers, pipeline, checkpoints, reporting and the training loop. No knowledge of single methods."""
