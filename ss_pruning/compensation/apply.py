"""Cutting a model to a plan, and moving what the removed channels carried onto what stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import nn

from ss_pruning._utils.copying import copied
from ss_pruning._utils.progress import part
from ss_pruning.compensation.batchnorm import recalibrate_
from ss_pruning.compensation.folding import Outcome, fold_linear_, fold_means_
from ss_pruning.compensation.reconstruction import reconstruct_
from ss_pruning.compensation.synthetic_data import SYNTHETIC, synthetic_images
from ss_pruning.config import COMPENSATIONS, Compensation, SyntheticImages
from ss_pruning.errors import InputError, ModelError, SSPruningError
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch, channels_last, gather, sizes_that_run
from ss_pruning.surgery.plan import Plan, adopt_

Function = TypeVar("Function", bound=Callable[..., Any])

_COMPENSATIONS: dict[str, Callable[..., Any]] = {}


def register_compensation(
    name: str, *, needs_calibration: bool = False, recalibrate: bool = False
) -> Callable[[Function], Function]:
    """Let `prune_(compensation=name)` find a way of your own to repair a cut.

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
    return compensates(name)


def compensates(name: str) -> Callable[[Function], Function]:
    """A decorator for the function that carries out a compensation whose settings exist."""

    def register(function: Function) -> Function:
        _COMPENSATIONS[name] = function
        return function

    return register


def calibration_images(
    calibration: Any, model: nn.Module, example_inputs: Any, progress: Callable[[int, int], None]
) -> Batch | None:
    """The calibration inputs as one batch; None without.

    Args:
        calibration: A tensor, an iterable of batches, "synthetic" or `SyntheticImages`, or None.
        model: What to synthesize from.
        example_inputs: What `forward` takes.
        progress: Called with (steps done, steps in all) of the synthesis.

    Raises:
        InputError: They are not what the model takes, see `ss_pruning.importance.calibration`, or fewer than it runs
            on.
    """
    if calibration is None:
        return None
    if isinstance(calibration, str):
        calibration = SyntheticImages()
    if isinstance(calibration, SyntheticImages):
        calibration = synthetic_images(model, example_inputs, calibration, progress)
    batch = gather(calibration, example_inputs)
    fitting = batch.limited(*sizes_that_run(model, example_inputs))
    if not len(fitting):
        raise InputError(
            f"the model runs on batches of {fitting.unit}, as the example inputs are, and there are {len(batch)} "
            "calibration inputs; give more"
        )
    return channels_last(model, fitting)


def check_calibration(calibration: Any, compensation: Compensation) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        InputError: An unknown word, or a compensation lacks calibration inputs.
    """
    if isinstance(calibration, str) and calibration != SYNTHETIC:
        raise InputError(
            f"calibration={calibration!r} is unknown; give inputs, or {SYNTHETIC!r} to make some"
        )
    if compensation.solves and calibration is None:
        raise InputError(
            f"compensation={compensation.method!r} needs calibration=, a few hundred unlabelled inputs: a tensor or a "
            f"data loader. Without any, calibration={SYNTHETIC!r} makes some, and compensation='mean' does without"
        )


def cut_(
    traced: TracedModel, plan: Plan, compensation: Compensation, images: Batch | None
) -> tuple[Plan, Outcome]:
    """Cut the model, all or nothing; see `prepared`.

    Returns:
        The plan with the biases that layers got, and what the compensation did.
    """
    ready, plan, outcome = prepared(traced, plan, compensation, images)
    adopt_(traced.model, ready)
    return plan, outcome


def prepared(
    traced: TracedModel, plan: Plan, compensation: Compensation, images: Batch | None
) -> tuple[nn.Module, Plan, Outcome]:
    """A copy of the model, cut and compensated, for `adopt_`: whatever fails, the model is as it was.

    Args:
        traced: The dense model; not changed.
        plan: What to cut.
        compensation: How to compensate.
        images: One batch of calibration inputs, or None; see `calibration_images`.

    Returns:
        The copy, the plan with the biases that layers got, and what the compensation did.

    Raises:
        ModelError: The compensation or the recalibration failed.
    """
    model, method = traced.model, compensation.method
    if method == "none" and not compensation.recalibrate:
        return plan.cut_copy(model), plan, Outcome()
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
    return plan.cut_copy(model, small), plan, outcome


@compensates("none")
def _leave(*_: object) -> None:
    """What is masked is what is cut."""


for _name, _compensate in {"mean": fold_means_, "linear": fold_linear_, "reconstruct": reconstruct_}.items():
    compensates(_name)(_compensate)
