"""Who may import whom (docs/architecture.md), what starts without heavy libraries, and where files lie."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("mmlrec", "apps", "preprocessing", "benchmarks")
CONTRACT = (
    *(
        "mmlrec.schema",
        "mmlrec.registry",
        "mmlrec.config",
        "mmlrec.yaml_config",
        "mmlrec.extensions",
        "mmlrec.errors",
        "mmlrec.paths",
        "mmlrec.storage",
    ),
)
HEAVY = ("torch", "torchrec", "fbgemm_gpu", "torchx", "tensordict", "torchmetrics", "tensorboard")
EVERYTHING = ("mmlrec", "preprocessing", *HEAVY)

# Importer -> prefixes of ours and of HEAVY that it may import besides itself and CONTRACT. The longest importer counts.
# Modules that are not listed may import CONTRACT only.
RULES = {
    "mmlrec.doctor": ("mmlrec.__version__",),
    "mmlrec.launch": ("torchx.specs",),
    "mmlrec.launch.agent": ("torch", "mmlrec.distributed"),
    "mmlrec.launch.ranks": ("mmlrec.embeddings", "mmlrec.launch.presets"),
    "mmlrec.launch.pods": ("torchx.specs", "torchx.schedulers.kubernetes_scheduler"),
    "preprocessing": ("mmlrec.hashing", "mmlrec.exact_sums", "mmlrec.identity", "mmlrec.encoding", "mmlrec.terminal"),
    "mmlrec.encoding": ("mmlrec.hashing", "mmlrec.identity"),
    "mmlrec.output": ("torch",),
    "mmlrec.layers": ("torch",),
    "mmlrec.losses": ("torch", "mmlrec.output"),
    "mmlrec.models": ("torch", "mmlrec.layers", "mmlrec.losses", "mmlrec.output", "mmlrec.models.base"),
    "mmlrec.balancing": ("torch", "mmlrec.losses"),
    "mmlrec.balancing.strategies": ("torch", "mmlrec.balancing.base", "mmlrec.balancing.gradients", "mmlrec.balancing.hull"),
    "mmlrec.metrics": ("torch", "mmlrec.hashing", "mmlrec.exact_sums"),
    "mmlrec.data": ("torch", "torchrec.sparse", "torchrec.streamable", "mmlrec.hashing", "mmlrec.identity"),
    "mmlrec.embeddings": ("torch", "torchrec", "fbgemm_gpu", "mmlrec.data.batch", "mmlrec.hashing"),
    "mmlrec.distributed": ("torch", "mmlrec.terminal"),
    "mmlrec.run_folder": ("torch", "torchrec", "mmlrec.distributed", "mmlrec.identity"),
    "mmlrec.slots": (
        *("torch", "torchrec.sparse", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.data.batch", "mmlrec.hashing"),
        "mmlrec.encoding.vocabularies",
    ),
    "mmlrec.session": (
        *("torch", "torchrec", "fbgemm_gpu", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.data", "mmlrec.embeddings"),
        *("mmlrec.layers", "mmlrec.losses", "mmlrec.balancing", "mmlrec.models.base", "mmlrec.identity", "mmlrec.slots"),
    ),
    "mmlrec.warm_start": (
        *("torch", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.session", "mmlrec.embeddings", "mmlrec.models.base"),
        *("mmlrec.identity", "mmlrec.encoding.vocabularies", "mmlrec.hashing", "mmlrec.slots"),
    ),
    "mmlrec.evaluation": (
        *("torch", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.session", "mmlrec.data", "mmlrec.metrics"),
        *("mmlrec.models.base", "mmlrec.identity"),
    ),
    "mmlrec.training": (
        *("torch", "torchrec", "tensorboard", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.session"),
        *("mmlrec.evaluation", "mmlrec.warm_start", "mmlrec.data", "mmlrec.embeddings", "mmlrec.metrics", "mmlrec.models.base"),
    ),
    "mmlrec.days": (
        *("torch", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.session", "mmlrec.evaluation", "mmlrec.training"),
        *("mmlrec.metrics", "mmlrec.identity", "mmlrec.encoding"),
    ),
    "mmlrec.serving": ("torch", "mmlrec.encoding", "mmlrec.layers"),
    "mmlrec.export": (
        *("torch", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.session", "mmlrec.evaluation", "mmlrec.metrics"),
        *("mmlrec.models.base", "mmlrec.layers", "mmlrec.encoding", "mmlrec.serving", "mmlrec.slots.stored", "mmlrec.terminal"),
    ),
    "mmlrec.api": (
        *("torch", "torchrec.sparse", "preprocessing", "mmlrec.distributed", "mmlrec.run_folder", "mmlrec.session"),
        *("mmlrec.evaluation", "mmlrec.training", "mmlrec.data", "mmlrec.metrics", "mmlrec.models.base", "mmlrec.encoding"),
        "mmlrec.export",
    ),
    # The contracts for methods and datasets: run by tests only, so that no rule but those of entry points lets it in.
    "mmlrec.testing": ("torch", "mmlrec.losses", "mmlrec.models.base", "mmlrec.output", "mmlrec.encoding", "preprocessing"),
    "apps": EVERYTHING,
    "benchmarks": (*EVERYTHING, "apps.cli"),
}
# A package may import its own modules, except for methods and strategies: one file each, independent of each other.
APART = ("mmlrec.models", "mmlrec.balancing.strategies")
STANDARD_LIBRARY_ONLY = (*("mmlrec.errors", "mmlrec.paths", "mmlrec.terminal", "mmlrec.extensions", "mmlrec.doctor"),)
CONTRACT_LIBRARIES = {"yaml", "pydantic"}


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imported(source: str, module: str, is_package: bool = False, type_checking: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere, functions included; blocks under TYPE_CHECKING where asked for."""
    names: set[str] = set()
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not type_checking:
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            names.update(f"{start}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return names


def breaches(module: str, names: set[str]) -> list[str]:
    """The imports of a module that its rule does not allow."""
    importer = max((rule for rule in RULES if within(module, rule)), key=len, default=module)
    allowed = (*RULES.get(importer, ()), *CONTRACT, *((importer,) if importer not in APART else ()))
    ours = [name for name in names if name.split(".")[0] in (*PACKAGES, *HEAVY)]
    wrong = [name for name in ours if not any(within(name, prefix) for prefix in allowed)]
    # `import mmlrec` alone, for its version or its folder.
    wrong = [name for name in wrong if name != "mmlrec"]
    others = {name.split(".")[0] for name in names} - set(PACKAGES) - set(sys.stdlib_module_names)
    if module in STANDARD_LIBRARY_ONLY:
        wrong += sorted(others)
    elif module in CONTRACT:
        wrong += sorted(others - CONTRACT_LIBRARIES)
    return sorted(wrong)


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module):
    path = MODULES[module]
    names = imported(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert breaches(module, names) == [], f"{module} must not import these; the rules are in docs/architecture.md"


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("preprocessing.x", "import torch", ["torch"]),
        ("preprocessing.x", "def f():\n    from torch import nn", ["torch.nn"]),
        ("preprocessing.x", "from mmlrec.data import reader", ["mmlrec.data.reader"]),
        ("preprocessing.x", "import pyarrow\nfrom mmlrec.schema import Table\nfrom preprocessing.reading import a", []),
        ("mmlrec.layers.x", "from torchrec import KeyedJaggedTensor", ["torchrec.KeyedJaggedTensor"]),
        ("mmlrec.models.ple", "from mmlrec.models.mmoe import MMoE", ["mmlrec.models.mmoe.MMoE"]),
        ("mmlrec.models.ple", "from mmlrec.models import base\nfrom mmlrec.models.base.model import Output", []),
        ("mmlrec.models.ple", "from . import mmoe", ["mmlrec.models.mmoe"]),
        (
            "mmlrec.data.x",
            "from torchrec.sparse.jagged_tensor import A\nfrom torchrec.distributed import B",
            ["torchrec.distributed.B"],
        ),
        ("mmlrec.training.x", "from mmlrec.models.mmoe import MMoE", ["mmlrec.models.mmoe.MMoE"]),
        ("mmlrec.training.x", "from apps.train import main", ["apps.train.main"]),
        ("mmlrec.models.ple", "from mmlrec.testing.networks import step", ["mmlrec.testing.networks.step"]),
        ("preprocessing.x", "from mmlrec.testing.datasets import Fake", ["mmlrec.testing.datasets.Fake"]),
        ("mmlrec.testing.x", "from mmlrec.models.ple import PLE", ["mmlrec.models.ple.PLE"]),
        ("mmlrec.launch.x", "from torchx.components.dist import ddp", ["torchx.components.dist.ddp"]),
        ("mmlrec.schema", "import numpy", ["numpy"]),
        ("mmlrec.schema", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", []),
        ("mmlrec.doctor", "import pydantic", ["pydantic"]),
        ("mmlrec.new_module", "import torch", ["torch"]),
    ],
)
def test_the_checker_finds_breaches(module, source, expected):
    assert breaches(module, imported(source, module)) == expected


