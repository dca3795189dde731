"""The penalty on strengths, against plain loops and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ss_pruning import trace
from ss_pruning.sparsity import strength_penalty
from tests import oracle
from tests.zoo import BY_NAME


@pytest.mark.parametrize(
    "name",
    ["plain", "residual", "dense", "grouped", "separable", "transposed_grouped", "shared", "flattened"],
)
def test_penalty_matches_plain_loops(name: str) -> None:
    net = BY_NAME[name]
    model = net.make()
    expected = 0.0
    for path, sources in net.sources.items():
        layer = model.get_submodule(path)
        scales = oracle.variances(model, net.calls.get(path, [sources]))
        expected += sum(s for row in oracle.strength(layer, scales) for s in row)
    assert strength_penalty(model, trace(model, net.example)).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_right() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2)).double()
    wiring = trace(model, torch.zeros(1, 1, 4, 4))
    names = ["0.weight", "1.weight", "3.weight"]

    def penalty(*tensors: torch.Tensor) -> torch.Tensor:
        twin = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2)).double()
        for name, tensor in zip(names, tensors, strict=True):
            module, _, attribute = name.rpartition(".")
            del twin.get_submodule(module)._parameters[attribute]
            setattr(twin.get_submodule(module), attribute, tensor)
        return strength_penalty(twin, wiring)

    generator = torch.Generator().manual_seed(0)
    start = dict(model.named_parameters())
    values = [torch.randn(start[n].shape, generator=generator).double().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(penalty, values)


def test_dead_synapses_get_no_gradient() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight[0] = 0
        model[0].weight[2] = 0
    strength_penalty(model, trace(model, torch.zeros(2, 3))).backward()
    assert model[1].weight.grad[0].tolist() == [0, 0, 0]
    assert model[1].weight.grad.isfinite().all()
    assert model[0].weight.grad.isfinite().all()


def test_only_the_layers_asked_for_count() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    wiring = trace(model, net.example)
    parts = [strength_penalty(model, wiring, [path]).item() for path in net.sources]
    assert strength_penalty(model, wiring).item() == pytest.approx(sum(parts), rel=1e-6)
    assert strength_penalty(model, wiring, []).item() == 0
