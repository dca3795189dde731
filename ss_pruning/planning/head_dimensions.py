"""Dimensions within heads: channels of queries and keys that are multiplied with each other, and of values.

What a probe has found to be a head is taken apart: values feed the projection channel by channel, and of queries and
keys those make a product that come in the same place. That is a guess, and what is cut by it is compared with queries
and keys that are silenced. Every head loses as many dimensions, each those that matter least to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ss_pruning._utils.arrays import Ints
from ss_pruning.graph.connectivity import Connectivity, Edge, Key, Slots, components, ties_of
from ss_pruning.graph.groups import Member, Subgroup


@dataclass(frozen=True)
class Dimensions:
    """Dimensions of one kind: of queries and keys, or of values.

    Attributes:
        subgroups: One a head, of equal size.
        mixing: Sides of queries and keys; empty for values.
    """

    subgroups: tuple[Subgroup, ...]
    mixing: frozenset[Key]


class HeadDimensions:
    """What the heads of a model consist of."""

    def __init__(self, connectivity: Connectivity) -> None:
        self.connectivity, self.slots = connectivity, Slots(connectivity)
        ties = [ties_of(connectivity, self.slots, whole_heads=False)]
        for path in connectivity.edges:
            ties += self._products(self._products_read_by(path))
        self.channel_set = components(self.slots.total, np.concatenate(ties))
        order = self.channel_set.argsort(kind="stable")
        self.labels, starts = np.unique(self.channel_set[order], return_index=True)
        self.own = np.split(order, starts[1:])
        self.mixing = {
            int(number)
            for path in connectivity.edges
            for edge in self._products_read_by(path)
            for number in self._numbers(edge)
        }

    def of(self, heads: Subgroup) -> list[Dimensions]:
        """The kinds of dimensions of which each head has several, and as many as the others."""
        starts = [(self.slots.start[m.key], m.index) for m in heads.members]
        apart = [
            self._by_sides(np.concatenate([start + index[head] for start, index in starts]))
            for head in range(heads.size)
        ]
        behind = next((member for member in heads.members if member.side == "in"), None)
        if behind is None or any(kinds.keys() != apart[0].keys() for kinds in apart):
            return []
        counts = {pattern: {len(kinds[pattern]) for kinds in apart} for pattern in apart[0]}
        found = []
        for pattern in (p for p, sizes in counts.items() if len(sizes) == 1 and sizes != {1}):
            subgroups = [self._subgroup(kinds[pattern]) for kinds in apart]
            root = subgroups[0].root
            if root.side != "out" or self.connectivity.layers[root.path].kind != "synaptic":
                continue
            read = (Member(behind.path, "in", behind.index[head : head + 1]) for head in range(heads.size))
            within = tuple(Subgroup(s.members, head) for s, head in zip(subgroups, read, strict=True))
            found.append(Dimensions(within, self._mixing_sides(within[0])))
        return found

    def of_one(self, path: str) -> list[Dimensions]:
        """Of queries and keys, where the layer at `path` reads a single head."""
        edges = [e for e in self._products_read_by(path) if e.heads is not None and not e.heads.several]
        if not edges:
            return []
        numbers = np.concatenate([self._numbers(edge) for edge in edges])
        head = Member(path, "in", np.arange(self.connectivity.layers[path].inputs)[None])
        found = []
        for channel_sets in self._by_sides(numbers).values():
            subgroup = Subgroup(self._subgroup(channel_sets).members, head)
            mixing = self._mixing_sides(subgroup)
            if len(channel_sets[0]) > 1 < len(channel_sets) and subgroup.root.side == "out" and mixing:
                found.append(Dimensions((subgroup,), mixing))
        return found

    def _products_read_by(self, path: str) -> list[Edge]:
        """Of queries and keys; none where one of them is the model's input, of which nothing can go."""
        edges = [edge for edge in self.connectivity.edges[path] if edge.heads is not None]
        return edges if all(edge.source in self.slots.out_key for edge in edges) else []

    def _numbers(self, edge: Edge) -> Ints:
        assert edge.heads is not None
        numbers: Ints = edge.heads.pairs[:, 0].numpy() + self.slots.start[self.slots.out_key[edge.source]]
        return numbers

    def _products(self, edges: Sequence[Edge]) -> list[Ints]:
        """`[n, 2]` each: slots of queries and keys in the same place of runs of equal length."""
        runs: dict[int, list[Ints]] = defaultdict(list)
        for edge in edges:
            assert edge.heads is not None
            numbers, heads = self._numbers(edge), edge.heads.pairs[:, 1].numpy()
            for head in np.unique(heads).tolist():
                own = np.sort(numbers[heads == head])
                parts = np.split(own, np.flatnonzero(np.diff(own) != 1) + 1)
                runs[head] += [part for part in parts if len(part) > 1]
        return [tie for own in runs.values() for tie in _in_the_same_place(own)]

    def _by_sides(self, numbers: Ints) -> dict[tuple[int, ...], list[Ints]]:
        """By the sides that they touch, the channel sets of a head, each as its slots."""
        kinds: dict[tuple[int, ...], list[Ints]] = defaultdict(list)
        for place in np.searchsorted(self.labels, np.unique(self.channel_set[numbers])):
            own = self.own[place]
            kinds[tuple(self.slots.side_of[own].tolist())].append(own)
        return kinds

    def _subgroup(self, channel_sets: Sequence[Ints]) -> Subgroup:
        firsts = np.array([own[0] for own in channel_sets])
        index = np.stack(channel_sets)[firsts.argsort()]
        sides = self.slots.side_of[index[0]]
        keys = [(self.slots.keys[side], index[:, sides == side]) for side in np.unique(sides)]
        members = [Member(path, side, self.slots.channel_of[numbers]) for (path, side), numbers in keys]
        return Subgroup(tuple(sorted(members, key=lambda member: member.side != "out")))

    def _mixing_sides(self, subgroup: Subgroup) -> frozenset[Key]:
        keys = (m.key for m in subgroup.members if m.side != "in")
        starts = ((m, self.slots.start[m.key]) for m in subgroup.members if m.side != "in")
        return frozenset(
            key
            for key, (m, start) in zip(keys, starts, strict=True)
            if self.mixing.issuperset((m.index.ravel() + start).tolist())
        )


def _in_the_same_place(runs: Sequence[Ints]) -> list[Ints]:
    """Ties between runs of one head; queries and keys that lie next to each other are one run."""
    if not runs:
        return []
    width = len(runs[0]) // 2 if len(runs) == 1 else min(map(len, runs))
    if width < 2 or any(len(run) % width for run in runs):
        return []
    parts = np.concatenate([run.reshape(-1, width) for run in runs])
    return [np.stack([parts[0], part], 1) for part in parts[1:]]
