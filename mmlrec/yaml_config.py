"""YAML files with `base:`, read strictly, and sections whose errors name file and key. Knows no section itself."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.paths import shipped_config
from mmlrec.storage.places import Place, read

#: Most keys elsewhere that a message about an unknown key names; a name that more keys have, such as `name`, is no hint.
_MOST_KEYS = 3
_LEAST_LIKE = 0.75  # of two names, by difflib, where one stands in another section
_NUMBER = r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"
_LARGEST_WHOLE = 2**53  # floats beyond it are rounded
_NOTHING = ("none", "nil", "nan", "no", "off", "false")

_QUOTED = "put it in quotes where text is meant, as words such as yes, no, on, off and null are"


class StrictModel(BaseModel):
    """Base of every config section: unknown keys are errors, types are not coerced, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 and 1e6 as numbers.

    It refuses a key given twice, a key that is a boolean or nothing, an alias within what it names, and what is no text.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # so that an alias within what it names is refused
        self._own_keys_checked: set[yaml.MappingNode] = set()

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """As the base class, but no half of a surrogate pair, which an escape can write and no file can hold."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise yaml.constructor.ConstructorError(None, None, "half a surrogate pair is no text", node.start_mark)
        return value

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """As the base class, which puts what `<<:` names before the keys of a mapping; but each of these once, and a text."""
        if node not in self._own_keys_checked:
            self._own_keys_checked.add(node)
            self._check_keys([key for key, _ in node.value])
        super().flatten_mapping(node)

    def _check_keys(self, nodes: list[yaml.Node]) -> None:
        seen: set[Hashable] = set()
        for node in nodes:
            key = "<<" if node.tag == "tag:yaml.org,2002:merge" else self.construct_object(node)
            if key is None or isinstance(key, bool):
                raise yaml.constructor.ConstructorError(
                    None, None, f"YAML reads the key {node.value} as {json.dumps(key)}: {_QUOTED}", node.start_mark
                )
            if not isinstance(key, Hashable):
                continue  # the base class refuses it
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' appears twice", node.start_mark)
            seen.add(key)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)

Section = TypeVar("Section", bound=BaseModel)


def read_yaml(path: Place) -> dict[str, Any]:
    """Read one YAML mapping strictly. Its keys that begin with `x-` hold what other keys repeat by anchors, and are left out.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or no mapping.
    """
    try:
        text = read(path).decode()
    except FileNotFoundError:
        raise ConfigError(missing(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    try:
        content = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}{_slip(text, error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ConfigError(f"{path}: the top level must be a mapping of sections, found {found}.{_as_key(content)}")
    return {key: value for key, value in content.items() if not str(key).startswith("x-")}


def missing(path: Place) -> str:
    """What to say of a file that is not there."""
    near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    beside = f" Beside it: {', '.join(near)}." if near else ""
    return f"{path}: no such config file.{did_you_mean(str(path), near)}{beside}"


def load_with_base(path: Place, origin: dict[str, str], above: tuple[Place, ...] = ()) -> dict[str, Any]:
    """A YAML mapping over those that its `base:` names: files, relative to its own, or else shipped configurations.

    Args:
        origin: learns which file gave each dotted key.

    Raises:
        ConfigError: as `read_yaml`, and where a base is neither, or the bases go round in a circle.
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
        merge(merged, load_with_base(_base(path, base), origin, (*above, path.resolve())), None, origin, "")
    merge(merged, own, str(path), origin, "")
    return merged


def _base(path: Place, base: str) -> Place:
    """Where the file lies that another one names as its base. Raises ConfigError where there is none."""
    beside = path.parent / base
    if beside.is_file():
        return beside
    shipped = shipped_config(base)
    if shipped is None:
        raise ConfigError(f"{path}: base: {missing(beside)} A shipped configuration is meant by its name: base: base/train.")
    return shipped


