"""Teachers: trained once, found again by what decides them, read safely, never part of anything that travels."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from fkd_med.communication import Update
from fkd_med.errors import ConfigError, RunError, TrainingError
from fkd_med.federated import Federation, TeacherStage
from fkd_med.federated.progress import Reporter
from fkd_med.federated.teacher_key import teacher_key
from fkd_med.locks import queued
from fkd_med.modules import SegmentationModule, WarmupCosine
from fkd_med.networks import PretrainedUNet

FLAGS = {"accelerator": "cpu", "devices": 1}


def ensure(fed: Any, stage: TeacherStage, client: str = "a", data: Any = None, **flags: Any) -> Path:
    return stage.ensure(client, data or fed.Hospitals(), flags={**FLAGS, **flags})


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the epochs of every training."""
    from fkd_med.federated import teachers

    fits: list[int] = []
    original = teachers.inner_trainer

    def spy(flags: Any, **options: Any) -> L.Trainer:
        fits.append(options["max_epochs"])
        return original(flags, **options)

    monkeypatch.setattr(teachers, "inner_trainer", spy)
    return fits


# --- in a federated run ---------------------------------------------------------------------------------------


def test_teacher_is_in_nothing_that_travels_or_stays(fed, tmp_path, captured) -> None:
    module = fed.distilled(tmp_path / "teachers")
    optimized: list[set[int]] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert pl_module.teacher is not None
            own = {id(p) for p in pl_module.network.parameters()}
            optimized.append({id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]} ^ own)

        def __deepcopy__(self, memo: Any) -> Watch:
            return self

    trainer = fed.trainer(tmp_path / "run", Federation(rounds=2, client_callbacks=[Watch()]))
    trainer.fit(module, datamodule=fed.Hospitals())
    assert optimized == [set()] * 6
    names = {f"network.{name}" for name in fed.network().state_dict()}
    assert module.state_dict().keys() == names
    assert all(message.state.keys() == names and not message.extras for message in captured)
    assert len([m for m in captured if isinstance(m, Update)]) == 6
    stored = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == names
    shapes = {tuple(t.shape) for t in _tensors(stored)}
    assert (6, 3, 3, 3) not in shapes and (1, 6, 1, 1) not in shapes  # a teacher's; the student has 4 channels


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for child in children for tensor in _tensors(child)]


def test_live_teachers_are_read_once_in_a_run(fed, tmp_path, monkeypatch) -> None:
    """And not in every round, with the same student at the end; what is too large for memory is read again."""
    from fkd_med.federated import teacher_files as files

    read: list[str] = []
    original = files.read_teacher

    def spy(path: Path, client: str, network: nn.Module) -> dict[str, torch.Tensor]:
        read.append(client)
        return original(path, client, network)

    def train(name: str) -> dict[str, torch.Tensor]:
        module = fed.distilled(tmp_path / "teachers")
        fed.trainer(tmp_path / name, Federation(rounds=3)).fit(module, datamodule=fed.Hospitals())
        assert not module.teacher_source._reader.kept, "nothing stays after the fit"
        return module.state_dict()

    train("trains the teachers")
    monkeypatch.setattr(files, "read_teacher", spy)
    kept = train("kept")
    assert read == ["a", "b", "c"]
    monkeypatch.setattr(files, "KEPT_BYTES", 1)
    again = train("again")
    assert read[3:] == ["a", "b", "c"] * 3
    assert fed.same(kept, again)


def test_another_teacher_takes_the_place_of_one_that_was_kept(fed, tmp_path) -> None:
    stage = fed.teacher_stage(tmp_path, checkpoints={})
    ways = {"flags": FLAGS, "federated": True}
    for number in (1, 2):
        path = tmp_path / "brought.safetensors"
        save_file(fed.weights(fed.network(6, seed=number)), path)
        stage.checkpoints["a"] = path
        stage.ensure("a", fed.Hospitals(), **ways)
        for _ in range(2):
            given = stage.load("a")
            assert fed.same(fed.weights(given), load_file(path)) and next(given.parameters()).requires_grad
            next(given.parameters()).data.zero_()  # whoever gets it may change it
    assert list(stage._reader.kept) == [path] and not pickle.loads(pickle.dumps(stage._reader)).kept
    stage.ensure("a", fed.Hospitals(), flags=FLAGS)
    stage.load("a")
    assert not stage._reader.kept, "a training without rounds reads once and keeps nothing"


