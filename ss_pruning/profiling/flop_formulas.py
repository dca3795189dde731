"""FLOPs of one operation: torch's own formulas, and those that torch 2.14 lacks.

Products and their sums count, two FLOPs a multiply-accumulate. What works number by number does not, nor do distances,
lookups and transforms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

Formula = Callable[..., Any]


def formula_of(operation: Any) -> Formula | None:
    """What gives the FLOPs of a call, from its arguments and `out_val`; None where nothing is counted."""
    known: Formula | None = flop_registry.get(operation._overloadpacket)
    return known or _FORMULAS.get(operation._schema.name)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Fused attention: that of the kernels that torch has a formula for."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-any-return]


def _recurrent(x: Tensor, weights: list[Tensor]) -> int:
    """Each weight of the matrices is used once a step."""
    steps = x.numel() // max(x.shape[-1], 1)
    return 2 * steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _recurrent_on_cpu(x: Tensor, from_input: Tensor, from_hidden: Tensor, *_: Any, **__: Any) -> int:
    """One layer of an LSTM in one direction, in float32."""
    return _recurrent(x, [from_input, from_hidden])


def _recurrent_on_cuda(x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    """All layers and directions of an LSTM, a GRU or a plain recurrent network."""
    return _recurrent(x, weights)


def _once(used: Tensor, *_: Any, **__: Any) -> int:
    """Each number of the first argument is used once: a matrix times a vector, a vector times a vector."""
    return 2 * used.numel()


def _added_once(_: Tensor, used: Tensor, *__: Any, **___: Any) -> int:
    """Likewise, of the second: something is added to the product of a matrix and a vector."""
    return 2 * used.numel()


def _added_products(_: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any) -> int:
    """The sum of products of matrices, `[n, a, b]` times `[n, b, c]`; of one matrix each without `n`."""
    return 2 * left.numel() * right.shape[-1]


def _of_three(
    first: Tensor, second: Tensor, third: Tensor, *axes: list[int], out_val: Any = None, **_: Any
) -> int:
    """Products of three tensors, summed over axes: all their axes together, each used once (`nn.Bilinear`)."""
    shapes = []
    for tensor, missing in zip((first, second, third), axes, strict=False):
        shape = list(tensor.shape)
        for axis in sorted(missing):
            shape.insert(axis, 1)
        shapes.append(shape)
    return 2 * int(torch.broadcast_shapes(*shapes).numel())


def _over_time(_: Tensor, weight: Tensor, *__: Any, out_val: Tensor, **___: Any) -> int:
    """A convolution of `[time, batch, channels]` with `[taps, in, out]`."""
    return 2 * out_val.numel() * weight.shape[0] * weight.shape[1]


def _deformable(_: Tensor, weight: Tensor, *__: Any, out_val: Tensor, **___: Any) -> int:
    """A convolution, `[out, in // groups, ...]`, of what lies at learned places; finding that is not counted."""
    return 2 * out_val.numel() * weight[0].numel()


_FORMULAS: dict[str, Formula] = {
    "aten::mkldnn_rnn_layer": _recurrent_on_cpu,
    "aten::_cudnn_rnn": _recurrent_on_cuda,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::mv": _once,
    "aten::dot": _once,
    "aten::vdot": _once,
    "aten::addmv": _added_once,
    "aten::addmv_": _added_once,
    "aten::addmm_": _added_products,
    "aten::addbmm": _added_products,
    "aten::addbmm_": _added_products,
    "aten::baddbmm_": _added_products,
    "aten::_trilinear": _of_three,
    "aten::conv_tbc": _over_time,
    "torchvision::deform_conv2d": _deformable,
}
