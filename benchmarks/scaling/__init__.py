"""Weak and strong scaling, measured where it fits and planned beyond; `python -m benchmarks.scaling --help`."""
