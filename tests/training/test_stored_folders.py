"""Folders of checkpoints on an object store: whole or absent whenever their writer dies; what no marker names is left over."""

import contextlib
import json

import pytest

from mmlrec.run_folder import stored, whole
from mmlrec.storage.places import objects_below, place


class Died(BaseException):
    """The process ends here."""


@pytest.fixture
def checkpoints(request):
    return place(f"memory://{request.node.name.replace('[', '-').rstrip(']')}/run/checkpoints")


def write(folder, content: bytes, *, seal: bool = True):
    """Files of a folder, sealed, without its name as yet."""
    temporary = whole.make(folder, "start")
    sums = {name: whole.write_synced(temporary / name, content) for name in ("a.distcp", "state.json")}
    if seal:
        whole.seal(temporary, sums)
    return temporary


def content(folder) -> bytes:
    assert whole.damage(folder) is None
    return (whole.inside(folder) / "a.distcp").read_bytes()


def replace(best, content: bytes) -> None:
    whole.put(write(best, content), best, whole.delete)


def test_a_folder_is_there_when_its_marker_is(checkpoints):
    step = checkpoints / "step_000000005"
    temporary = write(step, b"content")
    assert temporary.parent == step
    assert not whole.folders(checkpoints)
    assert not whole.is_there(step)
    assert "has no COMPLETE.json" in whole.damage(step)
    whole.put(temporary, step, whole.delete)
    assert [path.name for path in whole.folders(checkpoints)] == ["step_000000005"]
    assert content(step) == b"content"
    assert set(json.loads((step / "COMPLETE.json").read_bytes())["files"]) == {
        f"{temporary.name}/a.distcp",
        f"{temporary.name}/state.json",
    }
    assert whole.file_damage(step, "state.json") is None
    assert whole.file_damage(step, "b") == f"{step / 'b'} is missing"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b"conten"), "has 6 bytes instead of 7"),
        (lambda file: file.write_bytes(b"c0ntent"), "does not match its checksum"),
    ],
)
def test_damage_is_named_by_address(checkpoints, spoil, reason):
    step = checkpoints / "step_000000005"
    replace(step, b"content")
    file = whole.inside(step) / "a.distcp"
    spoil(file)
    assert whole.damage(step).startswith(f"{file} {reason}")
    assert str(file).startswith("memory://")


def test_a_file_that_is_not_there_is_not_sealed(checkpoints):
    step = checkpoints / "step_000000005"
    temporary = write(step, b"content", seal=False)
    with pytest.raises(OSError, match=r"__1_0\.distcp was written by another rank and is not here"):
        whole.seal(temporary, {"a.distcp": whole.sums(b"content"), "__1_0.distcp": whole.sums(b"content")})


def test_late_files_of_a_killed_start_mix_with_nothing_and_are_taken_away(checkpoints):
    step = checkpoints / "step_000000005"
    late = whole.make(step, "killed")
    replace(step, b"content")
    (late / "a.distcp").write_bytes(b"of another start")
    assert content(step) == b"content"
    assert whole.leftovers(checkpoints) == [late]
    whole.delete(late)
    assert whole.leftovers(checkpoints) == []
    assert content(step) == b"content"


def deaths(monkeypatch, at: int) -> list[str]:
    """Let the process die before the request of this number that changes anything; the list of them grows as they come."""
    requests = []

    def counted(kind, plain):
        def call(*arguments, **options):
            if len(requests) == at:
                raise Died
            requests.append(kind)
            return plain(*arguments, **options)

        return call

    kind = type(place("memory://x/y"))
    monkeypatch.setattr(stored, "create", counted("create", stored.create))
    monkeypatch.setattr(stored, "_remove", counted("remove", stored._remove))
    monkeypatch.setattr(kind, "write_bytes", counted("put", kind.write_bytes))
    return requests


def test_a_death_at_any_moment_leaves_the_former_best_or_the_new_one(checkpoints, monkeypatch):
    """And both, from when the new one is there until a step checkpoint knows it."""
    best, old = checkpoints / "best", checkpoints / "best.old"
    seen = set()
    for at in range(30):
        whole.delete(best)
        replace(best, b"former")
        with monkeypatch.context() as patch:
            deaths(patch, at)
            died = True
            try:
                replace(best, b"new")
                died = False
            except Died:
                pass
        now = content(best)
        seen.add((died, now))
        if now == b"new":
            assert content(old) == b"former"
        if not died:
            break
    assert seen == {(True, b"former"), (False, b"new")}
    # The step checkpoint to resume from knows the former one: it comes back.
    whole.bring_back(old, best)
    assert content(best) == b"former"
    assert not whole.replaced(checkpoints)
    for leftover in whole.leftovers(checkpoints):
        whole.delete(leftover)
    assert content(best) == b"former"
    assert len(objects_below(checkpoints)) == 4


def test_the_former_best_goes_once_it_is_superfluous(checkpoints):
    best = checkpoints / "best"
    for text in (b"first", b"second", b"third"):
        replace(best, text)
    # As on a file system: what was there first, which the newest step checkpoint knows, is kept; that in between is not.
    (replaced,) = whole.replaced(checkpoints)
    assert content(replaced) == b"first"
    (between,) = whole.leftovers(checkpoints)
    assert (between / "a.distcp").read_bytes() == b"second"
    whole.delete(between)
    whole.retire(replaced, whole.delete)
    assert content(best) == b"third"
    assert not whole.replaced(checkpoints)
    assert len(objects_below(checkpoints)) == 4


def test_a_deletion_at_any_moment_leaves_a_whole_folder_or_none(checkpoints, monkeypatch):
    step = checkpoints / "step_000000005"
    for at in range(30):
        whole.delete(step)
        replace(step, b"content")
        with monkeypatch.context() as patch:
            requests = deaths(patch, at)
            with contextlib.suppress(Died):
                whole.retire(step, whole.delete)
        if requests:
            assert not whole.folders(checkpoints)
            assert not whole.is_there(step)
        else:
            assert content(step) == b"content"
        if len(requests) < at:
            break
    assert objects_below(checkpoints) == {}


def test_a_step_that_another_run_has_sealed_is_not_replaced_by_one_that_was_slow(checkpoints, monkeypatch):
    """It found none, slept, and puts its own: only where there still is none."""
    step = checkpoints / "step_000000005"
    late = write(step, b"late")
    plain = stored._read

    def sees_nothing(path):
        monkeypatch.setattr(stored, "_read", plain)
        replace(step, b"other")

    monkeypatch.setattr(stored, "_read", sees_nothing)
    with pytest.raises(FileExistsError):
        whole.put(late, step, whole.delete)
    assert content(step) == b"other"


def test_a_copy_on_a_disk_of_what_lies_on_a_store_is_read(checkpoints, tmp_path):
    step = checkpoints / "step_000000005"
    replace(step, b"content")
    for name in objects_below(checkpoints):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((checkpoints / name).read_bytes())
    assert content(tmp_path / "step_000000005") == b"content"
    assert whole.file_damage(tmp_path / "step_000000005", "state.json") is None