def merge(into: dict[str, Any], new: dict[str, Any], source: str | None, origin: dict[str, str], prefix: str = "") -> None:
    """Put `new` over `into`, key by key in nested mappings; `origin` learns that they are from `source`, if one is given."""
    for key, value in new.items():
        where = f"{prefix}{key}"
        if source is not None:
            origin[where] = source
        if isinstance(value, dict):
            # A section of its own, as that of `new` may stand under another key, too, by an anchor.
            into[key] = into[key] if isinstance(into.get(key), dict) else {}
            merge(into[key], value, source, origin, f"{where}.")
        else:
            into[key] = value


def validate_section(
    section: type[Section],
    content: dict[str, Any],
    *,
    prefix: str,
    source: str,
    origin: dict[str, str] | None = None,
    everywhere: Callable[[], Iterator[Iterable[str]]] | None = None,
    other_names: Mapping[str, str] | None = None,
) -> Section:
    """Check `content` against a section's schema. A float without a fraction, such as 1e6, is an integer where one is wanted.

    Args:
        prefix: dotted path of the section, with its trailing dot, for messages.
        source: file to name when `origin` does not know the key.
        origin: dotted key -> file or "command line".
        everywhere: dotted keys of the whole file, among which an unknown one is looked for, those first that are most likely
            meant; those of the section when absent.
        other_names: words that are no keys -> a sentence that names the key which is meant.

    Raises:
        ConfigError: with one line for each problem.
    """
    try:
        return section.model_validate(_with_integers(section, content))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            location = [str(part) for part in problem["loc"]]
            path, allowed, field = _written(section, location, problem["type"] == "extra_forbidden")
            context, given = problem.get("ctx", {}), problem["input"]
            if "discriminator" in context:
                path.append(context["discriminator"].strip("'"))
            key = (prefix + ".".join(path)).rstrip(".")
            where = origin_of(key, origin or {}, source)
            if colon := _without_blank_in(given, path):
                message = f"a blank is missing behind the colon: write {colon}."
            elif problem["type"] == "extra_forbidden" and "." in path[-1]:
                nested = ": {".join(path[-1].split(".")) + f": {given}" + "}" * path[-1].count(".")
                message = f"a key in a file has no dots; its sections are nested: {nested}."
            elif problem["type"] == "extra_forbidden":
                own = partial(iter, [[prefix + known for known in keys_of(section)]])
                meant = _meant(key, allowed, everywhere or own, other_names or {})
                message = f"unknown key.{meant} Allowed: {', '.join(sorted(allowed))}."
                section_of_a_file = isinstance(given, dict | list) and where != "command line"
                if key == path[-1] and section_of_a_file and not meant:
                    message += f" A section that only holds anchors for others begins with x-: x-{key}."
            elif problem["type"] == "union_tag_invalid":
                known = context["expected_tags"].replace("'", "")
                message = f"'{context['tag']}' is none of {known}.{did_you_mean(context['tag'], known.split(', '))}"
            elif problem["type"] in ("missing", "union_tag_not_found"):
                message = "required, but not given."
            elif problem["type"] == "value_error":
                message = f"{context.get('error')}."
            elif problem["type"] in ("dict_type", "model_type"):
                named = isinstance(given, str) and ("name" in allowed or key in ("model", "balancing"))
                hint = _as_key(given)
                example = f", such as {key}.name={given}" if named and not hint else ""
                message = f"must be a section of keys and values{example}; found {given!r}.{hint}"
            else:
                quotes = problem["type"] == "string_type" and not isinstance(given, dict | list)
                message = f"{problem['msg']}; found {given!r}{f': {_QUOTED}' if quotes else ''}."
                message += _value_hint(problem["type"], given, context, field)
            lines.append(f"{where}: {f'{key}: ' if key else ''}{message}")
        raise ConfigError("\n".join(lines)) from None


def _with_integers(section: type[BaseModel], content: dict[str, Any]) -> dict[str, Any]:
    """`content` with integers for the floats that a schema wants as such and that have no fraction."""
    try:
        section.model_validate(content)
    except ValidationError as error:
        found = [problem for problem in error.errors() if problem["type"] == "int_type" and _is_whole(problem["input"])]
    else:
        found = []
    content = copy.deepcopy(content) if found else content
    for problem in found:
        path, *_ = _written(section, [str(part) for part in problem["loc"]], False)
        holder: Any = content
        for part in path[:-1]:
            holder = _items(holder).get(part)
        if path[-1] in _items(holder):
            holder[int(path[-1]) if isinstance(holder, list) else path[-1]] = int(problem["input"])
    return content


