"""Which row goes where, and the dataset folder: splits, order, Parquet parts, a folder that is whole or absent."""
