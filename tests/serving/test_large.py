"""Tables of 5 GiB and a vocabulary of ten million texts: mapped, and no more of them in memory than is touched."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmlrec.encoding.encoder import Encoder
from mmlrec.encoding.vocabularies import Vocabularies
from tests import processes
from tests.serving.folders import FACTS, TAGS, tables, write_model

NUM_USERS, DIM = 10_000_000, 134
MIB, GIB = 1 << 20, 1 << 30
MEASURE = """
import json, os, re, sys, time
from pathlib import Path
import numpy as np
import torch.export.pt2_archive
from mmlrec import serving

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

# As a machine that has not seen the files: what was written a moment ago is in its memory, in large pieces.
for path in Path(sys.argv[1]).rglob("*.*"):
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def row(user):
    return {"user": f"user-{user:08d}", "price": 1.0, "tags": [101], "marks": [], "age": 30, "place": "home"}

before, used = resident(), time.process_time()
begun = time.perf_counter()
model = serving.load(sys.argv[1])
seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - used
loaded = resident()
last, unseen = (row["score.click"] for row in model.score([row(9_999_999), row(10_000_000)]))
warm = resident()
model.score([row(user) for user in np.random.default_rng(0).integers(0, 10_000_000, 100)])
found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "loaded": loaded - before, "scored": resident() - warm}
print(json.dumps(found | {"last": last, "unseen": unseen}))
"""


def write_large(folder: Path) -> float:
    """A model whose user table is a sparse file, of which the last row is not zero; GiB of the table."""
    write_model(folder, tables("fp32", {"user": 2, "tag": 20}, DIM))
    header = {"weight": {"dtype": "F32", "shape": [NUM_USERS + 1, DIM], "data_offsets": [0, 4 * DIM * (NUM_USERS + 1)]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "tables/user.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(4 * DIM * NUM_USERS, 1)
        file.write(np.full(DIM, 2.0, np.float32).tobytes())
    card = json.loads((folder / "model.json").read_text())
    card["tables"][0]["rows"] = NUM_USERS + 1
    (folder / "model.json").write_text(json.dumps(card))
    users = [pa.array([f"user-{user:08d}" for user in range(at, at + 100_000)]) for at in range(0, NUM_USERS, 100_000)]
    facts = FACTS | {"tables": FACTS["tables"] | {"user": {"ids": "vocabulary", "rows": NUM_USERS + 1}}}
    Encoder(facts, Vocabularies.of({"user": users, "tag": [pa.array(TAGS)]})).save(folder / "encoder")
    return 4 * DIM * (NUM_USERS + 1) / GIB


@pytest.mark.long
def test_load_maps_and_scoring_touches_only_its_rows(tmp_path):
    folder = tmp_path / "model"
    size = write_large(folder)
    assert size > 4.9
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, env=processes.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["cpu_seconds"] < 2  # not of the clock: other tests run beside this one
    assert found["loaded"] < 100 * MIB
    assert found["scored"] < 16 * MIB  # a hundred rows: a place in the table and five in the vocabulary for each
    assert found["last"] != found["unseen"]