def _items(holder: Any) -> dict[Any, Any]:
    """What stands below a key: of a list by number, as it is written in the place of a problem; nothing for a value."""
    if isinstance(holder, list):
        return {str(index): value for index, value in enumerate(holder)}
    return holder if isinstance(holder, dict) else {}


def _is_whole(value: Any) -> bool:
    """Whether a float stands for one integer, and no other one for which it would have been rounded."""
    return isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_WHOLE


def origin_of(key: str, origin: dict[str, str], source: str) -> str:
    """The file, or "command line", that gave a dotted key or the section it is in; `source` where `origin` has neither."""
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return source


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a section and of those below it; NAME stands for a name that the user gives."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        below, at = f"{prefix}{name}.", field.annotation
        if get_origin(at) is dict:
            below, at = f"{below}NAME.", get_args(at)[-1]
        elif get_origin(at) is list:
            at = get_args(at)[-1]
        yield from dict.fromkeys(key for kind in _sections(at) for key in keys_of(kind, below))


def _meant(
    key: str, allowed: list[str], everywhere: Callable[[], Iterator[Iterable[str]]], other_names: Mapping[str, str]
) -> str:
    """Sentences that name the key which an unknown one stands for, each with a leading blank.

    The first of: a name beside it that is the same but for its spelling, or that has it as one of its words; a word for it;
    the same name in another section; the name that is most like it.
    """
    above, _, name = key.rpartition(".")
    wanted = _spelt(name)
    beside = [match for match in allowed if _spelt(match) == wanted] or [match for match in allowed if name in match.split("_")]
    if len(beside) == 1:
        return f" Did you mean '{beside[0]}'?"
    if wanted in other_names:
        return f" {other_names[wanted]}"
    likeness: dict[str, float] = {}
    for group in everywhere():
        same = []
        for known in dict.fromkeys(group):
            parts = known.split(".")
            if len(parts) == key.count(".") + 1 and all(map(_is_called, parts, key.split("."))):
                return ""  # It belongs to another kind of this very section.
            spellings = {_spelt(parts[-1]), _spelt("".join(parts[-2:]))}
            if wanted in spellings:
                same.append(known)
            likeness[known] = max(difflib.SequenceMatcher(None, wanted, spelling).ratio() for spelling in spellings)
        if hint := _one_of(same, above):
            return hint
    least = max((difflib.SequenceMatcher(None, wanted, _spelt(match)).ratio() for match in allowed), default=0.0)
    most = max(likeness.values(), default=0.0)
    if most > max(least, _LEAST_LIKE) and (hint := _one_of([known for known in likeness if likeness[known] == most], above)):
        return hint
    return did_you_mean(name, allowed)


def _is_called(known: str, given: str) -> bool:
    return known in (given, "NAME")


def _one_of(keys: list[str], above: str) -> str:
    """A question that names some keys, those of the same section alone where there are any; nothing where they are many."""
    own = [key for key in keys if above and key.split(".")[0] == above.split(".")[0]]
    keys = own or keys
    return f" Did you mean {' or '.join(repr(key) for key in keys)}?" if 0 < len(keys) <= _MOST_KEYS else ""


def _spelt(name: str) -> str:
    return re.sub(r"[-_ .]", "", name.lower())


def _without_blank(text: str) -> str | None:
    """`key: value` for what was written as `key:value`, which YAML takes for one word."""
    found = re.fullmatch(r"\s*([A-Za-z_][\w./-]*):([^\s/].*)", text)
    return f"{found[1]}: {found[2]}" if found else None


def _without_blank_in(given: Any, path: list[str]) -> str | None:
    """The same for a key of which YAML has made a word without a value: of the one at `path`, or of one below it."""
    words = [key for key, value in given.items() if value is None] if isinstance(given, dict) else path[-1:]
    found = (_without_blank(str(word)) for word in words if given is None or isinstance(given, dict))
    return next(filter(None, found), None)