def test_teacher_never_changes_while_it_teaches(fed, tmp_path) -> None:
    """Neither weights nor BatchNorm, though the student around it trains in train mode."""
    module = fed.distilled(tmp_path / "teachers")
    seen: list[str] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert pl_module.network.training and not any(m.training for m in pl_module.teacher.modules())
            assert not any(p.requires_grad for p in pl_module.teacher.parameters())
            self.before = fed.weights(pl_module.teacher)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            source = pl_module.teacher_source
            client = next(iter(pl_module.trainer.train_dataloader)).get("client")[0]
            stored = load_file(source.files[client])
            assert fed.same(fed.weights(pl_module.teacher), self.before)
            assert fed.same({k: stored[k] for k in self.before}, self.before)
            assert all(p.grad is None for p in pl_module.teacher.parameters())
            seen.append(client)

        def __deepcopy__(self, memo: Any) -> Watch:
            return self

    federation = Federation(rounds=2, client_callbacks=[Watch()])
    fed.trainer(tmp_path / "run", federation).fit(module, datamodule=fed.Hospitals())
    assert seen == ["a", "b", "c"] * 2


def test_each_client_learns_from_its_own_teacher(fed, tmp_path) -> None:
    """Against a hand-written pass: supervised loss plus weight x KL of that client's teacher."""
    from fkd_med.losses import LogitKL

    stage = fed.teacher_stage(tmp_path / "teachers", epochs=1)
    module = fed.distilled(tmp_path, source=stage, supervised_weight=0.5)
    module.losses = {"kd": LogitKL(temperature=3.0, weight=0.7)}
    for client in ("a", "c"):
        ensure(fed, stage, client)
    batch = next(iter(fed.Hospitals().client_train_dataloader("a")))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    values = {}
    for client in ("a", "c"):
        module.attach_teacher(stage.load(client))
        module.eval()
        terms = {name: float(value) for name, value in module.loss_terms(batch).items()}
        with torch.no_grad():
            logits, taught = module(batch["image"]), stage.load(client).eval()(batch["image"])
        p, q = torch.sigmoid(taught.double() / 3), torch.sigmoid(logits.double() / 3)
        kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() * 9
        assert terms["kd"] == pytest.approx(0.7 * float(kl), rel=1e-4)
        assert terms["supervised"] == pytest.approx(0.5 * float(module.loss(logits, batch["mask"])), rel=1e-5)
        values[client] = terms["kd"]
    assert values["a"] != values["c"]


def test_distillation_costs_nothing_when_off(fed, tmp_path) -> None:
    from fkd_med.losses import LogitKL

    module = fed.distilled(tmp_path / "teachers")
    module.losses = {"kd": LogitKL(weight=0.0)}
    fed.trainer(tmp_path / "run", Federation(rounds=1)).fit(module, datamodule=fed.Hospitals())
    assert not (tmp_path / "teachers").exists()


def test_fast_dev_run_leaves_no_teacher_for_a_real_run(fed, tmp_path, monkeypatch) -> None:
    fits = count_fits(monkeypatch)

    def stage() -> TeacherStage:
        return fed.teacher_stage(tmp_path / "teachers", epochs=1)

    module = fed.distilled(tmp_path, source=stage())
    fed.trainer(tmp_path / "run", Federation(rounds=5), fast_dev_run=True).fit(module, datamodule=fed.Hospitals())
    assert fits == [1, 1, 1]
    ensure(fed, stage())
    ensure(fed, stage(), limit_train_batches=1)
    assert fits == [1, 1, 1, 1, 1]


# --- untrained, for mutual distillation -----------------------------------------------------------------------


