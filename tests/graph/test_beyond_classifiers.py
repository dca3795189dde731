"""Nets that are no image classifiers: dict and list outputs, lists of images, up-sampling, other dimensions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import detection, optical_flow, segmentation

from ss_pruning import prune_
from tests.support import oracle


def norms(dim: int, channels: int) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1](channels)


class Block(nn.Sequential):
    """Convolution, norm, rectifier, in one, two or three dimensions."""

    def __init__(self, dim: int, inputs: int, outputs: int, stride: int = 1) -> None:
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        super().__init__(make(inputs, outputs, 3, stride, 1), norms(dim, outputs), nn.ReLU())


class UNet(nn.Module):
    """Two levels; the way up is transposed convolutions, joined by concatenation with the way down."""

    def __init__(self, dim: int = 2, width: int = 8) -> None:
        super().__init__()
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1]
        self.down1, self.down2 = Block(dim, 2, width), Block(dim, width, 2 * width, 2)
        self.middle = Block(dim, 2 * width, 4 * width, 2)
        self.up2, self.join2 = up(4 * width, 2 * width, 2, 2), Block(dim, 4 * width, 2 * width)
        self.up1, self.join1 = up(2 * width, width, 2, 2), Block(dim, 2 * width, width)
        self.head = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        y = self.join2(torch.cat([self.up2(self.middle(b)), b], 1))
        return self.head(self.join1(torch.cat([self.up1(y), a], 1)))


class TwoEyes(nn.Module):
    """Two images and a vector of facts, fused by addition and concatenation; keyword arguments; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Block(2, 3, 16), Block(2, 1, 16)
        self.fuse = Block(2, 16, 24)
        self.facts = nn.Sequential(nn.Linear(5, 12), nn.ReLU())
        self.head, self.depth = nn.Linear(36, 4), nn.Conv2d(24, 1, 1)

    def forward(self, left: Tensor, right: Tensor, *, facts: Tensor) -> dict[str, Any]:
        y = self.fuse(self.left(left) + self.right(right))
        pooled = torch.cat([y.mean((2, 3)), self.facts(facts)], 1)
        return {"class": self.head(pooled), "maps": [self.depth(y)]}


class Speech(nn.Module):
    """1-D: dilated residual blocks, a depthwise convolution, pooling over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(1, 4, 16, 2)
        self.wide = nn.Conv1d(16, 16, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.depthwise = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv1d(16, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = F.relu(y + self.norm(self.wide(y)))
        return self.head(self.point(self.depthwise(y)).amax(-1))


class Clip(nn.Module):
    """3-D: factorised convolutions over space and time, flattened into the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv3d(3, 12, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(12, 16, (3, 1, 1), padding=(1, 0, 0))
        self.norm = nn.BatchNorm3d(16)
        self.pool = nn.AdaptiveAvgPool3d(2)
        self.head = nn.Linear(16 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.relu(self.norm(self.time(F.relu(self.space(x)))))).flatten(1))


class Recurrent(nn.Module):
    """Steps of a gated block. The net reads the block's width before the block runs, as RAFT does."""

    class Step(nn.Module):
        def __init__(self, hidden: int, context: int) -> None:
            super().__init__()
            self.hidden = hidden
            self.mix = Block(2, hidden + context, hidden)
            self.gate, self.new = (nn.Conv2d(hidden, hidden, 3, 1, 1) for _ in range(2))

        def forward(self, h: Tensor, context: Tensor) -> Tensor:
            x = self.mix(torch.cat([h, context], 1))
            gate = torch.sigmoid(self.gate(x))
            return (1 - gate) * h + gate * torch.tanh(self.new(x))

    def __init__(self) -> None:
        super().__init__()
        self.start = Block(2, 3, 24)
        self.step = self.Step(16, 8)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        start, width = self.start(x), self.step.hidden
        h, context = start[:, :width], start[:, width:]
        for _ in range(2):
            h = self.step(h, context)
        return self.head(h)


@dataclass(frozen=True)
class Case:
    """A net, what its forward takes, and whether it takes seconds."""

    name: str
    make: Callable[[], nn.Module]
    example: Any


