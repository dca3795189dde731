"""Labels of channels and how to read them back: the arithmetic of the probe, knowing no model.

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

from ss_pruning._utils.arrays import Bools, Floats, Ints

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
    """By channel of all sources, one after the other: `[3, channels]` sums of its elements, and if any is not 0."""
    summed = [
        torch.cat([rows_along(p.gradients[k], p.axis).sum(1, dtype=torch.float64).cpu() for p in pulled])
        for k in range(3)
    ]
    sums: Floats = torch.stack(summed).numpy()
    touched: Bools = np.asarray(sums[0] != 0)
    parts = np.split(touched, np.cumsum([p.channels for p in pulled])[:-1])
    for p, part in zip(pulled, parts, strict=True):
        if not part.all():  # nothing arrives there, or what does cancels
            part |= rows_along(p.gradients[0], p.axis).any(1).cpu().numpy()
    return sums, touched


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
    """The axis of a loose tensor along which each index belongs to one channel of its own, if there is one.

    Args:
        pulled: What three pulls left at the tensor.
        permuted: The permuted labels.
        shared: Several may belong to one.
    """
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
