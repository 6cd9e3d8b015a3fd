"""Paint one phantom image and its mask: tissue, vessels, lesions, light, camera, in this order.

Three levels of chance, as in reality: a hospital has a look (its camera and its kind of patients), a patient
has a tissue and a kind of lesion, an image has a view. All planes are float32, coordinates run over [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from fkd_med.seeding import derive_seed

Plane = NDArray[np.float32]
TISSUES = ((0.78, 0.48, 0.44), (0.73, 0.55, 0.42), (0.68, 0.48, 0.56), (0.62, 0.53, 0.48), (0.80, 0.58, 0.53))
REDDER = (0.5, -0.35, -0.25)  # hue of a lesion against its tissue, per contrast: what all hospitals have in common
WITHOUT_LESION = 0.08  # share of images


@dataclass(frozen=True)
class Look:
    """What all images of one hospital share."""

    tissue: Plane  # RGB in [0, 1]
    texture: float  # amplitude of the tissue's texture
    folds: float  # amplitude of its folds
    vessels: int  # mean number per image
    vignette: float  # how dark the corners are
    blur: float  # of the optics, in pixels at 96 px
    noise: float  # of the sensor, standard deviation
    brighter: float  # share of the patients whose lesions are brighter than the tissue
    faint: float  # share of the patients whose lesions are faint, with blurred borders

    @classmethod
    def draw(cls, seed: int, hospital: int) -> Look:
        """Return the look of hospital number `hospital`; neighbours in number differ in tissue and lesions."""
        rng = np.random.default_rng(derive_seed(seed, "look", hospital))
        return cls(
            tissue=np.clip(TISSUES[hospital % len(TISSUES)] + rng.normal(0, 0.03, 3), 0.2, 0.9).astype(np.float32),
            texture=rng.uniform(0.04, 0.08),
            folds=rng.uniform(0.03, 0.09),
            vessels=int(rng.integers(2, 9)),
            vignette=rng.uniform(0.2, 0.7),
            blur=rng.uniform(0.3, 0.9),
            noise=rng.uniform(0.01, 0.035),
            brighter=(0.65, 0.35, 0.5)[hospital % 3],
            faint=(0.15, 0.2, 0.25)[hospital % 3],
        )


def paint(look: Look, size: int, seed: int, patient: str, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an RGB image (size, size, 3) and its mask (size, size) of 0 and 255.

    Args:
        look: The hospital's look.
        size: Side in pixels.
        seed: The phantoms' seed.
        patient: Images of one patient share tissue and kind of lesion.
        name: The image's id.
    """
    shared = np.random.default_rng(derive_seed(seed, "patient", patient))
    rng = np.random.default_rng(derive_seed(seed, "image", name))
    kind = _Lesions.draw(shared, look)
    tissue = look.tissue + shared.normal(0, 0.06, 3).astype(np.float32)
    image = _tissue(rng, size, look)[..., None] + tissue
    image = _vessels(rng, image, look)
    image, mask = kind.paint(rng, image)
    image = _light(rng, image, look)
    image = cv2.GaussianBlur(image, (0, 0), look.blur * size / 96)
    image = image + rng.normal(0, look.noise, image.shape).astype(np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), mask


@dataclass(frozen=True)
class _Lesions:
    """One patient's kind of lesion."""

    tint: Plane  # RGB, what is added inside
    border: float  # width of the transition, relative to the radius
    relief: float  # of the dome that light falls on
    texture: float  # amplitude of its texture, finer than the tissue's
    rim: float  # dark line at the border

    @classmethod
    def draw(cls, rng: np.random.Generator, look: Look) -> _Lesions:
        faint = rng.random() < look.faint
        sign = 1.0 if rng.random() < look.brighter else -1.0
        contrast = rng.uniform(0.06, 0.1) if faint else rng.uniform(0.15, 0.32)
        return cls(
            tint=(contrast * (sign * np.array([1, 0.9, 0.8]) + REDDER) + rng.normal(0, 0.03, 3)).astype(np.float32),
            border=rng.uniform(0.15, 0.3) if faint else rng.uniform(0.03, 0.12),
            relief=rng.uniform(0.07, 0.16),
            texture=rng.uniform(0.04, 0.1),
            rim=0.0 if faint else rng.uniform(0.02, 0.12),
        )

    def paint(self, rng: np.random.Generator, image: Plane) -> tuple[Plane, NDArray[np.uint8]]:
        """Paint 0 to 3 lesions over `image`; return it with their mask."""
        size = image.shape[0]
        mask = np.zeros((size, size), dtype=np.uint8)
        count = 0 if rng.random() < WITHOUT_LESION else int(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.1]))
        fine = _noise(rng, size, 22) - 0.6 * _noise(rng, size, 11)
        direction = rng.uniform(0, 2 * np.pi)
        for _ in range(count):
            distance, across = _blob(rng, size, direction)
            inside = 1 / (1 + np.exp(np.clip((distance - 1) / (self.border / 3), -30, 30)))
            shade = self.relief * across + self.texture * fine
            rim = self.rim * np.exp(-(((distance - 1) / 0.12) ** 2))
            image = image + inside[..., None] * (self.tint + shade[..., None]) - rim[..., None]
            mask[distance < 1] = 255
        return image, mask


