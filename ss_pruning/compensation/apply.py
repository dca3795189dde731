"""Cutting a model to a plan, and moving what the removed channels carried onto what stays, where that helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import nn

from ss_pruning._utils.copying import copied
from ss_pruning._utils.progress import part
from ss_pruning.compensation.batch_sizes import channels_last, sizes_that_run
from ss_pruning.compensation.batchnorm import recalibrate_
from ss_pruning.compensation.fidelity import Reference, held_out
from ss_pruning.compensation.folding import Outcome, fold_linear_, fold_means_
from ss_pruning.compensation.reconstruction import reconstruct_
from ss_pruning.compensation.synthetic_data import synthetic_images
from ss_pruning.config import COMPENSATIONS, Compensation, NoCompensation, SyntheticImages
from ss_pruning.errors import InputError, ModelError, SSPruningError
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch, gather
from ss_pruning.report.records import Fidelity
from ss_pruning.surgery.plan import Plan, adopt_

#: With fewer inputs nothing is held out: they say too little, and are wanted for fitting.
LEAST_HELD_OUT = 20

Function = TypeVar("Function", bound=Callable[..., Any])

_COMPENSATIONS: dict[str, Callable[..., Any]] = {
    "none": lambda *_: None,  # what is masked is what is cut
    "mean": fold_means_,
    "linear": fold_linear_,
    "reconstruct": reconstruct_,
}


def register_compensation(
    name: str, *, needs_calibration: bool = False, recalibrate: bool = False
) -> Callable[[Function], Function]:
    """Make a repair of your own known to `prune_(compensation=name)`.

    Args:
        name: Its name.
        needs_calibration: It solves the weights that stay anew, from calibration inputs.
        recalibrate: The batch norms behind the cut are recalibrated afterwards.

    Returns:
        A decorator for a function `(pruned, traced, plan, images)` that changes the weights of `pruned` in place.
        `pruned` is a copy that has been cut, `traced.model` the dense model, `plan.cuts` tell which channels stayed,
        and `images.inputs` are the calibration inputs (`images` is None without any). What it returns is
        ignored, unless it is an `Outcome` (`ss_pruning.compensation.folding`) that says what was done.
    """
    by_default = recalibrate

    @dataclass(frozen=True)
    class Registered(Compensation):
        recalibrate: bool = by_default
        method: ClassVar[Any] = name
        solves: ClassVar[bool] = needs_calibration

    COMPENSATIONS[name] = Registered

    def register(function: Function) -> Function:
        _COMPENSATIONS[name] = function
        return function

    return register


def calibration_images(calibration: Any, model: nn.Module, example_inputs: Any) -> Batch | None:
    """The calibration inputs as one batch; None without.

    `calibration` is a tensor, an iterable of batches, "synthetic" or `SyntheticImages`, or None.

    Raises:
        InputError: They are not what the model takes, see `ss_pruning.importance.calibration`, or fewer than it runs
            on.
    """
    if calibration is None:
        return None
    if isinstance(calibration, str):
        calibration = SyntheticImages()
    if isinstance(calibration, SyntheticImages):
        calibration = synthetic_images(model, example_inputs, calibration)
    batch = gather(calibration, example_inputs)
    fitting = batch.limited(*sizes_that_run(model, example_inputs))
    if not len(fitting):
        raise InputError(
            f"the model runs on batches of {fitting.unit}, as the example inputs are, and there are {len(batch)} "
            "calibration inputs; give more"
        )
    return channels_last(model, fitting)


@dataclass(frozen=True)
class Prepared:
    """A cut model, ready to be swapped in.

    Attributes:
        plan: The plan, with the biases that layers got.
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


def cut_(
    traced: TracedModel, plan: Plan, compensation: Compensation, images: Batch | None
) -> tuple[Plan, Outcome]:
    """Cut the model, all or nothing; see `prepared`.

    Returns:
        The plan with the biases that layers got, and what the compensation did.
    """
    made = prepared(traced, plan, compensation, images)
    adopt_(traced.model, made.model)
    return made.plan, made.outcome


def prepared(traced: TracedModel, plan: Plan, compensation: Compensation, images: Batch | None) -> Prepared:
    """A copy of the model, cut and compensated, for `adopt_`: whatever fails, the model is as it was.

    Raises:
        ModelError: The compensation or the recalibration failed.
    """
    model, method = traced.model, compensation.method
    if method == "none" and not compensation.recalibrate:
        return Prepared(plan.cut_copy(model), plan, Outcome())
    small = plan.cut_copy(copied(model))
    try:
        with part(0.0, 0.5 if compensation.recalibrate else 1.0):
            done = _COMPENSATIONS[method](small, traced, plan, images)
        outcome = done if isinstance(done, Outcome) else Outcome()
        if compensation.recalibrate:
            means = method == "none" or images is not None
            with part(0.5, 1.0):
                recalibrate_(small, traced, plan, images, means)
    except SSPruningError:
        raise
    except Exception as error:
        raise ModelError(
            f"{compensation} failed, the model is as it was ({type(error).__name__}: {error}); check that the "
            "calibration inputs are what the model takes"
        ) from error
    plan = replace(plan, biases=tuple(outcome.biases))
    return Prepared(plan.cut_copy(model, small), plan, outcome)


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


def prepared_best(
    traced: TracedModel, plan: Plan, compensation: Compensation, calibration: Calibration
) -> Prepared:
    """Cut a copy; compensate it, unless that leads away from the dense model."""
    made = prepared(traced, plan, compensation, calibration.fitted)
    reference = calibration.reference
    if reference is None:
        return made
    alone = prepared(traced, plan, NoCompensation(), None)
    plain = reference.fidelity(alone.model)
    if compensation == NoCompensation():
        return replace(made, fidelity=plain, uncompensated=plain)
    found = reference.fidelity(made.model)
    if found.error <= plain.error:
        return replace(made, fidelity=found, uncompensated=plain)
    return replace(alone, fidelity=plain, uncompensated=plain, dropped=True)
