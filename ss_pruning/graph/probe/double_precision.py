"""Code that computes in single precision, as linear attention often does, would blur labels: they stay double."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = frozenset((Tensor.float, Tensor.to, Tensor.type, Tensor.half, Tensor.bfloat16))


class KeptDouble(TorchFunctionMode):
    """While it is entered, what is double stays so where code asks for another floating-point type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and args[0].dtype == torch.float64 and isinstance(result, Tensor):
            return args[0].to(result.device) if result.is_floating_point() else result
        return result
