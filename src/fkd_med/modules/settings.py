"""What modules are configured with, in a form that checkpoints can hold and copies can share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from lightning import LightningModule

PLAIN = (str, int, float, bool, type(None))


def is_plain(value: Any) -> bool:
    """Tell whether a value is made of containers and scalars only, so that a checkpoint of it loads safely."""
    if isinstance(value, Mapping):
        return all(is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(is_plain(v) for v in value)
    return isinstance(value, PLAIN)


def as_written(value: Any) -> Any:
    """Return a value as a configuration file would have it: functions by their import path."""
    if isinstance(value, Mapping):
        return {key: as_written(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_written(v) for v in value]
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, FunctionType) else value


class SharedCallable:
    """A callable that copies of a module share: those the command line builds hold the whole parser.

    Args:
        function: the callable.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedCallable:
        """Return the same object."""
        return self

    def __reduce__(self) -> tuple[type[SharedCallable], tuple[Callable[..., Any]]]:
        """Go to another process without the parser."""
        return SharedCallable, (_without_parser(self.function),)


def _without_parser(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what the command line built from a class and its arguments as just that; anything else as it is."""
    if isinstance(function, partial) and getattr(function.func, "__module__", "").startswith("jsonargparse."):
        _, *given = function.args  # first what makes objects of modules, which optimizers and schedulers are not
        if given and isinstance(given[0], type):
            return partial(given[0], *given[1:], **function.keywords)
    return function


def teacher_configuration(module: LightningModule) -> Any:
    """Return what the command line built a teacher's module from, which says more than the object: pretrained weights.

    Args:
        module: the distilling module or the teacher's, with which Lightning keeps the configuration of the outer one.

    Returns:
        ``{"class_path": ..., "init_args": ...}``; None for a teacher made in Python.
    """
    outer = module.hparams.get("teacher")
    while isinstance(outer, Mapping) and isinstance(arguments := outer.get("init_args"), Mapping):
        if "module" in arguments:
            return arguments["module"]
        outer = arguments.get("teachers")  # an ensemble's
    return None
