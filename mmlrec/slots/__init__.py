"""Managed tables: which id holds which row, as ids earn and lose rows while a run trains."""
