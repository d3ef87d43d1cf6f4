"""`python -m preprocessing describe`: what a dataset folder holds, as tables and as a page."""