def test_no_epochs_give_the_network_as_it_is_and_train_nothing(fed, tmp_path, monkeypatch) -> None:
    fits = count_fits(monkeypatch)
    stage, built = fed.teacher_stage(tmp_path, epochs=0), fed.network(6, seed=1).state_dict()
    path = ensure(fed, stage)
    assert fits == [] and fed.same(load_file(path), dict(built)) and fed.same(fed.weights(stage.load("a")), dict(built))
    assert sorted(p.name for p in path.parent.iterdir()) == ["lock", "teacher.json", "teacher.safetensors"]
    assert ensure(fed, fed.teacher_stage(tmp_path, epochs=0)) == path  # found again
    ensure(fed, fed.teacher_stage(tmp_path, epochs=0), limit_val_batches=1)  # a trial run
    assert fits == []
    other = fed.teacher_stage(tmp_path, epochs=0, module=SegmentationModule(fed.network(6, seed=2), optimizer=fed.adam))
    assert ensure(fed, other) != path  # other first weights, another teacher
    with pytest.raises(ConfigError, match="epochs are -1"):
        fed.teacher_stage(tmp_path, epochs=-1)


def test_a_frozen_untrained_teacher_is_refused_before_anything_is_written(fed, tmp_path) -> None:
    store = tmp_path / "store"
    module = fed.distilled(store, source=fed.teacher_stage(store, epochs=0))
    with pytest.raises(ConfigError, match=r"the teacher of a would be untrained.*by fkd_med.modules.MutualDist"):
        fed.trainer(tmp_path / "run", Federation(rounds=1)).fit(module, datamodule=fed.Hospitals())
    assert not store.exists()
    path = tmp_path / "brought.safetensors"
    save_file(fed.network(6, seed=3).state_dict(), path)
    brought = fed.teacher_stage(store, epochs=0, checkpoints={"a": str(path)})
    fed.trainer(tmp_path / "brought", Federation(rounds=1)).fit(
        fed.distilled(store, source=brought), datamodule=fed.Hospitals({"a": 4})
    )


# --- the store ------------------------------------------------------------------------------------------------


def test_second_call_finds_the_teacher(fed, tmp_path, monkeypatch) -> None:
    fits = count_fits(monkeypatch)
    first = ensure(fed, fed.teacher_stage(tmp_path))
    second = ensure(fed, fed.teacher_stage(tmp_path))
    assert fits == [2]
    assert first == second
    assert sorted(p.name for p in first.parent.iterdir()) == ["lock", "teacher.json", "teacher.safetensors"]
    note = json.loads((first.parent / "teacher.json").read_text())
    assert note["client"] == "a" and [row["epoch"] for row in note["curve"]] == [1, 2]
    assert note["best_val_dice"] == max(row["val/dice"] for row in note["curve"])


def keys(fed: Any, folder: Path, data: Any = None, flags: Any = None, **options: Any) -> str:
    stage = fed.teacher_stage(folder, **options)
    flags = {**FLAGS, **(flags or {})}
    epochs = 1 if flags.get("limit_val_batches") else stage.epochs
    return teacher_key(stage.module, epochs, "a", data or fed.Hospitals(), flags)[0]


def test_key_is_the_same_for_the_same_teacher(fed, tmp_path, monkeypatch) -> None:
    """Whatever lies at which address, in which folder, on which device."""

    def module() -> SegmentationModule:
        return SegmentationModule(fed.network(6, seed=1), optimizer=fed.adam, scheduler=WarmupCosine)

    key = keys(fed, tmp_path, module=module())
    kept = [object() for _ in range(1000)]  # move what comes next to other addresses
    assert keys(fed, tmp_path / "elsewhere", module=module()) == key
    assert keys(fed, tmp_path, module=module(), flags={"accelerator": "cuda", "devices": 4}) == key
    module_with_torchs = SegmentationModule(
        fed.network(6), scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)
    )
    assert keys(fed, tmp_path, module=module_with_torchs) == keys(fed, tmp_path, module=module_with_torchs)
    del kept


