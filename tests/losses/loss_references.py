"""Every distillation loss in float64 NumPy loops, written from its formula: what the tests compare ours with.

All take maps (N, C, H, W), and `valid`, bool (N, H, W): a pixel that is not valid does not exist. The means are over
each image, then over the images that are left, where the formula is of one image; else over all pixels of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fkd_med.losses import (
    CWD,
    IFVD,
    AttentionTransfer,
    BoundaryKL,
    DistillationTerm,
    DISTIntra,
    HintMSE,
    LogitKL,
    PairwiseAffinity,
    Pixels,
    RegionAffinity,
)

Array = NDArray[np.float64]
Mask = NDArray[np.int64]
Valid = NDArray[np.bool_]
Reference = Callable[[Array, Array, Mask, Valid], float]


def softmax(z: Array, axis: int = 0) -> Array:
    e = np.exp(z - z.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


def probabilities(z: Array, temperature: float = 1.0) -> Array:
    """Class probabilities (N, K, H, W) with K of at least 2."""
    if z.shape[1] == 1:
        z = np.concatenate([np.zeros_like(z), z], axis=1)
    return softmax(z / temperature, 1)


def cosine(a: Array, b: Array) -> float:
    length = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / length) if length else 0.0


def mean(losses: list[float]) -> float:
    return float(np.mean(losses)) if losses else 0.0


def np_trust(t: Array, mask: Mask, trust: str) -> Array:
    """How far a teacher is believed at each pixel."""
    p, believed = probabilities(t), np.ones(mask.shape)
    for n, y, x in np.ndindex(mask.shape):
        if trust != "all":
            found = p[n, mask[n, y, x], y, x]
            believed[n, y, x] = found if trust == "true_class" else found == p[n, :, y, x].max()
    return believed


def np_kl(
    s: Array, t: Array, valid: Valid, temperature: float, reduction: str = "pixel", believed: Array | float = 1.0
) -> float:
    q, p = probabilities(s, temperature), probabilities(t, temperature)
    kl = list((believed * temperature**2 * (p * np.log(p / q)).sum(1))[valid])
    return {"pixel": mean(kl), "mean": mean(kl) / s.shape[1], "batchmean": float(np.sum(kl)) / len(s)}[reduction]


def np_cwd(s: Array, t: Array, valid: Valid, temperature: float) -> float:
    losses = []
    for n in range(len(s)):
        if not valid[n].any():
            continue
        channels = []
        for c in range(s.shape[1]):
            q, p = softmax(s[n, c][valid[n]] / temperature), softmax(t[n, c][valid[n]] / temperature)
            channels.append((p * np.log(p / q)).sum())
        losses.append(temperature**2 * np.sum(channels) / s.shape[1])
    return mean(losses)


def np_pairwise(s: Array, t: Array, valid: Valid, pool: float) -> float:
    def affinities(f: Array, v: Valid) -> Array:
        h, w = int(f.shape[1] * pool), int(f.shape[2] * pool)
        nodes = []
        for y in range(0, f.shape[1], h):
            for x in range(0, f.shape[2], w):
                inside = v[y : y + h, x : x + w]
                if inside.any():
                    nodes.append(f[:, y : y + h, x : x + w][:, inside].max(1))
        return np.array([[cosine(a, b) for a in nodes] for b in nodes])

    images = [n for n in range(len(s)) if valid[n].any()]
    return mean([float(np.mean((affinities(s[n], valid[n]) - affinities(t[n], valid[n])) ** 2)) for n in images])


def complete(mask: Mask, valid: Valid, classes: int) -> list[int]:
    return [n for n in range(len(mask)) if set(range(classes)) <= set(mask[n][valid[n]].tolist())]


def np_ifvd(s: Array, t: Array, mask: Mask, valid: Valid, classes: int) -> float:
    def typical(f: Array, m: Mask, v: Valid) -> Array:
        return np.array([cosine(f[:, y, x], f[:, (m == m[y, x]) & v].mean(1)) for y, x in np.argwhere(v)])

    return mean(
        [
            float(np.mean((typical(s[n], mask[n], valid[n]) - typical(t[n], mask[n], valid[n])) ** 2))
            for n in complete(mask, valid, classes)
        ]
    )


def np_rad(s: Array, t: Array, mask: Mask, valid: Valid, classes: int) -> float:
    def affinities(f: Array, m: Mask, v: Valid) -> Array:
        means = [f[:, (m == k) & v].mean(1) for k in range(classes)]
        return np.array([cosine(means[i], means[j]) for i in range(classes) for j in range(i)])

    return mean(
        [
            float(np.mean((affinities(s[n], mask[n], valid[n]) - affinities(t[n], mask[n], valid[n])) ** 2))
            for n in complete(mask, valid, classes)
        ]
    )


def np_at(s: Array, t: Array, valid: Valid, p: int) -> float:
    def attention(f: Array) -> Array:
        a = (np.abs(f) ** p).sum(0)
        return np.asarray(a / max(float(np.sqrt((a**2).sum())), 1e-300))

    images = [n for n in range(len(s)) if valid[n].any()]
    return mean([float(np.mean((attention(s[n][:, valid[n]]) - attention(t[n][:, valid[n]])) ** 2)) for n in images])


def np_dist(s: Array, t: Array, valid: Valid, temperature: float) -> float:
    a, b = probabilities(s, temperature), probabilities(t, temperature)
    pearson = [np.corrcoef(a[:, k][valid], b[:, k][valid])[0, 1] for k in range(a.shape[1])]
    return float(temperature**2 * np.mean([1 - r for r in pearson]))


def np_boundary(
    s: Array, t: Array, mask: Mask, valid: Valid, band: int, temperature: float, trust: str = "all"
) -> float:
    q, p = probabilities(s, temperature), probabilities(t, temperature)
    kl = np_trust(t, mask, trust) * temperature**2 * (p * np.log(p / q)).sum(1)
    losses = []
    for n, y, x in np.argwhere(valid):
        window = np.s_[n, max(0, y - band) : y + band + 1, max(0, x - band) : x + band + 1]
        if (mask[window][valid[window]] != mask[n, y, x]).any():
            losses.append(kl[n, y, x])
    return mean(losses)


def np_hint(s: Array, t: Array, valid: Valid) -> float:
    return float(np.mean((s - t).swapaxes(0, 1)[:, valid] ** 2))


def of_classes(f: Callable[[Array, Array, Mask, Valid, int], float]) -> Reference:
    """A formula of features and regions, applied to class probabilities."""
    return lambda s, t, m, v: f(probabilities(s), probabilities(t), m, v, max(2, s.shape[1]))


TERMS: list[tuple[DistillationTerm, Reference]] = [
    (LogitKL(), lambda s, t, m, v: np_kl(s, t, v, 2.0)),
    (LogitKL(temperature=1.0, reduction="mean"), lambda s, t, m, v: np_kl(s, t, v, 1.0, "mean")),
    (LogitKL(temperature=3.0, reduction="batchmean"), lambda s, t, m, v: np_kl(s, t, v, 3.0, "batchmean")),
    (LogitKL(trust="correct"), lambda s, t, m, v: np_kl(s, t, v, 2.0, believed=np_trust(t, m, "correct"))),
    (LogitKL(trust="true_class"), lambda s, t, m, v: np_kl(s, t, v, 2.0, believed=np_trust(t, m, "true_class"))),
    (CWD(temperature=4.0), lambda s, t, m, v: np_cwd(s, t, v, 4.0)),
    (CWD(temperature=1.0), lambda s, t, m, v: np_cwd(s, t, v, 1.0)),
    (PairwiseAffinity(), lambda s, t, m, v: np_pairwise(probabilities(s), probabilities(t), v, 0.5)),
    (PairwiseAffinity(pool=0.25), lambda s, t, m, v: np_pairwise(probabilities(s), probabilities(t), v, 0.25)),
    (IFVD(), of_classes(np_ifvd)),
    (RegionAffinity(), of_classes(np_rad)),
    (AttentionTransfer(), lambda s, t, m, v: np_at(s, t, v, 2)),
    (AttentionTransfer(p=4), lambda s, t, m, v: np_at(s, t, v, 4)),
    (DISTIntra(), lambda s, t, m, v: np_dist(s, t, v, 1.0)),
    (DISTIntra(temperature=3.0), lambda s, t, m, v: np_dist(s, t, v, 3.0)),
    (BoundaryKL(band=1), lambda s, t, m, v: np_boundary(s, t, m, v, 1, 2.0)),
    (BoundaryKL(band=2, temperature=1.0), lambda s, t, m, v: np_boundary(s, t, m, v, 2, 1.0)),
    (BoundaryKL(band=1, trust="correct"), lambda s, t, m, v: np_boundary(s, t, m, v, 1, 2.0, "correct")),
    (BoundaryKL(band=2, trust="true_class"), lambda s, t, m, v: np_boundary(s, t, m, v, 2, 2.0, "true_class")),
    (HintMSE(connector=None), lambda s, t, m, v: np_hint(s, t, v)),
]


def example(classes: int, dtype: torch.dtype = torch.float64, size: tuple[int, int] = (6, 9)) -> tuple[Tensor, ...]:
    """Logits and masks of 3 images: a corner of the first holds the other classes, the third only background."""
    g = torch.Generator().manual_seed(classes)
    student, teacher = (2 * torch.randn(3, classes, *size, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(3, *size, dtype=torch.int64)
    for k in range(1, max(2, classes)):
        mask[0, 0, k - 1] = k
        mask[1, k % size[0], 1:] = k
    return student.to(dtype), teacher.to(dtype), mask


def apply(
    term: DistillationTerm, student: Tensor, teacher: Tensor, mask: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Call a term on logits."""
    return term(student, teacher, Pixels(mask, max(2, student.shape[1]), valid))
