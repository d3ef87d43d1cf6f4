"""The TorchX component: `torchx run -s local_cwd apps/components.py:train --preset local --config FILE`.

Also registered as `mmlrec.train`. TorchX reads the function's signature and docstring for its `--help`, and wants it
defined in this very file.
"""

import sys

from torchx import specs

from mmlrec.errors import UserError
from mmlrec.launch.presets import load_preset
from mmlrec.launch.spec import train_app
from mmlrec.terminal import plain


def train(
    *overrides: str,
    config: str,
    preset: str = "local",
    nodes: int = 0,
    nproc: int = 0,
    run_dir: str | None = None,
    imports: str = "",
) -> specs.AppDef:
    """Train with torchrun in the shape that a preset of torchx.yaml gives.

    Args:
        overrides: key.path=value changes of the config, such as training.max_steps=200
        config: training config, relative to the current folder, or the name of a shipped one
        preset: name of a preset in torchx.yaml
        nodes: number of nodes; 0 takes the preset's
        nproc: processes on each node; 0 takes the preset's
        run_dir: folder of the run; one that holds a checkpoint is resumed
        imports: modules with a method or strategy that is not part of mmlrec, separated by commas
    """
    try:
        shape = load_preset(preset, nodes=nodes or None, nproc=nproc or None)
        modules = [module for module in imports.split(",") if module]
        return train_app(shape, config=config, overrides=list(overrides), run_dir=run_dir, imports=modules)
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
