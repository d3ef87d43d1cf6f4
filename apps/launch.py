"""Send a job to the scheduler that its preset names.

python -m apps.launch [--dryrun] COMPONENT --preset NAME ...
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchx.cli.main import main as torchx
from torchx.runner import config as torchxconfig
from torchx.runner import get_runner
from torchx.schedulers.slurm_scheduler import SlurmBatchRequest
from urllib3.exceptions import HTTPError

from apps.cli import all_imported, run
from mmlrec.errors import ConfigError, UserError
from mmlrec.launch.cluster import check_options, check_size
from mmlrec.launch.presets import Preset, SchedulerConfig, load_preset

COMPONENTS = Path(__file__).with_name("components.py")
#: Seconds for the batch script to ask that the job be started again, after the last process had its time to save.
_TO_START_AGAIN = 30
_EPILOG = """\
examples:
  python -m apps.launch train --preset local --config configs/mtl/movielens.yaml
  python -m apps.launch train --preset slurm-2n --config configs/mtl/movielens.yaml training.seed=2
  python -m apps.launch --dryrun train --preset slurm-2n --config configs/mtl/movielens.yaml

What follows COMPONENT is that of `torchx run apps/components.py:COMPONENT`, which does the same for a scheduler and options
that are given on its command line. The last line is the job's handle, for `torchx status`, `torchx log` and `torchx cancel`.
"""


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Command line of this entry point, and what belongs to the component."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.launch", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dryrun", action="store_true", help="print what the scheduler would be given, and stop")
    parser.add_argument("component", choices=["train", "days", "evaluate", "predict", "preprocess", "scaling"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the component; --preset NAME among them")
    own = parser.parse_args()
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", default="local")
    own.preset = preset.parse_known_args(own.arguments)[0].preset
    return own, own.arguments


def main() -> None:
    """Check what can be checked, then submit."""
    all_imported()
    own, arguments = parse()
    preset = load_preset(own.preset)
    scheduler = preset.scheduler
    if scheduler is None:
        raise ConfigError(
            f"preset '{own.preset}' names no scheduler. Add one, such as `scheduler: {{name: slurm}}`, or choose it on the"
            f" command line: torchx run -s slurm {COMPONENTS.name}:{own.component} ..."
        )
    if scheduler.name == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise UserError("jobs for Kubernetes need the package kubernetes: pip install 'mmlrec[kubernetes]'.")
    address = f"{COMPONENTS}:{own.component}"
    with get_runner() as runner:
        check_options(scheduler.name, scheduler.options, runner.scheduler_run_opts(scheduler.name))
        options: dict[str, Any] = dict(scheduler.options)
        torchxconfig.apply(scheduler.name, options)
        if own.dryrun:
            options |= {"validate_spec": False} if scheduler.name == "kubernetes" else {}  # which would ask the cluster
            job = runner.dryrun_component(address, arguments, scheduler.name, cfg=options)
            _stop_before_time_limit(own.component, job.request, preset)
            print(job)
            return
        with _refusals(scheduler.name):
            job = runner.dryrun_component(address, arguments, scheduler.name, cfg=options)
            assert job.app is not None
            check_size(job.app, scheduler.name, options)
            _stop_before_time_limit(own.component, job.request, preset)
            if not scheduler.name.startswith("local"):
                # Not `torchx run`: behind the submission it asks how the job is, which fails while a Slurm job is pending.
                print(runner.schedule(job))
                return
    _follow(scheduler, address, arguments)


def _stop_before_time_limit(component: str, request: object, preset: Preset) -> None:
    """Have Slurm ask a training that may be started again to stop in time: a job that its limit ends is not started again.

    TorchX has no option for it. Slurm may ask up to a minute earlier.
    """
    if component in ("train", "days") and isinstance(request, SlurmBatchRequest) and preset.max_retries:
        for replica in request.replicas.values():
            replica.sbatch_opts["signal"] = f"USR1@{preset.shutdown_timeout + _TO_START_AGAIN}"


@contextlib.contextmanager
def _refusals(scheduler: str) -> Iterator[None]:
    """What a scheduler says against a job, as one line."""
    errors: list[type[Exception]] = [ValueError, HTTPError]
    if scheduler == "kubernetes":
        errors.append(importlib.import_module("kubernetes.client.rest").ApiException)
    try:
        yield
    except subprocess.CalledProcessError as error:
        raise UserError(f"{error.cmd[0]} refused the job (exit code {error.returncode}); why stands above.") from error
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not found on this machine; submit from one that has {scheduler}.") from error
    except tuple(errors) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{scheduler} does not take the job: {said}") from error


def _follow(scheduler: SchedulerConfig, address: str, arguments: list[str]) -> None:
    """Run the job on this machine and show its log; TorchX ends this process with 1 when the job fails."""
    given = ",".join(f"{key}={value}" for key, value in scheduler.options.items())
    options = ["-cfg", given] if given else []
    torchx(["run", "-s", scheduler.name, *options, "--workspace=", address, *arguments])


if __name__ == "__main__":
    run(main)
