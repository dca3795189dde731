"""The plainest net that can be pruned."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.zoo import randomise


class Chain(nn.Module):
    """conv -> BN -> ReLU -> conv -> BN -> ReLU -> pool -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def chain() -> Chain:
    """Random, the same each time, in eval mode."""
    return randomise(Chain(), 0).eval()
