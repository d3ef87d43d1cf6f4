"""Reports at the end of files: events that TensorBoard reads, numbers by tag and step.

The form is that of TensorBoard's own writer: records of length, checksum of the length, an `Event`, checksum of the event. That
writer imports much of TensorBoard, boto3 and fsspec, which takes as long as a training of some steps, and writes in a thread.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

_POLYNOMIAL = 0x82F63B78  # of CRC-32C (Castagnoli), reflected
_number = itertools.count()  # of files of this process


def _table() -> list[int]:
    """What a byte makes of a checksum."""
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (_POLYNOMIAL if value & 1 else 0) for value in table]
    return table


_OF_BYTE = _table()


class Curves:
    """An open file of events. What it holds after an error is whole.

    Args:
        folder: made when it is not there.
        first_step: TensorBoard hides what other files in the folder say of this step and later ones.

    Raises:
        OSError: it cannot be written, here or in `add`.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._file = (folder / name).open("xb", buffering=0)
        version = "brain.Event:2"
        try:
            self._append(Event(file_version=version))
            self._append(Event(file_version=version, step=first_step))
            self._append(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self.close()
            raise

    def add(self, values: Mapping[str, float], step: int) -> None:
        """A point of each curve, by tag."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(Event(step=step, summary=Summary(value=points)))

    def close(self) -> None:
        """Nothing more is added."""
        self._file.close()

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        append_whole(self._file, length + _checksum(length) + content + _checksum(content))


def append_whole(file: FileIO, content: bytes) -> None:
    """Write at the end of a file: all of it, or nothing where there is room for a part of it only.

    Raises:
        OSError: it cannot be written.
    """
    written = 0
    try:
        while written < len(content):
            written += file.write(content[written:])
    except OSError:
        if written:
            file.truncate(file.tell() - written)
        raise


def _checksum(content: bytes) -> bytes:
    """CRC-32C, rotated and moved, as records have it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _OF_BYTE[crc & 0xFF ^ byte] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF)
