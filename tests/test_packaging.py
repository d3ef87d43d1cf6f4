import ast
import json
import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from tests.serving.folders import DIM, LOOKUPS, ROWS, encoded_by_hand, raw_rows, scores_by_hand, tables, write_model

REPOSITORY = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    lines = (REPOSITORY / "requirements" / name).read_text().splitlines()
    named = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in named}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sources alone, without the network and without touching the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (
        "mmlrec",
        "apps",
        "preprocessing",
        "benchmarks",
        "configs",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "torchx.yaml",
    ):
        (source / name).symlink_to(REPOSITORY / name)
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    command += ["bdist_wheel", "--bdist-dir", str(folder / "bdist"), "--dist-dir", str(folder)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_packages_the_configs_and_the_presets(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("mmlrec", "apps", "preprocessing", "benchmarks"):
        modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / folder).rglob("*.py")}
        assert modules <= names
    configs = {f"mmlrec/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert configs <= names
    assert "mmlrec/torchx.yaml" in names
    packages = {"mmlrec", "apps", "preprocessing", "benchmarks"}
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == packages
    assert any(name.endswith("licenses/LICENSE") for name in names)
    # The image is built from what this lets through.
    let_through = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{package}" for package in packages} <= set(let_through)


def test_installed_wheel_finds_its_configs_from_anywhere(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "from mmlrec.launch.presets import load_preset; from mmlrec.paths import shipped_folder;"
        "from mmlrec.config import load_config; folder = shipped_folder(); print(folder);"
        "print(load_config(folder / 'configs/mtl/movielens.yaml').dataset.path, load_preset('local').nproc)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(site / "mmlrec"), "data/movielens-1m 2"]


def test_installed_wheel_trains_what_preprocessing_names_away_from_a_clone(wheel, tmp_path):
    site, home = tmp_path / "site", tmp_path / "home"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    home.mkdir()

    def run(*words: str) -> str:
        options = {"cwd": home, "env": os.environ | {"PYTHONPATH": str(site)}, "capture_output": True, "text": True}
        result = subprocess.run([sys.executable, *words], check=False, **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    made = run("-m", "preprocessing", "synthetic", "--rows", "500", "--out", "data/my own")
    python, module, train, option, *words = shlex.split(made.splitlines()[-1])
    assert (python, module, train, option) == ("python", "-m", "apps.train", "--config")
    code = "import sys; from mmlrec.config import load_config; print(load_config(sys.argv[1], sys.argv[2:]).dataset.path)"
    assert run("-c", code, *words) == "data/my own\n"
    assert run("-c", code, "mtl/movielens") == "data/movielens-1m\n"


def test_locks_pin_exactly_and_agree():
    cpu, cuda, dev = pins("cpu.txt"), pins("cuda.txt"), pins("dev.txt")
    assert cpu.keys() & dev.keys() == set()
    assert {name: cpu[name] for name in cuda.keys() & cpu.keys()} == {name: cuda[name] for name in cuda.keys() & cpu.keys()}
    assert cpu.keys() - {"fbgemm-gpu-cpu"} >= cuda.keys() - {"fbgemm-gpu"}
    assert "fbgemm-gpu" not in cpu
    assert "torchx" not in cpu


def test_locks_of_the_older_torch_differ_in_the_pairing_alone():
    from mmlrec.doctor import PAIRS

    for name, fbgemm in (("cpu", "fbgemm-gpu-cpu"), ("cuda", "fbgemm-gpu")):
        now, older = pins(f"{name}.txt"), pins(f"{name}-2.11.txt")
        assert older["torch"] == "2.11.0"
        assert (older["torchrec"], older[fbgemm]) == PAIRS["2.11"]
        differ = {package for package in now if older[package] != now[package]}
        assert differ == {"torch", "torchrec", fbgemm, "setuptools"}
        assert older.keys() - now.keys() == ({"iopath", "portalocker"} if name == "cpu" else set())


def test_lock_is_complete_and_holds_nothing_else():
    """Walks the installed metadata from what the project imports; the lock must be exactly what is reached."""
    from importlib.metadata import distribution

    from packaging.requirements import Requirement

    def reached(names: list[str]) -> set[str]:
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
            # torchrec asks for fbgemm-gpu, which fbgemm-gpu-cpu stands in for.
            if name in found or name == "fbgemm-gpu":
                continue
            found.add(name)
            wanted = [Requirement(text) for text in distribution(name).requires or []]
            waiting += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
        return found

    if "fbgemm-gpu-cpu" not in {name for name in pins("cpu.txt") if is_installed(name)}:
        pytest.skip("not the CPU environment")
    direct = ["torch", "torchrec", "fbgemm-gpu-cpu", "torchx-nightly", "numpy", "pandas", "pyarrow", "scikit-learn", "scipy"]
    direct += ["PyYAML", "tabulate", "tqdm", "pydantic", "tensorboard", "setuptools", "wheel", "s3fs", "universal-pathlib"]
    direct += ["safetensors"]
    lock = pins("cpu.txt" if metadata.version("torch").startswith("2.13.") else "cpu-2.11.txt")
    assert reached(direct) == lock.keys()
    tools = [
        "hypothesis",
        "matplotlib",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "mypy",
        "ruff",
        "types-PyYAML",
        "types-tabulate",
        "types-tqdm",
        "kubernetes",
        "kubernetes-validate",
        "kubeflow-trainer-api",
        "moto",
        "flask",
        "flask-cors",
        "fastapi",
        "uvicorn",
        "httpx",
        "onnx",
        "onnxscript",
        "onnxruntime",
    ]
    assert reached(tools) - lock.keys() == pins("dev.txt").keys()


def test_extras_name_the_same_pairing_as_the_locks():
    from mmlrec.doctor import PAIRS

    setup = (REPOSITORY / "setup.py").read_text()
    cuda = pins("cuda.txt")
    extra = ast.literal_eval(re.search(r'"cuda": (\[.*?\])', setup)[1])
    assert extra == [f"{name}=={cuda[name]}" for name in ("torch", "torchrec", "fbgemm-gpu")]
    assert f"torchx-nightly=={cuda['torchx-nightly']}" in setup
    assert PAIRS[".".join(cuda["torch"].split(".")[:2])] == (cuda["torchrec"], cuda["fbgemm-gpu"])


def is_installed(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """Distributions, and all that they need."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            needed = map(Requirement, metadata.requires(name) or [])
            todo += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.long
def test_an_exported_model_scores_in_an_environment_of_four_packages(wheel, tmp_path):
    """torch, numpy, pyarrow and safetensors, as they are installed here, and the wheel without what it asks for."""
    contents, rows = tables("fp32", ROWS, DIM), raw_rows(20)
    weight = write_model(tmp_path / "model", contents)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh/bin/python"
    (site,) = (tmp_path / "fresh/lib").glob("python*/site-packages")
    for name in with_requirements(("torch", "numpy", "pyarrow", "safetensors")):
        for file in metadata.files(name) or []:
            top = site / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(str(metadata.distribution(name).locate_file(file.parts[0])))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    code = "import json, mmlrec.serving as s; print(json.dumps(s.load('model').score(json.load(open('rows.json')))))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [[row["score.click"], row["score.buy"]] for row in json.loads(done.stdout)]
    np.testing.assert_allclose(found, scores_by_hand(encoded_by_hand(rows), contents, [LOOKUPS], weight), atol=2e-6)
    absent = "import importlib.util as u; print([n for n in ('pydantic', 'yaml', 'pandas', 'torchrec') if u.find_spec(n)])"
    assert subprocess.run([python, "-c", absent], capture_output=True, text=True, check=True).stdout == "[]\n"
