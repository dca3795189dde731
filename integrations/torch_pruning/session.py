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
from ss_pruning.graph.groups import Cell, Coupling, Selection, Unit
from ss_pruning.planning.allocation import to_plan
from ss_pruning.planning.group_bisection import GroupBisection
from ss_pruning.surgery.plan import Attribute, Plan
from ss_pruning.surgery.verification import Verified, Verifier


@dataclass
class Era:
    """The model as it was traced last, and what has been cut from it since; channel numbers are those of the trace."""

    model: nn.Module
    example_inputs: Any
    connectivity: Connectivity
    coupling: Coupling
    done: Plan = field(default_factory=Plan)
    gone: list[Cell] = field(default_factory=list)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """By path."""
        return dict(self.model.named_modules())

    @cached_property
    def verifier(self) -> Verifier:
        """Where cuts are tried; made before the first one."""
        return Verifier(self.model, self.example_inputs, self.connectivity)

    @cached_property
    def units(self) -> dict[str, Unit]:
        """By a label that outlives cuts: the path of the first producer, numbered where it has several units."""
        seen: Counter[str] = Counter()
        labels = {}
        for unit in self.coupling.units:
            seen[unit.name] += 1
            labels[f"{unit.name}#{seen[unit.name]}"] = unit
        return labels

    def verify(self, cells: Sequence[Cell]) -> Verified:
        """Verify the cut of these families on top of all that is gone.

        Raises:
            VerificationError: The cut model would be wrong; nothing was changed.
        """
        selection: Selection = {}
        for cell in (*self.gone, *cells):
            for m in cell.members:
                kept = selection.get((m.path, m.side), range(self.coupling.widths[m.path, m.side]))
                selection[m.path, m.side] = tuple(np.setdiff1d(kept, m.index).tolist())
        plan = to_plan(selection, self.coupling, self.connectivity)
        part = GroupBisection(
            [Unit(tuple(cells))],
            lambda _, fixed, locate: self.verifier.verify(
                plan, selection, self.coupling.units, fixed=fixed, locate=locate
            ),
            set(),
        )
        part.search([0])
        if part.verified is None:
            raise VerificationError(f"'{cells[0].root.path}' is excluded: {part.failed[0]}")
        return part.verified

    def apply(self, plan: Plan, cells: Iterable[Cell], cut: Callable[[Plan], Plan] | None = None) -> Plan:
        """Cut the model to `plan`, a plan from the trace on; returns what that added to the cuts before.

        Args:
            plan: What is gone in all, afterwards.
            cells: The families that go.
            cut: Cuts the model to a plan and returns what it did, if more than cutting is to be done.
        """
        later = _since(self.done, plan)
        if cut is None:
            later.apply_(self.model)
        else:
            later = cut(later)
        self.done = plan
        self.gone.extend(cells)
        return later


def _since(done: Plan, total: Plan) -> Plan:
    """The plan that leads from `done` to `total`."""
    kept = {(cut.path, cut.side): cut.kept for cut in done.cuts}
    cuts = []
    for cut in total.cuts:
        before = kept.get((cut.path, cut.side), tuple(range(cut.width)))
        place = {channel: i for i, channel in enumerate(before)}
        if cut.kept != before:
            cuts.append(replace(cut, width=len(before), kept=tuple(place[c] for c in cut.kept)))
    numbers = {(a.path, a.name, a.position): a for a in done.attributes}
    attributes = []
    for a in total.attributes:
        now = numbers.pop((a.path, a.name, a.position), None)
        if now is None or now.after != a.after:
            attributes.append(replace(a, before=a.before if now is None else now.after))
    undone = [Attribute(a.path, a.name, a.position, a.after, a.before) for a in numbers.values()]
    return Plan(tuple(cuts), (*attributes, *undone))
