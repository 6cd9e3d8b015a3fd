"""Train, validation and test inside one client: whole patients, fractions approached by image counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from fkd_med.data.records import Record
from fkd_med.errors import ConfigError, DataError
from fkd_med.seeding import derive_seed

_TRIES = 20  # random orders of the patients, of which the one that meets the fractions best is kept


def split_patients(
    records: Iterable[Record], val_fraction: float, test_fraction: float, seed: int, client: str = ""
) -> dict[str, str]:
    """Split one client's patients into train, val and test.

    Each split with a fraction above 0 gets at least one patient. The draw depends on the seed, the client's name and
    its patients' names and image counts; other clients and the order of records do not matter.

    Args:
        records: The client's images.
        val_fraction: Share of the images for validation.
        test_fraction: Share of the images for test.
        seed: Seed of the draw.
        client: Name of the client, part of the seed and of messages.

    Returns:
        Patient -> ``train``, ``val`` or ``test``.

    Raises:
        DataError: The client has fewer patients than splits.
        ConfigError: A fraction is negative, or nothing is left for training.
    """
    shares = _shares(val_fraction, test_fraction)
    counts = Counter(record.patient for record in records)
    if len(counts) < len(shares):
        raise DataError(
            f"client {client or '?'} has {len(counts)} patients, too few to fill {', '.join(shares)} without dividing "
            "one. Use another partitioner or fewer clients, set data.val_fraction or data.test_fraction to 0, or give "
            "a `split` column in clients.csv."
        )
    names = sorted(counts)
    rng = np.random.default_rng(derive_seed(seed, "split", client))
    orders = ([names[place] for place in rng.permutation(len(names))] for _ in range(_TRIES))
    return min((_deal(order, counts, shares) for order in orders), key=lambda split: _error(split, counts, shares))


def _shares(val_fraction: float, test_fraction: float) -> dict[str, float]:
    """Return split -> share, without the splits nobody wants."""
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise ConfigError(
            f"data.val_fraction ({val_fraction}) and data.test_fraction ({test_fraction}) must not be negative, and "
            "together stay below 1."
        )
    shares = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    return {split: share for split, share in shares.items() if share > 0}


def _deal(order: list[str], counts: Counter[str], shares: dict[str, float]) -> dict[str, str]:
    """Give each patient to the split most short of its share, then one to each split left empty."""
    short = {split: share * counts.total() for split, share in shares.items()}
    dealt = {}
    for patient in order:
        split = max(short, key=lambda name: short[name])
        dealt[patient] = split
        short[split] -= counts[patient]
    for empty in [split for split in shares if split not in dealt.values()]:
        held = Counter(dealt.values())
        spare = [name for name in order if held[dealt[name]] > 1]
        dealt[min(spare, key=lambda name: counts[name])] = empty
    return dealt


def _error(split: dict[str, str], counts: Counter[str], shares: dict[str, float]) -> float:
    """Return how far the image counts are from the shares, in images."""
    held: Counter[str] = Counter()
    for patient, name in split.items():
        held[name] += counts[patient]
    return sum(abs(held[name] - share * counts.total()) for name, share in shares.items())
