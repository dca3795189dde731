"""Labels of channels and how to read them back: the arithmetic of the probe, knowing no model.

With a random cotangent `r` the gradient at an element is `sum r J`, with `r * channel` it is `channel * sum r J` if
just one channel listens: the ratio of the two is that channel. A third pull with permuted labels confirms it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Labels:
    """Random cotangents, channel labels and a permutation of them, cached by shape."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.cache: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __call__(self, like: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The three cotangents, and the permuted labels (`[channels]`, numbered from 1)."""
        key = (like.shape, axis, like.dtype, like.device)
        if key not in self.cache:
            n = like.shape[axis]
            r = torch.rand(like.shape, generator=self.generator).to(like.device, like.dtype) + 0.5
            shape = [n if a == axis else 1 for a in range(like.dim())]
            permuted = torch.randperm(n, generator=self.generator).to(like.device) + 1
            first = torch.arange(1, n + 1, device=like.device, dtype=like.dtype).reshape(shape)
            self.cache[key] = (r, r * first, r * permuted.to(like.dtype).reshape(shape), permuted)
        return self.cache[key]


def rows_along(tensor: Tensor, axis: int) -> Tensor:
    """`[channels, elements]`: the tensor with one row for each index along `axis`."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def decode(pulled: Sequence[Tensor], permuted: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Pairs (source channel, consumer channel), and the source channels whose elements feed several channels."""
    moved = [rows_along(g, axis) for g in pulled]
    touched = moved[0].ne(0).any(1)
    channel, clean = _channel_of([g.sum(1, dtype=torch.float64) for g in moved], permuted)
    rows = torch.arange(len(touched), device=touched.device)
    one = touched & clean
    pairs = torch.stack([rows[one], channel[one]], 1)
    rest = rows[touched & ~clean]
    if not len(rest):
        return pairs.cpu(), rest.cpu()
    # Different elements of one source channel may go to different channels (a flatten): decode each by itself.
    elements = [g[rest] for g in moved]
    channel, clean = _channel_of(elements, permuted)
    touched_elements = elements[0].ne(0)
    mixed = (touched_elements & ~clean).any(1)
    single = touched_elements & ~mixed[:, None]
    row, column = single.nonzero(as_tuple=True)
    more = torch.stack([rest[row], channel[row, column]], 1).unique(dim=0)
    return torch.cat([pairs, more]).cpu(), rest[mixed].cpu()


def _channel_of(pulled: Sequence[Tensor], permuted: Tensor) -> tuple[Tensor, Tensor]:
    """The channel that listens to each element, and whether it is the only one (both labels agree on it)."""
    g, g_label, g_permuted = (p.double() for p in pulled)
    safe = torch.where(g == 0, torch.ones_like(g), g)
    label, check = g_label / safe, g_permuted / safe
    channel = label.round().clamp(1, len(permuted)).long() - 1
    # float64 resolves the labels sharply; in a coarser precision mixed channels are still told apart by the check.
    tolerance = 1e-3 if pulled[0].dtype == torch.float64 else 0.02 + 1e-5 * len(permuted)
    clean = (label - (channel + 1)).abs().lt(tolerance) & (check - permuted[channel]).abs().lt(tolerance)
    return channel, clean & g.ne(0)


def aligned_axis(pulled: Sequence[Tensor], permuted: Tensor) -> int | None:
    """The axis of a loose tensor along which each index belongs to one channel of its own, if there is one."""
    channel, clean = _channel_of(pulled, permuted)
    if not clean.any():
        return None
    for axis, size in enumerate(channel.shape):
        rows, mask = rows_along(channel, axis), rows_along(clean, axis)
        used = mask.any(1)
        low = torch.where(mask, rows, len(permuted)).amin(1)[used]
        high = torch.where(mask, rows, -1).amax(1)[used]
        if size > 1 and len(low) and low.equal(high) and len(low.unique()) == len(low):
            return axis
    return None
