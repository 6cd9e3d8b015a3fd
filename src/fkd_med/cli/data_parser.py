"""The data of a training configuration and nothing else: no network, teacher or trainer is built.

`fkd check-data` and `fkd predict` take the YAML files that `fkd fit` takes; all keys but ``data`` and the seed are
read and left alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentParser, Namespace

from fkd_med.data import FederatedDataModule

# What else a training configuration holds.
OTHER_KEYS = ("model", "trainer", "federation", "checkpoint", "run_dir", "overwrite", "test_after_fit", "ckpt_path")
_HELP = "The data, as in a training configuration: --data.root DIR, --data.image_size 256, ...; --data.help lists them."


def data_parser(prog: str, description: str) -> ArgumentParser:
    """Return a parser with ``--config``, ``--data.*`` and ``--seed_everything``, as `fkd fit` reads them."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A training configuration; may be given repeatedly.")
    parser.add_argument(
        "--seed_everything", type=bool | int, default=0, help="Seed that splits depend on unless data.seed is given."
    )
    parser.add_subclass_arguments(FederatedDataModule, "data", help=_HELP)
    parser.set_defaults({"data": {"class_path": "fkd_med.data.FederatedDataModule", "init_args": {"root": "data"}}})
    for key in OTHER_KEYS:
        parser.add_argument(f"--{key}", type=Any, default=None, help=SUPPRESS)
    return parser


def build_data(config: Namespace) -> FederatedDataModule:
    """Build the data module of a configuration that `data_parser` parsed, and seed as `fkd fit` does."""
    seed = config.seed_everything
    L.seed_everything(0 if isinstance(seed, bool) else seed, workers=True, verbose=False)
    only_data = ArgumentParser(exit_on_error=False)
    only_data.add_subclass_arguments(FederatedDataModule, "data")
    data: FederatedDataModule = only_data.instantiate_classes(Namespace(data=config.data)).data
    # Plain training pools the clients, so that none needs to fill a batch alone; the data module asks its trainer.
    stand_in: Any = SimpleNamespace(federation=config.federation, world_size=1, global_rank=0, accelerator=None)
    data.trainer = stand_in
    return data
