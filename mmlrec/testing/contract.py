"""What the contracts share: tests as methods of a class, whose cases depend on what its subclass names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., None])
_CASES = "_cases_of_the_class"
_LONG = "long: takes long; left out with -m 'not long'"


def over(arguments: str, cases: Callable[[Any], Iterable[Any]]) -> Callable[[Test], Test]:
    """Parametrise a test by its class: like `pytest.mark.parametrize`, but the cases are a function of the class.

    Args:
        arguments: names of the test's arguments, with commas between them.
        cases: the class, at hand as an instance of it -> values, or `pytest.param`s.
    """

    def mark(test: Test) -> Test:
        setattr(test, _CASES, [*getattr(test, _CASES, ()), (arguments, cases)])
        return test

    return mark


class Contract:
    """Base of the classes of tests."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Called by pytest for each test of the class."""
        if not any(line.startswith("long") for line in metafunc.config.getini("markers")):
            metafunc.config.addinivalue_line("markers", _LONG)
        for arguments, cases in getattr(metafunc.function, _CASES, ()):
            metafunc.parametrize(arguments, list(cases(self)))
