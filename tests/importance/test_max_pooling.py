"""Max pooling of noise: the middle of each window, against plain loops, and the mean that a batch norm tells of it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning import prune_
from ss_pruning.importance.activation_stats.max_pooling import CentresOfWindows


def centres(
    x: Tensor, pooled: tuple[int, ...], kernel: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """Value by value: where the window begins, and on to its middle, but not over the border."""
    made = torch.zeros(*x.shape[:2], *pooled)
    for place in itertools.product(*map(range, pooled)):
        at = [i * stride - padding + dilation * (kernel - 1) // 2 for i in place]
        at = [min(max(i, 0), size - 1) for i, size in zip(at, x.shape[2:], strict=True)]
        made[(..., *place)] = x[(..., *at)]
    return made


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil"),
    [(2, 2, 0, 1, False), (3, 2, 1, 1, False), (3, 2, 0, 1, True), (5, 1, 2, 1, False), (2, 1, 0, 3, False)],
)
def test_it_takes_the_middle_of_each_window(
    axes: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *(8, 7, 6)[:axes])
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1](
        kernel, stride, padding, dilation, False, ceil
    )
    with CentresOfWindows():
        found = pool(x)
    assert torch.equal(found, centres(x, pool(x).shape[2:], kernel, stride, padding, dilation))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.max_pool2d(input=x, kernel_size=(2, 2)),
        lambda x: torch.max_pool2d(x, (2, 2)),
        lambda x: F.max_pool2d(x, (2,), [2], padding=(0,), dilation=(1,)),
    ],
    ids=["by name", "torch's", "one for both axes"],
)
def test_it_knows_the_functions(pool: Any) -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    with CentresOfWindows():
        assert pool(x).flatten().tolist() == [0, 2, 8, 10]
    assert pool(x).flatten().tolist() == [5, 7, 13, 15]


def middles_of_parts(x: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Value by value: what lies halfway through all that adaptive pooling looks at for one output."""
    made = torch.zeros(*x.shape[:2], *parts)
    for place in itertools.product(*map(range, parts)):
        at = []
        for i, count, size in zip(place, parts, x.shape[2:], strict=True):
            seen = [
                p
                for p in range(size)
                if math.floor(i * size / count) <= p < math.ceil((i + 1) * size / count)
            ]
            at.append(seen[(len(seen) - 1) // 2])
        made[(..., *place)] = x[(..., *at)]
    return made


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("indices", [False, True])
def test_it_takes_the_middle_of_what_adaptive_pooling_looks_at(axes: int, indices: bool) -> None:
    x, parts = torch.randn(2, 3, *(8, 7, 5)[:axes]), (3, 4, 5)[:axes]
    pool = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[axes - 1](parts, indices)
    with CentresOfWindows():
        found = pool(x)
    if indices:
        assert torch.equal(found[1], pool(x)[1])
    assert torch.equal(found[0] if indices else found, middles_of_parts(x, parts))


@pytest.mark.parametrize("pool", [nn.FractionalMaxPool2d, nn.FractionalMaxPool3d])
def test_fractional_pooling_is_spread_evenly(pool: Any) -> None:
    axes = 2 if pool is nn.FractionalMaxPool2d else 3
    x = torch.randn(2, 3, *(8, 7, 6)[:axes])
    with CentresOfWindows():
        found = pool(2, output_ratio=0.5)(x)
    assert torch.equal(found, middles_of_parts(x, (4, 3, 3)[:axes]))


def test_indices_are_left_alone() -> None:
    x = torch.randn(1, 2, 4, 4)
    for pool in (nn.MaxPool2d(2, return_indices=True), lambda x: F.max_pool2d_with_indices(x, 2)):
        with CentresOfWindows():
            found, indices = pool(x)
        assert torch.equal(indices, pool(x)[1])
        assert torch.equal(found, centres(x, (2, 2), 2, 2, 0, 1))


@pytest.mark.parametrize(
    ("over", "middle"),
    [
        (lambda x: x.amax(2), lambda x: x[:, :, 2]),
        (lambda x: x.amax((2, -1), keepdim=True), lambda x: x[:, :, 2:3, 3:4]),
        (lambda x: x.max(dim=3, keepdim=True)[0], lambda x: x[..., 3:4]),
        (lambda x: torch.max(x, 2).values, lambda x: x[:, :, 2]),
        (lambda x: x.max(1)[0], lambda x: x.max(1)[0]),
        (lambda x: x[0].amax(-1), lambda x: x[0].amax(-1)),
        (lambda x: torch.max(x, x.flip(3)), lambda x: x.maximum(x.flip(3))),
        (lambda x: x.max(), lambda x: x.flatten().sort()[0][-1]),
    ],
    ids=["rows", "all", "columns", "torch's", "channels", "tokens", "of two", "of everything"],
)
def test_maxima_over_positions_of_maps_are_their_middle_and_others_are_as_they_are(
    over: Any, middle: Any
) -> None:
    x = torch.randn(2, 3, 5, 6)
    with CentresOfWindows():
        found = over(x)
    assert torch.equal(found, middle(x))


class First(nn.Module):
    """The first of what a layer puts out, without the indices behind it."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)[0]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        First(nn.MaxPool2d(2, return_indices=True)),
        nn.AdaptiveMaxPool2d(16),
        nn.FractionalMaxPool2d(2, 32),
    ],
    ids=["plain", "with indices", "adaptive", "fractional"],
)
def test_a_mean_that_is_folded_without_images_is_not_that_of_the_largest_of_four(pool: nn.Module) -> None:
    """The oracle is the mean of a rectified normal: `g phi(b / g) + b Phi(b / g)`."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), pool, nn.Conv2d(8, 4, 1, bias=True)
    ).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.2, 8))
        norm.bias.copy_(torch.linspace(-0.5, 0.5, 8))
        model[4].weight.abs_()  # means add up
    g, b = (parameter.detach().double() for parameter in (norm.weight, norm.bias))
    told = g * torch.exp(-((b / g) ** 2) / 2) / math.sqrt(2 * math.pi) + b * torch.special.ndtr(b / g)
    dense, bias = model[4].weight.detach().double().flatten(1), model[4].bias.detach().double()
    prune_(model, torch.zeros(1, 3, 64, 64), ratio=0.5, compensation="mean", allocation="local")
    (cut,) = (cut for cut in model.ss_pruning_plan.cuts if (cut.path, cut.side) == ("4", "in"))
    removed = list(cut.removed)
    shift = dense[:, removed] @ told[removed]
    assert bool((shift > 0.05).all())
    assert torch.allclose(model[4].bias.double() - bias, shift, rtol=0.1)
