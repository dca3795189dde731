"""`prune_`: the main job from end to end. Trace, couple, score, plan, verify on a copy, cut, compensate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from ss_pruning._utils.arrays import Floats
from ss_pruning._utils.copying import copied
from ss_pruning._utils.modules import modules_of, parameters_of
from ss_pruning._utils.progress import Clock, Progress
from ss_pruning._utils.running import quiet_hooks
from ss_pruning.compensation.apply import calibration_images, check_compensation, prepared
from ss_pruning.config import Method
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import IGNORED_REASON, Coupling, Excluded, couple
from ss_pruning.graph.layers import check_finite
from ss_pruning.graph.refusals import check_bare, check_weights, usable_inputs
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.strength import powers_along
from ss_pruning.planning.allocation import Budget, Costs, Scope
from ss_pruning.planning.defaults import COST_EXPONENT, default_recalibrate
from ss_pruning.planning.latency_target import Measure, find_latency_plan, stopwatch
from ss_pruning.planning.ranking import Ranker, Ranking
from ss_pruning.planning.search import BudgetSearch, FailedGroups
from ss_pruning.profiling.latency import as_reported
from ss_pruning.profiling.layer_latency import layer_times, roundings
from ss_pruning.profiling.macs import count_macs
from ss_pruning.report.records import QUANTILES, LayerReport, Report
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan, adopt_
from ss_pruning.surgery.verification import Verified, Verifier


def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    ratio: float | None = None,
    latency: float | None = None,
    importance: Any = None,
    ignore: str | nn.Module | Iterable[str | nn.Module] = (),
    round_to: int | Literal["measured"] | None = None,
    scope: Scope | None = None,
    max_ratio: float = 0.9,
    cost_exponent: float | None = None,
    compensation: Method = "none",
    calibration: Any = None,
    recalibrate: bool | None = None,
    latency_inputs: Any = None,
    progress: Progress | None = None,
) -> Report:
    """Prune whole channels of `model` in place, by synaptic strength or any Torch-Pruning importance.

    The cut is planned and checked on a copy first: the smaller model's output must equal the dense model's with the
    removed channels' contributions zeroed (float64, 1e-10). What cannot be cut so is excluded and named in the
    report. On any error the model is as it was. Build optimisers after pruning: the parameters are new.

    Args:
        model: Any CNN.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        macs: Share of the multiply-accumulates to keep; met from below, to within one step.
        params: Share of the parameters to keep; likewise.
        ratio: Share of the prunable channels to remove.
        latency: Share of the time of a forward pass to keep, as measured on this machine; met to within 5 %. Channels
            then compete by importance per second, see `ss_pruning.profiling.layer_latency`. Give exactly one of the
            four.
        importance: A Torch-Pruning importance. By default `SynapticImportance`, which takes the variance of what
            arrives at each channel from the calibration inputs if there are any, else from the model run on noise; with
            "linear" or "reconstruct" it counts less of what stronger channels tell already, without them it scores
            by "relevance" (by "share" in the local scope).
        ignore: Modules or module paths whose output channels stay; one alone, or several.
        round_to: Remaining widths are multiples of this; with "measured", each of a multiple that its layers' times on
            this machine ask for.
        scope: How layers compete. "global" ranks all channels by their scores, "local" shrinks every layer by the same
            share, "sensitivity" ranks all channels by the output error that their removal was seen to do on
            the calibration inputs, in the order of the scores within a layer, see `ss_pruning.importance.sensitivity`;
            without any it is measured on noise, on which relevance has a say, too. By default "sensitivity" with 8
            calibration inputs or more, or with "mean" and none where batch norms tell what noise should come to; else
            "global".
        max_ratio: No layer loses a larger share of its channels than this.
        cost_exponent: Before channels of different layers are compared, their scores are divided by what they cost (in
            the budget's unit) to this power: with 0 a channel that saves much must be as unimportant as one that saves
            little, with 1 importance per cost decides. By default 1 for the sensitivity scope, for which it is output
            error; 0.75 where relevance counts, in the global scope and on noise; 0.5 for other scores. Means nothing to
            `ratio` and to the local scope.
        compensation: Move what removed channels carried onto what stays: "mean" (needs no data), "linear" or
            "reconstruct", see `ss_pruning.compensation.folding`. With "none" the pruned model equals the masked one.
        calibration: Unlabelled inputs, to measure output error on and to compensate by: a tensor, or an iterable of
            batches (a data loader). A few hundred. Or "synthetic": images made from the model's batch norms, see
            `ss_pruning.compensation.synthetic_data`.
        recalibrate: At the end, move mean and variance of the batch norms behind the cut as far as what reaches them
            has moved, on the calibration inputs or, without any, on noise, see `ss_pruning.compensation.batchnorm`. By
            default with "mean" and "linear". With "none" the pruned model then no longer equals the masked one, and
            works better.
        latency_inputs: What times are measured on, in the batch size that counts; `example_inputs` by default.
        progress: Called with (stage, done, total), "synthesize" and "measure" in steps of their own.

    Returns:
        What was done, see `ss_pruning.report.records.Report`.

    Raises:
        InputError: An argument is wrong.
        ModelError: The model does not run on the inputs, or holds NaN or Inf weights.
        NothingToPruneError: No channel may go.
        BudgetError: The budget is out of reach; the message names the smallest that is not.
    """
    example_inputs = usable_inputs(example_inputs)
    check_bare(model)
    check_weights(model)
    budget = Budget.of(macs=macs, params=params, ratio=ratio, latency=latency)
    _check_options(scope, max_ratio, round_to, cost_exponent)
    check_compensation(compensation, calibration)
    recalibrate = default_recalibrate(compensation) if recalibrate is None else recalibrate
    check_finite(model)
    clock = Clock(progress or (lambda *_: None))
    with torch.inference_mode(False), quiet_hooks(model, example_inputs):
        with clock("trace", 0):
            connectivity = trace(model, example_inputs)
            coupling = couple(connectivity, model, _ignored(model, ignore, connectivity))
            costs = Costs(model, example_inputs, connectivity, coupling)
        images = calibration_images(calibration, model, example_inputs, clock.steps("synthesize"))
        with clock("score", 1):
            powers = powers_along(connectivity, model, example_inputs)
            strengths = {path: (power.numel(), _quantiles(power)) for path, power, _ in powers}
        timed_on = example_inputs if latency_inputs is None else latency_inputs
        if round_to == "measured" or latency is not None:
            with clock("time layers", 1):
                costs.times = layer_times(model, timed_on, connectivity)
        ranker = Ranker(
            model,
            example_inputs,
            connectivity,
            coupling,
            costs,
            budget,
            {"max_ratio": max_ratio, "round_to": _rounded(round_to, costs, coupling)},
            importance,
            images,
            compensation,
            recalibrate,
            cost_exponent,
        )
        found = _verified_plan(ranker, scope, latency, stopwatch(model, timed_on), clock)
        with clock("cut", 4):
            ready, plan, outcome = prepared(
                model, found.verified.plan, connectivity, compensation, images, example_inputs, recalibrate
            )
        options = {"max_ratio": max_ratio, "round_to": round_to, "compensation": compensation}
        if recalibrate:
            options["recalibrate"] = True
        report = Report(
            model=type(model).__name__,
            **_sizes(ready, example_inputs, plan, costs),
            layers=_layer_reports((model, ready), plan, connectivity, strengths, costs.layer_macs),
            excluded=list(found.excluded),
            max_error=found.verified.max_error,
            by_decisions=found.verified.by_decisions,
            settings=_settings(budget, found.ranking, options, calibration),
            sensitivity_on_noise=found.ranking.on_noise,
            sensitivity_not_measured=found.ranking.not_measured or None,
            inexact_layers=outcome.inexact,
            not_compensated=outcome.skipped,
            seconds=clock.seconds,
            versions={"torch": torch.__version__} | {n: _version(n) for n in ("ss-pruning", "torch-pruning")},
            **found.times,
        )
        adopt_(model, ready)
    return report


def _sizes(ready: nn.Module, example_inputs: Any, plan: Plan, costs: Costs) -> dict[str, Any]:
    """MACs and parameters, before and after; `ready` is the cut model."""
    return {
        "macs_before": costs.macs,
        "macs_after": costs.macs_after(plan) if costs.in_layers else count_macs(ready, example_inputs)[0],
        "params_before": costs.params,
        "params_after": sum(p.numel() for p in parameters_of(ready).values()),
    }


def _settings(budget: Budget, ranking: Ranking, options: dict[str, Any], calibration: Any) -> dict[str, Any]:
    """The options in effect."""
    settings = {
        budget.kind: budget.value,
        "importance": type(ranking.importance).__name__,
        "scope": ranking.scope,
        "cost_exponent": ranking.cost_exponent,
        **options,
    }
    if isinstance(calibration, str):
        settings["calibration"] = calibration
    return settings


class _Found(NamedTuple):
    """A verified plan, the ranking behind it, what stays, and what a report says of its time."""

    verified: Verified
    ranking: Ranking
    excluded: tuple[Excluded, ...]
    times: dict[str, Any]


def _verified_plan(
    ranker: Ranker, scope: Scope | None, latency: float | None, measure: Measure, clock: Clock
) -> _Found:
    """Rank, plan and verify.

    Scores may depend on what else is cut. Where a group fails, all is done again without it, so that the plan is the
    one of a model in which it was ignored from the start.
    """
    with clock("plan", 2), clock("verify", 3):
        verifier = Verifier(ranker.model, ranker.example_inputs, ranker.connectivity)
    verifier.watch = lambda: clock("verify", 3)
    known: Verified | None = None
    try:
        while True:
            ranking = ranker.ranked(scope, clock)
            coupling = ranker.coupling
            with clock("plan", 2):
                search = BudgetSearch(
                    verifier, coupling, ranker.costs, ranker.budget, ranking.moves, ranking.cost_exponent
                )
                search.verified = known
                try:
                    verified, times = _in_time(search, ranking.scores, latency, measure)
                    return _Found(verified, ranking, coupling.excluded, times)
                except FailedGroups:
                    less, known = coupling.without(search.reasons, search.excluded()), search.verified
            ranker = replace(ranker, coupling=less, importance=ranking.importance)
    finally:
        verifier.close()


def _in_time(
    search: BudgetSearch, scores: list[list[Floats]], latency: float | None, measure: Measure
) -> tuple[Verified, dict[str, Any]]:
    """The plan, and what a report says of its time where that was the budget."""
    if latency is None:
        return search.find_verified_plan(scores), {}
    found = find_latency_plan(search, scores, latency, measure)
    return found.verified, as_reported(found.dense, found.pruned)


def planned(model: nn.Module, example_inputs: Any, **options: Any) -> tuple[Plan, Report]:
    """What `prune_` would do, found on a copy; the model is left as it is.

    The plan comes on top of the cuts that the model has had: apply it to the model, or to its likes in other processes
    (`ss_pruning.io.distributed`). Compensation is not part of a plan.

    Args:
        model: As for `prune_`.
        example_inputs: As for `prune_`.
        options: As for `prune_`.
    """
    twin = copied(model)
    vars(twin).pop(PLAN_ATTRIBUTE, None)
    report = prune_(twin, example_inputs, **options)
    plan: Plan = getattr(twin, PLAN_ATTRIBUTE)
    return plan, report


def _check_options(
    scope: str | None, max_ratio: float, round_to: int | str | None, cost_exponent: float | None
) -> None:
    if scope not in (None, *COST_EXPONENT):
        raise InputError(f"scope={scope!r} is unknown; use {', '.join(map(repr, COST_EXPONENT))}")
    numbers = {"max_ratio": max_ratio, "round_to": round_to, "cost_exponent": cost_exponent}
    for name, value in numbers.items():
        if isinstance(value, bool):
            raise InputError(f"{name}={value} is no number; give one, or leave it out")
    if not 0 < max_ratio <= 1:
        raise InputError(f"max_ratio={max_ratio} must lie in (0, 1]")
    if cost_exponent is not None and not 0 <= cost_exponent <= 10:
        raise InputError(
            f"cost_exponent={cost_exponent} must lie in [0, 10]; 1 is importance per cost, 0 ignores it"
        )
    if round_to not in (None, "measured") and (not isinstance(round_to, int) or round_to < 1):
        raise InputError(f"round_to={round_to!r} must be a positive whole number, such as 8, or 'measured'")


def _rounded(round_to: Any, costs: Costs, coupling: Coupling) -> Any:
    """Each group's own multiple, if those are to be measured."""
    if round_to != "measured" or costs.times is None:
        return round_to
    return roundings(costs.times, coupling.groups)


def _ignored(
    model: nn.Module, ignore: str | nn.Module | Iterable[str | nn.Module], connectivity: Connectivity
) -> dict[str, str]:
    """Layer paths to keep whole: the named modules and everything inside them."""
    ignore = (ignore,) if isinstance(ignore, (str, nn.Module)) else ignore
    paths = {module: path for path, module in modules_of(model).items()}
    found: dict[str, str] = {}
    for item in ignore:
        if isinstance(item, nn.Module):
            if item not in paths:
                raise InputError(f"ignore holds a {type(item).__name__} that is not in the model")
            path = paths[item]
        else:
            path = item
        inside = [p for p in connectivity.layers if p == path or p.startswith(f"{path}.") or not path]
        if not inside:
            raise InputError(f"ignore={path!r} names no layer that runs; see dict(model.named_modules())")
        found.update(dict.fromkeys(inside, IGNORED_REASON))
    return found


def _layer_reports(
    models: tuple[nn.Module, nn.Module],
    plan: Plan,
    connectivity: Connectivity,
    strengths: Mapping[str, tuple[int, tuple[float, ...]]],
    macs: Mapping[str, int],
) -> list[LayerReport]:
    """Each layer in the dense and the cut model; a layer's multiply-accumulates are proportional to its synapses."""
    dense, ready = map(modules_of, models)
    kept = {(cut.path, cut.side): len(cut.kept) for cut in plan.cuts}
    reports = []
    for path, (synapses, strength) in strengths.items():
        layer = connectivity.layers[path]
        inputs, outputs = kept.get((path, "in"), layer.inputs), kept.get((path, "out"), layer.outputs)
        groups_before = layer.inputs * layer.outputs // synapses
        groups_after = inputs if layer.kind == "depthwise" else groups_before
        left = outputs * inputs // groups_after
        reports.append(
            LayerReport(
                path=path,
                kind=type(dense[path]).__name__,
                inputs_before=layer.inputs,
                inputs_after=inputs,
                outputs_before=layer.outputs,
                outputs_after=outputs,
                synapses_before=synapses,
                synapses_after=left,
                strength=strength,
                macs_before=macs.get(path, 0),
                macs_after=macs.get(path, 0) * left // synapses,
                params_before=sum(p.numel() for p in dense[path].parameters()),
                params_after=sum(p.numel() for p in ready[path].parameters()),
            )
        )
    return reports


def _quantiles(power: torch.Tensor, most: int = 2**12) -> tuple[float, ...]:
    """`QUANTILES` of a layer's strengths, from their squares; the inner ones of many from an even sample."""
    values = power.flatten()
    low, high = (float(end.sqrt()) for end in values.aminmax())
    sample = np.sort(values[:: -(-len(values) // most)].double().sqrt().cpu().numpy())
    inner = np.interp(np.multiply(QUANTILES[1:-1], len(sample) - 1), np.arange(len(sample)), sample)
    return low, *inner.tolist(), high


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
