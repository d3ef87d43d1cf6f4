import json
import subprocess
import sys
from functools import partial

import pytest
from torchx.specs import macros

from mmlrec.errors import ConfigError
from mmlrec.launch.presets import MountConfig, Preset, ResourceConfig
from mmlrec.launch.spec import days_app, job_name, torchrun, train_app

RESOURCE = ResourceConfig(cpu=2, gpu=8, memMB=1000)
ODD = ["a b", "x,y=2", "it's", '"q"', "$HOME", "${app_id}", "$$", "`id`", "back\\slash", "ä*?;&|", ""]


def run_by_torchx(text: str, **environment: str) -> str:
    """What a scheduler does with a role's argument: expand TorchX's macros, then give it to bash."""
    values = macros.Values(img_root="", app_id="app1", replica_id="0", rank0_env="RANK0")
    script = values.substitute(text)
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment).stdout


def test_app_of_one_node(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mtl").mkdir()
    (tmp_path / "mtl" / "ml_1m.yaml").write_text("dataset: {path: d}")
    preset = Preset(nproc=2, resource=RESOURCE, env={"OMP_NUM_THREADS": "1"})
    app = train_app(
        preset, config="mtl/ml_1m.yaml", overrides=["model.name=ple", "training.seed=3"], run_dir="runs/a", python="/py"
    )
    (role,) = app.roles
    assert (app.name, role.name) == ("mtl-ml-1m", "mtl_ml_1m")
    assert role.entrypoint == "bash"
    assert role.args == [
        "-c",
        "export OMP_NUM_THREADS=1; exec /py -m mmlrec.launch.agent --nnodes 1 --nproc-per-node 2 --max-restarts 0"
        " --shutdown-timeout 25 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --rdzv-backend c10d"
        " --rdzv-endpoint localhost:0 --rdzv-id ${app_id} --tee 3 -m apps.train --config mtl/ml_1m.yaml --run-dir runs/a"
        " model.name=ple training.seed=3",
    ]
    assert role.env == {}
    assert (role.num_replicas, role.max_retries) == (1, 0)
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (2, 8, 1000)


def test_app_of_two_nodes_meets_on_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("dataset: {path: d}")
    preset = Preset(nodes=2, nproc=8, resource=RESOURCE, max_retries=3, rdzv_port=29700)
    (role,) = train_app(preset, config="c.yaml", overrides=[]).roles
    assert (role.num_replicas, role.max_retries, role.port_map) == (2, 3, {"c10d": 29700})
    first, rest = role.args[1].split("exec ")
    # The shell of a node, with a printf in the interpreter's place.
    text = f"{first} printf '%s\\n' {rest}"
    lines = run_by_torchx(text, RANK0="node7").splitlines()
    assert lines[lines.index("--rdzv-endpoint") + 1] == "node7:29700"
    assert lines[lines.index("--rdzv-conf") + 1] == "is_host=1"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run_by_torchx(text)
    assert "no address of the first node from the scheduler" in failed.value.stderr


def test_arguments_and_environment_reach_the_trainer_unchanged(tmp_path):
    # A stand-in for the interpreter prints its environment and its last arguments, byte for byte.
    fake = tmp_path / "py thon$"
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$ODD" "${@:23}"\n')
    fake.chmod(0o755)
    preset = Preset(nproc=1, resource=RESOURCE, env={"ODD": "".join(ODD)})
    text = torchrun(preset, "a", "apps.train", ODD, str(fake))
    received = run_by_torchx(text).split("\0")[:-1]
    assert received == ["".join(ODD), *ODD]


def test_torchrun_understands_the_options(tmp_path):
    """The command runs for real, with a module that needs no torch in place of the trainer."""
    (tmp_path / "probe.py").write_text("import os, sys; print(sorted(sys.argv[1:]), 'of', os.environ['WORLD_SIZE'])")
    text = torchrun(Preset(nproc=1, resource=RESOURCE), "a", "probe", ["a=1"], sys.executable)
    assert "['a=1'] of 1" in run_by_torchx(text, PYTHONPATH=str(tmp_path), PATH="/usr/bin:/bin")


def test_missing_or_wrong_config_is_refused_before_submission(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = Preset(nproc=1, resource=RESOURCE)
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file in .*Shipped configs: .*configs"):
        train_app(preset, config="none.yaml", overrides=[])
    (tmp_path / "c.yaml").write_text("dataset: {path: d}")
    with pytest.raises(ConfigError, match=r"training\.batchsize: unknown key\. Did you mean 'batch_size'"):
        train_app(preset, config="c.yaml", overrides=["training.batchsize=3"])
    with pytest.raises(ConfigError, match=r"'--lr' is not of the form key\.path=value"):
        train_app(preset, config="c.yaml", overrides=["--lr"])


PLAN = [
    {"table": "a", "rows": 1000, "dim": 8, "sharding": "row_wise", "ranks": [0, 1, 2, 3], "weight_bytes": 32000},
    {"table": "b", "rows": 3, "dim": 8, "sharding": "table_wise", "ranks": [1], "weight_bytes": 96},
]
#: Nodes of two processes, keys -> what is told; None: the job is made.
RANKS = [
    (2, ["embeddings.plan=plan.json"], None),
    ("1:2", ["embeddings.plan=whole.json"], None),
    (2, ["embeddings.plan=not-made-yet.json"], None),
    (2, ["embeddings.plan=s3://bucket/plan.json"], None),  # which only the job may be able to read
    (
        3,
        ["embeddings.plan=plan.json"],
        r"With its 3 node\(s\) of 2 process\(es\) the job would end: embeddings\.plan: plan\.json places 'a' row_wise on ranks"
        r" 0-3; the training has 6 rank\(s\)",
    ),
    (
        "1:2",
        ["embeddings.plan=plan.json"],
        r"With 1 of its 1:2 nodes of 2 process\(es\) .* the training has 2 rank\(s\).* Give the job a number of nodes that",
    ),
    (4, ["embeddings.plan=plan.json", "embeddings.replicas=2"], None),
    (2, ["embeddings.plan=plan.json", "embeddings.replicas=2"], r"embeddings\.plan: .* the training has 2 rank\(s\)"),
    (4, ["embeddings.replicas=4"], None),
    (
        3,
        ["embeddings.replicas=4"],
        r"With its 3 node\(s\) .*embeddings\.replicas: 6 ranks on hosts of 2 cannot be divided into 4",
    ),
    ("2:4", ["embeddings.replicas=2"], r"With 3 of its 2:4 nodes .*embeddings\.replicas: 6 ranks .*--nodes N"),
]


@pytest.mark.parametrize(("nodes", "overrides", "told"), RANKS)
def test_tables_that_are_placed_for_other_ranks_are_refused_before_submission(tmp_path, monkeypatch, nodes, overrides, told):
    """What each start of the job would refuse; of one that trains on as many nodes as there are, at any number of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("dataset: {path: d}")
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "whole.json").write_text(json.dumps(PLAN[1:]))
    preset = Preset(nodes=nodes, nproc=2, resource=RESOURCE)
    makes = [
        partial(train_app, preset, config="c.yaml", overrides=overrides),
        partial(days_app, preset, config="c.yaml", overrides=overrides, days="data/day-*", run_dir="runs/days"),
    ]
    for make in makes:
        if told is None:
            assert make().roles
        else:
            with pytest.raises(ConfigError, match=told):
                make()


def test_processes_that_would_share_a_gpu_are_refused():
    with pytest.raises(ConfigError, match=r"nproc: 8 processes on a node that has resource\.gpu: 4 would share GPUs"):
        torchrun(Preset(nproc=8, resource=RESOURCE.model_copy(update={"gpu": 4})), "a", "m", [])


def test_what_the_configuration_names_must_be_there_in_a_container(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("dataset: {path: data/d}")
    mounts = [MountConfig(type="volume", src="runs", dst="/mmlrec/runs")]
    preset = Preset(nproc=1, resource=RESOURCE, image="i", mounts=mounts)
    assert train_app(preset, config="c.yaml", overrides=["run_dir=runs/a"]).roles
    for override in ("dataset.path=/here/d", "init_from=/here/run", "embeddings.plan=/here/plan.json"):
        with pytest.raises(ConfigError, match=r"/here/.*: a path of this machine, and the job runs in the image i"):
            train_app(preset, config="c.yaml", overrides=[override])
    with pytest.raises(ConfigError, match=r"/here/run: on no writable mount"):
        train_app(preset, config="c.yaml", overrides=["run_dir=/here/run"])
    # An address needs no mount.
    assert train_app(preset.model_copy(update={"mounts": []}), config="c.yaml", overrides=["run_dir=s3://b/run"]).roles


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("mtl", "movielens-100k"), "mtl-movielens-100k"),
        (("", "C"), "c"),
        (("My Runs", "x_1.y"), "my-runs-x-1-y"),
        (("", "é"), "job"),
        (("2024", "x"), "job-2024-x"),
        (("mtmsl", "a-very-long-name-of-mine"), "mtmsl-a-very-long-na"),
        (("mtmsl", "a-very-lon-g"), "mtmsl-a-very-lon-g"),
    ],
)
def test_job_names_begin_with_a_letter_and_hold_letters_digits_and_dashes(parts, name):
    assert job_name(*parts) == name


def test_jobs_that_share_their_first_node_meet_at_ports_of_their_own():
    def endpoint(job: str, port: int | None) -> str:
        text = torchrun(Preset(nodes=2, nproc=1, resource=RESOURCE, rdzv_port=port), "a", "m", [], "/py")
        values = macros.Values(img_root="", app_id=job, replica_id="1", rank0_env="RANK0")
        script = values.substitute(text).replace("exec /py", "echo")
        words = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, check=True, env={"RANK0": "n", "PATH": "/usr/bin:/bin"}
        )
        return words.stdout.split("--rdzv-endpoint ")[1].split()[0]

    assert endpoint("41", None) == endpoint("41", None)
    assert len({endpoint(str(job), None) for job in range(41, 51)}) == 10
    assert endpoint("41", 29700) == endpoint("42", 29700) == "n:29700"
