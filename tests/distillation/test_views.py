"""The mean over views: brought back to how the image lies, and the same however it lies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fkd_med.distillation import MeanOfViews
from fkd_med.distillation.views import check_square, of_views
from fkd_med.errors import ConfigError

SYMMETRIES: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda a: a,
    lambda a: a[..., :, ::-1],
    lambda a: a[..., ::-1, :],
    lambda a: a[..., ::-1, ::-1],
    lambda a: np.swapaxes(a, -1, -2),
    lambda a: np.swapaxes(a, -1, -2)[..., ::-1, ::-1],
    lambda a: np.swapaxes(a, -1, -2)[..., ::-1],  # a quarter turn, and its inverse
    lambda a: np.swapaxes(a, -1, -2)[..., ::-1, :],
]
INVERSE = [0, 1, 2, 3, 4, 5, 7, 6]


class Lopsided(nn.Module):
    """Answers K maps that depend on where a pixel lies in the picture, and on its right and lower neighbours."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.kernel = torch.arange(1.0, 1 + classes * 3 * 9, dtype=torch.float64).reshape(classes, 3, 3, 3).sin()

    def forward(self, x: Tensor) -> Tensor:
        found = nn.functional.conv2d(x, self.kernel.to(x.dtype), padding=1)
        across = torch.arange(x.shape[-1], dtype=x.dtype)
        down = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
        return 0.02 * (found * (1 + across) + down**2)


def mean_of(logits: list[np.ndarray]) -> np.ndarray:
    """Logits of the mean of the probabilities, plus the mean log-partition of several classes; by the definition."""
    if logits[0].shape[1] == 1:
        p = np.mean([1 / (1 + np.exp(-z)) for z in logits], axis=0)
        return np.log(p / (1 - p))
    sums = [np.exp(z).sum(1, keepdims=True) for z in logits]
    p = np.mean([np.exp(z) / total for z, total in zip(logits, sums, strict=True)], axis=0)
    return np.log(p) + np.mean(np.log(sums), axis=0)


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(("views", "size"), [(2, (5, 8)), (4, (6, 6)), (4, (5, 8)), (8, (6, 6)), (8, (7, 7))])
def test_the_mean_of_what_each_view_answers(views: int, size: tuple[int, int], classes: int) -> None:
    network, x = Lopsided(classes), images(*size)
    back = [
        SYMMETRIES[INVERSE[i]](network(torch.from_numpy(SYMMETRIES[i](x.numpy()).copy())).numpy()) for i in range(views)
    ]
    found = MeanOfViews(network, views)(x)
    np.testing.assert_allclose(found.numpy(), mean_of(back), rtol=1e-9)
    assert not torch.allclose(found, network(x))


@pytest.mark.parametrize("views", [2, 4, 8])
def test_it_turns_and_flips_with_the_image(views: int) -> None:
    answers, x = MeanOfViews(Lopsided(2), views), images(6, 6)
    for move in SYMMETRIES[:views]:
        moved = answers(torch.from_numpy(move(x.numpy()).copy())).numpy()
        np.testing.assert_allclose(moved, move(answers(x).numpy()), rtol=1e-10, atol=1e-10)
    turned = SYMMETRIES[6]
    follows = np.allclose(answers(torch.from_numpy(turned(x.numpy()).copy())), turned(answers(x).numpy()))
    assert follows == (views == 8)


def test_each_view_is_padded_as_the_network_needs() -> None:
    class Fours(nn.Module):
        size_divisor = 4

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-2] % 4 == x.shape[-1] % 4 == 0
            return x[:, :1]

    x = images(6, 6)
    torch.testing.assert_close(MeanOfViews(Fours(), 8)(x), x[:, :1])


@pytest.mark.parametrize("classes", [1, 3])
def test_views_that_agree_give_the_logits_themselves(classes: int) -> None:
    """In float32 from half precision, and for logits far beyond those whose probability is 1."""
    logits = torch.tensor([30000.0, -2.0, 4.0], dtype=torch.float16)[:classes].view(1, classes, 1, 1).repeat(2, 1, 4, 4)
    for sign in (1, -1):
        found = MeanOfViews(nn.Identity(), 8)(sign * logits)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, sign * logits.float(), rtol=1e-5, atol=1e-2)


def test_it_is_unsure_where_the_views_disagree() -> None:
    """Sure of one class in one view, of the other in the next: 1/2, however sure of the first."""

    class Left(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sure = torch.full_like(x[:, :1], -100.0)
            sure[..., : x.shape[-1] // 2] = 1000.0
            return sure

    found = MeanOfViews(Left(), 4)(torch.zeros(1, 3, 4, 4))
    torch.testing.assert_close(found, torch.zeros(1, 1, 4, 4), rtol=0, atol=1e-4)


def test_one_view_is_the_network_itself() -> None:
    network = Lopsided(1)
    assert of_views(network, 1) is network and isinstance(of_views(network, 4), MeanOfViews)


def test_quarter_turns_need_square_images() -> None:
    with pytest.raises(ConfigError, match=r"teacher_views: 8 turns .* these are 5 x 8: use 4, the flips"):
        MeanOfViews(Lopsided(1), 8)(images(5, 8))
    check_square(4, images(5, 8))
    check_square(8, images(5, 5))
