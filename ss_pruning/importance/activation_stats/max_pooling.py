"""Max pooling of noise, whose neighbours differ as those of images do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, overrides


def _functions(*names: str) -> dict[Callable[..., Any], int]:
    """Torch's functions of these names, with and without indices, and over how many axes they pool."""
    found: dict[Callable[..., Any], int] = {}
    for axes in (1, 2, 3):
        for name in (name.format(axes) + suffix for name in names for suffix in ("", "_with_indices")):
            found |= {getattr(home, name): axes for home in (F, torch) if hasattr(home, name)}
    return found


_WINDOWS = _functions("max_pool{}d")
_PARTS = _functions("adaptive_max_pool{}d", "fractional_max_pool{}d")
_KNOWN = {*_WINDOWS, *_PARTS, torch.amax, Tensor.amax, torch.max, Tensor.max}


class _Windows(NamedTuple):
    """What torch's functions for max pooling are told besides the values, in their order."""

    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    return_indices: bool = False


class CentresOfWindows(overrides.TorchFunctionMode):
    """While it is entered, max pooling takes the value in the middle of each window; indices are left alone.

    The largest of 2x2 independent values lies a standard deviation above their mean. Neighbours in the maps of images
    are nearly alike, and so is their largest: a mean over noise would be told far too large. So is a maximum over whole
    axes of maps, `[N, C, H, W]` or with more; where it is over all positions, their middle is as good as any, since
    vectors are seen with noise that is the same at all positions.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        result = func(*args, **named)
        if func not in _KNOWN:
            return result
        values = result[0] if isinstance(result, tuple) else result
        x = args[0] if args else named.pop("input")
        middles = _middles(func, x, values, *args[1:], **named)
        if not middles:
            return result
        for axis, places in middles:
            x = x.index_select(axis, places.to(x.device))
        x = x.reshape(values.shape)  # without the axes that a maximum is taken over
        return type(result)((x, *result[1:])) if isinstance(result, tuple) else x


def _middles(func: Any, x: Tensor, pooled: Tensor, *args: Any, **named: Any) -> Iterable[tuple[int, Tensor]]:
    """By axis, where the middles of the windows of `x` lie that `pooled` is the largest of."""
    if func in _WINDOWS:
        return _of_windows(x.shape, pooled.shape, _Windows(*args, **named), _WINDOWS[func])
    if func in _PARTS:
        return _of_parts(x.shape, pooled.shape, _PARTS[func])
    return _of_axes(x.shape, *args, **named)


def _of_windows(
    shape: torch.Size, pooled: torch.Size, windows: _Windows, axes: int
) -> Iterator[tuple[int, Tensor]]:
    asked = (windows.kernel_size, windows.stride or windows.kernel_size, windows.padding, windows.dilation)
    sizes = zip(*(_by_axis(size, axes) for size in asked), strict=True)
    for axis, (kernel, step, pad, apart) in enumerate(sizes, len(shape) - axes):
        first = apart * (kernel - 1) // 2 - pad
        yield axis, (first + step * torch.arange(pooled[axis])).clamp(0, shape[axis] - 1)


def _of_parts(shape: torch.Size, pooled: torch.Size, axes: int) -> Iterator[tuple[int, Tensor]]:
    """Of adaptive pooling; fractional pooling draws where its windows lie, on average there too."""
    for axis in range(len(shape) - axes, len(shape)):
        size, parts = shape[axis], pooled[axis]
        begin = torch.arange(parts) * size // parts
        end = -(-(torch.arange(parts) + 1) * size // parts)  # the first behind it
        yield axis, (begin + end - 1) // 2


def _of_axes(shape: torch.Size, dim: Any = None, *_: Any, **__: Any) -> list[tuple[int, Tensor]]:
    """Of maxima over axes of positions; none of those over channels, and of two tensors."""
    if dim is None or isinstance(dim, Tensor) or len(shape) < 4:
        return []
    axes = [axis % len(shape) for axis in (dim if isinstance(dim, Iterable) else (dim,))]
    return [(axis, torch.tensor([shape[axis] // 2])) for axis in axes if min(axes) > 1]


def _by_axis(size: Any, axes: int) -> tuple[int, ...]:
    """One number an axis; torch takes a single number, and a sequence of one, for all axes."""
    sizes = tuple(size) if isinstance(size, Iterable) else (size,)
    return sizes * axes if len(sizes) == 1 else sizes
