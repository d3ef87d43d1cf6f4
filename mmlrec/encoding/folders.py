"""Where the encoder of a dataset or a run lies."""

from __future__ import annotations

from mmlrec.errors import UserError
from mmlrec.storage.places import Place

MANIFEST = "manifest.json"  # as in mmlrec.schema, which what serves a model does not import
RUN_ENCODER = "encoder"


def encoder_folder(path: Place) -> Place:
    """The folder with `manifest.json` and `vocab/` of a dataset, which is its own, or of a run, where it is `encoder/`.

    Raises:
        UserError: it is neither.
    """
    if (path / MANIFEST).is_file():
        return path
    if (path / RUN_ENCODER / MANIFEST).is_file():
        return path / RUN_ENCODER
    if (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is a run without encoder/{MANIFEST}: a release that did not keep the encoder has written it. Give the"
            " dataset that it was trained on."
        )
    why = f"it has neither {MANIFEST} nor {RUN_ENCODER}/{MANIFEST}" if path.is_dir() else "there is no such folder"
    raise UserError(f"{path} is neither a dataset nor a run: {why}. Give the folder of a dataset, or of a run.")
