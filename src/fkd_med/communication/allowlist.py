"""The allow-list: only the student's tensors, counts, metrics and declared sections ever travel.

Checked on both sides, on what was really decoded: before a message is sent and after it came.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fkd_med.communication.header import shown
from fkd_med.communication.messages import Broadcast, State, Update
from fkd_med.errors import TrainingError

MAX_METRICS = 256
_METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_]*(/[A-Za-z0-9_]+)*")  # no dots, no leading slash: never a file's path


PUBLIC_LOGITS = "public-logits"
"""The section of logits on public images, the one thing that may travel besides what is shaped as the student."""


@dataclass(frozen=True)
class PublicLogits:
    """What the section `PUBLIC_LOGITS` may hold, known before anything is sent.

    Args:
        count: number of public images; tensors are named ``0`` to ``count - 1``, never by a file.
        shape: (K, H, W) of each, as float16.
    """

    count: int
    shape: tuple[int, ...]

    def allows(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor of this name may be in the section."""
        place = name.isascii() and name.isdecimal() and len(name) < 10 and str(int(name)) == name
        return place and int(name) < self.count and tuple(tensor.shape) == self.shape and tensor.dtype == torch.float16


class AllowList:
    """What may be in a message: exactly the student's tensors, and further ones only in `sections`.

    In a section, a tensor is either named and shaped as one of the student's (control variates, residuals) or a
    single floating-point number (a coefficient). So neither a teacher, an image, a mask nor a path can pass. The one
    exception is the section `PUBLIC_LOGITS`, for a federation that has consented to it.

    Args:
        state: the student's state as it travels; only names, shapes and dtypes are kept (meta tensors will do).
        sections: names of the extras that the configured rules declare.
        logits: what logits on public images look like; None without consent to share them.
        whose: what the state is of, for errors; a teacher's where partners share theirs.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        sections: Collection[str] = frozenset(),
        logits: PublicLogits | None = None,
        whose: Literal["student", "teacher"] = "student",
    ) -> None:
        self.logits = logits
        self.specs: dict[str, tuple[torch.Size, torch.dtype]] = {n: (t.shape, t.dtype) for n, t in state.items()}
        self.sections = frozenset(sections)
        self.whose = whose

    def check(self, message: Broadcast | Update) -> None:
        """Refuse `message` unless everything in it is allowed; whether values are finite is not its business.

        Raises:
            TrainingError: naming the client (or the server) and the tensor, section, metric or count.
        """
        owner = f"Client '{message.client}'" if isinstance(message, Update) else "The server"
        self._check_state(message.state, owner)
        for section, tensors in message.extras.items():
            if section not in self.sections:
                declared = ", ".join(sorted(self.sections)) or "none"
                raise TrainingError(
                    f"{owner} sends section {shown(section)}, which no configured rule declares (declared: "
                    f"{declared}). Use the same federation settings on all sides."
                )
            for name, tensor in tensors.items():
                self._check_extra(section, name, tensor, owner)
        if isinstance(message, Update):
            _check_counts(message, owner)
            _check_metrics(message.metrics, owner)

    def _check_state(self, state: State, owner: str) -> None:
        remedy = f"Use the same {self.whose} on all sides"
        for name, tensor in state.items():
            if name not in self.specs:
                raise TrainingError(
                    f"{owner} sends tensor {shown(name)}, which is not the {self.whose}'s: nothing else may travel. "
                    f"{remedy}{', and keep the teacher out of its state_dict' if self.whose == 'student' else ''}."
                )
            shape, dtype = self.specs[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise TrainingError(
                    f"{owner} sends tensor '{name}' as {tensor.dtype} {tuple(tensor.shape)} where the {self.whose} "
                    f"has {dtype} {tuple(shape)}. {remedy}."
                )
        missing = sorted(self.specs.keys() - state.keys())
        if missing:
            raise TrainingError(f"{owner} does not send tensor '{missing[0]}' ({len(missing)} missing). {remedy}.")

    def _check_extra(self, section: str, name: str, tensor: Tensor, owner: str) -> None:
        if section == PUBLIC_LOGITS:
            self._check_logits(name, tensor, owner)
            return
        known = name in self.specs and tensor.shape == self.specs[name][0]
        coefficient = name.isidentifier() and tensor.numel() == 1 and tensor.is_floating_point()
        if not known and not coefficient:
            raise TrainingError(
                f"{owner} sends tensor {shown(name)} {tuple(tensor.shape)} in section '{section}': only tensors "
                "named and shaped as the student's, or single numbers, may travel there."
            )

    def _check_logits(self, name: str, tensor: Tensor, owner: str) -> None:
        if self.logits is None:
            raise TrainingError(f"{owner} sends logits on public images without federation.share_logits: not allowed.")
        if not self.logits.allows(name, tensor):
            raise TrainingError(
                f"{owner} sends {shown(name)} as {tensor.dtype} {tuple(tensor.shape)} in section '{PUBLIC_LOGITS}': "
                f"only float16 maps {self.logits.shape} of {self.logits.count} public images, named by their place, "
                "may travel there. Use the same student and public images on all sides."
            )


def _check_counts(update: Update, owner: str) -> None:
    for name, value in (("num_examples", update.num_examples), ("num_steps", update.num_steps)):
        if value <= 0:
            raise TrainingError(
                f"{owner} reports {name} = {value}: it has not trained. Look at its data with `fkd check-data`."
            )


def _check_metrics(metrics: Mapping[str, float], owner: str) -> None:
    if len(metrics) > MAX_METRICS:
        raise TrainingError(f"{owner} sends {len(metrics)} metrics; at most {MAX_METRICS} may travel. Log fewer.")
    for name in metrics:
        if len(name) > 100 or not _METRIC.fullmatch(name):
            raise TrainingError(
                f"{owner} sends a metric named {shown(name)}: a name is letters, digits and '_' in parts "
                "joined by '/', 100 characters at most. Rename it."
            )
