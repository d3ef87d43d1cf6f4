"""Scores of raw rows from an exported model folder; of training it needs nothing.

model = mmlrec.serving.load("model")
scores = model.score(rows)
"""

from mmlrec.serving.model import Model, load

__all__ = ["Model", "load"]
