"""What an AppDef cannot tell TorchX's Volcano job: when not to start again; and the pod overlay of a preset, checked.

TorchX lays the overlay over the pod and drops what Kubernetes does not know, in silence.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from torchx.schedulers import kubernetes_scheduler
from torchx.specs import RetryPolicy

from mmlrec.errors import MISTAKES, ConfigError, did_you_mean

_WHERE = "metadata.kubernetes"
_ENDED_BY_MISTAKES = [{"exitCode": code, "action": "TerminateJob"} for code in MISTAKES]
_OF_ITS_OWN = [{"event": event, "action": "RestartTask"} for event in ("PodEvicted", "PodFailed")]


def end_at_mistakes() -> None:
    """Have TorchX write into its Volcano jobs that a mistake of the user ends them: of a task's policies the first one holds.

    By itself it starts a job again when a pod fails, whatever the exit code is, and has no way to say otherwise. Of jobs whose
    replicas may come and go, RetryPolicy.REPLICA, it starts nothing again; here, what has failed.
    """
    policies: Any = kubernetes_scheduler.RETRY_POLICIES
    for kind, own in ((RetryPolicy.APPLICATION, policies[RetryPolicy.APPLICATION]), (RetryPolicy.REPLICA, _OF_ITS_OWN)):
        if policies[kind][: len(_ENDED_BY_MISTAKES)] != _ENDED_BY_MISTAKES:
            policies[kind] = [*_ENDED_BY_MISTAKES, *own]


def check_overlay(overlay: dict[str, Any]) -> None:
    """Refuse a key that a pod does not have.

    Needs the package `kubernetes`, without which no job is sent to a cluster either: where it is missing, nothing is checked.

    Raises:
        ConfigError: naming the key, with what was probably meant.
    """
    try:
        models = importlib.import_module("kubernetes.client.models")
    except ImportError:
        return
    allowed = ("metadata", "spec")  # TorchX takes no more of it
    for key in overlay:
        if key not in allowed:
            raise ConfigError(f"{_WHERE}.{key}: not laid over pods.{did_you_mean(key, allowed)} Allowed: {', '.join(allowed)}.")
    _check(models, "V1Pod", overlay, _WHERE)


def _check(models: Any, kind: str, value: Any, where: str) -> None:
    """Compare `value` with `kind`, a type as the package writes it: a model's name, List[kind], Dict[str, kind], or str."""
    inner = re.fullmatch(r"[Ll]ist\[(.+)\]|[Dd]ict[\[(]str, (.+)[\])]", kind)
    if inner and inner[1] and isinstance(value, list):
        for number, part in enumerate(value):
            _check(models, inner[1], part, f"{where}.{number}")
    elif inner and inner[2] and isinstance(value, dict):
        for key, part in value.items():
            _check(models, inner[2], part, f"{where}.{key}")
    elif not inner and hasattr(models, kind):
        model = getattr(models, kind)
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: must be a section of keys and values; found {value!r}.")
        names = {written: name for name, written in model.attribute_map.items()}
        for key, part in value.items():
            if key not in names:
                raise ConfigError(f"{where}.{key}: unknown key.{did_you_mean(key, names)} Allowed: {', '.join(sorted(names))}.")
            _check(models, model.openapi_types[names[key]], part, f"{where}.{key}")
    elif inner:
        raise ConfigError(f"{where}: must be a {'list' if inner[1] else 'section of keys and values'}; found {value!r}.")
