"""Whole heads go, and what stays computes what it computed with them silenced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ss_pruning import prune_
from ss_pruning.config import Allocation
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan
from tests.support.attention import ATTENTION, EXAMPLE, Block, Fixed, Fused, Gated, LayerEach, block

OTHERS = ("embed", "fc1", "fc2")
PROJECTIONS = {"grouped": "o", "ofmaps": "out", "aggregated": "out"}


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_that_go_are_as_if_silenced(name: str) -> None:
    """Silenced by hand: the projection's weights for them are zero."""
    model = block(name).double()
    dense = copy.deepcopy(model)
    report = prune_(model, EXAMPLE.double(), ratio=0.5, allocation="local", ignore=OTHERS)
    plan: Plan = getattr(model, PLAN_ATTRIBUTE)
    path = f"attn.{PROJECTIONS.get(name, 'proj')}"
    (cut,) = (cut for cut in plan.cuts if (cut.path, cut.side) == (path, "in"))
    assert 0 < len(cut.kept) < cut.width
    assert report.max_error < 1e-10
    with torch.no_grad():
        dense.get_submodule(path).weight[:, cut.removed] = 0  # type: ignore[index,operator]
        torch.testing.assert_close(model(EXAMPLE.double()), dense(EXAMPLE.double()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ATTENTION)
def test_with_all_else_and_a_step_of_training(name: str) -> None:
    model = block(name)
    before = sum(p.numel() for p in model.parameters())
    report = prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert report.max_error < 1e-10
    stay = [("attn.qkv",)] if name == "multiquery" else []  # keys and values of all heads
    assert [left.paths for left in report.excluded] == [*stay, ("head",)]
    assert sum(p.numel() for p in model.parameters()) < 0.4 * before
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(EXAMPLE).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()


def test_numbers_follow_heads() -> None:
    model = block("fused")
    prune_(model, EXAMPLE, ratio=0.5, allocation="local", ignore=OTHERS)
    attention = model.attn
    assert (attention.num_heads, attention.attn_dim, attention.head_dim) == (2, 10, 5)


def test_attention_that_is_not_cut_keeps_its_numbers() -> None:
    torch.manual_seed(0)
    model = Block(nn.Sequential(Fused(), Fused())).eval()
    report = prune_(model, EXAMPLE, ratio=0.5, allocation="local", ignore=(*OTHERS, "attn.1"))
    assert [module.attn_dim for module in model.attn] == [10, 20]  # type: ignore[union-attr]
    assert not any("width" in left.reason for left in report.excluded)


def test_a_number_that_equals_the_stream_in_one_block_follows_heads_in_another() -> None:
    torch.manual_seed(0)
    model = Block(nn.Sequential(Fused(heads=1, width=12), Fused(heads=3, width=4))).eval()
    prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert (model.embed.out_channels, model.attn[1].num_heads, model.attn[1].attn_dim) == (6, 2, 8)  # type: ignore[index,union-attr]


def test_a_layer_for_each_head_loses_values() -> None:
    torch.manual_seed(0)
    model = Block(LayerEach()).eval()
    report = prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert report.max_error < 1e-10
    assert (model.attn.width, model.attn.proj.in_features) == (3, 9)  # type: ignore[union-attr]


@pytest.mark.parametrize("attention", [Fixed, Gated])
def test_heads_that_cannot_go_stay_and_are_named(attention: type[Fused]) -> None:
    model = Block(attention()).eval()
    report = prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert model.attn.qkv.out_features == 60  # type: ignore[union-attr]
    assert model.fc1.out_features == 8
    reasons = [left.reason for left in report.excluded if left.paths == ("attn.qkv",)]
    assert any("the forward pass relies on its width" in reason for reason in reasons)


def test_what_remains_of_heads_is_rounded_in_channels() -> None:
    model = block("fused")
    allocation = Allocation(scope="local", round_to=10)
    prune_(model, EXAMPLE, ratio=0.5, allocation=allocation, ignore=OTHERS)
    assert model.attn.proj.in_features == 10  # type: ignore[union-attr]


def error(model: nn.Module, dense: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(images) - dense(images)).square().mean())


@pytest.mark.parametrize("name", ["fused", "read"])
@pytest.mark.parametrize("how", ["mean", "linear", "reconstruct"])
def test_the_projection_makes_up_for_heads(how: Any, name: str) -> None:
    images = torch.randn(64, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    dense = block(name)
    errors = {}
    for compensation in ("none", how):
        model = block(name)
        prune_(
            model,
            EXAMPLE,
            ratio=0.5,
            allocation="local",
            importance="synaptic",
            compensation=compensation,
            calibration=images,
            ignore=OTHERS,
        )
        errors[compensation] = error(model, dense, images)
    assert errors[how] < 0.95 * errors["none"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224", "pit_ti_224", "convit_tiny"])
def test_timms_transformers_lose_heads(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64).eval()
    before = sum(p.numel() for p in model.parameters())
    heads = [m.num_heads for m in model.modules() if hasattr(m, "num_heads")]
    report = prune_(model, torch.randn(1, 3, 64, 64), ratio=0.5, allocation="local")
    assert report.max_error < 1e-10
    assert all(
        m.num_heads < n
        for m, n in zip((m for m in model.modules() if hasattr(m, "num_heads")), heads, strict=True)
    )
    assert sum(p.numel() for p in model.parameters()) < 0.35 * before
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
