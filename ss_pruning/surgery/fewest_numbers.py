"""As few stored numbers follow a cut as the cut model is right with: others only happen to equal a width."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from ss_pruning.errors import VerificationError
from ss_pruning.surgery.equivalence.precision import DOUBLE
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Number, alike


@dataclass(frozen=True)
class Verified:
    """A plan that was applied to a copy and found right.

    Attributes:
        plan: The plan, with the stored numbers that have to follow.
        max_error: Largest difference between cut and masked outputs, relative to the largest output.
        followed: The numbers as what they follow.
        by_decisions: Nothing that the model returned could be compared, but what its decisions looked at was: so is
            `max_error`.
        precision: In which the two were compared.
    """

    plan: Plan
    max_error: float
    followed: frozenset[Number] = frozenset()
    by_decisions: bool = False
    precision: str = DOUBLE


#: Verifies a plan with some numbers as they were.
TryNumbers = Callable[[Collection[Number]], Verified]


@dataclass
class FewestNumbers:
    """What plans for one model have told of its stored numbers; those of alike blocks are one.

    Attributes:
        idle: Numbers that need not follow.
        needed: Numbers that must.
    """

    idle: frozenset[Number]
    needed: set[Number] = field(default_factory=set)

    def verified(self, attempt: TryNumbers, fixed: frozenset[Number], last: bool) -> Verified:
        """Verify, and let no number follow without which the cut model is as right: it only happens to equal a width.

        Alike blocks are one; what was found for them holds for later plans, too. A plan that fails is tried once more
        without the numbers that nobody knows to be needed, and with `last` with all numbers following.

        Args:
            attempt: Verifies the plan with some numbers as they were.
            fixed: Those that must not follow in any case.
            last: Whether nobody will try parts of the plan.

        Raises:
            VerificationError: The plan is wrong.
        """
        try:
            verified = attempt(fixed | self.idle)
        except VerificationError as error:
            doubtful = {alike(Number(*number)) for number in error.followed} - self.needed
            if (without := self._without(attempt, fixed, doubtful) if doubtful else None) is not None:
                return without
            if not last:
                raise
            verified = attempt(fixed)
            self.idle -= {alike(number) for number in verified.followed}
        unsure = {alike(number) for number in verified.followed} - self.needed
        alone = [{number} for number in sorted(unsure, key=str)] if len(unsure) > 1 else []
        for numbers in (unsure, *alone):
            if numbers - self.idle:
                verified = self._without(attempt, fixed, numbers) or verified
        self.needed |= unsure - self.idle
        return verified

    def _without(
        self,
        attempt: TryNumbers,
        fixed: frozenset[Number],
        numbers: Collection[Number],
    ) -> Verified | None:
        """Verify with some numbers as they were; None if that is wrong."""
        try:
            verified = attempt(fixed | self.idle | frozenset(numbers))
        except VerificationError:
            return None
        self.idle |= frozenset(numbers)
        return verified
