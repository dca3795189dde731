"""Max pooling of noise, whose neighbours differ as those of images do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, overrides

#: By function, over how many axes it pools.
_POOLS = {
    function: axes
    for axes, functions in enumerate(
        (
            (F.max_pool1d, torch.max_pool1d),
            (F.max_pool2d, torch.max_pool2d),
            (F.max_pool3d, torch.max_pool3d),
        ),
        1,
    )
    for function in functions
}


class _Windows(NamedTuple):
    """What torch's functions for max pooling are told besides the values, in their order."""

    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    return_indices: bool = False


class CentresOfWindows(overrides.TorchFunctionMode):
    """While it is entered, max pooling takes the value in the middle of each window.

    The largest of 2x2 independent values lies a standard deviation above their mean. Neighbours in the maps of images
    are nearly alike, and so is their largest: a mean over noise would be told far too large.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        pooled = func(*args, **named)
        if func not in _POOLS:
            return pooled
        x = args[0] if args else named.pop("input")
        return _centres(x, pooled, _Windows(*args[1:], **named), _POOLS[func])


def _centres(x: Tensor, pooled: Tensor, windows: _Windows, axes: int) -> Tensor:
    """What lies in the middle of the windows of `x` that `pooled` was made from, in its shape."""
    asked = (windows.kernel_size, windows.stride or windows.kernel_size, windows.padding, windows.dilation)
    sizes = zip(*(_by_axis(size, axes) for size in asked), strict=True)
    for axis, (kernel, step, pad, apart) in enumerate(sizes, x.dim() - axes):
        first = apart * (kernel - 1) // 2 - pad
        middle = first + step * torch.arange(pooled.shape[axis], device=x.device)
        x = x.index_select(axis, middle.clamp(0, x.shape[axis] - 1))
    return x


def _by_axis(size: Any, axes: int) -> tuple[int, ...]:
    """One number an axis; torch takes a single number, and a sequence of one, for all axes."""
    sizes = tuple(size) if isinstance(size, Iterable) else (size,)
    return sizes * axes if len(sizes) == 1 else sizes
