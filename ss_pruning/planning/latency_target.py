"""A latency target: the table of layer times says where to cut, the measured time of the cut model says how much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ss_pruning.config import Budget
from ss_pruning.errors import BudgetError
from ss_pruning.planning.search import SearchResult
from ss_pruning.profiling.latency import Timing, measure_latency
from ss_pruning.surgery.plan import Plan

#: How far, of the target, the measured latency may be from it; and where the search is content.
TOLERANCE, _CLOSE = 0.05, 0.02
_TRIALS = 10

Measure = Callable[[Plan], tuple[Timing, Timing]]
#: Finds a verified plan for a budget.
Find = Callable[[Budget], SearchResult]


@dataclass(frozen=True)
class LatencyPlan:
    """A plan that meets a latency target.

    Attributes:
        found: The plan, and what it leaves.
        dense: The dense model's time.
        pruned: The cut model's, measured in turns with the dense one's.
        trials: How many plans were made, cut and measured.
    """

    found: SearchResult
    dense: Timing
    pruned: Timing
    trials: int

    @property
    def ratio(self) -> float:
        """The cut model's time as a share of the dense model's."""
        return self.pruned.over(self.dense)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of that share over the turns."""
        return self.pruned.spread_over(self.dense)


def stopwatch(model: nn.Module, inputs: Any) -> Measure:
    """A function that cuts a copy of `model` to a plan and times it, in turns with `model` itself."""

    def measure(plan: Plan) -> tuple[Timing, Timing]:
        small = plan.cut_copy(model)
        dense, pruned = measure_latency([model, small], inputs, precision=_CLOSE / 2, rounds=(7, 25))
        return dense, pruned

    return measure


def find_latency_plan(find: Find, target: float, measure: Measure) -> LatencyPlan:
    """Find a verified plan whose measured latency is `target`, as a share of the dense model's.

    The budget of the search is in seconds of the table. It is moved by what the measurement says, and halved towards
    the other side where it would leave what is known to be too slow or too fast.
    """
    low, high, goal = 0.0, 1.0, target
    tried: list[LatencyPlan] = []
    for _ in range(_TRIALS):
        result = find(Budget("latency", goal))
        plan = result.verified.plan
        known = next((other for other in tried if other.found.verified.plan == plan), None)
        found = known or LatencyPlan(result, *measure(plan), len(tried) + 1)
        if known is None:
            tried.append(found)
        if abs(found.ratio / target - 1) <= _CLOSE:
            break
        low, high = (low, goal) if found.ratio > target else (goal, high)
        goal *= target / found.ratio
        # Steps are coarse where a plan comes back: what it says of the table was used already.
        goal = goal if known is None and low < goal < high else (low + high) / 2
    return _closest(tried, target)


def _closest(tried: list[LatencyPlan], target: float) -> LatencyPlan:
    """The trial nearest to the target, of those that are not slower."""
    fast = [found for found in tried if found.ratio <= target * (1 + TOLERANCE)]
    if not fast:
        fastest = min(tried, key=lambda found: found.ratio)
        low, high = fastest.spread
        raise BudgetError(
            f"latency={target} is out of reach: the fastest plan took {fastest.ratio:.3f} of the dense model's time "
            f"(in half of the turns {low:.2f} to {high:.2f}), so latency={fastest.ratio + 0.005:.2f} can be had. A "
            "small model spends much of its time between layers, where nothing can be cut: to go lower measure on "
            "more inputs at once, or raise max_ratio"
        )
    best = min(fast, key=lambda found: abs(found.ratio - target))
    return replace(best, trials=len(tried))
