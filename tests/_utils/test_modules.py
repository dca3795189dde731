"""The flat walk finds what torch's own walks find, in the same order and under the same paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ss_pruning._utils.modules import modules_of, parameters_of, tensors_of


def tangled() -> nn.Module:
    """A layer under two paths, a block under two paths, a tied weight, a shared buffer, an empty place."""
    layer, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    block = nn.Sequential(layer, nn.ReLU(), norm)
    model = nn.ModuleDict({"first": block, "again": layer, "deep": nn.Sequential(block, nn.Linear(3, 3))})
    model["deep"][1].weight = layer.weight
    model.register_buffer("mean", norm.running_mean)
    model.register_module("nothing", None)
    model.register_parameter("none", None)
    model.register_parameter("scale", nn.Parameter(torch.ones(2)))
    return model


def scripted() -> nn.Module:
    """A compiled child keeps its modules and tensors in tables of another kind."""
    return nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))


@pytest.mark.parametrize("build", [tangled, scripted])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_the_walk_finds_what_torch_finds(build: object) -> None:
    assert callable(build)
    model = build()
    assert list(modules_of(model).items()) == list(model.named_modules())
    for ours, theirs in (
        (parameters_of(model), model.named_parameters()),
        (tensors_of(model), (*model.named_parameters(), *model.named_buffers())),
    ):
        expected = list(theirs)
        assert list(ours) == [name for name, _ in expected]
        assert all(a is b for a, (_, b) in zip(ours.values(), expected, strict=True))
