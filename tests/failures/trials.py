"""Trainings with failures at random moments, and what is to be so when they are done."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from mmlrec.launch.presets import Preset, RendezvousConfig, ResourceConfig
from tests.datasets import write_dataset
from tests.failures.job import Fault, Job
from tests.failures.kinds import Kind
from tests.hosts import Hosts
from tests.training.launch import losses, tensors

TRAIN_ROWS, BATCH_SIZE, EPOCHS = 2000, 50, 6
STEPS_PER_EPOCH = TRAIN_ROWS // BATCH_SIZE
STEPS = EPOCHS * STEPS_PER_EPOCH
CONFIG = """
dataset: {{path: {dataset}, setting: mtl}}
model: {{name: recorded, expert_hidden_units: [12, 8], gate_hidden_units: [4], tower_hidden_units: [4]}}
embeddings: {{dim: 4}}
training: {{batch_size: {batch_size}, epochs: {epochs}, patience: null, eval_batch_size: 10, log_every_steps: 1,
  checkpoint_every_steps: 15, validate_every_steps: 20, keep_checkpoints: 2}}
"""
#: Longest wait for training to go on, and for a start: a busy machine takes a minute for one.
_GOES_ON_WITHIN_S = 400.0
#: Lines that say why a rank ended.
_WHY = "error: |stopped at step "


@dataclass
class Trial:
    """One failure and what became of it.

    Attributes:
        moment: of the failure, in words.
        ended: the commands that ended until training went on: host, exit code, seconds after the failure.
        errors: lines that say why a rank ended, `error: ...` or `stopped at step ...`, until training went on.
        seconds: from the failure to the next trained step; None where another failure came before, by intention.
        lost_steps: trained before the failure, and again after it.
        starts: of the job's command until training went on (of a host's command, in an elastic job).
        world_size: number of ranks with which it went on.
        fault: what must not have happened.
    """

    kind: str
    training: str
    number: int
    moment: str
    what: str = ""
    ended: list[tuple[str, int, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float | None = None
    lost_steps: int | None = None
    starts: int = 0
    world_size: int | None = None
    fault: str | None = None


def prepare(folder: Path) -> Path:
    """Data and configuration of all trainings; returns the configuration's file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    if not config.exists():
        write_dataset(folder / "data", rows={"train": TRAIN_ROWS, "valid": 500, "test": 200}, table_rows=30)
        config.write_text(CONFIG.format(dataset=folder / "data", batch_size=BATCH_SIZE, epochs=EPOCHS))
    return config


def make_job(kind: Kind, hosts: Hosts, folder: Path, config: Path) -> Job:
    """The job of a kind of failure, not yet started."""
    preset = Preset(
        nodes=kind.nodes,
        nproc=1,
        resource=ResourceConfig(cpu=1, memMB=2000),
        env={"OMP_NUM_THREADS": "1"},
        max_restarts=kind.max_restarts,
        max_retries=kind.failures,
        shutdown_timeout=20,
        rdzv_conf=RendezvousConfig(last_call_timeout=5) if isinstance(kind.nodes, str) else RendezvousConfig(),
    )
    options = [f"training.timeout={kind.timeout}", *kind.options]
    # A host that comes back and fails to meet the others at once is started again.
    retries = 4 * kind.failures if isinstance(kind.nodes, str) else kind.failures
    # Nodes that have not met yet wait for each other ten minutes.
    ends_rest = kind.moment == "start"
    return Job(hosts, folder, preset, config, options, retries=retries, step_seconds=kind.step_seconds, ends_rest=ends_rest)


def train_unbroken(hosts: Hosts, folder: Path, config: Path) -> None:
    """The training with which all others are compared.

    Raises:
        Fault: it failed.
    """
    job = make_job(Kind((), failures=0), hosts, folder, config)
    try:
        job.start_all()
        job.wait(lambda: job.finished, _GOES_ON_WITHIN_S)
        if not job.finished:
            raise Fault("the training without failures did not come to its end")
    finally:
        job.stop()


