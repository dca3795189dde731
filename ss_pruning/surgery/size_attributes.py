"""Numbers that modules store (split sizes, pads, widths): which follow a cut, as few as the cut model is right with."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ss_pruning._utils.modules import modules_of
from ss_pruning.errors import VerificationError
from ss_pruning.graph.connectivity import Connectivity, Key
from ss_pruning.graph.groups import PruningGroup, Selection, Subgroup
from ss_pruning.graph.layers import kind_of
from ss_pruning.surgery.equivalence.precision import DOUBLE
from ss_pruning.surgery.plan import Attribute, Plan, set_number


class Number(NamedTuple):
    """A stored number, and what makes it follow: one that equals a width by chance may still be one of heads.

    Attributes:
        path: Module path, or the pattern of alike ones.
        name: Attribute name.
        position: Place in a list or tuple.
        by_heads: Whether it follows how many heads there are, and not other widths.
    """

    path: str
    name: str
    position: int | None = None
    by_heads: bool = False


def pattern(path: str) -> str:
    """A path without its numbers: alike layers of repeated blocks have the same."""
    return re.sub(r"\d+", "#", path)


def alike(number: Number) -> Number:
    """The same number in all alike blocks."""
    return number._replace(path=pattern(number.path))


class SizeAttributes:
    """Before a module runs in the cut model, lets the numbers it stores follow the widths that changed.

    A number follows if it equals one old width that is known at this module, and that width became one new one:
    first what heads of attention make up (how many there are, and the widths that they share out) where their layers
    are held, then the widths that arrive here, else those of the layers inside (or beside, where none is inside) and
    the parts into which their outputs split, else those of the outputs that split alone.
    """

    def __init__(
        self,
        plan: Plan,
        arrivals: Mapping[str, list[tuple[int, ...]]],
        parts: Parts,
        fixed: Collection[Number],
    ) -> None:
        self.arrivals, self.fixed = arrivals, frozenset(fixed)
        self.heads = _with_holders(parts.heads, arrivals)
        self.found: dict[Number, Attribute] = {}
        self.current = ""
        self.done: set[str] = set()
        self.inside: dict[str, list[tuple[int, int]]] = {}
        self.split: dict[str, list[tuple[int, int]]] = {}
        for cut in plan.cuts:
            if cut.key in parts.by_head:
                continue
            own = parts.splits.get(cut.path, [])
            path = cut.path
            while path:
                path = path.rpartition(".")[0]
                self.inside.setdefault(path, []).extend([(cut.width, len(cut.kept)), *own])
                self.split.setdefault(path, []).extend(own)

    def __call__(self, path: str, module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
        """Let the numbers of the module at `path`, which is about to run on tensors of these shapes, follow."""
        self.current = path
        if path in self.done or kind_of(module) is not None:  # a layer's own numbers follow when it is cut
            return
        self.done.add(path)
        self._follow_in_tables(path, module)
        folds = bool(self.heads)  # attention folds its heads into the batch, whose size is then no width
        arrived = [
            (old, new)
            for before, after in zip(self.arrivals.get(path, []), shapes, strict=False)
            if len(before) == len(after)
            for old, new in zip(before[folds:], after[folds:], strict=True)
            if old != new
        ]
        block = self._block(path, module)
        known = (self._heads_in(path, module), arrived, self.inside.get(block, []), self.split.get(block, []))
        self._follow(path, module, [_changes(pairs) for pairs in known])

    def _follow_in_tables(self, path: str, module: nn.Module) -> None:
        """Modules that hold a table by head, or what makes one, and are asked for it, never run themselves."""
        for inner, sizes in self.heads.items():
            if inner.startswith(f"{path}." if path else "") and inner not in (
                path,
                *self.arrivals,
                *self.done,
            ):
                self.done.add(inner)
                held = module.get_submodule(inner.removeprefix(f"{path}." if path else ""))
                self._follow(inner, held, [_changes(sizes)])

    def _heads_in(self, path: str, module: nn.Module) -> list[tuple[int, int]]:
        """Sizes of heads whose layers the module holds, itself or in containers of torch, which have no numbers."""
        found = list(self.heads.get(path, []))
        for name, child in module._modules.items() if self.heads else ():
            if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
                found += self._heads_in(f"{path}.{name}" if path else name, child)
        return found

    def _block(self, path: str, module: nn.Module) -> str:
        """The module itself; if it holds no layer (a padded shortcut), the block it stands in.

        Where heads go, that of attention whose layers are not cut is not another's.
        """
        if self.heads and any(kind_of(inner) for inner in module.modules()):
            return path
        while path and path not in self.inside and not type(module).__module__.startswith("torch.nn."):
            path = path.rpartition(".")[0]
        return path

    def _follow(self, path: str, module: nn.Module, changes: Sequence[Mapping[int, int]]) -> None:
        """`changes`, from old to new: first those of heads, then of other widths."""
        for name, position, value in _stored_numbers(module):
            for place, known in enumerate(changes):
                number = Number(path, name, position, by_heads=place == 0)
                if value in known and self.fixed.isdisjoint((number, alike(number))):
                    if known[value] != value:
                        self.found[number] = Attribute(path, name, position, value, known[value])
                        set_number(module, self.found[number])
                    break


def _with_holders(
    heads: Mapping[str, list[tuple[int, int]]], arrivals: Mapping[str, Any]
) -> dict[str, list[tuple[int, int]]]:
    """Sizes of heads by module; those that never run but hold one that does are asked for what it makes."""
    found = {path: list(sizes) for path, sizes in heads.items()}
    for path, sizes in heads.items():
        while (path := path.rpartition(".")[0]) and path not in arrivals:
            found.setdefault(path, []).extend(sizes)
    return found


def never_named(model: nn.Module) -> frozenset[Number]:
    """Stored numbers whose names stand in no method that `forward` could call, of any class in the model."""
    modules = modules_of(model)
    methods: dict[str, list[Any]] = {}
    for kind in {base for module in modules.values() for base in type(module).__mro__}:
        if not kind.__module__.startswith("torch."):
            for name, method in vars(kind).items():
                methods.setdefault(name, []).append(method)
    named, todo = {"forward", "__call__"}, ["forward", "__call__"]
    while todo:
        found = {name for method in methods.get(todo.pop(), ()) for name in names_in(method)}
        todo += found - named
        named |= found
    return frozenset(
        alike(Number(path, name, at, by_heads))
        for path, module in modules.items()
        for name, at, _ in _stored_numbers(module)
        if name not in named
        for by_heads in (False, True)
    )


def names_in(function: Any) -> Iterator[str]:
    """Names and strings in the code of a function, and of those defined in it."""
    function = getattr(function, "fget", getattr(function, "__func__", function))
    todo = [getattr(getattr(function, "__wrapped__", function), "__code__", None)]
    while todo:
        code = todo.pop()
        if code is not None:
            yield from code.co_names
            yield from (constant for constant in code.co_consts if isinstance(constant, str))
            todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


# What timm's models and their heads call the widths that the layers of the head read, and where those layers are.
_HEAD_WIDTHS = ("num_features", "head_hidden_size", "in_features")
_HEADS = ("conv_head", "final_conv", "head")


def head_numbers(model: nn.Module, plan: Plan) -> list[Attribute]:
    """Numbers from which timm's `reset_classifier` makes a new classifier, where what the old head reads was cut."""
    classifier = getattr(model, "get_classifier", None)
    heads = classifier() if callable(classifier) else None
    found: dict[tuple[str, str], Attribute] = {}
    if heads is None:
        return []
    names = {module: path for path, module in modules_of(model).items()}
    paths = {names.get(head) for head in (heads if isinstance(heads, tuple) else (heads,))}
    for cut in plan.cuts:
        if cut.side != "in" or (cut.path not in paths and cut.path.partition(".")[0] not in _HEADS):
            continue
        for path in dict.fromkeys(("", cut.path.rpartition(".")[0])):
            own = vars(model.get_submodule(path))
            for name in _HEAD_WIDTHS:
                if type(own.get(name)) is int and own[name] == cut.width:
                    found[path, name] = Attribute(path, name, None, cut.width, len(cut.kept))
    return list(found.values())


