"""Torch-Pruning's options for heads of attention, in `GraphPruner`."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

pytest.importorskip("torch_pruning", reason="needs torch-pruning")

import torch_pruning as tp

from ss_pruning.errors import InputError
from ss_pruning.integrations.torch_pruning.heads import KEPT_REASON
from ss_pruning.integrations.torch_pruning.pruner import GraphPruner
from tests.support.attention import EXAMPLE, Block, Proportional, block


def pruner_of(model: nn.Module, **options: Any) -> GraphPruner:
    ignored = [model.get_submodule(name) for name in ("embed", "head")]
    importance = tp.importance.GroupMagnitudeImportance()
    return GraphPruner(model, EXAMPLE, importance, pruning_ratio=0.5, ignored_layers=ignored, **options)


@pytest.mark.parametrize("steps", [1, 2])
def test_heads_that_go_only_with_their_stream(steps: int) -> None:
    model = Block(Proportional()).eval()
    importance = tp.importance.GroupMagnitudeImportance()
    pruner = GraphPruner(
        model,
        EXAMPLE,
        importance,
        pruning_ratio=0.5,
        iterative_steps=steps,
        ignored_layers=[model.head],
        num_heads={model.attn.qkv: 4},  # type: ignore[union-attr]
    )
    for _ in range(steps):
        pruner.step()
    assert (model.attn.num_heads, model.embed.out_channels, *pruner.num_heads.values()) == (2, 6, 2)
    assert model(EXAMPLE).shape == (2, 2)


def attention(model: nn.Module) -> Any:
    return model.get_submodule("attn")


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, 2),
        ({"prune_num_heads": True}, 2),
        ({"prune_num_heads": False}, 4),
        ({"prune_num_heads": True, "head_pruning_ratio": 0.25}, 3),
        ({"head_pruning_ratio": 0.0}, 4),
        ({"head_pruning_ratio": 0.75, "global_pruning": True}, 1),
        ({"prune_num_heads": False, "head_pruning_ratio": 0.75}, 4),
    ],
)
def test_so_many_heads_stay(options: dict[str, Any], heads: int) -> None:
    model = block("fused")
    pruner_of(model, **options).step()
    assert (attention(model).num_heads, attention(model).qkv.out_features) == (heads, 15 * heads)
    assert model.get_submodule("fc1").out_features == 8
    assert model(EXAMPLE).shape == (2, 2)


def test_a_ratio_of_a_layers_own() -> None:
    model = block("fused")
    qkv = attention(model).qkv
    pruner_of(model, head_pruning_ratio=0.5, head_pruning_ratio_dict={qkv: 0.25}).step()
    assert attention(model).num_heads == 3


@pytest.mark.parametrize("steps", [1, 3])
def test_numbers_of_heads_follow(steps: int) -> None:
    """As Torch-Pruning's examples read them, after steps that cut and steps that hand out groups."""
    for interactive in (False, True):
        model = block("fused")
        qkv = attention(model).qkv
        pruner = pruner_of(model, num_heads={qkv: 4}, head_pruning_ratio=0.75, iterative_steps=steps)
        assert pruner.num_heads == {qkv: 4}
        for _ in range(steps):
            for group in pruner.step(interactive=interactive) or ():
                group.prune()
        assert pruner.num_heads == {qkv: 1}


def test_heads_that_stay_are_named() -> None:
    pruner = pruner_of(block("fused"), prune_num_heads=False)
    (left,) = (left for left in pruner.excluded if left.reason == KEPT_REASON)
    assert (left.paths, left.channels) == (("attn.qkv",), 60)


def test_a_ratio_out_of_range() -> None:
    with pytest.raises(InputError, match="head_pruning_ratio=2"):
        pruner_of(block("fused"), head_pruning_ratio=2)
