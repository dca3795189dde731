"""`prune_`: the main job from end to end. Trace, couple, score, plan, verify on a copy, then cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import nn

from ss_pruning.coupling import IGNORED_REASON, Coupling, LeftWhole, couple
from ss_pruning.errors import InputError, VerificationError
from ss_pruning.layers import check_finite
from ss_pruning.planning import (
    Budget,
    Costs,
    Floats,
    Scope,
    choose,
    count_macs,
    schedule,
    select,
    to_plan,
)
from ss_pruning.provenance import Wiring, trace
from ss_pruning.report import QUANTILES, LayerReport, Report
from ss_pruning.strength import synaptic_strength
from ss_pruning.surgery import Plan
from ss_pruning.verification import Number, Verified, verify

#: Called with a stage's name, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

FORWARD_REASON = "the forward pass relies on its width"


def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    ratio: float | None = None,
    importance: Any = None,
    ignore: Iterable[str | nn.Module] = (),
    round_to: int | None = None,
    scope: Scope = "global",
    max_ratio: float = 0.9,
    progress: Progress | None = None,
) -> Report:
    """Prune whole channels of `model` in place, by synaptic strength or any Torch-Pruning importance.

    The cut is planned and checked on a copy first: the smaller model's output must equal the dense model's with the
    removed channels' contributions zeroed (float64, 1e-10). What cannot be cut so is left whole and named in the
    report. On any error the model is as it was. Build optimisers after pruning: the parameters are new.

    Args:
        model: Any CNN.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        macs: Share of the multiply-accumulates to keep; met from below, to within one step.
        params: Share of the parameters to keep; likewise.
        ratio: Share of the prunable channels to remove. Give exactly one of the three.
        importance: A Torch-Pruning importance; `SynapticImportance()` by default.
        ignore: Modules or module paths whose output channels stay.
        round_to: Remaining widths are multiples of this.
        scope: "global" ranks all channels against each other, "local" shrinks every layer by the same share.
        max_ratio: No layer loses a larger share of its channels than this.
        progress: Called with (stage, done, total).

    Returns:
        What was done, see `ss_pruning.report.Report`.

    Raises:
        InputError: An argument is wrong.
        ModelError: The model does not run on the inputs, or holds NaN or Inf weights.
        NothingToPruneError: No channel may go.
        BudgetError: The budget is out of reach; the message names the smallest that is not.
    """
    budget = Budget.of(macs, params, ratio)
    _check_options(scope, max_ratio, round_to)
    check_finite(model)
    clock = _Clock(progress or (lambda *_: None))
    with clock("trace", 0):
        wiring = trace(model, example_inputs)
        coupling = couple(wiring, model, _ignored(model, ignore, wiring))
        costs = Costs(model, example_inputs, wiring, coupling)
    with clock("score", 1):
        scores = _scores(model, importance, coupling, wiring, example_inputs)
        strengths = synaptic_strength(model, example_inputs, wiring=wiring)
    with clock("plan and verify", 2):
        options = {"scope": scope, "max_ratio": max_ratio, "round_to": round_to}
        job = _Job(model, example_inputs, wiring, coupling, costs, budget, options)
        verified = job.settle(scores)
    with clock("cut", 3):
        before = (costs.macs, costs.params)
        verified.plan.apply_(model)
        after = (count_macs(model, example_inputs)[0], sum(p.numel() for p in model.parameters()))
    settings = {
        budget.kind: budget.value,
        "importance": "SynapticImportance" if importance is None else type(importance).__name__,
        **options,
    }
    return Report(
        model=type(model).__name__,
        macs_before=before[0],
        macs_after=after[0],
        params_before=before[1],
        params_after=after[1],
        layers=_layer_reports(model, verified.plan, wiring, strengths),
        left_whole=[*coupling.left_whole, *job.left_whole()],
        max_error=verified.max_error,
        settings=settings,
        seconds=clock.seconds,
        versions={"torch": torch.__version__, **_versions("ss-pruning", "torch-pruning")},
    )


class _Clock:
    """Times the stages and reports them as progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int) -> _Clock:
        self.progress(stage, done, 4)
        self.stage, self.done = stage, done
        return self

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = time.perf_counter() - self.begin
        self.progress(self.stage, self.done + 1, 4)


def _check_options(scope: str, max_ratio: float, round_to: int | None) -> None:
    if scope not in ("global", "local"):
        raise InputError(f"scope={scope!r} is unknown; use 'global' or 'local'")
    if not 0 < max_ratio <= 1:
        raise InputError(f"max_ratio={max_ratio} must lie in (0, 1]")
    if round_to is not None and (not isinstance(round_to, int) or round_to < 1):
        raise InputError(f"round_to={round_to!r} must be a positive whole number, such as 8")


def _ignored(model: nn.Module, ignore: Iterable[str | nn.Module], wiring: Wiring) -> dict[str, str]:
    """Layer paths to keep whole: the named modules and everything inside them."""
    paths = {module: path for path, module in model.named_modules()}
    found: dict[str, str] = {}
    for item in ignore:
        if isinstance(item, nn.Module):
            if item not in paths:
                raise InputError(f"ignore holds a {type(item).__name__} that is not in the model")
            path = paths[item]
        else:
            path = item
        inside = [p for p in wiring.layers if p == path or p.startswith(f"{path}.") or not path]
        if not inside:
            raise InputError(f"ignore={path!r} names no layer that runs; see dict(model.named_modules())")
        found.update(dict.fromkeys(inside, IGNORED_REASON))
    return found


