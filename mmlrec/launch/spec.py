"""From a preset and a command to a TorchX AppDef: pure, built of `torchx.specs`.

Without torch up to the check of the config, which reads the options of its method and strategy from their files.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torchx import specs
from torchx.specs.overlays import set_overlay

from mmlrec.config import RunConfig
from mmlrec.errors import ConfigError, UserError
from mmlrec.extensions import import_modules
from mmlrec.launch.pods import check_overlay, end_at_mistakes
from mmlrec.launch.presets import MountConfig, Preset
from mmlrec.paths import config_file, scheme_of, shipped_folder
from mmlrec.registry import load
from mmlrec.storage.places import refusal

# torchrun forwards only what it handles; SIGUSR1 is how Slurm announces the end of the time limit (`--signal`).
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# The working folder of the image, which holds configs/ (see Dockerfile): relative paths mean the same there and in a clone.
IMAGE_FOLDER = PurePosixPath("/mmlrec")
# Ports of which a job of several nodes takes one, by its id: jobs that share their first node do not take each other's.
FIRST_PORT, NUM_PORTS = 29500, 1000
# A pod is called <job name>-<up to 14 letters>-<role>-<node>-0, and 63 letters are the most; role and job have one name.
NAME_LENGTH = 20


def train_app(
    preset: Preset,
    *,
    config: str,
    overrides: list[str],
    run_dir: str | None = None,
    imports: Sequence[str] = (),
    python: str | None = None,
) -> specs.AppDef:
    """The job that runs `apps.train` under torchrun.

    Args:
        config: path of the training config, relative to the current folder, where the job runs as well; of an image, the
            same path below its working folder, or one below a mount; or the name of a shipped one.
        overrides: `key.path=value` for the config; checked here, before anything is submitted.
        run_dir: folder of the run; in a container, on a mount, or an address.
        imports: modules with a method or strategy from outside the package, for `--import`.
        python: interpreter on the nodes; of this process unless told, which must be visible there, or that of the image.

    Raises:
        ConfigError: the config is missing or wrong, or a path is of this machine and the job runs in a container.
        UserError: a module of `imports` cannot be used, or a path is an address that cannot be used.
    """
    _check_paths(preset, read=[config])
    checked = _check_config(preset, config, overrides, imports)
    into = run_dir or (checked.run_dir if checked is not None else None) or "runs"
    _check_paths(preset, read=[] if checked is None else [checked.dataset.path], written=[into])
    script = [*_imports(imports), "--config", config]
    if run_dir is not None:
        script += ["--run-dir", run_dir]
    path = Path(config)
    name = job_name(path.parent.name, path.stem)
    return _app(preset, name, torchrun(preset, name, "apps.train", [*script, *overrides], python))


def days_app(
    preset: Preset,
    *,
    config: str,
    days: str,
    run_dir: str,
    overrides: list[str],
    forget_after: int | None = None,
    imports: Sequence[str] = (),
    python: str | None = None,
) -> specs.AppDef:
    """The job that runs `apps.days` under torchrun. Arguments and errors as of `train_app`.

    Args:
        days: pattern of the days' dataset folders.
        forget_after: days without a value after which its rows start afresh; None: they stay.
    """
    _check_paths(preset, read=[config, days.rpartition("/")[0] or "."], written=[run_dir])
    _check_config(preset, config, overrides, imports)
    script = [*_imports(imports), "--config", config, "--days", days, "--run-dir", run_dir]
    if forget_after is not None:
        script += ["--forget-after", str(forget_after)]
    name = job_name("days", Path(config).stem)
    return _app(preset, name, torchrun(preset, name, "apps.days", [*script, *overrides], python))


def _check_config(preset: Preset, config: str, overrides: list[str], imports: Sequence[str]) -> RunConfig | None:
    """Refuse here what the job would refuse; what lies on a mount of the job is not necessarily here: then None."""
    import_modules(imports)
    if preset.image and PurePosixPath(config).is_absolute() and not Path(config).exists():
        return None
    if not config_file(config).is_file():
        raise ConfigError(f"{config}: no such config file in {Path.cwd()}. Shipped configs: {shipped_folder() / 'configs'}.")
    checked = load(config, overrides)
    embeddings = checked.embeddings
    _check_paths(preset, read=[path for path in (checked.init_from, embeddings.plan) if path is not None])
    if embeddings.replicas > 1 or embeddings.plan is not None:
        from mmlrec.launch.ranks import check_ranks

        check_ranks(preset, embeddings)
    return checked


def evaluate_app(
    preset: Preset, *, run_dir: str, split: str, overrides: list[str], imports: Sequence[str] = (), python: str | None = None
) -> specs.AppDef:
    """The job that runs `apps.evaluate` under torchrun. Arguments and errors as of `train_app`."""
    _check_paths(preset, written=[run_dir])
    _check_run(preset, run_dir)
    import_modules(imports)
    name = job_name("evaluate", PurePosixPath(run_dir).name)
    arguments = [*_imports(imports), "--run-dir", run_dir, "--split", split, *overrides]
    return _app(preset, name, torchrun(preset, name, "apps.evaluate", arguments, python))


def predict_app(
    preset: Preset,
    *,
    run_dir: str,
    data: str,
    output: str,
    split: str,
    imports: Sequence[str] = (),
    python: str | None = None,
) -> specs.AppDef:
    """The job that runs `apps.predict` under torchrun. Arguments and errors as of `train_app`.

    Args:
        data: the dataset folder that is scored, or its address.
        output: file to write; in a container, on a mount.
    """
    _check_paths(preset, read=[run_dir, data], written=[output])
    _check_run(preset, run_dir)
    import_modules(imports)
    name = job_name("predict", PurePosixPath(run_dir).name)
    arguments = [*_imports(imports), "--run-dir", run_dir, "--input", data, "--output", output, "--split", split]
    return _app(preset, name, torchrun(preset, name, "apps.predict", arguments, python))


def preprocess_app(
    preset: Preset,
    *,
    dataset: str,
    raw: str | None,
    out: str,
    options: list[str],
    imports: Sequence[str] = (),
    python: str | None = None,
) -> specs.AppDef:
    """The job that runs `python -m preprocessing` on one node, in one process, with the preset's resources.

    Args:
        dataset: name of the dataset.
        raw: folder with its raw files; in a container, on a mount, or an address.
        out: dataset folder to write; in a container, on a mount, or an address.
        options: of the dataset's command line.

    Raises:
        ConfigError: the job runs in a container, and a path is one of this machine.
        DataError: no such dataset.
        UserError: a path is an address that cannot be used, or a module of `imports` cannot be used.
    """
    _check_paths(preset, read=[raw] if raw else [], written=[out])
    import_modules(imports)
    arguments = [*_imports(imports), dataset, *(["--raw", raw] if raw else []), "--out", out, *options]
    words = [*_exports(preset), "exec", quote(_interpreter(preset, python)), "-m", "preprocessing"]
    return _app(preset, job_name("data", dataset), " ".join([*words, *(quote(word) for word in arguments)]), nodes=(1, 1))


def scaling_app(preset: Preset, *, out: str, options: list[str], python: str | None = None) -> specs.AppDef:
    """The job that measures how training scales to the ranks of the preset: `python -m benchmarks.scaling` under torchrun.

    Args:
        out: folder of the results; in a container, on a mount.
        options: of its command line.
        python: as of `train_app`.

    Raises:
        ConfigError: the job runs in a container, and `out` would end with it.
    """
    _check_paths(preset, written=[out])
    name = job_name("scaling", PurePosixPath(out).name)
    return _app(preset, name, torchrun(preset, name, "benchmarks.scaling", ["--out", out, *options], python))


def torchrun(preset: Preset, name: str, module: str, arguments: list[str], python: str | None = None) -> str:
    """The shell text of one node: exports, then torchrun with `module`. Arguments as of `train_app`.

    A preset's variables are exported here and not in the role's env: Slurm passes that as one comma-separated option,
    and a comma or a quote in a value damages every variable behind it.
    """
    if 0 < preset.resource.gpu < preset.nproc:
        raise ConfigError(
            f"nproc: {preset.nproc} processes on a node that has resource.gpu: {preset.resource.gpu} would share GPUs, which"
            " NCCL does not do. Give each process a GPU of its own (--nproc), or ask for none."
        )
    endpoint, waits = "localhost:0", preset.rdzv_conf.model_dump(exclude_none=True)
    prepare = _exports(preset)
    if preset.most_nodes > 1:
        # Volcano gives the first node's address to all pods, but TorchX would have the first one use localhost instead.
        # Where no scheduler says which node is the first, the shell ends with that in words.
        volcano = f"VC_{_letters(name).upper()}_0_HOSTS"
        missing = "no address of the first node from the scheduler"
        port = str(preset.rdzv_port)
        if preset.rdzv_port is None:
            prepare.append(f"set -- `printf %s {specs.macros.app_id} | cksum`; let port={FIRST_PORT}+$$1%{NUM_PORTS};")
            port = "$$port"
        endpoint = f'"$${{{volcano}:-$${{{specs.macros.rank0_env}:?{missing}}}}}:{port}"'
        # The first node knows that it is: its own name may resolve only some time after its container has started.
        prepare.append(f"[ {specs.macros.replica_id} = 0 ] && first=1 || first=0;")
        waits = {"is_host": "$$first", **waits}
    options = {
        "--nnodes": str(preset.nodes),
        "--nproc-per-node": str(preset.nproc),
        # For a job of fixed size, recovery is a new start from the last checkpoint by the scheduler.
        "--max-restarts": str(preset.restarts),
        "--shutdown-timeout": str(preset.shutdown_timeout),
        "--signals-to-handle": SIGNALS,
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": endpoint,
        "--rdzv-conf": ",".join(f"{key}={value}" for key, value in waits.items()),
        "--rdzv-id": specs.macros.app_id,
        "--tee": "3",
    }
    words = [*prepare, "exec", quote(_interpreter(preset, python)), "-m", "mmlrec.launch.agent"]
    words += [word for option in options.items() if option[1] for word in option]
    return " ".join([*words, "-m", module, *(quote(argument) for argument in arguments)])


def quote(text: str) -> str:
    """One shell word that means `text` on every scheduler.

    `$` is doubled because TorchX expands `${...}` macros in arguments, and parted from what follows it because Kubernetes
    reads `$(NAME)` and `$$` in a command.
    """
    return shlex.quote(text).replace("$", "$$''")


def job_name(*parts: str) -> str:
    """A job name for all schedulers from some words: lower-case letters, digits and dashes, a letter first."""
    text = "-".join(part for part in parts if part)
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"job-{name}".strip("-")
    return name[:NAME_LENGTH].strip("-")


def _app(preset: Preset, name: str, command: str, nodes: tuple[int, int] | None = None) -> specs.AppDef:
    """The job that runs `command` in bash on each node. `nodes`: least and most, instead of the preset's."""
    least, most = nodes or (preset.least_nodes, preset.most_nodes)
    role = specs.Role(
        # No dash: Volcano's variable is named after the role, and TorchX's for it would have one that no shell can read.
        name=name.replace("-", "_"),
        image=preset.image or "mmlrec",  # ignored by local_cwd and slurm, which run in the current folder
        entrypoint="bash",
        args=["-c", command],
        num_replicas=most,
        min_replicas=least if least < most else None,
        max_retries=preset.max_retries,
        retry_policy=specs.RetryPolicy.REPLICA if least < most else specs.RetryPolicy.APPLICATION,
        resource=specs.Resource(cpu=preset.resource.cpu, gpu=preset.resource.gpu, memMB=preset.resource.memMB),
        port_map={"c10d": preset.rdzv_port} if preset.rdzv_port else {},
        mounts=[_mount(mount) for mount in preset.mounts],
    )
    end_at_mistakes()
    # A pod is killed only after torchrun has killed what did not end by itself.
    grace: dict[str, Any] = {"spec": {"terminationGracePeriodSeconds": preset.shutdown_timeout + 5}}
    set_overlay(role, "kubernetes", "V1Pod", grace)
    if preset.metadata.kubernetes:
        check_overlay(preset.metadata.kubernetes)
        set_overlay(role, "kubernetes", "V1Pod", preset.metadata.kubernetes)
    return specs.AppDef(name=name, roles=[role])


