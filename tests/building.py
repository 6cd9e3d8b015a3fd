"""Builds configurations as `fkd` would, up to the point where data are read; for the tests of configs and documents."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from fkd_med.cli.lightning import FkdCLI

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BASE = "cvc_clinicdb/fkd_resunet.yaml"


class Built(FkdCLI):
    """Parses and builds all that `fkd fit` would, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class Parsed(Built):
    """Parses all that `fkd fit` would, and builds nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def build(*files: str | Path, arguments: tuple[str, ...] = (), device: str = "meta") -> Built:
    """Build what `fkd fit` with these configuration files, given by their names in configs/, would."""
    given = [part for file in files for part in ("--config", str(CONFIGS / file))]
    with torch.device(device), ExitStack() as stack:
        return Built(["fit", *given, *arguments], stack)
