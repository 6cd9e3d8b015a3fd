"""Images to learn from without a mask: which they are, and how they stand beside the others in a batch.

Hospitals have far more images than masks. A teacher can say something of any image, so distillation learns from all of
them, and the supervised loss from those with a mask.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fkd_med.data.manifest import UNLABELLED, Manifest
from fkd_med.data.records import Record, listing
from fkd_med.data.sampling import SeededIndex, SeededSampler
from fkd_med.errors import ConfigError, DataError
from fkd_med.seeding import derive_seed

_log = logging.getLogger(__name__)


def with_unlabelled(
    records: Sequence[Record], clients: Mapping[str, str], splits: Mapping[str, str], hidden: float, seed: int
) -> dict[str, str]:
    """Say which images are unlabelled: those without a mask, and as many others as are to be hidden.

    Images without a mask that are to validate or test, or whose patients do, are left out: nobody can be scored by
    them, and training would see who is tested.

    Args:
        records: The images, with masks and without.
        clients: Patient -> client.
        splits: Image with a mask -> its split; ``unlabelled`` where the data say that a mask is not to be used.
        hidden: Share of each client's training images whose masks are hidden, by whole patients.
        seed: Of the choice of these patients.

    Returns:
        Image -> ``train``, ``val``, ``test`` or ``unlabelled``.

    Raises:
        DataError: A client has only one patient to train on, so that no mask can be hidden; it is named.
    """
    of_patient = {record.patient: splits[record.id] for record in records if record.id in splits}
    away = _hidden_patients(records, clients, splits, hidden, seed)
    found, left_out = {}, []
    for record in records:
        split = splits.get(record.id, UNLABELLED)
        if record.mask is None and {record.split, of_patient.get(record.patient)} & {"val", "test"}:
            left_out.append(record.id)
        else:
            found[record.id] = UNLABELLED if split == "train" and record.patient in away else split
    if left_out:
        _log.warning(
            "Left out %d images without mask, since they or others of their patients are for validation or test: %s.",
            len(left_out), listing(left_out),
        )  # fmt: skip
    return found


def _hidden_patients(
    records: Sequence[Record], clients: Mapping[str, str], splits: Mapping[str, str], hidden: float, seed: int
) -> set[str]:
    """Choose the patients whose masks are hidden: client by client, until the share is reached; never all."""
    if hidden == 0:
        return set()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if splits.get(record.id) == "train":
            counts[clients[record.patient]][record.patient] += 1
    away: set[str] = set()
    for client, images in counts.items():
        if len(images) < 2:
            raise DataError(
                f"data.hidden_masks: client {client!r} has one patient to train on, whose masks would all be hidden. "
                "Set it to 0, or use fewer, larger clients."
            )
        names = sorted(images)
        order = [names[i] for i in np.random.default_rng(derive_seed(seed, "hidden", client)).permutation(len(names))]
        wanted = hidden * images.total()
        for name in order[:-1]:
            if wanted >= images[name] / 2:  # the nearest that whole patients allow
                away.add(name)
                wanted -= images[name]
    return away


def without_hidden(records: Sequence[Record], manifest: Manifest) -> list[Record]:
    """Return the records with the masks that the manifest lets be used: those of unlabelled images are not."""
    hidden = {row.id for row in manifest.of(None, UNLABELLED)}
    return [replace(record, mask=None) if record.id in hidden else record for record in records]


def check_masks(records: Sequence[Record], manifest: Manifest) -> None:
    """Refuse a manifest that wants masks which are not there; DataError names the images."""
    split = {row.id: row.split for row in manifest.rows}
    bare = [str(record.image) for record in records if record.mask is None and split[record.id] != UNLABELLED]
    if bare:
        raise DataError(f"{manifest.source}: {len(bare)} images have no mask and are not unlabelled: {listing(bare)}.")


def check_hidden(hidden: float, manifest: Manifest) -> None:
    """Refuse to hide masks where none are hidden: too small a share, or a manifest that says so (DataError).

    Beside a manifest, as a run that goes on has its own, the manifest says whose masks are not used.
    """
    if hidden and not manifest.of(None, UNLABELLED):
        raise DataError(
            f"data.hidden_masks: {hidden}, but {manifest.source} has no image whose mask is hidden (split unlabelled): "
            "leave data.manifest out, which says whose masks are used, or give a larger share, of whole patients."
        )


def check_unlabelled(hidden: float, number: int | None) -> None:
    """Refuse settings of images without masks that make no sense (ConfigError)."""
    if not 0 <= hidden < 1:
        raise ConfigError(f"data.hidden_masks: {hidden}; give a share from 0 to below 1: some masks must be left.")
    if number is not None and number < 0:
        raise ConfigError(f"data.unlabelled: {number}; give 0 or more images per batch, or null for data.batch_size.")


class MixedSampler(SeededSampler):
    """Yield whole batches of images with masks, each followed by some without: (index, seed), drawn anew each epoch.

    Images with masks come exactly as `SeededSampler` brings them, whatever the number of others, so that what learns
    from masks only sees the same batches. Of the others each batch gets `extra`; an epoch goes through them as often as
    its batches need, and a repeated image is augmented anew.

    Args:
        ids: Ids of all images, those with masks first.
        labelled: How many have masks.
        batch: Images with masks in a batch.
        extra: Images without masks in a batch; 0 where there are none.
        seed: The run's seed.
        round: Federated round.
        client: The client's name; empty when all are pooled.
        num_replicas: Number of ranks.
        rank: This process's rank.
    """

    def __init__(
        self, ids: Sequence[str], labelled: int, batch: int, extra: int, seed: int, round: int, client: str,
        num_replicas: int = 1, rank: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(ids[:labelled], seed, round, client, num_replicas, rank)
        self.more = list(ids[labelled:])
        self.batch, self.extra = batch, extra

    @property
    def batches(self) -> int:
        """The number of whole batches of this rank in an epoch."""
        return self.num_samples // self.batch

    def __len__(self) -> int:
        return self.batches * (self.batch + self.extra)

    def __iter__(self) -> Iterator[SeededIndex]:
        labelled, others = super().__iter__(), self._others()
        for _ in range(self.batches):
            for source, number in ((labelled, self.batch), (others, self.extra)):
                for _ in range(number):
                    yield next(source)

    def _others(self) -> Iterator[SeededIndex]:
        """Yield this rank's images without masks, for ever."""
        scope = (self.seed, self.round, self.client, self.epoch)
        order = np.random.default_rng(derive_seed(*scope, UNLABELLED)).permutation(len(self.more)).tolist()
        place = self.rank
        while True:
            turn, index = place // len(order), order[place % len(order)]
            yield len(self.ids) + index, derive_seed(*scope, self.more[index], turn)
            place += self.num_replicas
