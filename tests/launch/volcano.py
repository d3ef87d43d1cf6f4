"""What a Volcano cluster does with a job that TorchX submits, as far as it can be played on one machine.

Read in Volcano's controller (plugins svc and env) and in the kubelet, independently of what TorchX believes of them.
"""

import re
from typing import Any

from torchx import specs
from torchx.runner import get_runner
from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization


def dry_run(app: specs.AppDef) -> dict[str, Any]:
    """The Volcano Job that TorchX would submit."""
    with get_runner() as runner:
        info = runner.dryrun(app, "kubernetes", {"queue": "default", "validate_spec": False})
    job = sanitize_for_serialization(info.request.resource)
    assert isinstance(job, dict)
    return job


def environment(job: dict[str, Any], task: dict[str, Any]) -> dict[str, str]:
    """The variables of a task's container: its own, then those of the plugins svc and env."""
    (container,) = task["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    name = job["metadata"]["name"]
    for each in job["spec"]["tasks"]:
        # Pods are called <job>-<task>-<index>; the headless service that the plugin makes is called like the job.
        hosts = [f"{name}-{each['name']}-{index}.{name}" for index in range(each["replicas"])]
        key = each["name"].replace("-", "_").upper()
        variables |= {f"VC_{key}_HOSTS": ",".join(hosts), f"VC_{key}_NUM": str(len(hosts))}
    return variables | {"VC_TASK_INDEX": "0", "VK_TASK_INDEX": "0"}


def command(job: dict[str, Any], task: dict[str, Any]) -> list[str]:
    """What the kubelet starts: `$(NAME)` of a known variable is replaced, `$$` becomes `$`, all else stays."""
    (container,) = task["template"]["spec"]["containers"]
    return [expand(word, environment(job, task)) for word in container["command"]]


def expand(text: str, variables: dict[str, str]) -> str:
    def meaning(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", meaning, text)


def pod(job: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """The pod that Volcano makes of a task."""
    template = task["template"]
    metadata = template["metadata"] | {"name": f"{job['metadata']['name']}-{task['name']}-0"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def action(task: dict[str, Any], event: str, code: int) -> str:
    """What Volcano's controller does when a pod of a task ends: the first of its policies that holds; else nothing."""
    for policy in task.get("policies", []):
        if policy.get("event") == event or (policy.get("exitCode") == code and code != 0):
            return policy["action"]
    return "SyncJob"
