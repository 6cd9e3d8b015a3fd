"""`fkd phantoms`: write a synthetic data set to try things on."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from fkd_med.data import Phantoms
from fkd_med.files import write_error

_DESCRIPTION = """Write synthetic hospitals: images, masks and a clients.csv, laid out as a folder of your own would be.

Each hospital has a look of its own, four images belong to a patient, and equal arguments write equal files. Phantoms
of other arguments in DIR are replaced; a folder that holds anything else is refused."""


def phantoms(arguments: list[str]) -> None:
    """Write a synthetic data set to try things on.

    Raises:
        ConfigError: Numbers that make no hospital.
        DataError: The folder holds files that are not phantoms.
        RunError: The folder cannot be written.
    """
    given = _parser().parse_args(arguments)
    root = Path(given.folder).expanduser()
    layout = Phantoms(given.hospitals, given.images, given.size, given.seed)
    try:
        layout.prepare(root)
    except OSError as error:
        raise write_error(root, error) from error
    records = layout.records(root)
    patients = len({record.patient for record in records})
    print(
        f"{len(records)} images with masks of {patients} patients in {len(layout.counts)} hospitals, "
        f"{layout.size}x{layout.size} pixels: {root}\n"
        f"Look at them:  fkd check-data --data.root {root}"
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="fkd phantoms", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("folder", metavar="DIR", type=str, help="Folder to write; made when absent.")
    parser.add_argument("--hospitals", type=int, default=3, help="Number of hospitals.")
    parser.add_argument(
        "--images", type=int | list[int], default=48, help="Images per hospital: one number, or [40,24,80] for each."
    )
    parser.add_argument("--size", type=int, default=96, help="Side of the square images, in pixels.")
    parser.add_argument("--seed", type=int, default=0, help="Other seeds give other hospitals.")
    return parser
