"""Where functions are flat, labels pass all the same: rectifiers, limits, shrinkage, choices and maxima."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, overrides

# What is added to every slope; no multiple of those that functions have.
_SHARE = 0.28


class FlatSlopes(overrides.TorchFunctionMode):
    """While it is entered, a share of each label passes where the slope of a function is 0; values are as they are.

    Of `relu(cat([x, -x]))` only one half has a slope, of a maximum only the largest, of `where(x > 0, x, slope * x)`
    only one branch; but what is cut is cut from all.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shares = _READ[func](*args, **kwargs) if func in _READ else ()
        if not shares:
            return func(*args, **kwargs)
        # Done in place, a function keeps what it puts out for its gradient.
        if kwargs.get("inplace") or func.__name__.endswith("_"):
            return args[0].copy_(sum(shares, func(args[0].clone(), *args[1:], **kwargs)))
        result = func(*args, **kwargs)
        if isinstance(result, tuple):  # a maximum, and where it lies
            return type(result)((sum(shares, result[0]), *result[1:]))
        return sum(shares, result)


class _Share(torch.autograd.Function):
    """Zeros, to which a share of the gradient goes back; also where what was read is infinite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * _SHARE


def _shares(*read: Any) -> list[Tensor]:
    """Of what carries labels."""
    labelled = (x for x in read if isinstance(x, Tensor) and x.requires_grad and x.is_floating_point())
    return [_Share.apply(x) for x in labelled]


def _of_one(input: Any, *_: Any, **__: Any) -> list[Tensor]:  # noqa: A002 - as torch names it
    return _shares(input)


def _of_largest(
    input: Tensor,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    *,
    other: Tensor | None = None,
    **_: Any,
) -> list[Tensor]:
    """Of two tensors, or over axes: not over the first two, where single channels are what is chosen from."""
    other = dim if isinstance(dim, Tensor) else other
    if other is not None:
        return _shares(input, other)
    asked = () if dim is None else dim if isinstance(dim, Iterable) else (dim,)
    axes = [axis % input.dim() for axis in asked]
    return [share.mean(axes, keepdim) for share in _shares(input)] if axes and min(axes) > 1 else []


def _named(*names: str) -> list[Any]:
    """Torch's functions and methods of these names, in place or not."""
    homes = [(home, name + place) for home in (F, torch, Tensor) for name in names for place in ("", "_")]
    return [getattr(home, name) for home, name in homes if hasattr(home, name)]


_READ: dict[Any, Callable[..., list[Tensor]]] = {
    **dict.fromkeys(_named("relu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "threshold"), _of_one),
    **dict.fromkeys(_named("softshrink", "hardshrink", "clamp", "clamp_min", "clamp_max", "clip"), _of_one),
    **dict.fromkeys(_named("masked_fill"), _of_one),
    **dict.fromkeys(
        _named("maximum", "minimum", "fmax", "fmin"),
        lambda input, other, **_: _shares(input, other),  # noqa: A006
    ),
    **dict.fromkeys(_named("max", "min", "amax", "amin"), _of_largest),
    torch.where: lambda condition, input=None, other=None, **_: _shares(input, other),  # noqa: A006
    Tensor.where: lambda input, condition, other, **_: _shares(input, other),  # noqa: A006
}
