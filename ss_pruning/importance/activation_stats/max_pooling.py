"""Max pooling of noise, whose neighbours differ as those of images do not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch.nn.modules.utils import _ntuple

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


class CentresOfWindows(overrides.TorchFunctionMode):
    """While it is entered, max pooling takes the value in the middle of each window.

    The largest of 2x2 independent values lies a standard deviation above their mean. Neighbours in the maps of images
    are nearly alike, and so is their largest: a mean over noise would be told far too large.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pooled = func(*args, **(kwargs or {}))
        return _centres(_POOLS[func], pooled, *args, **(kwargs or {})) if func in _POOLS else pooled


def _centres(
    axes: int,
    pooled: Tensor,
    input: Tensor,  # noqa: A002 (as torch calls it, by name, too)
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    *_: Any,
    **__: Any,
) -> Tensor:
    """What lies in the middle of the windows of `input` that `pooled` was made from, in its shape."""
    centres, asked = input, (kernel_size, stride or kernel_size, padding, dilation)
    sizes = zip(*(_ntuple(axes)(size) for size in asked), strict=True)
    for axis, (kernel, step, pad, apart) in enumerate(sizes, input.dim() - axes):
        first = apart * (kernel - 1) // 2 - pad
        middle = first + step * torch.arange(pooled.shape[axis], device=input.device)
        centres = centres.index_select(axis, middle.clamp(0, input.shape[axis] - 1))
    return centres
