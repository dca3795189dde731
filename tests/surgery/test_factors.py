"""Channels that are multiplied when others of their layer go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ss_pruning.errors import PlanError
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.factors import Factor, gains
from ss_pruning.surgery.plan import Plan

CUT = Cut("0", "out", 5, (0, 2, 3, 4))
FACTOR = Factor("0", "out", (2, 4), 3.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5))


def test_weights_and_biases_are_multiplied_and_gradients_divided() -> None:
    """The gradient is that of the same loss, to the weight as it is now."""
    model = net()
    model(torch.randn(4, 3)).square().sum().backward()
    layer = model[0]
    weight, bias, gradient = layer.weight, layer.bias, layer.weight.grad
    Plan((CUT,), factors=(FACTOR,)).apply_(model)
    by = torch.tensor([1.0, 3, 1, 3])
    assert torch.equal(layer.weight, weight[[0, 2, 3, 4]] * by[:, None])
    assert torch.equal(layer.bias, bias[[0, 2, 3, 4]] * by)
    torch.testing.assert_close(layer.weight.grad, gradient[[0, 2, 3, 4]] / by[:, None])
    assert torch.equal(gains([FACTOR], CUT), by)


def test_norms_and_loose_tensors() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5))
    model.register_parameter("table", nn.Parameter(torch.ones(2, 5)))
    cuts = (Cut("0", "through", 5, (1, 2)), Cut("table", "tensor", 5, (1, 2), 1))
    factors = (Factor("0", "through", (2,), 0.5), Factor("table", "tensor", (0, 1), 4.0))
    Plan(cuts, factors=factors).apply_(model)
    assert model[0].weight.tolist() == [1, 0.5]
    assert model[0].running_var.tolist() == [1, 1]
    assert model.table.tolist() == [[4, 1]] * 2


def test_one_plan_after_another_is_one() -> None:
    second = Plan((Cut("0", "out", 4, (1, 3)),), factors=(Factor("0", "out", (0, 1), 2.0),))
    one_by_one, at_once = net(), net()
    first = Plan((CUT,), factors=(FACTOR,))
    second.apply_(first.apply_(one_by_one))
    both = Plan.from_json(first.then(second).to_json())
    both.apply_(at_once)
    assert torch.equal(one_by_one[0].weight, at_once[0].weight)
    assert torch.equal(at_once[0].weight[0], net()[0].weight[2] * 3 * 2)


@pytest.mark.parametrize("change", [{"by": 0.0}, {"by": float("inf")}, {"side": "in"}])
def test_factors_that_make_no_sense_are_not_read(change: dict[str, object]) -> None:
    values = {"path": "0", "side": "out", "channels": (2, 4), "by": 3.0} | change
    with pytest.raises(PlanError, match="cannot be multiplied"):
        Plan.from_json(Plan((CUT,), factors=(Factor(**values),)).to_json())  # type: ignore[arg-type]
