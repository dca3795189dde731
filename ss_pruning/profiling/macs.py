"""Multiply-accumulates of a model, counted while it runs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import checked_call, preserved
from ss_pruning.graph.layers import kind_of


def count_macs(model: nn.Module, example_inputs: Any) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass, in all and by layer, by torch's own formulas (FLOPs / 2).

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


def _attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of the fused attention that torch 2.14 has no formula for: those of the others that it has."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-any-return]


def _recurrent(x: Tensor, *weights: Tensor) -> int:
    """FLOPs of recurrent layers: each weight of their matrices is used once a step."""
    steps = x.numel() // max(x.shape[-1], 1)
    return 2 * steps * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _recurrent_on_cpu(x: Any, from_input: Any, from_hidden: Any, *_: Any, **__: Any) -> int:
    """One layer of an LSTM in one direction, in float32; torch has no formula, as for the next."""
    return _recurrent(x, from_input, from_hidden)


def _recurrent_on_cuda(x: Any, weights: Any, *_: Any, **__: Any) -> int:
    """All layers and directions of an LSTM, a GRU or a plain recurrent network."""
    return _recurrent(x, *weights)


_FORMULAS = {
    **flop_registry,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_on_cpu,
    torch.ops.aten._cudnn_rnn: _recurrent_on_cuda,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu,
}


class _MacCounter(TorchDispatchMode):
    """Adds up the operations that torch has a formula for, by the layer that they run in.

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
        formula = _FORMULAS.get(func._overloadpacket)
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
