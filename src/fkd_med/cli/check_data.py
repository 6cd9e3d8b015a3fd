"""`fkd check-data`: look at a data set before a long run; every fault is listed, not only the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentParser

from fkd_med.cli.console import wide_console
from fkd_med.cli.data_parser import build_data, data_parser
from fkd_med.data import FederatedDataModule, Manifest, Record
from fkd_med.data.check import DataReport, collected_warnings, render
from fkd_med.data.check import check_data as read_everything
from fkd_med.data.contact_sheet import contact_sheet
from fkd_med.data.fault_lines import few_of_a_kind
from fkd_med.data.finding import listed_faults
from fkd_med.data.manifest import ManifestRow
from fkd_med.data.masks import MaskCoding, MaskFacts, find_coding, survey_masks
from fkd_med.data.partition import build_manifest
from fkd_med.data.progress import with_progress
from fkd_med.data.public import read_public
from fkd_med.data.unlabelled import check_hidden
from fkd_med.errors import DataError
from fkd_med.seeding import global_seed

_DESCRIPTION = """Look at a data set before a long run: the data of a configuration are read, nothing is trained.

Shown are images and patients per hospital and split, sizes, modes, mask values, missing pairs, damaged files and
pictures in more than one split. A contact sheet and the manifest.csv that training would use are written. The exit
code is 0 only when nothing would stop `fkd fit`."""
_ALL = "not partitioned"


@dataclass
class _Findings:
    """What is known of the data before images are read."""

    records: list[Record] = field(default_factory=list)
    manifest: Manifest | None = None
    coding: MaskCoding | None = None
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_data(arguments: list[str]) -> None:
    """Look at a data set before a long run.

    Raises:
        DataError: The data have errors (all are printed), or there is nothing to look at.
        ConfigError: The configuration cannot be read.
    """
    given = _parser().parse_args(arguments)
    data = build_data(given)
    found = _look(data)
    manifest = found.manifest or _without_hospitals(found.records)
    report = read_everything(found.records, manifest, found.coding, found.notes)
    report.errors = list(dict.fromkeys([*found.errors, *report.errors]))
    report.warnings = [line for line in report.warnings if not line.startswith(f"{_ALL} has no image")]
    render(report, wide_console(120, soft_wrap=True))
    written = _write(Path(given.output).expanduser(), found, manifest)
    print(f"Written: {', '.join(map(str, written))}")
    if report.errors:
        raise DataError(f"{_count(report)} in {data.root} would stop a run; they are listed above.")


def _parser() -> ArgumentParser:
    parser = data_parser("fkd check-data", _DESCRIPTION)
    parser.add_argument("--output", type=str, default="check-data", help="Folder for the contact sheet and manifest.")
    return parser


def _look(data: FederatedDataModule) -> _Findings:
    """Go through the steps of `FederatedDataModule.setup`, but go on after an error."""
    data.prepare_data()
    found = _Findings()
    found.records = _records(data, found)
    found.manifest = _manifest(data, found)
    used = {row.id for row in found.manifest.rows} if found.manifest else {record.id for record in found.records}
    found.coding = _coding(data, [record for record in found.records if record.id in used], found)
    _look_at_public(data, [record for record in found.records if record.id in used], found)
    return found


def _look_at_public(data: FederatedDataModule, records: list[Record], found: _Findings) -> None:
    """Count the public images, if the configuration names any, and see that none is a client's."""
    if data.public is None:
        return
    try:
        count = len(read_public(data.public, data.preprocessing, records))
        print(f"Public images: {count} in {data.public}, none of them a client's.")
    except DataError as error:
        found.errors.append(str(error))


def _records(data: FederatedDataModule, found: _Findings) -> list[Record]:
    """Find the images; those without partner are left out, and errors unless the configuration skips them too."""
    with collected_warnings() as accepted, listed_faults() as faults:
        try:
            records = data.layout.records(data.root, data.on_missing)
            fault = None
        except DataError as error:
            fault = str(error)
        finally:
            found.notes += accepted
    if fault is not None:
        with collected_warnings() as notes, listed_faults() as faults:
            records = data.layout.records(data.root, "skip")
        found.errors += _left_out(data, fault, [note for note in notes if note not in accepted])
    found.errors += few_of_a_kind(faults)
    return records


def _left_out(data: FederatedDataModule, fault: str, notes: list[str]) -> list[str]:
    """Return the errors that stand for `fault`: what was left out to go on."""
    left_out = [note.removeprefix("Left out ") for note in notes]
    if data.on_missing == "unlabelled" or not left_out:
        return [fault]  # names the masks without image; images without mask are none
    left_out[-1] += " Add what is missing, or leave these out with --data.on_missing=skip."
    return left_out


def _manifest(data: FederatedDataModule, found: _Findings) -> Manifest | None:
    """Partition as training would, and check what it would check."""
    seed = global_seed() if data.seed is None else data.seed
    try:
        if data.manifest_path is None:
            fractions = data.val_fraction, data.test_fraction
            data.manifest = build_manifest(found.records, data.partitioner, *fractions, seed, data.hidden_masks)
        else:
            data.manifest = Manifest.read(Path(data.manifest_path).expanduser())
            data.manifest.verify(found.records)
        check_hidden(data.hidden_masks, data.manifest)
    except DataError as error:
        found.errors.append(str(error))
        return None
    try:
        if data.client is not None:
            data.manifest.check_client(data.client, str(data.root))
        data._check_batches()
    except DataError as error:
        found.errors.append(str(error))
    return data.manifest


def _coding(data: FederatedDataModule, records: list[Record], found: _Findings) -> MaskCoding | None:
    """Find out what mask values mean; files that cannot be read are passed over, as the report names them."""
    facts: list[MaskFacts] = []
    for record in with_progress(records, "Reading masks", at_least=100):
        try:
            facts += survey_masks([record])
        except DataError:
            continue
    if not facts and any(record.mask for record in records):
        return None
    with collected_warnings() as notes:
        try:
            return find_coding(facts, data.classes, data.class_values)
        except DataError as error:
            found.errors.append(str(error))
            return None
        finally:
            found.notes += notes


def _without_hospitals(records: list[Record]) -> Manifest:
    """Return a manifest that only serves to look at images, when they could not be partitioned."""
    return Manifest(ManifestRow(record.id, _ALL, "train", record.patient, "") for record in records)


def _write(output: Path, found: _Findings, manifest: Manifest) -> list[Path]:
    """Write the contact sheet, and the manifest if there is one."""
    known = {record.id for record in found.records}
    shown = Manifest(row for row in manifest.rows if row.id in known)
    paths = [output / "contact_sheet.png"]
    contact_sheet(found.records, shown, found.coding or MaskCoding(1, (0, 1)), paths[0])
    if found.manifest is not None:
        paths.append(output / "manifest.csv")
        found.manifest.write(paths[-1])
    return paths


def _count(report: DataReport) -> str:
    return "1 error" if len(report.errors) == 1 else f"{len(report.errors)} errors"
