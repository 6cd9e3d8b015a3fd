"""Learning from answers about public images: what the server's distillation and FedMD's clients have in common.

Everything runs in eval mode: BatchNorm keeps the statistics it has, which come from the clients' own images. Public
images may be of another kind, and their statistics would be carried into every hospital.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fkd_med.data.datasets import collate
from fkd_med.errors import ConfigError, TrainingError
from fkd_med.losses import logit_kl
from fkd_med.modules.teacher_cache import Surroundings
from fkd_med.networks.eval_mode import evaluating, ready
from fkd_med.seeding import derive_seed

Positions = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits about some public images.

    Args:
        positions: places of the images in the public set, sorted.
        logits: (len(positions), K, H, W), floating, on the CPU.
    """

    positions: Positions
    logits: Tensor

    def of(self, batch: Positions) -> Tensor:
        """Return the logits (N, K, H, W) of the images at some places, in float32."""
        return self.logits[np.searchsorted(self.positions, batch)].float()


def minibatches(positions: Positions, size: int, steps: int, *entropy: int | str) -> list[Positions]:
    """Return the images of each step: one random order of all after the other, cut into batches.

    Args:
        positions: places of the images to draw from.
        size: images per batch; all of them where there are fewer.
        steps: number of batches.
        entropy: what the order depends on, and nothing else.
    """
    size = min(size, len(positions))
    random = np.random.default_rng(derive_seed(*entropy))
    orders = [random.permutation(positions) for _ in range(-(-steps * size // len(positions)))]
    stream = np.concatenate(orders)[: steps * size]
    return list(stream.reshape(steps, size))


def stacked(images: Any, batch: Iterable[int]) -> Tensor:
    """Return public images (N, C, H, W)."""
    found: Tensor = collate([{"image": images[int(position)]["image"]} for position in batch])["image"]
    return found


@torch.no_grad()
def answers(model: nn.Module, images: Any, positions: Positions, size: int, around: Surroundings) -> Iterator[Tensor]:
    """Yield what a model in eval mode answers about images, `size` at a time: logits (N, K, H, W), float32 on the CPU.

    Raises:
        TrainingError: an answer is NaN or infinite; the caller names the model.
    """
    for start in range(0, len(positions), size):
        with around.autocast():
            logits = model(ready(stacked(images, positions[start : start + size]), model, around.device))
        logits = logits.detach().float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise TrainingError("answers with NaN or infinity about public images")
        yield logits


def mean_answers(
    models: Iterable[tuple[str, nn.Module]], images: Any, positions: Positions, size: int, around: Surroundings
) -> Answers:
    """Return the mean logits of some models, unweighted (AVGLOGITS of Lin et al. 2020).

    One model is asked after the other. In memory are the sum, 4 bytes x K x H x W per image, and one batch.

    Raises:
        TrainingError: a model answers with NaN or infinity; names its client.
    """
    total, count = torch.empty(0), 0
    for client, model in models:
        count, start = count + 1, 0
        try:
            for logits in answers(model, images, positions, size, around):
                if not total.numel():
                    total = torch.zeros(len(positions), *logits.shape[1:])
                total[start : start + len(logits)] += logits
                start += len(logits)
        except TrainingError as error:
            raise TrainingError(
                f"The model of client {client} {error}: lower its learning rate, or clip its gradients."
            ) from error
    return Answers(positions, total.div_(max(1, count)))


def approach(
    student: nn.Module, images: Any, targets: Answers, batches: Sequence[Positions], optimizer: Optimizer,
    temperature: float, around: Surroundings, show: Callable[[int], Any] = int, anneal: bool = True,
) -> list[float]:  # fmt: skip
    """Train a model towards answers: one step per batch on KL(target || model).

    Args:
        student: maps images (N, C, H, W) to logits; trained in place, in eval mode.
        images: the public images.
        targets: what to learn.
        batches: the images of each step.
        optimizer: holds the parameters that may change.
        temperature: softens both sides; the loss is multiplied by its square.
        around: device and precision.
        show: told the number of each step.
        anneal: whether the rate follows a cosine from the optimizer's to 0.

    Returns:
        The loss of every step, before it.

    Raises:
        TrainingError: the loss is not finite.
    """
    schedule = CosineAnnealingLR(optimizer, len(batches)) if anneal else None
    scaler = torch.amp.GradScaler(around.device.type, enabled=around.precision == "16-mixed")
    losses = []
    for step, batch in enumerate(batches, 1):
        show(step)
        optimizer.zero_grad()
        with torch.enable_grad(), evaluating(student), around.autocast():
            logits = student(ready(stacked(images, batch), student, around.device))
            loss = logit_kl(logits, targets.of(batch).to(around.device), temperature)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise TrainingError(f"The loss on public images is not finite at step {step}: lower the optimizer's lr.")
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        if schedule is not None:
            schedule.step()
    optimizer.zero_grad()
    return losses


def check_steps(owner: object, **values: int) -> None:
    """Refuse numbers below 1 (ConfigError)."""
    for key, value in values.items():
        if value < 1:
            raise ConfigError(f"{type(owner).__name__}: {key} is {value}: give 1 or more.")
