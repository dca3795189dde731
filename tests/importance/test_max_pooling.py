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


def test_indices_are_left_alone() -> None:
    x = torch.randn(1, 2, 4, 4)
    with CentresOfWindows():
        found = F.max_pool2d(x, 2, return_indices=True)
    assert all(map(torch.equal, found, F.max_pool2d(x, 2, return_indices=True)))


def test_a_mean_that_is_folded_without_images_is_not_that_of_the_largest_of_four() -> None:
    """The oracle is the mean of a rectified normal: `g phi(b / g) + b Phi(b / g)`."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1, bias=True)
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
