"""The tests that every method and every dataset passes, for those outside this repository, too. They need `pip install pytest`.

`mmlrec.testing.methods.MethodContract` and `mmlrec.testing.datasets.DatasetContract` are classes of tests: a subclass in a test
file of one's own names the method or the dataset, and pytest runs them. The repository's own tests are subclasses of them.
"""

import pytest

_ASSERTING = ("contract", "networks", "invariants", "stability", "compiled", "tied_heads", "datasets", "raw_folders")
# Before they are imported: a failing assertion then shows its values, as it does in a test file.
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _ASSERTING))
