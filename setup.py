"""Packaging: `pip install -e .` in a clone, or a wheel that also carries configs/ and torchx.yaml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Puts configs/ and torchx.yaml into the package, where an installed wheel finds them."""

    def run(self) -> None:
        """Copy after the modules; an editable install reads them from the clone instead."""
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "mmlrec"
            shutil.copytree(ROOT / "configs", package / "configs", dirs_exist_ok=True)
            shutil.copy(ROOT / "torchx.yaml", package)


def version() -> str:
    """The version, read without importing the package."""
    text = (ROOT / "mmlrec" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    assert found is not None
    return found[1]


setup(
    name="mmlrec",
    version=version(),
    description="Multi-task and multi-scenario recommendation on TorchRec",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # benchmarks: what `benchmarks.scaling --preset` submits runs in an image, too.
    packages=find_packages(include=["mmlrec*", "apps*", "preprocessing*", "benchmarks*"]),
    cmdclass={"build_py": BuildWithConfigs},
    # torchrec and fbgemm come through an extra: torchrec's metadata asks for the CUDA build of fbgemm by name, so the CPU
    # build cannot be had from metadata at all. requirements/install.py installs it; mmlrec.doctor says what is missing.
    install_requires=[
        "numpy>=2.0",
        "pandas>=2.2",
        "pyarrow>=17",
        "pydantic>=2.9,<3",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "tabulate>=0.9",
        "tensorboard>=2.17",
        "torch>=2.11",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["torch==2.13.0", "torchrec==1.8.0", "fbgemm-gpu==1.8.0"],
        "spark": ["pyspark>=4"],  # brings Spark itself, but not Java 17
        "launch": ["torchx-nightly==2026.10.26", "pyyaml>=6"],
        "kubernetes": ["torchx-nightly==2026.10.26", "kubernetes>=32"],
        "s3": ["s3fs>=2026.9", "universal_pathlib>=0.3.10"],
        "plots": ["matplotlib>=3.9"],
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.34"],
        "dev": [
            "fastapi>=0.115",
            "flask>=3",  # with flask-cors and moto: the S3 server of the tests
            "flask-cors>=5",
            "httpx>=0.28",
            "hypothesis>=6.100",
            "kubeflow-trainer-api>=2",
            "kubernetes>=32",
            "kubernetes-validate>=1.34",
            "matplotlib>=3.9",
            "moto>=5",
            "mypy>=2",
            "onnx>=1.18",
            "onnxruntime>=1.22",
            "onnxscript>=0.5",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "s3fs>=2026.9",
            "types-PyYAML",
            "types-tabulate",
            "types-tqdm",
            "universal_pathlib>=0.3.10",
            "uvicorn>=0.34",
        ],
    },
    entry_points={
        # Registering one component hides TorchX's own, so those are registered again.
        "torchx.components": [
            "mmlrec = apps.components",
            "dist = torchx.components.dist",
            "utils = torchx.components.utils",
        ],
    },
)
