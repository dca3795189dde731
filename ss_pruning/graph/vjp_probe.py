"""VJP probe: labels propagated back from where they arrive to the leaves that they come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ss_pruning._utils.arrays import Ints
from ss_pruning.graph.channel_labels import (
    Labels,
    Pulled,
    Sharing,
    aligned_axis,
    decode,
    label_of,
    rows_along,
)
from ss_pruning.graph.connectivity import Connectivity, Edge, LooseTensor

#: Of all randomness in the probe.
SEED = 20181811
# From so many channels on, a broadcast may turn out to be a stream that arrives more than once.
_STREAM = 8


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
class _Feed:
    """What a leaf, or what arrived earlier, feeds.

    Attributes:
        source: Either.
        axis: Where its channels lie.
        pairs: `[n, 2]`, its channels and the arrival's.
        broadcast: Its channels of which one element feeds several.
        whole: Whether each of its elements feeds something.
        settled: Whether its broadcast channels have been looked at more closely.
    """

    source: Leaf | Arrival
    axis: int
    pairs: Tensor
    broadcast: Tensor
    whole: bool = True
    settled: bool = False

    @property
    def hands_on(self) -> bool:
        """Whether it is handed on whole, channel by channel: what fed it feeds what it feeds."""
        one_to_one = all(len(side.unique()) == len(side) for side in self.pairs.unbind(1))
        return self.whole and not len(self.broadcast) and one_to_one


def _look_back(
    root: Tensor, leaves: Mapping[int, Leaf], earlier: Mapping[Any, int]
) -> tuple[list[Leaf], list[int]]:
    """The leaves in the history of `root`, and numbers of what arrived earlier, behind which it does not look."""
    found: list[Leaf] = []
    passed: dict[int, None] = {}
    seen: set[Any] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in leaves:
            found.append(leaves[id(variable)])
        for edge in node.next_functions:
            if edge in earlier:
                passed[earlier[edge]] = None
            else:
                stack.append(edge[0])
    return found, list(passed)


@dataclass(frozen=True)
class _Horizon:
    """What is behind an arrival: the leaves and the earlier arrivals that are met first, and all leaves by `id`."""

    leaves: list[Leaf]
    passed: list[int]
    all: dict[int, Leaf]


def _horizons(arrivals: Sequence[Arrival], leaves: Mapping[int, Leaf]) -> list[_Horizon]:
    """Look back from each arrival to the ones before: a residual stream is walked once, not once for each layer."""
    earlier: dict[Any, int] = {}
    horizons: list[_Horizon] = []
    for i, arrival in enumerate(arrivals):
        near, passed = _look_back(arrival.tensor, leaves, earlier)
        passed = [j for j in passed if horizons[j].all]
        everything = {id(leaf.tensor): leaf for leaf in near}
        for j in passed:
            everything |= horizons[j].all
        horizons.append(_Horizon(near, passed, everything))
        if arrival.end is not None:
            earlier.setdefault((arrival.end.node, arrival.end.output_nr), i)
    return horizons


def pull(
    arrivals: Sequence[Arrival], leaves: Mapping[int, Leaf], labels: Labels, connectivity: Connectivity
) -> None:
    """Pull labels from what arrived at layers back to the leaves, and note who feeds whom.

    A pull ends at what arrived at an earlier layer, if it is handed on channel by channel: its sources are known then.
    """
    known: dict[int, list[_Feed]] = {}  # by `id` of the arrival
    for arrival, near in zip(arrivals, _pull_near(arrivals, leaves, labels), strict=True):
        feeds = _with_those_before(near, known)
        known[id(arrival)] = feeds = [_resolved(arrival, feed, labels, feeds) for feed in feeds]
        for feed in feeds:
            leaf = feed.source
            assert isinstance(leaf, Leaf)
            if leaf.axis < 0:
                size = leaf.tensor.shape[feed.axis]
                connectivity.loose.setdefault(leaf.source, LooseTensor(leaf.source, feed.axis, size))
            edge = Edge(leaf.source, arrival.index, feed.pairs, feed.broadcast)
            connectivity.edges[arrival.path].append(edge)


def _pull_near(arrivals: Sequence[Arrival], leaves: Mapping[int, Leaf], labels: Labels) -> list[list[_Feed]]:
    """For each arrival what feeds it: leaves, and what arrived earlier where that is handed on channel by channel."""
    horizons = _horizons(arrivals, leaves)
    found: list[list[_Feed]] = [[] for _ in arrivals]
    todo = [i for i, horizon in enumerate(horizons) if horizon.all]
    for far in (False, True):
        for numbers in _apart({i: horizons[i].all for i in todo}):
            ends = [_ends(horizons[i], arrivals, far) for i in numbers]
            batch = [(arrivals[i], near) for i, near in zip(numbers, ends, strict=True)]
            for i, feeds in zip(numbers, _pull_batch(batch, labels), strict=True):
                found[i] = feeds
        todo = [i for i in todo if not all(isinstance(f.source, Leaf) or f.hands_on for f in found[i])]
    return found


def _ends(horizon: _Horizon, arrivals: Sequence[Arrival], far: bool) -> list[Leaf | Arrival]:
    """Where the pulls from an arrival end: `far` back, or no further than at what arrived before."""
    if far:
        return [*horizon.all.values()]
    return [*horizon.leaves, *(arrivals[j] for j in horizon.passed)]


def _with_those_before(near: Sequence[_Feed], known: Mapping[int, Sequence[_Feed]]) -> list[_Feed]:
    """Feeds from leaves alone: what feeds an earlier arrival feeds what that feeds."""
    feeds = {id(feed.source): feed for feed in near if isinstance(feed.source, Leaf)}
    direct = set(feeds)
    for passed in (feed for feed in near if isinstance(feed.source, Arrival)):
        onward = torch.full((int(passed.pairs[:, 0].max()) + 1,), -1)
        onward[passed.pairs[:, 0]] = passed.pairs[:, 1]
        for feed in known[id(passed.source)]:
            key = id(feed.source)
            if key in direct:  # was seen from here, in all ways in which it feeds
                continue
            pairs, broadcast = torch.stack([feed.pairs[:, 0], onward[feed.pairs[:, 1]]], 1), feed.broadcast
            if key in feeds:
                pairs = torch.cat([feeds[key].pairs, pairs]).unique(dim=0)
                broadcast = torch.cat([feeds[key].broadcast, broadcast]).unique()
                pairs = pairs[~torch.isin(pairs[:, 0], broadcast)]
            feeds[key] = replace(feed, pairs=pairs, broadcast=broadcast, settled=True)
    return [*feeds.values()]


def _resolved(arrival: Arrival, feed: _Feed, labels: Labels, others: Sequence[_Feed]) -> _Feed:
    """The same, with channels that feed several told apart as far as that goes."""
    leaf = feed.source
    if feed.settled or not isinstance(leaf, Leaf) or leaf.axis < 0 or not len(feed.broadcast):
        return feed
    more, broadcast = _pull_blocks(arrival, leaf, labels, others, feed.broadcast)
    pairs = torch.cat([feed.pairs, more])
    if not len(broadcast) or _mixed(arrival, leaf, broadcast):
        return replace(feed, pairs=pairs, broadcast=broadcast)
    pairs, broadcast = _pull_parts(arrival, leaf, labels, _whole(arrival), pairs, broadcast)
    return replace(feed, pairs=pairs, broadcast=broadcast)


_Span = tuple[int, int]


def _apart(near: Mapping[int, Collection[int]]) -> list[list[int]]:
    """Numbers of arrivals, in batches of which no two see the same leaf: one backward pass serves a batch.

    Args:
        near: By number of an arrival, the leaves that it sees.
    """
    batches: list[tuple[list[int], set[int]]] = []
    for i, leaves in near.items():
        numbers, taken = next((b for b in batches if b[1].isdisjoint(leaves)), ([], set()))
        if not numbers:
            batches.append((numbers, taken))
        numbers.append(i)
        taken |= set(leaves)
    return [numbers for numbers, _ in batches]


def _whole(arrival: Arrival) -> _Span:
    return 0, arrival.tensor.shape[arrival.axis]


def _pull_batch(
    batch: Sequence[tuple[Arrival, Sequence[Leaf | Arrival]]],
    labels: Labels,
    span: _Span | None = None,
    sharing: Sharing = None,
) -> list[list[_Feed]]:
    """For each arrival what feeds it, seen from its channels in `span`; no two arrivals see the same leaf."""
    ends: list[Any] = [source.end for _, near in batch for source in near]
    cotangents = [_cotangents(arrival, labels, span or _whole(arrival), sharing) for arrival, _ in batch]
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
    found: list[list[_Feed]] = []
    reached: list[tuple[int, Leaf | Arrival, Pulled]] = []
    for number, ((_, near), (_, permuted)) in enumerate(zip(batch, cotangents, strict=True)):
        found.append([])
        for source in near:
            known = [g for g in next(pulls) if g is not None and g.numel()]
            # A loose tensor counts if its elements follow the channels along some axis.
            axis = source.axis if source.axis >= 0 or len(known) < 3 else aligned_axis(known, permuted)
            if len(known) == 3 and axis is not None:
                reached.append((number, source, Pulled(known, axis, permuted)))
    decoded = decode([pulled for *_, pulled in reached])
    for (number, source, pulled), (pairs, broadcast) in zip(reached, decoded, strict=True):
        if len(pairs) or len(broadcast):
            whole = isinstance(source, Leaf) or bool(pulled.gradients[0].all())
            found[number].append(_Feed(source, pulled.axis, pairs, broadcast, whole))
    return found


def _cotangents(arrival: Arrival, labels: Labels, span: _Span, sharing: Sharing) -> tuple[list[Tensor], Ints]:
    """What to pull with, 0 outside the channels of `span`, and the permuted labels."""
    *cotangents, permuted = labels(arrival.tensor, arrival.axis, sharing)
    if span != _whole(arrival):
        inside = torch.zeros_like(cotangents[0])
        inside.narrow(arrival.axis, span[0], span[1] - span[0]).fill_(1)
        cotangents = [c * inside for c in cotangents]
    return cotangents, permuted


def _pull_blocks(
    arrival: Arrival, leaf: Leaf, labels: Labels, found: Sequence[_Feed], broadcast: Tensor
) -> tuple[Tensor, Tensor]:
    """Tell which channels feed a block of channels of their own: pooled (to more places than there were) and flattened.

    One place then feeds several channels, but none outside the block. Where something feeds the channels of a block one
    by one, a gate for all of them is a gate.

    Returns:
        Pairs of what is resolved so, and the channels that are not.
    """
    count, n = leaf.tensor.shape[leaf.axis], arrival.tensor.shape[arrival.axis]
    resolved = [broadcast.new_empty((0, 2))]
    for sharing in (("runs", count), ("strides", count)) if n > count > 1 and n % count == 0 else ():
        block = torch.from_numpy(label_of(sharing, n))
        if any(_tells_apart(feed.pairs, block) for feed in found):
            continue
        for feed in _pull_batch([(arrival, [leaf])], labels, sharing=sharing)[0]:
            blocks = feed.pairs[torch.isin(feed.pairs[:, 0], broadcast)]
            at, listeners = (blocks[:, 1:] == block).nonzero(as_tuple=True)
            resolved.append(torch.stack([blocks[at, 0], listeners], 1))
            broadcast = broadcast[~torch.isin(broadcast, blocks[:, 0])]
    return torch.cat(resolved), broadcast


def _tells_apart(pairs: Tensor, block: Tensor) -> bool:
    """Whether different channels of one source feed a block."""
    into = torch.stack([pairs[:, 0], block[pairs[:, 1]]], 1).unique(dim=0)[:, 1]
    return len(into.unique()) < len(into)


def _mixed(arrival: Arrival, leaf: Leaf, broadcast: Tensor) -> bool:
    """Whether one channel hears many of those that feed several, as in attention; of a stream that comes twice, one."""
    cotangent = torch.zeros_like(arrival.tensor)
    cotangent.select(arrival.axis, arrival.tensor.shape[arrival.axis] // 2).fill_(1)
    cotangent *= torch.linspace(0.5, 1.5, cotangent.numel()).reshape(cotangent.shape).to(cotangent)
    (heard,) = torch.autograd.grad(arrival.tensor, [leaf.tensor], cotangent, retain_graph=True)
    return int(rows_along(heard, leaf.axis)[broadcast.to(heard.device)].any(1).sum()) >= _STREAM


def _pull_parts(
    arrival: Arrival,
    leaf: Leaf,
    labels: Labels,
    span: _Span,
    pairs: Tensor,
    broadcast: Tensor,
    patience: int = 2,
) -> tuple[Tensor, Tensor]:
    """Tell apart several listeners of one channel (a stream that is concatenated twice) by looking at half of them.

    Goes on while that resolves channels (with some patience for streams, whose copies may straddle the halves); a gate
    or attention, which everything listens to, stays a broadcast.
    """
    middle = (span[0] + span[1]) // 2
    if span[1] - span[0] < 2:
        return pairs, broadcast
    spans = ((span[0], middle), (middle, span[1]))
    halves = [_pull_batch([(arrival, [leaf])], labels, half)[0] for half in spans]
    mixed = torch.cat([broadcast[:0], *(feed.broadcast for half in halves for feed in half)]).unique()
    if not set(broadcast.tolist()) - set(mixed.tolist()):
        patience -= 1
        if not patience or len(broadcast) < _STREAM:
            return pairs, broadcast
    resolved = [pairs]
    still: list[Tensor] = [broadcast[:0]]
    for half, found in zip(spans, halves, strict=True):
        for feed in found:
            more, rest = feed.pairs, feed.broadcast
            if len(rest):
                more, rest = _pull_parts(arrival, leaf, labels, half, more, rest, patience)
            resolved.append(more)
            still.append(rest)
    left = torch.cat(still).unique()
    merged = torch.cat(resolved).unique(dim=0)
    return merged[~torch.isin(merged[:, 0], left)], left


def pull_output(tensor: Tensor, leaves: Mapping[int, Leaf], connectivity: Connectivity) -> None:
    """Note the source channels from which an output of the model is reached."""
    near = [leaf for leaf in _look_back(tensor, leaves, {})[0] if leaf.axis >= 0]
    if not near or not tensor.is_floating_point():
        return
    r = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(SEED)).to(
        tensor.device, tensor.dtype
    )
    grads = torch.autograd.grad(
        tensor, [leaf.tensor for leaf in near], r + 0.5, retain_graph=True, allow_unused=True
    )
    reached = [(leaf, g) for leaf, g in zip(near, grads, strict=True) if isinstance(g, Tensor)]
    for leaf, g in reached:
        touched = rows_along(g, leaf.axis).ne(0).any(1).nonzero().flatten().cpu()
        before = connectivity.reaches_output.get(leaf.source, touched)
        connectivity.reaches_output[leaf.source] = torch.cat([before, touched]).unique()
