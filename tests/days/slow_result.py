"""`apps.days` whose rank 0 takes half a second to write what came of a day: `slow_result.py ARGUMENTS...`."""

import runpy
import sys
import time

from mmlrec.training import run

plain = run.write_result


def write_result(*arguments, **options):
    time.sleep(0.5)
    plain(*arguments, **options)


run.write_result = write_result
sys.argv[0] = "apps.days"
runpy.run_module("apps.days", run_name="__main__")
