"""Modes in which labels pass through code that would blur or stop them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides


class PlainStatistics(overrides.TorchFunctionMode):
    """While it is entered, norms that code calls are what they compute: gradients reach statistics, and labels do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _normalised(
    input: Tensor,  # noqa: A002 - as torch names it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, whose own form has no gradient with respect to statistics.

    What it makes of labels is positive, as they are, so that a rectifier behind it lets them pass.
    """
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, training, momentum, eps)
    shape = [1, -1, *[1] * (input.dim() - 2)]
    scale = (running_var + eps).rsqrt() if weight is None else weight * (running_var + eps).rsqrt()
    result = (input - running_mean.reshape(shape)).abs() * scale.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)


def _by_instance(
    input: Tensor,  # noqa: A002 - as torch names it
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    **more: float,
) -> Tensor:
    """`F.instance_norm`, likewise."""
    if use_input_stats:
        return F.instance_norm(input, None, None, weight, bias, True, **more)
    return _normalised(input, running_mean, running_var, weight, bias, False, **more)


_PLAIN: Mapping[Any, Callable[..., Any]] = {
    F.batch_norm: _normalised,
    F.instance_norm: _by_instance,
    # It takes its statistics last, and knows of cuDNN, too.
    torch.batch_norm: lambda input, weight, bias, running_mean, running_var, *more: (  # noqa: A006
        _normalised(input, running_mean, running_var, weight, bias, *more[:3])
    ),
}
_CASTS = frozenset((Tensor.float, Tensor.to, Tensor.type, Tensor.half, Tensor.bfloat16))


class KeptDouble(overrides.TorchFunctionMode):
    """While it is entered, what is double stays so where code asks for another floating-point type.

    Code that computes in single precision, as linear attention often does, would blur labels.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and args[0].dtype == torch.float64 and isinstance(result, Tensor):
            return args[0].to(result.device) if result.is_floating_point() else result
        return result


_DETACHING = frozenset((Tensor.detach, torch.detach, Tensor.data.__get__))  # type: ignore[attr-defined]


class KeptGradients(overrides.TorchFunctionMode):
    """While it is entered, `torch.no_grad` and `detach` do nothing: labels pass through parts that are not trained."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func in _DETACHING:
            return args[0].view_as(args[0])
        if func in (Tensor.numpy, Tensor.__array__):  # refuse what has a gradient
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


_POOLS = frozenset(
    getattr(F, f"{kind}max_pool{n}d_with_indices")
    for kind in ("", "adaptive_", "fractional_")
    for n in (1, 2, 3)
    if hasattr(F, f"{kind}max_pool{n}d_with_indices")
)
_UNPOOLS = frozenset((F.max_unpool1d, F.max_unpool2d, F.max_unpool3d))


class TiedIndices(overrides.TorchFunctionMode):
    """While it is entered, unpooled maps hold a share of the maps whose indices they use: a tie like that of a sum.

    The channels of both belong together, and whole numbers carry no gradient, so that no label would say so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pooled: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by the `id` of the indices, which are kept with it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _POOLS:
            self.pooled[id(result[1])] = result
        elif func in _UNPOOLS:
            named = [kwargs.pop(name) for name in ("input", "indices") if name in kwargs]
            given: list[Any] = [*args, *named]
            x, indices, *rest = given
            if id(indices) in self.pooled:
                values = self.pooled[id(indices)][0].to(x)
                result = result + func(values, indices, *rest, **kwargs)
        return result
