"""Heads: parts of an arrival's channels, each of which hears source channels of its own that mix within it.

In attention the channels of queries and keys feed several channels at once, but only those of their head. No table of
attention classes tells where heads are: the sources that the first channel hears, and none far from it does, reach as
far as the first head; if labels shared by the channels of a head come back unmixed, there are heads. They lie one
after the other or, where they were moved behind their channels, interleaved. Tables with an entry for each head
(relative position biases, temperatures) are found by the same labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ss_pruning.graph.connectivity import Heads
from ss_pruning.graph.probe.channel_labels import (
    Arrival,
    Inflow,
    Labels,
    Leaf,
    Sharing,
    Span,
    heard,
    label_of,
    pull_batch,
)


def with_heads(
    arrival: Arrival, inflows: Sequence[Inflow], leaves: Sequence[Leaf], labels: Labels
) -> list[Inflow]:
    """The same inflows of what attention hands on, and those of tables by head, with the heads that they belong to.

    There may be none. Loose tensors among the leaves may be tables.
    """
    mixing = [inflow for inflow in inflows if _may_mix(inflow) and not inflow.resolved]
    sharing = _sharing(arrival, mixing, labels) if mixing else None
    if sharing is None:
        return list(inflows)
    channels = torch.from_numpy(label_of(sharing, arrival.tensor.shape[arrival.axis]))
    channels = channels.argsort(stable=True).reshape(sharing[1], -1)
    known = {id(inflow.source) for inflow in inflows}
    tables = [leaf for leaf in leaves if leaf.axis < 0 and id(leaf) not in known]
    sources = [*(inflow.source for inflow in mixing), *tables]
    found = {id(f.source): f for f in pull_batch([(arrival, sources)], labels, sharing=sharing)[0]}
    told = [_told(inflow, found.get(id(inflow.source)), channels) for inflow in inflows]
    if not any(inflow.heads is not None and len(inflow.heads.pairs[:, 1].unique()) > 1 for inflow in told):
        return list(inflows)  # a layer for each head, so that none could lose one
    if not any(_mixes(inflow, channels) for inflow in told):
        return list(inflows)  # copies of one channel, as of a stream that is concatenated twice
    for table in (found[id(table)] for table in tables if id(table) in found):
        if not len(table.broadcast):
            heads = Heads(channels, table.pairs)
            told.append(replace(table, pairs=table.pairs[:0], broadcast=table.pairs[:, 0], heads=heads))
    return told


def with_one_head(arrival: Arrival, inflows: Sequence[Inflow]) -> list[Inflow]:
    """The same; where heads were not found, and something arrives channel by channel, what mixes is of one head."""
    found = any(inflow.heads is not None for inflow in inflows)
    if found or not any(len(inflow.pairs) for inflow in inflows):
        return list(inflows)
    channels = torch.arange(arrival.tensor.shape[arrival.axis])[None]

    def told(inflow: Inflow) -> Inflow:
        pairs = torch.stack([inflow.broadcast, torch.zeros_like(inflow.broadcast)], 1)
        return replace(inflow, heads=Heads(channels, pairs)) if _may_mix(inflow) else inflow

    return list(map(told, inflows))


def _may_mix(inflow: Inflow) -> bool:
    leaf = inflow.source
    return isinstance(leaf, Leaf) and leaf.axis >= 0 and len(inflow.broadcast) > 1


def _sharing(arrival: Arrival, mixing: Sequence[Inflow], labels: Labels) -> Sharing:
    """How the channels lie in heads, by what the first one hears; None where there is one head, or one a channel."""
    n = arrival.tensor.shape[arrival.axis]
    leaves = [inflow.source for inflow in mixing if isinstance(inflow.source, Leaf)]

    def hear(span: Span) -> Tensor:
        by_leaf = heard(arrival, leaves, labels, span)
        return torch.cat([hears[f.broadcast] for f, hears in zip(mixing, by_leaf, strict=True)])

    parts = [count for count in range(2, n // 2 + 1) if n % count == 0]
    if not parts:
        return None
    first = hear((0, 1))
    if not (first & ~hear((n - 1, n))).any():  # all hear the same
        return None
    # The narrowest heads that nothing of the first one is heard behind; or the most between whose first channels
    # nothing of it is heard.
    width = _least(parts, first, lambda width: hear((width, n)))
    if width is not None:
        return "runs", n // width
    between = _least(parts[::-1], first, lambda count: hear((1, count)))
    return None if between is None else ("strides", between)


def _least(sizes: Sequence[int], first: Tensor, others: Callable[[int], Tensor]) -> int | None:
    """The first of the sizes at which others hear nothing of what is the first channel's own; None if it has none.

    Its own is what they do not hear at the last size. Up to some size they hear of it, from there on they do not.
    """
    own = first & ~others(sizes[-1])
    if not own.any():
        return None
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if (own & others(sizes[middle])).any() else (low, middle)
    return sizes[high]


def _told(inflow: Inflow, by_head: Inflow | None, channels: Tensor) -> Inflow:
    """An inflow with what labels shared within heads say of its mixed channels."""
    if by_head is None:
        return inflow
    pairs = by_head.pairs[torch.isin(by_head.pairs[:, 0], inflow.broadcast)]
    sources, times = pairs[:, 0].unique(return_counts=True)
    pairs = pairs[torch.isin(pairs[:, 0], sources[times == 1])]
    return replace(inflow, heads=Heads(channels, pairs)) if len(pairs) else inflow


def _mixes(inflow: Inflow, channels: Tensor) -> bool:
    """Whether a head is fed by several channels of one source."""
    if inflow.heads is not None:
        heads = inflow.heads.pairs[:, 1]
    else:
        head_of = channels.flatten().argsort() // channels.shape[1]
        heads = torch.stack([inflow.pairs[:, 0], head_of[inflow.pairs[:, 1]]], 1).unique(dim=0)[:, 1]
    return len(heads.unique()) < len(heads)
