"""The command line: what it prints, refuses and imports."""

import re

import pytest

from preprocessing.command_line import main
from tests.preprocessing.fakes import FAKES
from tests.preprocessing.movielens_fake import folder_bytes

NO_TORCH = "import atexit; atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'none'))"


def test_neither_help_nor_a_run_imports_torch(raw, tmp_path, command):
    for arguments in (
        ["--help"],
        ["movielens-1m", "--raw", raw, "--out", tmp_path / "a"],
        ["synthetic", "--rows", 1000, "--out", tmp_path / "b"],
    ):
        result = command(*arguments, prelude=NO_TORCH)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "none"


def test_help_shows_every_dataset_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("movielens-1m", "movielens-100k", "synthetic", "examples:", "python -m apps.train"):
        assert word in text


def test_unknown_dataset_lists_all_and_suggests_the_nearest(capsys):
    assert main(["movilens-1m"]) == 2
    names = ", ".join(sorted({"synthetic", "movielens-100k", *(name.split()[0] for name in FAKES)}))
    assert f"Did you mean 'movielens-1m'? Datasets: {names}." in capsys.readouterr().err


def test_summary_gives_rates_of_each_task_and_scenario_and_the_next_command(raw, tmp_path, capsys):
    out = tmp_path / "out"
    main(["movielens-1m", "--raw", str(raw), "--out", str(out)])
    text = capsys.readouterr().out
    assert "2,000 rows" in text
    ratings = [line.split("::") for line in (raw / "ratings.dat").read_text().splitlines()]
    women = {line.split("::")[0] for line in (raw / "users.dat").read_text().splitlines() if "::F::" in line}
    of_women = [int(r) for u, _, r, _ in ratings if u in women]
    rates = [sum(r > 2 for r in of_women) / len(of_women), sum(r > 3 for r in of_women) / len(of_women)]
    (line,) = re.findall(r"^  F .*$", text, re.MULTILINE)
    assert line.split() == ["F", f"{rates[0]:.6f}", f"{rates[1]:.6f}", f"{len(of_women):,}"]
    assert f"python -m apps.train --config configs/mtl/movielens.yaml dataset.path={out}" in text


def test_the_same_command_again_does_nothing(raw, tmp_path, capsys):
    arguments = ["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_another_dataset_in_its_place_is_refused_unless_overwritten(raw, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["movielens-1m", "--raw", str(raw), "--out", str(out)]
    assert main(arguments) == 0
    before = folder_bytes(out)
    assert main([*arguments, "--seed", "5"]) == 2
    assert "seed=2024 (now 5). Choose another --out, or --overwrite it." in capsys.readouterr().err
    (raw / "ratings.dat").write_text((raw / "ratings.dat").read_text().replace("::5::", "::4::"))
    assert main(arguments) == 2
    assert "made from other raw files" in capsys.readouterr().err
    assert folder_bytes(out) == before
    assert main([*arguments, "--overwrite"]) == 0
    assert folder_bytes(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]


def test_a_folder_of_something_else_or_a_damaged_dataset_is_refused(raw, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["movielens-1m", "--raw", str(raw), "--out", str(out)]
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert main(arguments) == 2
    assert "exists and is no dataset" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 2  # only a dataset is ever replaced
    assert (out / "thesis.tex").read_text() == "precious"
    (out / "thesis.tex").unlink()
    out.rmdir()
    assert main(arguments) == 0
    (out / "test/part-00000.parquet").write_bytes(b"PAR1")
    assert main(arguments) == 2
    assert "part-00000.parquet is missing or cut" in capsys.readouterr().err


def test_overwriting_never_deletes_what_is_no_part_of_a_dataset(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(out)]) == 0
    raw.rename(out / "raw")
    (out / "notes.txt").write_text("precious")
    before = folder_bytes(out)
    assert main(["movielens-1m", "--raw", str(out / "raw"), "--out", str(out), "--overwrite", "--seed", "1"]) == 2
    assert "holds more than a dataset (notes.txt, raw), which --overwrite would delete" in capsys.readouterr().err
    assert folder_bytes(out) == before


def test_a_dataset_without_a_vocabulary_is_no_whole_one(raw, tmp_path, capsys):
    arguments = ["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (tmp_path / "out" / "vocab" / "user.parquet").unlink()
    assert main(arguments) == 2
    assert "user.parquet is missing or cut" in capsys.readouterr().err


def test_folders_made_for_a_run_that_fails_are_removed(raw, tmp_path, capsys):
    (raw / "ratings.dat").write_text("1::3::7::1\n")
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "a" / "b" / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_a_name_that_no_file_can_have_and_too_much_memory(raw, tmp_path, capsys):
    assert main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / ("x" * 300))]) == 2
    assert "cannot be used: File name too long" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["movielens-1m", "--raw", str(raw), "--out", str(tmp_path / "out"), "--memory", "1e300"])
    assert "a number of GiB from 0.5 to" in capsys.readouterr().err


def test_a_failing_overwrite_keeps_the_old_dataset(raw, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["movielens-1m", "--raw", str(raw), "--out", str(out)]
    assert main(arguments) == 0
    before = folder_bytes(out)
    (raw / "ratings.dat").write_text("1::3::7::1\n")
    assert main([*arguments, "--overwrite"]) == 2
    assert folder_bytes(out) == before


def test_two_runs_into_one_folder_do_not_mix(tmp_path, capsys):
    import fcntl
    import os

    (tmp_path / ".out.tmp").mkdir()
    descriptor = os.open(tmp_path / ".out.tmp", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert main(["synthetic", "--rows", "100", "--out", str(tmp_path / "out")]) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert (tmp_path / ".out.tmp").exists()
    os.close(descriptor)


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(raw, tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.old"
    arguments = ["movielens-1m", "--raw", str(raw), "--out", str(out)]
    assert main(arguments) == 0
    before = folder_bytes(out)
    out.rename(old)  # the state in which such a kill leaves the place
    ratings = (raw / "ratings.dat").read_text()
    (raw / "ratings.dat").write_text("1::3::7::1\n")
    assert main([*arguments, "--overwrite"]) == 2  # no new dataset comes about: the old one is in its place again
    assert folder_bytes(out) == before
    assert not old.exists()
    # killed after the second rename: the old one is only left over
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    (raw / "ratings.dat").write_text(ratings.replace("::5::", "::4::"))
    assert main([*arguments, "--overwrite"]) == 0
    assert folder_bytes(out) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]
