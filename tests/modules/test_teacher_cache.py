"""The teacher cache: asked once, found again, remade when anything changed, and worth the same as a live teacher."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import albumentations as A
import lightning as L
import pytest
import torch
from torch import Tensor, nn

from fkd_med.data import FederatedDataModule, Phantoms
from fkd_med.data.augmentation import Augmentation, default_augmentation
from fkd_med.distillation import Taps, match
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.losses import (
    CWD,
    IFVD,
    AttentionTransfer,
    BoundaryKL,
    DISTIntra,
    HintMSE,
    LogitKL,
    PairwiseAffinity,
    Pixels,
    Ramp,
    RegionAffinity,
)
from fkd_med.modules import DistillationModule, TeacherSource, WarmupCosine
from fkd_med.modules.schedule import progress_of
from fkd_med.modules.teacher_cache import Surroundings, cache_key, ensure_maps, image_count
from fkd_med.networks import ResUNet, SlimUNet

SIDE = 32
TRAINER: dict[str, Any] = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "limit_val_batches": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    Phantoms(hospitals=2, images=16, size=SIDE).prepare(folder)
    return folder


def hospitals(root: Path, **options: Any) -> FederatedDataModule:
    data = FederatedDataModule(str(root), **{"image_size": SIDE, "batch_size": 4, "seed": 3, **options})
    data.setup()
    return data


class Source(TeacherSource):
    """Hands out one network and counts how often."""

    def __init__(self, network: nn.Module, store: Path) -> None:
        self.network, self.store, self.loads = network, store, 0

    def ensure(self, client: str | None, data: Any, **options: Any) -> Path:
        return Path()

    def load(self, client: str | None) -> nn.Module:
        self.loads += 1
        return self.network

    def architecture(self) -> nn.Module:
        return self.network

    def digest(self, client: str | None) -> str:
        loads = self.loads
        digest = super().digest(client)
        self.loads = loads
        return digest

    def maps_folder(self) -> Path:
        return self.store


def teacher(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResUNet(width=4).eval()


def test_maps_are_the_answers_to_the_images_as_they_are(root: Path, tmp_path: Path) -> None:
    data, source = hospitals(root), Source(teacher(), tmp_path)
    client = data.client_names()[0]
    maps = ensure_maps(source, client, data, ["bridge"], Surroundings())
    assert maps is not None and len(maps) == data.num_examples(client)
    for batch in data.client_train_eval_dataloader(client):
        live = Taps(source.network, ["bridge"])(batch["image"])
        for index, name in enumerate(batch["id"]):
            for tap in ("logits", "bridge"):
                found = torch.from_numpy(maps.read(name)[tap]).float()
                torch.testing.assert_close(found, live[tap][index], rtol=2e-3, atol=1e-3)


def test_found_again_without_asking_the_teacher(root: Path, tmp_path: Path) -> None:
    data, source = hospitals(root), Source(teacher(), tmp_path)
    first = ensure_maps(source, None, data, [], Surroundings())
    again = ensure_maps(source, None, data, [], Surroundings())
    assert source.loads == 1 and first is not None and again is not None and first.folder == again.folder
    assert len(again) == sum(data.num_examples(client) for client in data.client_names())


def test_the_key_knows_all_that_decides_the_answers(root: Path, tmp_path: Path) -> None:
    data, client = hospitals(root), "hospital-a"
    keys = [
        cache_key(Source(teacher(), tmp_path), client, data, [], "32-true")[0],
        cache_key(Source(teacher(1), tmp_path), client, data, [], "32-true")[0],
        cache_key(Source(teacher(), tmp_path), "hospital-b", data, [], "32-true")[0],
        cache_key(Source(teacher(), tmp_path), client, data, ["bridge"], "32-true")[0],
        cache_key(Source(teacher(), tmp_path), client, data, [], "bf16-mixed")[0],
        cache_key(Source(teacher(), tmp_path), client, hospitals(root, mean=[0.1] * 3), [], "32-true")[0],
        cache_key(Source(teacher(), tmp_path), client, hospitals(root, image_size=48), [], "32-true")[0],
        cache_key(Source(teacher(), tmp_path), client, data, [], "32-true", 4)[0],
        cache_key(Source(teacher(), tmp_path), client, data, [], "32-true", 8)[0],
    ]
    assert len(set(keys)) == len(keys)
    same = cache_key(Source(teacher(), tmp_path / "elsewhere"), client, hospitals(root, batch_size=2), [], "32-true")
    assert same[0] == keys[0]


def test_damaged_maps_are_made_anew(root: Path, tmp_path: Path) -> None:
    data, source = hospitals(root), Source(teacher(), tmp_path)
    maps = ensure_maps(source, "hospital-a", data, [], Surroundings())
    assert maps is not None
    name = maps.folder / "tap-0.npy"
    good = name.read_bytes()
    name.write_bytes(good[:-100])
    again = ensure_maps(source, "hospital-a", data, [], Surroundings())
    assert source.loads == 2 and again is not None and name.read_bytes() == good


def test_a_teacher_that_answers_nan_names_the_image_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(len(x))[:, None, None, None] == 1, torch.nan, x[:, :1])

    data = hospitals(root)
    second = data.client_train_eval_dataloader("hospital-b").dataset.ids[1]
    with pytest.raises(TrainingError, match=rf"teacher of client hospital-b answers with NaN .* for {second}"):
        ensure_maps(Source(Broken(), tmp_path), "hospital-b", data, [], Surroundings())
    assert not [path for path in tmp_path.rglob("*") if not path.name.endswith(".lock")]


def test_what_cannot_be_cached_says_so(root: Path, tmp_path: Path) -> None:
    source = Source(teacher(), tmp_path)
    with pytest.raises(ConfigError, match=r"object cannot carry .* teacher_maps .* model.teacher_cache: off"):
        DistillationModule(SlimUNet(), teacher=source).check_data(object(), Surroundings())
    DistillationModule(SlimUNet(), teacher=source, teacher_cache="off").check_data(object(), Surroundings())
    assert ensure_maps(source, None, hospitals(root), [], Surroundings(is_trial=True)) is None
    tapping = {"at": AttentionTransfer(teacher_tap="bridge")}
    with pytest.raises(ConfigError, match=r"model.losses.at taps features .* model.teacher_cache: logits"):
        DistillationModule(SlimUNet(), losses=tapping)
    DistillationModule(SlimUNet(), losses=tapping, teacher_cache="taps")
    DistillationModule(SlimUNet(), losses={"at": AttentionTransfer(teacher_tap="bridge", weight=0)})


# --- views -----------------------------------------------------------------------------------------------------------


def test_maps_of_views_are_the_mean_answers_to_flipped_images(root: Path, tmp_path: Path) -> None:
    data, source = hospitals(root), Source(teacher(), tmp_path)
    maps = ensure_maps(source, "hospital-a", data, [], Surroundings(), views=4)
    assert maps is not None
    batch = next(iter(data.client_train_eval_dataloader("hospital-a")))
    flips = ([], [-1], [-2], [-2, -1])
    live = torch.stack([source.network(batch["image"].flip(f)).flip(f).sigmoid() for f in flips]).mean(0).logit()
    for index, name in enumerate(batch["id"]):
        torch.testing.assert_close(
            torch.from_numpy(maps.read(name)["logits"]).float(), live[index], rtol=2e-3, atol=1e-3
        )
    plain = ensure_maps(source, "hospital-a", data, [], Surroundings())
    assert plain is not None and plain.folder != maps.folder and source.loads == 2


def test_images_without_a_mask_have_caches_of_their_own_and_leave_teachers_alone(tmp_path: Path) -> None:
    """More of them, and a teacher is found again, but not its answers to fewer images."""
    root = tmp_path / "data"
    Phantoms(hospitals=1, images=28, size=SIDE).prepare(root)
    first, second, *_ = [row for row in hospitals(root).manifest.of("hospital-a", "train")]
    alike = [row for row in hospitals(root).manifest.rows if row.patient in (first.patient, second.patient)]
    for row in alike:
        (root / "masks" / f"{row.id}.png").unlink()
    source, data = Source(teacher(), tmp_path / "store"), []
    data.append(hospitals(root, on_missing="skip"))
    data.append(hospitals(root, on_missing="unlabelled"))
    (root / "images" / f"{alike[0].id}.png").write_bytes((root / "images" / f"{alike[1].id}.png").read_bytes())
    data.append(hospitals(root, on_missing="unlabelled"))
    assert len({each.fingerprint("hospital-a") for each in data}) == 1
    keys = {cache_key(source, "hospital-a", each, [], "32-true")[0] for each in data}
    assert len(keys) == 3
    maps = ensure_maps(source, "hospital-a", data[1], [], Surroundings())
    assert image_count(data[1], "hospital-a") == len(data[1].client_train_eval_dataloader("hospital-a").dataset)
    assert maps is not None and maps.read(alike[0].id)["logits"].shape == (1, SIDE, SIDE)


@pytest.mark.parametrize("views", [4, 8])
def test_cached_and_live_teachers_answer_in_the_same_views(root: Path, tmp_path: Path, views: Any) -> None:
    data, source = hospitals(root, augmentation=False), Source(teacher(), tmp_path)
    found = {}
    for number in (views, 1):
        module = DistillationModule(SlimUNet().eval(), teacher=source, teacher_views=number)
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        data.teacher_maps = ensure_maps(source, "hospital-a", data, [], Surroundings(), module.teacher_views)
        batch = next(iter(data.client_train_dataloader("hospital-a")))
        found["cached", number] = module.teach(batch)["logits"].float()
        del batch["teacher"]
        module.attach_teacher(source.network)
        found["live", number] = module.teach(batch)["logits"]
    torch.testing.assert_close(found["cached", views], found["live", views], rtol=2e-3, atol=1e-3)
    assert not torch.allclose(found["live", views], found["live", 1], rtol=0.05, atol=0.05)


def test_views_that_make_no_sense_are_refused_when_the_module_is_built() -> None:
    with pytest.raises(ConfigError, match=r"teacher_views is 3: give 1 .* 2 .* 4 .* or 8"):
        DistillationModule(SlimUNet(), teacher_views=3)  # type: ignore[arg-type]
    tapping = {"at": AttentionTransfer(teacher_tap="bridge")}
    for cache in ("taps", "off"):
        with pytest.raises(ConfigError, match=r"model.losses.at taps features .*teacher_views: 4 averages"):
            DistillationModule(SlimUNet(), losses=tapping, teacher_cache=cache, teacher_views=4)  # type: ignore[arg-type]
    off = {"at": AttentionTransfer(teacher_tap="bridge", weight=0), "kd": LogitKL()}
    DistillationModule(SlimUNet(), losses=off, teacher_cache="taps", teacher_views=8)


def test_images_that_are_not_square_are_refused_before_any_teacher_trains() -> None:
    module = DistillationModule(SlimUNet(), teacher_views=8)
    with pytest.raises(ConfigError, match=r"these are 32 x 48: use 4"):
        module.rehearse(torch.zeros(1, 3, 32, 48), teacher(0))
    DistillationModule(SlimUNet(), teacher_views=4).rehearse(torch.zeros(1, 3, 32, 48), teacher(0))


# --- cached against live ---------------------------------------------------------------------------------------------

TERMS = {
    "kl": LogitKL(),
    "cwd": CWD(),
    "pairwise": PairwiseAffinity(pool=0.25),
    "ifvd": IFVD(),
    "rad": RegionAffinity(),
    "at": AttentionTransfer(),
    "dist": DISTIntra(),
    "boundary": BoundaryKL(),
    "at_features": AttentionTransfer(student_tap="decoder.2", teacher_tap="bridge"),
    "hint": HintMSE(student_tap="decoder.2", teacher_tap="decoder.0"),
    "coarse": RegionAffinity(student_tap="decoder.0", teacher_tap="decoder.0", resize="teacher"),
}


def test_every_loss_is_the_same_cached_and_live_without_augmentation(root: Path, tmp_path: Path) -> None:
    data, source = hospitals(root, augmentation=False), Source(teacher(), tmp_path)
    module = DistillationModule(SlimUNet(), teacher=source, losses=TERMS, teacher_cache="taps")
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.rehearse(torch.randn(1, 3, SIDE, SIDE))
    data.teacher_maps = ensure_maps(source, "hospital-a", data, module.teacher_taps, Surroundings())
    batch = next(iter(data.client_train_dataloader("hospital-a")))
    assert "teacher" in batch and "coordinates" not in batch
    module.eval()  # so that both passes of the student are the same
    cached = module.loss_terms(batch)
    del batch["teacher"]
    module.attach_teacher(source.network)
    live = module.loss_terms(batch)
    assert cached.keys() == live.keys() == {"supervised", *TERMS}
    for name in TERMS:
        torch.testing.assert_close(cached[name], live[name], rtol=5e-3, atol=1e-5, msg=name)


class Pointwise(nn.Module):
    """Answers each pixel from its colour alone: such a teacher's answers move with the image exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Conv2d(3, 1, 1)
        nn.init.constant_(self.colour.weight, 1.0)
        nn.init.zeros_(self.colour.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.colour(x)


MOVES = {
    "flip": ([A.HorizontalFlip(p=1), A.VerticalFlip(p=1)], 1e-3),
    "turn": ([A.RandomRotate90(p=1)], 1e-3),
    "crop": ([A.RandomResizedCrop((SIDE, SIDE), scale=(0.4, 0.8), p=1)], 0.05),
    "scale": ([A.Affine(scale=(0.7, 0.9), p=1)], 0.05),
    "rotate": ([A.Affine(rotate=(-40, 40), p=1)], 0.05),
    "default": (default_augmentation().geometric.transforms, 0.05),
}


@pytest.mark.parametrize("move", MOVES)
def test_losses_agree_under_augmentation(move: str, root: Path, tmp_path: Path) -> None:
    """Cached against live on the augmented image, at the same valid pixels; 5 % is what interpolation leaves."""
    transforms, tolerance = MOVES[move]
    data = hospitals(root, augmentation=Augmentation(geometric=transforms), batch_size=8)
    source = Source(Pointwise(), tmp_path)
    data.teacher_maps = ensure_maps(source, "hospital-a", data, [], Surroundings())
    batch = next(iter(data.client_train_dataloader("hospital-a")))
    live = source.network(batch["image"])
    pixels = Pixels(batch["mask"], 2, batch["coordinates"][:, 2] > 0.5)
    assert 0.5 < pixels.valid.float().mean() <= 1
    student = torch.nn.functional.avg_pool2d(live, 5, stride=1, padding=2) - 0.5  # near the teacher, yet not it
    for name, term in TERMS.items():
        if name in ("at_features", "hint", "coarse"):
            continue
        compared = match(term, student, batch["teacher"]["logits"], pixels, batch["coordinates"])
        cached, exact = term(*compared), term(student, live, pixels)
        torch.testing.assert_close(cached, exact, rtol=tolerance, atol=2e-4, msg=f"{name}: {cached} {exact}")
    wrong = match(TERMS["kl"], student, batch["teacher"]["logits"], pixels)  # maps that did not move with the image
    assert float(TERMS["kl"](*wrong)) > 1.2 * float(TERMS["kl"](student, live, pixels))


# --- training --------------------------------------------------------------------------------------------------------


def descent(parameters: Any) -> torch.optim.Optimizer:
    """Steps as small as the gradients are: Adam's first ones are their signs, which make much of any last digit."""
    return torch.optim.SGD(parameters, lr=2e-4)


def fit(root: Path, store: Path, cache: str, epochs: int = 2, **options: Any) -> tuple[DistillationModule, Source]:
    torch.manual_seed(0)
    data, source = hospitals(root, augmentation=False, **options), Source(teacher(), store)
    module = DistillationModule(SlimUNet(), teacher=source, teacher_cache=cache, optimizer=descent)  # type: ignore[arg-type]
    L.Trainer(**TRAINER, max_epochs=epochs).fit(module, datamodule=data)
    assert data.teacher_maps is None  # the next fit with these data may have another teacher, or none
    return module, source


def flat(module: DistillationModule) -> torch.Tensor:
    """All parameters of a student in one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.network.parameters()])


def test_training_from_the_cache_is_training_from_the_teacher(root: Path, tmp_path: Path) -> None:
    cached, source = fit(root, tmp_path, "logits")
    live, _ = fit(root, tmp_path, "off")
    assert source.loads == 1 and cached.teacher is None and live.teacher is None  # neither keeps a teacher after it
    torch.manual_seed(0)
    untaught = DistillationModule(SlimUNet(), losses={"kd": LogitKL(weight=0.0)}, optimizer=descent)
    start = flat(untaught)
    L.Trainer(**TRAINER, max_epochs=2).fit(untaught, datamodule=hospitals(root, augmentation=False))
    moved = (flat(live) - start).norm()
    assert moved > 1e-3  # it did train
    # Maps are float16: measured 0.001 and 0.002 of what being taught changes, with one thread and with two.
    assert (flat(cached) - flat(live)).norm() < 0.02 * (flat(untaught) - flat(live)).norm()


def test_data_workers_read_the_same_maps(root: Path, tmp_path: Path) -> None:
    weights = [fit(root, tmp_path, "logits", 1, num_workers=workers)[0].state_dict() for workers in (0, 2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_trial_run_makes_no_cache(root: Path, tmp_path: Path) -> None:
    module = DistillationModule(SlimUNet(), teacher=Source(teacher(), tmp_path / "store"))
    L.Trainer(**TRAINER, fast_dev_run=True).fit(module, datamodule=hospitals(root))
    assert not (tmp_path / "store").exists()


def test_connectors_resume_in_a_plain_run_and_stay_out_of_its_weights(root: Path, tmp_path: Path) -> None:
    def build() -> DistillationModule:
        terms = {"hint": HintMSE(student_tap="decoder.2", teacher_tap="decoder.0")}
        source = Source(teacher(), tmp_path)
        torch.manual_seed(0)
        return DistillationModule(SlimUNet(), teacher=source, losses=terms, teacher_cache="taps")

    module = build()
    trainer = L.Trainer(**TRAINER, max_epochs=1)
    trainer.fit(module, datamodule=hospitals(root))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trained = module.companions.tensors()
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert not any("companions" in name for name in stored["state_dict"]) and trained.keys() == {
        "hint.weight",
        "hint.bias",
    }
    again = build()
    seen: dict[str, Tensor] = {}
    again.on_train_start = lambda: seen.update(again.companions.tensors())  # type: ignore[method-assign]
    L.Trainer(**TRAINER, max_epochs=2).fit(again, datamodule=hospitals(root), ckpt_path=tmp_path / "one.ckpt")
    assert all(torch.equal(seen[name], tensor) for name, tensor in trained.items())
    assert not torch.equal(again.companions.tensors()["hint.weight"], trained["hint.weight"])  # and they train


def test_a_wrong_tap_is_found_before_training(root: Path, tmp_path: Path) -> None:
    source = Source(teacher(), tmp_path)
    terms = {"at": AttentionTransfer(student_tap="decoder.9", teacher_tap="bridge")}
    module = DistillationModule(SlimUNet(), teacher=source, losses=terms, teacher_cache="taps")
    with pytest.raises(ConfigError, match=r"the student SlimUNet has no module 'decoder.9'"):
        L.Trainer(**TRAINER, max_epochs=1).fit(module, datamodule=hospitals(root))
    assert source.loads == 0


def test_weights_follow_their_schedule_over_epochs(root: Path, tmp_path: Path) -> None:
    terms = {"kd": LogitKL(schedule=Ramp(first=1.0, last=0.0, begin=0.0, end=0.5)), "on": LogitKL(weight=0.1)}
    module = DistillationModule(SlimUNet(), teacher=Source(teacher(), tmp_path), losses=terms)
    shares: list[float] = []
    original = module.loss_terms

    def spy(batch: dict[str, Any]) -> dict[str, Tensor]:
        found = original(batch)
        shares.append(float(found["kd"] / found["on"]) / 10 if "kd" in found else 0.0)
        return found

    module.loss_terms = spy  # type: ignore[method-assign]
    L.Trainer(**TRAINER, max_epochs=5, limit_train_batches=1).fit(module, datamodule=hospitals(root))
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.0, 0.0], abs=1e-5)


def test_a_schedule_that_leaves_no_loss_is_refused() -> None:
    fading = {"kd": LogitKL(schedule=Ramp(end=0.5))}
    with pytest.raises(ConfigError, match=r"After 50 % of the run every weight of the loss is 0"):
        DistillationModule(SlimUNet(), losses=fading, supervised_weight=0)
    DistillationModule(SlimUNet(), losses=fading)


def test_each_step_of_a_fit_takes_its_own_maps(root: Path, tmp_path: Path) -> None:
    """A batch's maps are those of its images, also in the pool of all clients."""
    data, source = hospitals(root), Source(teacher(), tmp_path)
    data.teacher_maps = ensure_maps(source, None, data, [], Surroundings())
    for batch in itertools.islice(data.train_dataloader(), 3):
        for index, name in enumerate(batch["id"]):
            expected = torch.from_numpy(data.teacher_maps.read(name)["logits"])
            assert torch.equal(batch["teacher"]["logits"][index], expected)


# --- what a review found ---------------------------------------------------------------------------------------------


def test_a_scheduler_that_asks_for_the_batches_early(root: Path, tmp_path: Path) -> None:
    """WarmupCosine asks how many steps there are, for which Lightning makes the training loader before on_fit_start."""
    source = Source(teacher(), tmp_path)
    module = DistillationModule(SlimUNet(), teacher=source, scheduler=lambda o: WarmupCosine(o, warmup=0.1))
    L.Trainer(**TRAINER, max_epochs=2).fit(module, datamodule=hospitals(root))
    assert source.loads == 1


def test_an_interrupted_fit_leaves_nothing_to_the_next(root: Path, tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ValueError("stop")

    data, source = hospitals(root), Source(teacher(), tmp_path)
    first = DistillationModule(SlimUNet(), teacher=source)
    with pytest.raises(ValueError, match="stop"):
        L.Trainer(**TRAINER, max_epochs=1, callbacks=[Stop()]).fit(first, datamodule=data)
    other = DistillationModule(SlimUNet())
    other.attach_teacher(teacher(1))
    asked: list[int] = []
    other.teacher.register_forward_hook(lambda *args: asked.append(1))
    L.Trainer(**TRAINER, max_epochs=1).fit(other, datamodule=data)
    assert asked and data.teacher_maps is None
    L.Trainer(**TRAINER, max_epochs=1).fit(first, datamodule=hospitals(root))  # and again, on other data


def test_each_fit_gets_the_teacher_of_its_own_data(root: Path, tmp_path: Path) -> None:
    class PerClient(Source):
        def load(self, client: str | None) -> nn.Module:
            self.network = teacher(0 if client == "hospital-a" else 1)
            return super().load(client)

    source = PerClient(teacher(), tmp_path)
    module = DistillationModule(SlimUNet(), teacher=source, teacher_cache="off")
    for client in ("hospital-a", "hospital-b"):
        L.Trainer(**TRAINER, max_epochs=1).fit(module, datamodule=hospitals(root, client=client, batch_size=2))
    assert source.loads == 2 and module.teacher is None


def test_the_key_knows_settings_that_neither_text_nor_weights_show(root: Path, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self, heads: int, divisor: int = 1) -> None:
            super().__init__()
            self._divisor = divisor
            self.heads, self.layer = heads, nn.Conv2d(3, 1, 1)
            nn.init.ones_(self.layer.weight)

        @property
        def size_divisor(self) -> int:
            return self._divisor

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.heads

    one, other, divided = Scaled(1), Scaled(2), Scaled(1, divisor=8)
    other.layer.load_state_dict(one.layer.state_dict())
    divided.layer.load_state_dict(one.layer.state_dict())
    assert str(one) == str(other)
    data = hospitals(root)
    keys = {cache_key(Source(n, tmp_path), None, data, [], "32-true")[0] for n in (one, other, divided)}
    assert len(keys) == 3


def test_a_read_only_store_with_whole_maps_is_read(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data, source = hospitals(root), Source(teacher(), tmp_path)
    ensure_maps(source, None, data, [], Surroundings())

    def refuse(*args: Any) -> Any:
        raise AssertionError("nothing has to be written")

    monkeypatch.setattr("fkd_med.modules.teacher_cache.queued", refuse)
    assert ensure_maps(source, None, data, [], Surroundings()) is not None


@pytest.mark.parametrize("name", ["supervised", "loss", "values", "type"])
def test_names_that_are_taken_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is taken"):
        DistillationModule(SlimUNet(), losses={name: LogitKL()})


def test_a_resume_with_other_connectors_says_so(root: Path, tmp_path: Path) -> None:
    def build(*names: str) -> DistillationModule:
        terms = {name: HintMSE(student_tap="decoder.2", teacher_tap="decoder.0") for name in names}
        return DistillationModule(SlimUNet(), teacher=Source(teacher(), tmp_path), losses=terms, teacher_cache="taps")

    trainer = L.Trainer(**TRAINER, max_epochs=1)
    trainer.fit(build("one", "two"), datamodule=hospitals(root))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ConfigError, match=r"connectors or a teacher \(two.bias, .*resume with the terms"):
        L.Trainer(**TRAINER, max_epochs=2).fit(
            build("one"), datamodule=hospitals(root), ckpt_path=tmp_path / "one.ckpt"
        )


def test_loaders_alone_and_true_half_precision_are_refused_with_advice(root: Path, tmp_path: Path) -> None:
    module = DistillationModule(SlimUNet(), teacher=Source(teacher(), tmp_path))
    with pytest.raises(ConfigError, match=r"this fit has only loaders: set teacher_cache: off"):
        L.Trainer(**TRAINER, max_epochs=1).fit(module, hospitals(root).train_dataloader())
    with pytest.raises(ConfigError, match=r"trainer.precision: bf16-true .* use bf16-mixed"):
        L.Trainer(**TRAINER, max_epochs=1, precision="bf16-true").fit(module, datamodule=hospitals(root))


def test_weights_follow_their_schedule_over_steps(root: Path) -> None:
    """Where a training's length is given in steps, also across its epochs."""
    seen: list[float] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(progress_of(pl_module.clock, trainer))

    module = DistillationModule(SlimUNet(), losses={"kd": LogitKL(weight=0)})
    L.Trainer(**TRAINER, max_steps=5, limit_train_batches=2, callbacks=[Note()]).fit(module, datamodule=hospitals(root))
    assert seen == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