def _mount(mount: MountConfig) -> specs.BindMount | specs.VolumeMount | specs.DeviceMount:
    if mount.type == "bind":
        return specs.BindMount(src_path=mount.src, dst_path=mount.dst, read_only=mount.readonly)
    if mount.type == "volume":
        return specs.VolumeMount(src=mount.src, dst_path=mount.dst, read_only=mount.readonly)
    return specs.DeviceMount(src_path=mount.src, dst_path=mount.dst, permissions="r" if mount.readonly else "rwm")


def _check_paths(preset: Preset, *, read: Sequence[str] = (), written: Sequence[str] = ()) -> None:
    """Refuse addresses that cannot be used, and paths that a container does not have. All nodes see an object store.

    Raises:
        UserError: an address of a scheme that is not supported.
        ConfigError: the job runs in a container, and a path is one of this machine, or what is written would end with it.
    """
    for text in (*read, *written):
        if message := refusal(text):
            raise UserError(f"{message}.")
    read, written = ([text for text in texts if scheme_of(text) is None] for texts in (read, written))
    for text in (*read, *written):
        if preset.image and (".." in PurePosixPath(text).parts or text.startswith("~")):
            raise ConfigError(f"{text}: leads out of the current folder, and the job runs in the image {preset.image}.")
    if not preset.image:
        return
    mounts = {mount.dst: not mount.readonly for mount in preset.mounts}
    where = f"Mounts of the preset: {', '.join(mounts) or 'none'}."
    for text in read:
        if PurePosixPath(text).is_absolute() and not _on([*mounts, str(IMAGE_FOLDER)], text):
            raise ConfigError(
                f"{text}: a path of this machine, and the job runs in the image {preset.image}. Give it relative to the"
                f" current folder, as it is below {IMAGE_FOLDER} in the image, or on a mount. {where}"
            )
    for text in written:
        if not _on([folder for folder, writable in mounts.items() if writable], text):
            raise ConfigError(
                f"{text}: on no writable mount: what the job writes there would be gone with its container. {where}"
            )


def _check_run(preset: Preset, run_dir: str) -> None:
    """Refuse a run folder without a run, where it can be seen from here."""
    if not preset.image and scheme_of(run_dir) is None and not (Path(run_dir) / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: no run folder in {Path.cwd()}: it holds no config.yaml.")


def _on(folders: Sequence[str], text: str) -> bool:
    path = IMAGE_FOLDER / text
    return any(path.is_relative_to(folder) for folder in folders)


def _exports(preset: Preset) -> list[str]:
    return [f"export {name}={quote(value)};" for name, value in sorted(preset.env.items())]


def _imports(modules: Sequence[str]) -> list[str]:
    return [word for module in modules for word in ("--import", module)]


def _interpreter(preset: Preset, python: str | None) -> str:
    """That of the image, by its name: nothing of the submitter's machine is in a container. Else this process's own."""
    return python or ("python" if preset.image else sys.executable)


def _letters(name: str) -> str:
    """What TorchX's Kubernetes scheduler leaves of a role's name."""
    return re.sub(r"[^a-z0-9]", "", name)
