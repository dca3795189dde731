"""Plan search: allocate the budget, verify on a copy, exclude the groups that fail, and allocate anew.

What is allocated may depend on what else is cut. The plan that is found is therefore that of a model in which the
groups that failed were ignored from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from ss_pruning._utils.arrays import Ints
from ss_pruning.graph.groups import Coupling, Excluded, PruningGroup, Selection
from ss_pruning.planning.allocation import Schedule, select, to_plan
from ss_pruning.planning.group_bisection import GroupBisection
from ss_pruning.surgery.fewest_numbers import Verified
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Number
from ss_pruning.surgery.verification import Verifier

FORWARD_REASON = "the forward pass relies on its width"

#: Orders the moves of all groups that may be cut, and says how many steps each group takes, `[groups]`.
Allocate = Callable[[Coupling], tuple[Schedule, Ints]]


@dataclass(frozen=True)
class SearchResult:
    """A plan that survives verification.

    Attributes:
        verified: The plan.
        coupling: What may be cut: the groups that failed are excluded.
        order: The moves that were to choose from.
        steps: `[groups]`, how many steps each group takes.
        failed: The groups that failed, and why.
        fixed: Stored numbers that were found not to follow a cut: they only happen to equal a width.
    """

    verified: Verified
    coupling: Coupling
    order: Schedule
    steps: Ints
    failed: tuple[Excluded, ...]
    fixed: frozenset[Number]


def find_verified_plan(
    verifier: Verifier, coupling: Coupling, allocate: Allocate, known: SearchResult | None = None
) -> SearchResult:
    """Allocate and verify; exclude what fails, and again, until all that is cut is right.

    What failed in an earlier search of the same model, if that is `known`, is not tried again.
    """
    failed: tuple[Excluded, ...] = ()
    fixed: set[Number] = set()
    verified: Verified | None = None
    if known is not None:
        coupling, failed, fixed, verified = known.coupling, known.failed, {*known.fixed}, known.verified
    while True:
        order, steps = allocate(coupling)
        trial = _Trial(verifier, coupling, order, steps)
        chosen = np.flatnonzero(steps).tolist()
        if not chosen:
            verified = Verified(Plan(), 0.0)
        # What was verified without the failed groups is often what is chosen without them.
        elif verified is None or verified.plan.cuts != trial.plan(chosen)[0].cuts:
            part = GroupBisection(coupling.groups, trial.attempt, fixed)
            part.search(chosen)
            verified = part.verified
            if part.failed or verified is None:
                found = _excluded(coupling.groups, part.failed)
                coupling, failed = coupling.without(part.failed, found), (*failed, *found)
                continue
        return SearchResult(verified, coupling, order, steps, failed, frozenset(fixed))


def _excluded(groups: Collection[PruningGroup], failed: dict[int, str]) -> tuple[Excluded, ...]:
    """The groups that failed, by their numbers in the reasons."""
    return tuple(
        Excluded(
            (group.name,),
            sum(subgroup.size for subgroup in group.subgroups),
            f"{FORWARD_REASON}: {failed[number]}",
        )
        for number, group in enumerate(groups)
        if number in failed
    )


@dataclass(frozen=True)
class _Trial:
    """One allocation, to be verified in parts."""

    verifier: Verifier
    coupling: Coupling
    order: Schedule
    steps: Ints

    def plan(self, part: Collection[int]) -> tuple[Plan, Selection]:
        """The cut of some of the groups alone."""
        taken = np.where(np.isin(np.arange(len(self.steps)), list(part)), self.steps, 0)
        selection = select(self.order, self.coupling.groups, taken, self.coupling)
        return to_plan(selection, self.coupling, self.verifier.connectivity), selection

    def attempt(self, part: Collection[int], fixed: Collection[Number], *, locate: bool) -> Verified:
        """Verify the cut of some of the groups alone."""
        plan, selection = self.plan(part)
        return self.verifier.verify(plan, selection, self.coupling.groups, fixed=fixed, locate=locate)