def _changes(pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Old widths that became one new width everywhere."""
    seen: dict[int, set[int]] = {}
    for old, new in pairs:
        seen.setdefault(old, set()).add(new)
    return {old: new.pop() for old, new in seen.items() if len(new) == 1}


def _stored_numbers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    for name, value in list(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if type(value) is int:
            yield name, None, int(value)
        elif type(value) in (list, tuple):
            for position, item in enumerate(value):
                if type(item) is int:
                    yield name, position, int(item)


@dataclass
class Parts:
    """Sizes of what outputs consist of, old and new.

    Attributes:
        splits: By layer that touches an output that splits: of each part of it, and of the whole.
        heads: By module that holds a layer of attention: of how many heads, and of the width that they have there, each
            and together.
        by_head: Layer sides and tables with one channel a head: their widths are not those of channels elsewhere.
    """

    splits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    heads: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    by_head: set[Key] = field(default_factory=set)


def part_sizes(groups: Sequence[PruningGroup], selection: Selection, connectivity: Connectivity) -> Parts:
    """What the cut makes of parts of outputs and of heads."""
    parts = Parts()
    for group in groups:
        sizes, heads = [], len({int(s.head.index[0, 0]) for s in group.subgroups if s.head is not None})
        for subgroup in group.subgroups:
            path, side = subgroup.root.path, subgroup.root.side
            if (path, side) in selection and subgroup.size < connectivity.layers[path].outputs:
                left = int(np.isin(subgroup.root.index[:, 0], selection[path, side]).sum())
                if subgroup.of_heads:
                    _add_heads(parts, subgroup, left)
                    continue
                if subgroup.head is not None:
                    _add_dimensions(parts, subgroup, left, heads)
                sizes.append((subgroup.size, left))
                sizes.append((connectivity.layers[path].outputs, len(selection[path, side])))
        for path in group.paths() if sizes else ():
            parts.splits.setdefault(path, []).extend(sizes)
    return parts


def _add_heads(parts: Parts, subgroup: Subgroup, left: int) -> None:
    for member in subgroup.members:
        head = member.index[0]
        runs = np.split(head, np.flatnonzero(np.diff(head) != 1) + 1)  # its queries, keys and values
        widths = {1, len(head), *map(len, runs)}
        sizes = parts.heads.setdefault(member.path.rpartition(".")[0], [])
        sizes += [(subgroup.size * width, left * width) for width in widths]
        if len(head) == 1:
            parts.by_head.add(member.key)


def _add_dimensions(parts: Parts, subgroup: Subgroup, left: int, heads: int) -> None:
    """Of queries, keys or values of one head, and of all."""
    for member in subgroup.members:
        counts = {1, member.index.shape[1]}
        sizes = parts.heads.setdefault(member.path.rpartition(".")[0], [])
        sizes += [(subgroup.size * n * m, left * n * m) for n in counts for m in (1, heads)]


@dataclass(frozen=True)
class Verified:
    """A plan that was applied to a copy and found right.

    Attributes:
        plan: The plan, with the stored numbers that have to follow.
        max_error: Largest difference between cut and masked outputs, relative to the largest output.
        followed: The numbers as what they follow.
        by_decisions: Nothing that the model returned could be compared, but what its decisions looked at was: so is
            `max_error`.
        precision: In which the two were compared.
    """

    plan: Plan
    max_error: float
    followed: frozenset[Number] = frozenset()
    by_decisions: bool = False
    precision: str = DOUBLE


#: Verifies a plan with some numbers as they were.
TryNumbers = Callable[[Collection[Number]], Verified]


@dataclass
class FewestNumbers:
    """What plans for one model have told of its stored numbers; those of alike blocks are one.

    Attributes:
        idle: Numbers that need not follow.
        needed: Numbers that must.
    """

    idle: frozenset[Number]
    needed: set[Number] = field(default_factory=set)

    def verified(self, attempt: TryNumbers, fixed: frozenset[Number], last: bool) -> Verified:
        """Verify, and let no number follow without which the cut model is as right: it only happens to equal a width.

        Alike blocks are one; what was found for them holds for later plans, too. A plan that fails is tried once more
        without the numbers that nobody knows to be needed, and with `last` with all numbers following.

        Args:
            attempt: Verifies the plan with some numbers as they were.
            fixed: Those that must not follow in any case.
            last: Whether nobody will try parts of the plan.

        Raises:
            VerificationError: The plan is wrong.
        """
        try:
            verified = attempt(fixed | self.idle)
        except VerificationError as error:
            doubtful = {alike(Number(*number)) for number in error.followed} - self.needed
            if (without := self._without(attempt, fixed, doubtful) if doubtful else None) is not None:
                return without
            if not last:
                raise
            verified = attempt(fixed)
            self.idle -= {alike(number) for number in verified.followed}
        unsure = {alike(number) for number in verified.followed} - self.needed
        alone = [{number} for number in sorted(unsure, key=str)] if len(unsure) > 1 else []
        for numbers in (unsure, *alone):
            if numbers - self.idle:
                verified = self._without(attempt, fixed, numbers) or verified
        self.needed |= unsure - self.idle
        return verified

    def _without(
        self,
        attempt: TryNumbers,
        fixed: frozenset[Number],
        numbers: Collection[Number],
    ) -> Verified | None:
        """Verify with some numbers as they were; None if that is wrong."""
        try:
            verified = attempt(fixed | self.idle | frozenset(numbers))
        except VerificationError:
            return None
        self.idle |= frozenset(numbers)
        return verified
