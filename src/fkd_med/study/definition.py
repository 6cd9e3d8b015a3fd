"""What a run is made of, so that two can be told apart: what its files say, its settings; and the code that runs it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

Settings = dict[str, Any]


def files_of(configs: Iterable[Path]) -> list[Path]:
    """Return configuration files and those that they name (`data: data.yaml`), each once, in order."""
    found: dict[Path, None] = {}
    for file in configs:
        found[file] = None
        for value in (_said(file.read_text(encoding="utf-8"))[0] or {}).values():
            part = file.parent / value if isinstance(value, str) and value.endswith((".yaml", ".yml")) else None
            if part is not None and part.is_file():
                found[part] = None
    return list(found)


def define(configs: Iterable[Path], settings: Settings) -> Settings:
    """Return a definition, in plain containers: digests of what the files say, and the settings laid over them.

    Comments and layout of a file do not count; the order of the files does.
    """
    files = files_of(configs)
    digests = {"/".join(file.parts[-2:]): _said(file.read_text(encoding="utf-8"))[1] for file in files}
    return {"configs": digests, "settings": settings}


def differing(before: Any, now: Any, key: str = "") -> list[str]:
    """Return the dotted keys in which two definitions differ; of files laid over each other, their order too."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = dict.fromkeys([*before, *now])
        found = [k for n in names for k in differing(before.get(n), now.get(n), f"{key}.{n}".strip("."))]
        return found or ([f"{key} (their order)"] if key == "configs" and list(before) != list(now) else [])
    return [] if before == now else [key]


def code_of_today() -> str:
    """Say what code a run that starts now has: the versions, and the commit where the package lies in its checkout."""
    checkout, commit = Path(__file__).parents[3], ""
    if (checkout / ".git").exists():
        asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
        try:
            commit = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            commit = ""
    return f"fkd-med {version('fkd-med')}{commit and f' ({commit})'}, torch {version('torch')}"


@lru_cache(maxsize=256)
def _said(text: str) -> tuple[Any, str]:
    """Return what a YAML text says, not to be changed, and its digest: runs of a study share their files."""
    content = yaml.safe_load(text)
    return content, hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
