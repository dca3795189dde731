"""Groups of dimensions within heads, in the place of groups of whole heads: where cutting them is right, as tried.

How much code allows differs: where one number says how wide queries, keys and values are they go together, else apart.
Whether products are divided by the root of their width, as it is then, shows in what comes out.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ss_pruning.errors import SSPruningError, VerificationError
from ss_pruning.graph.groups import Coupling, PruningGroup, Selection
from ss_pruning.graph.traced import TracedModel
from ss_pruning.planning.allocation import plan_for, schedule
from ss_pruning.planning.head_dimensions import Dimensions, HeadDimensions
from ss_pruning.planning.search import Attempt, GroupBisection
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Number, Verified, pattern
from ss_pruning.surgery.verification import Verifier


def with_narrow_heads(traced: TracedModel) -> TracedModel:
    """The same, with dimensions within heads in the place of heads where they can go."""
    layers = _layers_with_heads(traced)
    if not layers:
        return traced
    verifier = Verifier(traced.model, traced.example_inputs, traced.connectivity)
    trials = _Trials(verifier, traced.coupling)
    try:
        for alike in layers:
            trials.try_(alike)
    except SSPruningError:  # nothing can be tried here; whoever plans a cut will say why
        return traced
    finally:
        verifier.close()
    return replace(traced, coupling=trials.narrowed())


Groups = Sequence[PruningGroup]
#: Of alike layers: by number of a group of heads, of what dimensions they consist.
Layers = Mapping[int, Sequence[Dimensions]]


def _layers_with_heads(traced: TracedModel) -> list[Layers]:
    """Those that are not tied to other groups, alike ones together."""
    found = HeadDimensions(traced.connectivity)
    alike: dict[object, dict[int, Sequence[Dimensions]]] = defaultdict(dict)
    for number, group in enumerate(traced.coupling.groups):
        if len(group.subgroups) == 1 and group.subgroups[0].of_heads:
            kinds = found.of(group.subgroups[0])
            alike[pattern(group.name), len(kinds)][number] = kinds
    return [layers for layers in alike.values() if all(layers.values())]


@dataclass
class _Trials:
    """Tries which dimensions can go.

    Attributes:
        verifier: Of the model.
        coupling: With groups of heads.
        instead: By number of such a group, the groups of dimensions that can go instead.
        fixed: Stored numbers that do not follow.
    """

    verifier: Verifier
    coupling: Coupling
    instead: dict[int, list[PruningGroup]] = field(default_factory=dict)
    fixed: set[Number] = field(default_factory=set)

    def narrowed(self) -> Coupling:
        """The coupling with what was found to go."""
        groups = [
            part for n, group in enumerate(self.coupling.groups) for part in self.instead.get(n, [group])
        ]
        return replace(self.coupling, groups=tuple(groups))

    def try_(self, layers: Layers) -> None:
        """Find what can go of alike layers: each kind of dimensions by itself, and together those that cannot."""
        kinds = range(len(next(iter(layers.values()))))
        stuck = [kind for kind in kinds if not self._taken(layers, [kind])]
        if len(stuck) > 1:
            self._taken(layers, stuck)

    def _taken(self, layers: Layers, kinds: Sequence[int]) -> bool:
        """Whether these can go together; if so, they are put down."""
        parts = [[dimensions[kind] for kind in kinds] for dimensions in layers.values()]
        choices = [[_tied(own, by_width) for own in parts] for by_width in (False, True)]
        groups = self._right(choices) if all(group.steps > 1 for group in choices[0]) else None
        for number, group in zip(layers, groups or (), strict=False):
            self.instead.setdefault(number, []).append(group)
        return groups is not None

    def _right(self, choices: Sequence[Groups]) -> Groups | None:
        """The first of several ways in which the model is right when so much has gone; they differ in values alone."""
        known = set(self.fixed)
        if not self._survives(choices[0], self._attempt(choices[0], by_values=False)):
            return None
        for groups in choices:
            with contextlib.suppress(VerificationError):
                self._attempt(groups)([0], self.fixed, False)
                return groups
        if self.fixed == known:
            return None
        self.fixed = known  # numbers were fixed until shapes fitted: others may have to be
        return next((groups for groups in choices if self._survives(groups, self._attempt(groups))), None)

    def _survives(self, groups: Groups, attempt: Attempt) -> bool:
        """Whether that succeeds with some numbers fixed, which only happen to equal a width."""
        together = PruningGroup(tuple(subgroup for group in groups for subgroup in group.subgroups))
        search = GroupBisection([together], attempt, self.fixed)
        search.search([0])
        return not search.failed

    def _attempt(self, groups: Groups, *, by_values: bool = True) -> Attempt:
        """Verifies the model when these have lost half, on shapes or further on values."""
        plan, selection = self._half(groups)

        def attempt(_: Collection[int], fixed: Collection[Number], __: bool) -> Verified:
            seen = self.verifier.verify_shapes(plan, selection, groups, fixed)
            return (
                self.verifier.verify(plan, selection, groups, fixed=fixed, locate=False)
                if by_values
                else seen
            )

        return attempt

    def _half(self, groups: Groups) -> tuple[Plan, Selection]:
        """A plan by which each head loses half, one drawn by lot from what it has."""
        random = np.random.default_rng(0)
        scores = [[random.random(subgroup.size) for subgroup in group.subgroups] for group in groups]
        steps = np.array([group.steps // 2 for group in groups])
        coupling = replace(self.coupling, groups=tuple(groups))
        return plan_for(schedule(groups, scores), steps, coupling, self.verifier.connectivity)


def _tied(kinds: Sequence[Dimensions], by_width: bool) -> PruningGroup:
    subgroups = tuple(subgroup for kind in kinds for subgroup in kind.subgroups)
    mixing = frozenset(key for kind in kinds for key in kind.mixing)
    return PruningGroup(subgroups, by_width=mixing if by_width else frozenset())