SMALL = [
    Case("unet", UNet, torch.randn(1, 2, 16, 16)),
    Case("unet_1d", lambda: UNet(1), torch.randn(2, 2, 32)),
    Case("unet_3d", lambda: UNet(3, 4), torch.randn(1, 2, 8, 8, 8)),
    Case("speech", Speech, torch.randn(2, 4, 50)),
    Case("clip", Clip, torch.randn(1, 3, 4, 8, 8)),
    Case(
        "two_eyes",
        TwoEyes,
        {"left": torch.randn(2, 3, 8, 8), "right": torch.randn(2, 1, 8, 8), "facts": torch.randn(2, 5)},
    ),
]

BARE: dict[str, Any] = {"weights": None, "weights_backbone": None}
LARGE = [
    Case("fcn", lambda: segmentation.fcn_resnet50(**BARE, aux_loss=True), torch.randn(1, 3, 64, 64)),
    Case("deeplab", lambda: segmentation.deeplabv3_mobilenet_v3_large(**BARE), torch.randn(1, 3, 64, 64)),
    Case("lraspp", lambda: segmentation.lraspp_mobilenet_v3_large(**BARE), torch.randn(1, 3, 64, 64)),
    Case("ssdlite", lambda: detection.ssdlite320_mobilenet_v3_large(**BARE), ([torch.rand(3, 320, 320)],)),
    Case(
        "fasterrcnn",
        lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**BARE),
        ([torch.rand(3, 160, 160)],),
    ),
]


def call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().eval()


def prune_and_look(case: Case) -> tuple[nn.Module, nn.Module]:
    """The dense net and its pruned twin, after what holds for every net was checked."""
    dense, model = built(case), built(case)
    report = prune_(model, case.example, ratio=0.4)
    assert report.max_error < 1e-10
    assert report.params_after == sum(p.numel() for p in model.parameters()) < 0.9 * report.params_before
    assert [left.reason for left in report.excluded if "relies on" in left.reason] == []
    return dense, model


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_nets(case: Case) -> None:
    dense, model = prune_and_look(case)
    removed = {c.path: set(c.removed) for c in model.ss_pruning_plan.cuts if c.side == "in"}
    double = torch.utils._pytree.tree_map(lambda t: t.double(), case.example)
    with torch.no_grad():
        expected = oracle.tensors(call(oracle.masked(dense, removed), double))
        found = oracle.tensors(call(copy.deepcopy(model).double(), double))
    assert (
        max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-10
    )


def test_number_that_is_read_early_and_only_equals_a_width() -> None:
    """`hidden` stays 16 as the state does, though another layer of 16 channels inside the block shrinks."""
    model, x = Recurrent().eval(), torch.randn(1, 3, 8, 8)
    prune_(model, x, ratio=0.4, ignore=["start.0", "step.gate", "step.new"])
    assert (model.step.hidden, model.step.mix[0].out_channels) == (16, 10)
    assert model(x).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_nets_train(case: Case) -> None:
    _, model = prune_and_look(case)
    sum(t.square().mean() for t in oracle.tensors(call(model.train(), case.example))).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE[:3], ids=lambda case: case.name)
def test_segmentation(case: Case) -> None:
    dense, model = prune_and_look(case)
    with torch.no_grad():
        shapes = [{k: v.shape for k, v in call(net, case.example).items()} for net in (dense, model)]
    assert shapes[0] == shapes[1]
    output = model.train()(torch.randn(2, 3, 64, 64))
    sum(t.square().mean() for t in output.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE[3:], ids=lambda case: case.name)
def test_detection(case: Case) -> None:
    _, model = prune_and_look(case)
    images = [torch.rand(3, 120, 200), torch.rand(3, 200, 160)]
    with torch.no_grad():
        found = model(images)
    assert [set(one) for one in found] == [{"boxes", "labels", "scores"}] * 2
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    losses = model.train()(images, [{"boxes": boxes, "labels": torch.tensor([1])}] * 2)
    total = sum(losses.values())
    total.backward()
    assert math.isfinite(float(total.detach()))


@pytest.mark.slow
def test_optical_flow() -> None:
    torch.manual_seed(0)
    model = optical_flow.raft_small(weights=None).eval()
    images = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    report = prune_(model, images, macs=0.6)
    assert model.update_block.hidden_state_size < 96  # read by the net before its module runs
    assert report.macs_after < 0.61 * report.macs_before
    with torch.no_grad():
        assert [flow.shape for flow in model(*images)] == [(1, 2, 128, 128)] * 12
