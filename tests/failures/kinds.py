"""What is made to fail, and when."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from tests.failures.job import Fault, Job

#: Makes a failure; returns what it was, in words, and the number of ranks with which training then has to go on, where
#: that is the point.
Act = Callable[[Job, Random], tuple[str, int | None]]
FAR = float("inf")


@dataclass(frozen=True)
class Kind:
    """A training with failures of one kind.

    Attributes:
        acts: taken in turn.
        failures: how many in the training.
        moment: a random step; a random time after the start, before the first step; while a checkpoint is being written; or
            during a validation.
        errors: least and most lines of all logs that say why a rank ended (`error:`, `stopped at step`) after a failure.
        goes_on: the same processes train on.
        same_bits: all weights equal those of a run without failures; otherwise its losses are equal to 1e-5.
        first_hosts: hosts that are there at the beginning.
        last_steps: so many at the end without a failure.
    """

    acts: tuple[Act, ...]
    failures: int = 3
    moment: Literal["step", "start", "checkpoint", "validation"] = "step"
    errors: tuple[int, int] = (1, 1)
    goes_on: bool = False
    same_bits: bool = True
    nodes: int | str = 2
    first_hosts: int = 2
    max_restarts: int = 0
    timeout: int = 20
    step_seconds: float = 0.03
    last_steps: int = 0
    options: tuple[str, ...] = ()


def worker(rank: int, how: signal.Signals = signal.SIGKILL) -> Act:
    """The kernel kills a rank, as for memory; or it stops."""

    def act(job: Job, _: Random) -> tuple[str, int | None]:
        for number in job.running:
            if job.rank(number) == rank:
                job.kill(job.worker(number), how)
                done = "killed" if how == signal.SIGKILL else "stopped"
                return f"rank {rank} on {job.hosts.names[number]} {done}", None
        raise Fault(f"no process of rank {rank}")

    return act


def agent(number: int) -> Act:
    """What runs the ranks of a host is killed."""

    def act(job: Job, _: Random) -> tuple[str, int | None]:
        job.kill(job.agent(number))
        return f"agent on {job.hosts.names[number]} killed", None

    return act


def host(number: int, returns: bool = True) -> Act:
    """A host loses power, and comes back after some seconds, or when it is told."""

    def act(job: Job, random: Random) -> tuple[str, int | None]:
        away = random.uniform(0, 5)
        job.away[number] = time.time() + away if returns else FAR
        job.hosts.kill(number)
        name = job.hosts.names[number]
        return (f"{name} killed, back after {away:.1f} s", None) if returns else (f"{name} killed", 1)

    return act


def come(number: int) -> Act:
    """A host comes, or comes back. Training is slow until it is there, as it might be over before."""

    def act(job: Job, _: Random) -> tuple[str, int | None]:
        job.pace(1.0)
        for other in range(2):
            job.hosts.heal(other)
        job.away[number] = 0.0
        return f"{job.hosts.names[number]} comes", 2

    return act


def any_of(*acts: Act) -> Act:
    """One of them by chance."""

    def act(job: Job, random: Random) -> tuple[str, int | None]:
        return random.choice(acts)(job, random)

    return act


def cut(number: int, seconds: float = FAR, leaves: bool = False) -> Act:
    """The cable of a host is pulled; put back after some seconds, or by whoever starts the job again.

    Args:
        leaves: the second host is away from then on: where it is the first that is cut off, it cannot be reached from there.
    """

    def act(job: Job, _: Random) -> tuple[str, int | None]:
        if leaves:
            job.away[1] = FAR
        job.hosts.cut(number)
        name = job.hosts.names[number]
        if seconds == FAR:
            return f"link of {name} cut", 1 if leaves else None
        time.sleep(seconds)
        job.hosts.heal(number)
        return f"link of {name} cut for {seconds:g} s", None

    return act


def term(*numbers: int, leaves: bool = False) -> Act:
    """A scheduler takes hosts away with a grace period."""

    def act(job: Job, _: Random) -> tuple[str, int | None]:
        for number in numbers:
            if leaves:
                job.away[number] = FAR
            job.kill(job.agent(number), signal.SIGTERM)
        return f"SIGTERM to the agent on {' and '.join(job.hosts.names[number] for number in numbers)}", 1 if leaves else None

    return act


def resize(nodes: int, how: Act) -> Act:
    """The job is stopped and then started with another number of nodes."""

    def act(job: Job, random: Random) -> tuple[str, int | None]:
        job.held = True  # nobody starts it meanwhile
        what, _ = how(job, random)
        if not job.wait(lambda: not job.running, 120):
            raise Fault("the job did not end")
        job.preset = job.preset.model_copy(update={"nodes": nodes})
        job.held = False
        return f"{what}; started with {nodes} node(s)", nodes

    return act


SOMETHING = any_of(worker(0), worker(1), agent(0), agent(1), host(0), host(1))
ASYNC = {"options": ("training.checkpoint_async=true",)}
ELASTIC = {"nodes": "1:2", "max_restarts": 10, "same_bits": False, "step_seconds": 0.15, "last_steps": 60}

KINDS = {
    "rank 0 killed": Kind((worker(0),)),
    "rank 1 killed": Kind((worker(1),)),
    "agent of the first host killed": Kind((agent(0),)),
    "agent of the second host killed": Kind((agent(1),)),
    "first host killed": Kind((host(0),)),
    "second host killed": Kind((host(1),)),
    "link cut for 5 s": Kind((cut(1, 5), cut(0, 5)), errors=(0, 0), goes_on=True, timeout=30, failures=4),
    "link cut for good": Kind((cut(1), cut(0)), failures=4),
    "link cut for good, timeout 60": Kind((cut(1), cut(0)), timeout=60),
    "SIGTERM to one agent": Kind((term(0), term(1)), failures=4),
    "SIGTERM to both agents": Kind((term(0, 1),)),
    "rank stopped for good (SIGSTOP)": Kind((worker(1, signal.SIGSTOP), worker(0, signal.SIGSTOP)), failures=4),
    "SIGTERM before the first step": Kind((term(0), term(1), term(0, 1)), moment="start", errors=(0, 1)),
    "link cut before the first step": Kind((cut(1), cut(0)), moment="start", errors=(0, 1), failures=4),
    "killed before the first step": Kind((SOMETHING,), moment="start", errors=(0, 1)),
    "killed during a checkpoint": Kind((SOMETHING,), moment="checkpoint", failures=4),
    "checkpoints in a thread: killed during one": Kind((SOMETHING,), moment="checkpoint", failures=4, **ASYNC),
    "checkpoints in a thread: killed at any step": Kind((SOMETHING,), failures=4, **ASYNC),
    "checkpoints in a thread: SIGTERM to one agent": Kind((term(0), term(1)), failures=4, **ASYNC),
    "killed during a validation": Kind((SOMETHING,), moment="validation", failures=4),
    "fewer or more nodes at the next start": Kind(
        (resize(1, term(0, 1)), resize(2, term(0)), resize(1, host(1)), resize(2, host(0))),
        failures=4,
        errors=(0, 1),
        same_bits=False,
    ),
    "restarts in place: a rank killed": Kind((worker(0), worker(1)), failures=4, max_restarts=10),
    "elastic: link cut for 5 s": Kind(
        (cut(1, 5), cut(0, 5)), errors=(0, 0), goes_on=True, nodes="1:2", max_restarts=10, timeout=30
    ),
    "elastic: a rank killed": Kind((worker(0), worker(1)), **ELASTIC),
    "elastic: second host killed, comes back": Kind((host(1, returns=False), come(1)), failures=6, errors=(0, 1), **ELASTIC),
    "elastic: first host killed": Kind((host(0),), errors=(0, 1), **ELASTIC),
    "elastic: SIGTERM to the second host, comes back": Kind(
        (term(1, leaves=True), come(1)), failures=6, errors=(0, 1), **ELASTIC
    ),
    "elastic: 1 -> 2 -> 1 hosts": Kind(
        (come(1), host(1, returns=False), come(1), term(1, leaves=True)), failures=4, errors=(0, 1), first_hosts=1, **ELASTIC
    ),
    "elastic: link cut for good": Kind(
        (cut(1, leaves=True), come(1), cut(0, leaves=True), come(1)), failures=4, errors=(0, 2), **ELASTIC
    ),
}
