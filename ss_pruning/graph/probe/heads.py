"""Heads: runs of an arrival's channels, each of which hears source channels of its own that mix within it.

In attention the channels of queries and keys feed several channels at once, but only those of their head. No table of
attention classes tells where heads are: the sources that the first channel hears, and none far from it does, reach as
far as the first head; if labels shared by the channels of runs of that width come back unmixed, the runs are heads.
Tables with an entry for each head (relative position biases, temperatures) are found by the same labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ss_pruning.graph.connectivity import Heads
from ss_pruning.graph.probe.channel_labels import Labels
from ss_pruning.graph.probe.pulls import Arrival, Inflow, Leaf, heard, pull_batch


def with_heads(
    arrival: Arrival, inflows: Sequence[Inflow], leaves: Sequence[Leaf], labels: Labels
) -> list[Inflow]:
    """The same inflows, and those of tables by head, with the heads that they belong to, if there are any.

    Args:
        arrival: Of attention's result at the layer that reads it.
        inflows: What feeds it, channel by channel or mixed.
        leaves: What it may come from; loose tensors among them may be tables.
        labels: To pull with.
    """
    mixing = [inflow for inflow in inflows if _mixes(inflow)]
    width = _head_width(arrival, mixing, labels) if mixing else None
    if width is None:
        return list(inflows)
    count = arrival.tensor.shape[arrival.axis] // width
    known = {id(inflow.source) for inflow in inflows}
    tables = [leaf for leaf in leaves if leaf.axis < 0 and id(leaf) not in known]
    sources = [*(inflow.source for inflow in mixing), *tables]
    found = {id(f.source): f for f in pull_batch([(arrival, sources)], labels, sharing=("runs", count))[0]}
    told = [_told(inflow, found.get(id(inflow.source)), width) for inflow in inflows]
    if all(inflow.heads is None for inflow in told):
        return list(inflows)
    by_head = [found[id(table)] for table in tables if id(table) in found]
    return told + [_as_table(inflow, width) for inflow in by_head if not len(inflow.broadcast)]


def _mixes(inflow: Inflow) -> bool:
    leaf = inflow.source
    return isinstance(leaf, Leaf) and leaf.axis >= 0 and not inflow.resolved and len(inflow.broadcast) > 1


def _head_width(arrival: Arrival, mixing: Sequence[Inflow], labels: Labels) -> int | None:
    """Channels of a head, by the reach of those that the first channel hears; None where that is all or one."""
    n = arrival.tensor.shape[arrival.axis]
    widths = [width for width in range(2, n // 2 + 1) if n % width == 0]
    leaves = [inflow.source for inflow in mixing if isinstance(inflow.source, Leaf)]

    def hear(first: int, end: int) -> Tensor:
        by_leaf = heard(arrival, leaves, labels, (first, end))
        return torch.cat([hears[f.broadcast] for f, hears in zip(mixing, by_leaf, strict=True)])

    if not widths:
        return None
    own = hear(0, 1) & ~hear(widths[-1], n)
    if not own.any():
        return None
    low, high = 0, len(widths) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if (own & hear(widths[middle], n)).any() else (low, middle)
    return widths[high]


def _told(inflow: Inflow, by_head: Inflow | None, width: int) -> Inflow:
    """An inflow with what labels shared within heads say of its mixed channels."""
    if by_head is None:
        return inflow
    pairs = by_head.pairs[torch.isin(by_head.pairs[:, 0], inflow.broadcast)]
    channels, times = pairs[:, 0].unique(return_counts=True)
    pairs = pairs[torch.isin(pairs[:, 0], channels[times == 1])]
    return replace(inflow, heads=Heads(width, pairs)) if len(pairs) else inflow


def _as_table(inflow: Inflow, width: int) -> Inflow:
    entries = inflow.pairs[:, 0]
    return replace(inflow, pairs=inflow.pairs[:0], broadcast=entries, heads=Heads(width, inflow.pairs))
