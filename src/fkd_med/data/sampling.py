"""Which sample comes when, and with which seed: the only place where data order is drawn.

albumentations ignores ``seed_everything`` and repeats itself across workers and epochs, so the sampler hands
out ``(index, seed)`` and the dataset seeds its augmentation with it. Everything derives from (seed, round,
client, epoch, sample id): the number of workers, a crash or another client's presence change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DistributedSampler

from fkd_med.errors import DataError
from fkd_med.seeding import derive_seed

SeededIndex = tuple[int, int]


class SeededSampler(DistributedSampler[SeededIndex]):
    """Yield (index, seed) in an order drawn anew each epoch, sharded over ranks.

    Short ranks are padded with the first samples of the permutation, so that all make equally many steps.
    Being a DistributedSampler, Lightning leaves it in place and calls `set_epoch`.

    Args:
        ids: Sample ids, in dataset order.
        seed: The run's seed.
        round: Federated round; -1 while a teacher is trained.
        client: The client's name; empty when all are pooled.
        num_replicas: Number of ranks.
        rank: This process's rank.
    """

    def __init__(
        self, ids: Sequence[str], seed: int, round: int, client: str, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(ids, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.ids = ids
        self.round = round
        self.client = client

    def __iter__(self) -> Iterator[SeededIndex]:
        scope = (self.seed, self.round, self.client, self.epoch)
        order = np.random.default_rng(derive_seed(*scope)).permutation(len(self.ids))
        padded = np.resize(order, self.total_size)  # repeats from the start
        for index in padded[self.rank :: self.num_replicas].tolist():
            yield index, derive_seed(*scope, self.ids[index])


def check_fills_batch(
    counts: Mapping[str, int], without: Mapping[str, int], batch_size: int, devices: int, root: Path
) -> None:
    """Refuse clients whose training images with masks do not fill a batch on every device.

    Args:
        counts: Client -> number of these images.
        without: Client -> number of images to learn from that have no mask.
        batch_size: Images per batch and device.
        devices: Number of devices.
        root: Folder of the data set, for the message.

    Raises:
        DataError: Names the first such client and the remedies.
    """
    for client, count in counts.items():
        if count == 0 and without.get(client):
            raise DataError(
                f"{root}: client {client!r} has {without[client]} images without a mask and none with one to train on. "
                "Each client needs some: draw masks for a few of its patients, give its images to another client in "
                "clients.csv, or take them out."
            )
        if count < batch_size * devices:
            raise DataError(
                f"{root}: client {client!r} has {count} training image(s), fewer than one batch of "
                f"{batch_size * devices} (data.batch_size={batch_size} on {devices} device(s)). Lower data.batch_size, "
                "lower data.val_fraction and data.test_fraction, or use fewer, larger clients."
            )
