"""The TorchX component: `torchx run -s local_cwd apps/components.py:train --preset local --config FILE`.

Also registered as `mmlrec.train`. TorchX reads the function's signature and docstring for its `--help`, and wants it
defined in this very file.
"""

import sys
from typing import Optional

from torchx import specs

from mmlrec.errors import UserError
from mmlrec.launch.presets import load_preset
from mmlrec.launch.spec import train_app


def train(
    *overrides: str,
    config: str,
    preset: str = "local",
    nodes: Optional[int] = None,  # noqa: UP045  TorchX's parser knows Optional, not X | None
    nproc: Optional[int] = None,  # noqa: UP045
    run_dir: Optional[str] = None,  # noqa: UP045
    resume: bool = False,
) -> specs.AppDef:
    """Train with torchrun in the shape that a preset of torchx.yaml gives.

    Args:
        overrides: key.path=value changes of the config, such as training.max_steps=200
        config: training config, relative to the current folder
        preset: name of a preset in torchx.yaml
        nodes: number of nodes, instead of the preset's
        nproc: processes on each node, instead of the preset's
        run_dir: folder of the run, instead of the config's
        resume: go on from the last checkpoint of the run folder
    """
    try:
        shape = load_preset(preset, nodes=nodes, nproc=nproc)
        return train_app(shape, config=config, overrides=list(overrides), run_dir=run_dir, resume=resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
