"""VJP probe: labels propagated back from where they arrive to the leaves that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


@dataclass
class Arrival:
    """The input of one layer call (path None: an output of the model), still attached to the leaves before it."""

    path: str | None
    tensor: Tensor
    axis: int
    index: int


def _reachable(root: Tensor, leaves: Mapping[int, Leaf]) -> list[Leaf]:
    """The leaves in the history of `root`, so that a pull costs what lies between and not the whole model."""
    found: list[Leaf] = []
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
        stack.extend(function for function, _ in node.next_functions)
    return found


def pull(
    arrivals: Sequence[Arrival], leaves: Mapping[int, Leaf], labels: Labels, connectivity: Connectivity
) -> None:
    """Pull labels from what arrived at layers back to the leaves, and note who feeds whom."""
    near = [_reachable(arrival.tensor, leaves) for arrival in arrivals]
    found: dict[int, list[_Found]] = {}
    for numbers in _apart(near):
        batch = [(arrivals[i], near[i]) for i in numbers]
        found.update(zip(numbers, _pull_batch(batch, labels), strict=True))
    for i, arrival in enumerate(arrivals):
        for leaf, axis, pairs, broadcast in found.get(i, []):
            if leaf.axis < 0:
                connectivity.loose.setdefault(
                    leaf.source, LooseTensor(leaf.source, axis, leaf.tensor.shape[axis])
                )
            elif len(broadcast):
                more, broadcast = _pull_blocks(arrival, leaf, labels, found[i], broadcast)
                pairs = torch.cat([pairs, more])
                pairs, broadcast = _pull_parts(arrival, leaf, labels, _whole(arrival), pairs, broadcast)
            assert arrival.path is not None
            connectivity.edges[arrival.path].append(Edge(leaf.source, arrival.index, pairs, broadcast))


#: A leaf that feeds an arrival; its axis, pairs and broadcast channels.
_Found = tuple[Leaf, int, Tensor, Tensor]
_Span = tuple[int, int]


def _apart(near: Sequence[Sequence[Leaf]]) -> list[list[int]]:
    """Numbers of arrivals, in batches of which no two see the same leaf: one backward pass serves a batch."""
    batches: list[tuple[list[int], set[int]]] = []
    for i, leaves in enumerate(near):
        if leaves:
            seen = {id(leaf) for leaf in leaves}
            numbers, taken = next((b for b in batches if b[1].isdisjoint(seen)), ([], set()))
            if not numbers:
                batches.append((numbers, taken))
            numbers.append(i)
            taken |= seen
    return [numbers for numbers, _ in batches]


def _whole(arrival: Arrival) -> _Span:
    return 0, arrival.tensor.shape[arrival.axis]


def _pull_batch(
    batch: Sequence[tuple[Arrival, Sequence[Leaf]]],
    labels: Labels,
    span: _Span | None = None,
    sharing: Sharing = None,
) -> list[list[_Found]]:
    """For each arrival the leaves that feed it, seen from its channels in `span`; no two arrivals see the same leaf."""
    tensors = [leaf.tensor for _, near in batch for leaf in near]
    cotangents = [_cotangents(arrival, labels, span or _whole(arrival), sharing) for arrival, _ in batch]
    pulls = zip(
        *(
            torch.autograd.grad(
                [arrival.tensor for arrival, _ in batch],
                tensors,
                cotangent,
                retain_graph=True,
                allow_unused=True,
            )
            for cotangent in zip(*(c for c, _ in cotangents), strict=True)
        ),
        strict=True,
    )
    found: list[list[_Found]] = []
    reached: list[tuple[int, Leaf, int, Pulled]] = []
    for number, ((_, near), (_, permuted)) in enumerate(zip(batch, cotangents, strict=True)):
        found.append([])
        for leaf in near:
            known = [g for g in next(pulls) if g is not None and g.numel()]
            # A loose tensor counts if its elements follow the channels along some axis.
            axis = leaf.axis if leaf.axis >= 0 or len(known) < 3 else aligned_axis(known, permuted)
            if len(known) == 3 and axis is not None:
                reached.append((number, leaf, axis, Pulled(known, axis, permuted)))
    for (number, leaf, axis, _), (pairs, broadcast) in zip(
        reached, decode([r[-1] for r in reached]), strict=True
    ):
        if len(pairs) or len(broadcast):
            found[number].append((leaf, axis, pairs, broadcast))
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
    arrival: Arrival, leaf: Leaf, labels: Labels, found: Sequence[_Found], broadcast: Tensor
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
        if any(_tells_apart(pairs, block) for *_, pairs, _ in found):
            continue
        for *_, blocks, _ in _pull_batch([(arrival, [leaf])], labels, sharing=sharing)[0]:
            blocks = blocks[torch.isin(blocks[:, 0], broadcast)]
            at, listeners = (blocks[:, 1:] == block).nonzero(as_tuple=True)
            resolved.append(torch.stack([blocks[at, 0], listeners], 1))
            broadcast = broadcast[~torch.isin(broadcast, blocks[:, 0])]
    return torch.cat(resolved), broadcast


def _tells_apart(pairs: Tensor, block: Tensor) -> bool:
    """Whether different channels of one source feed a block."""
    into = torch.stack([pairs[:, 0], block[pairs[:, 1]]], 1).unique(dim=0)[:, 1]
    return len(into.unique()) < len(into)


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
    mixed = torch.cat([broadcast[:0], *(rest for half in halves for *_, rest in half)]).unique()
    if not set(broadcast.tolist()) - set(mixed.tolist()):
        patience -= 1
        if not patience or len(broadcast) < _STREAM:
            return pairs, broadcast
    resolved = [pairs]
    still: list[Tensor] = [broadcast[:0]]
    for half, found in zip(spans, halves, strict=True):
        for *_, more, rest in found:
            if len(rest):
                more, rest = _pull_parts(arrival, leaf, labels, half, more, rest, patience)
            resolved.append(more)
            still.append(rest)
    left = torch.cat(still).unique()
    merged = torch.cat(resolved).unique(dim=0)
    return merged[~torch.isin(merged[:, 0], left)], left


def pull_output(tensor: Tensor, leaves: Mapping[int, Leaf], connectivity: Connectivity) -> None:
    """Note the source channels from which an output of the model is reached."""
    near = [leaf for leaf in _reachable(tensor, leaves) if leaf.axis >= 0]
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