def run_training(
    name: str, kind: Kind, hosts: Hosts, folder: Path, config: Path, unbroken: Path, random: Random
) -> list[Trial]:
    """Train with failures of one kind; the last trial holds the faults of the training as a whole, too."""
    job = make_job(kind, hosts, folder, config)
    job.away = dict.fromkeys(range(kind.first_hosts, len(hosts.names)), float("inf"))
    trials: list[Trial] = []
    try:
        job.start_all()
        for number in range(kind.failures):
            trials.append(Trial(name, folder.name, number, ""))
            _fail_once(kind, job, trials[-1], random)
        job.wait(lambda: job.finished, _GOES_ON_WITHIN_S)
        faults = [] if job.finished else ["the training did not come to its end"]
        faults = faults or differences(job, unbroken, kind)
        if len(job.said(_WHY)) != sum(len(trial.errors) for trial in trials):
            faults.append("lines that say why a rank ended, at other times")
        if job.said(r"Traceback \(most recent call last\)"):
            faults.append("a traceback")
    except Fault as fault:
        faults = [str(fault)]
    finally:
        job.stop()
    if faults:
        trials[-1].fault = "; ".join(filter(None, [trials[-1].fault, *faults]))
    return trials


def _fail_once(kind: Kind, job: Job, trial: Trial, random: Random) -> None:
    trial.moment = _wait_for_moment(kind, job, trial.number, random)
    before, marks, ends, starts = job.newest_step(), job.mark(), len(job.ends), job.starts
    known = {path.name for path in job.rows.iterdir()}
    failed_at = time.time()
    trial.what, world_size = kind.acts[trial.number % len(kind.acts)](job, random)
    acted_at = time.time()

    def next_step() -> dict | None:
        if kind.goes_on:
            newest = max(job.rows.iterdir(), key=lambda path: path.stat().st_mtime)
            return job.steps()[-1] if newest.stat().st_mtime > acted_at else None
        for path in job.rows.iterdir():
            if path.name not in known and path.stat().st_size:
                first = json.loads(path.read_bytes().split(b"\n")[0])
                if world_size in (None, first["world_size"]):
                    return first
        return None

    def over() -> bool:
        # Before the first step: what matters is the next start.
        again = kind.moment == "start" and trial.number + 1 < kind.failures and job.starts > starts
        return again or next_step() is not None

    went_on = job.wait(over, _GOES_ON_WITHIN_S)
    job.pace(kind.step_seconds)
    trial.ended = [(job.hosts.names[end.host], end.code, round(end.time - failed_at, 1)) for end in job.ends[ends:]]
    trial.errors, trial.starts = job.said(_WHY, marks), job.starts - starts
    # All steps may have been trained by then; the start after the failure finds nothing left but the test.
    if not went_on and not (job.finished and world_size is None):
        raise Fault("training did not go on")
    if step := next_step():
        trial.seconds, trial.world_size = round(step["time"] - failed_at, 1), step["world_size"]
        trial.lost_steps = 0 if kind.goes_on else max(0, before - step["step"] + 1)
    if kind.goes_on and any(failed_at + 1 < record["time"] < acted_at for record in job.steps()):
        raise Fault("training went on during the failure: it was none")
    least, most = kind.errors
    if not least <= len(trial.errors) <= most:
        trial.fault = f"{len(trial.errors)} lines that say why a rank ended"


