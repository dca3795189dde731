"""Plan search: allocate the budget, verify on a copy, exclude the groups that fail, and allocate anew.

Where heads were tied to their stream and the tie fails, each is tried by itself: the stream may go without them.

What is allocated may depend on what else is cut. The plan that is found is therefore that of a model in which the
groups that failed were ignored from the start.

Which groups fail is found by bisection. All are tried together. When that fails, those that touch the module where it
failed are suspects, and with them their likes elsewhere: the same layers in other blocks. Once a group is found to fail
by itself, another of the same layers and widths is not tried any more, and one of other widths is tried apart from the
rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from ss_pruning._utils.arrays import Ints
from ss_pruning.errors import VerificationError
from ss_pruning.graph.exclusions import Excluded
from ss_pruning.graph.groups import Coupling, PruningGroup, Selection
from ss_pruning.planning.allocation import Schedule, plan_for
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Number, Verified, alike, pattern
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
    """The groups that failed, by their numbers in the reasons, but for ties."""
    return tuple(
        Excluded((group.name,), group.size, f"{FORWARD_REASON}: {failed[number]}")
        for number, group in enumerate(groups)
        if number in failed and not group.tied
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
        return plan_for(self.order, taken, self.coupling, self.verifier.connectivity)

    def attempt(self, part: Collection[int], fixed: Collection[Number], locate: bool) -> Verified:
        """Verify it."""
        plan, selection = self.plan(part)
        return self.verifier.verify(plan, selection, self.coupling.groups, fixed=fixed, locate=locate)


# How often a group is tried with numbers fixed.
_PATIENCE = 20

#: What groups have in common that are alike: the layers they touch; and, to be the same, the sizes of their subgroups.
Touched = tuple[tuple[str, str], ...]
Sizes = tuple[int, ...]


#: Verifies the cut of some groups, with some numbers fixed, or raises `VerificationError`; whether the error has to say
#: where it goes wrong.
TryGroups = Callable[[Collection[int], Collection[Number], bool], Verified]


@dataclass
class GroupBisection:
    """The search.

    Attributes:
        groups: What may be cut, by number.
        attempt: Verifies some of them.
        fixed: Stored numbers known not to follow a cut; what is found is added.
        sound: Groups that were verified together.
        verified: What was verified last.
        failed: By group that fails, the reason.
    """

    groups: Sequence[PruningGroup]
    attempt: TryGroups
    fixed: set[Number]
    sound: set[int] = field(default_factory=set)
    verified: Verified | None = None
    failed: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.same: list[tuple[Touched, Sizes]] = [
            (_kind(group), tuple(c.size for c in group.subgroups)) for group in self.groups
        ]

    def search(self, items: list[int]) -> None:
        """Sort the groups `items` into sound ones and failed ones."""
        stack = [items]
        while stack:
            popped = stack.pop()
            part = self._undecided(popped, stack)
            if popped and not part:
                continue
            try:
                verified = self.attempt({*self.sound, *part}, self.fixed, len(part) > 1)
            except VerificationError as error:
                if not part:  # not even the model itself is the same twice
                    raise
                if len(part) > 1:
                    stack += self._split(part, error.at or "")
                    continue
                again = self._without_numbers(part, error)
                if isinstance(again, str):
                    self.failed[part[0]] = again
                    continue
                verified = again
            self.verified = verified
            self.sound.update(part)

    def _undecided(self, part: list[int], stack: list[list[int]]) -> list[int]:
        """What is worth a trial now. The same as what failed fails as well; alike ones come last, one of each first."""
        known: dict[tuple[Touched, Sizes], int] = {}
        for i in self.failed:
            known.setdefault(self.same[i], i)
        if len(part) == 1 and self.same[part[0]] not in known:
            return part
        kinds, passed = {kind for kind, _ in known}, {self.same[i] for i in self.sound}
        fresh: list[int] = []
        doubtful: dict[tuple[Touched, Sizes], list[int]] = {}
        for i in part:
            same = self.same[i]
            if same in known:
                first = known[same]
                self.failed[i] = f"as it does on that of '{self.groups[first].name}': {self.failed[first]}"
            elif same[0] in kinds and same not in passed:
                doubtful.setdefault(same, []).append(i)
            else:
                fresh.append(i)
        for first, *others in doubtful.values():
            stack[:0] = [others, [first]] if others else [[first]]
        return fresh

    def _split(self, part: list[int], at: str) -> list[list[int]]:
        """Two parts, the one to try first last."""
        touching = self._touching(part, at)
        kinds = {self.same[i][0] for i in touching}
        alike = [i for i in part if self.same[i][0] in kinds]
        for guilty, first in ((alike, False), (touching, True)):
            if 0 < len(guilty) < len(part):
                rest = [i for i in part if i not in set(guilty)]
                return [rest, guilty] if first else [guilty, rest]
        return [part[len(part) // 2 :], part[: len(part) // 2]]

    def _touching(self, part: list[int], path: str) -> list[int]:
        """The groups that touch a layer inside the module `path`, or else inside what encloses it."""
        while path:
            found = [i for i in part if any(_inside(p, path) for p in self.groups[i].paths())]
            if found:
                return found
            path = path.rpartition(".")[0]
        return []

    def _nearness(self, part: list[int], error: VerificationError) -> int:
        """How deep the module where it failed lies in what holds a layer of the groups, too."""
        return max(_shared(path, error.at or "") for i in part for path in self.groups[i].paths())

    def _without_numbers(self, part: list[int], error: VerificationError) -> Verified | str:
        """Verify again with numbers fixed that followed here: perhaps some only happened to equal a width.

        Else the reason is returned: of all trials' errors the first of those nearest to the layers that are cut.

        Few numbers are fixed before many. Each trial may get further and bring up others. What is fixed in one block is
        fixed in its likes.
        """
        before = self.verified.followed if self.verified else frozenset()
        rightly = {alike(number) for number in before}
        left, nearest, reason = _PATIENCE, self._nearness(part, error), str(error)
        queue, seen = deque([(frozenset[Number](), error)]), set[frozenset[Number]]()
        while queue:
            fixed, latest = queue.popleft()
            for numbers in _suspects(latest, before):
                more = fixed | numbers | {alike(number) for number in numbers} - rightly
                if more in seen:
                    continue
                if not left:
                    return reason
                left -= 1
                seen.add(more)
                try:
                    verified = self.attempt({*self.sound, *part}, self.fixed | more, True)
                except VerificationError as again:
                    if (near := self._nearness(part, again)) > nearest:
                        nearest, reason = near, str(again)
                    queue.append((more, again))
                    continue
                self.fixed |= more
                return verified
        return reason


def _suspects(error: VerificationError, before: Collection[Number]) -> list[set[Number]]:
    """Sets of numbers that may not have to follow.

    First those of the module where it failed and of what encloses it, then those of one name after the other.
    """
    new = {Number(*number) for number in error.followed}.difference(before)
    near = {number for number in new if _inside(error.at or "", number.path)}
    by_name = [
        {number for number in near or new if number.name == name}
        for name in sorted({number.name for number in near or new})
    ]
    return [near, *by_name] if near and len(by_name) > 1 else by_name


def _shared(path: str, other: str) -> int:
    """How many names two paths begin with alike."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _kind(group: PruningGroup) -> Touched:
    return tuple(sorted({(pattern(m.path), m.side) for m in group.members}))


def _inside(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")