def imports_between(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Module -> those of the others that it imports, for type checkers too. `sources`: text, and whether it is a package."""
    found: dict[str, set[str]] = {}
    for module, (source, is_package) in sources.items():
        found[module] = set()
        # `mmlrec/__init__.py` names for type checkers what it imports when it is asked for, after all that this needs.
        for name in imported(source, module, is_package, type_checking=module not in PACKAGES):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            # A package's own file is read before any of its modules: that is no import of the author's.
            if name and name != module:
                found[module].add(name)
    return found


SOURCES = {module: (path.read_text(encoding="utf-8"), path.name == "__init__.py") for module, path in MODULES.items()}
IMPORTS = imports_between(SOURCES)


def circle(imports: dict[str, set[str]]) -> list[str]:
    """A circle of imports, empty when there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_through_others():
    assert circle(IMPORTS) == []


def test_circles_are_found_also_where_only_a_type_checker_sees_them():
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mmlrec.a import A"
    sources = {"mmlrec.a": ("def f():\n    from mmlrec.b import B", False), "mmlrec.b": (hidden, False)}
    assert set(circle(imports_between(sources))) == {"mmlrec.a", "mmlrec.b"}
    assert circle(imports_between(sources | {"mmlrec.b": ("import mmlrec", False)})) == []


def floors(package: str) -> list[list[str]]:
    """Rooms of a package in the order of docs/architecture.md, those of one row together."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition(f"### `{package}`")[2].partition("\n#")[0]
    return [re.findall(r"`([\w.]+)`", row) for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)]


def room(module: str) -> str:
    """The folder or file below a package that a module belongs to; empty for the package's own files."""
    name = [*module.split("."), ""][1]
    return "" if name == "__main__" else name


@pytest.mark.parametrize("package", ["mmlrec", "preprocessing"])
def test_rooms_are_those_of_the_document_and_imports_run_one_way(package):
    order = floors(package)
    height = {name: floor for floor, names in enumerate(order) for name in names}
    inside = [module for module in MODULES if within(module, package) and room(module)]
    assert sorted(name for names in order for name in names) == sorted({room(module) for module in inside})
    climbing = [
        f"{module} imports {other}"
        for module in inside
        for other in IMPORTS[module]
        if within(other, package) and room(other) not in ("", room(module)) and height[room(other)] >= height[room(module)]
    ]
    assert climbing == [], "a room imports from those above it in docs/architecture.md only"


ONE_FILE_A_THING = {"mmlrec/models", "mmlrec/balancing/strategies", "preprocessing/datasets"}
MOST_MODULES = 14


def test_no_room_is_crowded():
    for package in ("mmlrec", "preprocessing", "apps"):
        folders = {path.parent for module, path in MODULES.items() if within(module, package)}
        for folder in folders:
            place = folder.relative_to(REPOSITORY).as_posix()
            count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
            assert count <= MOST_MODULES or place in ONE_FILE_A_THING, f"{place} holds {count} modules: give it rooms"


def entry_points() -> list[str]:
    """Modules of apps that run as scripts, and those of the library and preprocessing."""
    scripts = [module for module, path in MODULES.items() if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    names = [module for module in scripts if module.split(".")[0] in ("apps", "mmlrec")]
    return names + (["preprocessing"] if "preprocessing.__main__" in MODULES else [])


@pytest.mark.parametrize("module", entry_points())
def test_help_imports_nothing_that_takes_long(module):
    needs = ["torch"] if module == "mmlrec.launch.agent" else []  # it is torch's agent, with our options
    code = f"""
import runpy, sys
sys.argv = ["x", "--help"]
try:
    runpy.run_module("{module}", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print("\\nHEAVY", sorted({{"torch", "torchrec", "fbgemm_gpu", "pandas", "sympy", "boto3", "tensorboard"}} & sys.modules.keys()))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert result.stdout.endswith(f"HEAVY {needs}\n")


def test_contract_preprocessing_and_launch_run_without_torch():
    light = [m for m in MODULES if m in (*CONTRACT, "mmlrec.doctor", "mmlrec.hashing", "apps.components")]
    light += [m for m in MODULES if within(m, "preprocessing") and "__main__" not in m]
    # The agent runs on the nodes, and the other is imported where a configuration says something of ranks.
    light += [m for m in MODULES if within(m, "mmlrec.launch") and m not in ("mmlrec.launch.agent", "mmlrec.launch.ranks")]
    code = f"import importlib, sys\nfor m in {light}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "False\n"


TOP_LEVEL = {
    *("mmlrec", "apps", "preprocessing", "benchmarks", "configs", "deploy", "docs", "tests", "requirements"),
    *("setup.py", "pyproject.toml", "Makefile", "MANIFEST.in", "LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("torchx.yaml", ".torchxconfig", ".torchxignore", ".gitignore", ".ci", "Dockerfile", ".dockerignore"),
}


def test_top_level_holds_what_it_should():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {name.split("/")[0] for name in listed if name} <= TOP_LEVEL


def python_files() -> list[Path]:
    return [path for folder in (*PACKAGES, "tests", "requirements") for path in (REPOSITORY / folder).rglob("*.py")]


def test_files_are_short_well_named_and_not_deep():
    for path in python_files():
        place = path.relative_to(REPOSITORY)
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, f"{place}: more than 600 lines"
        assert path.name not in ("utils.py", "util.py", "helpers.py", "misc.py"), f"{place}: name it after what it holds"
        assert len(place.parts) - 1 <= 3, f"{place}: more than three folder levels"


def test_project_files_name_no_machine():
    """No absolute path of a developer's machine in anything that ships."""
    texts = [p for p in python_files() if p.parts[len(REPOSITORY.parts)] != "tests"]
    texts += [p for folder in ("configs", "docs") for p in (REPOSITORY / folder).rglob("*.*") if p.is_file()]
    texts += [REPOSITORY / name for name in TOP_LEVEL if (REPOSITORY / name).is_file()]
    for path in texts:
        for place in (f"/{folder}/" for folder in ("work", "root", "home", "opt")):
            assert place.encode() not in path.read_bytes(), f"{path.relative_to(REPOSITORY)} names {place}"
