"""Multiply-accumulates of a model, counted while it runs.

The FLOPs of an operation are told by torch's own formulas, and by those that torch 2.14 lacks. Products and their sums
count, two FLOPs a multiply-accumulate. What works number by number does not, nor do distances, lookups and transforms.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import checked_call, preserved, settled_weights
from ss_pruning.graph.layers import kind_of


def count_macs(model: nn.Module, example_inputs: Any) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass, in all and by layer (FLOPs / 2).

    Raises:
        ModelError: The model does not run on the inputs, which may be of another number type.
    """
    counter = _counted(model, example_inputs)
    total = sum(counter.flops.values()) + sum(counter.between.values())
    return total // 2, {path: n // 2 for path, n in counter.flops.items()}


def macs_between_layers(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Multiply-accumulates outside of layers, as attention's are, by the layer that runs next ("" behind the last)."""
    return {path: n // 2 for path, n in _counted(model, example_inputs).between.items()}


def _counted(model: nn.Module, example_inputs: Any) -> _MacCounter:
    counter = _MacCounter()
    with settled_weights(model):
        layers = {path: module for path, module in modules_of(model).items() if kind_of(module) is not None}
    with (
        hooked(layers, counter.enter, counter.leave),
        preserved(model, training=False),
        _operation_by_operation(),
        torch.inference_mode(False),
        torch.no_grad(),
        counter,
    ):
        # On the inputs as they are given: tracing brings models and inputs to one number type.
        checked_call(model, example_inputs)
    counter.enter("")
    return counter


@contextlib.contextmanager
def _operation_by_operation() -> Iterator[None]:
    """Without torch's fast path of attention and encoder layers: one operation, for which there is no formula."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _MacCounter(TorchDispatchMode):
    """Adds up the operations that there is a formula for, by the layer that they run in.

    Gives the counts of `torch.utils.flop_counter.FlopCounterMode`, which takes up to half as long again with the same
    hooks, and without them knows modules by where they hang, which fails for those that are called past their parents.
    Here operations are only once asked whether they decompose into others, and only layers are followed.
    """

    atomic: ClassVar[set[Any]] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spares importing torch's compiler, which would be told not to look at this class."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self.between: Counter[str] = Counter()  # by the layer behind
        self.path, self.waiting = "", 0

    def enter(self, path: str, *_: Any) -> None:
        """What follows belongs to this layer, and what waits came before it."""
        self.path = path
        if self.waiting:
            self.between[path] += self.waiting
            self.waiting = 0

    def leave(self, *_: Any) -> None:
        """What follows belongs to none."""
        self.path = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        formula = _formula_of(func)
        if formula is None and func not in self.atomic:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self.atomic.add(func)
        result = func(*args, **kwargs)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result)
            if self.path:
                self.flops[self.path] += flops
            else:
                self.waiting += flops
        return result


Formula = Callable[..., Any]


def _formula_of(operation: Any) -> Formula | None:
    """What gives the FLOPs of a call, from its arguments and `out_val`; None where nothing is counted."""
    known: Formula | None = flop_registry.get(operation._overloadpacket)
    return known or _FORMULAS.get(operation._schema.name)


def _recurrent(x: Tensor, weights: list[Tensor]) -> int:
    """Each weight of the matrices is used once a step."""
    steps = x.numel() // max(x.shape[-1], 1)
    return 2 * steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _once(used: Tensor, *_: Any, **__: Any) -> int:
    """Each number of the first argument is used once: a matrix times a vector, a vector times a vector."""
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


_FORMULAS: dict[str, Formula] = {
    # One layer of an LSTM in one direction, in float32; and all of an LSTM, a GRU or a plain recurrent network.
    "aten::mkldnn_rnn_layer": lambda x, from_input, from_hidden, *_, **__: _recurrent(
        x, [from_input, from_hidden]
    ),
    "aten::_cudnn_rnn": lambda x, weights, *_, **__: _recurrent(x, weights),
    # Fused attention: that of the kernels that torch has a formula for.
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda query, key, value, *_, **__: sdpa_flop_count(
        query.shape, key.shape, value.shape
    ),
    "aten::mv": _once,
    "aten::dot": _once,
    "aten::vdot": _once,
    "aten::addmv": lambda _, matrix, *__, **___: _once(matrix),
    "aten::addmv_": lambda _, matrix, *__, **___: _once(matrix),
    "aten::addmm_": _added_products,
    "aten::addbmm": _added_products,
    "aten::addbmm_": _added_products,
    "aten::baddbmm_": _added_products,
    "aten::_trilinear": _of_three,
    # A convolution of `[time, batch, channels]` with `[taps, in, out]`.
    "aten::conv_tbc": lambda _, weight, *__, out_val, **___: 2 * out_val.numel() * weight[..., 0].numel(),
    # One of what lies at learned places, with `[out, in // groups, ...]`; finding that is not counted.
    "torchvision::deform_conv2d": lambda _, weight, *__, out_val, **___: (
        2 * out_val.numel() * weight[0].numel()
    ),
}
