"""Other ways to train the same data: what they would bring, what would make a plan fit, and what is recommended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmlrec.embeddings.placement import SHARDING_TYPES, state_bytes
from mmlrec.errors import ConfigError
from mmlrec.session.planning import Request, TrainingPlan, plan_training

_GIB = 2**30
_MOST_HOSTS = 4096  # that are tried to make a plan fit


@dataclass(frozen=True)
class Alternative:
    """Another way to train the same data.

    Attributes:
        change: what differs, in words or as keys of the configuration.
    """

    change: str
    plan: TrainingPlan

    def as_dict(self) -> dict[str, Any]:
        """The figures that are compared, as plain data."""
        return {
            "change": self.change,
            "ranks": self.plan.request.hardware.world_size,
            "fits": not self.plan.missing,
            "missing_bytes": self.plan.missing,
            "fullest_rank_bytes": self.plan.fullest.total,
            "fullest_rank_host_bytes": self.plan.fullest_on_host.on_host,
            "step_ms": self.plan.step_ms,
        }


def alternatives(plan: TrainingPlan) -> list[Alternative]:
    """What a change of hosts, optimizer, width or sharding would bring, each planned anew; none that a training refuses."""
    changes = list(_changes(plan.request))
    embeddings = plan.request.config.embeddings
    if plan.missing and plan.request.hardware.device == "cuda" and embeddings.host_cache is None and embeddings.replicas == 1:
        changes.append(("embeddings.host_cache=0.1", plan.request.with_embeddings(plan=None, host_cache=0.1)))
    found = []
    for change, other in changes:
        # Refused: too few rows for a split that is asked for by name, ranks that replicas do not divide, sums in fp8.
        with contextlib.suppress(ConfigError):
            found.append(Alternative(change, plan_training(other, plan)))
    return found


def _changes(given: Request) -> Iterator[tuple[str, Request]]:
    request = given.with_embeddings(plan=None)
    hardware, embeddings = request.hardware, request.config.embeddings
    for hosts in (hardware.num_hosts * 2, hardware.num_hosts // 2):
        if hosts:
            yield _hosts(hosts), _on_hosts(request, hosts)
    for name in (
        "adagrad",
        "rowwise_adagrad",
        "sgd",
        *(["adam"] if hardware.device == "cuda" and embeddings.replicas == 1 else []),
    ):
        if name != embeddings.optimizer.name:
            optimizer = embeddings.optimizer.model_copy(update={"name": name})
            yield f"embeddings.optimizer.name={name}", request.with_embeddings(optimizer=optimizer)
    for dtype in ("fp32", "fp16"):
        if dtype != embeddings.dtype:
            yield f"embeddings.dtype={dtype}", request.with_embeddings(dtype=dtype)
    widths = {"": embeddings.dim, **embeddings.table_dim}
    for words, changed in (
        ("twice", {name: 2 * dim for name, dim in widths.items()}),
        ("half of", {name: dim // 2 for name, dim in widths.items()}),
    ):
        if all(dim and dim % 4 == 0 for dim in changed.values()):
            dim = changed.pop("")
            change = f"embeddings.dim={dim}" + (f", {words} each table_dim" if changed else "")
            yield change, request.with_embeddings(dim=dim, table_dim=changed)
    if hardware.world_size > 1:
        for sharding in ("auto", *(kind for kind in SHARDING_TYPES if hardware.host_of_several or kind != "table_row_wise")):
            if sharding != embeddings.sharding or given.config.embeddings.plan or embeddings.table_sharding:
                yield f"embeddings.sharding={sharding}", request.with_embeddings(sharding=sharding, table_sharding={})
        if embeddings.communication == "fp32":
            shorter = "bf16" if hardware.device == "cuda" else "fp16"
            yield f"embeddings.communication={shorter}", request.with_embeddings(communication=shorter)
    averaged = embeddings.optimizer.name != "adam" and embeddings.host_cache is None
    if hardware.device == "cuda" and hardware.num_hosts > 1 and embeddings.replicas == 1 and averaged:
        yield "embeddings.replicas=2", request.with_embeddings(replicas=2)


def recommendations(plan: TrainingPlan, others: list[Alternative]) -> list[str]:
    """Row-wise Adagrad, where the state of Adagrad or Adam is what does not fit, or as large as any other part of the memory.

    Of a rank's own memory or of that of its host, where tables lie there. A training takes what its configuration says,
    whatever the sizes: this is advice.

    Args:
        others: alternatives that are planned already.
    """
    optimizer = plan.request.config.embeddings.optimizer
    rank, of_host, state = plan.fullest, plan.fullest_on_host, _all_state(plan)
    hardware = plan.request.hardware
    too_large = 0 < rank.total - hardware.usable <= rank.state
    too_large |= 0 < of_host.on_host - hardware.usable_on_host <= of_host.host_state
    largest = rank.state >= max(rank.weights, rank.network, rank.activations, rank.buffers)
    largest |= 0 < of_host.host_state >= of_host.host_weights
    if optimizer.name not in ("adagrad", "adam") or not (too_large or (state >= _GIB and largest)):
        return []
    change = "embeddings.optimizer.name=rowwise_adagrad"
    found = next((other.plan for other in others if other.change == change), None)
    if found is None:
        rowwise = optimizer.model_copy(update={"name": "rowwise_adagrad"})
        found = plan_training(plan.request.with_embeddings(plan=None, optimizer=rowwise), plan)
    fits = "" if not plan.missing else ", which fits" if not found.missing else ", which does not fit either"
    return [
        f"{change}: {_all_state(found) / _GIB:.2f} GiB of state in place of {state / _GIB:.2f},"
        f" {found.fullest_words} in place of {plan.fullest_words.replace(' on the fullest rank', '')}{fits}. It is another"
        " algorithm: one rate for each row in place of one for each number"
    ]


def _all_state(plan: TrainingPlan) -> int:
    """Bytes of the optimizer's state of all tables, on all ranks and hosts."""
    return sum(rank.state + rank.host_state for rank in plan.ranks)