def _scores(
    model: nn.Module, importance: Any, coupling: Coupling, wiring: Wiring, example_inputs: Any
) -> list[list[Floats]]:
    """By unit and cell, one score a family."""
    from ss_pruning.integrations.torch_pruning_adapter import CellGraph, SynapticImportance, cell_scores

    graph = CellGraph(model, example_inputs, wiring)
    cells = [cell for unit in coupling.units for cell in unit.cells]
    scored = iter(cell_scores(importance or SynapticImportance(), cells, graph))
    return [[next(scored).numpy() for _ in unit.cells] for unit in coupling.units]


@dataclass
class _Job:
    """Finds the plan that meets the budget and survives verification.

    Attributes:
        options: What `schedule` takes beside units and scores.
        reasons: Why units were left whole, by their number.
    """

    model: nn.Module
    example_inputs: Any
    wiring: Wiring
    coupling: Coupling
    costs: Costs
    budget: Budget
    options: dict[str, Any]
    reasons: dict[int, str] = field(default_factory=dict)

    def settle(self, scores: list[list[Floats]]) -> Verified:
        """Plan and verify; leave whole what fails, and plan again until all that is cut is right."""
        while True:
            alive = [u for u in range(len(scores)) if u not in self.reasons]
            units = [self.coupling.units[u] for u in alive]
            order = schedule(units, [scores[u] for u in alive], **self.options)
            steps = choose(order, units, self.costs, self.budget)

            def attempt(part: Collection[int], fixed: Collection[Number]) -> Verified:
                taken = np.array([n if i in part else 0 for i, n in enumerate(steps.tolist())])
                selection = select(order, units, taken, self.coupling)
                plan = to_plan(selection, self.coupling, self.wiring)
                arguments = (plan, selection, self.example_inputs, self.wiring, units)
                return verify(self.model, *arguments, fixed=fixed)

            def touching(path: str) -> set[int]:
                return {i for i, unit in enumerate(units) if any(_inside(p, path) for p in unit.paths())}

            verified, failed = largest_sound_part(np.flatnonzero(steps).tolist(), attempt, touching)
            if verified is not None and not failed:
                return verified
            self.reasons.update({alive[i]: reason for i, reason in failed.items()})

    def left_whole(self) -> list[LeftWhole]:
        """The units that failed verification."""
        units = [(self.coupling.units[u], reason) for u, reason in self.reasons.items()]
        return [
            LeftWhole((unit.name,), sum(cell.size for cell in unit.cells), f"{FORWARD_REASON}: {reason}")
            for unit, reason in units
        ]


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def largest_sound_part(
    items: list[int],
    attempt: Callable[[Collection[int], Collection[Number]], Verified],
    touching: Callable[[str], Collection[int]],
) -> tuple[Verified | None, dict[int, str]]:
    """Verify all items together; on failure halve, until those that fail are found.

    Args:
        items: What to cut.
        attempt: Verifies a part of them, with stored numbers that must not follow; raises `VerificationError` if
            the cut is wrong.
        touching: The items that touch layers inside a module; they are the first suspects when it does not run.

    Returns:
        What was verified last without an error, and by failed item the reason.
    """
    sound: set[int] = set()
    failed: dict[int, str] = {}
    fixed: set[Number] = set()
    verified = None
    stack = [items]
    while stack:
        part = stack.pop()
        try:
            verified = attempt({*sound, *part}, fixed)
        except VerificationError as error:
            if len(part) > 1:
                stack += _split(part, touching(error.at) if error.at else ())
                continue
            # Perhaps a number followed that only happened to equal a width.
            suspects = error.followed - (verified.followed() if verified else frozenset())
            try:
                verified = attempt({*sound, *part}, fixed | suspects) if suspects else None
            except VerificationError:
                suspects = frozenset()
            if not suspects:
                failed[part[0]] = str(error)
                continue
            fixed |= suspects
        sound.update(part)
    return verified, failed


def _split(part: list[int], suspects: Collection[int]) -> list[list[int]]:
    """Two parts, the one to try first last: the innocent before the suspects, or else the first half."""
    guilty = [item for item in part if item in suspects]
    if 0 < len(guilty) < len(part):
        return [guilty, [item for item in part if item not in suspects]]
    return [part[len(part) // 2 :], part[: len(part) // 2]]


def _layer_reports(model: nn.Module, plan: Plan, wiring: Wiring, strengths: Any) -> list[LayerReport]:
    modules = dict(model.named_modules())
    kept = {(cut.path, cut.side): len(cut.kept) for cut in plan.cuts}
    reports = []
    for path, strength in strengths.items():
        layer = wiring.layers[path]
        inputs, outputs = kept.get((path, "in"), layer.inputs), kept.get((path, "out"), layer.outputs)
        groups_before = layer.inputs // strength.shape[1]
        groups_after = inputs if layer.kind == "depthwise" else groups_before
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        quantiles = torch.quantile(_sample(strength.flatten().double()), levels)
        reports.append(
            LayerReport(
                path=path,
                kind=type(modules[path]).__name__,
                inputs_before=layer.inputs,
                inputs_after=inputs,
                outputs_before=layer.outputs,
                outputs_after=outputs,
                synapses_before=strength.numel(),
                synapses_after=outputs * inputs // groups_after,
                strength=tuple(quantiles.tolist()),
            )
        )
    return reports


def _sample(values: torch.Tensor, most: int = 2**20) -> torch.Tensor:
    """`torch.quantile` takes at most 2**24 values: of more, an even sample."""
    return values[:: -(-len(values) // most)]


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