def _wait_for_moment(kind: Kind, job: Job, number: int, random: Random) -> str:
    """Returns the moment in words.

    Raises:
        Fault: it did not come.
    """
    if kind.moment == "start":
        after = random.uniform(1, 25)
        if not job.wait(lambda: bool(job.running) and time.time() - job.started_at > after, 120):
            raise Fault("the job was not started")
        return f"{after:.1f} s after the start"
    part = (STEPS - kind.last_steps) // kind.failures
    step = random.randrange(number * part + 3, (number + 1) * part - 3)
    if kind.moment == "validation":
        step = max(20, step // 20 * 20)
    if not job.wait(lambda: job.newest_step() >= step, _GOES_ON_WITHIN_S, interval=0.005):
        raise Fault(f"step {step} was not reached")
    if kind.moment == "checkpoint":
        if not job.wait(lambda: _being_written(job), 60, interval=0.001):
            raise Fault(f"no checkpoint after step {step}")
        time.sleep(random.uniform(0, 0.03))
        found = _being_written(job)
        return f"checkpoint after step {step}" + ("" if found else ", missed")
    delay = random.uniform(0, 0.3)
    time.sleep(delay)
    if kind.moment == "validation":
        return f"validation of step {step}, after {delay:.2f} s" + ("" if _validates(job) else ", missed")
    return f"step {step}, after {delay:.2f} s"


def _being_written(job: Job) -> bool:
    return any((job.run / "checkpoints").glob("*.tmp"))


def _validates(job: Job) -> bool:
    *_, last = (job.run / "metrics.jsonl").read_text().splitlines()
    return json.loads(last)["split"] == "train" and json.loads(last)["step"] % 20 == 0


def differences(job: Job, unbroken: Path, kind: Kind) -> list[str]:
    """What is not as it is after a training without failures: rows, losses, weights, files."""
    faults = rows_faults(job)
    run, whole = job.run, unbroken / "run"
    if not (run / "result.json").is_file():
        return [*faults, "no result.json"]
    found, expected = losses(run), losses(whole)
    if found.keys() != expected.keys():
        faults.append("metrics.jsonl: other steps")
    else:
        largest = max(abs(found[step][name] - loss) for step, all_of in expected.items() for name, loss in all_of.items())
        if largest > (0 if kind.same_bits else 1e-5):
            faults.append(f"losses differ by {largest:.2g}")
    if kind.same_bits:
        for name in (f"step_{STEPS:09d}", "best"):
            weights, others = tensors(run / "checkpoints" / name), tensors(whole / "checkpoints" / name)
            unequal = [key for key in others if key not in weights or not weights[key].equal(others[key])]
            if unequal or weights.keys() != others.keys():
                faults.append(f"{name}: {len(unequal)} tensors differ")
        if (run / "result.json").read_text() != (whole / "result.json").read_text():
            faults.append("result.json differs")
    files, others = _files(run), _files(whole)
    if kind.same_bits and files != others:
        faults.append(f"files: {sorted(files ^ others)[:5]}")
    if leftover := [name for name in files if ".tmp" in name or ".old" in name]:
        faults.append(f"left over: {leftover[:5]}")
    return faults


def _files(run: Path) -> set[str]:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith("tensorboard/")}


def rows_faults(job: Job) -> list[str]:
    """Each row of each epoch is trained exactly once, by the start that trained its step last."""
    last: dict[int, str] = {}
    of: dict[tuple[int, str], list[dict]] = {}
    for record in job.steps():
        last[record["step"]] = record["start"]
        of.setdefault((record["step"], record["start"]), []).append(record)
    faults = [] if sorted(last) == list(range(1, STEPS + 1)) else ["steps are missing"]
    epochs: dict[int, list[int]] = {}
    for step, start in last.items():
        records = of[step, start]
        if len(records) != records[0]["world_size"]:
            faults.append(f"step {step}: {len(records)} of {records[0]['world_size']} ranks")
        for record in records:
            epochs.setdefault(record["epoch"], []).extend(record["rows"])
    wrong = [epoch for epoch in range(EPOCHS) if sorted(epochs.get(epoch, [])) != list(range(TRAIN_ROWS))]
    return [*faults, *(f"epoch {epoch}: not each row once" for epoch in wrong)]


def as_line(trial: Trial) -> str:
    """A trial as a line of JSON."""
    return json.dumps(asdict(trial)) + "\n"
