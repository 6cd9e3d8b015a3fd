"""Settles what a configuration leaves open: the shapes of networks follow from the data."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from fkd_med.errors import ConfigError

# Parameter of a network -> parameter of the data module that decides it.
SHAPES = {"in_channels": "in_channels", "classes": "classes", "img_size": "image_size"}


def fit_networks_to_data(config: Namespace) -> None:
    """Give every network in the configuration the channels, classes and image size of the data.

    Raises:
        ConfigError: a network was explicitly given another number.
    """
    data = config.get("data")
    arguments = data.get("init_args") if isinstance(data, Namespace) else None
    if not isinstance(arguments, Namespace):
        return
    _walk(config.get("model"), "model", {name: arguments.get(source) for name, source in SHAPES.items()})


def _walk(node: Any, key: str, wanted: dict[str, Any]) -> None:
    children = vars(node) if isinstance(node, Namespace) else node if isinstance(node, dict) else {}
    if key.endswith(".network") and "class_path" in children:
        _fit(node, key, wanted)
    for name, child in list(children.items()):
        _walk(child, f"{key}.{name}", wanted)


def _fit(node: Any, key: str, wanted: dict[str, Any]) -> None:
    parameters = _parameters(node["class_path"])
    arguments = node.get("init_args") or Namespace()
    for name, value in wanted.items():
        if name not in parameters or value is None:
            continue
        given, default = arguments.get(name), parameters[name].default
        if given not in (None, default, value):
            raise ConfigError(
                f"{key}.{name} is {given}, but the data have {SHAPES[name]} {value}: remove it (it follows from the "
                f"data), or set data.{SHAPES[name]}."
            )
        arguments[name] = value
    node["init_args"] = arguments


def _parameters(class_path: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class by name; none if it cannot be imported (instantiating says why)."""
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError, ValueError):
        return {}
    return dict(inspect.signature(cls.__init__).parameters)


def stored_seed(config: Path) -> int | None:
    """Return the seed of the run whose config.yaml this is, or nothing if there is none."""
    try:
        seed = yaml.safe_load(config.read_text()).get("seed_everything")
    except (OSError, yaml.YAMLError, AttributeError):
        return None
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None
