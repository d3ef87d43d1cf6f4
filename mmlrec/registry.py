"""Methods by name. A method is one file in `mmlrec/models/`: file name = registry name = YAML `name`, class = CamelCase.

Nothing is registered by hand: a new file is found by its name and imported when it is asked for.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlrec.config import ALIASES, ConfigError, RunConfig
from mmlrec.errors import did_you_mean
from mmlrec.yaml_config import validate_section

if TYPE_CHECKING:
    from mmlrec.models.base.model import MultiTaskModel, NetworkConfig

_MODELS = Path(__file__).parent / "models"


def method_names() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(p.stem for p in _MODELS.glob("*.py") if p.stem != "__init__")


def aliases() -> dict[str, str]:
    """Further names: alias -> the method whose class it is. The configuration adds the strategy that goes with it."""
    return {alias: method for alias, (method, _) in ALIASES.items()}


def method(name: str) -> type[MultiTaskModel]:
    """The class of a method; `method(name).Config` is its options.

    Raises:
        ConfigError: no such method; the message lists all and suggests the nearest.
    """
    names = [*method_names(), *aliases()]
    if name not in names:
        raise ConfigError(f"model.name: unknown method '{name}'.{did_you_mean(name, names)} Methods: {', '.join(names)}.")
    name = aliases().get(name, name)
    module = importlib.import_module(f"mmlrec.models.{name}")
    wanted = name.replace("_", "")
    for attribute, value in vars(module).items():
        if isinstance(value, type) and attribute.lower() == wanted and value.__module__ == module.__name__:
            return value
    raise ConfigError(f"mmlrec/models/{name}.py defines no class named like its file ({wanted}, in CamelCase).")


def resolve_model(config: RunConfig, source: str) -> RunConfig:
    """The configuration with all options of its method spelt out in `model`, and no `model_defaults` left.

    Raises:
        ConfigError: unknown method, unknown option, a value of the wrong type, or a method that is not for this setting or
            this strategy.
    """
    options = model_config(config.model, config.model_defaults, source)
    name = config.model["name"]
    chosen = method(name)
    chosen.check_defined(config.dataset.setting)
    if chosen.tables_per_branch and config.balancing.name != "static":
        raise ConfigError(
            f"balancing.name={config.balancing.name}: the branches of {name} share nothing, so there is nothing to balance."
            " Use balancing.name=static, or a method that shares."
        )
    model = {"name": name, **options.model_dump(mode="json")}
    return config.model_copy(update={"model": model, "model_defaults": {}})


def model_config(section: dict[str, Any], defaults: dict[str, Any], source: str) -> NetworkConfig:
    """Options of the chosen method: `model` over the part of `model_defaults` that the method knows.

    Args:
        section: the `model` section, `name` included; unknown keys are errors.
        defaults: the `model_defaults` section; each key must belong to at least one method.
        source: the config file, for messages.

    Raises:
        ConfigError: unknown method, unknown key, or a value of the wrong type.
    """
    config_class = method(section["name"]).Config
    known = {key for name in method_names() for key in method(name).Config.model_fields}
    for key in defaults:
        if key not in known:
            raise ConfigError(f"{source}: model_defaults.{key}: no method has this option.{did_you_mean(key, known)}")
    own = {key: value for key, value in defaults.items() if key in config_class.model_fields}
    chosen = {key: value for key, value in section.items() if key != "name"}
    return validate_section(config_class, own | chosen, prefix="model.", source=source)
