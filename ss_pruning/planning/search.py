"""From scores and a budget to a verified plan: choose, verify on a copy, exclude what fails, choose again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning.errors import NothingToPruneError
from ss_pruning.graph.groups import Coupling, Excluded, PruningGroup, Selection
from ss_pruning.planning.allocation import Budget, Costs, Schedule, allot, select, to_plan
from ss_pruning.planning.group_bisection import GroupBisection
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Number
from ss_pruning.surgery.verification import Verified, Verifier

FORWARD_REASON = "the forward pass relies on its width"


@dataclass
class PlanSearch(ABC):
    """Finds a plan that survives verification.

    Attributes:
        verifier: Where plans are tried.
        coupling: What may be cut.
        reasons: Why groups were excluded, by their number.
        fixed: Stored numbers that were found not to follow a cut: they only happen to equal a width.
        trial: The choice that was made last.
        verified: What was found right last, without the groups that failed.
    """

    verifier: Verifier
    coupling: Coupling
    reasons: dict[int, str] = field(default_factory=dict, init=False)
    fixed: set[Number] = field(default_factory=set, init=False)
    trial: Trial | None = field(default=None, init=False)
    verified: Verified | None = field(default=None, init=False)

    @abstractmethod
    def shrink(
        self, groups: Sequence[PruningGroup], scores: Sequence[Sequence[Floats]]
    ) -> tuple[Schedule, Ints]:
        """Order the moves of the groups, and say how many steps each group takes."""

    def find_verified_plan(self, scores: list[list[Floats]]) -> Verified:
        """Plan and verify; exclude what fails, and plan again until all that is cut is right.

        Raises:
            NothingToPruneError: No channel may go.
            BudgetError: The budget is out of reach.
        """
        while True:
            alive = [u for u in range(len(scores)) if u not in self.reasons]
            groups = [self.coupling.groups[u] for u in alive]
            if not groups:
                raise NothingToPruneError(f"the model has no channel that may go. Excluded: {self._why()}")
            order, steps = self.shrink(groups, [scores[u] for u in alive])
            self.trial = trial = Trial(self, groups, order, steps)
            chosen = np.flatnonzero(steps).tolist()
            # What was verified without the failed groups is often what is chosen without them.
            if self.verified is not None and self.verified.plan.cuts == trial.plan(chosen)[0].cuts:
                return self.verified
            part = GroupBisection(groups, trial.attempt, self.fixed)
            part.search(chosen)
            self.verified = part.verified
            if self.verified is not None and not part.failed:
                return self.verified
            self.reasons.update({alive[i]: reason for i, reason in part.failed.items()})
            self.found_failing()

    def found_failing(self) -> None:
        """Called when groups were found to fail, before what stays is planned anew by the same scores."""
        return

    def _why(self) -> str:
        whole = [*self.coupling.excluded, *self.excluded()]
        return "; ".join(f"{', '.join(left.paths[:3])} ({left.reason})" for left in whole[:5])

    def excluded(self) -> list[Excluded]:
        """The groups that failed verification."""
        groups = [(self.coupling.groups[u], reason) for u, reason in self.reasons.items()]
        return [
            Excluded(
                (group.name,),
                sum(subgroup.size for subgroup in group.subgroups),
                f"{FORWARD_REASON}: {reason}",
            )
            for group, reason in groups
        ]


class FailedGroups(Exception):  # noqa: N818 - a way out of a search, not an error
    """Groups cannot be cut: what the others are worth may depend on them."""


@dataclass
class BudgetSearch(PlanSearch):
    """Finds the plan that meets the budget and survives verification; ends with `FailedGroups` where groups do not.

    Attributes:
        options: What `schedule` takes beside groups and scores.
        cost_exponent: Scores are divided by what a channel costs, to this power, before they are compared.
    """

    costs: Costs
    budget: Budget
    options: dict[str, Any]
    cost_exponent: float = 0.0

    def found_failing(self) -> None:
        """Leave it to the caller to rank the other groups anew."""
        raise FailedGroups

    def shrink(
        self, groups: Sequence[PruningGroup], scores: Sequence[Sequence[Floats]]
    ) -> tuple[Schedule, Ints]:
        """The shortest prefix of moves that meets the budget."""
        return allot(groups, scores, self.costs, self.budget, self.cost_exponent, **self.options)


@dataclass
class Trial:
    """One choice of steps, to be verified in parts."""

    search: PlanSearch
    groups: Sequence[PruningGroup]
    order: Schedule
    steps: Ints

    def plan(self, part: Collection[int]) -> tuple[Plan, Selection]:
        """The cut of some of the groups alone."""
        taken = np.where(np.isin(np.arange(len(self.steps)), list(part)), self.steps, 0)
        selection = select(self.order, self.groups, taken, self.search.coupling)
        return to_plan(selection, self.search.coupling, self.search.verifier.connectivity), selection

    def attempt(self, part: Collection[int], fixed: Collection[Number], *, locate: bool) -> Verified:
        """Verify the cut of some of the groups alone."""
        plan, selection = self.plan(part)
        return self.search.verifier.verify(plan, selection, self.groups, fixed=fixed, locate=locate)
