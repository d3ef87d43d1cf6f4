"""Signals that ask a process to stop, read at places where it can, and by all ranks at the same one."""

from __future__ import annotations

import enum
import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import ClassVar

from mmlrec.distributed.world import World
from mmlrec.errors import UserError

#: What asks a process of its own to stop: a terminal, a scheduler that takes it away, one that does so soon.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

#: Steps between agreements of all ranks whether one of them was asked to stop.
_AGREE_EVERY = 10


class Asked(enum.IntEnum):
    """What a loop is asked to do before its next step."""

    NOTHING = 0
    #: To end here and go on later.
    PAUSE = 1
    STOP = 2


class Interrupted(UserError):
    """The process was asked to stop by a signal; nothing is half-written."""

    is_error = False

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.exit_code)


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag that loops read between steps. A second SIGINT kills.

    Args:
        signals: others than these three, where the process belongs to somebody else; a second SIGINT is a KeyboardInterrupt
            there. Python takes some in its main thread only.
    """

    #: Exit code for a run that a scheduler stopped and should start again.
    PREEMPTED = 85
    #: A signal that came after the last look at it, in the newest context of this process; it ended without an error.
    _late: ClassVar[int | None] = None

    def __init__(self, world: World, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self._world = world
        self._signals = signals
        self._received: int | None = None

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop; other ranks may not have been."""
        return self._received is not None

    def __enter__(self) -> StopSignal:
        StopSignal._late = None
        self._before = {s: signal.signal(s, self._note) for s in self._signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        StopSignal._late = self._received if kind is None else None

    @classmethod
    def end_if_late(cls, world: World, message: str) -> None:
        """Before more work: end where a signal asked for it when the work before was all but done. All ranks call it.

        Raises:
            Interrupted: with this message.
        """
        stop = cls(world)
        stop._received, cls._late = cls._late, None
        if stop.agreed():
            raise stop.interrupted(message)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT == number:
            if self._signals is not SIGNALS:
                raise KeyboardInterrupt
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self._received = number

    def before(self, index: int, *, also: bool = False, pause: bool = False) -> Asked:
        """Whether to stop, or to pause, before step `index` (0, 1, ...) of a loop in which all ranks take the same steps.

        Args:
            also: this rank has a reason of its own to stop.
            pause: this rank has a reason to pause.
        """
        if self._world.world_size > 1 and index % _AGREE_EVERY != 0:
            return Asked.NOTHING
        return self.agreed(also, pause)

    def agreed(self, also: bool = False, pause: bool = False) -> Asked:
        """Whether a rank was asked to stop, or has a reason of its own, the same on all; each calls it."""
        # One small number: the signal, then the reasons, so that the largest says the most.
        found = self._world.highest(4 * (self._received or 0) + 2 * also + pause)
        if found >= 4 and self._received is None:
            self._received = found // 4
        return Asked(min(found, Asked.STOP))

    def interrupted(self, message: str) -> Interrupted:
        """The error to raise: exit code 130 after SIGINT, as shells do; PREEMPTED otherwise."""
        return Interrupted(message, 130 if self._received == signal.SIGINT else self.PREEMPTED)
