"""Refuses accelerators that this machine does not have, before anything is built."""

from __future__ import annotations

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

from fkd_med.errors import ConfigError, check_known
from fkd_med.federated.quiet import quiet


def check_accelerator(wanted: object, where: str = "trainer.accelerator") -> None:
    """Refuse an accelerator that is unknown or not there.

    Args:
        wanted: its name as in the configuration; ``"auto"``, and an object of the user's own, are never refused.
        where: the key that names it.

    Raises:
        ConfigError: names the key, what there is, and how to go on without it.
    """
    if not isinstance(wanted, str) or wanted == "auto":
        return
    with quiet():
        kinds = {
            name: AcceleratorRegistry[name]["accelerator"] for name in AcceleratorRegistry.available_accelerators()
        }
        kinds["gpu"] = kinds["mps" if kinds["mps"].is_available() else "cuda"]
        here = sorted(name for name, kind in kinds.items() if kind.is_available())
    check_known(where, [wanted], ["auto", *sorted(kinds)])
    if wanted not in here:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
        look = " `nvidia-smi` tells whether there is one whose driver works, CUDA_VISIBLE_DEVICES whether it is hidden."
        raise ConfigError(
            f"{where} is {wanted!r}, and torch {torch.__version__} ({built}) finds none on this machine; it finds "
            f"{', '.join(here)}.{look if wanted in ('gpu', 'cuda') else ''} Without one: `auto` or `cpu`."
        )
