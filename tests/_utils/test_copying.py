"""Copies that share tensors with their model, and copies in another type."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning._utils.copying import read_as, retyped, shell
from ss_pruning.errors import ModelError


class Tangled(nn.Module):
    """Holds what makes copying hard: tied weights, a list of its own modules, a bound method, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.register_buffer("shift", torch.ones(4))
        self.order = [self.two, self.one]
        self.act = self.bend
        self.sizes = {"in": [4, 4]}
        self.one.register_forward_hook(lambda module, args, output: 2 * output)

    def bend(self, x: Tensor) -> Tensor:
        return x.relu() + self.shift

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = self.act(layer(x))
        return x


class Own(Tangled):
    """Copies itself in a way of its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        new = Own()
        memo[id(self)] = new
        new.load_state_dict(self.state_dict())
        return new


def test_a_traced_graph_keeps_its_attributes() -> None:
    """Its own way of copying leaves behind what its code does not use: a plan, among others."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model.said = {"what": [1, 2]}
    twin, x = shell(model), torch.randn(3, 4)
    assert twin.said == {"what": [1, 2]}
    assert twin.said is not model.said
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("build", [Tangled, Own])
def test_a_shell_computes_the_same_and_can_be_changed(build: type[Tangled]) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(3, 4)
    expected, twin = model(x), shell(model)
    assert type(twin) is build
    assert torch.equal(twin(x), expected)
    assert twin.order[0] is twin.two
    assert twin.act.__self__ is twin
    twin.one.weight = nn.Parameter(torch.zeros(4, 4))
    twin.sizes["in"][0] = 2
    twin.shift = torch.zeros(4)
    twin.eval()
    assert model.training
    assert model.sizes == {"in": [4, 4]}
    assert torch.equal(model(x), expected)


def test_features_that_a_training_step_left_are_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.features = [model(torch.ones(2, 4))]
    (kept,) = shell(model).features
    assert kept.equal(model.features[0])
    assert kept.grad_fn is None


def test_a_shell_shares_its_tensors() -> None:
    model = Tangled()
    assert [id(p) for p in shell(model).parameters()] == [id(p) for p in model.parameters()]


def test_retyped_tensors_are_their_own_and_stay_tied() -> None:
    model = Tangled()
    twin = retyped(model, Tensor.double)
    assert twin.one.weight is twin.two.weight
    assert twin.shift.dtype == twin.one.bias.dtype == torch.float64
    assert isinstance(twin.one.weight, nn.Parameter)
    twin.one.weight.data.zero_()
    assert model.one.weight.any()


def test_parameters_are_changed_when_they_are_read_and_not_kept() -> None:
    torch.manual_seed(0)
    model, x = Tangled(), torch.randn(3, 4, dtype=torch.float64)
    twin = read_as(model, Tensor.double)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert isinstance(twin.one.weight, nn.Parameter)
    assert twin.one.weight.dtype == twin.shift.dtype == torch.float64
    assert torch.equal(twin(x), retyped(model, Tensor.double)(x))
    twin.one.weight.data.zero_()
    twin.shift.zero_()
    assert model.one.weight.any()
    assert model.shift.all()


def test_a_shell_of_what_is_changed_when_read_is_so_too() -> None:
    twin = shell(read_as(nn.Linear(4, 4, bias=False), Tensor.double))
    assert twin.bias is None
    assert twin.weight.dtype == torch.float64
    assert next(twin.parameters()).dtype == torch.float32
    twin.weight = nn.Parameter(torch.zeros(2, 4))
    assert twin.weight.shape == (2, 4)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.lock = (i for i in range(3))
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    with pytest.raises(ModelError, match=r"cannot be copied, because of 'lock' \(TypeError"):
        shell(model)


class Refusing(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Refusing:
        raise RuntimeError("no")


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Tangled(), Refusing(4, 4)))
    with pytest.raises(ModelError, match=r"because of '1\.1' \(RuntimeError: no\)"):
        shell(model)
    model[1][1] = nn.Linear(4, 4)
    model[1][0].seen = {"rows": (i for i in range(3))}
    with pytest.raises(ModelError, match=r"because of '1\.0\.seen'"):
        shell(model)
