"""Patients are dealt whole, in the proportions promised, whatever the order of the records."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_med.data.manifest import SPLITS
from fkd_med.data.partition import IID, BySite, Dirichlet, Partitioner, QuantitySkew, build_manifest
from fkd_med.data.records import Record
from fkd_med.data.splits import split_patients
from fkd_med.errors import ConfigError, DataError


def people(*counts: int, client: str | None = None, prefix: str = "p") -> list[Record]:
    """Records of as many patients as counts, each with so many images."""
    return [
        Record(f"{prefix}{n:03d}-{i}", Path("none.png"), None, client, f"{prefix}{n:03d}")
        for n, count in enumerate(counts)
        for i in range(count)
    ]


def images_of(clients: dict[str, str], records: list[Record]) -> Counter[str]:
    return Counter(clients[record.patient] for record in records)


SIX_SITES = [record for n in range(6) for record in people(*[2] * 20, client=f"site{n}", prefix=f"s{n}-")]
ALL = [IID(3), Dirichlet(3, 0.5), QuantitySkew(3, 0.5)]


@pytest.mark.parametrize("partitioner", [*ALL, BySite()], ids=lambda p: type(p).__name__)
def test_order_of_records_does_not_matter_but_the_seed_does(partitioner: Partitioner) -> None:
    shuffled = random.Random(0).sample(SIX_SITES, len(SIX_SITES))
    dealt = partitioner.assign(SIX_SITES, 1)
    assert dealt == partitioner.assign(shuffled, 1)
    assert dealt.keys() == {record.patient for record in SIX_SITES}
    assert isinstance(partitioner, BySite) or dealt != partitioner.assign(SIX_SITES, 2)


def test_draws_are_pinned() -> None:
    """A change of these numbers would partition users' data anew."""
    dealt = IID(2).assign(people(*[1] * 6), 0)
    assert "".join(dealt[f"p{n:03d}"][-1] for n in range(6)) == "222111"
    split = split_patients(people(*[1] * 8), 0.25, 0.25, 0, "a")
    assert "".join(split[f"p{n:03d}"][1] for n in range(8)) == "erarrera"


def test_by_site_keeps_sites_and_needs_them() -> None:
    assert set(BySite().assign(SIX_SITES, 0).values()) == {f"site{n}" for n in range(6)}
    with pytest.raises(DataError, match=r"which hospital.*IID"):
        BySite().assign(people(1, 1), 0)
    both = [*people(1, client="a"), Record("other", Path("x"), None, "b", "p000")]
    with pytest.raises(DataError, match=r"more than one client: p000 \(a, b\)"):
        BySite().assign(both, 0)


@pytest.mark.parametrize("seed", range(5))
def test_iid_gives_each_hospital_about_a_third_of_the_images(seed: int) -> None:
    sequences = [25, 25, 17, 11, 25, 23, 25, 26, 22, 6, 21, 25, 25, 21, 20, 25, 21, 20, 25, 21, 19, 19, 12]
    records = people(*sequences)
    held = images_of(IID(3).assign(records, seed), records)
    assert sorted(held) == ["hospital-1", "hospital-2", "hospital-3"]
    assert max(held.values()) - min(held.values()) <= 12


def test_iid_mixes_sites() -> None:
    dealt = IID(3).assign(SIX_SITES, 0)
    met = {(record.client, dealt[record.patient]) for record in SIX_SITES}
    assert len(met) == 6 * 3


def test_a_giant_patient_does_not_leave_its_hospital_without_test_patients() -> None:
    held = Counter(IID(3).assign(people(100, *[1] * 20), 0).values())
    assert min(held.values()) == 3


@pytest.mark.parametrize("partitioner", ALL, ids=lambda p: type(p).__name__)
def test_more_clients_than_patients_is_an_error(partitioner: Partitioner) -> None:
    with pytest.raises(DataError, match="3 clients, but the set has 2 patients"):
        partitioner.assign(people(5, 5, client="a"), 0)
    assert sorted(partitioner.assign(people(5, 5, 5, client="a"), 0).values()) == [f"hospital-{n}" for n in (1, 2, 3)]


def test_names_sort_by_number() -> None:
    names = sorted(set(IID(11).assign(people(*[1] * 40), 0).values()))
    assert names == [f"hospital-{n:02d}" for n in range(1, 12)]


def skew(partitioner: Partitioner, records: list[Record], kind: dict[str, str]) -> float:
    """Mean distance (total variation) between a kind's distribution over clients and all patients'."""
    distances = []
    for seed in range(10):
        dealt = partitioner.assign(records, seed)
        clients = sorted(set(dealt.values()))
        overall = np.array([list(dealt.values()).count(c) for c in clients]) / len(dealt)
        for one in set(kind.values()):
            own = [dealt[p] for p in dealt if kind[p] == one]
            distances.append(0.5 * np.abs(np.array([own.count(c) for c in clients]) / len(own) - overall).sum())
    return float(np.mean(distances))


def test_dirichlet_separates_sites_when_alpha_is_small() -> None:
    kind = {record.patient: str(record.client) for record in SIX_SITES}
    assert skew(Dirichlet(3, 0.1), SIX_SITES, kind) > 0.4
    assert skew(Dirichlet(3, 1000), SIX_SITES, kind) < 0.1


