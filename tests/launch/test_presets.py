from pathlib import Path

import pytest

from mmlrec.errors import ConfigError
from mmlrec.launch.presets import load_preset

REPOSITORY = Path(__file__).parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "torchx.yaml"
    path.write_text(text)
    return path


def test_shipped_presets_are_valid_and_local_needs_no_gpu():
    local = load_preset("local", path=REPOSITORY / "torchx.yaml")
    assert (local.nodes, local.nproc, local.resource.gpu) == (1, 2, 0)
    assert load_preset("slurm-2n", path=REPOSITORY / "torchx.yaml").nodes == 2


def test_current_folder_wins_over_the_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_preset("local").nproc == 2
    write(tmp_path, "presets: {local: {nproc: 7, resource: {cpu: 1, memMB: 1}}}")
    assert load_preset("local").nproc == 7


def test_command_line_values_replace_and_are_checked(tmp_path):
    path = write(tmp_path, "presets: {a: {nproc: 2, resource: {cpu: 1, memMB: 1}}}")
    assert load_preset("a", path=path, nodes=3, nproc=5).model_dump() == load_preset("a", path=path).model_dump() | {
        "nodes": 3,
        "nproc": 5,
    }
    with pytest.raises(ConfigError, match=r"command line: nproc: .*greater than or equal to 1"):
        load_preset("a", path=path, nproc=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presets: {a: {nproc: 2, resource: {cpu: 1, memMB: 1}}}", r"no preset 'loca'.*Presets: a\."),
        ("presets: {local: {nproc: 2, resource: {cpu: 1, memMB: 1}}}", r"Did you mean 'local'\?"),
        ("presets: {loca: {nprocs: 2, resource: {cpu: 1, memMB: 1}}}", r"torchx\.yaml: presets\.loca\.nprocs: unknown key"),
        ("presets: {loca: {nproc: two, resource: {cpu: 1, memMB: 1}}}", r"presets\.loca\.nproc: .*integer"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1}}}", r"presets\.loca\.resource\.memMB: required"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, env: {A: 1}}}", r"presets\.loca\.env\.A: .*string"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}, env: {A B: x}}}", r"presets\.loca\.env\.A B"),
        ("presets: {loca: {nproc: 2, resource: {cpu: 1, memMB: 1}}, loca: {}}", r"'loca' appears twice"),
        ("presets: {}", r"presets: .*at least 1"),
        ("preset: {}", r"preset: unknown key\. Did you mean 'presets'"),
        ("", r"presets: required"),
    ],
)
def test_wrong_files_name_file_and_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset("loca", path=path)
    assert "torchx.yaml" in str(caught.value)


def test_a_mistake_in_another_preset_is_reported_too(tmp_path):
    path = write(
        tmp_path, "presets: {a: {nproc: 1, resource: {cpu: 1, memMB: 1}}, b: {nproc: 0, resource: {cpu: 1, memMB: 1}}}"
    )
    with pytest.raises(ConfigError, match=r"presets\.b\.nproc"):
        load_preset("a", path=path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_preset("a", path=tmp_path / "none.yaml")
