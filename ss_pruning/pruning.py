"""`prune_`: the main job from end to end. Trace, couple, score, plan, verify on a copy, cut, compensate."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import nn

from ss_pruning._utils.copying import copied
from ss_pruning._utils.modules import modules_of, parameters_of
from ss_pruning._utils.progress import Clock, Progress, listening, reporter
from ss_pruning._utils.running import quiet_hooks
from ss_pruning.compensation.apply import Calibration, calibration_images, prepared_best
from ss_pruning.compensation.passes.memory import give_back
from ss_pruning.config import SYNTHETIC, Allocation, Budget, Compensation, Config, Scope, SyntheticImages
from ss_pruning.graph.layers import groups_of
from ss_pruning.graph.refusals import check_bare, check_finite, check_weights, usable_inputs
from ss_pruning.graph.traced import Ignore, TracedModel, paths_of
from ss_pruning.importance.calibration import Batch
from ss_pruning.importance.scoring import importance_of
from ss_pruning.importance.strength import powers_along
from ss_pruning.planning.costs import Costs
from ss_pruning.planning.duration import work_within
from ss_pruning.planning.latency_target import LatencyPlan, find_latency_plan, stopwatch
from ss_pruning.planning.narrow_heads import with_narrow_heads
from ss_pruning.planning.ranking import Ranker
from ss_pruning.planning.search import SearchResult, find_verified_plan
from ss_pruning.planning.tied_heads import with_tied_heads
from ss_pruning.profiling.latency import as_reported
from ss_pruning.profiling.layer_latency import latency_table
from ss_pruning.profiling.macs import count_macs
from ss_pruning.report.records import QUANTILES, UNUSED, LayerReport, Report
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan, adopt_
from ss_pruning.surgery.same_attention import with_prunable_attention
from ss_pruning.surgery.verification import Verifier

# Quantiles of a layer's strengths are taken of about so many.
_SAMPLE = 2**12


def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    ratio: float | None = None,
    latency: float | None = None,
    importance: Any = None,
    compensation: Compensation | str = "none",
    calibration: Any = None,
    allocation: Allocation | Scope | None = None,
    ignore: Ignore = (),
    progress: Progress | None = None,
) -> Report:
    """Prune whole channels of `model` in place, by synaptic strength or any Torch-Pruning importance.

    The cut is planned and checked on a copy first: the smaller model's output must equal the dense model's with the
    removed channels' contributions zeroed (float64, 1e-10). What cannot be cut so is excluded and named in the
    report. On any error the model is as it was. Build optimisers after pruning: the parameters are new.

    Args:
        model: A convolutional network, a transformer, a hybrid, a detector; not compiled, wrapped or scripted.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        macs: Share of the multiply-accumulates to keep; met from below, to within one step.
        params: Share of the parameters to keep; likewise.
        ratio: Share of the prunable channels to remove.
        latency: Share of the time of a forward pass to keep, as measured on this machine; met to within 5 %. Channels
            then compete by importance per second, see `ss_pruning.profiling.layer_latency`. Give exactly one of the
            four.
        importance: `ss_pruning.Synaptic`, a `SynapticImportance`, any importance of Torch-Pruning, or a name:
            "magnitude", "magnitude-l1", "bn-scale", "lamp", "fpgm", "random", or one of your own, see
            `ss_pruning.register_importance`. By default synaptic strength with the score and the statistics that suit
            compensation and scope.
        compensation: Move what removed channels carried onto what stays: "mean" (batch norms will do), "linear" or
            "reconstruct", or one of `ss_pruning.config` with settings of its own, such as
            `FoldMean(recalibrate=False)`. With "none" the pruned model equals the masked one.
        calibration: Unlabelled inputs, to measure sensitivity on and to compensate by: a tensor, or an iterable of
            batches (a data loader). A few hundred: fewer than 8 that differ are not used where noise will do. Or
            "synthetic", or `SyntheticImages(...)`: images made from the model's batch norms.
        allocation: How the budget is spread over the layers; a scope alone, such as "local", or `Allocation(...)`.
        ignore: Modules or module paths whose output channels stay; one alone, or several.
        progress: Called with (stage, done, total), in milliseconds of work as it was expected to take before the
            start; "synthesize", which is over before, in steps of its own.

    Returns:
        What was done, see `ss_pruning.report.records.Report`.

    Raises:
        InputError: An argument is wrong.
        ModelError: The model does not run on the inputs, or holds NaN or Inf weights.
        NothingToPruneError: No channel may go.
        BudgetError: The budget is out of reach; the message names the smallest that is not.
    """
    example_inputs = usable_inputs(example_inputs)
    for check in (check_bare, check_weights, check_finite):
        check(model)
    budget = Budget.of(macs=macs, params=params, ratio=ratio, latency=latency)
    config = Config(
        budget, Allocation.of(allocation), Compensation.of(compensation), importance_of(importance)
    )
    config.compensation.check(calibration)
    clock = Clock(reporter(progress))
    with torch.inference_mode(False), quiet_hooks(model, example_inputs):
        with clock("trace"):
            dense = with_prunable_attention(model, example_inputs)
            traced = TracedModel.of(dense, example_inputs, paths_of(model, ignore))
        give_back()
        with listening(clock.steps("synthesize")):
            images, said = _calibration(calibration, model, example_inputs, config)
        with clock("trace"):
            traced, config = _with_heads(traced, config, 0 if images is None else len(images))
            costs = Costs(traced)
        with clock("estimate"):
            work = work_within(traced, config, costs, images, config.allocation.budget_time)
            clock.expect(work.seconds)
        config = work.config
        with clock("score"):
            inputs = Calibration.of(model, work.of(images), synthetic="calibration" in said)
            strengths = _strengths(traced)
        ranker = Ranker(traced, config, costs, inputs.fitted, clock, work.effort)
        found, timed = _verified_plan(ranker)
        ranking = ranker.ranked(found.coupling)
        clock.over(but="cut")
        del ranker  # and the statistics that it holds
        give_back()
        with clock("cut"):
            cut = prepared_best(traced, found.verified.plan, config.compensation, inputs)
        report = Report(
            model=type(model).__name__,
            **_sizes(cut.model, cut.plan, costs, traced),
            layers=_layer_reports(traced, cut.model, cut.plan, strengths, costs.layer_macs),
            excluded=list(found.coupling.excluded),
            max_error=found.verified.max_error,
            by_decisions=found.verified.by_decisions,
            precision=found.verified.precision,
            settings=ranking.config.settings() | said,
            sensitivity_not_measured=ranking.not_measured or None,
            inexact_layers=cut.outcome.inexact,
            not_compensated=cut.outcome.skipped,
            fidelity=cut.fidelity,
            fidelity_uncompensated=cut.uncompensated,
            compensation_dropped=cut.dropped,
            seconds=clock.seconds,
            seconds_expected=work.seconds,
            traded_for_time=list(work.traded),
            versions={"torch": torch.__version__} | {n: _version(n) for n in ("ss-pruning", "torch-pruning")},
            **({} if timed is None else as_reported(timed.dense, timed.pruned)),
        )
        clock.over()
        ready = cut.model if dense is model else cut.plan.cut_copy(model, cut.model)
    adopt_(model, ready)  # the last step: whatever comes before leaves the model as it was
    return report


def plan(model: nn.Module, example_inputs: Any, **options: Any) -> tuple[Plan, Report]:
    """What `prune_` would do, found on a copy; the model is left as it is.

    The plan comes on top of the cuts that the model has had: apply it to the model, or to its likes in other processes
    (`ss_pruning.io.distributed`). Compensation is not part of a plan.

    Args:
        model: As for `prune_`.
        example_inputs: As for `prune_`.
        options: As for `prune_`.

    Returns:
        The plan, and the report of the copy.

    Raises:
        SSPruningError: As for `prune_`.
    """
    twin = copied(model)
    vars(twin).pop(PLAN_ATTRIBUTE, None)
    report = prune_(twin, example_inputs, **options)
    found: Plan = getattr(twin, PLAN_ATTRIBUTE)
    return found, report


def _calibration(
    calibration: Any, model: nn.Module, example_inputs: Any, config: Config
) -> tuple[Batch | None, dict[str, Any]]:
    """The inputs that are used, and what settings of a report say of them."""
    images = calibration_images(calibration, model, example_inputs)
    made = isinstance(calibration, (str, SyntheticImages))
    said: dict[str, Any] = {"calibration": SYNTHETIC} if made else {}
    if images is None or config.uses(images.different()):
        return images, said
    return None, said | {UNUSED: len(images)}


def _with_heads(traced: TracedModel, config: Config, images: int) -> tuple[TracedModel, Config]:
    """With heads in groups, whole or by their dimensions, as is the default with so many calibration inputs."""
    heads = config.resolve(images).allocation.heads
    config = replace(config, allocation=replace(config.allocation, heads=heads))
    return with_tied_heads(with_narrow_heads(traced) if heads == "narrow" else traced), config


def _verified_plan(ranker: Ranker) -> tuple[SearchResult, LatencyPlan | None]:
    """The plan, and how it was timed where time is the budget."""
    traced, clock, budget = ranker.traced, ranker.clock, ranker.config.budget
    if budget.kind == "latency" or ranker.config.allocation.round_to == "measured":
        with clock("time layers"):
            inputs = _timed_on(traced, ranker.config)
            ranker.costs.times = latency_table(traced.model, inputs, traced.connectivity)
    with clock("plan"), clock("verify"):
        verifier = Verifier(
            traced.model, traced.example_inputs, traced.connectivity, watch=lambda: clock("verify")
        )
    known: SearchResult | None = None

    def find(budget: Budget) -> SearchResult:
        nonlocal known
        ranker.config = replace(ranker.config, budget=budget)
        with clock("plan"):
            known = find_verified_plan(verifier, traced.coupling, ranker.allocate, known)
        return known

    with closing(verifier):
        if budget.kind != "latency":
            return find(budget), None
        measure = stopwatch(traced.model, _timed_on(traced, ranker.config))
        timed = find_latency_plan(find, budget.value, measure)
        return timed.found, timed


def _timed_on(traced: TracedModel, config: Config) -> Any:
    given = config.allocation.latency_inputs
    return traced.example_inputs if given is None else usable_inputs(given, "latency_inputs")


def _strengths(traced: TracedModel) -> dict[str, tuple[int, tuple[float, ...]]]:
    """By layer, how many synapses it has, and quantiles of their strengths."""
    powers = powers_along(traced.connectivity, traced.model, traced.example_inputs)
    return {path: (power.numel(), _quantiles(power)) for path, power, _ in powers}


def _sizes(ready: nn.Module, plan: Plan, costs: Costs, traced: TracedModel) -> dict[str, Any]:
    """MACs and parameters, before and after; `ready` is the cut model."""
    exact = costs.macs_after(plan) if costs.in_layers else count_macs(ready, traced.example_inputs)[0]
    return {
        "macs_before": costs.macs,
        "macs_after": exact,
        "params_before": costs.params,
        "params_after": sum(p.numel() for p in parameters_of(ready).values()),
    }


def _layer_reports(
    traced: TracedModel,
    ready: nn.Module,
    plan: Plan,
    strengths: Mapping[str, tuple[int, tuple[float, ...]]],
    macs: Mapping[str, int],
) -> list[LayerReport]:
    """Each layer in the dense and the cut model; a layer's multiply-accumulates are proportional to its synapses."""
    dense, pruned = traced.modules, modules_of(ready)
    kept = {cut.key: len(cut.kept) for cut in plan.cuts}
    reports = []
    for path, (synapses, strength) in strengths.items():
        layer = traced.connectivity.layers[path]
        inputs, outputs = kept.get((path, "in"), layer.inputs), kept.get((path, "out"), layer.outputs)
        groups = layer.inputs * layer.outputs // synapses
        if layer.kind == "depthwise":
            groups = inputs
        else:  # those of a head go with it
            groups = groups * groups_of(pruned[path]) // groups_of(dense[path])
        left = outputs * inputs // groups
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
                params_after=sum(p.numel() for p in pruned[path].parameters()),
            )
        )
    return reports


def _quantiles(power: torch.Tensor) -> tuple[float, ...]:
    """`QUANTILES` of a layer's strengths, from their squares; the inner ones of many from an even sample."""
    values = power.flatten()
    low, high = (float(end.sqrt()) for end in values.aminmax())
    sample = np.sort(values[:: -(-len(values) // _SAMPLE)].double().sqrt().cpu().numpy())
    inner = np.interp(np.multiply(QUANTILES[1:-1], len(sample) - 1), np.arange(len(sample)), sample)
    return low, *inner.tolist(), high


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