@pytest.mark.slow
def test_key_is_stable_across_processes(fed, tmp_path) -> None:
    program = """
from types import SimpleNamespace
import torch
from fkd_med.federated import TeacherStage
from fkd_med.federated.teacher_key import teacher_key
from fkd_med.modules import SegmentationModule, WarmupCosine
from fkd_med.networks import SlimUNet
from fkd_med.data.augmentation import default_augmentation
stage = TeacherStage(SegmentationModule(SlimUNet(), scheduler=WarmupCosine), store="x")
data = SimpleNamespace(fingerprint=lambda c: "f", batch_size=4, augmentation=default_augmentation())
print(teacher_key(stage.module, stage.epochs, "a", data, {})[0])
"""
    found = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()[-1]
        for _ in range(2)
    ]
    assert found[0] == found[1]


def test_key_changes_with_all_that_decides_a_teacher(fed, tmp_path, monkeypatch) -> None:
    from fkd_med.data.augmentation import Augmentation, default_augmentation
    from fkd_med.losses import DiceCE

    def module(network: Any = None, **options: Any) -> SegmentationModule:
        return SegmentationModule(network or fed.network(6, seed=1), **{"optimizer": fed.adam, **options})

    def cosine(period: int) -> Any:
        return lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, period)

    def with_augmentation(augmentation: Any) -> Any:
        data = fed.Hospitals()
        data.augmentation = augmentation
        return data

    from_yaml = module()
    from_yaml.hparams["teacher"] = {"init_args": {"module": {"init_args": {"network": {"encoder_weights": None}}}}}
    pretrained = module()
    pretrained.hparams["teacher"] = {"init_args": {"module": {"init_args": {"network": {"encoder_weights": "x"}}}}}

    def with_seed(seed: int) -> Any:
        data = fed.Hospitals()
        data.seed = seed
        return data

    def attention(heads: int) -> nn.Module:
        made = nn.Sequential(*fed.network(6))
        made.heads = heads  # shows neither in its text nor in its tensors
        return made

    found = {
        "": keys(fed, tmp_path),
        "order": keys(fed, tmp_path, data=with_seed(3)),
        "two heads": keys(fed, tmp_path, module=module(attention(2))),
        "three heads": keys(fed, tmp_path, module=module(attention(3))),
        "images": keys(fed, tmp_path, data=fed.Hospitals(content="other")),
        "batch size": keys(fed, tmp_path, data=fed.Hospitals(batch_size=2)),
        "augmentation": keys(fed, tmp_path, data=with_augmentation(default_augmentation())),
        "no augmentation": keys(fed, tmp_path, data=with_augmentation(Augmentation())),
        "epochs": keys(fed, tmp_path, epochs=3),
        "width": keys(fed, tmp_path, module=module(fed.network(7))),
        "depth": keys(fed, tmp_path, module=module(nn.Sequential(*fed.network(6), nn.Dropout(0.1)))),
        "rate": keys(fed, tmp_path, module=module(optimizer=lambda p: torch.optim.Adam(p, lr=0.3))),
        "decay": keys(fed, tmp_path, module=module(optimizer=lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=1))),
        "optimizer": keys(fed, tmp_path, module=module(optimizer=fed.sgd)),
        "schedule": keys(fed, tmp_path, module=module(scheduler=WarmupCosine)),
        "warm-up": keys(fed, tmp_path, module=module(scheduler=lambda o: WarmupCosine(o, warmup=0.1))),
        "period 3": keys(fed, tmp_path, module=module(scheduler=cosine(3))),
        "period 4": keys(fed, tmp_path, module=module(scheduler=cosine(4))),
        "interval": keys(fed, tmp_path, module=module(scheduler=cosine(4), scheduler_interval="epoch")),
        "loss": keys(fed, tmp_path, module=module(loss=nn.BCEWithLogitsLoss())),
        "loss weight": keys(fed, tmp_path, module=module(loss=DiceCE(dice_weight=2))),
        "loss inside": keys(fed, tmp_path, module=module(loss=DiceCE(smooth=9.0))),
        "configuration": keys(fed, tmp_path, module=from_yaml),
        "pretrained": keys(fed, tmp_path, module=pretrained),
        "precision": keys(fed, tmp_path, flags={"precision": "bf16-mixed"}),
        "clipping": keys(fed, tmp_path, flags={"gradient_clip_val": 1.0}),
        "accumulation": keys(fed, tmp_path, flags={"accumulate_grad_batches": 2}),
        "batches": keys(fed, tmp_path, flags={"limit_train_batches": 2}),
    }
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    found["seed"] = keys(fed, tmp_path)
    assert len(set(found.values())) == len(found), sorted(found.items(), key=lambda item: item[1])


