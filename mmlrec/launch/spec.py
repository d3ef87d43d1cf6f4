"""From a preset and a training config to a TorchX AppDef: pure, built of `torchx.specs`.

Without torch up to the check of the config, which reads the options of its method and strategy from their files.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from torchx import specs

from mmlrec.errors import ConfigError
from mmlrec.extensions import import_modules
from mmlrec.launch.presets import Preset
from mmlrec.paths import config_file, local_path, shipped_folder
from mmlrec.registry import load

# The agents' store is shared with the ranks by default and reused after a restart: new ranks then read the addresses of
# dead ones and hang (pytorch issue 135712). The variable must be set before torchrun starts.
AGENT_ENV = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# torchrun forwards only what it handles; SIGUSR1 is how Slurm announces the end of the time limit (`--signal`).
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def train_app(
    preset: Preset,
    *,
    config: str,
    overrides: list[str],
    run_dir: str | None = None,
    imports: Sequence[str] = (),
    python: str = sys.executable,
) -> specs.AppDef:
    """The job that runs `apps.train` under torchrun.

    Args:
        config: path of the training config, relative to the current folder, where the job runs as well; or the name of a
            shipped one.
        overrides: `key.path=value` for the config; checked here, before anything is submitted.
        imports: modules with a method or strategy from outside the package, for `--import`.
        python: interpreter on the nodes; the folder of this environment must be visible there.

    Raises:
        ConfigError: the config is missing or wrong.
        UserError: a module of `imports` cannot be used, or a path is an address.
    """
    if run_dir is not None:
        local_path(run_dir)
    if not config_file(config).is_file():
        raise ConfigError(f"{config}: no such config file in {Path.cwd()}. Shipped configs: {shipped_folder() / 'configs'}.")
    import_modules(imports)
    load(config, overrides)
    script = [*(word for module in imports for word in ("--import", module)), "--config", config]
    if run_dir is not None:
        script += ["--run-dir", run_dir]
    name = job_name(config)
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name=name,
                image="mmlrec",  # ignored by local_cwd and slurm, which run in the current folder
                entrypoint="bash",
                args=["-c", command(preset, "apps.train", [*script, *overrides], python)],
                env=dict(AGENT_ENV),
                num_replicas=preset.nodes,
                max_retries=preset.max_retries,
                resource=specs.Resource(cpu=preset.resource.cpu, gpu=preset.resource.gpu, memMB=preset.resource.memMB),
                port_map={"c10d": preset.rdzv_port},
            )
        ],
    )


def command(preset: Preset, module: str, arguments: list[str], python: str) -> str:
    """The shell text of one node: exports, then torchrun with `module`.

    A preset's variables are exported here and not in the role's env: Slurm passes that as one comma-separated option,
    and a comma or a quote in a value damages every variable behind it.
    """
    exports = [f"export {name}={quote(value)};" for name, value in sorted(preset.env.items())]
    first_node = f'"$${{{specs.macros.rank0_env}:=localhost}}:{preset.rdzv_port}"'
    options = {
        "--nnodes": str(preset.nodes),
        "--nproc-per-node": str(preset.nproc),
        # Recovery is a new start from the last checkpoint, by the scheduler; restarts in place are less reliable.
        "--max-restarts": "0",
        "--shutdown-timeout": str(preset.shutdown_timeout),
        "--signals-to-handle": SIGNALS,
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "localhost:0" if preset.nodes == 1 else first_node,
        "--rdzv-id": specs.macros.app_id,
        "--tee": "3",
    }
    words = [*exports, "exec", quote(python), "-m", "torch.distributed.run"]
    words += [word for option in options.items() for word in option]
    return " ".join([*words, "-m", module, *(quote(argument) for argument in arguments)])


def quote(text: str) -> str:
    """One shell word that means `text`, with `$` doubled because TorchX expands `${...}` macros in arguments."""
    return shlex.quote(text).replace("$", "$$")


def job_name(config: str) -> str:
    """A job name for all schedulers ([a-z0-9-]) from the config's setting folder and file name: mtl-movielens."""
    path = Path(config)
    text = "-".join(part for part in (path.parent.name, path.stem) if part)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "train"
