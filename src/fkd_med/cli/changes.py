"""What differs between two resolved configurations: one line per key, spelling apart."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_WIDTH = 120


@dataclass(frozen=True)
class Change:
    """One key with another value.

    Attributes:
        key: as on the command line, without ``init_args``; a class that was exchanged is one change.
        old: the value the run has, as YAML in one line.
        new: the value that is given now.
    """

    key: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"

    def is_below(self, key: str) -> bool:
        """Whether `key` names this change, or something it belongs to."""
        return self.key == key or self.key.startswith(f"{key}.")


def differences(old: Any, new: Any, key: str = "") -> Iterator[Change]:
    """Yield what differs between two settled configurations, as plain mappings, lists and values.

    Paths that lead to the same place, and names that import the same class, are no difference; nor is a number as
    a word. A key that is not there is as null.
    """
    before, after = _children(old), _children(new)
    if before is None and after is None and _is_same(old, new):
        return
    if before is None or after is None or not _is_same_class(old, new):
        yield Change(key, _shown(old, new), _shown(new, old))
        return
    for name in dict.fromkeys([*before, *after]):
        inner = ".".join(part for part in (key, name) if part)
        yield from differences(before.get(name), after.get(name), inner)


def keys_of(tree: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values in a settled configuration."""
    children = _children(tree)
    if not children:
        yield key
        return
    for name, child in children.items():
        yield from keys_of(child, f"{key}.{name}".lstrip("."))


def plain_key(key: str) -> str:
    """Write a key without ``init_args``, as `Change` has it."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def _children(node: Any) -> dict[str, Any] | None:
    """Return what is below a node by name, ``init_args`` left out; None of a plain value.

    Lists of classes have their places as names, so that a setting of the second rule has a key.
    """
    if isinstance(node, list) and node and all(isinstance(item, dict) for item in node):
        return {str(place): item for place, item in enumerate(node)}
    if not isinstance(node, dict):
        return None
    inner = node.get("init_args") or {}
    return {name: child for name, child in node.items() if name != "init_args"} | dict(inner)


def _is_same_class(old: Any, new: Any) -> bool:
    """Whether two nodes can be compared key by key: mappings of one class, or lists of the same classes in order."""
    if isinstance(old, list) or isinstance(new, list):
        if not (isinstance(old, list) and isinstance(new, list)) or len(old) != len(new):
            return False
        return all(_is_same_class(one, other) for one, other in zip(old, new, strict=True))
    return bool(_imported(old.get("class_path")) == _imported(new.get("class_path")))


def _is_same(old: Any, new: Any) -> bool:
    if isinstance(old, str) and isinstance(new, str):
        return old == new or _is_same_path(old, new) or _is_same_name(old, new)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_is_same, old, new))
    if isinstance(old, bool) != isinstance(new, bool):  # to Python, 1 is True
        return False
    if isinstance(old, str) != isinstance(new, str) and isinstance(old, str | int) and isinstance(new, str | int):
        return str(old) == str(new)  # `--trainer.devices 2` arrives as a word where a file has a number
    return bool(old == new)


def _is_same_path(old: str, new: str) -> bool:
    if not any(mark in text for text in (old, new) for mark in (os.sep, "~")) or "\0" in old + new:
        return False
    one, other = (os.path.realpath(Path(text).expanduser()) for text in (old, new))
    return one == other


def _is_same_name(old: str, new: str) -> bool:
    found = _imported(old)
    return "." in old and "." in new and not isinstance(found, str) and found is _imported(new)


def _imported(name: Any) -> Any:
    """Return what a dotted name imports; the name itself if nothing."""
    if not isinstance(name, str) or "." not in name:
        return name
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return name


def _shown(node: Any, other: Any) -> str:
    """Show a value in one line; of a class, its name, where that is what differs."""
    if isinstance(node, dict) and "class_path" in node:
        named = isinstance(other, dict) and other.get("class_path") == node["class_path"]
        if not named:
            return str(node["class_path"])
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        return f"[{', '.join(_shown(item, None) for item in node)}]"
    text = yaml.safe_dump(node, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    text = " ".join(text.removesuffix("\n").removesuffix("\n...").split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."
