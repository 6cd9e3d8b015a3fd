"""Tiny in-memory hospitals and students, so that a federated run takes a fraction of a second."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fkd_med.checkpoints import LastCheckpoint
from fkd_med.communication import Packing
from fkd_med.data.datasets import collate
from fkd_med.data.sampling import SeededSampler
from fkd_med.federated import FederatedTrainer, Federation, TeacherStage
from fkd_med.federated.progress import Reporter
from fkd_med.losses import LogitKL
from fkd_med.modules import DistillationModule, SegmentationModule
from fkd_med.seeding import derive_seed
from fkd_med.tracking import ImageRecorder, MetricsCSV

SIZE = 16
SIZES = {"a": 8, "b": 4, "c": 12}  # training images: unequal, so that a wrong weight shows


class Blobs(Dataset):
    """Bright squares on noise; an item drawn with a seed is brightened by it, as augmentation would."""

    def __init__(self, client: str, split: str, count: int, augment: bool = False) -> None:
        self.client, self.split, self.count, self.augment = client, split, count, augment

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        position, seed = index if isinstance(index, tuple) else (index, None)
        name = f"{self.client}-{self.split}-{position}"
        random = np.random.default_rng(derive_seed("image", name))
        image, mask = random.normal(0, 0.3, (3, SIZE, SIZE)), np.zeros((SIZE, SIZE), np.int64)
        row, column = random.integers(0, SIZE - 6, 2)
        mask[row : row + 6, column : column + 6] = 1
        image += mask * (1 + ord(self.client[0]) % 3)
        if self.augment and seed is not None:
            image += np.random.default_rng(seed).normal(0, 0.1)
        return {
            "image": torch.tensor(image, dtype=torch.float32),
            "mask": torch.from_numpy(mask),
            "id": name,
            "client": self.client,
            "size": (SIZE, SIZE),
        }


class Public(Dataset):
    """Images of nobody: noise."""

    def __init__(self, count: int) -> None:
        self.images = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
        self.digest = f"{count} images"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "id": f"public-{index}"}


class Hospitals(L.LightningDataModule):
    """What the federated loop asks for (`ClientData`), from memory."""

    def __init__(
        self,
        sizes: dict[str, int] | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        content: str = "",
        seed: int = 5,
        public: int = 0,
    ) -> None:
        super().__init__()
        self.sizes, self.batch_size, self.num_workers = dict(sizes or SIZES), batch_size, num_workers
        self.content, self.order_seed = content, seed
        self.public = Public(public) if public else None
        self.drawn: list[tuple[int, str]] = []

    def public_images(self) -> Public | None:
        return self.public

    def client_names(self) -> list[str]:
        return sorted(self.sizes)

    def num_examples(self, client: str) -> int:
        return self.sizes[client]

    def _ranks(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, dataset: Dataset, sampler: Any, workers: int = 0) -> DataLoader:
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(0),
        )

    def client_train_dataloader(self, client: str | None, round: int = 0) -> DataLoader:
        assert client is not None
        self.drawn.append((round, client))
        dataset = Blobs(client, "train", self.sizes[client], augment=True)
        ids = [f"{client}-{i}" for i in range(len(dataset))]
        sampler = SeededSampler(ids, self.order_seed, round, client, *self._ranks())
        return self._loader(dataset, sampler, self.num_workers)

    def _evaluation(self, client: str, split: str) -> DataLoader:
        dataset = Blobs(client, split, 3)
        return self._loader(dataset, DistributedSampler(dataset, *self._ranks(), shuffle=False))

    def client_val_dataloader(self, client: str | None) -> DataLoader:
        assert client is not None
        return self._evaluation(client, "val")

    def client_test_dataloader(self, client: str | None) -> DataLoader:
        assert client is not None
        return self._evaluation(client, "test")

    def fingerprint(self, client: str | None) -> str:
        return hashlib.sha256(f"{client} {self.content} {self.sizes[client or 'a']}".encode()).hexdigest()

    def train_dataloader(self) -> DataLoader:
        return self.client_train_dataloader(self.client_names()[0])

    def val_dataloader(self) -> list[DataLoader]:
        return [self.client_val_dataloader(client) for client in self.client_names()]

    def test_dataloader(self) -> list[DataLoader]:
        return [self.client_test_dataloader(client) for client in self.client_names()]


def network(width: int = 4, seed: int = 0) -> nn.Module:
    """Return a student with BatchNorm, the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 1, 1)
        )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def student(**options: Any) -> SegmentationModule:
    return SegmentationModule(network(), **{"optimizer": adam, **options})


def teacher_stage(store: Path, **options: Any) -> TeacherStage:
    module = options.pop("module", None) or SegmentationModule(network(6, seed=1), optimizer=adam)
    return TeacherStage(module, **{"epochs": 2, "store": str(store), **options})


def distilled(store: Path, source: Any = None, **options: Any) -> DistillationModule:
    teacher = source or teacher_stage(store)
    defaults = {"losses": {"kd": LogitKL()}, "optimizer": adam, "teacher_cache": "off"}  # these data carry no maps
    return DistillationModule(network(), teacher=teacher, **{**defaults, **options})


def trainer(folder: Path, federation: Federation | None = None, **options: Any) -> FederatedTrainer:
    """Return the trainer that the command line would build: CPU, best and last checkpoints, CSV files."""
    every, lightnings = options.pop("save_every", None), options.pop("lightnings_last", False)
    best = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="best-{step}",
        monitor="val/dice",
        mode="max",
        save_last=lightnings or None,
        every_n_epochs=every,
    )
    callbacks = [
        best,
        *([] if lightnings else [LastCheckpoint(folder / "checkpoints")]),
        ImageRecorder(folder / "images.csv", panel_every=0),
        *options.pop("callbacks", []),
    ]  # fmt: skip
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": [MetricsCSV(folder / "metrics.csv")]}
    made = FederatedTrainer(
        **{**defaults, **options},
        federation=Federation(rounds=2) if federation is None else federation,
        default_root_dir=str(folder),
        callbacks=callbacks,
    )
    made.reporter.enabled = False
    return made


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def fed() -> SimpleNamespace:
    """The helpers above (tests are no package, so they cannot import one another)."""
    return SimpleNamespace(
        Hospitals=Hospitals, Blobs=Blobs, Public=Public, SIZES=SIZES, network=network, adam=adam, sgd=sgd,
        student=student, teacher_stage=teacher_stage, distilled=distilled, trainer=trainer, weights=weights, same=same,
        silent=lambda: Reporter(enabled=False),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts with the seed that the command line would set, in one thread."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    torch.manual_seed(7)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(does not have many workers|in eval mode|GPU available|LeafSpec).*")
        yield


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every broadcast and update that is encoded, as it went out."""
    messages: list[Any] = []
    pack: Callable[..., Any] = Packing.pack

    def spy(self: Packing, message: Any, *args: Any, **kwargs: Any) -> Any:
        messages.append(message)
        return pack(self, message, *args, **kwargs)

    monkeypatch.setattr(Packing, "pack", spy)
    return messages
