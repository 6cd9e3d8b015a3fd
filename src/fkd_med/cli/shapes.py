"""What networks take from the data: channels, classes and image size, so that no configuration says them twice."""

from __future__ import annotations

import inspect
from typing import Any

from jsonargparse import Namespace

from fkd_med.errors import ConfigError

# Parameter of a network -> parameter of the data module that decides it.
SHAPES = {"in_channels": "in_channels", "classes": "classes", "img_size": "image_size"}


def fit_networks_to_data(config: Namespace) -> None:
    """Give every network in the configuration the channels, classes and image size of the data.

    Raises:
        ConfigError: a network was explicitly given another number, or is no class.
    """
    data = config.get("data")
    arguments = data.get("init_args") if isinstance(data, Namespace) else None
    if not isinstance(arguments, Namespace):
        return
    _walk(config.get("model"), "model", {name: arguments.get(source) for name, source in SHAPES.items()})


def find_class(class_path: str) -> Any:
    """Return a class by its import path; None if it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _walk(node: Any, key: str, wanted: dict[str, Any]) -> None:
    children = vars(node) if isinstance(node, Namespace) else node if isinstance(node, dict) else {}
    if key.endswith(".network") and "class_path" in children:
        _fit(node, key, wanted)
    for name, child in list(children.items()):
        _walk(child, key if name == "init_args" else f"{key}.{name}", wanted)


def _fit(node: Any, key: str, wanted: dict[str, Any]) -> None:
    defaults = _defaults(node["class_path"], key)
    arguments = node.get("init_args") or Namespace()  # with all that the class takes, as the parser found out
    for name, value in wanted.items():
        if name not in arguments or value is None:
            continue
        given = arguments.get(name)
        if given not in (None, defaults.get(name), value):
            raise ConfigError(
                f"{key}.{name} is {given}, but the data have {SHAPES[name]} {value}: remove it (it follows from the "
                f"data), or set data.{SHAPES[name]}."
            )
        arguments[name] = value
    node["init_args"] = arguments


def _defaults(class_path: str, key: str) -> dict[str, Any]:
    """Return the defaults of a network's parameters, also of those it hands on to what it derives from (``**kwargs``).

    None of one that cannot be imported: instantiating says why.

    Raises:
        ConfigError: it is a function, whose networks nobody could build again for a checkpoint.
    """
    found = find_class(class_path)
    if inspect.isfunction(found):
        raise ConfigError(
            f"{key} is {class_path}, a function, and checkpoints are built again from classes: give the class_path of "
            "a torch.nn.Module."
        )
    defaults: dict[str, Any] = {}
    classes: tuple[Any, ...] = found.__mro__ if inspect.isclass(found) else ()
    for cls in classes:
        parameters = inspect.signature(cls.__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()} | defaults
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return defaults
