"""A model whose way through its layers is drawn at random in evaluation is cut right for every draw."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning.graph import tracing
from tests.support.snapshot import snapshot

DRAWS: dict[str, Callable[[], bool]] = {
    "python": lambda: random.random() < 0.5,
    "numpy": lambda: bool(np.random.rand() < 0.5),  # noqa: NPY002 - what models draw from
    "torch": lambda: bool(torch.rand(1) < 0.5),
}


class Ways(nn.Module):
    """`way` says what happens where the draw says so."""

    def __init__(self, way: str, draw: Callable[[], bool]) -> None:
        super().__init__()
        self.way, self.draw = way, draw
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = self.b(x).relu()
        drawn = self.draw()
        if self.way == "skip":
            y = self.c(y) + x if drawn else self.c(y)
        elif self.way == "layer":
            y = self.c(y) if drawn else y
        else:
            y = self.c(y.flip(1) if drawn else y)
        return self.head(self.d(y.relu()).relu().mean((2, 3)))


def _silent(layer: nn.Module, kept: nn.Module) -> None:
    """Zero the channels that are not in `kept`, told by their biases."""
    weights, left = dict(layer.named_parameters()), dict(kept.named_parameters())
    gone = ~torch.isin(weights["bias"], left["bias"])
    with torch.no_grad():
        for weight in weights.values():
            weight[gone] = 0


@pytest.mark.parametrize(("way", "library"), [("skip", "python"), ("layer", "numpy"), ("flip", "torch")])
def test_every_way_equals_the_masked_model(way: str, library: str) -> None:
    for seed in (0, 1):  # of which the first passes take different ways
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        model = Ways(way, DRAWS[library]).double().eval()
        masked, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
        ss_pruning.prune_(model, x, ratio=0.4)
        for name in "abcd":
            _silent(masked.get_submodule(name), model.get_submodule(name))
        for drawn in (False, True):
            model.draw = masked.draw = lambda drawn=drawn: drawn  # type: ignore[misc]
            torch.testing.assert_close(model(x), masked(x), rtol=1e-10, atol=1e-10)


def test_tracing_leaves_random_numbers_as_they_were() -> None:
    model, x = Ways("skip", DRAWS["torch"]).eval(), torch.randn(1, 3, 8, 8)
    before = snapshot(model)
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    tracing.trace(model, x)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert np.array_equal(np.random.get_state()[1], state[2])  # noqa: NPY002
    assert snapshot(model) == before


@pytest.mark.parametrize(("draw", "passes"), [(lambda: True, 1), (DRAWS["numpy"], 1 + tracing.DRAWS)])
def test_only_a_model_that_draws_is_traced_again(
    draw: Callable[[], bool], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Mock(wraps=tracing.labelled)
    monkeypatch.setattr(tracing, "labelled", seen)
    tracing.trace(Ways("skip", draw).eval(), torch.randn(1, 3, 8, 8))
    assert seen.call_count == passes


def test_what_several_draws_find_alike_is_noted_once() -> None:
    model = Ways("skip", DRAWS["python"]).eval()
    edges = tracing.trace(model, torch.randn(1, 3, 8, 8)).edges["d"]
    assert sorted(edge.source for edge in edges) == ["a", "c"]
