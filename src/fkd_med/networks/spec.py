"""Rebuild a network from the plain containers of a checkpoint, which may come from anyone.

`fkd predict` needs no other YAML: the checkpoint holds the network's `class_path` and `init_args`. Importing a
module runs its code, so only packages on a short list are imported, only `torch.nn.Module` classes are made, and
nothing is unpickled, evaluated or downloaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fkd_med.errors import RunError

ALLOWED_PACKAGES = ("fkd_med", "segmentation_models_pytorch", "timm", "torchvision", "monai", "torch.nn")
"""Packages a checkpoint may name a network of; users add theirs by `trusted_packages`."""

_SPEC_KEYS = {"class_path", "init_args", "dict_kwargs"}
_REMOTE = ("hf-hub:", "hf_hub:", "local-dir:", "smp-hub:", "://")


def network_from_spec(spec: Mapping[str, Any], trusted_packages: Sequence[str] = ()) -> nn.Module:
    """Build the network that `spec` describes, with fresh weights and without touching the network.

    Args:
        spec: ``{"class_path": "package.Class", "init_args": {...}}`` as jsonargparse saves it (its `dict_kwargs`
            too); arguments may hold further such specs, of modules only. Arguments that ask for pretrained
            weights (`encoder_weights`, `pretrained`, ...) are switched off, given or not.
        trusted_packages: packages to import from beside `ALLOWED_PACKAGES`, say the one with your own network.

    Raises:
        RunError: for anything else than a module class of an allowed package, naming it and the remedy.
    """
    path, arguments = _read(spec)
    network_class = _import_module_class(path, (*ALLOWED_PACKAGES, *trusted_packages))
    values = {name: _value(value, trusted_packages, path) for name, value in arguments.items()}
    try:
        network: nn.Module = network_class(**_without_weights(network_class, values))
    except Exception as error:  # a constructor of any package: whatever it raises, the checkpoint does not fit it
        raise RunError(
            f"The checkpoint's network {path} cannot be rebuilt: {type(error).__name__}: {error}. Install the "
            "version of its package that the checkpoint was trained with."
        ) from error
    return network


def count_parameters(module: nn.Module) -> int:
    """Count the numbers in all parameters of `module`, trainable or not, bare parameters included."""
    return sum(parameter.numel() for parameter in module.parameters())


def _read(spec: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str) or not set(spec) <= _SPEC_KEYS:
        raise RunError(
            f"The checkpoint describes its network as {spec!r:.200}, not as "
            '{"class_path": "package.Class", "init_args": {...}}; was it written by fkd?'
        )
    arguments: dict[str, Any] = {}
    for key in ("init_args", "dict_kwargs"):
        part = spec.get(key) or {}
        if not isinstance(part, Mapping) or not all(isinstance(name, str) for name in part):
            raise RunError(f"The checkpoint's {key} of {spec['class_path']} are not named values; was it damaged?")
        arguments.update(part)
    return spec["class_path"], arguments


def _import_module_class(path: str, packages: Sequence[str]) -> type[nn.Module]:
    module_name, _, class_name = path.rpartition(".")
    if not any(module_name == package or module_name.startswith(f"{package}.") for package in packages):
        raise RunError(
            f"The checkpoint's network {path} is not in a package that a checkpoint may name ({', '.join(packages)}). "
            "Importing a package runs its code, so others are refused; if you know this one, give "
            f"--trusted_packages {path.partition('.')[0]}."
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise RunError(f"The checkpoint's network {path} cannot be imported ({error}): install its package.") from error
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise RunError(f"The checkpoint's network {path} is not a torch.nn.Module class, so it is not called.")
    return found


def _value(value: Any, trusted_packages: Sequence[str], path: str) -> Any:
    """Return an argument with nested specs built, refusing names that would be looked up outside this machine."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            return network_from_spec(value, trusted_packages)
        return {key: _value(inner, trusted_packages, path) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_value(inner, trusted_packages, path) for inner in value)
    if isinstance(value, str) and any(mark in value for mark in _REMOTE):
        raise RunError(f"The checkpoint's network {path} asks for {value!r}; nothing is fetched for a checkpoint.")
    return value


def _without_weights(network_class: type[nn.Module], values: dict[str, Any]) -> dict[str, Any]:
    """Switch off every argument that asks for pretrained weights, those left at their default included."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(network_class).parameters.items()}
    off = {}
    for name in {*defaults, *values}:
        if "pretrained" in name or "weights" in name or name == "checkpoint_path":
            current = values.get(name, defaults.get(name))
            off[name] = False if isinstance(current, bool) else None
    return {**values, **off}
