"""The model on its own noise: what is left out of the run makes no difference to what is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import noise
from ss_pruning.importance.activation_stats.noise import on_noise


class Encoder(nn.Module):
    """Two blocks of torch's attention on the patches of an image, and attention whose result a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(5))
        self.attention = nn.ModuleList(nn.MultiheadAttention(12, 3, batch_first=True) for _ in range(3))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).mT
        for norm, attention in zip(self.norms, self.attention[:2], strict=False):
            x = x + attention(*[norm(x)] * 3)[0]
        x = x + self.down(self.up(self.norms[2](x)).relu())
        y = self.norms[3](x)
        return self.head(self.attention[2](y, y, y)[0].mean(1) + self.norms[4](x).mean(1))


def test_what_only_norms_hear_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, image = Encoder().eval(), torch.randn(1, 3, 16, 16)
    connectivity = trace(model, image)
    paths = ["up", "down", "head"]
    images: dict[nn.Module, set[int]] = {}

    def counted(module: nn.Module, *silent: Any) -> Callable[..., Any]:
        plain = module.forward

        def counting(x: Tensor, *others: Tensor) -> Any:
            images.setdefault(module, set()).add(len(x))
            return plain(x, *others)

        module.forward = counting
        try:
            return shape_only(module, *silent)
        finally:
            del module.forward

    shape_only = noise._shape_only
    monkeypatch.setattr(noise, "_shape_only", counted)
    found = on_noise(model, connectivity, image, paths)
    first, second, third = model.attention
    assert images[first] == images[second] == images[model.embed] == {1}
    assert images[third] == {4, 16}
    monkeypatch.setattr(noise, "_shape_only", lambda module, *_: module.forward)
    whole = on_noise(model, connectivity, image, paths)
    for path in paths:
        assert torch.equal(found[path].mean, whole[path].mean)
        assert torch.equal(found[path].variance, whole[path].variance)
