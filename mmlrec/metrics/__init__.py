"""Exact metrics and the task x scenario report."""
