"""Which channels must be cut together: channel sets, subgroups of one pattern, groups that keep proportions.

From the connectivity (who feeds whom) three notions follow:

* A **channel set** is a set of (layer, side, channel) slots that meet somewhere: a producer's output channel, the
  norms and depthwise layers it passes through, the elements of loose tensors along it, every consumer's input channel.
  A channel set is cut as a whole or not at all. A head of attention is one: its queries, keys and values, its channels
  at the projection, its entries in tables.
* A **subgroup** is a run of channel sets with the same pattern: the same layers on the same sides, neighbours in the
  producer that comes first, and the same block of every grouped layer they touch.
* A **pruning group** is a set of subgroups of which the same share must go: the groups of a grouped convolution or a
  GroupNorm, the parts into which a producer's output is split. One *step* of a group removes `size / gcd(sizes)`
  channel sets of each subgroup.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning._utils.modules import modules_of
from ss_pruning.graph.connectivity import Connectivity, Key, Side, Slots, components, ties_of
from ss_pruning.graph.exclusions import (
    UNEVEN_REASON,
    Excluded,
    channel_set_reasons,
    excluded_by_reason,
    frozen_slots,
    left_uncalled,
)
from ss_pruning.graph.layers import blocks_of


@dataclass(frozen=True)
class Member:
    """The slots of a layer side (or loose tensor) in a subgroup: `index[i]` are the channels of its channel set `i`."""

    path: str
    side: Side
    index: Ints

    @property
    def key(self) -> Key:
        """Its layer side."""
        return self.path, self.side


@dataclass(frozen=True)
class Subgroup:
    """Channel sets with the same pattern, in the order of the first producer's channels.

    Attributes:
        members: Where they lie.
        head: Of dimensions within a head, what the layer behind reads of it.
    """

    members: tuple[Member, ...]
    head: Member | None = None

    @property
    def size(self) -> int:
        """Number of channel sets."""
        return len(self.members[0].index)

    @property
    def root(self) -> Member:
        """The first producer: a layer whose output channels are the channel sets."""
        return self.members[0]

    @property
    def head_width(self) -> int:
        """Neighbouring channels of the first producer in a channel set: of the queries of a head; 1 where none is."""
        head = self.root.index[0]
        read = any(member.side != "out" and member.index.shape[1] > 1 for member in self.members[1:])
        return 1 + int(np.append(np.diff(head) != 1, True).argmax()) if read else 1

    @property
    def unread(self) -> tuple[Member, ...]:
        """Where dimensions of queries and keys are made, behind a norm if there is one; empty for all else."""
        if self.head is None or any(member.side == "in" for member in self.members):
            return ()
        norms = tuple(member for member in self.members if member.side == "through")
        return norms or tuple(member for member in self.members if member.side == "out")

    @property
    def of_heads(self) -> bool:
        """Whether its channel sets are heads."""
        return self.head_width > 1


@dataclass(frozen=True)
class PruningGroup:
    """Subgroups that must lose the same share; most groups are one subgroup.

    Attributes:
        subgroups: The subgroups.
        least: Steps that always stay.
        by_width: Sides of queries and keys whose products are divided by the root of their width: they make up for it.
        tied: The groups that it was made of, if any: each may go by itself where together they cannot.
    """

    subgroups: tuple[Subgroup, ...]
    least: int = 1
    by_width: frozenset[Key] = frozenset()
    tied: tuple[PruningGroup, ...] = field(default=(), repr=False, compare=False)

    @property
    def steps(self) -> int:
        """How many equal steps the group could shrink in, if it were allowed to vanish."""
        return math.gcd(*(subgroup.size for subgroup in self.subgroups))

    @property
    def size(self) -> int:
        """Number of channel sets."""
        return sum(subgroup.size for subgroup in self.subgroups)

    @property
    def members(self) -> list[Member]:
        """Where all of them lie."""
        return [member for subgroup in self.subgroups for member in subgroup.members]

    @property
    def name(self) -> str:
        """Path of the first producer."""
        return self.subgroups[0].root.path

    @property
    def shuffled(self) -> bool:
        """True where neighbours of a producer arrive with others in between."""
        return any(map(_interleaved, self.members))

    def paths(self) -> set[str]:
        """Paths of the layers (and names of the loose tensors) that the group touches."""
        return {member.path for member in self.members}


@dataclass(frozen=True)
class Coupling:
    """What may be cut, and what may not.

    Attributes:
        groups: What may be cut.
        excluded: What may not.
        widths: Of each layer side.
        lone: Convolutions whose groups go as a whole, as those of a head do: what is left of them reads as many
            channels as before.
    """

    groups: tuple[PruningGroup, ...]
    excluded: tuple[Excluded, ...]
    widths: Mapping[Key, int]
    lone: frozenset[str] = frozenset()

    @property
    def subgroups(self) -> list[Subgroup]:
        """Of all groups, one after the other."""
        return [subgroup for group in self.groups for subgroup in group.subgroups]

    def without(self, numbers: Collection[int], reasons: Iterable[Excluded]) -> Coupling:
        """The same with some groups, by number, among what must stay; of tied ones each is by itself then."""
        groups = [
            part
            for number, group in enumerate(self.groups)
            for part in (group.tied if number in numbers else (group,))
        ]
        return replace(self, groups=tuple(groups), excluded=(*self.excluded, *reasons))


def couple(connectivity: Connectivity, model: nn.Module, ignore: Mapping[str, str] | None = None) -> Coupling:
    """Derive channel sets, subgroups and groups from what `trace` found for a model, which is not changed.

    Of layers that `ignore` names, with the reason to report, the own channels (outputs) stay.
    """
    slots = Slots(connectivity)
    modules = modules_of(model)
    ties = ties_of(connectivity, slots)
    channel_set = components(slots.total, ties)
    lone = _lone_groups(slots, modules, channel_set)
    if lone:
        channel_set = components(slots.total, np.concatenate([ties, *lone.values()]))
    frozen = frozen_slots(connectivity, slots, modules, ignore or {})
    reasons, texts = channel_set_reasons(slots, channel_set, frozen)
    whole = excluded_by_reason(connectivity, slots, channel_set, reasons, texts)
    whole += left_uncalled(connectivity, modules)
    subgroups = _subgroups(connectivity, slots, modules, channel_set, reasons, lone)
    groups = _groups(subgroups, modules, connectivity)
    even = [_even(group, slots.widths, modules) for group in groups]
    uneven = [group for group, fits in zip(groups, even, strict=True) if not fits]
    if uneven:
        paths = dict.fromkeys(subgroup.root.path for group in uneven for subgroup in group.subgroups)
        channels = sum(group.size for group in uneven)
        whole += (Excluded(tuple(paths), channels, UNEVEN_REASON),)
    sound = tuple(group for group, fits in zip(groups, even, strict=True) if fits)
    return Coupling(sound, whole, slots.widths, frozenset(lone))


def _lone_groups(slots: Slots, modules: Mapping[str, nn.Module], channel_set: Ints) -> dict[str, Ints]:
    """Convolutions whose groups go as a whole or not at all, as those of a head do, and what hangs together in them.

    Outputs of a group that hang together take along what it reads: `[n, 2]`, slots that must be cut together.
    """
    found: dict[str, Ints] = {}
    for path, side in slots.keys:
        groups = blocks_of(modules.get(path), side) if side == "out" else 1
        if groups > 1:
            outputs, inputs = (slots.numbers[path, s].reshape(groups, -1) for s in (side, "in"))
            together = channel_set[outputs] == channel_set[outputs[:, :1]]
            if outputs.shape[1] > 1 and together.all():
                first = outputs[:, 0].repeat(inputs.shape[1])
                found[path] = np.stack([inputs.ravel(), first], 1)
    return found


def _subgroups(
    connectivity: Connectivity,
    slots: Slots,
    modules: Mapping[str, nn.Module],
    channel_set: Ints,
    reasons: Ints,
    lone: Collection[str],
) -> list[Subgroup]:
    """Free channel sets, grouped by pattern and by runs of neighbours."""
    free = reasons[channel_set] == 0
    number, side, channel = channel_set[free], slots.side_of[free], slots.channel_of[free]
    order = np.lexsort((channel, side, number))
    number, side, channel = number[order], side[order], channel[order]
    if not len(number):
        return []
    block = np.zeros_like(channel)
    for s, key in enumerate(slots.keys):
        blocks = blocks_of(modules.get(key[0]), key[1])
        if blocks > 1 and key[0] not in lone:
            here = side == s
            block[here] = channel[here] // (slots.widths[key] // blocks)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    # A channel set's pattern is the multiset of its (side, block): summed up, random 64-bit numbers stand for them.
    _, place = np.unique(side * (block.max() + 1) + block, return_inverse=True)
    weight = np.random.default_rng(0).integers(2**64, size=place.max() + 1, dtype=np.uint64)
    _, kind = np.unique(np.add.reduceat(weight[place], starts), return_inverse=True)
    order = np.argsort(kind, kind="stable")
    groups = np.split(starts[order], np.flatnonzero(np.diff(kind[order])) + 1)
    ends = dict(zip(starts.tolist(), np.append(starts[1:], len(number)).tolist(), strict=True))
    subgroups = []
    for group in groups:
        index = group[:, None] + np.arange(ends[int(group[0])] - group[0])
        subgroups += _runs(channel[index], side[index[0]], slots, connectivity)
    return sorted(subgroups, key=lambda c: slots.start[c.root.key] + int(c.root.index[0, 0]))


def _runs(index: Ints, sides: Ints, slots: Slots, connectivity: Connectivity) -> list[Subgroup]:
    """Split channel sets of one pattern where the first producer's channels stop being neighbours, here or on arrival.

    `index` is `[channel sets, slots]`, the channel of each slot, and `sides` `[slots]`, its layer side.
    """
    members = []
    for s in np.unique(sides):
        path, member_side = slots.keys[s]
        members.append(Member(path, member_side, index[:, sides == s]))
    roots = [m for m in members if m.side == "out" and connectivity.layers[m.path].kind == "synaptic"]
    if not roots:  # a lone norm or depthwise layer on an unseen source: never cut
        return []
    # Of a head, what puts out most of it: not the layer that makes one entry of a table for it.
    head = any(m.side != "out" and m.index.shape[1] > 1 for m in members)
    root = min(roots, key=lambda m: (-head * m.index.shape[1], slots.start[m.key]))
    members = [root, *(m for m in members if m is not root)]
    order = np.argsort(root.index[:, 0], kind="stable")
    members = [Member(m.path, m.side, m.index[order]) for m in members]
    steps = np.diff(members[0].index[:, 0])
    apart = steps != (1 if members[0].index.shape[1] == 1 else steps.min(initial=steps.max(initial=1)))
    for member in members[1:]:
        apart |= np.diff(member.index[:, 0]) < 0
    breaks = np.flatnonzero(apart) + 1
    if len(breaks) + 1 > max(2, len(order) // 2):  # interleaved (a shuffle): runs would be single channels
        breaks = breaks[:0]
    parts = [np.split(m.index, breaks) for m in members]
    return [
        Subgroup(tuple(Member(m.path, m.side, part) for m, part in zip(members, run, strict=True)))
        for run in zip(*parts, strict=True)
    ]


def _groups(
    subgroups: list[Subgroup], modules: Mapping[str, nn.Module], connectivity: Connectivity
) -> tuple[PruningGroup, ...]:
    """Tie the subgroups that share a grouped layer side, a producer whose output is split, or a shuffle.

    Where the parts of a split have sizes that shrink in proportion only in coarse steps, they are left to shrink each
    for itself: such a split is at a number that the model stores, and stored numbers follow the cut.
    """
    hard: dict[Key, list[int]] = defaultdict(list)
    soft: dict[Key, list[int]] = defaultdict(list)
    for i, subgroup in enumerate(subgroups):
        for member in subgroup.members:
            key = member.key
            if blocks_of(modules.get(member.path), member.side) > 1 or _interleaved(member):
                hard[key].append(i)
            elif member.side == "out":
                soft[key].append(i)
    groups = []
    for group in _tied(subgroups, [*hard.values(), *soft.values()]):
        steps, narrowest = PruningGroup(tuple(group)).steps, min(subgroup.size for subgroup in group)
        coarse = len(group) > 1 and (steps == 1 or 2 * steps < narrowest)
        groups += _tied(group, _local(group, subgroups, hard)) if coarse else [group]
    lonely = {path for path in connectivity.single if blocks_of(modules[path], "through") > 1}
    made = (PruningGroup(tuple(group)) for group in groups)
    return tuple(replace(group, least=1 if lonely.isdisjoint(group.paths()) else 2) for group in made)


def _even(group: PruningGroup, widths: Mapping[Key, int], modules: Mapping[str, nn.Module]) -> bool:
    """True if every group of every grouped layer that the group touches would lose as many channels."""
    touched: dict[Key, list[Ints]] = defaultdict(list)
    for member in group.members:
        if blocks_of(modules.get(member.path), member.side) > 1:
            touched[member.key].append(member.index.reshape(-1))
    for key, parts in touched.items():
        blocks = blocks_of(modules[key[0]], key[1])
        counts = np.bincount(np.concatenate(parts) // (widths[key] // blocks), minlength=blocks)
        if len(set(counts.tolist())) > 1:
            return False
    return True


def _tied(subgroups: Sequence[Subgroup], tied: Iterable[Sequence[int]]) -> list[list[Subgroup]]:
    """The subgroups, in sets that are connected by runs of numbers that are tied."""
    ties = [(run[0], other) for run in tied if run for other in run[1:]]
    label = components(len(subgroups), np.array(ties, dtype=np.int64).reshape(-1, 2))
    return [[subgroups[i] for i in np.flatnonzero(label == n).tolist()] for n in np.unique(label)]


def _local(
    group: Sequence[Subgroup], subgroups: Sequence[Subgroup], tied: Mapping[Key, list[int]]
) -> list[list[int]]:
    """Numbers of subgroups that are tied, restricted to a group and renumbered within it."""
    place = {id(subgroup): i for i, subgroup in enumerate(group)}
    return [[place[id(subgroups[i])] for i in run if id(subgroups[i]) in place] for run in tied.values()]


def _interleaved(member: Member) -> bool:
    """True where neighbours of the producer arrive with others in between: a channel shuffle."""
    channels = member.index[:, 0]
    return member.index.shape[1] == 1 and int(np.ptp(channels)) + 1 != len(channels)


#: Channels that stay, by layer side.
Selection = dict[Key, tuple[int, ...]]


def ranks_of(scores: Sequence[Floats]) -> list[Ints]:
    """By subgroup, the channel sets in ascending order of importance."""
    return [np.argsort(s, kind="stable") for s in scores]


def step_scores(group: PruningGroup, scores: Sequence[Floats], ranks: Sequence[Ints]) -> Floats:
    """`[steps]`: the summed scores of what goes with each step of a group."""
    pairs = zip(scores, ranks, strict=True)
    summed: Floats = np.sum([s[rank].reshape(group.steps, -1).sum(1) for s, rank in pairs], axis=0)
    return summed
