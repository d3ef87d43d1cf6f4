"""From presets to Volcano jobs: all pods of a job meet at one address, and the cluster takes what it is given."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmlrec.errors import ConfigError
from mmlrec.launch.pods import check_overlay
from mmlrec.launch.presets import MetadataConfig, MountConfig, Preset, ResourceConfig, load_preset
from mmlrec.launch.spec import evaluate_app, predict_app, preprocess_app, train_app

pytest.importorskip("kubernetes", reason="TorchX needs the package kubernetes to write a Volcano job")
from tests.launch import volcano

# TorchX warns of a fault of Volcano 1.4, of 2021.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*Role .* configured with restarts:UserWarning")
REPOSITORY = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden") / "volcano_job.yaml"
CONFIGS = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "configs").rglob("*.yaml")
    if path.parent.name not in ("base", "tables")
)
DNS_1035 = r"[a-z]([-a-z0-9]*[a-z0-9])?"
SHAPE = Preset(
    nodes=2,
    nproc=1,
    image="i",
    resource=ResourceConfig(cpu=1, memMB=2048),
    mounts=[MountConfig(type="volume", src="all", dst="/mmlrec")],
)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def stand_in(tmp_path):
    """A folder for PATH whose `python` prints its arguments in place of starting torchrun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


def arguments(job, task, stand_in) -> list[str]:
    """The arguments that a task's shell gives to the image's `python`."""
    variables = volcano.environment(job, task) | {"PATH": f"{stand_in}:/usr/bin:/bin"}
    done = subprocess.run(volcano.command(job, task), env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("config", CONFIGS)
def test_all_tasks_of_a_shipped_configuration_meet_at_one_endpoint(config, stand_in):
    for nodes in (1, 2, 4):
        job = volcano.dry_run(train_app(load_preset("kubernetes-2n", nodes=nodes), config=config, overrides=[]))
        tasks = job["spec"]["tasks"]
        assert len(tasks) == nodes
        given = [arguments(job, task, stand_in) for task in tasks]
        endpoints = {words[words.index("--rdzv-endpoint") + 1] for words in given}
        name = job["metadata"]["name"]
        (endpoint,) = endpoints
        host, port = endpoint.split(":")
        assert host == ("localhost" if nodes == 1 else f"{name}-{tasks[0]['name']}-0.{name}")
        assert 29500 <= int(port) < 30500 or nodes == 1
        if nodes > 1:  # One of them opens the store, whether its name resolves by then or not.
            assert [words[words.index("--rdzv-conf") + 1] for words in given] == [
                f"is_host={int(node == 0)},read_timeout=600" for node in range(nodes)
            ]


@pytest.mark.parametrize("config", CONFIGS)
def test_names_are_what_services_pods_and_variables_can_be_called(config):
    job = volcano.dry_run(train_app(load_preset("kubernetes-2n", nodes=4), config=config, overrides=[]))
    # The service of the plugin svc is called like the job. TorchX adds up to 14 letters to it, here perhaps fewer.
    assert re.fullmatch(DNS_1035, job["metadata"]["name"])
    added = len(job["metadata"]["name"].rpartition("-")[2])
    for task in job["spec"]["tasks"]:
        assert re.fullmatch(DNS_1035, task["name"])
        assert len(volcano.pod(job, task)["metadata"]["name"]) + 14 - added <= 63
        assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name in volcano.environment(job, task))


def test_long_odd_names_stay_within_what_a_pod_may_be_called(tmp_path, monkeypatch, stand_in):
    monkeypatch.chdir(tmp_path)
    config = Path("2024 Ünsere_Läufe") / f"9.{'very-' * 20}long.yaml"
    config.parent.mkdir()
    config.write_text("dataset: {path: data/x}")
    job = volcano.dry_run(train_app(SHAPE.model_copy(update={"nodes": 120}), config=str(config), overrides=[]))
    assert re.fullmatch(DNS_1035, job["metadata"]["name"])
    assert max(len(volcano.pod(job, task)["metadata"]["name"]) for task in job["spec"]["tasks"]) <= 63
    last = arguments(job, job["spec"]["tasks"][-1], stand_in)
    assert last[last.index("--rdzv-endpoint") + 1].startswith(f"{job['metadata']['name']}-job")
    assert str(config) in last


