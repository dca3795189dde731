"""Heads of attention: found without knowing its class, and one channel set each."""

from __future__ import annotations

import pytest

from ss_pruning.graph.groups import couple
from ss_pruning.graph.tracing import trace
from tests.support.attention import ATTENTION, EXAMPLE, Block, Fused, block


@pytest.mark.parametrize("name", ATTENTION)
def test_a_head_is_one_channel_set(name: str) -> None:
    model = block(name)
    groups = couple(trace(model, EXAMPLE), model).groups
    (group,) = (group for group in groups if group.name.startswith("attn."))
    (heads,) = group.subgroups
    attention = model.attn
    for head in range(heads.size):
        found = {
            (member.path.removeprefix("attn."), member.side): sorted(member.index[head].tolist())
            for member in heads.members
        }
        assert found == attention.truth(head)  # type: ignore[operator]


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_few_heads(heads: int) -> None:
    model = Block(Fused(heads=heads)).eval()
    groups = couple(trace(model, EXAMPLE), model).groups
    steps = heads if heads > 1 else 5  # of one head alone, values are channels like others
    assert [group.steps for group in groups if group.name == "attn.qkv"] == [steps]
