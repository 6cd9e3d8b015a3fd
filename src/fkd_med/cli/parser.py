"""The parser of training and scoring: what follows from the data is there before it looks for what is missing."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from fkd_med.cli.shapes import fit_networks_to_data


class FkdParser(LightningArgumentParser):
    """Parses a configuration in which a network's channels, classes and image size may be left out."""

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Fit the networks of a command to its data, then check all values. Arguments as jsonargparse's.

        Raises:
            ConfigError: a network was given other channels, classes or sizes than the data have.
        """
        command = namespace.get("subcommand")  # parsers of parts, which see no data, have none
        if isinstance(command, str) and isinstance(namespace.get(command), Namespace):
            fit_networks_to_data(namespace[command])
        super().validate(namespace, *args, **kwargs)
