"""Layers that are not what their type says: compensated where algebra holds for them, else left out with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ss_pruning import prune_
from ss_pruning.compensation.folding import NO_WEIGHTED_SUM
from ss_pruning.compensation.normal_equations import is_weighted_sum
from ss_pruning.config import SOLVED
from tests.support.zoo import randomise

METHODS = ("mean", *SOLVED)


class ScalesOutput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class ScalesWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.1 * self.weight, self.bias)


class HasNoBias(nn.Linear):
    """One that it is given changes nothing."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Adapted(nn.Linear):
    """A low rank beside the weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class ScalesKernel(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, 0.1 * self.weight, self.bias)


class Gains(nn.Conv2d):
    """A gain an output that is no parameter."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel)
        self.register_buffer("gain", torch.linspace(0.5, 2, outputs).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x) * self.gain
        return y


class PadsItself(nn.Conv2d):
    """As TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, 2, 0, 1, self.groups)


class Named(nn.Linear):
    pass


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replaced(layer: nn.Module) -> nn.Module:
    """Its `forward` is another function, as wrappers of libraries have it."""
    original = layer.forward
    layer.forward = lambda x: 3 * original(x)  # type: ignore[method-assign]
    return layer


def parametrised(layer: nn.Module, name: str) -> nn.Module:
    parametrize.register_parametrization(layer, name, Twice())
    return layer


SOUND = {
    "linear": nn.Linear(3, 4),
    "no bias": nn.Linear(3, 4, bias=False),
    "half": nn.Linear(3, 4).half(),
    "subclass": Named(3, 4, bias=False),
    "1-d": nn.Conv1d(4, 6, 3, groups=2),
    "2-d": nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
    "depthwise": type("Own", (nn.Conv2d,), {})(4, 4, (3, 1), groups=4, padding=1),
    "dilated": type("Own", (nn.Conv2d,), {})(4, 6, 3, dilation=2, bias=False),
    "grouped": PadsItself(4, 6, 3, groups=2),
    "wide": PadsItself(512, 6, 3),
    "half subclass": PadsItself(4, 6, 3).half(),
}
ODD = {
    "bias of a wide layer": HasNoBias(4096, 4),
    "output": ScalesOutput(3, 4),
    "weight": ScalesWeight(3, 4),
    "bias": HasNoBias(3, 4),
    "low rank": Adapted(3, 4),
    "kernel": ScalesKernel(3, 4, 3),
    "gain": Gains(3, 4, 3),
    "replaced": replaced(nn.Linear(3, 4)),
    "replaced convolution": replaced(nn.Conv2d(3, 4, 3)),
    "weight parametrised": parametrised(nn.Linear(3, 4), "weight"),
    "bias parametrised": parametrised(nn.Conv2d(3, 4, 3), "bias"),
    "bilinear": type("Odd", (nn.Bilinear,), {"__module__": "elsewhere"})(3, 3, 2),
}


@pytest.mark.parametrize("name", [*SOUND, *ODD])
def test_a_weighted_sum_is_known_by_what_it_puts_out(name: str) -> None:
    assert is_weighted_sum((SOUND | ODD)[name]) is (name in SOUND)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [ScalesOutput, ScalesWeight, HasNoBias, ScalesKernel, Gains])
def test_other_layers_are_not_compensated(kind: Any, method: str) -> None:
    flat = issubclass(kind, nn.Linear)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        *((nn.AdaptiveAvgPool2d(2), nn.Flatten()) if flat else ()),
        kind(32, 8) if flat else kind(8, 8, 3),
        *(() if flat else (nn.AdaptiveAvgPool2d(1), nn.Flatten())),
        nn.Linear(8, 4),
    )
    randomise(model, 0).eval()
    path = next(path for path, module in model.named_modules() if type(module) is kind)
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    report = prune_(model, x[:1], ratio=0.4, compensation=method, calibration=x, allocation="local")
    assert model[0].out_channels < 8
    assert report.not_compensated == {path: NO_WEIGHTED_SUM}
    assert not isinstance(getattr(model.get_submodule(path), "bias", None), Tensor) or kind is not HasNoBias
