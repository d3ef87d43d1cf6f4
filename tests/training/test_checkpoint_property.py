"""Checkpoint folders in any state that deaths and bad disks leave: the damaged are named, the whole are found and kept."""

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlrec.distributed.world import process_group
from mmlrec.run_folder import checkpoint

STEPS = (1, 2, 3, 4, 5)
FILES = (".metadata", "__0_0.distcp", checkpoint.STATE)
MARKERS = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'{"files": 3}',
    b'{"files": {"state.json": {}}}',
    b'{"files": {"state.json": 7}}',
    b"\xff",
)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a checkpoint: the file that is to be named, and how its content is spoilt (None: it is missing)."""

    file: str
    spoilt: Callable[[bytes], bytes | None]
    words: str = ""

    def __repr__(self) -> str:
        return f"{self.file}: {self.words}"


def truncated(share):
    return lambda content: content[: int(share * len(content))]


def flipped(share, bits):
    """One byte, with some of its bits turned."""

    def spoilt(content):
        place = int(share * len(content))
        return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]

    return spoilt


shares = st.floats(0, 1, exclude_max=True)
missing = st.sampled_from([*FILES, checkpoint.MARKER]).map(lambda file: Fault(file, lambda content: None, "missing"))
damaged_marker = st.sampled_from(MARKERS).map(lambda text: Fault(checkpoint.MARKER, lambda content: text, repr(text)))
damaged_file = st.builds(
    lambda file, spoil: Fault(file, spoil[1], spoil[0]),
    st.sampled_from(FILES),
    st.one_of(
        shares.map(lambda share: (f"truncated {share}", truncated(share))),
        st.just(("longer", lambda content: content + b"\0")),
        st.builds(lambda share, bits: (f"flipped {share} {bits}", flipped(share, bits)), shares, st.integers(1, 255)),
    ),
)
#: None: whole.
faults = st.one_of(st.none(), st.none(), missing, damaged_marker, damaged_file)
steps_on_disk = st.dictionaries(st.sampled_from(STEPS), faults)
leftovers = st.dictionaries(
    st.builds("step_{:09d}{}".format, st.sampled_from(STEPS), st.sampled_from([".tmp", ".old"])), faults
)


@pytest.fixture(scope="module")
def world():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        with process_group() as world:
            yield world


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Step -> file -> content of its checkpoint, as it is saved."""
    found = {}
    for step in STEPS:
        folder = checkpoint.step_folder(tmp_path_factory.mktemp("saved"), step)
        checkpoint.save(folder, {"model.w": torch.full((3,), float(step))}, {"step": step}, world)
        found[step] = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert found[step].keys() == {*FILES, checkpoint.MARKER}
    return found


def write(folder, files, fault):
    folder.mkdir()
    for name, content in files.items():
        kept = fault.spoilt(content) if fault and fault.file == name else content
        if kept is not None:
            (folder / name).write_bytes(kept)


@contextmanager
def run_folder(saved, steps, others=None):
    """A folder with checkpoints, whole or with a fault, and leftovers of a death; others: name -> (step, fault)."""
    folder = Path(tempfile.mkdtemp())
    try:
        for step, fault in steps.items():
            write(checkpoint.step_folder(folder, step), saved[step], fault)
        for name, (step, fault) in (others or {}).items():
            write(folder / name, saved[step], fault)
        yield folder
    finally:
        shutil.rmtree(folder)


@quick
@given(step=st.sampled_from(STEPS), fault=faults)
def test_damage_names_the_file(saved, step, fault):
    with run_folder(saved, {step: fault}) as folder:
        reason = checkpoint.damage(checkpoint.step_folder(folder, step))
        if fault is None:
            assert reason is None
        elif fault.file == checkpoint.MARKER:
            assert fault.file in reason
        else:
            assert str(checkpoint.step_folder(folder, step) / fault.file) in reason


@pytest.mark.parametrize("number", ["1e999", "1.0", "true", "null", '"1"', "[]"])
def test_sizes_and_checksums_that_are_no_integers_are_damage(saved, number):
    with run_folder(saved, {1: None}) as folder:
        marker = checkpoint.step_folder(folder, 1) / checkpoint.MARKER
        marker.write_text(f'{{"files": {{"state.json": {{"bytes": {number}, "crc32": 1}}}}}}')
        assert str(marker) in (checkpoint.damage(checkpoint.step_folder(folder, 1)) or "")


