"""Heads that can go only in proportion to their stream are tied to it, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ss_pruning import prune_
from ss_pruning.graph.traced import TracedModel
from ss_pruning.planning.tied_heads import _tied, with_tied_heads
from tests.support.attention import ATTENTION, EXAMPLE, Block, Fixed, Proportional, block
from tests.support.snapshot import snapshot


def tied(model: nn.Module) -> list[set[str]]:
    """The layers whose outputs shrink together, of groups in which heads do."""
    groups = with_tied_heads(TracedModel.of(model, EXAMPLE)).coupling.groups
    return [
        {member.path for s in group.subgroups for member in s.members if member.side == "out"}
        for group in groups
        if any(subgroup.of_heads for subgroup in group.subgroups)
    ]


def proportional() -> Block:
    torch.manual_seed(0)
    return Block(Proportional()).eval()


def test_heads_and_the_stream_that_they_read() -> None:
    assert tied(proportional()) == [{"embed", "attn.qkv", "attn.proj", "fc2"}]


@pytest.mark.parametrize("name", ATTENTION)
def test_heads_that_can_go_alone(name: str) -> None:
    (outputs,) = tied(block(name))
    assert "embed" not in outputs


def test_heads_that_cannot_go_at_all_do_not_hold_the_stream() -> None:
    """Written into code is how many there are, so that no tie would help."""
    torch.manual_seed(0)
    model = Block(Fixed(width=3)).eval()
    assert tied(model) == [{"attn.qkv"}]
    prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert (model.embed.out_channels, model.attn.qkv.out_features) == (6, 36)  # type: ignore[union-attr]


@pytest.mark.parametrize(("ratio", "heads"), [(0.3, 3), (0.5, 2), (0.7, 2), (0.8, 1)])
def test_both_lose_the_same_share(ratio: float, heads: int) -> None:
    model = proportional()
    report = prune_(model, EXAMPLE, ratio=ratio, allocation="local")
    assert report.max_error < 1e-10
    assert (model.attn.num_heads, model.embed.out_channels) == (heads, 3 * heads)
    assert model.attn.qkv.in_features == model.attn.proj.in_features == 3 * heads  # type: ignore[union-attr]


class Sized(Block):
    """Takes images of one size, whose number is that of the channels of its stream."""

    def __init__(self) -> None:
        super().__init__(Proportional())
        self.side = 12

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.side
        return super().forward(x)


def test_a_number_that_equals_a_width_by_chance() -> None:
    torch.manual_seed(0)
    model, images = Sized().eval(), torch.randn(2, 3, 2, 12)
    groups = with_tied_heads(TracedModel.of(model, images)).coupling.groups
    assert [len(group.subgroups) for group in groups if group.name == "embed"] == [2]
    report = prune_(model, images, ratio=0.5, allocation="local")
    assert (model.side, model.embed.out_channels, report.max_error < 1e-10) == (12, 6, True)


@pytest.mark.parametrize(("widths", "together"), [((4, 8), 1), ((3, 4), 2), ((2, 4), 1)])
def test_what_has_no_step_in_common_is_not_tied(widths: tuple[int, int], together: int) -> None:
    """Both would stay whole, and nothing would say why."""
    first, second = widths
    model = nn.Sequential(
        nn.Linear(2, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)
    )
    groups = TracedModel.of(model.eval(), torch.randn(2, 2)).coupling.groups
    assert [group.steps for group in groups] == [first, second]
    assert len(_tied(list(groups))) == together


class Deceiving(Proportional):
    """On shapes heads go with the stream. In truth none may go, and the stream alone can."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(x))
        heads = y.shape[1]
        assert heads == 4 or (x.is_meta and 3 * heads == x.shape[-1])
        return self.proj(y.transpose(1, 2).flatten(2))


def test_a_tie_that_fails_is_loosened() -> None:
    torch.manual_seed(0)
    model = Block(Deceiving()).eval()
    assert tied(model) == [{"embed", "attn.qkv", "attn.proj", "fc2"}]
    report = prune_(model, EXAMPLE, ratio=0.5, allocation="local")
    assert (model.embed.out_channels, model.attn.qkv.in_features) == (6, 6)
    assert model.attn.qkv.out_features == 36
    assert any("attn.qkv" in entry.paths for entry in report.excluded)


def test_the_model_is_left_as_it_was() -> None:
    model = proportional()
    before = snapshot(model)
    with_tied_heads(TracedModel.of(model, EXAMPLE))
    assert snapshot(model) == before
