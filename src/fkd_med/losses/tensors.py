"""What the distillation losses share: precision, classes, unit vectors, means over the pixels that count, checks."""

from __future__ import annotations

import torch
from torch import Tensor

from fkd_med.errors import ConfigError


def precise(x: Tensor) -> Tensor:
    """Return a tensor in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def class_logits(logits: Tensor) -> Tensor:
    """Return logits of at least two classes: one logit z becomes (0, z), as sigmoid(z) is the softmax of it."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def class_probabilities(logits: Tensor) -> Tensor:
    """Return probabilities of at least two classes (N, max(2, K), H, W): (1 - p, p) for one logit."""
    return class_logits(precise(logits)).softmax(dim=1)


def unit(x: Tensor, dim: int, eps: float = 1e-8) -> Tensor:
    """Return x divided by its Euclidean norm along a dimension; 0, with gradient 0, where that is below `eps`."""
    square = x.square().sum(dim=dim, keepdim=True)
    return torch.where(square > eps**2, x * square.clamp_min(eps**2).rsqrt(), 0.0)


def blank(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return maps (N, C, H, W) with 0 outside of `valid`, bool (N, H, W): nothing there reaches a loss or gradient."""
    return x if valid is None else torch.where(valid.unsqueeze(1), x, 0.0)


def mean_where(values: Tensor, counted: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean, along a dimension or of all, of the finite values that count (bool); 0 where none does."""
    return (values * counted).sum(dim) / counted.sum(dim).clamp_min(1)


def mean_of_images(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean of values (N, M) over each image, then over the images in which any counts (bool (N, M))."""
    if counted is None:
        return values.mean()
    return mean_where(mean_where(values, counted, dim=1), counted.any(dim=1))


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not above 0 and finite (ConfigError)."""
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"Distillation: temperature must be above 0 and finite, not {temperature}; 1 to 5 is usual.")


def check_logits(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> None:
    """Refuse logits that are not (N, K, H, W) of one shape (ConfigError naming both)."""
    check_maps(student, teacher, valid, "logits")
    if student.shape[1] != teacher.shape[1]:
        raise ConfigError(
            f"Distillation: the student predicts {student.shape[1]} classes (logits {tuple(student.shape)}), the "
            f"teacher {teacher.shape[1]} (logits {tuple(teacher.shape)}): give both networks the same `classes`."
        )


def check_maps(student: Tensor, teacher: Tensor, valid: Tensor | None = None, what: str = "maps") -> None:
    """Refuse maps that are not (N, C, H, W) of one N, H and W (ConfigError naming both); channels may differ."""
    shapes = f"the student's {what} {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"
    if student.ndim != 4 or teacher.ndim != 4:
        raise ConfigError(f"Distillation: {what} must be (N, K, H, W); here are {shapes}.")
    if (student.shape[0], *student.shape[2:]) != (teacher.shape[0], *teacher.shape[2:]):
        raise ConfigError(
            f"Distillation: {shapes} do not match: run both networks on the same images at the same size."
        )
    if valid is not None:
        check_mask(valid, student, "map of valid pixels")


def check_mask(mask: Tensor, student: Tensor, what: str = "mask") -> None:
    """Refuse a mask that is not (N, H, W) beside maps (N, C, H, W) (ConfigError naming both)."""
    expected = (student.shape[0], *student.shape[2:])
    if tuple(mask.shape) != expected:
        raise ConfigError(
            f"Distillation: the {what} {tuple(mask.shape)} does not match the student's {tuple(student.shape)}: "
            f"it must be {expected}."
        )