@settings(quick, max_examples=300)
@given(share=shares, bits=st.integers(1, 255))
def test_a_flipped_byte_of_the_marker_is_damage_or_changes_no_meaning(saved, share, bits):
    fault = Fault(checkpoint.MARKER, flipped(share, bits))
    with run_folder(saved, {1: fault}) as folder:
        reason = checkpoint.damage(checkpoint.step_folder(folder, 1))
        if reason is None:
            marker = checkpoint.step_folder(folder, 1) / checkpoint.MARKER
            assert json.loads(marker.read_bytes()) == json.loads(saved[1][checkpoint.MARKER])
        else:
            assert str(folder) in reason


@quick
@given(steps=steps_on_disk, left=leftovers)
def test_latest_is_the_newest_whole_one(saved, world, steps, left):
    with run_folder(saved, steps, {name: (5, fault) for name, fault in left.items()}) as folder:
        whole = [step for step, fault in steps.items() if fault is None]
        expected = checkpoint.step_folder(folder, max(whole)) if whole else None
        assert checkpoint.latest(folder, world) == expected


#: best and what it replaced: absent (None), or the step they are of, with a fault.
bests = st.none() | st.tuples(st.sampled_from(STEPS), faults)


@quick
@given(best=bests, old=bests, temporary=bests, steps=steps_on_disk, resumed=st.sampled_from(STEPS))
def test_best_is_what_the_resumed_step_knew_where_it_is_whole(saved, world, best, old, temporary, steps, resumed):
    names = {"best": best, "best.old": old, "best.tmp": temporary}
    with run_folder(saved, steps, {name: state for name, state in names.items() if state}) as folder:
        checkpoint.settle_best(folder / "best", resumed, world)
        whole = {name: state[0] for name, state in names.items() if state and state[1] is None}
        # The new one unless it is of a later step; then, or where it is damaged, the former one, if that is whole.
        chosen = whole.get("best")
        if "best.old" in whole and (chosen is None or chosen > resumed):
            chosen = whole["best.old"]
        assert (checkpoint.damage(folder / "best") is None) == (chosen is not None)
        assert not (folder / "best.old").exists()
        if chosen is not None:
            assert checkpoint.read_state(folder / "best") == {"step": chosen}
        for step, fault in steps.items():
            assert (checkpoint.damage(checkpoint.step_folder(folder, step)) is None) == (fault is None)


@quick
@given(steps=steps_on_disk, left=leftovers, keep=st.integers(1, 3), step=st.sampled_from(STEPS), best=bests)
def test_prune_keeps_the_one_just_saved_the_newest_before_it_and_best(saved, world, steps, left, keep, step, best):
    steps = steps | {step: None}
    others = {name: (5, fault) for name, fault in left.items()} | ({"best": best} if best else {})
    with run_folder(saved, steps, others) as folder:
        marked = {s for s, fault in steps.items() if not (fault and repr(fault) == f"{checkpoint.MARKER}: missing")}
        checkpoint.prune(folder, keep, step=step)
        expected = sorted(s for s in marked if s <= step)[-keep:] + [s for s in steps if s not in marked]
        names = {checkpoint.step_folder(folder, s).name for s in expected} | ({"best"} if best else set())
        assert {path.name for path in folder.iterdir()} == names
        # What is left is as it was: the one just saved is whole, and a resume finds it.
        assert checkpoint.latest(folder, world) == checkpoint.step_folder(folder, step)
        for path in folder.iterdir():
            files = saved[best[0]] if path.name == "best" else saved[int(path.name[-9:])]
            fault = best[1] if path.name == "best" else steps[int(path.name[-9:])]
            expected_files = {name: fault.spoilt(c) if fault and fault.file == name else c for name, c in files.items()}
            found = {file.name: file.read_bytes() for file in path.iterdir()}
            assert found == {name: content for name, content in expected_files.items() if content is not None}