def test_a_shell_without_the_first_nodes_address_says_so(stand_in):
    job = volcano.dry_run(train_app(SHAPE, config=CONFIGS[0], overrides=[]))
    command = volcano.command(job, job["spec"]["tasks"][1])
    done = subprocess.run(command, env={"PATH": f"{stand_in}:/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no address of the first node from the scheduler" in done.stderr
    assert done.stdout == ""


def test_nothing_of_this_machine_is_in_a_job_with_an_image(monkeypatch):
    monkeypatch.setenv("HOME", "/home/submitter")
    shape = load_preset("kubernetes-2n")
    apps = [
        train_app(shape, config=CONFIGS[0], overrides=["training.seed=3"], run_dir="runs/a"),
        evaluate_app(shape, run_dir="runs/a", split="test", overrides=[]),
        predict_app(shape, run_dir="runs/a", data="data/x", output="runs/a/scores.parquet", split="test"),
        preprocess_app(shape, dataset="synthetic", raw=None, out="data/x", options=["--rows", "1e6"]),
    ]
    for app in apps:
        text = yaml.safe_dump(volcano.dry_run(app))
        assert "registry.example/mmlrec" in text
        for own in (sys.executable, sys.prefix, str(REPOSITORY), "/home/"):
            assert own not in text, own
        # As a word: job names end with letters at random.
        assert os.uname().nodename not in re.findall(r"[\w.-]+", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": str(REPOSITORY / CONFIGS[0])}, r"a path of this machine, and the job runs in the image .*relative to the"),
        ({"config": "../x.yaml"}, r"\.\./x\.yaml: leads out of the current folder"),
        ({"run_dir": "/tmp/run"}, r"/tmp/run: on no writable mount: .* would be gone with its container.*/mmlrec/runs"),
        ({"run_dir": "elsewhere/run"}, r"elsewhere/run: on no writable mount"),
        ({"run_dir": "~/run"}, r"~/run: leads out"),
    ],
)
def test_paths_that_a_container_does_not_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        train_app(load_preset("kubernetes-2n"), overrides=[], **{"config": CONFIGS[0], **options})


def test_a_configuration_on_a_mount_is_left_to_the_job(stand_in):
    job = volcano.dry_run(train_app(load_preset("kubernetes-2n"), config="/mmlrec/data/mine.yaml", overrides=[]))
    assert "/mmlrec/data/mine.yaml" in arguments(job, job["spec"]["tasks"][0], stand_in)


def test_odd_arguments_survive_torchx_the_kubelet_and_the_shell(stand_in):
    odd = ["a=$$", "b=$(HOME)", "c=$(TORCHX_IMAGE)", "d=${app_id}", "e='$'\"$x\"", "f=`id`", "g=$$$(TORCHX_IMAGE)$"]
    app = preprocess_app(SHAPE, dataset="synthetic", raw=None, out="data/x", options=odd)
    job = volcano.dry_run(app)
    assert arguments(job, job["spec"]["tasks"][0], stand_in)[-len(odd) :] == odd


def test_an_elastic_job_asks_for_the_most_and_starts_with_the_least():
    job = volcano.dry_run(train_app(load_preset("kubernetes-2n", nodes="1:4"), config=CONFIGS[0], overrides=[]))
    assert [task["minAvailable"] for task in job["spec"]["tasks"]] == [1, 0, 0, 0]
    for task in job["spec"]["tasks"]:  # A pod that goes does not end the others.
        assert volcano.action(task, "PodFailed", 2) == "TerminateJob"
        assert volcano.action(task, "PodFailed", 85) == volcano.action(task, "PodEvicted", 0) == "RestartTask"
    assert "--nnodes 1:4 " in job["spec"]["tasks"][3]["template"]["spec"]["containers"][0]["command"][-1]


def test_a_mistake_of_the_user_costs_one_start_and_a_lost_pod_another():
    for task in volcano.dry_run(train_app(load_preset("kubernetes-2n"), config=CONFIGS[0], overrides=[]))["spec"]["tasks"]:
        for code in (2, 3):
            assert volcano.action(task, "PodFailed", code) == "TerminateJob"
        for code in (1, 85, 137):
            assert volcano.action(task, "PodFailed", code) == "RestartJob"
        assert volcano.action(task, "PodEvicted", 0) == "RestartJob"
        # Volcano refuses a policy with both, and a code that is named twice.
        assert all(("event" in policy) != ("exitCode" in policy) for policy in task["policies"])
        codes = [policy["exitCode"] for policy in task["policies"] if "exitCode" in policy]
        assert len(codes) == len(set(codes))


def test_pods_pass_the_strict_schema():
    validate = pytest.importorskip("kubernetes_validate")
    job = volcano.dry_run(train_app(load_preset("kubernetes-2n"), config=CONFIGS[0], overrides=[]))
    for task in job["spec"]["tasks"]:
        pod = volcano.pod(job, task)
        validate.validate(pod, "1.34", strict=True)
        pod["spec"]["nodeSelectr"] = {}
        with pytest.raises(validate.ValidationError):
            validate.validate(pod, "1.34", strict=True)


def test_the_preset_shapes_the_pod():
    job = volcano.dry_run(train_app(load_preset("kubernetes-2n"), config=CONFIGS[0], overrides=[]))
    spec = job["spec"]["tasks"][1]["template"]["spec"]
    (container,) = spec["containers"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/mmlrec/data", "/mmlrec/runs"}
    claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in spec["volumes"]}
    assert claims == {None, "mmlrec-data", "mmlrec-runs"}
    assert container["resources"]["limits"] == {"cpu": "64000m", "memory": "400000M", "nvidia.com/gpu": "8"}
    assert spec["securityContext"] == {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001}
    # torchrun's own wait for its ranks ends before Kubernetes kills all.
    assert spec["terminationGracePeriodSeconds"] > load_preset("kubernetes-2n").shutdown_timeout


def test_the_job_is_the_golden_one():
    job = volcano.dry_run(
        train_app(load_preset("kubernetes-2n"), config="configs/mtl/movielens-100k.yaml", overrides=[], run_dir="runs/a")
    )
    named = json.dumps(job).replace(job["metadata"]["name"], "mtl-movielens-100k-UNIQUE")
    text = yaml.safe_dump(json.loads(named), width=128)
    text = re.sub(r"(?<=value: )[0-9a-f]{8}-[0-9a-f-]{27}", "SESSION", text)
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"spce": {}}, r"metadata\.kubernetes\.spce: not laid over pods\. Did you mean 'spec'"),
        ({"spec": {"nodeSelectr": {}}}, r"metadata\.kubernetes\.spec\.nodeSelectr: unknown key\. Did you mean 'nodeSelector'"),
        ({"spec": {"tolerations": [{"kee": "gpu"}]}}, r"spec\.tolerations\.0\.kee: unknown key\. Did you mean 'key'"),
        ({"spec": {"volumes": [{"name": "a", "secret": {"secretNam": "s"}}]}}, r"volumes\.0\.secret\.secretNam: unknown key"),
        ({"spec": {"tolerations": {"key": "gpu"}}}, r"spec\.tolerations: must be a list"),
        ({"spec": {"affinity": 3}}, r"spec\.affinity: must be a section"),
    ],
)
def test_a_mistyped_pod_overlay_is_refused(overlay, message):
    with pytest.raises(ConfigError, match=message):
        check_overlay(overlay)
    shape = SHAPE.model_copy(update={"metadata": MetadataConfig(kubernetes=overlay)})
    with pytest.raises(ConfigError, match=message):
        train_app(shape, config=CONFIGS[0], overrides=[])


def test_a_right_pod_overlay_reaches_every_pod():
    overlay = {
        "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "gpu"}},
        "spec": {
            "nodeSelector": {"pool": "a100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "volumes": [{"name": "token", "secret": {"secretName": "storage"}}],
        },
    }
    shape = SHAPE.model_copy(update={"metadata": MetadataConfig(kubernetes=overlay)})
    for task in volcano.dry_run(train_app(shape, config=CONFIGS[0], overrides=[]))["spec"]["tasks"]:
        spec = task["template"]["spec"]
        assert spec["nodeSelector"] == {"pool": "a100"}
        assert spec["tolerations"] == overlay["spec"]["tolerations"]
        assert [volume["name"] for volume in spec["volumes"]] == ["dshm", "mount-0", "token"]
        assert task["template"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
