"""Says of a value that a parser refuses, in one line, which key it was given for and what the key takes."""

from __future__ import annotations

import re
from itertools import takewhile

KEY = r"[Pp]arser key ['\"]([\w.]+)['\"]"
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
    keys = re.findall(KEY, text)
    inner = innermost(text)
    given = re.search(r"(Got|Given) value: (.*)", inner) or re.search(r"dot (import) path string: (.*)", inner)
    if not keys or given is None:
        return None
    before = inner[: given.start()]
    tried = {"Given": before, "Got": before.rpartition("\n")[2]}.get(given[1], inner)
    kinds = _kinds(re.findall(r"Expected an? (.+?)(?:\. )?$", tried, re.MULTILINE))
    if not kinds:
        return None
    value = given[2].split(". Got value: ")[0]
    name = value if CLASS in kinds and value.lower() != "none" else ""
    return f"{'.'.join(keys)} is {value}: give {' or '.join(kinds)}.", name


def innermost(text: str) -> str:
    """Return what a parser's report says of its innermost key: the lines below the key that stand further in."""
    lines = text.splitlines()
    place = max((number for number, line in enumerate(lines) if re.search(KEY, line)), default=0)
    margin = _indentation(lines[place])
    below = takewhile(lambda line: not line or _indentation(line) > margin, lines[place + 1 :])
    return "\n".join([re.split(KEY, lines[place])[-1], *below])


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


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
