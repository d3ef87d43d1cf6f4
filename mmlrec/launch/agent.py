"""torchrun with an honest end: `python -m mmlrec.launch.agent OPTIONS -m apps.train ...`, options as of `torchrun`.

torchrun ends with 1 whatever happened to its ranks, and schedulers start a job again because of that. Here the exit code says
what happened, the same one on all nodes:

0    done
2, 3 a mistake of the user (configuration, path, data; a broken installation): starting again would end the same way
85   stopped by a signal, state saved: to be started again
130  interrupted
1    anything else, such as a rank that was killed: starting again continues from the newest checkpoint

A mistake is not started again in place either, and on Slurm the job is told so. When ranks have ended, the agent does not
outlive them for long, also where the network to the other nodes is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import ClassVar, TypeVar

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError
from torch.distributed.launcher import api as launcher

from mmlrec.distributed.stopping import StopSignal

T = TypeVar("T")

LOST, MISTAKES, INTERRUPTED = 1, (2, 3), 130
_MEANING = {
    LOST: "a rank or a node was lost; starting again continues from the newest checkpoint",
    **dict.fromkeys(MISTAKES, "a mistake to mend first; starting again would end the same way"),
    StopSignal.PREEMPTED: "stopped, state saved; starting again continues from there",
    INTERRUPTED: "interrupted",
}
#: Seconds: for other nodes to tell their outcome; for them to read it.
_AGREE_WITHIN, _READ_WITHIN = 10.0, 2.0


def outcome(codes: Iterable[int], stopped_by: int = 0) -> int:
    """One exit code for those of all ranks, or of all nodes.

    Args:
        codes: 0 and more, or minus the signal that killed the process.
        stopped_by: the signal that all were sent by way of the agent, if any: one that died of it had done nothing yet.
    """
    stopped = INTERRUPTED if stopped_by == signal.SIGINT else StopSignal.PREEMPTED
    found = {stopped if stopped_by and code == -stopped_by else code for code in codes} - {0}
    for mistake in MISTAKES:  # Other ranks have ended because of it.
        if mistake in found:
            return mistake
    if not found:
        return 0
    return found.pop() if found in ({StopSignal.PREEMPTED}, {INTERRUPTED}) else LOST


class Agent(LocalElasticAgent):
    """torchrun's agent of one node, which knows at its end what to end with."""

    #: What this process is to end with.
    code: ClassVar[int] = LOST

    def run(self, role: str = "default_role") -> RunResult:
        """As the base class; sets `code`."""
        try:
            result = super().run(role)
        except SignalException as stop:
            Agent.code = outcome(self._codes(), stop.sigval) or (0 if self._codes() else StopSignal.PREEMPTED)
            raise
        except Exception:
            Agent.code = self._agree(outcome(self._codes()) or LOST)
            raise
        Agent.code = self._agree(outcome(self._codes())) if result.is_failed() else 0
        return result

    def _codes(self) -> list[int]:
        """How the ranks of this node ended, those that have."""
        if self._pcontext is None:
            return []
        assert isinstance(self._pcontext, SubprocessContext)
        codes = [handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()]
        return [code for code in codes if code is not None]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and outcome(self._codes()) in (*MISTAKES, INTERRUPTED):
            self._remaining_restarts = 0
        return result

    def _agree(self, own: int) -> int:
        """The outcome of all nodes: schedulers look at any of them."""
        group, store = self._worker_group, self._store
        if store is None or group.group_world_size == 1:
            return own

        def ask() -> list[int]:
            keys = [f"mmlrec/ended/{rank}" for rank in range(group.group_world_size)]
            store.set(keys[group.group_rank], str(own))
            _wait(lambda: store.check(keys), _AGREE_WITHIN)
            told = [int(store.get(key)) for key in keys if store.check([key])]
            # One of the agents hosts the store: it leaves last.
            store.add("mmlrec/read", 1)
            _wait(lambda: store.add("mmlrec/read", 0) >= len(told), _READ_WITHIN)
            return told

        return outcome([own, *_within(_AGREE_WITHIN + _READ_WITHIN + 1, ask, [])])


def main() -> None:
    """Run torchrun in this process, and end with the code that says what happened."""
    # Ranks that are started again must not meet in the store of the agents: they would read addresses of dead ones.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    arguments = torchrun.parse_args(sys.argv[1:])
    launcher.LocalElasticAgent = Agent  # type: ignore[misc]
    processes._terminate_process_handler = _stop  # type: ignore[assignment]
    first = torchrun.get_rdzv_endpoint(arguments)
    try:
        record(torchrun.run)(arguments)
    except ChildFailedError as failed:
        if Agent.code == LOST:
            _tell(str(failed))
    except SignalException:
        pass
    except RendezvousConnectionError:
        _tell(f"error: the first node ({first}) has ended, or cannot be reached.")
    except RendezvousError as error:
        _tell(f"error: the nodes do not meet at {first}: {type(error).__name__}: {error}")
    if Agent.code:
        _tell(f"ended with exit code {Agent.code}: {_MEANING[Agent.code]}")
    if Agent.code in MISTAKES:
        _keep_slurm_from_starting_again()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(Agent.code)  # Threads may wait for a store that does not answer.


def _stop(number: int, frame: FrameType | None) -> None:
    """Handles a signal: the ranks get it, and their time. Slurm sends some twice, and the second would cut that short."""
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise SignalException(f"Process {os.getpid()} got signal {number}", signal.Signals(number))


def _keep_slurm_from_starting_again() -> None:
    """TorchX's batch script asks for that whatever the exit code is; Slurm then refuses it, and the job has failed."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and shutil.which("scontrol"):
        subprocess.run(["scontrol", "update", f"JobId={job}", "Requeue=0"], timeout=30, check=False)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def _within(seconds: float, call: Callable[[], T], otherwise: T) -> T:
    """What `call` returns, or `otherwise` when it fails or does not return in time."""
    found = [otherwise]

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found[0] = call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


if __name__ == "__main__":
    main()
