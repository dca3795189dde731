"""Backward passes of labels, from where they arrive to leaves or to what arrived earlier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ss_pruning._utils.arrays import Ints
from ss_pruning.graph.connectivity import Heads
from ss_pruning.graph.probe.channel_labels import Labels, Pulled, Sharing, aligned_axis, decode, rows_along

#: Consecutive channels: the first, and the one behind the last.
Span = tuple[int, int]


@dataclass
class Leaf:
    """A tensor that was cut loose, and the axis that holds its channels (-1: not yet known, a loose tensor)."""

    source: str
    tensor: Tensor
    axis: int

    @property
    def end(self) -> Tensor:
        """Where a pull ends."""
        return self.tensor


@dataclass
class Arrival:
    """The input of one layer call, still attached to the leaves before it.

    Attributes:
        path: Of the layer.
        tensor: A clone of what arrived.
        axis: The one that holds the channels.
        index: Which call of the layer it is.
        end: The place of what arrived itself in the graph, where pulls from later arrivals may end; None without one.
    """

    path: str
    tensor: Tensor
    axis: int
    index: int
    end: GradientEdge | None = None


@dataclass(frozen=True)
class Inflow:
    """What a leaf, or what arrived earlier, feeds.

    Attributes:
        source: Either.
        axis: Where its channels lie.
        pairs: `[n, 2]`, its channels and the arrival's.
        broadcast: Its channels of which one element feeds several.
        whole: Whether each of its elements feeds something.
        resolved: Whether its broadcast channels have been looked at more closely.
        heads: Of the broadcast channels those that feed just one head of the arrival.
    """

    source: Leaf | Arrival
    axis: int
    pairs: Tensor
    broadcast: Tensor
    whole: bool = True
    resolved: bool = False
    heads: Heads | None = None

    @property
    def hands_on(self) -> bool:
        """Whether it is handed on whole, channel by channel: what fed it feeds what it feeds."""
        one_to_one = all(len(side.unique()) == len(side) for side in self.pairs.unbind(1))
        return self.whole and not len(self.broadcast) and one_to_one


def all_channels(arrival: Arrival) -> Span:
    """From the first to the last."""
    return 0, arrival.tensor.shape[arrival.axis]


def pull_batch(
    batch: Sequence[tuple[Arrival, Sequence[Leaf | Arrival]]],
    labels: Labels,
    span: Span | None = None,
    sharing: Sharing = None,
) -> list[list[Inflow]]:
    """For each arrival what feeds it, seen from its channels in `span`; no two arrivals see the same leaf."""
    ends: list[Any] = [source.end for _, near in batch for source in near]
    cotangents = [
        _cotangents(arrival, labels, span or all_channels(arrival), sharing) for arrival, _ in batch
    ]
    pulls = zip(
        *(
            torch.autograd.grad(
                [arrival.tensor for arrival, _ in batch],
                ends,
                cotangent,
                retain_graph=True,
                allow_unused=True,
            )
            for cotangent in zip(*(c for c, _ in cotangents), strict=True)
        ),
        strict=True,
    )
    found: list[list[Inflow]] = []
    reached: list[tuple[int, Leaf | Arrival, Pulled]] = []
    for number, ((_, near), (_, permuted)) in enumerate(zip(batch, cotangents, strict=True)):
        found.append([])
        for source in near:
            known = [g for g in next(pulls) if g is not None and g.numel()]
            # A loose tensor counts if its elements follow the channels along some axis.
            axis: int | None = source.axis
            if source.axis < 0 and len(known) == 3:
                axis = aligned_axis(known, permuted, shared=sharing is not None)
            if len(known) == 3 and axis is not None:
                reached.append((number, source, Pulled(known, axis, permuted)))
    decoded = decode([pulled for *_, pulled in reached])
    for (number, source, pulled), (pairs, broadcast) in zip(reached, decoded, strict=True):
        if len(pairs) or len(broadcast):
            whole = isinstance(source, Leaf) or bool(pulled.gradients[0].all())
            found[number].append(Inflow(source, pulled.axis, pairs, broadcast, whole))
    return found


def _cotangents(arrival: Arrival, labels: Labels, span: Span, sharing: Sharing) -> tuple[list[Tensor], Ints]:
    """What to pull with, 0 outside the channels of `span`, and the permuted labels."""
    *cotangents, permuted = labels(arrival.tensor, arrival.axis, sharing)
    if span != all_channels(arrival):
        inside = torch.zeros_like(cotangents[0])
        inside.narrow(arrival.axis, span[0], span[1] - span[0]).fill_(1)
        cotangents = [c * inside for c in cotangents]
    return cotangents, permuted


def heard(arrival: Arrival, leaves: Sequence[Leaf], labels: Labels, span: Span) -> list[Tensor]:
    """By leaf, `[channels]`: whether the arrival's channels in `span` hear something of each."""
    (cotangent, *_), _ = _cotangents(arrival, labels, span, None)
    found = torch.autograd.grad(
        arrival.tensor, [leaf.tensor for leaf in leaves], cotangent, retain_graph=True, allow_unused=True
    )
    return [
        torch.zeros(leaf.tensor.shape[leaf.axis], dtype=torch.bool)
        if g is None
        else rows_along(g, leaf.axis).any(1).cpu()
        for leaf, g in zip(leaves, found, strict=True)
    ]
