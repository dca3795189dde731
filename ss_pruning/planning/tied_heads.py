"""Heads of attention that can go only with as large a share of the stream that they read.

Much attention ends in `reshape(B, N, C)`, where `C` is how wide its input is, or takes `C // num_heads` for the width
of a head: there heads and stream have to stay in proportion. No table says where: it is tried, on shapes alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from ss_pruning.errors import SSPruningError
from ss_pruning.graph.connectivity import components
from ss_pruning.graph.groups import Coupling, PruningGroup
from ss_pruning.graph.traced import TracedModel
from ss_pruning.planning.allocation import plan_for, schedule
from ss_pruning.planning.search import GroupBisection
from ss_pruning.surgery.size_attributes import Number, pattern
from ss_pruning.surgery.verification import Verifier

#: By number of a group of heads, those of the groups of the stream that they read.
Pairs = dict[int, set[int]]


def with_tied_heads(traced: TracedModel) -> TracedModel:
    """The traced model with heads and the stream they read in one group, where heads alone cannot go but both can."""
    pairs = _pairs(traced.coupling)
    if not pairs:
        return traced
    try:
        with closing(Verifier(traced.model, traced.example_inputs, traced.connectivity)) as verifier:
            return replace(traced, coupling=_Trials(verifier, traced.coupling).tied(pairs))
    except SSPruningError:  # nothing can be tried here; whoever plans a cut will say why
        return traced


def _pairs(coupling: Coupling) -> Pairs:
    """By number of a group of heads, the groups of the stream that is as wide as all of its heads."""
    reading: dict[str, set[int]] = defaultdict(set)
    for number, group in enumerate(coupling.groups):
        for member in group.members:
            if member.side == "in":
                reading[member.path].add(number)
    found: Pairs = {}
    for number, group in enumerate(coupling.groups):
        members = [m for subgroup in group.subgroups if subgroup.of_heads for m in subgroup.members]
        widths = {coupling.widths[m.path, "in"] for m in members if m.side == "in"}
        wide = [m.path for m in members if m.side == "out" and m.index.shape[1] > 1]
        roots = {path for path in wide if coupling.widths[path, "in"] in widths}
        streams = {other for path in roots for other in reading[path]} - {number}
        if streams:
            found[number] = streams
    return found


@dataclass(frozen=True)
class _Trials:
    """Tries on shapes whether groups can lose a step."""

    verifier: Verifier
    coupling: Coupling
    fixed: set[Number] = field(default_factory=set)

    def tied(self, pairs: Pairs) -> Coupling:
        """The coupling in which heads that cannot go alone are tied to their stream, as far as both can go then."""
        if self._run(self.coupling, pairs):
            return self.coupling
        alike: dict[str, Pairs] = defaultdict(dict)
        for number, streams in pairs.items():
            alike[pattern(self.coupling.groups[number].name)][number] = streams
        stuck = [part for part in alike.values() if not self._run(self.coupling, part)]
        together = self._with(stuck)
        if together is not None:
            return together
        sound: list[Pairs] = []
        for part in stuck:
            sound += [part] if self._with([*sound, part]) is not None else []
        return self._with(sound) or self.coupling

    def _with(self, parts: Sequence[Pairs]) -> Coupling | None:
        """The coupling with ties; None if what is tied cannot go."""
        groups = self.coupling.groups
        ties = [(a, b) for part in parts for a, streams in part.items() for b in streams]
        label = components(len(groups), np.array(ties, dtype=np.int64).reshape(-1, 2))
        parts_of = ([groups[i] for i in np.flatnonzero(label == n)] for n in np.unique(label))
        merged = [group for together in parts_of for group in _tied(together)]
        coupling = replace(self.coupling, groups=tuple(merged))
        known = set(map(id, groups))
        changed = [number for number, group in enumerate(merged) if id(group) not in known]
        return coupling if not changed or self._run(coupling, changed) else None

    def _run(self, coupling: Coupling, numbers: Collection[int]) -> bool:
        """Whether the model runs when groups, by number, have lost a step; those of one step lose none."""
        groups = coupling.groups
        flat = [[np.zeros(subgroup.size) for subgroup in group.subgroups] for group in groups]
        steps = np.array([number in numbers and group.steps > 1 for number, group in enumerate(groups)])
        order = schedule(groups, flat)
        plan, selection = plan_for(order, steps.astype(np.int64), coupling, self.verifier.connectivity)
        together = GroupBisection(
            [_merged([groups[number] for number in numbers])],
            lambda _, fixed, __: self.verifier.verify_shapes(plan, selection, groups, fixed),
            self.fixed,
        )
        together.search([0])  # a number that happens to equal a width is told from one that follows
        return not together.failed


def _tied(groups: list[PruningGroup]) -> list[PruningGroup]:
    """In one group, unless that would have no step to lose: heads of several numbers need not have one in common."""
    whole = _merged(groups)
    return [whole] if whole.steps > whole.least else groups


def _merged(groups: Sequence[PruningGroup]) -> PruningGroup:
    if len(groups) == 1:
        return groups[0]
    subgroups = tuple(subgroup for group in groups for subgroup in group.subgroups)
    return PruningGroup(subgroups, max(group.least for group in groups), tied=tuple(groups))
