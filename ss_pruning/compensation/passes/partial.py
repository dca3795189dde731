"""Forward passes that stop at a layer and go on from there later, batch by batch.

No pass can be frozen within a user's `forward`. Instead it is run again, and modules that were over when it stopped
give again what they gave: so each module runs once a batch, however often a pass stops. Of these outputs those are held
that anything to come reads (`ss_pruning.compensation.passes.dataflow`); in place of the others stand tensors that were
never filled. Each stop is tried before on two batches in turn, with NaN in such tensors. Where a layer then does not
find what it finds in an undisturbed pass, nothing is held, and passes begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ss_pruning._utils.hooks import given
from ss_pruning._utils.modules import modules_of
from ss_pruning.compensation.passes.calls import INPUTS, Call, Calls
from ss_pruning.compensation.passes.dataflow import Dataflow

#: Before a layer, with what it reads, or after it, with what it gives.
Side = Literal["in", "out"]
#: By layer: the module that takes or gives a tensor which is wanted there, and which of both.
Asides = Mapping[str, tuple[str, Side]]
# What a layer finds may differ by this share of its root mean square from what it finds in an undisturbed pass; and
# what is compared is so many of the values.
_SAME, _COMPARED = 1e-3, 4096


class _Reached(BaseException):
    """Ends a run at a layer; no `except Exception` on the way takes it."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class _Unread:
    """In place of a tensor that nothing reads any more."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(leaf: Any) -> Any:
        """What is no number of floating point stays, since it may steer the pass."""
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return _Unread(leaf.shape, leaf.stride(), leaf.dtype, leaf.device)


@dataclass
class Paused:
    """A pass over one batch that stopped: what is still read of what modules gave, and tensors set aside for layers."""

    given: dict[Call, Any] = field(default_factory=dict)
    aside: dict[str, Tensor] = field(default_factory=dict)

    def bytes(self) -> int:
        """That it holds in memory."""
        leaves = pytree.tree_leaves((list(self.given.values()), list(self.aside.values())))
        storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@dataclass(frozen=True)
class Stops:
    """Where passes stop.

    Attributes:
        side: Before layers or after them.
        over: By layer, in the order in which they run: the outermost calls that are over by then, and whether anything
            reads later what they gave. Empty where a pass has to begin anew.
        rewritten: Calls whose outputs functions overwrite: those are given as copies.
    """

    side: Side
    over: dict[str, dict[Call, bool]]
    rewritten: set[Call]

    @staticmethod
    def of(flow: Dataflow, paths: Iterable[str], side: Side) -> Stops:
        """At those of the layers that run; at the first call of one that runs several times."""
        layers: dict[str, Call] = {}
        for call in sorted(flow.begins, key=flow.begins.__getitem__):
            layers.setdefault(call[-1][0], call)
        found = [layers[path] for path in paths if layers.get(path) in flow.ends]
        # A call is over when it has ended; before it begins all is over that ended earlier.
        times = {call: flow.begins[call] - 1 if side == "in" else flow.ends[call] for call in found}
        ordered = sorted(found, key=times.__getitem__)
        over = {call[-1][0]: flow.over(times[call]) for call in ordered}
        return Stops(side, over, flow.rewritten(times.values()))


class PartialPasses:
    """Passes of a model that go on where they stopped, and set tensors aside on the way.

    What they change of the model, which is in the mode in which it shall run, is not taken back here. `fill` is written
    into tensors that nothing should read.
    """

    def __init__(self, calls: Calls, stops: Stops, asides: Asides, fill: float | None = None) -> None:
        self.calls, self.stops, self.asides, self.fill = calls, stops, asides, fill
        self.modules = modules_of(calls.model)
        self.order = {path: number for number, path in enumerate(stops.over)}

    def run(self, paused: Paused, inputs: Callable[[], Any], path: str) -> Tensor | None:
        """Go on to this layer; returns what it reads or gives, see `Stops`, or None if the pass does not reach it.

        Args:
            paused: Where the pass over these inputs stopped before; brought up to date.
            inputs: Makes what `forward` takes; not called where nothing reads it any more.
            path: Of the layer: this one or one behind that where it stopped.
        """
        over, after = self.stops.over[path], dict[Call, Any]()
        before = paused.given if over else {}
        taken = _filled(before[INPUTS], self.fill) if INPUTS in before else inputs()
        if not over.get(INPUTS, True):
            after[INPUTS] = pytree.tree_map(_Unread.of, taken)

        def visit(call: Call, args: Any, kwargs: Any, forward: Callable[[], Any]) -> Any:
            here = call[-1][0]
            if call in before:
                value = before[call]
                answer = self._again(call, value)
            else:
                if here == path and self.stops.side == "in":
                    raise _Reached(given(self.modules[here], args, kwargs))
                self._set_aside(paused, path, here, "in", args, kwargs)
                value = answer = forward()
                self._set_aside(paused, path, here, "out", (answer,), {})
                if call in over and over[call] and call in self.stops.rewritten:
                    value = _copied(answer)
            if call in over:
                after[call] = value if over[call] else pytree.tree_map(_Unread.of, value)
            if here == path:
                raise _Reached(answer)
            return answer

        try:
            self.calls.run(taken, visit)
        except _Reached as reached:
            paused.given = after
            paused.aside = {k: x for k, x in paused.aside.items() if self.order[k] >= self.order[path]}
            value: Tensor = reached.value
            return value
        return None

    def later(
        self, paused: Paused, inputs: Callable[[], Any], path: str, chosen: Container[Call]
    ) -> dict[Call, Tensor]:
        """What a layer reads or gives in calls behind the one where the pass stopped; it stays where it is."""
        before = paused.given if self.stops.over[path] else {}
        found: dict[Call, Tensor] = {}

        def visit(call: Call, args: Any, kwargs: Any, forward: Callable[[], Any]) -> Any:
            if call in before:
                return self._again(call, before[call])
            if call in chosen and self.stops.side == "in":
                found[call] = given(self.modules[path], args, kwargs)
            answer = forward()
            if call in chosen and self.stops.side == "out":
                found[call] = answer
            return answer

        self.calls.run(_filled(before[INPUTS], self.fill) if INPUTS in before else inputs(), visit)
        return found

    def _again(self, call: Call, value: Any) -> Any:
        """What a call that is over gave."""
        again = _copied if call in self.stops.rewritten else _filled
        return again(value, self.fill)

    def _set_aside(self, paused: Paused, until: str, path: str, side: Side, args: Any, kwargs: Any) -> None:
        for layer, place in self.asides.items():
            if place == (path, side) and self.order.get(layer, -1) >= self.order[until]:
                value = args[0] if side == "out" else given(self.modules[path], args, kwargs)
                paused.aside[layer] = value


def _filled(value: Any, fill: float | None) -> Any:
    """With something of the right form in place of what nothing reads."""

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, _Unread):
            return leaf
        empty = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype, device=leaf.device)
        return empty if fill is None else empty.fill_(fill)

    return pytree.tree_map(made, value)


def _copied(value: Any, fill: float | None = None) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, _filled(value, fill))


def tried(calls: Calls, stops: Stops, first: Any, second: Any) -> Stops:
    """These stops, without what is held at those where it does not do.

    Both inputs, of one form, run in turn: a module may remember what it saw last.
    """
    wanted = _undisturbed(calls, stops, first)
    passes, one, two = PartialPasses(calls, stops, {}, fill=nan), Paused(), Paused()
    for path, known in wanted.items():
        try:
            passes.run(two, lambda: second, path)
            found = passes.run(one, lambda: first, path)
        except Exception:  # what the model's own code says to NaN
            found = None
        if found is None or not _agree(_few(found), known):
            stops.over[path].clear()
            one, two = Paused(), Paused()
    return stops


def _undisturbed(calls: Calls, stops: Stops, inputs: Any) -> dict[str, Tensor]:
    """Some of what layers find in one pass."""
    found: dict[str, Tensor] = {}
    modules = modules_of(calls.model)

    def visit(call: Call, args: Any, kwargs: Any, forward: Callable[[], Any]) -> Any:
        path = call[-1][0]
        first = path in stops.over and path not in found
        if first and stops.side == "in":
            found[path] = _few(given(modules[path], args, kwargs))
        output = forward()
        if first and stops.side == "out":
            found[path] = _few(output)
        return output

    calls.run(inputs, visit)
    return {path: found[path] for path in stops.over if path in found}


def _few(x: Tensor) -> Tensor:
    every = max(x.numel() // _COMPARED, 1)
    return x.detach().reshape(-1)[::every].clone()


def _agree(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = _SAME * float(b.double().square().mean().sqrt())
    return bool(((a - b).abs() <= tolerance).all())