def test_dirichlet_by_foreground_separates_lesion_sizes(tmp_path: Path) -> None:
    records = []
    for n in range(40):
        mask = np.zeros((40, 40), np.uint8)
        mask[:n] = 255
        Image.fromarray(mask).save(tmp_path / f"{n}.png")
        records.append(Record(f"{n:02d}", tmp_path / "none.png", tmp_path / f"{n}.png"))
    kind = {record.id: str(int(record.id) // 10) for record in records}
    assert skew(Dirichlet(3, 0.1, by="foreground"), records, kind) > 0.3
    assert skew(Dirichlet(3, 1000, by="foreground"), records, kind) < 0.1


def test_dirichlet_without_sites_says_what_to_do() -> None:
    with pytest.raises(DataError, match="by: foreground"):
        Dirichlet(2).assign(people(1, 1, 1), 0)
    with pytest.raises(ConfigError, match="site or foreground"):
        Dirichlet(2, by="colour").assign(people(1, 1, 1), 0)  # type: ignore[arg-type]


def test_quantity_skew_follows_alpha_and_leaves_nobody_poor() -> None:
    records = people(*[2] * 90)

    def largest(alpha: float) -> float:
        shares = [max(images_of(QuantitySkew(3, alpha).assign(records, s), records).values()) / 180 for s in range(10)]
        return float(np.mean(shares))

    assert largest(0.3) > 0.6
    assert largest(1000) < 0.4
    for seed in range(20):
        assert min(Counter(QuantitySkew(3, 0.05).assign(records, seed).values()).values()) >= 3


@pytest.mark.parametrize("alpha", [0, -1, float("nan")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        QuantitySkew(2, alpha).assign(people(1, 1, 1), 0)


def test_splits_approach_the_fractions_by_images() -> None:
    records = people(*[5, 25, 10, 20, 12, 18, 8, 30, 15, 7])
    for seed in range(10):
        split = split_patients(records, 0.1, 0.2, seed)
        held = images_of(split, records)
        assert abs(held["train"] - 105) <= 10 and abs(held["val"] - 15) <= 10 and abs(held["test"] - 30) <= 10


def test_three_patients_fill_three_splits_and_two_do_not() -> None:
    for seed in range(10):
        assert sorted(split_patients(people(1, 50, 1), 0.01, 0.01, seed).values()) == sorted(SPLITS)
    with pytest.raises(DataError, match=r"client north has 2 patients.*val_fraction"):
        split_patients(people(5, 5), 0.1, 0.2, 0, "north")
    assert set(split_patients(people(5, 5), 0, 0.2, 0).values()) == {"train", "test"}
    assert set(split_patients(people(5), 0, 0, 0).values()) == {"train"}


@pytest.mark.parametrize(("val", "test"), [(0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.1)])
def test_impossible_fractions(val: float, test: float) -> None:
    with pytest.raises(ConfigError, match="val_fraction"):
        split_patients(people(1, 1, 1), val, test, 0)


def on_disk(tmp_path: Path, records: list[Record], **changes: str) -> list[Record]:
    (tmp_path / "i.png").write_bytes(b"i")
    return [Record(r.id, tmp_path / "i.png", tmp_path / "i.png", r.client, r.patient, r.split) for r in records]


def test_manifest_never_parts_a_patient(tmp_path: Path) -> None:
    records = on_disk(tmp_path, people(*[7, 3, 5, 9, 2, 8, 6, 4, 5, 5, 3, 1]))
    manifest = build_manifest(records, IID(3), 0.2, 0.2, 0)
    assert len(manifest) == len(records)
    places = defaultdict(set)
    for row in manifest.rows:
        places[row.patient].add((row.client, row.split))
    assert all(len(at) == 1 for at in places.values())
    assert all(manifest.of(client, split) for client in manifest.clients() for split in SPLITS)
    shuffled = random.Random(1).sample(records, len(records))
    assert build_manifest(shuffled, IID(3), 0.2, 0.2, 0) == manifest


def test_one_hospitals_split_does_not_depend_on_another(tmp_path: Path) -> None:
    north = on_disk(tmp_path, people(*[2] * 10, client="north", prefix="n"))
    south = on_disk(tmp_path, people(*[2] * 10, client="south", prefix="s"))
    alone, both = build_manifest(north, BySite()), build_manifest(north + south, BySite())
    assert [row for row in both.rows if row.client == "north"] == list(alone.rows)


def given(splits: dict[str, str | None], tmp_path: Path) -> list[Record]:
    (image := tmp_path / "i.png").write_bytes(b"i")
    return [Record(i, image, image, "a", i.split("-")[0], split) for i, split in splits.items()]


def test_a_given_split_wins(tmp_path: Path) -> None:
    records = given({"p1-a": "test", "p1-b": "test", "p2-a": "train", "p3-a": "val"}, tmp_path)
    manifest = build_manifest(records, BySite(), 0.5, 0.0, 0)
    assert {row.id: row.split for row in manifest.rows} == {r.id: r.split for r in records}


def test_a_patient_in_two_given_splits_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more than one split: p1 \(test, train\)"):
        build_manifest(given({"p1-a": "test", "p1-b": "train"}, tmp_path), BySite())
    with pytest.raises(DataError, match=r"not for p2-a\."):
        build_manifest(given({"p1-a": "test", "p2-a": None}, tmp_path), BySite())


def test_no_records_is_an_error() -> None:
    with pytest.raises(DataError, match="no image"):
        build_manifest([], BySite())
