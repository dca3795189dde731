"""What tests of both INT8 writers share: images, a detector, and how far eight bits may be off."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """Puts out pixels beside probabilities, and distances as means over a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.mean = nn.Conv2d(4, 1, 1, bias=False)
        self.mean.weight = nn.Parameter(torch.arange(4.0).reshape(1, 4, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        distance, score = self.head(F.relu(self.body(x))).split((4, 1), 1)
        return torch.cat([200 * self.mean(distance.softmax(1)), score.sigmoid()], 1)


def vectors() -> Tensor:
    """`[200, 6]` in [-2, 2]; those that will be held out stay within the ranges of the others."""
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    x[4::5] /= 2
    return x


#: The step of `vectors`.
STEP = 4 / 255


def bound(layer: nn.Linear, x: Tensor) -> Tensor:
    """`[vectors, outputs]`: the most by which steps of inputs and weights let a layer's outputs be off.

    The zero has a step of its own, so that one end of a range is off by up to a whole step.
    """
    weight = layer.weight.detach()
    step = weight.abs().amax(1) / 127
    return STEP * (weight.abs() + step[:, None] / 2).sum(1) + step / 2 * x.abs().sum(1)[:, None]
