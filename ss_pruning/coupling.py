"""Which channels must be cut together: families, the cells that share a pattern, and the units that keep proportions.

From the wiring (who feeds whom) three notions follow:

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from ss_pruning.layers import blocks_of
from ss_pruning.wiring import INPUT, Wiring

Side = Literal["in", "out", "through", "tensor"]
Key = tuple[str, Side]
Ints = npt.NDArray[np.int64]

OUTPUT_REASON = "reaches the model's output"
BROADCAST_REASON = "feeds several channels at once (a gate, a softmax or attention)"
UNREAD_REASON = "nothing that ran reads it"
NO_PRODUCER_REASON = "is fed by the model's input, a constant or a channel mix, so nothing would shrink it"
WHOLE_REASON = "all channels of a layer hang together here, so none can go alone"
UNEVEN_REASON = (
    "some groups of a grouped layer have channels that must stay, so the groups could not stay equal"
)
IGNORED_REASON = "ignored on request"


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
    """Cells that must lose the same share; most units are one cell."""

    cells: tuple[Cell, ...]

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
class LeftWhole:
    """Layers some of whose channels stay, and why.

    Attributes:
        paths: The layers whose outputs stay.
        channels: How many output channels of them.
        reason: Why.
    """

    paths: tuple[str, ...]
    channels: int
    reason: str


@dataclass(frozen=True)
class Coupling:
    """What may be cut, and what may not."""

    units: tuple[Unit, ...]
    left_whole: tuple[LeftWhole, ...]
    widths: Mapping[Key, int]


def couple(wiring: Wiring, model: nn.Module, ignore: Mapping[str, str] | None = None) -> Coupling:
    """Derive families, cells and units from a wiring.

    Args:
        wiring: What `trace` found for `model`.
        model: The traced model; looked at for groups and shared or parametrised weights, never changed.
        ignore: Layer paths whose own channels (outputs) must stay, with the reason to report.
    """
    slots = _Slots(wiring)
    modules = dict(model.named_modules())
    family = _components(slots.total, _ties(wiring, slots, modules))
    frozen = _frozen(wiring, slots, modules, ignore or {})
    reasons = _family_reasons(slots, family, frozen)
    cells = _cells(wiring, slots, modules, family, reasons)
    units = _units(cells, modules)
    even = [_even(unit, slots.widths, modules) for unit in units]
    whole = _left_whole(wiring, slots, family, reasons)
    uneven = [unit for unit, fits in zip(units, even, strict=True) if not fits]
    if uneven:
        paths = dict.fromkeys(cell.root.path for unit in uneven for cell in unit.cells)
        channels = sum(cell.size for unit in uneven for cell in unit.cells)
        whole += (LeftWhole(tuple(paths), channels, UNEVEN_REASON),)
    return Coupling(tuple(unit for unit, fits in zip(units, even, strict=True) if fits), whole, slots.widths)


class _Slots:
    """Numbers every (layer side, channel): side `key` has the numbers `start[key] ... start[key] + widths[key]`."""

    def __init__(self, wiring: Wiring) -> None:
        self.widths: dict[Key, int] = {}
        self.out_key: dict[str, Key] = {}
        for path, layer in wiring.layers.items():
            if layer.kind in ("norm", "positional"):
                self.widths[path, "through"] = layer.outputs
                self.out_key[path] = (path, "through")
            else:
                self.widths[path, "in"], self.widths[path, "out"] = layer.inputs, layer.outputs
                self.out_key[path] = (path, "out")
        for name, loose in wiring.loose.items():
            self.widths[name, "tensor"] = loose.size
            self.out_key[name] = (name, "tensor")
        self.keys = list(self.widths)
        sizes = np.array([self.widths[key] for key in self.keys], dtype=np.int64)
        starts = np.concatenate([[0], sizes.cumsum()]).astype(np.int64)
        self.start: dict[Key, int] = dict(zip(self.keys, starts.tolist(), strict=False))
        self.total = int(starts[-1])
        self.side_of: Ints = np.repeat(np.arange(len(self.keys)), sizes)
        self.channel_of: Ints = np.arange(self.total) - np.repeat(starts[:-1], sizes)

    def in_key(self, path: str) -> Key:
        return (path, "in") if (path, "in") in self.widths else (path, "through")

    def numbers(self, key: Key) -> Ints:
        return np.arange(self.start[key], self.start[key] + self.widths[key])


def _ties(wiring: Wiring, slots: _Slots, modules: Mapping[str, nn.Module]) -> Ints:
    """`[n, 2]`: slots that must be cut together."""
    ties: list[Ints] = [np.empty((0, 2), dtype=np.int64)]
    for path, feeds in wiring.feeds.items():
        into = slots.start[slots.in_key(path)]
        for feed in feeds:
            if feed.source == INPUT:
                continue
            pairs = feed.pairs.numpy()
            source = slots.start[slots.out_key[feed.source]]
            ties.append(np.stack([pairs[:, 0] + source, pairs[:, 1] + into], 1))
    for path, layer in wiring.layers.items():
        if layer.kind == "depthwise":
            out = slots.numbers((path, "out"))
            multiplier = layer.outputs // layer.inputs
            ties.append(np.stack([slots.start[path, "in"] + np.arange(len(out)) // multiplier, out], 1))
    return np.concatenate(ties)


def _components(total: int, ties: Ints) -> Ints:
    """Connected components by hooking to the smaller label and pointer jumping, as `[total]` labels."""
    label = np.arange(total)
    a, b = ties[:, 0], ties[:, 1]
    while True:
        before = label.copy()
        low = np.minimum(label[a], label[b])
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        while not np.array_equal(label, label[label]):
            label = label[label]
        if np.array_equal(before, label):
            return label


def _frozen(
    wiring: Wiring, slots: _Slots, modules: Mapping[str, nn.Module], ignore: Mapping[str, str]
) -> list[tuple[Ints, str]]:
    """Slots that must stay, each with the reason; the first reason that reaches a family is the one reported."""
    frozen: list[tuple[Ints, str]] = []
    for origin, channels in wiring.reaches_output.items():
        if origin in slots.out_key:
            frozen.append((channels.numpy() + slots.start[slots.out_key[origin]], OUTPUT_REASON))
    for path, reason in ignore.items():
        if path in slots.out_key:
            frozen.append((slots.numbers(slots.out_key[path]), reason))
    for path, reason in _untouchable(modules, wiring).items():
        frozen += [(slots.numbers(key), reason) for key in slots.keys if key[0] == path]
    return frozen + _unconnected(wiring, slots)


def _unconnected(wiring: Wiring, slots: _Slots) -> list[tuple[Ints, str]]:
    """Slots that nothing shrinks, that nothing reads, or that feed several channels at once."""
    frozen: list[tuple[Ints, str]] = []
    fed, read = np.zeros(slots.total, dtype=bool), np.zeros(slots.total, dtype=bool)
    for path, feeds in wiring.feeds.items():
        into = slots.start[slots.in_key(path)]
        for feed in feeds:
            pairs, broadcast = feed.pairs.numpy(), feed.broadcast.numpy()
            if feed.source == INPUT:
                frozen.append((pairs[:, 1] + into, NO_PRODUCER_REASON))
                continue
            source = slots.start[slots.out_key[feed.source]]
            fed[pairs[:, 1] + into] |= feed.source not in wiring.loose
            read[pairs[:, 0] + source] = True
            read[broadcast + source] = True
            frozen.append((broadcast + source, BROADCAST_REASON))
    for path in wiring.layers:
        reads, out = slots.numbers(slots.in_key(path)), slots.numbers(slots.out_key[path])
        frozen.append((reads[~fed[reads]], NO_PRODUCER_REASON))
        frozen.append((out[~read[out]], UNREAD_REASON))
    return frozen


def _untouchable(modules: Mapping[str, nn.Module], wiring: Wiring) -> dict[str, str]:
    """Layers whose tensors cannot be replaced: parametrised ones, and ones that share a tensor with another layer."""
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    for path in wiring.layers:
        module = modules[path]
        if hasattr(module, "parametrizations"):
            reasons[path] = "its weight is parametrised; remove the parametrisation first"
        if hasattr(module, "weight_g") or hasattr(module, "weight_orig") or hasattr(module, "weight_u"):
            reasons[path] = (
                "its weight is recomputed by an old-style hook (weight norm, mask); remove it first"
            )
        for tensor in module.parameters():
            other = owners.setdefault(id(tensor), path)
            if other != path:
                reasons[path] = reasons[other] = f"shares a weight tensor ('{other}' and '{path}')"
    return reasons


def _family_reasons(slots: _Slots, family: Ints, frozen: list[tuple[Ints, str]]) -> Ints:
    """`[total]`, by family label: 0 for a family that may go, else the number of its reason."""
    reason = np.zeros(slots.total, dtype=np.int64)
    for numbers, text in reversed(frozen):
        reason[family[numbers]] = _REASONS.number(text)
    pairs, count = np.unique(family * len(slots.keys) + slots.side_of, return_counts=True)
    widths = np.array([slots.widths[key] for key in slots.keys])
    whole = (pairs // len(slots.keys))[count >= widths[pairs % len(slots.keys)]]
    reason[whole[reason[whole] == 0]] = _REASONS.number(WHOLE_REASON)
    return reason


class _Reasons:
    """Numbers for reason texts, from 1."""

    def __init__(self) -> None:
        self.texts: list[str] = [""]

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)


_REASONS = _Reasons()


def _cells(
    wiring: Wiring, slots: _Slots, modules: Mapping[str, nn.Module], family: Ints, reasons: Ints
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
    patterns: dict[tuple[bytes, bytes], list[tuple[int, int]]] = defaultdict(list)
    for begin, end in zip(starts, np.append(starts[1:], len(number)), strict=True):
        pattern = (side[begin:end].tobytes(), block[begin:end].tobytes())
        patterns[pattern].append((int(begin), int(end)))
    cells = []
    for spans in patterns.values():
        cells.extend(_runs(spans, side, channel, slots, wiring))
    return sorted(cells, key=lambda c: slots.start[c.root.path, c.root.side] + int(c.root.index[0, 0]))


def _runs(
    spans: list[tuple[int, int]], side: Ints, channel: Ints, slots: _Slots, wiring: Wiring
) -> list[Cell]:
    """Split families of one pattern where the first producer's channels stop being neighbours, here or on arrival."""
    index = np.stack([channel[begin:end] for begin, end in spans])
    sides = side[spans[0][0] : spans[0][1]]
    members = []
    for s in np.unique(sides):
        path, member_side = slots.keys[s]
        members.append(Member(path, member_side, index[:, sides == s]))
    roots = [m for m in members if m.side == "out" and wiring.layers[m.path].kind == "synaptic"]
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


