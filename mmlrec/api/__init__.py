"""What Python code calls: `mmlrec.prepare`, `mmlrec.train`, `mmlrec.load_run`. In words: docs/python.md."""
