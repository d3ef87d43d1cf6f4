"""What a trained model is used for: predictions of a split, the report made of them, scores as a file."""
