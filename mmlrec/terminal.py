"""What is printed: no text from elsewhere - a raw file, a manifest, a run folder - commands the terminal."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

#: Control characters but tab and line end, marks that turn the direction of writing, and halves of surrogate pairs.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_MOVES_UP = re.compile("(?:\x1b\\[A)+")


def plain(text: str) -> str:
    r"""The text with all that is no text written as Python writes it: an escape becomes `\x1b`."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Within it, whatever is written to stdout and stderr is `plain`. What a stream's encoding lacks is written likewise."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _PlainStream(stream)) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _PlainStream:
    """A stream for text; what is not about writing is left to the stream behind it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, plainly.

        How progress bars come back to their line stays: a carriage return that begins it, or a write of nothing but moves up,
        as a bar below another one makes.
        """
        if _MOVES_UP.fullmatch(text):
            return self._stream.write(text)
        start = "\r" if text.startswith("\r") else ""
        encoding = self._stream.encoding or "utf-8"
        shown = plain(text.removeprefix("\r")).encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(start + shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write them one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
