"""Machinery shared by all datasets. `dataset.py` is the contract that a dataset file fills; `engine.py` runs it."""