def _blob(rng: np.random.Generator, size: int, direction: float) -> tuple[Plane, Plane]:
    """Return a deformed ellipse: distance (1 at its border) and a ramp across it, both (size, size)."""
    y, x = _grid(size)
    radius = np.exp(rng.uniform(np.log(0.22), np.log(0.7)))
    centre = rng.uniform(-0.75, 0.75, 2)
    aspect, angle = rng.uniform(0.6, 1.0), rng.uniform(0, np.pi)
    u = ((x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)) / radius
    v = ((y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)) / (radius * aspect)
    theta, wobble = np.arctan2(v, u), np.ones_like(u)
    for order in range(2, 7):
        wobble += rng.normal(0, 0.22 / order) * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
    across = ((x - centre[0]) * np.cos(direction) + (y - centre[1]) * np.sin(direction)) / radius
    distance = np.hypot(u, v) / np.maximum(wobble, 0.5)
    return distance.astype(np.float32), np.clip(across, -1, 1).astype(np.float32)


def _tissue(rng: np.random.Generator, size: int, look: Look) -> Plane:
    """Return the tissue's relief around 0: texture of several scales, and folds."""
    y, x = _grid(size)
    texture = sum(_noise(rng, size, cells) / weight for cells, weight in ((3, 1.0), (6, 1.4), (12, 2.0), (24, 3.0)))
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(3, 7)
    phase = frequency * (x * np.cos(angle) + y * np.sin(angle)) + 2.5 * _noise(rng, size, 3)
    folds = np.abs(np.sin(phase)) ** 0.5 - 0.75  # narrow dark valleys between broad ridges
    return np.asarray(look.texture * texture + look.folds * folds, dtype=np.float32)


def _vessels(rng: np.random.Generator, image: Plane, look: Look) -> Plane:
    """Draw thin dark winding lines: they are not lesions."""
    size = image.shape[0]
    drawn = np.zeros((size, size), dtype=np.float32)
    for _ in range(rng.poisson(look.vessels)):
        heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.25, 24))
        steps = np.stack([np.cos(heading), np.sin(heading)], axis=1) * size * 0.04
        line = rng.uniform(0, size, 2) + np.cumsum(steps, axis=0)
        one = np.zeros((size, size), dtype=np.uint8)
        thickness = max(1, round(size / 96 * rng.uniform(0.6, 2.4)))
        cv2.polylines(one, [np.rint(line * 8).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, shift=3)
        drawn = np.maximum(drawn, one.astype(np.float32) / 255 * rng.uniform(0.3, 1.0))
    return image - drawn[..., None] * np.array([0.10, 0.17, 0.15], dtype=np.float32)


def _light(rng: np.random.Generator, image: Plane, look: Look) -> Plane:
    """Light the scene: shadows and highlights that are not lesions, and dark corners."""
    size = image.shape[0]
    y, x = _grid(size)
    for _ in range(rng.poisson(1.2)):  # soft shadows and glares, without border, texture or relief
        centre, width = rng.uniform(-1, 1, 2), rng.uniform(0.15, 0.4)
        soft = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))
        image = image + (rng.choice([-1.0, 1.0]) * rng.uniform(0.04, 0.11) * soft)[..., None].astype(np.float32)
    spots = np.zeros((size, size), dtype=np.uint8)
    for _ in range(rng.poisson(3)):
        middle, axes = rng.integers(0, size, 2), rng.uniform(0.008, 0.03, 2) * size
        cv2.ellipse(spots, (tuple(middle.tolist()), tuple((2 * axes + 1).tolist()), rng.uniform(0, 180)), 255, -1)
    shine = cv2.GaussianBlur(spots.astype(np.float32) / 255, (0, 0), 0.6 * size / 96)
    lamp = rng.uniform(-0.25, 0.25, 2)
    radius = (x - lamp[0]) ** 2 + (y - lamp[1]) ** 2
    lit = (image + 0.6 * shine[..., None]) * (1 - look.vignette * np.clip(radius / 2, 0, 1))[..., None]
    return np.asarray(lit, dtype=np.float32)


def _grid(size: int) -> tuple[Plane, Plane]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    return np.asarray(axis[:, None], np.float32), np.asarray(axis[None, :], np.float32)


def _noise(rng: np.random.Generator, size: int, cells: int) -> Plane:
    """Return smooth noise (size, size) of unit variance at its knots, with about `cells` bumps along a side."""
    coarse = rng.normal(0, 1, (cells + 3, cells + 3)).astype(np.float32)
    fine = cv2.resize(coarse, None, fx=size / cells, fy=size / cells, interpolation=cv2.INTER_CUBIC)
    start = int(size / cells)
    return np.asarray(fine[start : start + size, start : start + size], dtype=np.float32)
