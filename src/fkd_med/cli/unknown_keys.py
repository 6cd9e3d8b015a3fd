"""Says of a key or class that a parser does not know, in one line, where it stands and what may have been meant."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import Any

from fkd_med.cli.shapes import find_class
from fkd_med.cli.wrong_values import KEY


def unknown_key(text: str) -> str | None:
    """Return the message for a parser's report of a key or class that it does not know; None for other reports."""
    unknown = _unknown_key(text)
    if unknown is None:
        return None
    where = ".".join(re.findall(KEY, text))
    key = f"{where}.{unknown}" if where and "class_path" not in text else unknown
    in_place = f" (in {where})" if where and key == unknown else ""
    return f"{key!r} is unknown{in_place}.{nearest(unknown, _place(text))}"


def nearest(unknown: str, place: type | None = None) -> str:
    """Name the words that an unknown key or class may have been meant to be.

    Args:
        unknown: the key, with what stands below it, or the class.
        place: the class that was to take the key: its own keys, and what other classes add to them, come first.
    """
    head = unknown.split(".")[0]
    owners = _owners(unknown if place is None else head)
    if place is not None:
        if kin := [owner for owner in owners if issubclass(owner, place)]:
            return _setting_of(kin)
        if close := difflib.get_close_matches(head, _parameters(place)):
            return f" Did you mean {' or '.join(close)}?"
    if owners:
        return _setting_of(owners)
    words = _vocabulary()
    for part in (head, unknown.split(".")[-1]):
        if part not in words:
            close = difflib.get_close_matches(part, words, n=3, cutoff=0.6)
            if close:
                return f" Did you mean {' or '.join(close)}?"
    return " `fkd COMMAND --help` and docs/configuration.md list what there is."


def _place(text: str) -> type | None:
    """Return the class that was to take a key; None if the report names none."""
    paths = re.findall(r"given class_path ['\"]([\w.]+)", text)
    found = find_class(paths[-1]) if paths else None
    return found if inspect.isclass(found) else None


def _setting_of(owners: Iterable[Any]) -> str:
    names = sorted({owner.__name__ for owner in owners})[:3]
    distils = " (configurations named fkd_* distil)" if "DistillationModule" in names else ""
    return f" It is a setting of {' and '.join(names)}: give it there{distils}, or leave it out."


def _unknown_key(text: str) -> str | None:
    patterns = (
        r"[Kk]ey ['\"]([\w.+-]+)['\"] is not expected",
        r"Option ['\"]([\w.+-]+)['\"] is not accepted",
        r"No action for (?:destination )?key ['\"]([\w.+-]+)['\"]",
        r"[Uu]nrecognized arguments?: --([\w.+-]+)",
        r"Import of path ['\"]?([\w.]+)",
        r"[Uu]nexpected import path format:? ['\"]?([\w.]+)",
        r"No module named ['\"]([\w.]+)['\"]",
        r"has no attribute ['\"]([\w.]+)['\"]",
        r"Group '[\w.]*' does not accept (?:nested key|option)s? ['\"]([\w.+-]+)['\"]",
        r"does not accept (?:nested key|option) ['\"]([\w.+-]+)['\"]",
    )
    for pattern in patterns:
        match = re.search(pattern, text)
        if match:
            return match.group(1)
    return None


def _classes() -> list[Any]:
    """Return the classes of ours that a configuration may name."""
    from fkd_med import aggregation, data, federated, losses, modules, networks, study, tracking

    packages = (aggregation, data, federated, losses, modules, networks, study, tracking)
    found = [getattr(package, name) for package in packages for name in package.__all__]
    return [cls for cls in found if inspect.isclass(cls)]


def _owners(key: str) -> list[Any]:
    """Return the classes of ours that have a setting of this very name."""
    return [cls for cls in _classes() if key in _parameters(cls)]


def _parameters(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}


def _vocabulary() -> list[str]:
    """Return the keys and classes a configuration may name."""
    import lightning as L
    import segmentation_models_pytorch as smp

    classes = _classes()
    architectures = [cls for cls in vars(smp).values() if inspect.isclass(cls)]
    words = {"model", "data", "trainer", "federation", "run_dir", "overwrite", "test_after_fit", "checkpoint"}
    words |= {"seed_everything", "ckpt_path", "config", "class_path", "init_args", "resume", "allow"}
    for cls in (*classes, L.Trainer, *architectures):
        words.add(cls.__name__)
        words |= _parameters(cls)
    return sorted(words)
