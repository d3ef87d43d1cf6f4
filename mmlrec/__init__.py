"""mmlrec: multi-task and multi-scenario recommendation on TorchRec."""

__version__ = "0.1.0"