def test_key_holds_the_weights_in_a_file_and_not_where_it_lies(fed, tmp_path) -> None:
    def key(path: Path, zoom: int = 1) -> str:
        arguments = {"encoder": "resnet10t", "weights": str(path), "zoom": zoom}
        module = SegmentationModule(PretrainedUNet(**arguments), optimizer=fed.adam)
        network = {"class_path": "fkd_med.networks.PretrainedUNet", "init_args": arguments}
        module.hparams["teacher"] = {"init_args": {"module": {"init_args": {"network": network}}}}
        return keys(fed, tmp_path, module=module)

    state = timm.create_model("resnet10t", pretrained=False).state_dict()
    here, there, other = (tmp_path / name for name in ("here.pth", "there.pth", "other.pth"))
    torch.save(state, here)
    there.write_bytes(here.read_bytes())
    torch.save({name: tensor + 1 for name, tensor in state.items()}, other)
    found = key(here)
    assert key(there) == found
    assert len({found, key(other), key(here, zoom=2)}) == 3
    here.write_bytes(other.read_bytes())
    assert key(here) == key(other)


def test_same_teacher_again_bit_for_bit(fed, tmp_path) -> None:
    torch.rand(5)
    one = ensure(fed, fed.teacher_stage(tmp_path / "1"))
    two = ensure(fed, fed.teacher_stage(tmp_path / "2"))
    assert one.read_bytes() == two.read_bytes()


def test_best_epoch_is_kept(fed, tmp_path) -> None:
    """The stored weights reach the best validation Dice of the curve, though the last epoch ruined them."""

    class Ruined(SegmentationModule):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 3:
                for parameter in self.network.parameters():
                    parameter.data.fill_(-5.0)

    stage = fed.teacher_stage(tmp_path, module=Ruined(fed.network(6, seed=1), optimizer=fed.adam), epochs=4)
    path = ensure(fed, stage, "c")
    note = json.loads((path.parent / "teacher.json").read_text())
    dice = [row["val/dice"] for row in note["curve"]]
    assert dice[3] < max(dice[:3]) == note["best_val_dice"]
    check = SegmentationModule(stage.load("c"))
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False).validate(
        check, fed.Hospitals().client_val_dataloader("c"), verbose=False
    )
    assert sum(r.dice for r in check.evaluated) / len(check.evaluated) == pytest.approx(note["best_val_dice"])


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "note gone", "note damaged", "note of another"])
def test_damaged_teacher_is_trained_again(fed, tmp_path, monkeypatch, damage) -> None:
    fits = count_fits(monkeypatch)
    path = ensure(fed, fed.teacher_stage(tmp_path, epochs=1))
    good, note = path.read_bytes(), path.with_suffix(".json")
    if damage == "flipped":
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(good[:100])
    elif damage == "gone":
        path.unlink()
    elif damage == "note gone":
        note.unlink()
    elif damage == "note damaged":
        note.write_text("{")
    else:
        note.write_text(json.dumps({**json.loads(note.read_text()), "key": "0"}))
    ensure(fed, fed.teacher_stage(tmp_path, epochs=1))
    assert fits == [1, 1]
    assert path.read_bytes() == good


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_interrupted_training_resumes_at_the_epoch(fed, tmp_path, dropout) -> None:
    class StopError(Exception):
        pass

    class Dies(SegmentationModule):
        at = -1
        opened: list[int] = []  # noqa: RUF012

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == Dies.at:
                raise StopError
            Dies.opened.append(self.current_epoch)

    def stage(folder: str) -> TeacherStage:
        network = nn.Sequential(fed.network(6, seed=1), nn.Dropout(dropout))
        module = Dies(network, optimizer=fed.adam, scheduler=WarmupCosine)
        return fed.teacher_stage(tmp_path / folder, module=module, epochs=4)

    whole = ensure(fed, stage("whole"))
    Dies.at = 2
    with pytest.raises(StopError):
        ensure(fed, stage("cut"))
    Dies.at, Dies.opened = -1, []
    cut = ensure(fed, stage("cut"))
    assert Dies.opened == [2, 3]
    assert cut.read_bytes() == whole.read_bytes()
    notes = [json.loads(p.with_suffix(".json").read_text()) for p in (cut, whole)]
    assert notes[0]["curve"] == notes[1]["curve"]
    assert not (cut.parent / "training").exists()


