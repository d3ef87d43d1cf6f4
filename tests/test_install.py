import importlib.util
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "requirements" / "install.py"


@pytest.fixture
def install():
    spec = importlib.util.spec_from_file_location("install_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("probe", "options"), [("pass", 2), ("raise OSError('unreachable')", 0), ("import time; time.sleep(60)", 0)]
)
def test_torch_index_is_used_only_when_it_answers(install, monkeypatch, probe, options):
    monkeypatch.setattr(install, "PROBE", probe)
    monkeypatch.setattr(install, "PROBE_SECONDS", 1.0)
    started = time.monotonic()
    assert install.cpu_index() == ["--extra-index-url", install.TORCH_CPU_INDEX][:options]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(("line", "refused"), [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True)])
def test_a_cuda_build_in_the_cpu_environment_is_refused(install, tmp_path, line, refused):
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = '7'\n")
    if not refused:
        install.refuse_cuda_build(tmp_path, "2.13")
        return
    with pytest.raises(SystemExit, match=r"only the CUDA build of torch.*whl/cpu") as caught:
        install.refuse_cuda_build(tmp_path, "2.13")
    assert str(caught.value).endswith("requirements/install.py --cuda")
    with pytest.raises(SystemExit, match=r"requirements/install\.py --cuda --torch 2\.11$"):
        install.refuse_cuda_build(tmp_path, "2.11")


def fake_python(folder: Path, script: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_progress_is_one_line_a_package(install, tmp_path, capsys):
    script = """
echo 'Looking in links: x'
echo 'Collecting a-b-c==1.0 (from -r requirements/cpu.txt (line 3))'
echo '  Downloading a.whl (3 kB)'
echo 'Processing /x/y/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl'
echo 'Installing collected packages: a, torch'"""
    install.pip(fake_python(tmp_path, script), "things", "a-b-c==1.0")
    assert capsys.readouterr().out == "Installing things\n  a-b-c==1.0\n  torch-2.13.0+cpu\n  unpacking\n"


def test_a_failure_shows_what_pip_said_and_the_command(install, tmp_path):
    python = fake_python(tmp_path, "echo 'ERROR: No matching distribution found for x' >&2; exit 1")
    with pytest.raises(SystemExit, match=r"could not install things:\nERROR: No matching distribution found for x\n") as caught:
        install.pip(python, "things", "x==1")
    assert str(caught.value).endswith("x==1")


@pytest.mark.parametrize("arguments", [["--lock-only"], ["--lock-only", "--cuda"]])
@pytest.mark.parametrize("there", [None, "None", "'13.0'"])
def test_the_other_build_is_removed_before_pip_takes_it_for_the_wanted_one(install, tmp_path, monkeypatch, there, arguments):
    """Both builds are one version to pip: it installed nothing, and the doctor's command mended nothing."""
    wanted = "'13.0'" if "--cuda" in arguments else "None"
    file = tmp_path / "lib/python3.11/site-packages/torch/version.py"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").touch()
    log = tmp_path / "log"
    script = f"""
echo "$3 $*" | cut -c1-60 >> {log}
[ "$3" = uninstall ] && rm {file}
[ "$3" = install ] && [ ! -e {file} ] && mkdir -p {file.parent} && echo "cuda: Optional[str] = {wanted}" > {file}
exit 0"""
    fake_python(tmp_path / "bin", script)
    if there is not None:
        file.parent.mkdir(parents=True)
        file.write_text(f"cuda: Optional[str] = {there}\n")
    monkeypatch.setattr(install, "cpu_index", list)
    monkeypatch.setattr("sys.argv", ["install.py", "--venv", str(tmp_path), *arguments])
    assert install.main() == 0
    steps = [line.split()[0] for line in log.read_text().splitlines()]
    removed = there not in (None, wanted)
    assert steps == ["uninstall"] * removed + ["install"] * (1 if "--cuda" in arguments else 2)
    assert file.read_text() == f"cuda: Optional[str] = {wanted}\n"
