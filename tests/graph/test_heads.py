"""Heads of attention: found without knowing its class, and one channel set each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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


class Gates(nn.Module):
    """Half of what one layer puts out is a gate for the other: two channels a channel set, and no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down, self.head = nn.Linear(4, 12), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, y = self.both(x).chunk(2, -1)
        return self.head(self.down(gate.sigmoid() * y))


def test_gates_are_no_heads() -> None:
    model = Gates().eval()
    groups = couple(trace(model, torch.randn(2, 4)), model).groups
    assert [[s.of_heads for s in group.subgroups] for group in groups] == [[False], [False]]


@pytest.mark.parametrize(("name", "width"), [("fused", 5), ("grouped", 6), ("ofmaps", 4), ("positioned", 5)])
def test_the_width_of_a_head(name: str, width: int) -> None:
    model = block(name)
    groups = couple(trace(model, EXAMPLE), model).groups
    assert {s.head_width for g in groups for s in g.subgroups if s.of_heads} == {width}
