"""Where the shipped `configs/` and `torchx.yaml` lie. Standard library only: the doctor needs it in a broken environment."""

from pathlib import Path

import mmlrec

PRESETS_FILE = "torchx.yaml"


def shipped_folder() -> Path:
    """Folder that holds `configs/` and `torchx.yaml`: the package when installed from a wheel, the clone otherwise."""
    package = Path(mmlrec.__file__).resolve().parent
    return package if (package / PRESETS_FILE).is_file() else package.parent
