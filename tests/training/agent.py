"""What torchrun is to its ranks, for tests that start it often: their parent, which starts them and ends them together.

`python agent.py NUM_RANKS PORT RANKS_FILE SCRIPT ARGUMENTS...`: process ids of the ranks go into RANKS_FILE. The ranks are
forked, so that they need not import torch again, and know an agent by the same variables.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path


def rank(number: int, count: int, port: str, script: str, arguments: list[str]) -> None:
    """Become one rank; does not return."""
    os.setsid()
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(1)


def main() -> None:
    count, port, ranks_file, script, *arguments = sys.argv[1:]
    ranks = []
    for number in range(int(count)):
        child = os.fork()
        if child == 0:
            rank(number, int(count), port, script, arguments)
        ranks.append(child)
    partial = Path(ranks_file + ".part")
    partial.write_text(json.dumps(ranks))
    partial.rename(ranks_file)
    failed, alive = False, set(ranks)
    while alive:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.02)
            continue
        alive.discard(child)
        if os.waitstatus_to_exitcode(status) != 0 and not failed:
            failed = True
            for other in alive:
                os.kill(other, signal.SIGTERM)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
