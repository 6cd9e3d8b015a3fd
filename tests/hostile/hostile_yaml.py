"""Configurations: no YAML, the wrong YAML, YAML that would run code or fill the memory."""

from __future__ import annotations

from collections.abc import Callable

from hostile_place import Case, Place

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
NESTED = "data:\n  init_args:\n"


def written(text: str | bytes, name: str = "mine.yaml") -> Callable[[Place], list[str]]:
    """Put a configuration after the good one."""

    def prepare(place: Place) -> list[str]:
        content = text.replace(b"SENTINEL", bytes(place.sentinel)) if isinstance(text, bytes) else text
        if isinstance(content, str):
            content = content.replace("SENTINEL", str(place.sentinel))
        return place.fit("--config", str(place.file(name, content)))

    return prepare


def folder(place: Place) -> list[str]:
    return place.fit("--config", str(place.data))


def hostile_module(place: Place) -> list[str]:
    """A file beside the data that would run if a class_path could name it."""
    place.file("hostile_module.py", f"open({str(place.sentinel)!r}, 'w')\nclass Network: pass\n")
    return place.fit(*place.overlay("mine.yaml", {"model": {"init_args": {"network": "hostile_module.Network"}}}))


def option(*options: str) -> Callable[[Place], list[str]]:
    return lambda place: place.fit(*[part.replace("SENTINEL", str(place.sentinel)) for part in options])


NETWORK = "model:\n  init_args:\n    network:\n      class_path: {}\n"

CONFIGURATIONS = {
    "tabs": Case(written("data:\n\tbatch_size: 2\n"), ("mine.yaml", "line 2", "spaces")),
    "a key twice": Case(written("seed_everything: 1\nseed_everything: 2\n"), ("seed_everything", "line 2")),
    "an inner key twice": Case(written("data:\n  root: a\n  root: b\n"), ("root", "line 3")),
    "unknown key": Case(written("data:\n  init_args:\n    batchsize: 2\n"), ("batchsize", "batch_size")),
    "unknown key at the top": Case(written("fedration:\n  rounds: 2\n"), ("fedration", "federation")),
    "wrong type": Case(written("data:\n  init_args:\n    batch_size: many\n"), ("batch_size", "many")),
    "a list for a number": Case(written("data:\n  init_args:\n    image_size: [32, 32]\n"), ("image_size",)),
    "not a number": Case(written("data:\n  init_args:\n    val_fraction: .nan\n"), ("val_fraction",)),
    "absurd size": Case(written("data:\n  init_args:\n    image_size: 100000000\n"), ("image_size",)),
    "absurd batch": Case(written("data:\n  init_args:\n    batch_size: 100000000000\n"), ("batch_size",)),
    "no such class": Case(written(NETWORK.format("fkd_med.networks.SlimUNett")), ("SlimUNett", "SlimUNet")),
    "no such module": Case(written(NETWORK.format("no_such_package.Net")), ("no_such_package",)),
    "not a subclass": Case(written(NETWORK.format("fkd_med.data.IID")), ("network",)),
    "os.system for a network": Case(written(NETWORK.format("os.system")), ("network",)),
    "subprocess.Popen for a network": Case(
        written(NETWORK.format("subprocess.Popen") + "      init_args:\n        args: [touch, SENTINEL]\n"),
        ("network",),
    ),
    "os.system for an optimizer": Case(written("model:\n  init_args:\n    optimizer: os.system\n"), ("optimizer",)),
    "Popen for a layout": Case(
        written("data:\n  init_args:\n    layout:\n      class_path: subprocess.Popen\n"
                "      init_args:\n        args: [touch, SENTINEL]\n"), ("layout",)
    ),
    "python/object/apply": Case(
        written("model: !!python/object/apply:os.system ['touch SENTINEL']\n"), ("mine.yaml", "class_path")
    ),
    "python/name": Case(written("data:\n  root: !!python/name:os.getcwd\n"), ("mine.yaml", "class_path")),
    "a tag of its own": Case(written("data: !include /etc/passwd\n"), ("mine.yaml", "!include")),
    "billion laughs": Case(written(LAUGHS), ("mine.yaml", "anchors")),
    "an anchor in itself": Case(written("data: &a\n  root: *a\n"), ("mine.yaml", "itself")),
    "deeply nested": Case(written("data: " + "[" * 50_000), ("mine.yaml", "nested")),
    "not UTF-8": Case(written("data:\n  root: K\xf6ln\n".encode("latin-1")), ("mine.yaml", "UTF-8")),
    "a picture": Case(written(b"\x89PNG\r\n\x1a\n" + bytes(range(256))), ("mine.yaml",)),
    "empty": Case(written(""), ("mine.yaml", "empty")),
    "only a comment": Case(written("# nothing\n"), ("mine.yaml", "empty")),
    "a list at the top": Case(written("- data\n- model\n"), ("mine.yaml", "mapping")),
    "two documents": Case(written("seed_everything: 1\n---\nseed_everything: 2\n"), ("mine.yaml",)),
    "a folder": Case(folder, ("data", "folder")),
    "missing": Case(option("--config", "gone.yaml"), ("gone.yaml", "no such file")),
    "5 MiB": Case(written("# " + "x" * 5 * 2**20), ("mine.yaml", "4 MiB")),
    "spaces, scripts, BOM": Case(
        written(b"\xef\xbb\xbfseed_everything: 3\ntrainer:\n  fast_dev_run: true\n", "meine Größe 設定.yaml"), code=0
    ),
    "a file that runs when imported": Case(hostile_module, ("hostile_module",)),
}  # fmt: skip
YAML = {f"YAML: {name}": case for name, case in CONFIGURATIONS.items()}
