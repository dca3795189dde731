"""Pulls that end at what arrived at an earlier layer find what pulls through the whole model find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from ss_pruning.graph.probe import vjp_probe
from ss_pruning.graph.tracing import trace


class Merging(nn.Module):
    """Blocks on one stream, whose places then become channels, as between the stages of a Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(3))
        self.token = nn.Parameter(torch.randn(1, 6, 1, 4))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token, self.stem(x)], 2)
        for block in self.blocks:
            x = x + block(x).relu()
        x = x[:, :, :4]
        parts = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        merged = torch.cat(parts, 1).flatten(2).transpose(1, 2)
        return self.head(self.norm(merged).mean(1))


class Dense(nn.Module):
    """Each layer reads all before it, one of them through a pool that only some places survive."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(4))
        self.head = nn.Linear(19, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = torch.cat([x, layer(nn.functional.max_pool2d(x, 3, 1, 1) if i == 2 else x)], 1)
        return self.head(x.mean((2, 3)))


def vit(depth: int = 3) -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, depth, 2, 16, 32)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "merging": (Merging, 4),
    "dense": (Dense, 6),
    "vit": (vit, 16),
    "densenet": (lambda: torchvision.models.DenseNet(4, (2, 3, 2), 8), 64),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False), 64),
}


def found(model: nn.Module, size: int) -> dict[str, Any]:
    """By layer, source and call, what feeds what; and the rest of a connectivity."""
    connectivity = trace(model, torch.randn(1, 3, size, size))
    edges: dict[Any, tuple[set[Any], set[Any]]] = {}
    for path, into in connectivity.edges.items():
        for edge in into:
            pairs, broadcast = edges.setdefault((path, edge.source, edge.call), (set(), set()))
            pairs.update(map(tuple, edge.pairs.tolist()))
            broadcast.update(edge.broadcast.tolist())
    return {"edges": edges, "loose": connectivity.loose}


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", MODELS)
def test_as_if_nothing_had_been_passed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make()
    short = found(model, size)
    look_back = vjp_probe._look_back
    monkeypatch.setattr(vjp_probe, "_look_back", lambda root, leaves, _: look_back(root, leaves, {}))
    assert short == found(model, size)


def test_each_block_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual stream is not walked anew for each layer that reads it."""
    ends: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ends.append(len(inputs))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    costs = []
    for depth in (2, 4, 6):
        ends.clear()
        trace(vit(depth), torch.randn(1, 3, 16, 16))
        costs.append(sum(ends))
    assert costs[2] - costs[1] == costs[1] - costs[0]