def test_killed_between_weights_and_note(fed, tmp_path, monkeypatch) -> None:
    """All epochs are done and nothing is left to train: the note still says how good the teacher is."""
    whole = ensure(fed, fed.teacher_stage(tmp_path / "whole"))

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fkd_med.federated.teachers.atomic_write_text", die)
        ensure(fed, fed.teacher_stage(tmp_path / "cut"))
    cut = ensure(fed, fed.teacher_stage(tmp_path / "cut"))
    assert cut.with_suffix(".json").read_text() == whole.with_suffix(".json").read_text()
    assert json.loads(cut.with_suffix(".json").read_text())["best_val_dice"] >= 0


def test_two_processes_train_once(fed, tmp_path) -> None:
    def child() -> None:
        code = 1
        try:
            with (tmp_path / f"{os.getpid()}.log").open("w") as log:
                monkey = pytest.MonkeyPatch()
                fits = count_fits(monkey)
                path = ensure(fed, fed.teacher_stage(tmp_path / "store", epochs=15), "c")
                log.write(f"{len(fits)} {path}")
            code = 0
        finally:
            os._exit(code)

    children = []
    for _ in range(2):
        pid = os.fork()  # not spawned: importing the stack again would take longer than all other tests
        if pid == 0:
            child()
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    notes = [path.read_text().split() for path in tmp_path.glob("*.log")]
    assert sorted(count for count, _ in notes) == ["0", "1"]
    assert len({path for _, path in notes}) == 1


def test_runs_side_by_side_train_different_teachers(fed, tmp_path, monkeypatch) -> None:
    """Another run trains the teacher of the first client: this one trains those of the others, then waits for it."""
    stage = fed.teacher_stage(tmp_path / "teachers", epochs=1)
    module, trainer = fed.distilled(tmp_path / "teachers"), fed.trainer(tmp_path / "run", Federation(), logger=False)
    module.teacher_source.epochs = 1
    other = ExitStack()
    options = trainer.teacher_options()
    folder = stage._place("a", fed.Hospitals(), options["flags"])[2]
    assert not stage.is_busy("a", fed.Hospitals(), **options), "nobody has begun"
    other.enter_context(queued(folder / "lock", "The store"))
    assert stage.is_busy("a", fed.Hospitals(), **options) and not stage.is_busy("b", fed.Hospitals(), **options)
    asked: list[str] = []
    original = TeacherStage.ensure

    def spy(self: TeacherStage, client: str, data: Any, **given: Any) -> Path:
        asked.append(client)
        if client == "a":
            other.close()
        return original(self, client, data, **given)

    monkeypatch.setattr(TeacherStage, "ensure", spy)
    trainer.teachers(module, fed.Hospitals())
    assert asked == ["b", "c", "a"]
    assert not stage.is_busy("a", fed.Hospitals(), **options), "the lock stays as a file, which nobody holds"
    brought = fed.teacher_stage(tmp_path / "teachers", checkpoints={"a": str(folder / "teacher.safetensors")})
    with queued(folder / "lock", "The store"):
        assert not brought.is_busy("a", fed.Hospitals(), **options)


