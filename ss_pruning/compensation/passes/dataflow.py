"""Which outputs of modules are still read at some moment of a forward pass, from one pass that is watched.

A pass is a list of events: a function read these tensors and made those, a module was called and gave those. When it
is run again from some moment on, a module whose call was over by then need not run: it gives again what it gave.
Functions outside of such calls do run again. Walking the events backwards tells which of these outputs, and of the
inputs, reach anything to come, or steer the pass; the others need no content.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import tensors_among
from ss_pruning.compensation.passes.calls import INPUTS, Call, Calls

_PLAIN = (bool, int, float, str, type(None))
_NONE: frozenset[int] = frozenset()
# What functions make that ask a tensor for its numbers: they may steer the pass, so that it is always needed.
_ANSWER = frozenset({-1})
_ASK = frozenset(
    {
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__bool__,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__index__,
        Tensor.equal,
        Tensor.allclose,
        Tensor.is_nonzero,
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
        torch._assert,
    }
)


class _Event(NamedTuple):
    """What was read, made and written into, by `id`, in which call; `gave` is the call that ended so, if one did."""

    time: int
    within: Call
    read: frozenset[int]
    made: frozenset[int]
    written: frozenset[int] = _NONE
    gave: Call | None = None


@dataclass
class Dataflow:
    """What a pass read and made.

    Attributes:
        events: In the order of time.
        begins: When each call began.
        ends: When it ended; only of calls whose outputs are tensors and plain values, which can be given again.
        sizes: By call, the shape of the first tensor that it gave.
        alive: All tensors, so that no `id` is used twice while events are made.
    """

    events: list[_Event] = field(default_factory=list)
    begins: dict[Call, int] = field(default_factory=dict)
    ends: dict[Call, int] = field(default_factory=dict)
    sizes: dict[Call, torch.Size] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    @staticmethod
    def of(calls: Calls, inputs: Any) -> Dataflow:
        """Watch one pass over a few inputs; the model has been entered."""
        watch = _Watch()
        with torch.inference_mode(False), torch.no_grad(), watch:  # there nobody counts what is written
            watch.flow.ends[INPUTS] = watch.note(_NONE, watch.ids(inputs), gave=INPUTS)
            calls.run(inputs, watch.visit)
        watch.flow.alive.clear()
        return watch.flow

    def over(self, time: int) -> dict[Call, bool]:
        """The outermost calls that are over by then, and `INPUTS`; of each whether what it gave will be read."""
        needed = set(_ANSWER)
        found: dict[Call, bool] = {}
        for event in reversed(self.events):
            if event.time > time:
                needed |= event.read if event.gave is None else _NONE
            elif self.ends.get(event.within, inf) <= time:
                continue  # within something that will not run again
            elif event.gave is None:
                needed |= event.read if needed & event.made else _NONE
            elif event.gave in self.ends:
                found[event.gave] = bool(needed & event.made)
                # What was handed on as it came is read where it came from, too.
                needed -= event.made - event.read
        return found

    def rewritten(self, times: Iterable[int]) -> set[Call]:
        """Calls whose outputs a function overwrites each time that a pass goes on from one of these moments."""
        stops = list(times)
        written: set[int] = set()
        for event in self.events:
            end = self.ends.get(event.within, inf)
            if event.written and any(event.time <= stop < end for stop in stops):
                written |= event.written
        return {e.gave for e in self.events if e.gave is not None and e.made & written}


class _Watch(TorchFunctionMode):
    """Notes what functions and modules take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.flow, self.time, self.within = Dataflow(), itertools.count(), Call()

    def visit(self, call: Call, args: Any, kwargs: Any, forward: Callable[[], Any]) -> Any:
        outer, self.within = self.within, call
        read = self.ids((args, kwargs))
        self.flow.begins[call] = self.note(read, _NONE)
        output = forward()
        self.within = outer
        made = self.ids(output)
        end = self.note(read, made, gave=call)
        leaves = pytree.tree_leaves(output)
        if all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            self.flow.ends[call] = end
        if leaves and isinstance(leaves[0], Tensor):
            self.flow.sizes[call] = leaves[0].shape
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {id(x): _version(x) for x in tensors_among((args, kwargs))}
        read = self.ids((args, kwargs))
        result = func(*args, **kwargs)
        written = frozenset(id(x) for x in tensors_among((args, kwargs)) if _version(x) != before[id(x)])
        made = _ANSWER if func in _ASK else self.ids(result) | written
        if made:
            self.note(read, made, written)
        return result

    def note(
        self,
        read: frozenset[int],
        made: frozenset[int],
        written: frozenset[int] = _NONE,
        gave: Call | None = None,
    ) -> int:
        """Take note of an event; returns its time."""
        event = _Event(next(self.time), self.within, read, made, written, gave)
        self.flow.events.append(event)
        return event.time

    def ids(self, value: Any) -> frozenset[int]:
        """Of the tensors in there, none of which anybody else will have."""
        tensors = tensors_among(value)
        self.flow.alive += tensors
        return frozenset(map(id, tensors))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