def _units(cells: list[Cell], modules: Mapping[str, nn.Module]) -> tuple[Unit, ...]:
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
    return tuple(Unit(tuple(unit)) for unit in units)


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
    label = _components(len(cells), np.array(ties, dtype=np.int64).reshape(-1, 2))
    return [[cells[i] for i in np.flatnonzero(label == n).tolist()] for n in np.unique(label)]


def _local(unit: Sequence[Cell], cells: Sequence[Cell], groups: Mapping[Key, list[int]]) -> list[list[int]]:
    """Groups of cell numbers, restricted to a unit and renumbered within it."""
    place = {id(cell): i for i, cell in enumerate(unit)}
    return [[place[id(cells[i])] for i in group if id(cells[i]) in place] for group in groups.values()]


def _interleaved(member: Member) -> bool:
    """True where neighbours of the producer arrive with others in between: a channel shuffle."""
    channels = member.index[:, 0]
    return member.index.shape[1] == 1 and int(np.ptp(channels)) + 1 != len(channels)


def _left_whole(wiring: Wiring, slots: _Slots, family: Ints, reasons: Ints) -> tuple[LeftWhole, ...]:
    """One entry a reason: the synaptic layers of whose outputs some stay for it."""
    paths: dict[int, list[str]] = defaultdict(list)
    channels: dict[int, int] = defaultdict(int)
    for path, layer in wiring.layers.items():
        if layer.kind != "synaptic":
            continue
        numbers, counts = np.unique(reasons[family[slots.numbers((path, "out"))]], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number:
                paths[number].append(path)
                channels[number] += count
    return tuple(LeftWhole(tuple(paths[n]), channels[n], _REASONS.texts[n]) for n in sorted(paths))