@pytest.mark.parametrize("said", [True, False])
def test_all_ranks_do_as_rank_zero_found(fed, tmp_path, monkeypatch, said) -> None:
    """Another run may finish a teacher while rank 0 waits for the lock and rank 1 has looked already."""
    path = ensure(fed, fed.teacher_stage(tmp_path, epochs=1))
    if said:
        path.unlink()

    def broadcast(box: list[bool], src: int) -> None:
        assert src == 0
        box[0] = said

    fits: list[int] = []
    stage = fed.teacher_stage(tmp_path, epochs=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(stage, "_train", lambda *args: fits.append(1))
    ensure(fed, stage)
    assert fits == ([] if said else [1])


def test_a_store_that_cannot_be_written_is_named(fed, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"teacher store .*file.* cannot be written"):
        ensure(fed, fed.teacher_stage(tmp_path / "file"))


def test_teacher_curve_is_logged_per_epoch(fed, tmp_path) -> None:
    sent: list[tuple[dict[str, float], int]] = []
    fed.teacher_stage(tmp_path).ensure(
        "a", fed.Hospitals(), flags=FLAGS, log=lambda metrics, epoch: sent.append((metrics, epoch))
    )
    assert [epoch for _, epoch in sent] == [1, 2]
    assert all(m.keys() == {f"teacher/a/{k}" for k in ("val/dice", "val/loss", "train/loss")} for m, _ in sent)


def test_found_teachers_say_nothing_of_the_pace(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("fkd_med.federated.progress.time.monotonic", lambda: clock[0])
    reporter = Reporter(enabled=False)
    reporter.begin("teachers", 60)
    reporter.skip(40)
    assert reporter.time_left() == ""
    clock[0] += 60.0
    reporter.advance()
    assert reporter.time_left() == "19:00", "19 epochs of a minute"


def test_a_log_is_told_of_a_teacher_that_takes_long(fed, tmp_path, monkeypatch) -> None:
    told: dict[bool, list[str]] = {}
    for terminal in (False, True):
        said = io.StringIO()
        for long, store in ((60.0, "short"), (-1.0, "long")):
            monkeypatch.setattr("fkd_med.federated.progress.LONG", long)
            reporter = Reporter(Console(file=said, force_terminal=terminal, width=200))
            reporter.begin("teachers", 60_000)  # so many that time is left
            stage = fed.teacher_stage(tmp_path / f"{store}-{terminal}", epochs=3)
            stage.ensure("a", fed.Hospitals(), flags=FLAGS, reporter=reporter)
            reporter.end()
        told[terminal] = [line for line in said.getvalue().splitlines() if "teacher of a: " in line]
    parts = [line.split("teacher of a: ")[1].split(", ") for line in told[False]]
    assert [part[0] for part in parts] == ["3 epochs", "epoch 1/3", "epoch 2/3", "3 epochs"]
    assert all(part[2].endswith("left for teachers") for part in parts)
    assert len(told[True]) == 2, "a terminal has its bar"


def test_client_without_validation_images_keeps_the_last_weights(fed, tmp_path) -> None:
    class NoValidation(fed.Hospitals):
        def client_val_dataloader(self, client: str | None) -> Any:
            return self._loader(fed.Blobs("a", "val", 0), None)

    path = ensure(fed, fed.teacher_stage(tmp_path), data=NoValidation())
    assert path.exists()


# --- teachers that users bring --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lightning", "state dict", "safetensors"])
def test_brought_teachers_load(fed, tmp_path, monkeypatch, kind) -> None:
    fits = count_fits(monkeypatch)
    mine = SegmentationModule(fed.network(6, seed=3))
    path = tmp_path / {"lightning": "t.ckpt", "state dict": "t.pt", "safetensors": "t.safetensors"}[kind]
    if kind == "lightning":
        plain = L.Trainer(
            accelerator="cpu", logger=False, max_steps=1, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, limit_val_batches=0,
        )  # fmt: skip
        plain.fit(mine, fed.Hospitals().client_train_dataloader("a"))
        plain.save_checkpoint(path)
    elif kind == "state dict":
        torch.save(mine.network.state_dict(), path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in mine.network.state_dict().items()}, path)
    stage = fed.teacher_stage(tmp_path / "store", checkpoints={"a": str(path)})
    assert ensure(fed, stage) == path
    assert fed.same(fed.weights(stage.load("a")), fed.weights(mine.network))
    assert fits == [] and not (tmp_path / "store").exists()


def test_a_brought_teacher_is_read_once_to_be_checked_and_once_to_be_loaded(fed, tmp_path, monkeypatch) -> None:
    from fkd_med.federated import teachers

    path, read = tmp_path / "t.pt", teachers.read_teacher
    torch.save(fed.network(6).state_dict(), path)
    stage, reads = fed.teacher_stage(tmp_path / "store", checkpoints={"a": str(path)}), []
    monkeypatch.setattr(teachers, "read_teacher", lambda *given: reads.append(given) or read(*given))
    for _ in range(2):  # by the command before anything is written, and by the fit
        stage.check_names(["a", "b"])
        ensure(fed, stage)
    assert len(reads) == 1
    path.write_bytes(b"rubbish")
    with pytest.raises(RunError, match=r"teacher of a.*t\.pt"):
        stage.load("a")


def test_wrong_architecture_names_both(fed, tmp_path) -> None:
    torch.save(fed.network(5).state_dict(), tmp_path / "t.pt")
    stage = fed.teacher_stage(tmp_path / "store", checkpoints={"a": str(tmp_path / "t.pt")})
    with pytest.raises(
        RunError, match=r"teacher of a in .*t\.pt .*Sequential.*0\.bias is \(5,\) there and \(6,\) here"
    ):
        ensure(fed, stage)
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "t.pt")
    with pytest.raises(RunError, match=r"missing 0\.bias.*unknown encoder\.weight"):
        ensure(fed, stage)


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_unreadable_teacher_is_named(fed, tmp_path, content) -> None:
    path = tmp_path / "t.ckpt"
    if content is not None:
        path.write_bytes(content)
    stage = fed.teacher_stage(tmp_path / "store", checkpoints={"a": str(path)})
    with pytest.raises(RunError, match=r"teacher of a.*t\.ckpt"):
        ensure(fed, stage)


