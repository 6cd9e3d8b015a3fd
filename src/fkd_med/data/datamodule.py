"""FederatedDataModule: images of several hospitals, for Lightning and for the federated loop alike.

Lightning asks for train, validation and test loaders; the loop asks for one client's. Both see the same
manifest, the same preprocessing and the same seeded order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from torch.utils.data import DataLoader, DistributedSampler

from fkd_med.data.augmentation import Augmentation, default_augmentation
from fkd_med.data.datasets import Item, Maps, SampleReader, SegmentationDataset, collate
from fkd_med.data.finding import real_folders
from fkd_med.data.geometry import ResizeMode
from fkd_med.data.layouts import FolderPair, Layout
from fkd_med.data.manifest import UNLABELLED, Manifest
from fkd_med.data.masks import MaskCoding, scan_masks
from fkd_med.data.pairing import OnMissing
from fkd_med.data.partition import BySite, Partitioner, build_manifest
from fkd_med.data.preprocessing import Preprocessing
from fkd_med.data.public import PublicImages, read_public
from fkd_med.data.records import Record
from fkd_med.data.sampling import check_fills_batch
from fkd_med.data.unlabelled import MixedSampler, check_hidden, check_masks, check_unlabelled, without_hidden
from fkd_med.errors import ConfigError
from fkd_med.seeding import global_seed

Loader = DataLoader[Item]


class FederatedDataModule(L.LightningDataModule):
    """Images of several hospitals, split by patient into train, validation and test per hospital.

    Args:
        root: Folder of the data set.
        layout: What lies where below `root`; null for a pair of folders, images and masks.
        partitioner: Which patient belongs to which hospital; null for the sites the data name.
        manifest: A manifest.csv of an earlier run, used instead of partitioning (contents are verified).
        client: Train and validate on this hospital alone; test still covers every hospital.
        image_size: Side of the square that networks see, in pixels.
        resize: How images become squares: stretch, or letterbox to keep the aspect ratio.
        in_channels: 3 for colour, 1 for grey.
        classes: Number of logits: 1 for a binary mask, otherwise all classes with background.
        class_values: Raw mask value of each class; null to find them over the whole set.
        mean: Per channel, of values in [0, 1]; null for ImageNet's.
        std: Per channel; null for ImageNet's.
        augmentation: Of training images: true for flips, turns, mild affine and brightness; false for none.
        batch_size: Images per batch and device.
        num_workers: Processes that load data; numbers do not depend on it.
        val_fraction: Share of each hospital's patients kept for validation.
        test_fraction: Share of each hospital's patients kept for testing.
        on_missing: What to do about images without mask and masks without image: stop, skip them, or keep images
            without mask as unlabelled, to learn from what a teacher says of them.
        unlabelled: Unlabelled images added to every training batch; null for as many as `batch_size`, 0 for none.
        hidden_masks: Share of each hospital's training images whose masks are not used, by whole patients: to try what
            unlabelled images are worth. A `manifest` says itself whose.
        seed: Of splits, order and augmentation; null for seed_everything's.
        public: Folder of further images, without masks and nobody's, for algorithms that distil on such (FedDF, FedMD).

    Attributes:
        teacher_maps: What a frozen teacher says about the training images. Set by whoever has a teacher, never by
            configuration, and part of nothing that is saved. Training loaders made after that carry it, those of a
            teacher's own training (round -1) and of evaluation do not.
    """

    def __init__(
        self,
        root: str,
        layout: Layout | None = None,
        partitioner: Partitioner | None = None,
        manifest: str | None = None,
        client: str | None = None,
        image_size: int = 256,
        resize: ResizeMode = "stretch",
        in_channels: int = 3,
        classes: int = 1,
        class_values: list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augmentation: Augmentation | bool = True,
        batch_size: int = 4,
        num_workers: int = 0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        on_missing: OnMissing = "error",
        unlabelled: int | None = None,
        hidden_masks: float = 0.0,
        seed: int | None = None,
        public: str | None = None,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.layout = layout or FolderPair()
        self.partitioner = partitioner or BySite()
        self.manifest_path = manifest
        self.client = client
        self.preprocessing = Preprocessing.checked(image_size, resize, in_channels, mean, std)
        if not 1 <= classes <= 255:
            raise ConfigError(f"data.classes: {classes}; use 1 for a binary mask, or up to 255 with the background.")
        if batch_size < 1:
            raise ConfigError(f"data.batch_size: {batch_size}; use at least 1.")
        self.classes = classes
        self.class_values = class_values
        self.augmentation = default_augmentation() if augmentation is True else augmentation or None
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.on_missing: OnMissing = on_missing
        check_unlabelled(hidden_masks, unlabelled)
        self.hidden_masks = hidden_masks
        self.unlabelled = batch_size if unlabelled is None else unlabelled
        self.seed = seed
        self.public = public
        self._public: PublicImages | None = None
        self.manifest: Manifest
        self.teacher_maps: Maps | None = None
        self._coding: MaskCoding | None = None
        self._records: dict[str, Record] = {}

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Create what the layout creates (phantoms); downloads nothing."""
        self.layout.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Read records, masks and splits once; raise every DataError that training would meet.

        Raises:
            DataError: Bad input; the message names file or client, and the remedy.
        """
        if not self._records:
            self._read()
        if stage in (None, "fit"):
            self._check_batches()
            if self.public is not None and self._public is None:
                self._public = read_public(self.public, self.preprocessing, list(self._records.values()))

    def train_dataloader(self) -> Loader:
        """All hospitals pooled, or the one named by `client`."""
        return self.client_train_dataloader(self.client)

    def val_dataloader(self) -> list[Loader]:
        """One loader per hospital, in the order of `client_names`."""
        return [self.client_val_dataloader(client) for client in self.client_names()]

    def test_dataloader(self) -> list[Loader]:
        """One loader per hospital, every hospital, sorted by name."""
        return [self.client_test_dataloader(client) for client in self.manifest.clients()]

    # What the federated loop asks for

    def client_names(self) -> list[str]:
        """Return the hospitals that train, sorted: all of them, or the one named by `client`."""
        return [self.client] if self.client is not None else self.manifest.clients()

    def num_examples(self, client: str) -> int:
        """Return the number of a client's training images that have masks."""
        return len(self.manifest.of(client, "train"))

    def num_unlabelled(self, client: str | None) -> int:
        """Return the number of images that a client (None: all) learns from without a mask."""
        return len(self.manifest.of(client, UNLABELLED)) if self.unlabelled else 0

    def client_train_dataloader(self, client: str | None, round: int = 0) -> Loader:
        """Shuffled and augmented training batches of a client (None: of all, pooled); whole batches only.

        Where there are unlabelled images, each batch has `unlabelled` of them after those with masks, and says which
        are `labelled`. Those with masks, and the number of batches, are as they would be without.

        Args:
            client: The client's name.
            round: Federated round; -1 for the training of a teacher. Other rounds draw other numbers, and carry
                `teacher_maps` and unlabelled images if there are any.
        """
        splits = ("train",) if round < 0 else self._learned_from(client)
        dataset = self._dataset(client, splits, augment=True, maps=self.teacher_maps if round >= 0 else None)
        scope = (self._seed, round, client or "", *self._ranks())
        extra = self.unlabelled if dataset.labelled < len(dataset) else 0
        sampler = MixedSampler(dataset.ids, dataset.labelled, self.batch_size, extra, *scope)
        return self._loader(dataset, sampler, self.batch_size + extra, drop_last=True)

    def client_train_eval_dataloader(self, client: str | None) -> Loader:
        """Training images in order and as they are, then unlabelled ones; for caches and BatchNorm statistics."""
        return self._evaluation_loader(self._dataset(client, self._learned_from(client)))

    def client_val_dataloader(self, client: str | None) -> Loader:
        """Validation images of a client (None: of all)."""
        return self._evaluation_loader(self._dataset(client, ("val",)))

    def client_test_dataloader(self, client: str | None) -> Loader:
        """Test images of a client (None: of all), with masks of the original size."""
        return self._evaluation_loader(self._dataset(client, ("test",), original=True))

    def public_images(self) -> PublicImages | None:
        """Return the images of `public`, in order and as they are; None without such a folder, or before `setup`."""
        return self._public

    def export_info(self) -> dict[str, Any]:
        """Return all that prediction needs, as plain containers that a checkpoint can hold; call it after `setup`.

        Keys: image_size, resize, in_channels, mean, std, classes, class_values (raw mask value of each class).
        """
        values = self.class_values if self._coding is None else list(self._coding.values)
        return self.preprocessing.export() | {"classes": self.classes, "class_values": values}

    def fingerprint(self, client: str | None) -> str:
        """Return a SHA-256 over a client's training and validation files and their preprocessing; no paths."""
        return self.manifest.digest(client, ("train", "val"), self.export_info())

    def unlabelled_fingerprint(self, client: str | None) -> str:
        """Return a SHA-256 over the files of a client's unlabelled images; empty without any."""
        return self.manifest.digest(client, (UNLABELLED,), self.export_info()) if self.num_unlabelled(client) else ""

    def folders(self) -> list[str]:
        """Return the folders that images and masks lie in, with links resolved."""
        records = self._records.values()
        return real_folders(r.image for r in records) + real_folders(r.mask for r in records if r.mask)

    # Inside

    def _read(self) -> None:
        if self.trainer is None:  # used without Lightning, whose hook has created them otherwise
            self.prepare_data()
        self._seed = global_seed() if self.seed is None else self.seed
        records = self.layout.records(self.root, self.on_missing)
        self.manifest = self._partition(records)
        check_hidden(self.hidden_masks, self.manifest)
        if self.client is not None:
            self.manifest.check_client(self.client, str(self.root))
        used = {row.id for row in self.manifest.rows}
        records = [record for record in records if record.id in used]
        check_masks(records, self.manifest)
        self._coding = scan_masks(records, self.classes, self.class_values)
        self._reader = SampleReader(self.preprocessing, self._coding)
        # Last: says that all is read.
        self._records = {record.id: record for record in without_hidden(records, self.manifest)}

    def _partition(self, records: list[Record]) -> Manifest:
        if self.manifest_path is None:
            fractions = self.val_fraction, self.test_fraction
            return build_manifest(records, self.partitioner, *fractions, self._seed, self.hidden_masks)
        manifest = Manifest.read(Path(self.manifest_path).expanduser())
        manifest.verify(records)
        return manifest

    def _check_batches(self) -> None:
        """Every client that trains alone must fill a batch; plain Lightning pools them and needs one in all."""
        counts = {client: self.num_examples(client) for client in self.client_names()}
        without = {client: len(self.manifest.of(client, UNLABELLED)) for client in counts}
        pooled = self.trainer is not None and getattr(self.trainer, "federation", None) is None
        if pooled and min(counts.values()) > 0:
            counts = {self.client or f"all {len(counts)} clients pooled": sum(counts.values())}
        check_fills_batch(counts, without, self.batch_size, self._ranks()[0], self.root)

    def _ranks(self) -> tuple[int, int]:
        """Return world size and rank: the trainer's, or those of a single process."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _learned_from(self, client: str | None) -> tuple[str, ...]:
        """Return the splits that a client's student is trained on."""
        return ("train", UNLABELLED) if self.num_unlabelled(client) else ("train",)

    def _dataset(
        self,
        client: str | None,
        splits: tuple[str, ...],
        augment: bool = False,
        original: bool = False,
        maps: Maps | None = None,
    ) -> SegmentationDataset:
        if client is not None:
            self.manifest.check_client(client, str(self.root))
        rows = [row for split in splits for row in self.manifest.of(client, split)]
        return SegmentationDataset(
            [self._records[row.id] for row in rows],
            [row.client for row in rows],
            self._reader,
            self.augmentation if augment else None,
            original,
            maps,
        )

    def _evaluation_loader(self, dataset: SegmentationDataset) -> Loader:
        # Pads so that ranks make equally many steps; metrics drop the doubles by id.
        ranks, rank = self._ranks()
        return self._loader(dataset, DistributedSampler(dataset, ranks, rank, shuffle=False), self.batch_size)

    def _loader(
        self, dataset: SegmentationDataset, sampler: DistributedSampler[Any], batch_size: int, drop_last: bool = False
    ) -> Loader:
        on_gpu = self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=on_gpu,
            # Loaders draw a number at each start; from torch's own generator they would move the model's numbers.
            generator=torch.Generator().manual_seed(self._seed),
        )
