"""What tests of several folders share as fixtures."""

import importlib
import sys
from collections.abc import Callable

import pytest

from apps.cli import run


@pytest.fixture
def run_app(monkeypatch, capfd) -> Callable[..., tuple[int, str]]:
    """Runs an entry point in this process, `run_app(name, *arguments)`; returns exit code and standard error."""

    def call(name: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            run(importlib.import_module(f"apps.{name}").main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capfd.readouterr().err

    return call
