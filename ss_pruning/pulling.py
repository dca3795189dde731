"""Pulling labels back from where they arrive to the leaves that they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ss_pruning.labels import Ints, Labels, aligned_axis, decode, rows_along
from ss_pruning.wiring import Feed, LooseTensor, Wiring

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


def pull(arrival: Arrival, leaves: Mapping[int, Leaf], labels: Labels, wiring: Wiring) -> None:
    """Pull labels from what arrived at a layer back to the leaves, and note who feeds whom."""
    assert arrival.path is not None
    near = _reachable(arrival.tensor, leaves)
    if not near:
        return
    first, last = 0, arrival.tensor.shape[arrival.axis]
    for leaf, found in zip(near, _pull_range(arrival, near, labels, first, last), strict=True):
        if found is None:
            continue
        axis, pairs, broadcast = found
        if leaf.axis < 0:
            wiring.loose.setdefault(leaf.source, LooseTensor(leaf.source, axis, leaf.tensor.shape[axis]))
        elif len(broadcast):
            pairs, broadcast = _pull_parts(arrival, leaf, labels, (first, last), pairs, broadcast)
        wiring.feeds[arrival.path].append(Feed(leaf.source, arrival.index, pairs, broadcast))


_Found = tuple[int, Tensor, Tensor]


def _pull_range(
    arrival: Arrival, near: Sequence[Leaf], labels: Labels, first: int, last: int
) -> list[_Found | None]:
    """For each leaf: axis, pairs and broadcast channels, seen from the channels `first ... last` of what arrived."""
    *cotangents, permuted = labels(arrival.tensor, arrival.axis)
    if last - first < arrival.tensor.shape[arrival.axis]:
        inside = torch.zeros_like(cotangents[0])
        inside.narrow(arrival.axis, first, last - first).fill_(1)
        cotangents = [c * inside for c in cotangents]
    tensors = [leaf.tensor for leaf in near]
    pulls = [
        torch.autograd.grad(arrival.tensor, tensors, c, retain_graph=True, allow_unused=True)
        for c in cotangents
    ]
    return [_found(leaf, pulled, permuted) for leaf, *pulled in zip(near, *pulls, strict=True)]


def _found(leaf: Leaf, pulled: Sequence[Tensor | None], permuted: Ints) -> _Found | None:
    known = [g for g in pulled if g is not None and g.numel()]
    if len(known) < len(pulled):
        return None
    # A loose tensor counts if its elements follow the channels along some axis.
    axis = leaf.axis if leaf.axis >= 0 else aligned_axis(known, permuted)
    if axis is None:
        return None
    pairs, broadcast = decode(known, permuted, axis)
    return (axis, pairs, broadcast) if len(pairs) or len(broadcast) else None


def _pull_parts(
    arrival: Arrival,
    leaf: Leaf,
    labels: Labels,
    span: tuple[int, int],
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
    halves = [_pull_range(arrival, [leaf], labels, *half)[0] for half in spans]
    mixed = torch.cat([found[2] for found in halves if found is not None]).unique()
    if not set(broadcast.tolist()) - set(mixed.tolist()):
        patience -= 1
        if not patience or len(broadcast) < _STREAM:
            return pairs, broadcast
    resolved = [pairs]
    still: list[Tensor] = [broadcast[:0]]
    for half, found in zip(spans, halves, strict=True):
        if found is None:
            continue
        _, more, rest = found
        if len(rest):
            more, rest = _pull_parts(arrival, leaf, labels, half, more, rest, patience)
        resolved.append(more)
        still.append(rest)
    left = torch.cat(still).unique()
    merged = torch.cat(resolved).unique(dim=0)
    return merged[~torch.isin(merged[:, 0], left)], left


def pull_output(tensor: Tensor, leaves: Mapping[int, Leaf], wiring: Wiring) -> None:
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
        before = wiring.reaches_output.get(leaf.source, touched)
        wiring.reaches_output[leaf.source] = torch.cat([before, touched]).unique()