def _as_key(given: Any) -> str:
    """What is wrong with a value where a section should be, when that can be seen."""
    if given is None:
        return " Nothing stands below it: its keys are indented by two blanks."
    if isinstance(given, list) and given and all(isinstance(item, dict) for item in given):
        return " Leave the dashes away: it is no list."
    if not isinstance(given, str):
        return ""
    if colon := _without_blank(given):
        return f" A blank is missing behind the colon: write {colon}."
    equal = re.fullmatch(r"([A-Za-z_][\w.]*)\s*=\s*(\S+)", given)
    return f" In a file a colon and a blank stand for the equals sign: {equal[1]}: {equal[2]}." if equal else ""


def _slip(text: str, error: yaml.YAMLError) -> str:
    """What else to look at, beside what YAML says about a text that it cannot read."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return ""
    quotes = ". Put a text that begins with it in quotes." if "cannot start any token" in str(error) else ""
    lines = text.splitlines()[: mark.line + 1]
    if lines and "\t" in lines[-1][: len(lines[-1]) - len(lines[-1].lstrip())]:
        return f"\nLine {len(lines)} is indented by a tab: YAML takes blanks only."
    for number in range(len(lines), max(0, len(lines) - 2), -1):
        if colon := _without_blank(lines[number - 1]):
            return f"\nLine {number} lacks a blank behind the colon: write {colon}."
    return quotes


def _value_hint(problem: str, given: Any, context: dict[str, Any], field: FieldInfo | None) -> str:
    """How a value of the wrong kind is written, and what its key means; each with a leading blank."""
    hint = ""
    kind, text = problem.partition("_")[0], given.strip() if isinstance(given, str) else ""
    if kind in ("int", "float"):
        hint = _number_hint(
            text if given is not False else "false", optional=field is not None and type(None) in get_args(field.annotation)
        )
    elif problem.startswith("less_than") and isinstance(given, int | float) and context.get("lt", context.get("le")) == 1:
        hint = f" It is a share: {given:g} % is {given / 100:g}." if 1 <= given <= 100 else ""
    elif kind == "bool":
        hint = " Write true or false, without quotes."
    elif kind in ("list", "tuple") and isinstance(given, str | int | float):
        members = re.split(r"[,\s]+", text.strip("()")) if text else [json.dumps(given)]
        hint = f" Write a list: [{', '.join(members)}]."
    elif problem in ("literal_error", "enum"):
        hint = did_you_mean(str(given), re.findall(r"'([^']*)'", context.get("expected", "")))
    meaning = (field.description or "") if field is not None else ""
    return f"{hint} {meaning[:1].upper()}{meaning[1:]}".rstrip() if meaning else hint


def _number_hint(text: str, *, optional: bool) -> str:
    """How a text that stands for a number is written."""
    if percent := re.fullmatch(rf"({_NUMBER})\s*%", text):
        return f" Write a share: {float(percent[1]) / 100:g}."
    if re.fullmatch(_NUMBER, text):
        return f" Write it without quotes: {text}."
    if re.fullmatch(r"[-+]?[0-9]+(,[0-9]+)+", text):
        return f" A number has a point and no comma, such as {text.replace(',', '.', 1).replace(',', '')}."
    if re.fullmatch(rf"{_NUMBER}\s*[A-Za-z]+", text):
        return " Write the number alone, without a unit."
    return " null is the word for none." if optional and text.lower() in _NOTHING else ""


def _written(section: type[BaseModel], location: list[str], unknown: bool) -> tuple[list[str], list[str], FieldInfo | None]:
    """Where a problem is: its path as it stands in the file, without the tags of unions; keys and field that are there.

    Args:
        unknown: the last part is no field of its section.

    Returns:
        The path; the keys of the section that holds it, or that it is; its field, where it is the value of one.
    """
    path: list[str] = []
    at: Any = section
    field: FieldInfo | None = None
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
    allowed = list(sections[0].model_fields) if len(sections) == 1 else []
    return path + location[-1:] if unknown else path, allowed, field


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation allows: one, those of a union, or none."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _has_tag(section: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in section.model_fields.values())
