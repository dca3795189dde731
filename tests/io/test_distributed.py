"""Masks and cuts of several alike models at once; in several processes tests/integrations and test_fsdp run them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ss_pruning
from ss_pruning.errors import InputError
from ss_pruning.io.distributed import sparsify_
from ss_pruning.sparsity.masks import masks_of
from ss_pruning.surgery.plan import Plan, plan_of

X = torch.randn(2, 3, 8, 8)


def net(seed: int) -> nn.Sequential:
    """The inner convolution, "3", is the only layer that neither reads the input nor puts out the output."""
    torch.manual_seed(seed)
    blocks = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ]
    model = nn.Sequential(*blocks, nn.Conv2d(8, 4, 1), nn.Flatten()).eval()
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    return model


def test_the_weakest_synapses_of_the_first_model_go_in_all() -> None:
    models = [net(0), net(1)]
    strength = {
        (o, i): float((models[0][1].weight[i].abs() * models[0][3].weight[o, i].norm()).detach())
        for o in range(8)
        for i in range(6)
    }
    weakest = set(sorted(strength, key=strength.__getitem__)[:24])
    assert sparsify_(models, X, sparsity=0.5, planned=None, keep_zeros=False) == Plan()
    for model in models:
        masks = masks_of(model)
        assert list(masks) == ["3"]
        assert {(o, i) for o, i in strength if not masks["3"][o, i]} == weakest
        assert {(o, i) for o, i in strength if not model[3].weight[o, i].any()} == weakest


def test_all_are_cut_to_one_plan_and_what_is_zero_stays_so() -> None:
    models = [net(0), net(1)]
    wanted = ss_pruning.plan(models[0], X, macs=0.7)[0]
    with torch.no_grad():
        kept = {cut.path: cut.kept for cut in wanted.cuts if cut.side == "out"}
        models[0][3].weight[kept.get("3", range(8))[0]] = 0
    plan = sparsify_(models, X, sparsity=None, planned=lambda: wanted, keep_zeros=True)
    assert plan == wanted
    assert all(plan_of(model) == wanted for model in models)
    assert models[0][3].weight.shape == models[1][3].weight.shape
    assert all(not masks_of(model)["3"][0].any() and masks_of(model)["3"][1:].all() for model in models)
    assert not models[1][3].weight[0].any()


def test_nothing_asked_is_nothing_done() -> None:
    model = net(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sparsify_([model], X, sparsity=None, planned=None, keep_zeros=False) == Plan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not masks_of(model)


def test_what_makes_no_plan_is_refused() -> None:
    with pytest.raises(InputError, match="has to give a plan"):
        sparsify_([net(0)], X, sparsity=None, planned=lambda: None, keep_zeros=False)  # type: ignore[return-value,arg-type]
