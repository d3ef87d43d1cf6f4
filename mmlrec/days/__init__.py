"""A log that grows by a day at a time: the model of each day is measured on the next one, then trained on it."""
