"""YAML files with `base:`, read strictly, and sections whose errors name file and key. Knows no section itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mmlrec.errors import ConfigError, did_you_mean

_HINTS = {
    "weight_decay": "Fused table kernels ignore weight decay on some devices; use embeddings.l2 (a penalty on looked-up"
    " vectors) or dense.l2.",
    "batch_size_per_rank": "training.batch_size is global: the same for every world size.",
    "loss_weights": "Weights of tasks and scenarios stand in balancing.loss_weights.",
    "momentum": "Fused table kernels ignore momentum on some devices, so it is not offered.",
}


class StrictModel(BaseModel):
    """Base of every config section: unknown keys are errors, types are not coerced, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice, and what is no text."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """As the base class, but no half of a surrogate pair, which an escape can write and no file can hold."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise yaml.constructor.ConstructorError(None, None, "half a surrogate pair is no text", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, but every key once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        counts = Counter(key for key in keys if isinstance(key, Hashable))  # the base class refuses the others
        for key, count in counts.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)

Section = TypeVar("Section", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping strictly.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        beside = f" Beside it: {', '.join(near)}." if near else ""
        raise ConfigError(f"{path}: no such config file.{did_you_mean(str(path), near)}{beside}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, found {type(content).__name__}.")
    return content


def load_with_base(path: Path, origin: dict[str, str], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping over those that its `base:` names. `origin` learns which file gave each dotted key.

    Raises:
        ConfigError: as `read_yaml`, and where the bases go round in a circle.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path}: `base:` leads back to this file.")
    own = read_yaml(path)
    bases = own.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base: must be a file name or a list of file names, relative to this file.")
    merged: dict[str, Any] = {}
    for base in bases:
        merge(merged, load_with_base(path.parent / base, origin, (*above, path.resolve())), None, origin, "")
    merge(merged, own, str(path), origin, "")
    return merged


def merge(into: dict[str, Any], new: dict[str, Any], source: str | None, origin: dict[str, str], prefix: str = "") -> None:
    """Put `new` over `into`, key by key in nested mappings; `origin` learns that they are from `source`, if one is given."""
    for key, value in new.items():
        where = f"{prefix}{key}"
        if source is not None:
            origin[where] = source
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value, source, origin, f"{where}.")
        else:
            into[key] = value
            if isinstance(value, dict) and source is not None:
                merge({}, value, source, origin, f"{where}.")


def validate_section(
    section: type[Section], content: dict[str, Any], *, prefix: str, source: str, origin: dict[str, str] | None = None
) -> Section:
    """Check `content` against a section's schema.

    Args:
        prefix: dotted path of the section, with its trailing dot, for messages.
        source: file to name when `origin` does not know the key.
        origin: dotted key -> file or "command line".

    Raises:
        ConfigError: with one line for each problem.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path, allowed = _written(section, [str(part) for part in problem["loc"]], problem["type"] == "extra_forbidden")
            context = problem.get("ctx", {})
            cause = context.get("error")
            if "discriminator" in context:
                path.append(context["discriminator"].strip("'"))
            key = (prefix + ".".join(path)).rstrip(".")
            where = origin_of(key, origin or {}, source)
            if problem["type"] == "extra_forbidden":
                message = f"unknown key.{did_you_mean(path[-1], allowed)} {_HINTS.get(path[-1], '')}".rstrip()
                message += f" Allowed: {', '.join(sorted(allowed))}."
            elif problem["type"] == "union_tag_invalid":
                known = context["expected_tags"].replace("'", "")
                message = f"'{context['tag']}' is none of {known}.{did_you_mean(context['tag'], known.split(', '))}"
            elif problem["type"] in ("missing", "union_tag_not_found"):
                message = "required, but not given."
            elif problem["type"] == "value_error":
                message = f"{cause}."
            elif problem["type"] in ("dict_type", "model_type"):
                given = problem["input"]
                example = f", such as {key}.name={given}" if isinstance(given, str) and key in ("model", "balancing") else ""
                message = f"must be a section of keys and values{example}; found {given!r}."
            else:
                message = f"{problem['msg']}; found {problem['input']!r}."
            lines.append(f"{where}: {key or 'config'}: {message}")
        raise ConfigError("\n".join(lines)) from None


def origin_of(key: str, origin: dict[str, str], source: str) -> str:
    """The file, or "command line", that gave a dotted key or the section it is in; `source` where `origin` has neither."""
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return source


def _written(section: type[BaseModel], location: list[str], unknown: bool) -> tuple[list[str], list[str]]:
    """Path of a problem as it stands in the file, without the tags of unions, and the fields of the section that holds it.

    Args:
        unknown: the last part is no field of its section.
    """
    path: list[str] = []
    at: Any = section
    for part in location[:-1] if unknown else location:
        sections = _sections(at)
        if len(sections) > 1:
            at = next((kind for kind in sections if _has_tag(kind, part)), None)
            continue
        if sections:
            field = sections[0].model_fields.get(part)
            at = None if field is None else field.annotation
        else:
            at = get_args(at)[-1] if get_origin(at) in (dict, list) else None
        path.append(part)
    sections = _sections(at)
    return path + location[-1:] if unknown else path, list(sections[0].model_fields) if len(sections) == 1 else []


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows: one, those of a union, or none."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _has_tag(section: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in section.model_fields.values())