def remedies(plan: TrainingPlan, others: list[Alternative]) -> list[str]:
    """What would make a plan fit that does not: single changes among `others`, and the least number of hosts, by doubling."""
    found = [
        f"{other.change}: {other.plan.fullest_words}, {other.plan.step_ms:.2f} ms a step"
        for other in others
        if not other.plan.missing
    ]
    request = plan.request.with_embeddings(plan=None)
    if any(other.plan.request.hardware.num_hosts > request.hardware.num_hosts and not other.plan.missing for other in others):
        return found
    optimizers = [request.config.embeddings.optimizer.name, "rowwise_adagrad"]
    for name in dict.fromkeys(optimizers):
        other = request.with_embeddings(optimizer=request.config.embeddings.optimizer.model_copy(update={"name": name}))
        hosts = request.hardware.num_hosts * 4
        while hosts <= _MOST_HOSTS and not _may_fit(plan, name, hosts):
            hosts *= 2
        while hosts <= _MOST_HOSTS:
            try:
                larger = plan_training(_on_hosts(other, hosts), plan)
            except ConfigError:
                break  # A table has too few rows for the split over so many ranks that is asked for by name.
            if not larger.missing:
                changes = [_hosts(hosts), *([f"embeddings.optimizer.name={name}"] if name != optimizers[0] else [])]
                found.append(f"{' and '.join(changes)}: {larger.fullest_words}")
                break
            if larger.fullest.weights + larger.fullest.state + larger.fullest.on_host and not any(
                table.sharding == "row_wise" for table in larger.tables if larger.fullest.rank in table.ranks
            ):
                break  # A table that lies whole on one rank or host is too large: more hosts do not help.
            hosts *= 2
    return found


def _may_fit(plan: TrainingPlan, optimizer: str, hosts: int) -> bool:
    """Whether the tables, split evenly, fit at all."""
    hardware, embeddings = plan.request.hardware, plan.request.config.embeddings
    bytes_of_tables = sum(t.weight_bytes + state_bytes(optimizer, t.rows, t.dim) for t in plan.tables)
    room = hardware.usable + (0 if embeddings.host_cache is None else hardware.usable_on_host)
    return embeddings.replicas * bytes_of_tables <= hosts * hardware.ranks_per_host * room


def _hosts(hosts: int) -> str:
    return f"{hosts} host{'s' if hosts > 1 else ''}"


def _on_hosts(request: Request, hosts: int) -> Request:
    hardware = replace(request.hardware, world_size=hosts * request.hardware.ranks_per_host)
    return replace(request, hardware=hardware)
