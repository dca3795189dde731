"""Labels of channels, their pulls, and how to read them back: the arithmetic of the probe, knowing no model.

With a random cotangent `r` the gradient at an element is `sum r J`, with `r * channel` it is `channel * sum r J` if
just one channel listens: the ratio of the two is that channel. A third pull with permuted labels confirms it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ss_pruning._utils.arrays import Bools, Floats, Ints
from ss_pruning.graph.connectivity import Heads

#: Channels per label: neighbours share one ("runs", as a flatten lays them out), or those that lie equally far apart
#: ("strides"), or each has its own.
Sharing = tuple[Literal["runs", "strides"], int] | None


def label_of(labels: Sharing, n: int) -> npt.NDArray[np.int64]:
    """`[n]`: the label, from 0, of each of `n` channels."""
    channels = np.arange(n)
    if labels is None:
        return channels
    how, count = labels
    return channels // (n // count) if how == "runs" else channels % count


# Multiples of it are spread evenly over (0, 1), and none is near another for long.
_GOLDEN = (5**0.5 - 1) / 2
# A loose tensor of more elements is first looked at in a sample of so many.
_LARGE, _SAMPLE = 2**16, 2**12


@dataclass
class Labels:
    """Random cotangents, channel labels and a permutation of them, cached by shape."""

    generator: torch.Generator
    cache: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor, Ints]] = field(default_factory=dict)

    def __call__(
        self, like: Tensor, axis: int, sharing: Sharing = None
    ) -> tuple[Tensor, Tensor, Tensor, Ints]:
        """The three cotangents, and the permuted labels (`[labels]`, numbered from 1)."""
        key = (like.shape, axis, like.dtype, like.device, sharing)
        if key not in self.cache:
            n = like.shape[axis]
            label = torch.from_numpy(label_of(sharing, n))
            r = torch.rand(like.shape, generator=self.generator).to(like.device, like.dtype) + 0.5
            shape = [n if a == axis else 1 for a in range(like.dim())]
            permuted = torch.randperm(int(label.max()) + 1, generator=self.generator) + 1
            first = (label + 1).to(like.device, like.dtype).reshape(shape)
            second = permuted[label].to(like.device, like.dtype).reshape(shape)
            self.cache[key] = (r, r * first, r * second, permuted.numpy())
        return self.cache[key]


def rows_along(tensor: Tensor, axis: int) -> Tensor:
    """`[channels, elements]`: the tensor with one row for each index along `axis`."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


@dataclass(frozen=True)
class Pulled:
    """What three pulls with the labels of one arrival left at one source.

    Attributes:
        gradients: Three, in the source's shape.
        axis: Where its channels lie.
        permuted: The permuted labels of the arrival's channels, numbered from 1.
    """

    gradients: Sequence[Tensor]
    axis: int
    permuted: Ints

    @property
    def channels(self) -> int:
        """How many the source has."""
        return self.gradients[0].shape[self.axis]

    @property
    def tolerance(self) -> float:
        """float64 resolves the labels sharply; coarser, the check still tells mixed channels apart."""
        return 1e-3 if self.gradients[0].dtype == torch.float64 else 0.02 + 1e-5 * len(self.permuted)

    def decoded(self, elements: Floats) -> tuple[Ints, Bools]:
        """See `_channel_of`, for some elements of each gradient."""
        return _channel_of(elements, self.permuted, 0, len(self.permuted), self.tolerance)


def _sums(pulled: Sequence[Pulled]) -> tuple[Floats, Bools]:
    """By channel of all sources, one after the other: `[3, channels]` sums of its elements, and if any is not 0.

    Elements are weighted unevenly: what a filter without a mean makes of them (an edge, a wavelet) would else cancel.
    """
    summed = [torch.cat([_uneven_sum(p.gradients[k], p.axis) for p in pulled]) for k in range(3)]
    sums: Floats = torch.stack(summed).numpy()
    touched: Bools = np.asarray(sums[0] != 0)
    parts = np.split(touched, np.cumsum([p.channels for p in pulled])[:-1])
    for p, part in zip(pulled, parts, strict=True):
        if not part.all():  # nothing arrives there, or what does cancels
            part |= rows_along(p.gradients[0], p.axis).any(1).cpu().numpy()
    return sums, touched


