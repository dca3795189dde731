"""Multiply-accumulates of a model, counted while it runs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import checked_call, preserved, settled_weights
from ss_pruning.graph.layers import kind_of
from ss_pruning.profiling.flop_formulas import formula_of


def count_macs(model: nn.Module, example_inputs: Any) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass, in all and by layer (FLOPs / 2), see `flop_formulas`.

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
        formula = formula_of(func)
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
