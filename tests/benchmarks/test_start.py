"""The benchmark of starts: its table, and that the programs which need the cores end with it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.start import table_rows
from tests.processes import ROOT, alive, environment

CODE = """
import sys
from benchmarks.start import others
with others(1):
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_the_table_has_processor_time_wall_time_and_ratios_to_the_first_side():
    def measured(*seconds):
        return [{"cpu": cpu, "seconds": 2 * cpu} for cpu in seconds]

    found = {"before": measured(4.0, 6.0, 27.0, 5.0, 8.0), "now": measured(3.0, 3.5, 3.0, 4.0, 3.0)}
    assert table_rows(["1", "3"], found) == [
        ["1", "3", "before", "6.00", "10.00", "4.00", "27.00", "12.00", "1.00", "1.00"],
        ["1", "3", "now", "3.00", "3.30", "3.00", "4.00", "6.00", "0.50", "0.33"],
    ]


def test_other_programs_end_with_the_benchmark_however_it_ends():
    command = [sys.executable, "-c", CODE]
    for end in (signal.SIGKILL, None):
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as benchmark:
            assert benchmark.stdout.readline() == "at work\n"
            children = Path(f"/proc/{benchmark.pid}/task/{benchmark.pid}/children").read_text().split()
            assert [alive(int(child)) for child in children] == [True]
            if end:
                benchmark.send_signal(end)
            else:
                benchmark.stdin.close()
        deadline = time.monotonic() + 60
        while alive(int(children[0])) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(int(children[0]))
