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
GIB = 1 << 30
MEASURE = """
import json, re, sys, time
import numpy as np
import torch.export.pt2_archive
from mmlrec import serving

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10

before = resident()
begun = time.perf_counter()
model = serving.load(sys.argv[1])
seconds = time.perf_counter() - begun
loaded = resident()
draw = np.random.default_rng(0)
rows = [
    {"user": f"user-{draw.integers(0, 12_000_000):08d}", "price": 1.0, "tags": [101], "marks": [], "age": 30, "place": "home"}
    for _ in range(1000)
]
scores = model.score(rows)
print(json.dumps({"seconds": seconds, "loaded": loaded - before, "scored": resident() - loaded, "scores": scores, "rows": rows}))
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
    print({name: found[name] for name in ("seconds", "loaded", "scored")})
    assert found["seconds"] < 2
    assert found["loaded"] < 100 << 20
    assert found["scored"] < 300 << 20  # a thousand rows of a table, and as many places of the vocabulary, by pages
    assert len(found["scores"]) == 1000
