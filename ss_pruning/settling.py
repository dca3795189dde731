"""From scores and a budget to a verified plan: choose, verify on a copy, leave whole what fails, choose again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ss_pruning.coupling import Coupling, LeftWhole, Unit
from ss_pruning.errors import NothingToPruneError, VerificationError
from ss_pruning.following import Number
from ss_pruning.planning import Budget, Costs, Floats, Ints, Schedule, choose, schedule, select, to_plan
from ss_pruning.verification import Bench, Verified

FORWARD_REASON = "the forward pass relies on its width"


@dataclass
class Settler(ABC):
    """Finds a plan that survives verification.

    Attributes:
        bench: Where plans are tried.
        coupling: What may be cut.
        reasons: Why units were left whole, by their number.
        fixed: Stored numbers that were found not to follow a cut: they only happen to equal a width.
        trial: The choice that was made last.
    """

    bench: Bench
    coupling: Coupling
    reasons: dict[int, str] = field(default_factory=dict, init=False)
    fixed: set[Number] = field(default_factory=set, init=False)
    trial: Trial | None = field(default=None, init=False)

    @abstractmethod
    def shrink(self, units: Sequence[Unit], scores: Sequence[Sequence[Floats]]) -> tuple[Schedule, Ints]:
        """Order the moves of the units, and say how many steps each unit takes."""

    def settle(self, scores: list[list[Floats]]) -> Verified:
        """Plan and verify; leave whole what fails, and plan again until all that is cut is right.

        Raises:
            NothingToPruneError: No channel may go.
            BudgetError: The budget is out of reach.
        """
        while True:
            alive = [u for u in range(len(scores)) if u not in self.reasons]
            units = [self.coupling.units[u] for u in alive]
            if not units:
                raise NothingToPruneError(f"the model has no channel that may go. Left whole: {self._why()}")
            order, steps = self.shrink(units, [scores[u] for u in alive])
            self.trial = trial = Trial(self, units, order, steps)
            verified, failed = largest_sound_part(
                np.flatnonzero(trial.steps).tolist(), trial.attempt, trial.touching, self.fixed
            )
            if verified is not None and not failed:
                return verified
            self.reasons.update({alive[i]: reason for i, reason in failed.items()})

    def _why(self) -> str:
        whole = [*self.coupling.left_whole, *self.left_whole()]
        return "; ".join(f"{', '.join(left.paths[:3])} ({left.reason})" for left in whole[:5])

    def left_whole(self) -> list[LeftWhole]:
        """The units that failed verification."""
        units = [(self.coupling.units[u], reason) for u, reason in self.reasons.items()]
        return [
            LeftWhole((unit.name,), sum(cell.size for cell in unit.cells), f"{FORWARD_REASON}: {reason}")
            for unit, reason in units
        ]


@dataclass
class Search(Settler):
    """Finds the plan that meets the budget and survives verification.

    Attributes:
        options: What `schedule` takes beside units and scores.
    """

    costs: Costs
    budget: Budget
    options: dict[str, Any]

    def shrink(self, units: Sequence[Unit], scores: Sequence[Sequence[Floats]]) -> tuple[Schedule, Ints]:
        """The shortest prefix of moves that meets the budget."""
        order = schedule(units, scores, **self.options)
        return order, choose(order, units, self.costs, self.budget)


@dataclass
class Trial:
    """One choice of steps, to be verified in parts."""

    settler: Settler
    units: Sequence[Unit]
    order: Schedule
    steps: Ints

    def attempt(self, part: Collection[int], fixed: Collection[Number]) -> Verified:
        """Verify the cut of some of the units alone."""
        taken = np.where(np.isin(np.arange(len(self.steps)), list(part)), self.steps, 0)
        bench, coupling = self.settler.bench, self.settler.coupling
        selection = select(self.order, self.units, taken, coupling)
        plan = to_plan(selection, coupling, bench.wiring)
        return bench.verify(plan, selection, self.units, fixed=fixed)

    def touching(self, path: str) -> set[int]:
        """The units that touch a layer inside the module `path`, or else inside what encloses it."""
        while path:
            found = {i for i, unit in enumerate(self.units) if any(_inside(p, path) for p in unit.paths())}
            if found:
                return found
            path = path.rpartition(".")[0]
        return set()


def _inside(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def largest_sound_part(
    items: list[int],
    attempt: Callable[[Collection[int], Collection[Number]], Verified],
    touching: Callable[[str], Collection[int]],
    fixed: set[Number],
) -> tuple[Verified | None, dict[int, str]]:
    """Verify all items together; on failure halve, until those that fail are found.

    Args:
        items: What to cut.
        attempt: Verifies a part of them, with stored numbers that must not follow; raises `VerificationError` if
            the cut is wrong.
        touching: The items that touch layers inside a module; they are the first suspects when it does not run.
        fixed: Stored numbers known not to follow; what is found is added.

    Returns:
        What was verified last without an error, and by failed item the reason.
    """
    sound: set[int] = set()
    failed: dict[int, str] = {}
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
            again = _without(suspects, attempt, {*sound, *part}, fixed)
            if again is None:
                failed[part[0]] = str(error)
                continue
            verified = again
            fixed |= suspects
        sound.update(part)
    return verified, failed


def _without(
    suspects: Collection[Number],
    attempt: Callable[[Collection[int], Collection[Number]], Verified],
    items: Collection[int],
    fixed: Collection[Number],
) -> Verified | None:
    """Verify again with suspect numbers left as they are; None if there are none, or it fails still."""
    if not suspects:
        return None
    try:
        return attempt(items, {*fixed, *suspects})
    except VerificationError:
        return None


def _split(part: list[int], suspects: Collection[int]) -> list[list[int]]:
    """Two parts, the one to try first last: the innocent before the suspects, or else the first half."""
    guilty = [item for item in part if item in suspects]
    if 0 < len(guilty) < len(part):
        return [guilty, [item for item in part if item not in suspects]]
    return [part[len(part) // 2 :], part[: len(part) // 2]]
