"""Configuration files read with suspicion before the parser takes them: what it would pass over or choke on.

A key given twice would silently lose its first value; anchors can name more values than a machine has memory for.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fkd_med.errors import ConfigError

_LARGEST = 4 * 2**20  # bytes
_MOST = 100_000  # values, anchors written out
_PLAIN = "tag:yaml.org,2002:"


def check_configurations(arguments: Sequence[str]) -> None:
    """Read each file that a command line gives with ``--config``; pipes, which can be read once, are left out.

    Raises:
        ConfigError: a file cannot be read, is no YAML mapping, has a key twice, or asks for Python objects; names
            file and line.
    """
    for path in _named("--config", arguments):
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise ConfigError(f"--config {str(path)[:300]}: there is no such file. Check the path.") from error
        if stat.S_ISDIR(mode):
            raise ConfigError(f"--config {path} is a folder. Give a YAML file in it.")
        if stat.S_ISREG(mode):
            check_configuration(path)


def with_own_configuration(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command that scores a run; without a configuration they get that of its folder.

    Raises:
        ConfigError: the folder that is named holds no run.
    """
    runs = list(_named("--run_dir", arguments))
    if not runs or list(_named("--config", arguments)) or any(given.startswith("--model") for given in arguments):
        return list(arguments)
    own = runs[-1].expanduser() / "config.yaml"
    if not own.is_file():
        raise ConfigError(f"--run_dir {runs[-1]} holds no run: it has no config.yaml. Give the folder of a run.")
    return ["--config", str(own), *arguments]


def _named(option: str, arguments: Sequence[str]) -> Iterator[Path]:
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option and (equals or position + 1 < len(arguments)):
            yield Path(value if equals else arguments[position + 1])


def check_configuration(path: Path) -> None:
    """Read one file.

    Raises:
        ConfigError: as `check_configurations` does.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path} is larger than 4 MiB, so it is no configuration. Give a YAML file of ours.")
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start + 1}). Save it as UTF-8.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be a configuration.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{path}{where}: no YAML ({problem}). Correct the line; indent with spaces, not tabs."
        ) from error
    if not isinstance(node, MappingNode) or not node.value:
        what = "empty" if node is None or isinstance(node, MappingNode) else "no mapping"
        raise ConfigError(f"{path} is {what}: a configuration has keys, such as `data:`, at its top.")
    _count(node, path, {})


def _count(node: Node, path: Path, known: dict[int, int]) -> int:
    """Return how many values a node has with all anchors written out; refuse what no configuration needs."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ConfigError(f"{_place(node, path)}: an anchor that contains itself. Write the values out.")
        return known[id(node)]
    known[id(node)] = 0
    if not node.tag.startswith(_PLAIN) or "python" in node.tag:
        raise ConfigError(
            f"{_place(node, path)}: the tag {node.tag[:100]!r} asks for an object, and configurations are plain "
            "values. Remove it; classes are named by class_path."
        )
    children: list[Node] = []
    if isinstance(node, MappingNode):
        _refuse_double_keys(node, path)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, SequenceNode):
        children = list(node.value)
    known[id(node)] = 1 + sum(_count(child, path, known) for child in children)
    if known[id(node)] > _MOST:
        raise ConfigError(f"{_place(node, path)}: its anchors stand for more than {_MOST} values. Write them out.")
    return known[id(node)]


def _refuse_double_keys(node: MappingNode, path: Path) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode) or key.tag == f"{_PLAIN}merge":
            continue
        line = key.start_mark.line + 1
        if key.value in seen:
            raise ConfigError(
                f"{path}, line {line}: the key {key.value!r} stands in line {seen[key.value]} already, and only one "
                "would count. Remove one."
            )
        seen[key.value] = line


def _place(node: Node, path: Path) -> str:
    return f"{path}, line {node.start_mark.line + 1}"
