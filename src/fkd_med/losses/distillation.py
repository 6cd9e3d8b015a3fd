"""What all distillation terms have in common: a weight, and a call with student, teacher and mask.

A term returns its raw loss; the module multiplies it by `weight` and logs both. YAML holds terms in a dict by name,
``{kd: {class_path: fkd_med.losses.LogitKL, init_args: {temperature: 2.0}}}``. Each loss has its own file: a pure
function of tensors, and a term that applies it to the logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fkd_med.errors import ConfigError


class DistillationTerm(ABC):
    """One distillation loss with its weight: a callable of student logits, teacher logits and mask.

    Args:
        weight: factor the module applies to the raw loss; 0 turns the term off.

    Raises:
        ConfigError: for a negative weight.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"{type(self).__name__}: weight must be 0 (off) or above and finite, not {weight}.")
        self.weight = weight

    @abstractmethod
    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the raw, unweighted scalar loss of logits (N, K, H, W), given class indices int64 (N, H, W)."""
