"""A report of rows that lie on several ranks is that of all rows at once, whatever lies where and however few fit at a time."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch.distributed as dist

from mmlrec.metrics import exact
from mmlrec.metrics.gather import PredictionRows
from mmlrec.metrics.ranks import Ranks
from mmlrec.metrics.report import build_report
from mmlrec.schema import Scenario, Task
from tests.processes import spawn

N = 3000
TASKS = [Task(name="click"), Task(name="buy"), Task(name="seconds", kind="regression")]
PAGES = Scenario(name="page", values=["home", "cart", "deal"])
OPTIONS = {"tasks": TASKS, "scenario": PAGES, "chain": (0, 1), "deviations": {"seconds": {"all": 2.0, "home": 1.0}}}
WORLD_SIZE = 3


def rows_of(weighted, tied, grouped):
    """With weights those of the third scenario are 1e-20 of the others."""
    rng = np.random.default_rng(5)
    mask = rng.random((N, 3)) < 0.8
    labels = (rng.random((N, 3)) < 0.3).astype(np.float32) * mask
    logits = rng.normal(labels, 1).astype(np.float32)
    if tied:  # half of all rows have one score, and there are few others
        logits = np.round(2 * logits) / 2
        logits[rng.random(N) < 0.5] = 0.5
    scenario = np.minimum(rng.integers(0, 5, N), 2)
    weight = rng.uniform(0, 2, N) * np.where(scenario == 2, 1e-20, 1)
    return PredictionRows(
        logits=logits,
        labels=labels,
        mask=mask,
        scenario=scenario,
        weight=weight.astype(np.float32) if weighted else np.ones(N, np.float32),
        group=rng.integers(-40, 40, N) * 10**9 if grouped else np.zeros(N, np.int64),
        row=np.arange(N),
    )


CASES = [(False, False, True), (False, True, True), (True, False, True), (True, True, False)]


def taken(rows, chosen):
    return PredictionRows(**{field.name: getattr(rows, field.name)[chosen] for field in dataclasses.fields(rows)})


def _report(rank, world_size, folder):
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    exact.ROUND_ROWS, exact.CHUNK_ROWS = 64, 100
    received, exchange = [0], Ranks.exchange

    def counting(self, rows, to):
        found = exchange(self, rows, to)
        received.append(len(found["score"]))
        return found

    Ranks.exchange = counting
    reports = []
    for case in CASES:
        rows = rows_of(*case)
        # The first rank has the lowest scores, the second none, the third the rest.
        order = np.argsort(rows.logits[:, 0], kind="stable")
        own = taken(rows, [order[: N // 3], order[:0], order[N // 3 :]][rank])
        reports.append(build_report(own, **OPTIONS, ranks=Ranks(rank, world_size)))
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump((reports, max(received)), file)
    dist.barrier()
    dist.destroy_process_group()


def numbers(report, prefix=""):
    found = {}
    for name, value in report.items():
        found |= numbers(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_report, (WORLD_SIZE, str(folder)), nprocs=WORLD_SIZE)
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_any_rows_on_any_rank_give_the_report_of_all_at_once(of_ranks, case):
    weighted, _, grouped = CASES[case]
    alone = build_report(rows_of(*CASES[case]), **OPTIONS)
    for reports, _ in of_ranks:
        if weighted:  # sums of weights are rounded where they are made
            wanted = {name: value and pytest.approx(value, rel=1e-12) for name, value in numbers(alone).items()}
            assert numbers(reports[case]) == wanted

        else:
            assert json.dumps(reports[case]) == json.dumps(alone)
    assert (alone["tasks"]["click"]["gauc"] is not None) == grouped


def test_a_rank_never_holds_many_rows_at_a_time(of_ranks):
    """3,000 rows, of which one rank has 2,000, and at most 64 at a time: by their share of ranges, some more by chance."""
    assert all(0 < most <= 3 * 64 for _, most in of_ranks)
