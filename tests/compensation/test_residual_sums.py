"""Sums that a layer's output ends in are found whatever the style, and only where the other side is there in time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from ss_pruning import prune_
from ss_pruning.compensation.folding import norms_behind
from ss_pruning.compensation.reconstruction import reconstruct_
from ss_pruning.compensation.residual_sums import Sum, find_sums, slope
from ss_pruning.graph import trace
from ss_pruning.graph.traced import TracedModel
from tests.support.snapshot import snapshot
from tests.support.zoo import randomise


class Block(nn.Module):
    """A residual block; `style` says how the sum is written."""

    def __init__(self, style: str, width: int = 6) -> None:
        super().__init__()
        self.style = style
        self.conv1, self.bn1 = nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, width, 3, padding=1, bias=False)
        self.bn2 = nn.Identity() if style == "bare" else nn.BatchNorm2d(width)
        self.rest = nn.Identity()
        self.gain = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.style == "in place":
            y += x
        elif self.style == "reversed":
            y = torch.add(x, self.rest(y))
        elif self.style == "gated":
            y = y * self.gain + x
        elif self.style == "rectified":
            y = F.relu_(y) + x
        elif self.style == "alone":
            y = y + 1.0
        else:
            y = x + y
        return F.relu(y)


def with_norm(norm: Callable[[int], nn.Module]) -> nn.Module:
    """A residual net whose norms are all of one kind."""
    model = Net("plain", "plain")
    model.norm = norm(6)
    for block in model.blocks.children():
        block.bn1, block.bn2 = norm(8), norm(6)
    return randomise(model, 0).eval()


class Net(nn.Module):
    def __init__(self, *styles: str) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(*(Block(style) for style in styles))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def sums_of(model: nn.Module, x: Tensor) -> dict[str, Sum]:
    return find_sums(model, x, norms_behind(trace(model, x)))


IMAGE = torch.zeros(1, 3, 8, 8)
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "batch without statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "frozen": FrozenBatchNorm2d,
    "group": partial(nn.GroupNorm, 2),
    "one group": partial(nn.GroupNorm, 1),
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "instance with statistics": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("compensation", ["mean", "linear", "reconstruct"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_every_kind_stand_before_a_sum(norm: str, compensation: Any) -> None:
    """Those that measure each input do not only scale and shift: the layer before them aims at no sum."""
    model = with_norm(NORMS[norm])
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert bool(sums_of(model, IMAGE)) is (norm in ("batch", "frozen", "instance with statistics"))
    report = prune_(model, images[:1], macs=0.7, compensation=compensation, calibration=images)
    assert report.macs_after <= 0.7 * report.macs_before
    assert bool(model(images).isfinite().all())


@pytest.mark.parametrize("style", ["plain", "in place", "reversed", "bare"])
def test_a_sum_is_found_however_it_is_written(style: str) -> None:
    model = randomise(Net("plain", style), 0).eval()
    before = snapshot(model)
    found = sums_of(model, IMAGE)
    assert set(found) == {"blocks.0.conv2", "blocks.1.conv2"}
    assert found["blocks.1.conv2"] == Sum(None if style == "bare" else "blocks.1.bn2", "blocks.0", "out")
    assert snapshot(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("style", ["gated", "rectified", "alone"])
def test_what_is_no_plain_sum_is_left_alone(style: str) -> None:
    assert set(sums_of(randomise(Net("plain", style), 0).eval(), IMAGE)) == {"blocks.0.conv2"}


def test_the_branch_that_runs_last_makes_up_for_the_other() -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    found = sums_of(model, torch.zeros(1, 3, 64, 64))
    assert found["layer2.0.downsample.0"] == Sum("layer2.0.downsample.1", "layer2.0.bn2", "out")
    assert "layer2.0.conv2" not in found  # the shortcut is not there yet when it runs
    assert found["layer2.1.conv2"].norm == "layer2.1.bn2"


class Rectifying(nn.BatchNorm2d):
    """A norm with an activation inside, as timm has them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def test_a_norm_with_an_activation_inside_is_not_affine() -> None:
    model = randomise(Net("plain"), 0).eval()
    model.blocks[0].bn2 = Rectifying(6).eval()
    assert not sums_of(model, IMAGE)


def test_the_slope_is_the_derivative_of_the_norm() -> None:
    norm = randomise(nn.BatchNorm2d(5), 1).double().eval()
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        moved = norm(x + 1) - norm(x)
    assert torch.allclose(slope(norm, x).expand_as(x), moved)
    norm.weight.data[2] = 1e-9
    assert slope(norm, x)[2].isinf().all()


def test_what_is_added_is_told_in_units_before_the_norm() -> None:
    norm = randomise(nn.BatchNorm2d(5), 1).double().eval()
    y, other = torch.randn(2, 2, 5, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(norm(y) + other, norm(y + other / slope(norm, other)))
        assert torch.equal(other / slope(None, other), other)


def test_the_stream_is_nearer_to_the_dense_one_than_without(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    x, fresh = (torch.randn(n, 3, 12, 12, generator=generator) for n in (128, 64))

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            stream: Tensor = model.eval().blocks(F.relu(dense.norm(dense.stem(fresh))))
        return stream

    def error() -> float:
        model = copy.deepcopy(small)
        reconstruct_(model, TracedModel.of(dense, IMAGE), small.ss_pruning_plan, x)
        return float((run(model) - run(dense)).square().mean())

    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        dense = randomise(Net(*["plain"] * 4), seed).eval()
        small = copy.deepcopy(dense)
        prune_(small, IMAGE, ratio=0.5, ignore=["stem", *(f"blocks.{i}.conv2" for i in range(4))])
        with_sums = error()
        with monkeypatch.context() as without:
            without.setattr("ss_pruning.compensation.reconstruction.find_sums", lambda *_: {})
            ratios.append(with_sums / error())
    assert max(ratios) < 1
    assert sum(ratios) / 3 < 0.9
