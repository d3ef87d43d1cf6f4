"""Entry points look for no garbage while they import, and do look for it while they work."""

import gc
from pathlib import Path

import pytest

from apps.cli import all_imported, run
from mmlrec.errors import UserError
from tests.processes import ROOT

WORKING = [path for path in sorted((ROOT / "apps").glob("*.py")) if " process_group(" in path.read_text()]


def test_none_is_looked_for_until_all_is_imported():
    seen = []

    def main() -> None:
        seen.append(gc.isenabled())
        all_imported()
        seen.append(gc.isenabled())

    run(main)
    assert seen == [False, True]


def test_it_is_looked_for_again_after_an_error():
    def main() -> None:
        raise UserError("no")

    with pytest.raises(SystemExit):
        run(main)
    assert gc.isenabled()


@pytest.mark.parametrize("path", WORKING, ids=lambda path: path.stem)
def test_what_works_with_a_model_looks_for_it(path: Path):
    imports, work = path.read_text().split(" process_group(", 1)
    assert imports.endswith("    all_imported()\n    with")
    assert " import " not in work


def test_these_are_the_entry_points_that_work_with_a_model():
    assert {path.stem for path in WORKING} == {"days", "evaluate", "export", "predict", "seeds", "train"}
