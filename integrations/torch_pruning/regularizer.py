"""Sparse training in scripts that are built around a Torch-Pruning pruner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ss_pruning.integrations.torch_pruning.pruner import GraphPruner
from ss_pruning.sparsity.penalty import Form, StrengthPenalty


class StrengthPruner(GraphPruner):
    """A pruner whose `regularize` trains towards sparse synapses; call it between `backward` and the optimiser's step.

    Args:
        model: Any CNN.
        example_inputs: What `forward` takes.
        importance: Any Torch-Pruning importance; `SynapticImportance()` fits.
        reg: What the penalty is multiplied with.
        form: See `ss_pruning.sparsity.penalty.StrengthPenalty`.
        **options: As for `GraphPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[[Any], Tensor | None],
        reg: float = 1e-4,
        form: Form = "strength",
        **options: Any,
    ) -> None:
        super().__init__(model, example_inputs, importance, **options)
        self.reg, self.form, self._regularized_inputs = reg, form, example_inputs
        self.update_regularizer()

    def update_regularizer(self) -> None:
        """Look at the model anew; `step` does so by itself."""
        self._penalty: StrengthPenalty | None = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """As `GraphPruner.step`."""
        self.update_regularizer()
        return super().step(*args, **kwargs)

    def regularize(self, model: nn.Module | None = None, reg: float | None = None) -> None:
        """Add the gradient of the penalty to those that `backward` has left.

        Args:
            model: Not needed: the pruner's own; other pruners of Torch-Pruning take it.
            reg: In place of the pruner's.
        """
        if self._penalty is None:
            self._penalty = StrengthPenalty(self.model, self._regularized_inputs, form=self.form)
        self._penalty.add_gradients_(self.reg if reg is None else reg)
