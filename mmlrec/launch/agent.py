"""torchrun with an honest end: `python -m mmlrec.launch.agent OPTIONS -m apps.train ...`, options as of `torchrun`.

torchrun ends with 1 whatever happened to its ranks, and schedulers start a job again because of that. Here the exit code says
what happened, the same one on all nodes:

0    done
2, 3 a mistake of the user (configuration, path, data; a broken installation): starting again would end the same way
85   stopped by a signal, state saved: to be started again
130  interrupted
1    anything else, such as a rank that was killed: starting again continues from the newest checkpoint

A mistake is not started again in place either, and Slurm is told so. When its ranks have ended, an agent does not outlive them
for long, also where the network to the other nodes is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.launcher import api as launcher

from mmlrec.distributed.heartbeat import reachable, wait_for
from mmlrec.distributed.stopping import StopSignal
from mmlrec.errors import MISTAKES

LOST, PREEMPTED, INTERRUPTED = 1, StopSignal.PREEMPTED, 130
_AGAIN = "Run the same command again to continue from the newest checkpoint."
_MEANING = {
    LOST: "a rank or a node was lost; starting again continues from the newest checkpoint",
    **dict.fromkeys(MISTAKES, "a mistake to mend first; starting again would end the same way"),
    PREEMPTED: "stopped, state saved; starting again continues from there",
    INTERRUPTED: "interrupted",
}
#: Seconds: for other nodes to tell their outcome; for them to read it; and for the last of them to have the answer.
_AGREE_WITHIN, _READ_WITHIN = 10.0, 2.0
_LAST_READ = 0.3
#: Longest wait for other nodes whose ranks have not ended when those of this one are done, as of torchrun.
_EXIT_BARRIER = 300.0
#: How long torchrun waits for the other ranks of a node, when one has ended, before it kills them; and then once more.
_POLITE = 30.0
#: A rank has failed for so long, and the main thread has not got on for so long: it waits for an answer that does not come.
_STUCK_AFTER = 10.0
#: In the store of the agents: a node has ended without being done.
_OVER = "mmlrec/over"
#: How long the first node may be out of reach while the nodes meet.
_OUT_OF_REACH = 60.0


def outcome(codes: Iterable[int], stopped_by: int = 0) -> int:
    """One exit code for those of all ranks, or of all nodes.

    Args:
        codes: 0 and more, or minus the signal that killed the process.
        stopped_by: the signal that all were sent by way of the agent, if any: one that died of it had done nothing yet.
    """
    stopped = INTERRUPTED if stopped_by == signal.SIGINT else PREEMPTED
    found = set(codes) - {0}
    gone = {-stopped_by, INTERRUPTED} if stopped == INTERRUPTED else {-stopped_by}
    if stopped_by and found & gone:
        found = found - {-stopped_by, LOST} | {stopped}  # Ranks that had not heard of it yet have lost those that had.
    if len(found) > 1:
        found.discard(-signal.SIGTERM)  # With it the agent ends the others, which may be about to end by themselves.
    for mistake in MISTAKES:  # Other ranks have ended because of it.
        if mistake in found:
            return mistake
    if not found:
        return 0
    return found.pop() if found in ({PREEMPTED}, {INTERRUPTED}) else LOST


class Agent(LocalElasticAgent):
    """torchrun's agent of one node, which knows what to end with."""

    #: What this process is to end with, when that is known; why, where no rank has told it.
    code: ClassVar[int | None] = None
    reason: ClassVar[str] = ""
    #: Host and port where the nodes meet.
    first: ClassVar[str] = ""
    #: Seconds that ranks have for their end, `--shutdown-timeout`.
    grace: ClassVar[int] = 30

    def __init__(self, spec: WorkerSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self._meets = True
        #: Since when another node is known to have ended without being done; when that is asked again.
        self._over_since: float | None = None
        self._asks_at = 0.0
        self._takes(0)

    def run(self, role: str = "default") -> RunResult:
        """As the base class; sets `code` and `reason`."""
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        try:
            result = super().run(role)
        except SignalException as stop:
            codes = self._codes()
            if codes:
                Agent.code = outcome(codes, stop.sigval)
            self._agree(Agent.code or 0, wait=0)
            raise
        except RendezvousError as error:
            Agent.code = self._agree(outcome(self._codes()) or LOST)
            if Agent.code == LOST and not self._told() and self._over_since is None:
                Agent.reason = _why(error)
            raise
        if result.is_failed():
            Agent.code = self._agree(outcome(self._codes()))
            if Agent.code == LOST and self._worker_group.group_world_size == 1 and not self._told():
                # With several nodes, ranks of another one tell it.
                Agent.reason = f"no rank of this run ended with a message: killed, or out of memory. {_AGAIN}"
        return result

    def _context(self) -> SubprocessContext | None:
        assert self._pcontext is None or isinstance(self._pcontext, SubprocessContext)
        return self._pcontext

    def _codes(self) -> list[int]:
        """How the ranks of this node ended, those that have."""
        context = self._context()
        codes = [handler.proc.poll() for handler in context.subprocess_handlers.values()] if context else []
        return [code for code in codes if code is not None]

    def _told(self) -> bool:
        """Whether a rank of this node has told why it ended."""
        context = self._context()
        return context is not None and any(Path(file).is_file() for file in context.error_files.values())

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._end_ranks_that_hang()
        self._takes(2 * _POLITE)
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            self._settle_restarts(outcome(self._codes()))
        self._takes(0)
        return result

    def _end_ranks_that_hang(self) -> None:
        """Kill the ranks of this node where another one has ended, and these have not in the time that there is for an end.

        They are the ones that the others did not wait for any longer, and nobody else would end them.
        """
        group, store, now = self._worker_group, self._store, time.monotonic()
        if store is None or group.group_world_size == 1 or now < self._asks_at:
            return
        self._asks_at = now + 1
        with contextlib.suppress(RuntimeError):  # the store is gone, and who hosts it
            self._over_since = (self._over_since or now) if store.check([_OVER]) else None
        if self._over_since is not None and now - self._over_since > self.grace + _STUCK_AFTER:
            self._kill_ranks()

    def _kill_ranks(self) -> None:
        context = self._context()
        for handler in context.subprocess_handlers.values() if context else ():
            with contextlib.suppress(OSError):
                handler.close(signal.SIGKILL)

    def _settle_restarts(self, found: int) -> None:
        """What is not started again in place, and what does not count as a failure."""
        settings = getattr(self._worker_group.spec.rdzv_handler, "settings", None)
        elastic = settings is not None and settings.min_nodes < settings.max_nodes
        if found in (*MISTAKES, INTERRUPTED) or (found == PREEMPTED and not elastic):
            self._remaining_restarts = 0
        elif found == PREEMPTED and self._worker_group.spec.max_restarts:
            self._remaining_restarts += 1  # Another node goes, or comes; all ranks have saved.

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        """As the base class; ranks have the time of `--shutdown-timeout`, which it gives after a signal only, or never."""
        self._takes(2 * self.grace)
        if context := self._context():
            context.close(death_sig, self.grace)
        super()._shutdown(death_sig)

    def _exit_barrier(self) -> None:
        """Wait for the other nodes when the ranks of this one are done; to the base class's barrier none comes that fails."""
        Agent.code = self._agree(0, wait=_EXIT_BARRIER)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._meets = True
        try:
            super()._rendezvous(worker_group)
        finally:
            self._takes(0)
            self._meets = False

    def _agree(self, own: int, wait: float = _AGREE_WITHIN) -> int:
        """The outcome of all nodes, which schedulers look at any of.

        Args:
            wait: longest wait for the other nodes, in seconds.
        """
        self._takes(_READ_WITHIN)
        if own:
            _ignore_signals()
        group, store = self._worker_group, self._store
        if store is None or group.group_world_size == 1:
            return own
        keys = [f"mmlrec/ended/{rank}" for rank in range(group.group_world_size)]
        told = []

        def told_by_all() -> bool:
            self._takes(_READ_WITHIN)
            return store.check(keys)

        with contextlib.suppress(RuntimeError, RendezvousError):  # the store is gone, and who hosts it
            store.set(keys[group.group_rank], str(own))
            if own:
                store.set(_OVER, "")
            if wait:
                # Nodes that want to start again in place must not wait for this one.
                group.spec.rdzv_handler.set_closed()
                wait_for(told_by_all, wait)
            told = [int(store.get(key)) for key in keys if store.check([key])]
            # One of the agents hosts the store, and should not take it away before all have read, and know that all have.
            store.add("mmlrec/read", 1)
            wait_for(lambda: store.add("mmlrec/read", 0) >= len(told), min(wait, _READ_WITHIN))
            if wait:
                group.spec.rdzv_handler.shutdown = lambda: True  # Closed; nobody asks any more.
                time.sleep(_LAST_READ)
        return outcome([own, *told])

    def _takes(self, seconds: float) -> None:
        """Allow the main thread that long until it calls this again, and some more."""
        self._due = time.monotonic() + seconds + _STUCK_AFTER

    def _watch(self) -> None:
        """End this process, in a thread, where the main one waits for an answer that does not come.

        The agents' store is asked without a limit: when the network is gone, the kernel tries for a quarter of an hour.
        """
        failed = None
        # At a static meeting point (MASTER_ADDR, as of Kubeflow Trainer) agents begin before the first node is there; its name
        # may not exist until then. At others they have reached it before.
        reached = None if self._rdzv_handler.get_backend() == "static" else time.monotonic()
        while True:
            time.sleep(1)
            now, codes = time.monotonic(), self._codes()
            ended = any(codes) or len(codes) == self._worker_group.spec.local_world_size
            failed = (failed or now) if ended and not self._meets else None
            reached = now if not self._meets or reachable(self.first) else reached
            if (reached and now - reached > _OUT_OF_REACH) or (failed and now > max(failed + _STUCK_AFTER, self._due)):
                self._give_up(codes)

    def _give_up(self, codes: list[int]) -> NoReturn:
        if not reachable(self.first):
            # Not called an error: a node that reaches the first one tells what it means for the run.
            _tell(f"cut off: the first node ({self.first}) does not answer; it is gone, or the network to it. {_AGAIN}")
        self._kill_ranks()
        time.sleep(1)  # The threads that show what the ranks wrote get to its end.
        _end(Agent.code if Agent.code is not None else outcome(codes) if codes else LOST)


def main() -> None:
    """Run torchrun in this process, and end with the code that says what happened."""
    # The agents' store is shared with the ranks by default, and outlives them: those of a new start in place read the addresses
    # of dead ones there, and hang (pytorch issue 135712). Without it rank 0 opens one, new for each start.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    arguments = _options().parse_args(sys.argv[1:])
    Agent.first = torchrun.get_rdzv_endpoint(arguments)
    Agent.grace = _grace(arguments)
    launcher.LocalElasticAgent = Agent  # type: ignore[assignment,misc]
    processes.logger.addFilter(_tells_a_failure)
    processes._terminate_process_handler = _stop  # type: ignore[assignment]
    for name in arguments.signals_to_handle.split(","):
        signal.signal(getattr(signal, name.strip()), _stop)  # which torchrun does when it has ranks
    # Where somebody wants to know the first error in a file, as TorchX does on this machine.
    run = record(torchrun.run) if "TORCHELASTIC_ERROR_FILE" in os.environ else torchrun.run
    try:
        run(arguments)
    except ChildFailedError as failed:
        if Agent.code == LOST:
            _tell(str(failed))
    except SignalException:
        pass
    except (RendezvousError, DistError) as error:  # The second is of a static meeting point, as of Kubeflow Trainer.
        if Agent.code is None:
            Agent.reason = _why(error)
    if Agent.reason:
        _tell(f"error: {Agent.reason}")
    _end(LOST if Agent.code is None else Agent.code)


def _options() -> argparse.ArgumentParser:
    """The options of torchrun, and `--shutdown-timeout`, which that of torch 2.11 has not."""
    parser = torchrun.get_args_parser()
    with contextlib.suppress(argparse.ArgumentError):
        parser.add_argument("--shutdown-timeout", "--shutdown_timeout", type=int, help="Seconds that ranks have for their end.")
    return parser


def _grace(arguments: argparse.Namespace) -> int:
    """What torchrun takes for its own time-out; 0 is one, too."""
    given: int | None = arguments.shutdown_timeout
    return int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", Agent.grace)) if given is None else given


def _why(error: Exception) -> str:
    """Why the nodes of a job do not meet, or no more, in words."""
    whys: dict[type[Exception], str] = {
        RendezvousConnectionError: f"the first node ({Agent.first}) has ended, or cannot be reached.",
        RendezvousTimeoutError: f"fewer nodes than the job needs came to {Agent.first} in time (join_timeout).",
        RendezvousClosedError: f"the job has ended on another node, as {Agent.first} says.",
    }
    return f"{whys.get(type(error), f'the nodes do not meet at {Agent.first}: {error}')} {_AGAIN}"


def _end(code: int) -> NoReturn:
    """End this process with all its threads, some of which may wait for a store that does not answer."""
    if code:
        _tell(f"ended with exit code {code}: {_MEANING[code]}")
    if code in MISTAKES:
        _keep_slurm_from_starting_again()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """Handles a signal: the ranks get it, and their time. Slurm sends some twice, and the second would cut that short."""
    _ignore_signals()
    Agent.code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
    raise SignalException(f"Process {os.getpid()} got signal {number}", signal.Signals(number))


def _ignore_signals() -> None:
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # someone at a terminal does not want to wait


def _keep_slurm_from_starting_again() -> None:
    """TorchX's batch script asks for that whatever the exit code is; Slurm then refuses it, and the job has failed."""
    if "TORCHX_MAX_RETRIES" in os.environ and "SLURM_JOB_ID" in os.environ and shutil.which("scontrol"):
        command = ["scontrol", "update", f"JobId={os.environ['SLURM_JOB_ID']}", "Requeue=0"]
        try:
            subprocess.run(command, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:  # The exit code is told all the same.
            _tell(f"Slurm may start this job again in vain: {error}")


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _tells_a_failure(record: logging.LogRecord) -> bool:
    """Whether to print what torchrun logs: a rank that has saved, as all do when nodes come or go, has not `failed`."""
    given = record.args if isinstance(record.args, tuple) else ()
    return not (str(record.msg).startswith("failed (exitcode: %s)") and given[:1] == (PREEMPTED,))


if __name__ == "__main__":
    main()
