"""VJP probe: labels propagated back from where they arrive to the leaves that they come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ss_pruning.graph.connectivity import Connectivity, Edge, LooseTensor
from ss_pruning.graph.probe.channel_labels import (
    Arrival,
    Inflow,
    Labels,
    Leaf,
    Sharing,
    Span,
    all_channels,
    heard,
    label_of,
    pull_batch,
    rows_along,
)
from ss_pruning.graph.probe.heads import with_heads, with_one_head

#: Of all randomness in the probe.
SEED = 20181811
# From so many channels on, a broadcast may turn out to be a stream that arrives more than once.
_STREAM = 8


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


def unseen(arrivals: Sequence[Arrival], leaves: Mapping[int, Leaf], known: Collection[str]) -> list[Arrival]:
    """What arrived at layers that are not among the `known`, or comes from others than those."""
    if not known:
        return [*arrivals]
    horizons = _horizons(arrivals, leaves)
    return [
        arrival
        for arrival, horizon in zip(arrivals, horizons, strict=True)
        if arrival.path not in known or any(leaf.source not in known for leaf in horizon.all.values())
    ]


def pull(
    arrivals: Sequence[Arrival],
    leaves: Mapping[int, Leaf],
    labels: Labels,
    connectivity: Connectivity,
    noted: Collection[str] = (),
) -> None:
    """Pull labels from what arrived at layers back to the leaves, and note who feeds whom.

    Between layers (and loose tensors) that are `noted` it is known already.

    A pull ends at what arrived at an earlier layer, if it is handed on channel by channel: its sources are known then.
    """
    known: dict[int, list[Inflow]] = {}  # by `id` of the arrival
    horizons = _horizons(arrivals, leaves)
    near = _pull_near(arrivals, horizons, labels)
    for arrival, horizon, direct in zip(arrivals, horizons, near, strict=True):
        inflows = with_heads(arrival, _with_those_before(direct, known), horizon.leaves, labels)
        inflows = [_resolved(arrival, inflow, labels, inflows) for inflow in inflows]
        known[id(arrival)] = inflows = _apart_from_heads(inflows)
        for inflow in with_one_head(arrival, inflows):
            leaf = inflow.source
            assert isinstance(leaf, Leaf)
            if arrival.path in noted and leaf.source in noted:
                continue
            if leaf.axis < 0:
                size = leaf.tensor.shape[inflow.axis]
                connectivity.loose.setdefault(leaf.source, LooseTensor(leaf.source, inflow.axis, size))
            edge = Edge(leaf.source, arrival.index, inflow.pairs, inflow.broadcast, inflow.heads)
            connectivity.edges[arrival.path].append(edge)


def _pull_near(
    arrivals: Sequence[Arrival], horizons: Sequence[_Horizon], labels: Labels
) -> list[list[Inflow]]:
    """For each arrival what feeds it: leaves, and what arrived earlier where that is handed on channel by channel."""
    found: list[list[Inflow]] = [[] for _ in arrivals]
    todo = [i for i, horizon in enumerate(horizons) if horizon.all]
    for far in (False, True):
        for numbers in _apart({i: horizons[i].all for i in todo}):
            ends = [_ends(horizons[i], arrivals, far) for i in numbers]
            batch = [(arrivals[i], near) for i, near in zip(numbers, ends, strict=True)]
            for i, inflows in zip(numbers, pull_batch(batch, labels), strict=True):
                found[i] = inflows
        todo = [i for i in todo if not all(isinstance(f.source, Leaf) or f.hands_on for f in found[i])]
    return found


def _ends(horizon: _Horizon, arrivals: Sequence[Arrival], far: bool) -> list[Leaf | Arrival]:
    """Where the pulls from an arrival end: `far` back, or no further than at what arrived before."""
    if far:
        return [*horizon.all.values()]
    return [*horizon.leaves, *(arrivals[j] for j in horizon.passed)]


def _with_those_before(near: Sequence[Inflow], known: Mapping[int, Sequence[Inflow]]) -> list[Inflow]:
    """Inflows from leaves alone: what feeds an earlier arrival feeds what that feeds."""
    inflows = {id(inflow.source): inflow for inflow in near if isinstance(inflow.source, Leaf)}
    direct = set(inflows)
    for passed in (inflow for inflow in near if isinstance(inflow.source, Arrival)):
        onward = torch.full((int(passed.pairs[:, 0].max()) + 1,), -1)
        onward[passed.pairs[:, 0]] = passed.pairs[:, 1]
        for inflow in known[id(passed.source)]:
            key = id(inflow.source)
            if key in direct:  # was seen from here, in all ways in which it feeds
                continue
            pairs, broadcast = (
                torch.stack([inflow.pairs[:, 0], onward[inflow.pairs[:, 1]]], 1),
                inflow.broadcast,
            )
            if key in inflows:
                pairs = torch.cat([inflows[key].pairs, pairs]).unique(dim=0)
                broadcast = torch.cat([inflows[key].broadcast, broadcast]).unique()
                pairs = pairs[~torch.isin(pairs[:, 0], broadcast)]
            inflows[key] = replace(inflow, pairs=pairs, broadcast=broadcast, resolved=True, heads=None)
    return [*inflows.values()]


def _resolved(arrival: Arrival, inflow: Inflow, labels: Labels, others: Sequence[Inflow]) -> Inflow:
    """The same, with channels that feed several told apart as far as that goes."""
    leaf = inflow.source
    if inflow.resolved or not isinstance(leaf, Leaf) or leaf.axis < 0:
        return inflow
    apart = inflow.broadcast if inflow.heads is None else inflow.heads.pairs[:, 0]
    broadcast = (
        inflow.broadcast if inflow.heads is None else inflow.broadcast[~torch.isin(inflow.broadcast, apart)]
    )
    if not len(broadcast):
        return inflow
    pulls = _MorePulls(arrival, leaf, labels)
    more, broadcast = pulls.by_blocks(others, broadcast)
    pairs = torch.cat([inflow.pairs, more])
    if len(broadcast) and not pulls.mix(broadcast):
        pairs, broadcast = pulls.by_parts(all_channels(arrival), pairs, broadcast)
    if inflow.heads is not None:
        broadcast = torch.cat([broadcast, apart]).unique()
    return replace(inflow, pairs=pairs, broadcast=broadcast)


def _apart_from_heads(inflows: Sequence[Inflow]) -> list[Inflow]:
    """The same, with channels that several heads share, as values of multi-query attention, among those that mix.

    A head goes without them: what it was handed goes with its queries.
    """
    channels = next((inflow.heads.channels for inflow in inflows if inflow.heads is not None), None)
    if channels is None:
        return list(inflows)
    head_of = channels.flatten().argsort() // channels.shape[1]
    return [_without_shared(inflow, head_of) for inflow in inflows]


def _without_shared(inflow: Inflow, head_of: Tensor) -> Inflow:
    fed = torch.stack([inflow.pairs[:, 0], head_of[inflow.pairs[:, 1]]], 1).unique(dim=0)
    sources, heads = fed[:, 0].unique(return_counts=True)
    shared = sources[heads > 1]
    if not len(shared):
        return inflow
    pairs = inflow.pairs[~torch.isin(inflow.pairs[:, 0], shared)]
    return replace(inflow, pairs=pairs, broadcast=torch.cat([inflow.broadcast, shared]).unique())


def _apart(near: Mapping[int, Collection[int]]) -> list[list[int]]:
    """Numbers of arrivals, in batches of which no two see the same leaf: one backward pass serves a batch."""
    batches: list[tuple[list[int], set[int]]] = []
    for i, leaves in near.items():
        numbers, taken = next((b for b in batches if b[1].isdisjoint(leaves)), ([], set()))
        if not numbers:
            batches.append((numbers, taken))
        numbers.append(i)
        taken |= set(leaves)
    return [numbers for numbers, _ in batches]


@dataclass(frozen=True)
class _MorePulls:
    """Further pulls from an arrival to one leaf, to tell apart channels that feed several of the arrival's."""

    arrival: Arrival
    leaf: Leaf
    labels: Labels

    def _pulled(self, span: Span | None = None, sharing: Sharing = None) -> list[Inflow]:
        return pull_batch([(self.arrival, [self.leaf])], self.labels, span, sharing)[0]

    def by_blocks(self, found: Sequence[Inflow], broadcast: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which channels feed a block of channels of their own: pooled (to more places than before) and flattened.

        One place then feeds several channels, but none outside the block. Where something feeds the channels of a block
        one by one, a gate for all of them is a gate.

        Returns:
            Pairs of what is resolved so, and the channels that are not.
        """
        count, n = self.leaf.tensor.shape[self.leaf.axis], self.arrival.tensor.shape[self.arrival.axis]
        resolved = [broadcast.new_empty((0, 2))]
        for sharing in (("runs", count), ("strides", count)) if n > count > 1 and n % count == 0 else ():
            block = torch.from_numpy(label_of(sharing, n))
            if any(_tells_apart(inflow.pairs, block) for inflow in found):
                continue
            for inflow in self._pulled(sharing=sharing):
                blocks = inflow.pairs[torch.isin(inflow.pairs[:, 0], broadcast)]
                at, listeners = (blocks[:, 1:] == block).nonzero(as_tuple=True)
                resolved.append(torch.stack([blocks[at, 0], listeners], 1))
                broadcast = broadcast[~torch.isin(broadcast, blocks[:, 0])]
        return torch.cat(resolved), broadcast

    def mix(self, broadcast: Tensor) -> bool:
        """Whether one channel hears many of those that feed several, as in attention.

        Of a stream that arrives twice it hears one.
        """
        middle = self.arrival.tensor.shape[self.arrival.axis] // 2
        (hears,) = heard(self.arrival, [self.leaf], self.labels, (middle, middle + 1))
        return int(hears[broadcast].sum()) >= _STREAM

    def by_parts(
        self, span: Span, pairs: Tensor, broadcast: Tensor, patience: int = 2
    ) -> tuple[Tensor, Tensor]:
        """Tell apart several listeners of one channel (a stream that is concatenated twice) by looking at half of them.

        Goes on while that resolves channels (with some patience for streams, whose copies may straddle the halves); a
        gate or attention, which everything listens to, stays a broadcast.
        """
        middle = (span[0] + span[1]) // 2
        if span[1] - span[0] < 2:
            return pairs, broadcast
        spans = ((span[0], middle), (middle, span[1]))
        halves = [self._pulled(half) for half in spans]
        mixed = torch.cat([broadcast[:0], *(inflow.broadcast for half in halves for inflow in half)]).unique()
        if not set(broadcast.tolist()) - set(mixed.tolist()):
            patience -= 1
            if not patience or len(broadcast) < _STREAM:
                return pairs, broadcast
        resolved = [pairs]
        still: list[Tensor] = [broadcast[:0]]
        for half, found in zip(spans, halves, strict=True):
            for inflow in found:
                more, rest = inflow.pairs, inflow.broadcast
                if len(rest):
                    more, rest = self.by_parts(half, more, rest, patience)
                resolved.append(more)
                still.append(rest)
        left = torch.cat(still).unique()
        merged = torch.cat(resolved).unique(dim=0)
        return merged[~torch.isin(merged[:, 0], left)], left


def _tells_apart(pairs: Tensor, block: Tensor) -> bool:
    """Whether different channels of one source feed a block."""
    into = torch.stack([pairs[:, 0], block[pairs[:, 1]]], 1).unique(dim=0)[:, 1]
    return len(into.unique()) < len(into)


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
