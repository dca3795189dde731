"""A model between two traces: what was cut from it since the last one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from ss_pruning.errors import VerificationError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Coupling, PruningGroup, Selection, Subgroup
from ss_pruning.planning.allocation import to_plan
from ss_pruning.planning.search import GroupBisection
from ss_pruning.surgery.plan import Plan
from ss_pruning.surgery.size_attributes import Verified
from ss_pruning.surgery.verification import Verifier


@dataclass
class Era:
    """The model as it was traced last, and what has been cut from it since; channel numbers are those of the trace."""

    model: nn.Module
    example_inputs: Any
    connectivity: Connectivity
    coupling: Coupling
    done: Plan = field(default_factory=Plan)
    pruned: list[Subgroup] = field(default_factory=list)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """By path."""
        return dict(self.model.named_modules())

    @cached_property
    def verifier(self) -> Verifier:
        """Where cuts are tried; made before the first one."""
        return Verifier(self.model, self.example_inputs, self.connectivity)

    @cached_property
    def groups(self) -> dict[str, PruningGroup]:
        """By a label that outlives cuts: the path of the first producer, numbered where it has several groups."""
        seen: Counter[str] = Counter()
        labels = {}
        for group in self.coupling.groups:
            seen[group.name] += 1
            labels[f"{group.name}#{seen[group.name]}"] = group
        return labels

    def verify(self, subgroups: Sequence[Subgroup]) -> Verified:
        """Verify the cut of these channel sets on top of all that is gone.

        Raises:
            VerificationError: The cut model would be wrong; nothing was changed.
        """
        selection: Selection = {}
        for subgroup in (*self.pruned, *subgroups):
            for m in subgroup.members:
                kept = selection.get(m.key, range(self.coupling.widths[m.key]))
                selection[m.key] = tuple(np.setdiff1d(kept, m.index).tolist())
        plan = to_plan(selection, self.coupling, self.connectivity)
        part = GroupBisection(
            [PruningGroup(tuple(subgroups))],
            lambda _, fixed, locate: self.verifier.verify(
                plan, selection, self.coupling.groups, fixed=fixed, locate=locate
            ),
            set(),
        )
        part.search([0])
        if part.verified is None:
            raise VerificationError(f"'{subgroups[0].root.path}' is excluded: {part.failed[0]}")
        return part.verified

    def apply(
        self, plan: Plan, subgroups: Iterable[Subgroup], cut: Callable[[Plan], Plan] | None = None
    ) -> Plan:
        """Cut the model to a plan from the trace on, or let `cut` do so; returns what that added to the cuts before."""
        later = _since(self.done, plan)
        if cut is None:
            later.apply_(self.model)
        else:
            later = cut(later)
        self.done = plan
        self.pruned.extend(subgroups)
        return later


def _since(done: Plan, total: Plan) -> Plan:
    """The plan that leads from `done` to `total`."""
    kept = {cut.key: cut.kept for cut in done.cuts}
    cuts = []
    for cut in total.cuts:
        before = kept.get(cut.key, tuple(range(cut.width)))
        place = {channel: i for i, channel in enumerate(before)}
        if cut.kept != before:
            cuts.append(replace(cut, width=len(before), kept=tuple(place[c] for c in cut.kept)))
    numbers = {a.place: a for a in done.attributes}
    attributes = []
    for a in total.attributes:
        now = numbers.pop(a.place, None)
        if now is None or now.after != a.after:
            attributes.append(replace(a, before=a.before if now is None else now.after))
    undone = [replace(a, before=a.after, after=a.before) for a in numbers.values()]
    return Plan(tuple(cuts), (*attributes, *undone))
