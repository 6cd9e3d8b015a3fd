"""Manifests and partitions of anything: what is written comes back, no bytes crash, no patient is divided."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fkd_med.data.manifest import Manifest, ManifestRow
from fkd_med.data.pairing import read_clients
from fkd_med.data.partition import IID, BySite, Dirichlet, Partitioner, QuantitySkew
from fkd_med.data.records import Record, check_client_name, is_writable_name
from fkd_med.data.splits import split_patients
from fkd_med.errors import DataError

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(is_writable_name)


def is_client(name: str) -> bool:
    try:
        return bool(check_client_name(name, "test"))
    except DataError:
        return False


ROWS = st.dictionaries(NAMES, st.tuples(NAMES.filter(is_client), st.sampled_from(["train", "val", "test"])), min_size=1)


@SETTINGS
@given(ROWS)
def test_a_manifest_of_any_legal_names_comes_back(tmp_path: Path, rows: dict[str, tuple[str, str]]) -> None:
    manifest = Manifest(ManifestRow(name, client, split, f"p of {name}", "0") for name, (client, split) in rows.items())
    manifest.write(tmp_path / "manifest.csv")
    assert Manifest.read(tmp_path / "manifest.csv") == manifest


@pytest.mark.parametrize("name", ["a\rb", "a\nb", "a\0b", "a\x1bb", "a\u2028b", "a\udcffb"])
def test_names_that_would_not_come_back_are_refused(name: str) -> None:
    for id, patient in ((name, "p"), ("a", name)):
        with pytest.raises(DataError, match="control characters") as caught:
            Manifest([ManifestRow(id, "client", "train", patient, "0")])
        assert str(caught.value).isprintable()


HEADERS = st.sampled_from([b"", b"id,client,split,patient,sha256\n", b"\xef\xbb\xbfid,client,patient,split\r\n"])


@SETTINGS
@given(HEADERS, st.one_of(st.binary(max_size=400), st.text('",\n\r\0aé;/. ', max_size=80).map(str.encode)))
def test_no_bytes_are_more_than_a_data_error(tmp_path: Path, header: bytes, rest: bytes) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(header + rest)
    for read in (Manifest.read, read_clients):
        with contextlib.suppress(DataError):
            read(path)


def records(counts: list[int]) -> list[Record]:
    """Return the images of patients, some of each of two sites."""
    return [
        Record(f"{patient}-{image}", Path("x.png"), None, "ab"[patient % 2], f"p{patient}")
        for patient, count in enumerate(counts)
        for image in range(count)
    ]


PARTITIONERS = st.one_of(
    st.builds(IID, st.integers(1, 6)),
    st.builds(Dirichlet, st.integers(1, 6), st.floats(0.01, 100), st.just("site")),
    st.builds(QuantitySkew, st.integers(1, 6), st.floats(0.01, 100)),
    st.just(BySite()),
)


@SETTINGS
@given(PARTITIONERS, st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(0, 2**32), st.randoms())
def test_every_patient_is_dealt_once_and_no_client_is_empty(
    partitioner: Partitioner, counts: list[int], seed: int, order: st.RandomObject
) -> None:
    images = records(counts)
    wanted = getattr(partitioner, "clients", len({record.client for record in images}))
    if wanted > len(counts):
        with pytest.raises(DataError, match="never divided"):
            partitioner.assign(images, seed)
        return
    dealt = partitioner.assign(images, seed)
    assert dealt.keys() == {record.patient for record in images}
    assert len(set(dealt.values())) == wanted
    if len(counts) >= 3 * wanted and not isinstance(partitioner, BySite):
        assert min(list(dealt.values()).count(client) for client in dealt.values()) >= 3
    order.shuffle(images)
    assert partitioner.assign(images, seed) == dealt


@SETTINGS
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30), st.floats(0, 0.49), st.floats(0, 0.49), st.integers(0, 2**32)
)
def test_every_patient_is_in_one_split_and_no_split_is_empty(
    counts: list[int], val: float, test: float, seed: int
) -> None:
    wanted = {"train", *(["val"] if val > 0 else []), *(["test"] if test > 0 else [])}
    if len(counts) < len(wanted):
        with pytest.raises(DataError, match="too few"):
            split_patients(records(counts), val, test, seed)
        return
    split = split_patients(records(counts), val, test, seed)
    assert split.keys() == {f"p{patient}" for patient in range(len(counts))}
    assert set(split.values()) == wanted
    assert split_patients(reversed(records(counts)), val, test, seed) == split
