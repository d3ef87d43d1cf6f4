"""Let trainings on two pretend hosts fail at random moments, and write down what became of each failure.

    python -m tests.failures --out DIR [--kinds "rank 0 killed" ...] [--seed N] [--rounds N]
    python -m tests.failures --table DIR/*/trials.jsonl

Each training is of some 240 steps by the command that a preset makes, and has three failures or more; a scheduler starts it
again. Needs root and iproute2. Two may run beside each other, each with a folder of its own.
"""

import argparse
import signal
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.failures.kinds import KINDS
from tests.failures.table import table
from tests.failures.trials import as_line, prepare, run_training, train_unbroken
from tests.hosts import Hosts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.failures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for trials.jsonl, runs and logs")
    what.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="files trials.jsonl, to be printed as one table")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all moments")
    parser.add_argument("--rounds", type=int, default=1, help="trainings of each kind")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    # Ranks go by name: the host where all meet is that of rank 0, or it is not.
    names = Random(arguments.seed).sample(["h1", "h2"], 2)
    print(f"seed {arguments.seed}, first host {names[0]}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which takes the hosts down
    out = arguments.out.resolve()
    config, faults = prepare(out), 0
    try:
        with Hosts(names, out) as hosts:
            if not (out / "unbroken").exists():
                train_unbroken(hosts, out / "unbroken", config)
            for count in range(arguments.rounds):
                for name in arguments.kinds:
                    random = Random(f"{arguments.seed} {count} {name}")
                    folder = out / f"{name.replace(' ', '-').replace(':', '').replace(',', '')}-{arguments.seed}-{count}"
                    trials = run_training(name, KINDS[name], hosts, folder, config, out / "unbroken", random)
                    with (out / "trials.jsonl").open("a") as file:
                        file.writelines(map(as_line, trials))
                    for trial in trials:
                        faults += trial.fault is not None
                        print(as_line(trial), end="", flush=True)
    except pytest.skip.Exception as reason:
        sys.exit(f"error: {reason}")
    sys.exit(min(faults, 1))


if __name__ == "__main__":
    main()
