"""Who holds which patient: partitioners deal patients to clients, `build_manifest` splits each client's own.

Patients, never images, are dealt: frames of one video or slices of one scan are near-duplicates. Draws depend on the
seed and on patients' names and image counts, not on the order of the records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from fkd_med.data.images import read_mask
from fkd_med.data.manifest import Manifest, ManifestRow, hash_record
from fkd_med.data.progress import with_progress
from fkd_med.data.records import Record, listing
from fkd_med.data.splits import split_patients
from fkd_med.data.unlabelled import with_unlabelled
from fkd_med.errors import ConfigError, DataError
from fkd_med.seeding import derive_seed

_ENOUGH = 3  # patients for train, validation and test
_BANDS = 4  # bands of foreground share that Dirichlet deals apart


class Partitioner(ABC):
    """Deals the patients of a set to clients."""

    @abstractmethod
    def assign(self, records: list[Record], seed: int) -> dict[str, str]:
        """Return patient -> client for all patients of `records`.

        Raises:
            DataError: The set cannot be dealt like this; says why and what to do.
        """


class BySite(Partitioner):
    """Every natural client (hospital, site) of the set is a client."""

    def assign(self, records: list[Record], seed: int) -> dict[str, str]:
        """Return patient -> its own site; the seed plays no part."""
        return _sites(records, "Give a clients.csv, or deal patients out with data.partitioner: IID.")


class IID(Partitioner):
    """Deals patients at random to clients with about equal numbers of images, whatever site they come from.

    Patients with the most images go first, each to the client with the fewest images so far.

    Args:
        clients: Number of clients, named hospital-1, hospital-2, ...
    """

    def __init__(self, clients: int = 3) -> None:
        self.clients = clients

    def assign(self, records: list[Record], seed: int) -> dict[str, str]:
        """Return patient -> client. See `Partitioner.assign`."""
        counts = _counts(records, self.clients)
        order = _shuffled(counts, np.random.default_rng(derive_seed(seed, "partition", "iid")))
        dealt: list[list[str]] = [[] for _ in range(self.clients)]
        images = [0] * self.clients
        for patient in sorted(order, key=lambda name: -counts[name]):
            fewest = images.index(min(images))
            dealt[fewest].append(patient)
            images[fewest] += counts[patient]
        return _named(dealt, counts)


class Dirichlet(Partitioner):
    """Deals every kind of patient in unequal shares: clients differ in what they see and in how much.

    For each kind, the clients' shares are drawn from a symmetric Dirichlet distribution (as Hsu et al. 2019,
    arXiv:1909.06335, do for class labels), and patients go, in random order, to the client most short of its share.
    No client is left with less than three patients if there are three for each (else one).

    Args:
        clients: Number of clients, named hospital-1, hospital-2, ...
        alpha: Concentration: 100 is nearly equal, 0.1 gives most of a kind to one client.
        by: What makes a kind: the natural ``site``, or a quarter of the patients by mean ``foreground`` share of
            their masks (small lesions here, large ones there), which needs no sites but reads all masks.
    """

    def __init__(self, clients: int = 3, alpha: float = 0.5, by: Literal["site", "foreground"] = "site") -> None:
        self.clients = clients
        self.alpha = alpha
        self.by = by

    def assign(self, records: list[Record], seed: int) -> dict[str, str]:
        """Return patient -> client. See `Partitioner.assign`."""
        if self.by not in ("site", "foreground"):
            raise ConfigError(f"Dirichlet: by must be site or foreground, not {self.by!r}.")
        remedy = "Give a clients.csv, or use Dirichlet with by: foreground."
        kinds = _sites(records, remedy) if self.by == "site" else _bands(records)
        return _deal_unequally(records, kinds, self.clients, self.alpha, derive_seed(seed, "partition", "dirichlet"))


class QuantitySkew(Partitioner):
    """Deals patients at random, but some clients get many and some few.

    The clients' shares of the images are one draw from a symmetric Dirichlet distribution; no client is left with
    less than three patients if there are three for each (else one).

    Args:
        clients: Number of clients, named hospital-1, hospital-2, ...
        alpha: Concentration: 100 is nearly equal, 0.5 very unequal.
    """

    def __init__(self, clients: int = 3, alpha: float = 1.0) -> None:
        self.clients = clients
        self.alpha = alpha

    def assign(self, records: list[Record], seed: int) -> dict[str, str]:
        """Return patient -> client. See `Partitioner.assign`."""
        kinds = dict.fromkeys((record.patient for record in records), "all")
        return _deal_unequally(records, kinds, self.clients, self.alpha, derive_seed(seed, "partition", "quantity"))


def build_manifest(
    records: Iterable[Record],
    partitioner: Partitioner,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    hidden_masks: float = 0.0,
) -> Manifest:
    """Deal patients to clients, split each client's patients, hash the files.

    A split that the records carry (the `split` column of clients.csv) is kept. Images without a mask are
    ``unlabelled``, or left out (see `with_unlabelled`).

    Args:
        records: The whole set, in any order.
        partitioner: Who deals the patients.
        val_fraction: Share of each client's images for validation; 0 for none.
        test_fraction: Share of each client's images for test; 0 for none.
        seed: Of all draws.
        hidden_masks: Share of each client's training images whose masks are not used, by whole patients.

    Raises:
        DataError: Double ids, a patient in two clients or splits, too few patients; named.
    """
    ordered = sorted(records, key=lambda record: record.id)
    if not any(record.mask for record in ordered):
        raise DataError("The data set has no image with a mask.")
    clients = partitioner.assign(ordered, seed)
    labelled = [record for record in ordered if record.mask is not None]
    splits = _splits(labelled, clients, val_fraction, test_fraction, seed)
    of_image = with_unlabelled(ordered, clients, splits, hidden_masks, seed)
    used = [record for record in ordered if record.id in of_image]
    return Manifest(
        ManifestRow(record.id, clients[record.patient], of_image[record.id], record.patient, hash_record(record))
        for record in with_progress(used, "Hashing files")
    )


def _splits(
    records: Sequence[Record], clients: dict[str, str], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, str]:
    """Return image -> split: its own, or drawn per client."""
    given = [record.split for record in records if record.split is not None]
    if given and len(given) < len(records):
        bare = [record.id for record in records if record.split is None]
        raise DataError(f"The split is given for some images but not for {listing(bare)}. Give all or none.")
    if given:
        return {record.id: str(record.split) for record in records}
    of_client: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of_client[clients[record.patient]].append(record)
    drawn: dict[str, str] = {}
    for client, own in of_client.items():
        drawn |= split_patients(own, val_fraction, test_fraction, seed, client)
    return {record.id: drawn[record.patient] for record in records}


def _counts(records: Iterable[Record], clients: int) -> Counter[str]:
    """Count images per patient; refuse more clients than patients."""
    counts = Counter(record.patient for record in records)
    if clients < 1:
        raise ConfigError(f"data.partitioner: clients must be at least 1, not {clients}.")
    if len(counts) < clients:
        raise DataError(
            f"{clients} clients, but the set has {len(counts)} patients, and a patient is never divided. Lower the "
            "partitioner's `clients`."
        )
    return counts


def _shuffled(patients: Iterable[str], rng: np.random.Generator) -> list[str]:
    names = sorted(patients)
    return [names[place] for place in rng.permutation(len(names))]


def _sites(records: Iterable[Record], remedy: str) -> dict[str, str]:
    """Return patient -> natural client."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.client is None:
            raise DataError(f"{record.image}: this set does not say which hospital an image is from. {remedy}")
        found[record.patient].add(record.client)
    parted = [f"{patient} ({', '.join(sorted(sites))})" for patient, sites in sorted(found.items()) if len(sites) > 1]
    if parted:
        raise DataError(
            f"Patients at more than one client: {listing(parted)}. If these are different people, give them different "
            "names in clients.csv; else give all images of a patient to one client."
        )
    return {patient: sites.pop() for patient, sites in found.items()}


