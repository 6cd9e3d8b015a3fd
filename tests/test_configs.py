"""Configurations are tested code: every file in configs/ is parsed against the real signatures and built.

Networks are built on torch's meta device, where a TransUNet costs no memory; nothing is trained or written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng

from building import BASE, CONFIGS, Built, build
from fkd_med.cli import main
from fkd_med.cli.reproduce import read_study
from fkd_med.cli.stored import settled_text
from fkd_med.losses import DistillationTerm, WeightSchedule
from fkd_med.modules import DistillationModule
from fkd_med.networks import PARAMETER_BOUND, count_parameters, forward_padded
from fkd_med.study import Selection, jobs_of
from slowly import slow_but, slow_where

FILES = sorted(CONFIGS.rglob("*.yaml"))


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


WHOLE = [name(path) for path in FILES if {"data", "model"} <= content(path).keys()]
DATA = [name(path) for path in FILES if content(path).get("class_path", "").startswith("fkd_med.data.")]
NETWORKS = [name(path) for path in FILES if "class_path" in content(path) and name(path) not in DATA]
STUDIES = [name(path) for path in FILES if "arms" in content(path)]
OVERLAYS = [name(path) for path in FILES if name(path) not in {*WHOLE, *DATA, *NETWORKS, *STUDIES}]
LOSSES = [file for file in OVERLAYS if file.startswith("distillation/")]
NAMED_AND_NOT = ["cvc_clinicdb/distill_central.yaml", "folder/fkd_resunet.yaml"]  # losses, in the configuration itself
STUDENTS = [file for file in OVERLAYS if file.startswith("students/")]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in an empty folder, and leave seeds and environment as they were."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    with isolate_rng():
        yield
    os.environ.clear()
    os.environ.update(before)


def terms(file: str) -> dict[str, Any]:
    return content(CONFIGS / file)["model"]["init_args"]["losses"]


def written(value: Any) -> Any:
    """Return a setting as a file would have it."""
    if not isinstance(value, WeightSchedule):
        return value
    return {"class_path": f"fkd_med.losses.{type(value).__name__}", "init_args": vars(value)}


def logits(network: torch.nn.Module, data: Any) -> tuple[int, ...]:
    images = torch.empty(2, data.preprocessing.in_channels, *[data.preprocessing.image_size] * 2, device="meta")
    return tuple(forward_padded(network.to("meta"), images).shape)


def test_every_kind_is_there() -> None:
    assert WHOLE and DATA and NETWORKS and OVERLAYS and LOSSES and STUDENTS
    for task in ("cvc_clinicdb", "chest_xray"):
        arms = {"teacher_resunet", "teacher_transunet", "fkd_resunet", "fkd_transunet", "distill_central"}
        arms |= {"fedavg_student", "local_student"}
        assert {f"{task}/{arm}.yaml" for arm in arms} <= set(WHOLE)


@pytest.mark.parametrize("file", WHOLE)
def test_config_builds(file: str) -> None:
    built = build(file)
    data, model, federation = built.datamodule, built.model, built.trainer.federation
    size = data.preprocessing.image_size
    assert (federation is not None) == ("federation" in content(CONFIGS / file))
    assert logits(model.network, data) == (2, data.classes, size, size)
    if isinstance(model, DistillationModule):
        teacher = model.teacher_source.module.network
        assert logits(teacher, data) == (2, data.classes, size, size)
        assert count_parameters(model.network) <= PARAMETER_BOUND < count_parameters(teacher)
    stem = Path(file).stem
    if stem.startswith(("fkd_", "teacher_")):
        trained = model.teacher_source.module.network if stem.startswith("fkd_") else model.network
        assert type(trained).__name__.lower() == stem.partition("_")[2]
    if stem == "local_student":
        assert federation.is_local
    if stem.endswith("_student"):
        assert count_parameters(model.network) <= PARAMETER_BOUND


@pytest.mark.parametrize("file", DATA)
def test_data_config_builds(file: str) -> None:
    built = build("folder/fkd_resunet.yaml", arguments=("--data", str(CONFIGS / file)))
    assert built.datamodule.root == Path(content(CONFIGS / file)["init_args"]["root"])


@pytest.mark.parametrize("file", slow_but(NETWORKS[:1], NETWORKS))
def test_backbone_is_student_or_teacher(file: str) -> None:
    arguments = ("--model.network", str(CONFIGS / file))
    arguments += ("--model.teacher.module.network", str(CONFIGS / file), "--data.image_size", "64")
    built = build(BASE, arguments=arguments, device="cpu")  # SegFormer reads numbers that meta tensors lack
    expected = content(CONFIGS / file)["class_path"].rpartition(".")[2]
    for network in (built.model.network, built.model.teacher_source.module.network):
        assert type(network).__name__ == expected
        assert logits(network, built.datamodule) == (2, 1, 64, 64)


@pytest.mark.parametrize(("file", "base"), list(zip(LOSSES, cycle(NAMED_AND_NOT), strict=False)))
def test_losses_are_the_terms_of_their_file(file: str, base: str) -> None:
    """They replace those of the configuration, whether it names some or not; single values still follow."""
    built = build(base, file, arguments=("--model.losses.logit_kl.weight", "0.5"))
    wanted = terms(file)
    wanted["logit_kl"]["init_args"]["weight"] = 0.5
    assert set(built.model.losses) == set(wanted)
    for term, spec in wanted.items():
        found = built.model.losses[term]
        assert type(found).__name__ == spec["class_path"].rpartition(".")[2]
        assert {key: written(getattr(found, key)) for key in spec["init_args"]} == spec["init_args"]


@pytest.mark.parametrize("file", STUDENTS)
@pytest.mark.parametrize("base", ["cvc_clinicdb/fkd_resunet.yaml", "cvc_clinicdb/local_student.yaml"])
def test_student_takes_the_place_of_another(file: str, base: str) -> None:
    built = build(base, file)
    spec = content(CONFIGS / file)["model"]["init_args"]["network"]
    assert type(built.model.network).__name__ == spec["class_path"].rpartition(".")[2]
    assert count_parameters(built.model.network) <= PARAMETER_BOUND
    size = built.datamodule.preprocessing.image_size
    assert logits(built.model.network, built.datamodule) == (2, built.datamodule.classes, size, size)


def test_every_distillation_term_has_a_file() -> None:
    shipped = {spec["class_path"] for file in LOSSES for spec in terms(file).values()}
    assert shipped == {f"fkd_med.losses.{term.__name__}" for term in DistillationTerm.__subclasses__()}


@cache
def base() -> dict[str, Any]:
    return leaves(dump(build(BASE)))


@pytest.mark.parametrize("overlay", slow_where(OVERLAYS, set(LOSSES[1:]).__contains__))
def test_overlay_applies(overlay: str) -> None:
    """What an overlay says is what the base configuration then says, and nothing else changes."""
    before, after = base(), leaves(dump(build(BASE, overlay)))
    wanted = leaves(content(CONFIGS / overlay))
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    said = {plain(key): value for key, value in wanted.items()}
    # Networks that depend on the image size follow it; a class brings the defaults of what is not said.
    follows = {key for key in changed if key.endswith("network.init_args.img_size")}
    classes = [key.removesuffix("class_path") + "init_args." for key in said if key.endswith(".class_path")]
    follows |= {key for key in changed if any(key.startswith(inside) for inside in classes)}
    found = {key: as_said(value, said.get(key)) for key, value in changed.items()}
    assert {key: value for key, value in found.items() if key in said or key not in follows} == {
        key: value for key, value in said.items() if before.get(key) != value
    }
    assert changed, f"{overlay} repeats what {BASE} says"


def test_the_recipes_have_the_memory_of_its_own_file() -> None:
    one, other = (content(CONFIGS / "algorithms" / f"{name}.yaml") for name in ("handover", "mean_teacher"))
    assert one["federation"] == other["federation"]
    rules = content(CONFIGS / "algorithms" / "while_ahead.yaml")["federation"]["client_rules"]
    assert rules[1:] == other["federation"]["client_rules"]
    first, memory = content(CONFIGS / "algorithms" / "leading.yaml")["federation"]["client_rules"]
    assert first == rules[0] and memory == rules[1] | {"init_args": rules[1]["init_args"] | {"beside_teacher": False}}


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_the_study_has_the_memories_of_their_files_but_for_the_views(preset: str) -> None:
    (of_file,) = content(CONFIGS / "algorithms" / "mean_teacher.yaml")["federation"]["client_rules"]
    settings = content(CONFIGS / "paper.yaml")["presets"][preset]["settings"]
    (rule,) = settings["cvc_memory"]["federation"]["client_rules"]
    assert rule == of_file | {"init_args": of_file["init_args"] | {"views": 8}}
    first, of_file = content(CONFIGS / "algorithms" / "while_ahead.yaml")["federation"]["client_rules"]
    wanted = [first, of_file | {"init_args": of_file["init_args"] | {"views": 8}}]
    assert settings["cvc_ours"]["federation"]["client_rules"] == wanted
    silent = {"init_args": wanted[1]["init_args"] | {"beside_teacher": False}}
    assert settings["cvc_live_leading"]["federation"]["client_rules"] == [first, wanted[1] | silent]


@pytest.mark.parametrize("file", [file for file in STUDIES if file != "paper.yaml"])
def test_what_is_searched_for_has_the_budget_of_the_study(file: str) -> None:
    study, search = (content(CONFIGS / name)["presets"]["cpu"]["settings"] for name in ("paper.yaml", file))
    assert search["all"] == study["all"] and search["federated"] == study["federated"]
    taught = leaves(study["distilled"]) | leaves(study["resunet_taught"])
    assert leaves(search["distilled"]) | leaves(search.get("resunet_taught", {})) == taught


@pytest.mark.parametrize(("data", "state"), [("cvc_clinicdb", "keep"), ("chest_xray", None)])
def test_arms_of_a_data_set_treat_their_optimizers_alike(data: str, state: str | None) -> None:
    """Arms are compared; which way is better on which set is in docs/RESULTS.md."""
    recipes = [content(path).get("federation") for path in sorted((CONFIGS / data).glob("*.yaml"))]
    federated = [recipe for recipe in recipes if recipe]
    assert len(federated) == 8 and all(recipe.get("optimizer_state") == state for recipe in federated)


def runs_of_studies() -> Iterator[Any]:
    """Name the studies, presets and data, and of how many runs one is built: every third always, all in slow tests."""
    for file in STUDIES:
        for preset in content(CONFIGS / file)["presets"]:
            for data in content(CONFIGS / file)["data"]:
                yield pytest.param(file, preset, data, 1, marks=pytest.mark.slow)
            if preset != "tiny":  # which test_reproduce_command.py runs
                yield file, preset, next(iter(content(CONFIGS / file)["data"])), 3


@pytest.mark.parametrize(("file", "preset", "data", "every"), runs_of_studies())
def test_runs_of_a_study_build(file: str, preset: str, data: str, every: int, tmp_path: Path) -> None:
    """Every arm of every cell is a configuration that `fkd fit` takes, and is what its settings say."""
    study = read_study(CONFIGS / file)
    one = Selection(seeds=[3], roots=dict.fromkeys(study.data, str(tmp_path)))
    jobs = [job for job in jobs_of(study, study.preset(preset), CONFIGS, tmp_path / "out", one) if job.data == data]
    for job in jobs[::every]:
        job.prepare()
        files = [Path(text) for text in job.arguments()[2::2]]
        settings = leaves(content(files[-1]))
        if "gpu" in settings.values():  # there may be none here
            settings["trainer.accelerator"] = "cpu"
        built = build(*files, arguments=("--trainer.accelerator", "cpu"))
        found = leaves(dump(built))
        wanted = {plain(key): value for key, value in settings.items()}
        assert {key: as_said(found.get(key), value) for key, value in wanted.items()} == wanted, job.name
        assert built.given.seed_everything == 3


def test_small_changes_only_size_and_length() -> None:
    keys = leaves(content(CONFIGS / "small.yaml"))
    assert all(key.startswith(("data.", "trainer.limit_")) for key in keys)
    assert set(content(CONFIGS / "small_federated.yaml")) == {"federation"}  # it would federate any other


@pytest.mark.parametrize("file", ["chest_xray/teacher_transunet.yaml", "cvc_clinicdb/distill_central.yaml"])
def test_small_federates_nothing(file: str) -> None:
    assert build(file, "small.yaml").trainer.federation is None


def test_own_data_takes_fifteen_lines() -> None:
    for path in (CONFIGS / "folder").glob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 15


def test_no_machine_in_configs() -> None:
    for path in FILES:
        text = path.read_text()
        assert "http" not in text and not any(f" {root}/" in text for root in ("", "~", "/home", "/work"))


@pytest.mark.parametrize("file", ["quickstart.yaml", "chest_xray/teacher_resunet.yaml"])
def test_print_config_parses_again(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", str(CONFIGS / file), "--run_dir", "runs/x", "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert not any((tmp_path / made).exists() for made in ("runs", "phantoms", "teachers"))
    first = dump(build(file, arguments=("--run_dir", "runs/x")))
    assert dump(build(printed)) == first


def dump(built: Built) -> dict[str, Any]:
    """Return the settled configuration of a command, without the names of its files."""
    return {key: value for key, value in built.config_dump.items() if key != "config"}


def leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key."""
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for part, value in tree.items() for k, v in leaves(value, f"{key}.{part}".lstrip(".")).items()}


def as_said(value: Any, said: Any) -> Any:
    """Return of the classes in a list what a file says of them; the rest are their defaults."""
    if isinstance(value, dict) and isinstance(said, dict):
        return {key: as_said(value[key], part) for key, part in said.items()}
    if isinstance(value, list) and isinstance(said, list) and len(value) == len(said):
        return [as_said(one, part) for one, part in zip(value, said, strict=True)]
    return value


def plain(key: str) -> str:
    """Write out the short form of a key: ``federation.rounds`` is ``federation.init_args.rounds``."""
    head, _, rest = key.partition(".")
    short = head == "federation" and not rest.startswith(("init_args", "class_path"))
    return f"{head}.init_args.{rest}" if short else key


def test_lightnings_timer_can_be_written_down() -> None:
    """Its default interval is an enumeration, of which config.yaml has the word."""
    timer = "--trainer.callbacks+=lightning.pytorch.callbacks.Timer"
    built = build(BASE, arguments=(timer, "--trainer.callbacks.duration=00:01:00:00"))
    written = yaml.safe_load(settled_text(built.parser, built.config, ()))["trainer"]["callbacks"][-1]
    assert written["init_args"] == {"duration": "00:01:00:00", "interval": "step", "verbose": True}
