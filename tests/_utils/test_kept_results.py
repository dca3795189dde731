"""What modules have kept from earlier passes plays no part, and is of no use to the smaller model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning._utils.running import without_kept_results
from ss_pruning.errors import NothingToPruneError
from ss_pruning.graph import trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Lays its bias out once for evaluation, as attention of LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3)
        self.bias_of_channels = nn.Parameter(torch.randn(8))
        self.scale = torch.tensor(2.0)
        self.laid_out: dict[str, Tensor] = {}
        self.features: Tensor | None = None

    def bias(self) -> Tensor:
        if self.training:
            return self.bias_of_channels[:, None, None]
        if "cpu" not in self.laid_out:
            self.laid_out["cpu"] = self.bias_of_channels[:, None, None].expand(8, 6, 6)
        return self.laid_out["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        self.features = (self.first(x) + self.bias()).relu() * self.scale
        return self.last(self.features)


class Wide(Net):
    """Lays it out at whatever width it has."""

    def bias(self) -> Tensor:
        if self.training:
            return self.bias_of_channels[:, None, None]
        if "cpu" not in self.laid_out:
            self.laid_out["cpu"] = self.bias_of_channels[:, None, None].expand(-1, 6, 6)
        return self.laid_out["cpu"]


def made(kind: type[Net] = Wide, *, run: bool) -> Net:
    torch.manual_seed(0)
    model = kind().eval()
    if run:
        with torch.no_grad():
            model(X)
    return model


def test_a_model_that_has_run_is_cut_as_one_that_has_not() -> None:
    fresh, used = made(run=False), made(run=True)
    for model in (fresh, used):
        ss_pruning.prune_(model, X[:1], ratio=0.5, allocation="local")
    assert used.first.out_channels == len(used.bias_of_channels) == 4
    assert torch.equal(used(X), fresh(X))
    assert used.scale.item() == 2


def test_what_was_kept_is_there_again_where_nothing_has_changed() -> None:
    model = made(run=True)
    kept = model.laid_out
    trace(model, X)
    assert model.laid_out is kept
    assert len(kept) == 1
    with pytest.raises(NothingToPruneError):
        ss_pruning.prune_(model, X, ratio=0.5, ignore="first")
    assert model.laid_out is kept


def test_weights_that_change_leave_nothing_of_the_old() -> None:
    dense = made(run=True)
    model = copy.deepcopy(dense)
    ss_pruning.prune_(model, X[:1], ratio=0.25, allocation="local")
    with torch.no_grad():
        model(X)
    ss_pruning.recover_(model, dense, torch.randn(32, 3, 8, 8), steps=20)
    expected = copy.deepcopy(model)
    expected.laid_out.clear()
    assert torch.equal(model(X), expected(X))


def test_pruners_that_cut_in_place_leave_nothing_of_the_old() -> None:
    model = made(run=True)
    importance = ss_pruning.SynapticImportance()
    ss_pruning.GraphPruner(model, X[:1], importance, pruning_ratio=0.5, ignored_layers=[model.last]).step()
    assert model(X).shape == (2, 4, 4, 4)
    assert len(model.bias_of_channels) == 4


def test_what_passes_read_and_do_not_make_stays() -> None:
    model = made(run=True)
    with without_kept_results(model, X):
        assert model.scale.item() == 2
        assert model.laid_out == {}
        assert model.features is not None  # code may rely on a tensor
        with without_kept_results(model, X):
            assert model.laid_out == {}
    assert len(model.laid_out) == 1


class Stateful(nn.Module):
    """A neuron whose potential is what the last pass left: made anew, but not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.potential: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        before = self.potential.get("last", torch.zeros(len(x), 3))
        self.potential["last"] = before + self.layer(x)
        return self.potential["last"]


@dataclass
class Potential:
    """Wrapped, so that only who looks for it finds the tensor."""

    value: Tensor


class Wrapping(Stateful):
    def forward(self, x: Tensor) -> Potential:  # type: ignore[override]
        return Potential(super().forward(x))


@pytest.mark.parametrize("kind", [Stateful, Wrapping])
def test_state_is_no_result(kind: type[Stateful]) -> None:
    model, x = kind().eval(), torch.ones(2, 3)
    with torch.no_grad():
        model(x)
    before = model.potential
    with without_kept_results(model, x):
        assert model.potential is before
        assert before
