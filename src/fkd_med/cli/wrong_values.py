"""Says of a value that a parser refuses, in one line, which key it was given for and what the key takes."""

from __future__ import annotations

import re

_KEY = r"[Pp]arser key ['\"]([\w.]+)['\"]"
_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'list'>": "a list, such as [a, b]",
    "<class 'dict'>": "a mapping",
    "<class 'NoneType'>": "null",
}
CLASS = "the class_path of a class"


def wrong_value(text: str) -> tuple[str, str] | None:
    """Return the message for a parser's report of a wrong value, and a name that was to be a class, or nothing.

    The report nests what was tried for every key on the way; the innermost key is the one that is wrong. None for
    reports of anything else.
    """
    keys = re.findall(_KEY, text)
    if not keys:
        return None
    inner = re.split(_KEY, text)[-1]
    given = re.search(r"(?:Got value|Given value): (.*)", inner)
    if given is None:
        return None
    tried = inner[: given.start()] if given[0].startswith("Given") else inner[: given.start()].splitlines()[-1]
    expected = re.findall(r"Expected an? (.+?)(?:\. )?$", tried, re.MULTILINE)
    kinds = _kinds(expected)
    if not kinds:
        return None
    value = given[1].split(". Got value: ")[0]
    name = value if CLASS in kinds and value.lower() != "none" else ""
    return f"{'.'.join(keys)} is {value}: give {' or '.join(kinds)}.", name


def _kinds(expected: list[str]) -> list[str]:
    """Return in words what a key takes; nothing if a part of it has no words."""
    kinds: list[str] = []
    for one in expected:
        choices = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", one)
        if choices is not None:
            kinds.append("one of " + choices[1].replace("'", ""))
        elif one in _WORDS:
            kinds.append(_WORDS[one])
        elif one.startswith("dot import path string"):
            kinds.append(CLASS)
        elif not one.startswith("path but"):
            return []
    if set(kinds) - {"null", CLASS}:  # tensors, say, beside a plain number
        kinds = [kind for kind in kinds if kind != CLASS]
    return list(dict.fromkeys(kinds))