def _bands(records: Sequence[Record]) -> dict[str, str]:
    """Return patient -> quarter of the patients by mean foreground share of their masks."""
    shares: dict[str, list[float]] = defaultdict(list)
    for record in with_progress(records, "Reading masks"):
        if record.mask is None:
            raise DataError(f"{record.image}: has no mask; Dirichlet with by: foreground needs one for each image.")
        shares[record.patient].append(float(np.mean(read_mask(record.mask) != 0)))
    order = sorted(shares, key=lambda patient: (float(np.mean(shares[patient])), patient))
    return {patient: str(place * _BANDS // len(order)) for place, patient in enumerate(order)}


def _deal_unequally(
    records: Iterable[Record], kinds: dict[str, str], clients: int, alpha: float, seed: int
) -> dict[str, str]:
    """Deal each kind of patient by shares drawn from a Dirichlet distribution."""
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"data.partitioner: alpha must be above 0, not {alpha}.")
    counts = _counts(records, clients)
    rng = np.random.default_rng(seed)
    dealt: list[list[str]] = [[] for _ in range(clients)]
    for kind in sorted(set(kinds.values())):
        order = _shuffled((name for name in counts if kinds[name] == kind), rng)
        short = rng.dirichlet([alpha] * clients) * sum(counts[name] for name in order)
        for patient in order:
            client = int(np.argmax(short))
            dealt[client].append(patient)
            short[client] -= counts[patient]
    return _named(dealt, counts)


def _named(dealt: list[list[str]], counts: Counter[str]) -> dict[str, str]:
    """Return patient -> hospital-<n>, after giving poor clients the smallest patients of the richest."""
    enough = _ENOUGH if len(counts) >= _ENOUGH * len(dealt) else 1
    while len(poor := min(dealt, key=len)) < enough:
        rich = max((hand for hand in dealt if len(hand) > enough), key=lambda hand: sum(counts[name] for name in hand))
        smallest = min(rich, key=lambda name: (counts[name], name))
        rich.remove(smallest)
        poor.append(smallest)
    digits = len(str(len(dealt)))
    return {name: f"hospital-{place:0{digits}d}" for place, hand in enumerate(dealt, 1) for name in hand}
