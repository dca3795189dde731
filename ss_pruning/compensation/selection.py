"""Compensation is applied where it helps: the cut with it and without are compared on inputs that were held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ss_pruning.compensation.apply import prepared
from ss_pruning.compensation.fidelity import Reference, held_out
from ss_pruning.compensation.folding import Outcome
from ss_pruning.config import Compensation, NoCompensation
from ss_pruning.errors import ModelError
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch
from ss_pruning.report.records import Fidelity
from ss_pruning.surgery.plan import Plan

#: With fewer inputs nothing is held out: they say too little, and are wanted for fitting.
LEAST_HELD_OUT = 20


@dataclass(frozen=True)
class Calibration:
    """The inputs that are fitted on, and what is held out of every fit.

    Attributes:
        fitted: For statistics, sensitivities and weights; None without calibration inputs.
        reference: The dense model's outputs on the others; None where there are too few, or nothing can be compared.
    """

    fitted: Batch | None
    reference: Reference | None

    @classmethod
    def of(cls, model: nn.Module, images: Batch | None, synthetic: bool) -> Calibration:
        """Hold a fifth out."""
        if images is None or len(images) // images.unit < LEAST_HELD_OUT:
            return cls(images, None)
        held, others = held_out(images)
        try:
            return cls(others, Reference(model, held, synthetic))
        except ModelError:  # nothing to compare: outputs of other shapes for each input, say
            return cls(images, None)


@dataclass(frozen=True)
class Prepared:
    """A cut model, ready to be swapped in.

    Attributes:
        model: The copy.
        plan: The plan, with the biases that layers got.
        outcome: What the compensation did.
        fidelity: On the held-out inputs; None without any.
        uncompensated: The same of the cut alone.
        dropped: The compensation was left out: the cut alone is nearer to the dense model.
    """

    model: nn.Module
    plan: Plan
    outcome: Outcome
    fidelity: Fidelity | None = None
    uncompensated: Fidelity | None = None
    dropped: bool = False

    def noted(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "inexact_layers": self.outcome.inexact,
            "not_compensated": self.outcome.skipped,
            "fidelity": self.fidelity,
            "fidelity_uncompensated": self.uncompensated,
            "compensation_dropped": self.dropped,
        }


def prepared_best(
    traced: TracedModel, plan: Plan, compensation: Compensation, calibration: Calibration
) -> Prepared:
    """Cut a copy; compensate it, unless that leads away from the dense model.

    Raises:
        ModelError: The compensation failed.
    """
    made = prepared(traced, plan, compensation, calibration.fitted)
    reference = calibration.reference
    if reference is None:
        return Prepared(*made)
    alone = prepared(traced, plan, NoCompensation(), None)
    plain = reference.fidelity(alone[0])
    if compensation == NoCompensation():
        return Prepared(*made, plain, plain)
    found = reference.fidelity(made[0])
    if found.error <= plain.error:
        return Prepared(*made, found, plain)
    return Prepared(*alone, plain, plain, dropped=True)
