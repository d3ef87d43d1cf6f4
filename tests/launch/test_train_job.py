"""The templates of Kubeflow Trainer: their fields by the models of its API, the pod by Kubernetes' own schema."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmlrec.launch.presets import load_preset
from mmlrec.launch.spec import IMAGE_FOLDER

DEPLOY = Path(__file__).parents[2] / "deploy"
RUNTIME = yaml.safe_load((DEPLOY / "training-runtime.yaml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((DEPLOY / "train-job.yaml").read_text(encoding="utf-8"))
CLAIMS = list(yaml.safe_load_all((DEPLOY / "volumes.yaml").read_text(encoding="utf-8")))


def replicated_job() -> dict[str, Any]:
    (job,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    return job


def pod() -> dict[str, Any]:
    """The pod of a node, as Kubeflow Trainer makes it: the runtime's, with the trainer of the job in its container `node`."""
    template = copy.deepcopy(replicated_job()["template"]["spec"]["template"])
    (container,) = template["spec"]["containers"]
    assert container["name"] == "node"
    trainer = JOB["spec"]["trainer"]
    container |= {key: trainer[key] for key in ("image", "command", "args", "env")} | {"resources": trainer["resourcesPerNode"]}
    metadata = {"name": "mmlrec-x-node-0-0", **template["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize(("content", "kind"), [(RUNTIME, "TrainingRuntime"), (JOB, "TrainJob")], ids=["runtime", "job"])
def test_the_api_knows_every_field(content, kind):
    """The models drop what they do not know: what comes back is what went in only if all is known and of its type."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    model = getattr(models, f"TrainerV1alpha1{kind}")
    assert content["kind"] == kind
    assert without_empty(model.from_dict(content).to_dict()) == without_empty(content)
    wrong = copy.deepcopy(content)
    wrong["spec"]["numNode"] = 2
    assert without_empty(model.from_dict(wrong).to_dict()) != without_empty(wrong)


def without_empty(content: Any) -> Any:
    """Empty sections away: the models drop some that are empty, such as `torch: {}`."""
    if isinstance(content, dict):
        kept = {key: without_empty(value) for key, value in content.items()}
        return {key: value for key, value in kept.items() if value not in ({}, None)}
    return [without_empty(part) for part in content] if isinstance(content, list) else content


def test_kubernetes_takes_the_pod_the_job_and_the_claims():
    validate = pytest.importorskip("kubernetes_validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": replicated_job()["template"]["spec"]}
    for content in (pod(), job, *CLAIMS):
        validate.validate(content, "1.34", strict=True)


@pytest.mark.parametrize(("code", "starts_again"), [(1, True), (2, False), (3, False), (85, True), (137, True)])
def test_a_mistake_of_the_user_costs_one_start(code, starts_again):
    """Played as the controllers of Job and JobSet do: the first rule that matches."""
    spec, policy = replicated_job()["template"]["spec"], RUNTIME["spec"]["template"]["spec"]["failurePolicy"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # without it Kubernetes refuses a podFailurePolicy
    reason = "BackoffLimitExceeded"
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule["onExitCodes"]
        assert codes["containerName"] == container["name"]
        if codes["operator"] == "In" and code in codes["values"]:
            reason = {"FailJob": "PodFailurePolicy"}[rule["action"]]
            break
    actions = [rule["action"] for rule in policy["rules"] if reason in rule["onJobFailureReasons"]]
    action = actions[0] if actions else "RestartJobSet"
    assert (action == "RestartJobSet") == starts_again


def test_the_job_names_its_runtime_and_its_queue():
    assert JOB["spec"]["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    assert JOB["spec"]["runtimeRef"]["kind"] == RUNTIME["kind"]
    assert JOB["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    # Where Trainer looks for the container that trains, and for its policy about ranks.
    assert replicated_job()["name"] == "node"
    label = replicated_job()["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"]
    assert label == "trainer"
    assert "torch" in RUNTIME["spec"]["mlPolicy"]


def test_the_pod_has_data_runs_shared_memory_gpus_and_an_image_that_is_only_read():
    spec = pod()["spec"]
    (container,) = spec["containers"]
    sources = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: sources[mount["name"]] for mount in container["volumeMounts"]}
    claimed = {
        path: volume["persistentVolumeClaim"]["claimName"]
        for path, volume in mounts.items()
        if "persistentVolumeClaim" in volume
    }
    assert claimed == {f"{IMAGE_FOLDER}/data": "mmlrec-data", f"{IMAGE_FOLDER}/runs": "mmlrec-runs"}
    assert set(claimed.values()) == {claim["metadata"]["name"] for claim in CLAIMS}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "emptyDir" in mounts["/tmp"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(JOB["spec"]["trainer"]["numProcPerNode"])
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert spec["nodeSelector"]
    assert [secret["secretRef"]["name"] for secret in container["envFrom"]] == ["mmlrec-secrets"]
    # As the presets say it.
    preset = load_preset("kubernetes-2n", path=DEPLOY.parent / "torchx.yaml")
    assert {mount.dst: mount.src for mount in preset.mounts} == claimed
    user = preset.metadata.kubernetes["spec"]["securityContext"]
    assert {key: spec["securityContext"][key] for key in user} == user


def test_a_last_checkpoint_has_its_time():
    (seconds,) = [
        int(word.partition("=")[2]) for word in JOB["spec"]["trainer"]["args"] if word.startswith("--shutdown-timeout")
    ]
    assert seconds < pod()["spec"]["terminationGracePeriodSeconds"]


def test_what_the_job_starts_is_here():
    arguments = JOB["spec"]["trainer"]["args"]
    module, config = (arguments[arguments.index(option) + 1] for option in ("-m", "--config"))
    assert (DEPLOY.parent / module.replace(".", "/")).with_suffix(".py").is_file()
    assert (DEPLOY.parent / config).is_file()
    assert not [word for word in arguments if re.search(r"\$", word)]
