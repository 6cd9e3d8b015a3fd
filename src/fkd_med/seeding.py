"""The only source of randomness: every draw derives from names and counters, never from call order.

A client's round is seeded by (seed, round, SHA-256 of the client's name, ...), so the number and order of
clients, data workers, crashes and resumes do not change what it draws.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

_ENVIRONMENT = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def global_seed() -> int:
    """Return the seed given to ``seed_everything``, or 0 when none was."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive_seed(*entropy: int | str) -> int:
    """Return a 32-bit seed that depends on every element of `entropy`, in order, and on nothing else.

    Example:
        ``derive_seed(42, round, "hospital-a", epoch, "image-17")``
    """
    digest = hashlib.sha256("\x1f".join(f"{type(e).__name__}:{e}" for e in entropy).encode()).digest()
    return int.from_bytes(digest[:4], "little")


@contextmanager
def seeded(*entropy: int | str) -> Iterator[int]:
    """Seed Python, NumPy and torch from `entropy` inside the block and restore them after it.

    DDP set-up re-seeds from ``PL_GLOBAL_SEED``, so that variable is set inside the block and restored too.
    """
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    seed = derive_seed(*entropy)
    error: BaseException | None = None
    with isolate_rng():
        L.seed_everything(seed, workers=True, verbose=False)
        try:
            yield seed
        except BaseException as raised:  # isolate_rng restores nothing when an error passes through it
            error = raised
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
    if error is not None:
        raise error


class SeedEpochs(L.Callback):
    """Seeds what each epoch draws, such as dropout, by its number: a resumed training draws what a whole one does.

    Args:
        entropy: names the training, as for `derive_seed`.
    """

    def __init__(self, *entropy: int | str) -> None:
        self.entropy = entropy

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed Python, NumPy and torch."""
        seed = derive_seed(*self.entropy, trainer.current_epoch)
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
