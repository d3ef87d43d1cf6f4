"""Ranks that work together: the process group, who hangs, who was asked to stop."""
