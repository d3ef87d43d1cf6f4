"""An entry point whose N-th evaluation takes half a second for each batch: `MODULE TITLE N FLAG ARGUMENTS...`.

FLAG is made when that evaluation has begun.
"""

import runpy
import sys
import time
from pathlib import Path

from mmlrec.evaluation import evaluation, prediction

module, title, number, flag = sys.argv[1:5]
plain, calls = evaluation.predict_split, []


def predict_split(session, batches, **options):
    if options["title"] == title:
        calls.append(title)
        if len(calls) == int(number):
            batches = slow(batches)
    return plain(session, batches, **options)


def slow(batches):
    for batch in batches:
        Path(flag).touch()
        time.sleep(0.5)
        yield batch


evaluation.predict_split = prediction.predict_split = predict_split
sys.argv = [module, *sys.argv[5:]]
runpy.run_module(module, run_name="__main__")
