"""The training loop of one run: steps, validation, the choice of the best, reports. No knowledge of single methods."""
