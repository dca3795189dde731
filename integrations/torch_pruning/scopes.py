"""How Torch-Pruning spreads a ratio: channels are ranked within scopes, each of which loses its share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning.graph.groups import Coupling, PruningGroup, Subgroup
from ss_pruning.importance.scoring import group_scores
from ss_pruning.integrations.torch_pruning.dependency_graph import rows_of
from ss_pruning.integrations.torch_pruning.session import Era
from ss_pruning.planning.allocation import Schedule, schedule
from ss_pruning.planning.ranking import check_any
from ss_pruning.planning.search import SearchResult

if TYPE_CHECKING:
    from ss_pruning.integrations.torch_pruning.pruner import GraphPruner


@dataclass
class Scopes:
    """Shrinks every scope, as the pruner has them, to its ratio; `taken` tells how many channels go, by scope."""

    pruner: GraphPruner
    era: Era
    taken: Counter[Hashable] = field(default_factory=Counter, init=False)

    @cached_property
    def scores(self) -> dict[int, list[Floats]]:
        """By identity of a group, one score a channel set of each subgroup."""
        groups = self.era.coupling.groups
        with torch.no_grad():
            return dict(
                zip(
                    map(id, groups), group_scores(self.pruner.importance, groups, self.pruner.DG), strict=True
                )
            )

    def allocate(self, coupling: Coupling) -> tuple[Schedule, Ints]:
        """The largest number of moves in each scope that removes no more than its ratio."""
        check_any(coupling)
        groups, scores = coupling.groups, self.scores
        labels = {id(group): label for label, group in self.era.groups.items()}
        scopes: dict[tuple[Hashable, float], list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            scopes[self.pruner.scope_of(labels[id(group)], group, self.era.modules)].append(i)
        steps = np.zeros(len(groups), dtype=np.int64)
        ranked: list[list[Ints]] = [[] for _ in groups]
        self.taken = Counter()
        for (scope, ratio), members in scopes.items():
            inside = [groups[i] for i in members]
            order = schedule(
                inside,
                [scores[id(groups[i])] for i in members],
                scope="global" if len(inside) > 1 else "local",
                max_ratio=[self.pruner.allowed(group, self.era) for group in inside],
                round_to=self.pruner.round_to,
            )
            moves = self._affordable(order, inside, scope, ratio)
            steps[members] = order.taken(moves)
            self.taken[scope] = int(order.channel_sets[:moves].sum())
            for i, ranks in zip(members, order.ranked, strict=True):
                ranked[i] = ranks
        none = np.zeros(0, dtype=np.int64)
        return Schedule(none, none, none, ranked), steps

    def _affordable(
        self, order: Schedule, groups: Sequence[PruningGroup], scope: Hashable, ratio: float
    ) -> int:
        """How many moves of a scope its ratio pays for; rounded as Torch-Pruning does, a part of a channel goes."""
        now = sum(group.size for group in groups)
        stay = int((now + self.pruner.removed[scope]) * (1 - ratio) + 1e-9)
        return int(np.searchsorted(order.channel_sets.cumsum(), now - stay, side="right"))


def parts_of(result: SearchResult) -> list[list[Subgroup]]:
    """Group by group, the channel sets that go."""
    parts = []
    for group, ranks, steps in zip(result.coupling.groups, result.order.ranked, result.steps, strict=True):
        if steps:
            pairs = zip(group.subgroups, ranks, strict=True)
            parts.append([rows_of(c, np.sort(rank[: steps * (c.size // group.steps)])) for c, rank in pairs])
    return parts