def test_no_code_runs_from_a_brought_teacher(fed, tmp_path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "t.ckpt")
    stage = fed.teacher_stage(tmp_path / "store", checkpoints={"a": str(tmp_path / "t.ckpt")})
    with pytest.raises(RunError, match="cannot be read as tensors"):
        ensure(fed, stage)
    assert not (tmp_path / "ran").exists()


def test_unknown_client_in_checkpoints_is_refused_before_training(fed, tmp_path, monkeypatch) -> None:
    fits = count_fits(monkeypatch)
    stage = fed.teacher_stage(tmp_path / "store", checkpoints={"A": "x.ckpt"})
    module = fed.distilled(tmp_path, source=stage)
    with pytest.raises(ConfigError, match="client 'A', which does not exist"):
        fed.trainer(tmp_path / "run", Federation(rounds=1)).fit(module, datamodule=fed.Hospitals())
    assert fits == []


def test_a_teacher_that_overflows_names_the_images(fed, tmp_path) -> None:
    broken = fed.network(6)
    with torch.no_grad():
        broken[3].weight.fill_(3e38)  # finite itself, but not what it answers
        broken[3].bias.fill_(3e38)
    save_file(broken.state_dict(), tmp_path / "t.safetensors")
    stage = fed.teacher_stage(tmp_path / "store", epochs=1, checkpoints={"b": str(tmp_path / "t.safetensors")})
    module = fed.distilled(tmp_path, source=stage)
    with pytest.raises(TrainingError, match=r"teacher of client b answers with NaN or infinity for b-train-\d"):
        fed.trainer(tmp_path / "run", Federation(rounds=1)).fit(module, datamodule=fed.Hospitals())


def test_teachers_command_trains_them_and_nothing_else(fed, tmp_path, monkeypatch) -> None:
    fits = count_fits(monkeypatch)
    module = fed.distilled(tmp_path / "teachers")
    trainer = fed.trainer(tmp_path / "run", Federation(), logger=False)
    trainer.teachers(module, fed.Hospitals())
    assert fits == [2, 2, 2]
    trainer.teachers(module, fed.Hospitals())
    assert fits == [2, 2, 2]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="no teachers"):
        fed.trainer(tmp_path / "run", Federation()).teachers(fed.student(), fed.Hospitals())
