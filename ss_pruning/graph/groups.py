"""Which channels must be cut together: families, the cells that share a pattern, and the units that keep proportions.

From the connectivity (who feeds whom) three notions follow:

* A **family** is a set of (layer, side, channel) slots that meet somewhere: a producer's output channel, the norms and
  depthwise layers it passes through, the elements of loose tensors along it, every consumer's input channel. A family
  is cut as a whole or not at all.
* A **cell** is a run of families with the same pattern: the same layers on the same sides, neighbours in the producer
  that comes first, and the same block of every grouped layer they touch.
* A **unit** is a set of cells of which the same share must go: the groups of a grouped convolution or a GroupNorm, the
  parts into which a producer's output is split. One *step* of a unit removes `size / gcd(sizes)` families of each cell.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning._utils.modules import modules_of
from ss_pruning.graph.channel_index import Key, Side, Slots, components
from ss_pruning.graph.connectivity import INPUT, Connectivity
from ss_pruning.graph.exclusions import (
    IGNORED_REASON,
    UNEVEN_REASON,
    Excluded,
    excluded_by_reason,
    family_reasons,
    frozen_slots,
    left_uncalled,
)
from ss_pruning.graph.layers import blocks_of

__all__ = [
    "IGNORED_REASON",
    "Cell",
    "Coupling",
    "Excluded",
    "Key",
    "Member",
    "Side",
    "Unit",
    "couple",
]


@dataclass(frozen=True)
class Member:
    """The slots of one layer side (or loose tensor) in a cell: `index[i]` are the channels of its family `i`."""

    path: str
    side: Side
    index: Ints


@dataclass(frozen=True)
class Cell:
    """Families with the same pattern, in the order of the first producer's channels."""

    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Number of families."""
        return len(self.members[0].index)

    @property
    def root(self) -> Member:
        """The first producer: a layer whose output channels are the families."""
        return self.members[0]


@dataclass(frozen=True)
class Unit:
    """Cells that must lose the same share; most units are one cell.

    Attributes:
        cells: The cells.
        least: Steps that always stay.
    """

    cells: tuple[Cell, ...]
    least: int = 1

    @property
    def steps(self) -> int:
        """How many equal steps the unit could shrink in, if it were allowed to vanish."""
        return math.gcd(*(cell.size for cell in self.cells))

    @property
    def name(self) -> str:
        """Path of the first producer."""
        return self.cells[0].root.path

    @property
    def shuffled(self) -> bool:
        """True where neighbours of a producer arrive with others in between."""
        return any(_interleaved(member) for cell in self.cells for member in cell.members)

    def paths(self) -> set[str]:
        """Paths of the layers (and names of the loose tensors) that the unit touches."""
        return {member.path for cell in self.cells for member in cell.members}


@dataclass(frozen=True)
class Coupling:
    """What may be cut, and what may not."""

    units: tuple[Unit, ...]
    excluded: tuple[Excluded, ...]
    widths: Mapping[Key, int]

    def without(self, numbers: Collection[int], reasons: Iterable[Excluded]) -> Coupling:
        """The same with some units, by number, among what must stay."""
        units = tuple(unit for number, unit in enumerate(self.units) if number not in numbers)
        return Coupling(units, (*self.excluded, *reasons), self.widths)


def couple(connectivity: Connectivity, model: nn.Module, ignore: Mapping[str, str] | None = None) -> Coupling:
    """Derive families, cells and units from a connectivity.

    Args:
        connectivity: What `trace` found for `model`.
        model: The traced model; looked at for groups and shared or parametrised weights, never changed.
        ignore: Layer paths whose own channels (outputs) must stay, with the reason to report.
    """
    slots = Slots(connectivity)
    modules = modules_of(model)
    family = components(slots.total, _ties(connectivity, slots, modules))
    frozen = frozen_slots(connectivity, slots, modules, ignore or {})
    reasons = family_reasons(slots, family, frozen)
    cells = _cells(connectivity, slots, modules, family, reasons)
    units = _units(cells, modules, connectivity)
    even = [_even(unit, slots.widths, modules) for unit in units]
    whole = excluded_by_reason(connectivity, slots, family, reasons) + left_uncalled(connectivity, modules)
    uneven = [unit for unit, fits in zip(units, even, strict=True) if not fits]
    if uneven:
        paths = dict.fromkeys(cell.root.path for unit in uneven for cell in unit.cells)
        channels = sum(cell.size for unit in uneven for cell in unit.cells)
        whole += (Excluded(tuple(paths), channels, UNEVEN_REASON),)
    return Coupling(tuple(unit for unit, fits in zip(units, even, strict=True) if fits), whole, slots.widths)


def _ties(connectivity: Connectivity, slots: Slots, modules: Mapping[str, nn.Module]) -> Ints:
    """`[n, 2]`: slots that must be cut together."""
    ties: list[Ints] = [np.empty((0, 2), dtype=np.int64)]
    for path, edges in connectivity.edges.items():
        into = slots.start[slots.in_key(path)]
        for edge in edges:
            if edge.source == INPUT:
                continue
            pairs = edge.pairs.numpy()
            source = slots.start[slots.out_key[edge.source]]
            ties.append(np.stack([pairs[:, 0] + source, pairs[:, 1] + into], 1))
    for path, layer in connectivity.layers.items():
        if layer.kind == "depthwise":
            out = slots.numbers((path, "out"))
            multiplier = layer.outputs // layer.inputs
            ties.append(np.stack([slots.start[path, "in"] + np.arange(len(out)) // multiplier, out], 1))
    return np.concatenate(ties)


def _cells(
    connectivity: Connectivity, slots: Slots, modules: Mapping[str, nn.Module], family: Ints, reasons: Ints
) -> list[Cell]:
    """Free families, grouped by pattern and by runs of neighbours."""
    free = reasons[family] == 0
    number, side, channel = family[free], slots.side_of[free], slots.channel_of[free]
    order = np.lexsort((channel, side, number))
    number, side, channel = number[order], side[order], channel[order]
    if not len(number):
        return []
    block = np.zeros_like(channel)
    for s, key in enumerate(slots.keys):
        blocks = blocks_of(modules.get(key[0]), key[1])
        if blocks > 1:
            here = side == s
            block[here] = channel[here] // (slots.widths[key] // blocks)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    # A family's pattern is the multiset of its (side, block): summed up, random 64-bit numbers stand for them.
    _, place = np.unique(side * (block.max() + 1) + block, return_inverse=True)
    weight = np.random.default_rng(0).integers(2**64, size=place.max() + 1, dtype=np.uint64)
    _, kind = np.unique(np.add.reduceat(weight[place], starts), return_inverse=True)
    order = np.argsort(kind, kind="stable")
    groups = np.split(starts[order], np.flatnonzero(np.diff(kind[order])) + 1)
    ends = dict(zip(starts.tolist(), np.append(starts[1:], len(number)).tolist(), strict=True))
    cells = []
    for group in groups:
        index = group[:, None] + np.arange(ends[int(group[0])] - group[0])
        cells += _runs(channel[index], side[index[0]], slots, connectivity)
    return sorted(cells, key=lambda c: slots.start[c.root.path, c.root.side] + int(c.root.index[0, 0]))


def _runs(index: Ints, sides: Ints, slots: Slots, connectivity: Connectivity) -> list[Cell]:
    """Split families of one pattern where the first producer's channels stop being neighbours, here or on arrival.

    Args:
        index: `[families, slots]`, channel of each slot.
        sides: `[slots]`, layer side of each.
        slots: Numbers of the sides.
        connectivity: Who feeds whom.
    """
    members = []
    for s in np.unique(sides):
        path, member_side = slots.keys[s]
        members.append(Member(path, member_side, index[:, sides == s]))
    roots = [m for m in members if m.side == "out" and connectivity.layers[m.path].kind == "synaptic"]
    if not roots:  # a lone norm or depthwise layer on an unseen source: never cut
        return []
    root = min(roots, key=lambda m: slots.start[m.path, m.side])
    members = [root, *(m for m in members if m is not root)]
    order = np.argsort(root.index[:, 0], kind="stable")
    members = [Member(m.path, m.side, m.index[order]) for m in members]
    apart = np.diff(members[0].index[:, 0]) != 1
    for member in members[1:]:
        apart |= np.diff(member.index[:, 0]) < 0
    breaks = np.flatnonzero(apart) + 1
    if len(breaks) + 1 > max(2, len(order) // 2):  # interleaved (a shuffle): runs would be single channels
        breaks = breaks[:0]
    parts = [np.split(m.index, breaks) for m in members]
    return [
        Cell(tuple(Member(m.path, m.side, part) for m, part in zip(members, run, strict=True)))
        for run in zip(*parts, strict=True)
    ]


def _units(
    cells: list[Cell], modules: Mapping[str, nn.Module], connectivity: Connectivity
) -> tuple[Unit, ...]:
    """Tie the cells that share a grouped layer side, a producer whose output is split, or a shuffle.

    Where the parts of a split have sizes that shrink in proportion only in coarse steps, they are left to shrink each
    for itself: such a split is at a number that the model stores, and stored numbers follow the cut.
    """
    hard: dict[Key, list[int]] = defaultdict(list)
    soft: dict[Key, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        for member in cell.members:
            key = (member.path, member.side)
            if blocks_of(modules.get(member.path), member.side) > 1 or _interleaved(member):
                hard[key].append(i)
            elif member.side == "out":
                soft[key].append(i)
    units = []
    for unit in _tied(cells, [*hard.values(), *soft.values()]):
        steps, narrowest = Unit(tuple(unit)).steps, min(cell.size for cell in unit)
        coarse = len(unit) > 1 and (steps == 1 or 2 * steps < narrowest)
        units += _tied(unit, _local(unit, cells, hard)) if coarse else [unit]
    lonely = {path for path in connectivity.single if blocks_of(modules[path], "through") > 1}
    return tuple(Unit(tuple(unit), 2 if _touch(unit, lonely) else 1) for unit in units)


def _touch(cells: Iterable[Cell], paths: Collection[str]) -> bool:
    return any(member.path in paths for cell in cells for member in cell.members)


def _even(unit: Unit, widths: Mapping[Key, int], modules: Mapping[str, nn.Module]) -> bool:
    """True if every group of every grouped layer that the unit touches would lose as many channels."""
    touched: dict[Key, list[Ints]] = defaultdict(list)
    for member in (m for cell in unit.cells for m in cell.members):
        if blocks_of(modules.get(member.path), member.side) > 1:
            touched[member.path, member.side].append(member.index.reshape(-1))
    for key, parts in touched.items():
        blocks = blocks_of(modules[key[0]], key[1])
        counts = np.bincount(np.concatenate(parts) // (widths[key] // blocks), minlength=blocks)
        if len(set(counts.tolist())) > 1:
            return False
    return True


def _tied(cells: Sequence[Cell], groups: Iterable[Sequence[int]]) -> list[list[Cell]]:
    """The cells, in sets that are connected by groups of cell numbers."""
    ties = [(group[0], other) for group in groups if group for other in group[1:]]
    label = components(len(cells), np.array(ties, dtype=np.int64).reshape(-1, 2))
    return [[cells[i] for i in np.flatnonzero(label == n).tolist()] for n in np.unique(label)]


def _local(unit: Sequence[Cell], cells: Sequence[Cell], groups: Mapping[Key, list[int]]) -> list[list[int]]:
    """Groups of cell numbers, restricted to a unit and renumbered within it."""
    place = {id(cell): i for i, cell in enumerate(unit)}
    return [[place[id(cells[i])] for i in group if id(cells[i]) in place] for group in groups.values()]


def _interleaved(member: Member) -> bool:
    """True where neighbours of the producer arrive with others in between: a channel shuffle."""
    channels = member.index[:, 0]
    return member.index.shape[1] == 1 and int(np.ptp(channels)) + 1 != len(channels)


#: Channels that stay, by layer side.
Selection = dict[Key, tuple[int, ...]]


def ranks_of(scores: Sequence[Floats]) -> list[Ints]:
    """By cell, the families in ascending order of importance."""
    return [np.argsort(s, kind="stable") for s in scores]


def step_scores(unit: Unit, scores: Sequence[Floats], ranks: Sequence[Ints]) -> Floats:
    """`[steps]`: the summed scores of what goes with each step of a unit."""
    pairs = zip(scores, ranks, strict=True)
    summed: Floats = np.sum([s[rank].reshape(unit.steps, -1).sum(1) for s, rank in pairs], axis=0)
    return summed


def gone_of(unit: Unit, ranks: Sequence[Ints], steps: int) -> dict[Key, Ints]:
    """By layer side, the channels that go with the first `steps` of a unit."""
    gone: dict[Key, list[Ints]] = {}
    for cell, rank in zip(unit.cells, ranks, strict=True):
        families = rank[: steps * (cell.size // unit.steps)]
        for member in cell.members if len(families) else ():
            gone.setdefault((member.path, member.side), []).append(member.index[families].reshape(-1))
    return {key: np.concatenate(parts) for key, parts in gone.items()}
