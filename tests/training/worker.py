"""One rank of a test launch: runs a list of actions in one process group.

`python worker.py ACTIONS.json` under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Process start-up is slow, so one launch
runs many cases. The first that fails ends it, but for one of a single rank with `go_on`, which leaves its traceback in
`RUN_DIR.failed`.
"""

import itertools
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from apps.cli import run as entry_point
from mmlrec.config import load_config
from mmlrec.data.reader import Reader
from mmlrec.distributed.world import process_group
from mmlrec.evaluation.evaluation import evaluate_split
from mmlrec.evaluation.prediction import write_predictions
from mmlrec.run_folder import checkpoint
from mmlrec.run_folder.folder import RunFolder
from mmlrec.session.session import build_session, load_session
from mmlrec.training.run import train
from mmlrec.training.trainer import Trainer
from mmlrec.warm_start.source import open_source
from mmlrec.warm_start.take import take


def record_rows(trained: list[list[int]]) -> None:
    """Make every training reader note the rows of each batch it yields."""
    plain = Reader.epoch

    def epoch(self, number, start_row=0):
        for batch in plain(self, number, start_row):
            trained.append(batch.row[batch.valid].tolist())
            yield batch

    Reader.epoch = epoch


def run(action: dict, world) -> None:
    kind, run_dir = action["kind"], Path(action["run_dir"])
    if kind == "train":
        trained: list[list[int]] = []
        plain = Reader.epoch
        record_rows(trained)
        try:
            train(load_config(action["config"], action["overrides"]), run_dir, world)
        finally:
            Reader.epoch = plain
        target = run_dir / f"rows-{action['name']}-{world.rank}.json"
        target.write_text(json.dumps(trained))
    elif kind == "evaluate":
        session, *_ = load_session(RunFolder(run_dir), world, action["overrides"])
        report = evaluate_split(session, "test")
        if world.is_main:
            Path(action["output"]).write_text(json.dumps(report))
    elif kind == "predict":
        session, *_ = load_session(RunFolder(run_dir), world, [])
        write_predictions(session, Path(session.config.dataset.path), "test", Path(action["output"]))
    elif kind == "reshard":
        # Load the newest checkpoint at this world size and plan, and save it again without a step in between.
        session = build_session(load_config(action["config"], action["overrides"]), world, for_training=True)
        trainer = Trainer(session, RunFolder(run_dir))
        trainer.resume(checkpoint.latest(run_dir / "checkpoints", world))
        tensors = checkpoint.training_tensors(session.model, session.optimizer, world.rank)
        checkpoint.save(Path(action["output"]), tensors, {}, world)
    elif kind == "steps":
        steps(action, run_dir, world)
    elif kind == "wire":
        wire(action, run_dir, world)
    elif kind == "begin":
        begin(action, run_dir, world)
    elif kind == "copy":
        if world.is_main:
            shutil.copytree(run_dir, action["output"])
        world.barrier()
    else:
        raise ValueError(kind)


def begin(action: dict, run_dir: Path, world) -> None:
    """What a run that begins with another one has before its first step, as a checkpoint."""
    config = load_config(action["config"], action["overrides"])
    session = build_session(config, world, for_training=True)
    folder = RunFolder(run_dir)
    if world.is_main:
        folder.create()
    if config.init_from is not None:
        take(session, open_source(config, run_dir, world), folder)
    tensors = checkpoint.training_tensors(session.model, session.optimizer, world.rank)
    checkpoint.save(run_dir / "begun", tensors | session.managed.tensors(history=True), session.state, world)


def steps(action: dict, folder: Path, world) -> None:
    """Train some steps, without trainer and run folder; keep losses, final weights, and what each batch of this rank held."""
    session = build_session(load_config(action["config"], action["overrides"]), world, for_training=True)
    session.model.train()
    scenarios, labels, losses = [], [], []
    num_scenarios = len(session.manifest.scenario.values)

    def noted(batches):
        for batch in batches:
            scenarios.append(batch.scenario[batch.valid].bincount(minlength=num_scenarios))
            labels.append(batch.mask.sum(dim=0))
            yield batch

    batches = noted(session.reader("train").epoch(0))
    feed = session.prepare(itertools.islice(batches, action["steps"]), training=True)
    while True:
        try:
            loss = session.pipeline.progress(feed).objectives / world.world_size
        except StopIteration:
            break
        dist.all_reduce(loss)
        losses.append(loss)
    weights = {key: whole(value, world) for key, value in checkpoint.model_tensors(session.model).items()}
    kept = {"losses": torch.stack(losses), "weights": weights, "labels": labels, "scenarios": scenarios}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(kept, folder / f"{world.rank}.pt")


#: Collectives by which vectors and their gradients go between ranks, with the argument that is sent.
CARRIERS = {"all_to_all_single": "input", "reduce_scatter_tensor": "input", "all_gather_into_tensor": "input_tensor"}


def wire(action: dict, folder: Path, world) -> None:
    """Train a step and evaluate a batch; keep what bytes of numbers this rank gave to collectives of vectors, by dtype."""
    session = build_session(load_config(action["config"], action["overrides"]), world, for_training=True)
    sent: dict[str, int] = {}
    plain = {name: getattr(dist, name) for name in CARRIERS}

    def counted(name: str):
        def call(*arguments, **options):
            tensor = options[CARRIERS[name]] if CARRIERS[name] in options else arguments[1]
            if tensor.is_floating_point():
                dtype = str(tensor.dtype).removeprefix("torch.")
                sent[dtype] = sent.get(dtype, 0) + tensor.numel() * tensor.element_size()
            return plain[name](*arguments, **options)

        return call

    found = {}
    for name in CARRIERS:
        setattr(dist, name, counted(name))
    try:
        for split, training in (("train", True), ("valid", False)):
            session.model.train(training)
            feed = session.prepare(itertools.islice(session.reader(split).epoch(0), 1), training=training)
            with torch.set_grad_enabled(training):
                session.pipeline.progress(feed)
            found[split] = dict(sent)
            sent.clear()
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


def whole(tensor, world) -> torch.Tensor:
    """A tensor of the state dict; on rank 0 with the shards of all ranks."""
    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().clone()
    full = torch.empty(tensor.size()) if world.is_main else None
    tensor.gather(0, full)
    return torch.empty(0) if full is None else full


def main() -> None:
    actions = json.loads(Path(sys.argv[1]).read_text())
    with process_group() as world:
        for action in actions:
            try:
                run(action, world)
            except BaseException:
                traceback.print_exc()
                print(f"rank {os.environ['RANK']} failed in {action}", file=sys.stderr, flush=True)
                if world.world_size > 1 or not action.get("go_on"):
                    os._exit(1)
                Path(f"{action['run_dir']}.failed").write_text(traceback.format_exc())


if __name__ == "__main__":
    entry_point(main)
