"""The three real sets beside the checkout are read whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from fkd_med.data.check import check_data
from fkd_med.data.layouts import ChestXrayMasks, CVCClinicDB, FolderPair, Layout, cvc_sequence
from fkd_med.data.manifest import SPLITS, Manifest
from fkd_med.data.masks import MaskCoding, scan_masks
from fkd_med.data.partition import IID, BySite, Partitioner, build_manifest

pytestmark = pytest.mark.data


@pytest.mark.parametrize(
    ("name", "layout", "partitioner", "images", "patients", "clients"),
    [
        ("cvc-clinicdb", CVCClinicDB(), IID(3), 480, 23, 3),
        ("chest-xray-lungs", ChestXrayMasks(), BySite(), 353, 225, 7),
        ("dsb2018-nuclei", FolderPair(), BySite(), 664, 664, 4),
    ],
)
def test_real_sets(
    shared_data: Path,
    tmp_path: Path,
    name: str,
    layout: Layout,
    partitioner: Partitioner,
    images: int,
    patients: int,
    clients: int,
) -> None:
    records = layout.records(shared_data / name)
    assert len(records) == images and len({record.patient for record in records}) == patients
    assert scan_masks(records) == MaskCoding(1, (0, 255))
    manifest = build_manifest(records, partitioner, 0.1, 0.2, 7)
    assert len(manifest) == images and len(manifest.clients()) == clients
    assert all(manifest.of(client, split) for client in manifest.clients() for split in SPLITS)
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert len(manifest.of(None, split)) / images == pytest.approx(share, abs=0.04)
    manifest.write(tmp_path / "manifest.csv")
    Manifest.read(tmp_path / "manifest.csv").verify(records)


def test_sequences_of_the_public_numbering_are_those_of_the_folder(shared_data: Path) -> None:
    for record in CVCClinicDB().records(shared_data / "cvc-clinicdb"):
        assert cvc_sequence(record.id, record.image) == record.patient


def test_check_on_real_images(shared_data: Path) -> None:
    records = ChestXrayMasks().records(shared_data / "chest-xray-lungs")[::10]
    report = check_data(records, build_manifest(records, IID(2), 0.2, 0.2, 0), MaskCoding(1, (0, 255)))
    assert report.errors == [] and report.duplicates == []
    assert all(0.25 < client.foreground < 0.5 for client in report.clients)
    assert set(report.clients[0].modes) == {"grey, 8 bit"}
