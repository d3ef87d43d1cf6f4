"""Methods and strategies by name. Each is one file: file name = registry name = YAML `name`, class = the same in CamelCase.

Methods are the files of `mmlrec/models/`, strategies those of `mmlrec/balancing/strategies/`. Nothing is registered by hand: a
new file is found by its name and imported when it is asked for. Those of other packages: see `mmlrec.extensions`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from mmlrec.config import ALIASES, OTHER_NAMES, RunConfig, load_config
from mmlrec.errors import ConfigError, did_you_mean
from mmlrec.extensions import METHOD, REMEDY, STRATEGY, Finder, Source, named_like_its_file
from mmlrec.yaml_config import keys_of, origin_of, validate_section

if TYPE_CHECKING:
    from mmlrec.balancing.base import Balancing, BalancingConfig
    from mmlrec.models.base.model import MultiTaskModel, NetworkConfig

Options = TypeVar("Options", bound=BaseModel)

_ROOT = Path(__file__).parent


def _files(package: str) -> dict[str, Source]:
    """The files of a package of ours: name -> its class, which is imported when it is asked for."""
    files = (_ROOT.parent / package.replace(".", "/")).glob("*.py")
    names = sorted(path.stem for path in files if path.stem != "__init__")
    return {name: Source(f"{package.replace('.', '/')}/{name}.py", partial(_class, f"{package}.{name}")) for name in names}


def _class(module: str) -> type[Any]:
    found = named_like_its_file(importlib.import_module(module))
    if found is None:
        wanted = module.rpartition(".")[2].replace("_", "")
        raise ConfigError(f"{module.replace('.', '/')}.py defines no class named like its file ({wanted}, in CamelCase).")
    return found


_METHODS = Finder(METHOD, partial(_files, "mmlrec.models"))
_STRATEGIES = Finder(STRATEGY, partial(_files, "mmlrec.balancing.strategies"))


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return _METHODS.names()


def aliases() -> dict[str, str]:
    """Further names: alias -> the method whose class it is. The configuration adds the strategy that goes with it."""
    return {alias: method for alias, (method, _) in ALIASES.items()}


def method(name: str) -> type[MultiTaskModel]:
    """The class of a method; `method(name).Config` is its options.

    Raises:
        ConfigError: no such method; the message lists all and suggests the nearest.
        UserError: it is of another package, which cannot be used.
    """
    names = [*method_names(), *aliases()]
    if name not in names:
        near = did_you_mean(name, names)
        raise ConfigError(f"model.name: unknown method '{name}'.{near} Methods: {', '.join(names)}. {REMEDY}")
    return _METHODS.find(aliases().get(name, name))


def strategy_names() -> list[str]:
    """Names of all balancing strategies, sorted."""
    return _STRATEGIES.names()


def strategy(name: str) -> type[Balancing]:
    """The class of a strategy; `strategy(name).Config` is its options.

    Raises:
        ConfigError: no such strategy; the message lists all and suggests the nearest.
        UserError: it is of another package, which cannot be used.
    """
    if name not in strategy_names():
        raise ConfigError(f"balancing: {_unknown_strategy(name)}")
    return _STRATEGIES.find(name)


def _unknown_strategy(name: object) -> str:
    names = strategy_names()
    return f"unknown strategy '{name}'.{did_you_mean(str(name), names)} Strategies: {', '.join(names)}. {REMEDY}"


def option_keys() -> list[str]:
    """Dotted keys of the options of all methods and strategies at hand, each once."""
    of_methods = [f"model.{key}" for found in _METHODS.at_hand().values() for key in found.Config.model_fields]
    of_strategies = [f"balancing.{key}" for found in _STRATEGIES.at_hand().values() for key in found.Config.model_fields]
    return list(dict.fromkeys(["model.name", "balancing.name", *of_methods, *of_strategies]))


def load(path: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> RunConfig:
    """The configuration of a file and a command line, checked and spelt out: `load_config` and `resolve`.

    From Python also of a configuration's content and of sections over it.

    Raises:
        ConfigError: as these two.
        UserError: as these two.
    """
    source = "config" if isinstance(path, Mapping) else str(path)
    over = "overrides" if isinstance(overrides, Mapping) else "the command line"
    return resolve(load_config(path, overrides, option_keys), f"{source} with {over}")


def resolve(config: RunConfig, source: str) -> RunConfig:
    """The configuration with all options of its method and strategy spelt out, and no `model_defaults` left.

    Raises:
        ConfigError: unknown method, strategy or option, a value of the wrong type, or a method that is not for this setting
            or this strategy.
        UserError: method or strategy are of another package, which cannot be used.
    """
    balancing = {"name": config.balancing["name"], **balancing_config(config, source).model_dump(mode="json")}
    options = model_config(config.model, config.model_defaults, source, config.origin)
    name = config.model["name"]
    chosen = method(name)
    chosen.check_defined(config.dataset.setting)
    if chosen.tables_per_branch and balancing["name"] != "static":
        raise ConfigError(
            f"balancing.name={balancing['name']}: the branches of {name} share nothing, so there is nothing to balance."
            " Use balancing.name=static, or a method that shares."
        )
    model = {"name": name, **options.model_dump(mode="json")}
    return config.model_copy(update={"model": model, "model_defaults": {}, "balancing": balancing})


def model_config(
    section: dict[str, Any], defaults: dict[str, Any], source: str, origin: dict[str, str] | None = None
) -> NetworkConfig:
    """Options of the chosen method: `model` over the part of `model_defaults` that the method knows.

    Args:
        section: the `model` section, `name` included; unknown keys are errors.
        defaults: the `model_defaults` section; each key must belong to at least one method of this package, or to the chosen
            one, or to one given by `--import`.
        source: the config file, for messages.
        origin: dotted key -> the file it is from, or "command line".

    Raises:
        ConfigError: unknown method, unknown key, or a value of the wrong type.
    """
    config_class = method(section["name"]).Config
    known = {key for other in (config_class, *(m.Config for m in _METHODS.at_hand().values())) for key in other.model_fields}
    for key in defaults:
        if key not in known:
            raise ConfigError(f"{source}: model_defaults.{key}: no method has this option.{did_you_mean(key, known)}")
    own = {key: value for key, value in defaults.items() if key in config_class.model_fields}
    chosen = {key: value for key, value in section.items() if key != "name"}
    return _options(_METHODS, "model", section["name"], config_class, own | chosen, source, origin or {})


def _options(
    finder: Finder,
    section: str,
    name: str,
    config_class: type[Options],
    chosen: dict[str, Any],
    source: str,
    origin: dict[str, str],
) -> Options:
    """The options of a method or a strategy, checked."""
    allowed = sorted(["name", *config_class.model_fields])
    # An option may stand in a file and the name on the command line: messages tell where the option does. What the section is
    # as a whole comes from both.
    origin = {key: place for key, place in origin.items() if key != section}
    for key in (key for key in chosen if key not in allowed):
        others = [other for other, found in finder.at_hand().items() if key in found.Config.model_fields]
        if others:
            raise ConfigError(
                f"{origin_of(f'{section}.{key}', origin, source)}: {section}.{key}: {finder.kind.word} '{name}' has no option"
                f" '{key}'.{did_you_mean(str(key), allowed)} It belongs to {', '.join(others)}."
                f" Its options: {', '.join(allowed)}."
            )
    return validate_section(
        config_class,
        chosen,
        prefix=f"{section}.",
        source=source,
        origin=origin,
        everywhere=lambda: iter([keys_of(RunConfig), option_keys()]),
        other_names=OTHER_NAMES,
    )


def balancing_config(config: RunConfig, source: str) -> BalancingConfig:
    """Options of the chosen strategy.

    Args:
        source: the config file, for messages about keys of which the configuration does not know where they are from.

    Raises:
        ConfigError: unknown strategy, unknown key, or a value of the wrong type.
    """
    name, origin = config.balancing["name"], config.origin
    if name not in strategy_names():
        raise ConfigError(f"{origin_of('balancing', origin, source)}: balancing: {_unknown_strategy(name)}")
    config_class = strategy(name).Config
    chosen = {key: value for key, value in config.balancing.items() if key != "name"}
    return _options(_STRATEGIES, "balancing", name, config_class, chosen, source, origin)
