"""Groups of dimensions within heads, in the place of groups of whole heads: where cutting them is right, as tried.

How much code allows differs: where one number says how wide queries, keys and values are they go together, else apart.
Whether products are divided by the root of their width, as it is then, shows in what comes out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace

import numpy as np

from ss_pruning.errors import SSPruningError, VerificationError
from ss_pruning.graph.exclusions import Excluded, broadcast_reason
from ss_pruning.graph.groups import Coupling, PruningGroup, Selection, Subgroup
from ss_pruning.graph.traced import TracedModel
from ss_pruning.planning.allocation import plan_for, schedule
from ss_pruning.planning.head_dimensions import Dimensions, HeadDimensions
from ss_pruning.planning.search import GroupBisection, TryGroups
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Number, Verified, pattern
from ss_pruning.surgery.verification import Verifier


def with_narrow_heads(traced: TracedModel) -> TracedModel:
    """The traced model with dimensions within heads, in place of whole heads, wherever these can be pruned."""
    layers = _layers_with_heads(traced)
    if not layers:
        return traced
    try:
        with closing(Verifier(traced.model, traced.example_inputs, traced.connectivity)) as verifier:
            trials = _Trials(verifier, traced.coupling)
            for alike in layers:
                trials.try_(alike)
        if trials.instead:
            with closing(Verifier(traced.model, traced.example_inputs, traced.connectivity)) as verifier:
                trials.drop_(verifier)
    except SSPruningError:  # nothing can be tried here; whoever plans a cut will say why
        return traced
    return replace(traced, coupling=trials.narrowed())


Groups = Sequence[PruningGroup]
#: Of alike layers, of what dimensions they consist: by number of a group of heads, or where there is a single head, of
#: which queries and keys are told here, by the layer that reads it.
Layers = Mapping[int | str, Sequence[Dimensions]]


def _layers_with_heads(traced: TracedModel) -> list[Layers]:
    """Alike ones together."""
    if not any(edge.heads for edges in traced.connectivity.edges.values() for edge in edges):
        return []
    found = HeadDimensions(traced.connectivity)
    alike: dict[object, dict[int | str, Sequence[Dimensions]]] = defaultdict(dict)
    for number, group in enumerate(traced.coupling.groups):
        if len(group.subgroups) == 1 and group.subgroups[0].of_heads:
            kinds = found.of(group.subgroups[0])
            alike[pattern(group.name), len(kinds)][number] = kinds
    for path, products in _single_heads(traced, found):
        alike[pattern(path), len(products)][path] = products
    return [layers for layers in alike.values() if all(layers.values())]


def _single_heads(traced: TracedModel, found: HeadDimensions) -> Iterator[tuple[str, list[Dimensions]]]:
    """Layers that read one, and its queries and keys that stay for no other reason than that they mix."""
    reason = broadcast_reason(traced.modules)
    stays = {path for left in traced.coupling.excluded if left.reason != reason for path in left.paths}
    for path in traced.connectivity.layers:
        products = found.of_one(path)
        made = {member.path for d in products for s in d.subgroups for member in s.members}
        if products and stays.isdisjoint(made):
            yield path, products


@dataclass
class _Trials:
    """Tries which dimensions can go.

    Attributes:
        instead: By what `Layers` go, the groups of dimensions that can go, instead of one if that is its number.
        fixed: Stored numbers that do not follow.
    """

    verifier: Verifier
    coupling: Coupling
    instead: dict[int | str, list[PruningGroup]] = field(default_factory=dict)
    fixed: set[Number] = field(default_factory=set)

    def narrowed(self) -> Coupling:
        """The coupling with what was found to go."""
        groups = [
            part for n, group in enumerate(self.coupling.groups) for part in self.instead.get(n, [group])
        ]
        groups += [group for key, found in self.instead.items() if isinstance(key, str) for group in found]
        freed = [s for group in groups for s in group.subgroups if s.unread]
        excluded = (_without(left, freed) for left in self.coupling.excluded)
        return replace(self.coupling, groups=tuple(groups), excluded=tuple(e for e in excluded if e.paths))

    def drop_(self, verifier: Verifier) -> None:
        """Whole heads again where dimensions are not right when all else has lost half, too, as a search would see it.

        `verifier` knows nothing yet of the model's numbers.
        """
        groups = self.narrowed().groups

        def attempt(part: Collection[int], fixed: Collection[Number], locate: bool) -> Verified:
            chosen = [groups[number] for number in part]
            return verifier.verify(*self._half(chosen), chosen, fixed=fixed, locate=locate)

        search = GroupBisection(groups, attempt, set())
        search.search([number for number, group in enumerate(groups) if group.steps > 1])
        failed = {id(groups[number]) for number in search.failed}
        self.instead = {
            key: found for key, found in self.instead.items() if failed.isdisjoint(map(id, found))
        }

    def try_(self, layers: Layers) -> None:
        """Find what can go of alike layers: each kind of dimensions by itself, and together those that cannot."""
        kinds = range(len(next(iter(layers.values()))))
        stuck = [kind for kind in kinds if not self._taken(layers, [kind])]
        if stuck and (joined := self._with_values(layers, stuck)):
            self._taken(joined, range(len(stuck) + 1))
        elif len(stuck) > 1:
            self._taken(layers, stuck)

    def _with_values(self, layers: Layers, kinds: Sequence[int]) -> Layers:
        """Of single heads, with their values, which have groups of their own; empty for others."""
        found: dict[int | str, Sequence[Dimensions]] = {}
        for path, dimensions in layers.items():
            for number, group in enumerate(self.coupling.groups):
                readers = {m.path for m in group.members if m.side == "in"}
                if readers == {path}:
                    values = Dimensions(group.subgroups, frozenset())
                    found[number] = [*(dimensions[kind] for kind in kinds), values]
        return found if len(found) == len(layers) else {}

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
            with suppress(VerificationError):
                self._attempt(groups)([0], self.fixed, False)
                return groups
        if self.fixed == known:
            return None
        self.fixed = known  # numbers were fixed until shapes fitted: others may have to be
        return next((groups for groups in choices if self._survives(groups, self._attempt(groups))), None)

    def _survives(self, groups: Groups, attempt: TryGroups) -> bool:
        """Whether that succeeds with some numbers fixed, which only happen to equal a width."""
        together = PruningGroup(tuple(subgroup for group in groups for subgroup in group.subgroups))
        search = GroupBisection([together], attempt, self.fixed)
        search.search([0])
        return not search.failed

    def _attempt(self, groups: Groups, *, by_values: bool = True) -> TryGroups:
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


def _without(left: Excluded, freed: Sequence[Subgroup]) -> Excluded:
    """What is excluded, but for queries and keys that may go by now."""
    made = Counter(m.path for s in freed for m in s.members if m.side == "out" for _ in m.index.flat)
    gone = [path for path in left.paths if path in made]
    paths = tuple(path for path in left.paths if path not in made)
    return Excluded(paths, left.channels - sum(made[path] for path in gone), left.reason)


def _tied(kinds: Sequence[Dimensions], by_width: bool) -> PruningGroup:
    subgroups = tuple(subgroup for kind in kinds for subgroup in kind.subgroups)
    mixing = frozenset(key for kind in kinds for key in kind.mixing)
    return PruningGroup(subgroups, by_width=mixing if by_width else frozenset())
