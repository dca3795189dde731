"""A pass in training: code that runs nowhere else relies on widths, too, and on which channels stay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ss_pruning._utils.copying import retyped
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import output_of
from ss_pruning.errors import VerificationError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Selection
from ss_pruning.surgery.cut_pass import run_cut, to_meta
from ss_pruning.surgery.equivalence.agreement import difference, moved
from ss_pruning.surgery.equivalence.masked_model import masked
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import SizeAttributes, names_in

_State = dict[str, Tensor]
# Tables of parameters are in the model's own precision: so many units in the last place are rounding.
_ROUNDING = 16


def all_but_norms(module: nn.Module) -> bool:
    """The train flag with which a model takes its branches of training; of norms, which refuse a single value, none."""
    return not isinstance(module, _NormBase)


def branches_in_training(model: nn.Module) -> bool:
    """Whether code that is not torch's asks if it is in training."""
    kinds = {base for m in modules_of(model).values() if all_but_norms(m) for base in type(m).__mro__}
    return any(
        "training" in names_in(method)
        for kind in kinds
        if not kind.__module__.startswith("torch.")
        for method in vars(kind).values()
    )


@dataclass(frozen=True)
class TrainingPass:
    """How the model runs in training.

    Attributes:
        model: The dense model; without data where it runs so and nothing moves.
        inputs: What it runs on.
        moved: Names of the tensors that a pass moves, by itself: averages of a model that is trained (EMA, MoCo).
    """

    model: nn.Module
    inputs: Any
    moved: frozenset[str]

    @classmethod
    def of(
        cls, dense: nn.Module, inputs: Any, precise: Callable[[nn.Module], nn.Module]
    ) -> TrainingPass | None:
        """None where nothing runs in training alone, or where training wants more: targets, or a history."""
        if not branches_in_training(dense):
            return None
        model = precise(dense)
        with contextlib.suppress(Exception):
            before, after = _tensors(model), _After(lambda: _tensors(model))
            output_of(model, inputs, after, training=all_but_norms)
            changed = frozenset(name for name, tensor in before.items() if moved(tensor, after.state[name]))
            if not changed:
                with contextlib.suppress(Exception):  # it looks at values
                    twin, shapes = retyped(model, lambda t: t.to("meta")), to_meta(inputs)
                    output_of(twin, shapes, training=all_but_norms)
                    return cls(twin, shapes, changed)
            return cls(model, inputs, changed)
        return None

    def check(
        self,
        plan: Plan,
        selection: Selection,
        connectivity: Connectivity,
        sizes_that_follow: SizeAttributes,
        tolerance: float,
    ) -> None:
        """See that the cut model runs in training, and moves the tensors of its layers as the masked one does.

        Else a model and its average could be cut to the same width with other channels kept.

        Raises:
            VerificationError: It does not.
        """
        plan = replace(plan, factors=())
        small = plan.cut_copy(self.model)
        after = _After(lambda: _tensors(small))
        run_cut(small, self.inputs, sizes_that_follow, lambda: after, training=all_but_norms)
        layers = {cut.path for cut in plan.cuts}
        names = {name for name in self.moved if name in layers or name.rpartition(".")[0] in layers}
        if not names:
            return
        expected = _After(lambda: _tensors(plan.cut_copy(self.model)))
        with masked(self.model, selection, connectivity):
            output_of(self.model, self.inputs, expected, training=all_but_norms)
        for name in sorted(names & expected.state.keys() & after.state.keys()):
            error = difference(expected.state[name], found := after.state[name])
            rounding = _ROUNDING * torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
            if error is None or not error <= max(tolerance, rounding):
                raise VerificationError(
                    f"in training the cut model makes another '{name}' than the masked one: what it is made from keeps "
                    "other channels"
                )


class _After(contextlib.AbstractContextManager["_After"]):
    """Notes a model's tensors at the end of a pass, before they are taken back."""

    def __init__(self, tensors: Callable[[], _State]) -> None:
        self.tensors, self.state = tensors, _State()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.state = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}


def _tensors(model: nn.Module) -> _State:
    named: Iterator[tuple[str, Tensor]]
    named = ((n, t) for table in (model.named_parameters, model.named_buffers) for n, t in table())
    return dict(named)