def _uneven_sum(gradient: Tensor, axis: int) -> Tensor:
    """`[channels]`, the elements of each times weights of about 1 that no pattern repeats."""
    rows = rows_along(gradient, axis)
    spread = (torch.arange(rows.shape[1], device=rows.device, dtype=torch.float64) * _GOLDEN).frac()
    return (rows.double() @ (spread + 0.5)).cpu()


def decode(pulled: Sequence[Pulled]) -> list[tuple[Tensor, Tensor]]:
    """For each source: pairs (its channel, consumer channel), and its channels whose elements feed several channels."""
    if not pulled:
        return []
    sums, touched = _sums(pulled)
    # All sources in one go: label `i` of source `n` stands at `first[n] + i`.
    sizes = [p.channels for p in pulled]
    widths = [len(p.permuted) for p in pulled]
    first, width, tolerance = (
        np.repeat(values, sizes)
        for values in (np.cumsum([0, *widths[:-1]]), widths, [p.tolerance for p in pulled])
    )
    channel, clean = _channel_of(sums, np.concatenate([p.permuted for p in pulled]), first, width, tolerance)
    parts = zip(pulled, *(np.split(a, np.cumsum(sizes)[:-1]) for a in (channel, clean, touched)), strict=True)
    return [_split_rest(*part) for part in parts]


def _split_rest(pulled: Pulled, channel: Ints, clean: Bools, touched: Bools) -> tuple[Tensor, Tensor]:
    """Pairs and broadcast channels of one source, of which the `clean` rows are decoded."""
    one = np.flatnonzero(touched & clean)
    pairs = torch.from_numpy(np.stack([one, channel[one]], 1))
    rest = np.flatnonzero(touched & ~clean)
    if not len(rest):
        return pairs, torch.from_numpy(rest)
    # Different elements of one source channel may go to different channels (a flatten): decode each by itself.
    at = torch.from_numpy(rest).to(pulled.gradients[0].device)
    rows = [rows_along(g, pulled.axis)[at].double() for g in pulled.gradients]
    elements = torch.stack(rows).cpu().numpy()
    channel, clean = pulled.decoded(elements)
    touched = elements[0] != 0
    mixed: Bools = np.any(touched & ~clean, axis=1)
    row, column = np.nonzero(touched & ~mixed[:, None])
    more = np.unique(np.stack([rest[row], channel[row, column]], 1), axis=0)
    return torch.cat([pairs, torch.from_numpy(more)]), torch.from_numpy(rest[mixed])


def _channel_of(
    pulled: Floats, permuted: Ints, first: Ints | int, width: Ints | int, tolerance: Floats | float
) -> tuple[Ints, Bools]:
    """The channel that listens to each element, and whether it is the only one (both labels agree on it)."""
    safe = np.where(pulled[0] == 0, 1.0, pulled[0])
    label, check = pulled[1] / safe, pulled[2] / safe
    channel = np.clip(np.nan_to_num(np.rint(label)), 1, width).astype(np.int64) - 1
    near = (np.abs(label - (channel + 1)) < tolerance) & (
        np.abs(check - permuted[first + channel]) < tolerance
    )
    return channel, near & (pulled[0] != 0)


def _mostly_mixed(pulled: Sequence[Tensor], permuted: Ints) -> bool:
    """Whether hardly one element of a sample feeds a single channel: a weight inside attention."""
    at = pulled[0].flatten().nonzero().flatten()
    at = at[:: -(-len(at) // _SAMPLE) or 1]
    _, clean = Pulled(pulled, 0, permuted).decoded(
        torch.stack([g.flatten()[at].double() for g in pulled]).cpu().numpy()
    )
    return bool(clean.sum() < 0.05 * len(at))


def aligned_axis(pulled: Sequence[Tensor], permuted: Ints, *, shared: bool = False) -> int | None:
    """The axis of a loose tensor along which each index belongs to one channel, of its own unless it is `shared`."""
    if pulled[0].numel() > _LARGE and _mostly_mixed(pulled, permuted):
        return None
    channel, clean = Pulled(pulled, 0, permuted).decoded(
        torch.stack([g.double() for g in pulled]).cpu().numpy()
    )
    if not clean.any():
        return None
    for axis, size in enumerate(channel.shape):
        others = tuple(a for a in range(channel.ndim) if a != axis)
        used = clean.any(others)
        low = np.where(clean, channel, len(permuted)).min(others)[used]
        high = np.where(clean, channel, -1).max(others)[used]
        if (
            size > 1
            and len(low)
            and np.array_equal(low, high)
            and (shared or len(np.unique(low)) == len(low))
        ):
            return axis
    return None


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
