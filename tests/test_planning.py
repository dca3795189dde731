"""Budgets: costs against a recount of the cut model, and what the cost exponent does to the order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning import couple, prune_, trace
from ss_pruning.errors import InputError
from ss_pruning.planning import Costs
from tests.snapshot import snapshot
from tests.zoo import BY_NAME, randomise


class TwoWidths(nn.Module):
    """Two inner layers that can shrink: a channel of the second one costs four times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap_in, self.cheap_out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.dear_in, self.dear_out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        cheap = self.cheap_out(F.relu(self.cheap_in(F.avg_pool2d(x, 2))))
        return F.interpolate(cheap, scale_factor=2) + self.dear_out(F.relu(self.dear_in(x)))


X = torch.zeros(1, 4, 8, 8)


class Given:
    """An importance that hands out fixed scores by layer."""

    def __init__(self, **scores: float) -> None:
        self.scores = scores

    def __call__(self, group: object) -> Tensor:
        name = group[0].dep.target.name  # type: ignore[index]
        return self.scores[name] * torch.arange(1.0, 9.0)


@pytest.mark.parametrize("name", ["residual_chain", "dense", "grouped", "separable", "flattened"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_what_a_family_costs_is_what_the_costs_say(name: str, kind: str) -> None:
    net = BY_NAME[name]
    model = net.make().eval()
    wiring = trace(model, net.example)
    coupling = couple(wiring, model)
    costs = Costs(model, net.example, wiring, coupling)
    step = costs.removed_per_step(coupling.units)
    each = costs.per_family(coupling.units, kind)  # type: ignore[arg-type]
    tiny = 1e-6
    for u, unit in enumerate(coupling.units):
        families = sum(cell.size for cell in unit.cells) / unit.steps
        saved = costs.after(kind, 0 * step[u]) - costs.after(kind, tiny * step[u])  # type: ignore[arg-type]
        dense = costs.macs if kind == "macs" else costs.params
        assert each[u] == pytest.approx(saved / tiny / families / dense, rel=1e-3)


def test_one_channel_costs_what_cutting_it_saves() -> None:
    model = randomise(TwoWidths(), 0)
    wiring = trace(model, X)
    costs = Costs(model, X, wiring, couple(wiring, model))
    units = couple(wiring, model).units
    each = dict(zip((unit.name for unit in units), costs.per_family(units, "macs"), strict=True))
    dear, cheap = 64 * (4 + 4), 16 * (4 + 4)
    assert each["dear_in"] == pytest.approx(dear / (8 * dear + 8 * cheap))
    assert each["cheap_in"] == pytest.approx(cheap / (8 * dear + 8 * cheap))


@pytest.mark.parametrize(("exponent", "spared"), [(0.0, "dear_in"), (1.0, "cheap_in")])
def test_the_exponent_decides_between_importance_and_importance_per_cost(
    exponent: float, spared: str
) -> None:
    """The dear layer is twice as important, and four times as expensive."""
    model = randomise(TwoWidths(), 0)
    importance = Given(cheap_in=1.0, dear_in=2.0)
    prune_(model, X, macs=0.8, importance=importance, cost_exponent=exponent)
    kept = {name: model.get_submodule(name).out_channels for name in ("cheap_in", "dear_in")}
    other = ({"cheap_in", "dear_in"} - {spared}).pop()
    assert kept[spared] > kept[other]


def test_a_ratio_has_no_cost() -> None:
    models = [randomise(TwoWidths(), 0)]
    models.append(copy.deepcopy(models[0]))
    for model, exponent in zip(models, (0.0, 3.0), strict=True):
        prune_(model, X, ratio=0.5, cost_exponent=exponent)
    assert models[0].ss_pruning_plan == models[1].ss_pruning_plan


@pytest.mark.parametrize("exponent", [-0.1, 11, float("nan")])
def test_a_silly_exponent_is_refused(exponent: float) -> None:
    model = randomise(TwoWidths(), 0)
    before = snapshot(model)
    with pytest.raises(InputError, match="cost_exponent"):
        prune_(model, X, macs=0.5, cost_exponent=exponent)
    assert snapshot(model) == before
