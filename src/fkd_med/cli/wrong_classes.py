"""Says of a class that a parser refuses, in one line, for which key it was given and what is wrong with it.

It is of another kind than the key takes, is abstract, was not named, or a setting without a default was left out. The
report ends in complaints that it is not null either, or no path: those are of no use.
"""

from __future__ import annotations

import re

from fkd_med.cli.unknown_keys import nearest
from fkd_med.cli.wrong_values import KEY, innermost

_PATH = r"['\"]?([\w.]+)['\"]?"
_OTHER_KIND = (
    rf"Import path (?:{_PATH} )?does not correspond to a subclass of (\w+)",
    rf"Expected {_PATH} to be a subclass of (.+?)\.*(?: Got|$)",
)


def wrong_class(text: str) -> str | None:
    """Return the message for a parser's report of a class that cannot be used; None for other reports."""
    keys = re.findall(KEY, text)
    if not keys:
        return None
    key, inner = ".".join(keys), innermost(text)
    return (
        _lacks_class(key, text) or _lacks_settings(key, inner) or _is_other_kind(key, inner) or _is_abstract(key, inner)
    )


def missing_model(text: str) -> str | None:
    """Return the message for a command that was given no configuration, or one without a model."""
    command = re.search(r"arguments are required: (\w+)\.model", text)
    if command is None:
        return None
    advice = "--config FILE, such as configs/quickstart.yaml"
    if command[1] in ("validate", "test"):
        advice = "--run_dir DIR, the folder of a run, or --config FILE, its configuration"
    return f"`fkd {command[1]}` needs a model: give {advice}."


def _lacks_class(key: str, text: str) -> str | None:
    """Return the message for a setting, on the command line, of a class that is not named."""
    found = re.search(r" is abstract\n.*?NestedArg\(key='(\w+)', val='?([^')]*)", text, re.DOTALL)
    if found is None or found[1] == key.rpartition(".")[2]:  # it is the class itself that was given
        return None
    name, value = found.groups()
    return f"{key}.{name} needs the class it belongs to: --{key}=CLASS --{key}.{name}={value}.{nearest(name)}"


def _lacks_settings(key: str, inner: str) -> str | None:
    required = re.search(r"arguments are required: (\w+(?:, \w+)*)", inner)
    if required is None:
        return None
    named = re.findall(rf"given class_path {_PATH}", inner[: required.start()])
    where = "it in its init_args"
    if not re.search(r"value type: <class '(list|dict)'>", inner):  # where options would need the name of a member
        options = " ".join(f"--{key}.{name} VALUE" for name in required[1].split(", "))
        where = f"{options} (in a file, in its init_args)"
    return f"{key}: {named[-1] if named else _given(inner)} needs {required[1]}: give {where}."


def _is_other_kind(key: str, inner: str) -> str | None:
    found = next((found for pattern in _OTHER_KIND if (found := re.search(pattern, inner, re.MULTILINE))), None)
    if found is None:
        return None
    kinds = [name for name in re.findall(r"\b[A-Z]\w+", found[2]) if name != "Union"]
    kind = " or ".join(dict.fromkeys(kinds)).replace("Module", "torch.nn.Module", kinds == ["Module"])
    return f"{key} is {found[1] or _given(inner)}, which is no {kind}: give the class_path of one."


def _is_abstract(key: str, inner: str) -> str | None:
    found = re.search(rf"Expected an instantiatable class, but (?:{_PATH} )?is abstract", inner)
    if found is None:
        return None
    return (
        f"{key} is {found[1] or _given(inner)}, which is abstract: give the class_path of a class that derives from it."
    )


def _given(inner: str) -> str:
    """Return the class that a report's given value names; the value itself if it names none."""
    named = re.search(rf"class_path'?[=:] ?{_PATH}", inner)
    value = re.search(r"Given value: (.*)", inner)
    return named[1] if named else value[1] if value else "of another kind"
