"""README, docs and notebook say what is so: their commands run, their YAML builds, their keys, files and links exist.

In README.md and docs/, blocks are

- ``bash``: run in order, in process, in an empty folder; sizes and lengths are made tiny by options put after them;
- ``sh``: not run, but each ``fkd`` line is built up to the point where data are read, each ``make`` target exists;
- ``yaml``: an overlay, built over `BASE`.
"""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from nbclient import NotebookClient

from building import BASE, CONFIGS, Parsed, build
from fkd_med.cli import COMMANDS, main
from fkd_med.cli.reproduce import read_study
from fkd_med.data import FederatedDataModule
from fkd_med.federated import FederatedTrainer, Federation, TeacherStage
from fkd_med.modules import DistillationModule, MutualDistillationModule

ROOT = CONFIGS.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"

TINY = {
    "seed_everything": 1,
    "data": {"init_args": {"image_size": 32, "batch_size": 4}},
    "trainer": {"accelerator": "cpu", "logger": False, "limit_train_batches": 1},
}
TINY_FEDERATION = {"federation": {"init_args": {"rounds": 2, "local_epochs": 1, "threads": 1}}}
TINY_TEACHER = {
    "network": {"class_path": "fkd_med.networks.ResUNet", "init_args": {"width": 16}},
}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path: Path, language: str) -> list[list[str]]:
    """Return the command lines of a document's blocks, without comments."""
    lines = [line for block in blocks(path, language) for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_commands(language: str) -> list[Any]:
    return [pytest.param(words, id=" ".join(words)) for path in DOCUMENTS for words in commands(path, language)]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS, target_is_directory=True)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # the commands set it; put back at the end
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- commands -------------------------------------------------------------------------------------------------------


def test_readme_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(ROOT / "README.md", "bash"):
        assert words[0] == "fkd", words
        code = main([*words[1:], *tiny_options(words, tmp_path)])
        printed = capsys.readouterr()
        assert code == 0, f"{' '.join(words)}\n{printed.out}\n{printed.err}"
    assert list((tmp_path / "predictions").glob("*.png"))
    assert (tmp_path / "runs" / "mine" / "report.md").exists()


def tiny_options(words: list[str], folder: Path) -> list[str]:
    """Return what makes a command of the README take seconds; it comes last, so it wins."""
    if words[1] == "phantoms":
        return ["--images", "20", "--size", "40"]
    if words[1] not in ("fit", "teachers", "validate", "test"):
        return []
    tiny: dict[str, Any] = {**TINY}
    text = "".join(Path(words[i + 1]).read_text() for i, word in enumerate(words) if word == "--config")
    if "federation:" in text:
        tiny |= TINY_FEDERATION
    if "teacher:" in text:
        module = {"init_args": TINY_TEACHER}
        tiny["model"] = {"init_args": {"teacher": {"init_args": {"epochs": 1, "module": module}}}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return ["--config", str(path)]


def test_every_document_runs_only_in_readme() -> None:
    assert commands(ROOT / "README.md", "bash")
    assert not any(blocks(path, "bash") for path in DOCUMENTS[1:])


@pytest.mark.parametrize("words", all_commands("sh"))
def test_shown_command_exists(words: list[str], tmp_path: Path) -> None:
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "fkd" and words[1] in ("fit", "teachers"):
        assert Parsed(words[1:], _Stack()).given.model.class_path
    elif words[:2] == ["fkd", "reproduce"]:
        given = dict(pair for pair in itertools.pairwise(words) if pair[0].startswith("--"))
        assert read_study(ROOT / given["--config"]).preset(given["--preset"]).seeds
    elif words[0] == "fkd":
        assert words[1] in COMMANDS


class _Stack:
    """Stands for the ExitStack of a command that never runs."""

    def callback(self, *args: Any) -> None:
        """Keep nothing."""


def test_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`fkd {command}`" in readme for command in COMMANDS)
    assert set(re.findall(r"`fkd ([a-z-]+)[` ]", readme)) <= {*COMMANDS}


def test_readme_begins_with_two_commands() -> None:
    first = commands(ROOT / "README.md", "sh")[:2]
    assert first == [["make", "demo"], ["make", "test"]]


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [pytest.param(text, id=f"{path.stem}-{n}") for path in DOCUMENTS for n, text in enumerate(blocks(path, "yaml"))],
)
def test_yaml_builds(block: str, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(block)
    assert build(BASE, overlay).model is not None


def names(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self"}


KEYS = {
    "data": names(FederatedDataModule),
    "federation": names(Federation),
    "trainer": names(Trainer) | names(FederatedTrainer),
    "checkpoint": names(ModelCheckpoint),
    "model": names(DistillationModule) | names(MutualDistillationModule),
    "model.teacher": names(TeacherStage),
    "model.teacher.module": names(DistillationModule),
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_keys_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", text):
        for option in re.findall(r"(?<![\w/.])(?:--)?((?:data|federation|trainer|checkpoint|model)(?:\.\w+)+)", span):
            parent, _, key = option.rpartition(".")
            if key in ("yaml", "csv", "help", "md"):
                continue
            assert parent in KEYS, f"{path.name}: {option}"
            assert key in KEYS[parent], f"{path.name}: {option}"


# --- files and links ------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), f"{path.name}: {target}"
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_named_files_exist(path: Path) -> None:
    for name in re.findall(r"`((?:configs|docs|notebooks|tests)/[\w/.-]+)`", path.read_text()):
        assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_named_classes_exist() -> None:
    from importlib import import_module

    for path in DOCUMENTS:
        for module, name in re.findall(r"\b(fkd_med(?:\.[a-z_]+)+)\.([A-Z]\w+)", path.read_text()):
            assert hasattr(import_module(module), name), f"{path.name}: {module}.{name}"


def test_no_machine_in_documents() -> None:
    for path in [*DOCUMENTS, NOTEBOOK, ROOT / "constraints.txt", ROOT / "Makefile", ROOT / "pyproject.toml"]:
        found = re.findall(r"(?:/(?:home|work|root|tmp)/|file:/|127\.0\.0\.1|localhost)\S*", path.read_text())
        assert not found, f"{path.name}: {found}"


def test_constraints_are_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines)


# --- the notebook ---------------------------------------------------------------------------------------------------


def test_notebook_is_saved_without_outputs() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert cells and not any(cell.outputs or cell.execution_count for cell in cells), path.name


def test_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "federated student" in printed and "worst hospital" in printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(output.output_type == "error" for output in outputs)
