"""Two models on the same images, layer by layer: the pruned one up to a layer, the dense one through it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ss_pruning.compensation.passes.calls import Call, Calls
from ss_pruning.compensation.passes.dataflow import Dataflow
from ss_pruning.compensation.passes.memory import memory_bound
from ss_pruning.compensation.passes.partial import PartialPasses, Paused, Side, Stops, tried
from ss_pruning.compensation.residual_sums import Sum, slope
from ss_pruning.errors import ModelError
from ss_pruning.importance.calibration import Batch

# Images run at once: as many as make the largest tensor so many numbers long.
_AT_ONCE = 2**22
# Of a layer that runs more often in a pass, so many calls are looked at.
_CALLS = 8


@dataclass
class _Part:
    """Some of the images, in the order in which they are drawn from `first` on, and how far both models are.

    Attributes:
        held: Bytes that it holds.
    """

    first: int
    images: Tensor
    small: Paused = field(default_factory=Paused)
    large: Paused = field(default_factory=Paused)
    held: int = 0


class Meeting(NamedTuple):
    """What both models have at a layer, of some images.

    Attributes:
        numbers: `[images]`: of the images, in the order in which they are drawn.
        x: What the layer reads in the pruned model.
        wanted: What it gives in the dense one, or reads, see `Lockstep`.
        others: What its output is added to in the pruned and in the dense model, in units of that output; if it is.
    """

    numbers: Tensor
    x: Tensor
    wanted: Tensor
    others: tuple[Tensor, Tensor] | None


class Lockstep:
    """Runs both models to one layer after the other. Images come in a random order, always the same.

    Attributes:
        order: The layers, as they run.
        sizes: By layer, how many numbers it gives for an image, at its first call.
        again: Other calls that are met, of layers that run several times.
    """

    def __init__(
        self,
        small: Calls,
        large: Calls,
        batch: Batch,
        paths: Sequence[str],
        sums: Mapping[str, Sum],
        dense_side: Side = "out",
    ) -> None:
        """See how the dense model runs, and where passes can go on after a stop at the first call of one of `paths`."""
        first, last = batch[: batch.unit].inputs, batch[-batch.unit :].inputs
        flow = Dataflow.of(large, first)
        sides: tuple[Side, Side] = ("in", dense_side)
        before, after = (tried(large, Stops.of(flow, paths, side), first, last) for side in sides)
        asides = {path: (s.module, s.side) for path, s in sums.items()}
        self.small, self.large = PartialPasses(small, before, asides), PartialPasses(large, after, asides)
        self.batch, self.sums, self.order = batch, sums, list(before.over)
        last_first = sorted(flow.sizes, key=flow.begins.__getitem__, reverse=True)
        sizes = {call[-1][0]: math.prod(flow.sizes[call]) / batch.unit for call in last_first}
        self.sizes = {path: sizes[path] for path in self.order}
        self.again = _again(flow, self.order)
        self.parts = _parts(batch, int(_AT_ONCE / max(sizes.values(), default=1)))
        self.bound = memory_bound(large.model)

    def at(self, path: str, images: int) -> Iterator[Meeting]:
        """Take both models to a layer, on so many of the images or some more; those that do not reach it are left out.

        Raises:
            ModelError: The dense model does not reach it where the pruned one does.
        """
        for part in self.parts:
            if part.first >= images:
                break
            if (meeting := self._run(part, path)) is not None:
                yield meeting
                if path in self.again:
                    yield from self._later(part, path)
            self._bound(part)

    def _bound(self, part: _Part) -> None:
        """Let a part begin anew the next time if what it holds is too much beside what the others do."""
        part.held = part.small.bytes() + part.large.bytes()
        if sum(each.held for each in self.parts) > self.bound:
            part.small, part.large, part.held = Paused(), Paused(), 0

    def _run(self, part: _Part, path: str) -> Meeting | None:
        images = self.batch[part.images]
        x, wanted = (
            passes.run(paused, lambda: images.inputs, path)
            for passes, paused in ((self.small, part.small), (self.large, part.large))
        )
        if x is None:
            return None
        if wanted is None:
            raise ModelError(f"'{path}' does not run in the dense model on the calibration images")
        others = None
        if path in self.sums:
            others = self._other(path, self.small, part.small), self._other(path, self.large, part.large)
        return Meeting(torch.arange(part.first, part.first + len(part.images)), x, wanted, others)

    def _later(self, part: _Part, path: str) -> Iterator[Meeting]:
        """At other calls of a layer that runs several times."""
        images, numbers = self.batch[part.images], torch.arange(part.first, part.first + len(part.images))
        x, wanted = (
            passes.later(paused, lambda: images.inputs, path, self.again[path])
            for passes, paused in ((self.small, part.small), (self.large, part.large))
        )
        for call in self.again[path]:
            if call in x and call in wanted:
                yield Meeting(numbers, x[call], wanted[call], None)

    def _other(self, path: str, passes: PartialPasses, paused: Paused) -> Tensor:
        """What the output of a layer is added to, in units of that output: before the norm that scales it."""
        norm, other = self.sums[path].norm, paused.aside.pop(path)
        return other / slope(None if norm is None else passes.modules[norm], other)


def _again(flow: Dataflow, paths: Sequence[str]) -> dict[str, list[Call]]:
    """Of layers that run several times, calls behind the first; of many some, evenly."""
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    for call in sorted(flow.begins, key=flow.begins.__getitem__):
        if call[-1][0] in calls:
            calls[call[-1][0]].append(call)
    every = {path: -(-len(made) // _CALLS) for path, made in calls.items()}
    return {path: made[:: every[path]][1:] for path, made in calls.items() if len(made) > 1}


def _parts(batch: Batch, size: int) -> list[_Part]:
    """About so many of the images each; what must run at once stays together."""
    each = len(batch.at_most(max(size, 1))) if len(batch) else 1
    units = torch.arange(len(batch)).reshape(-1, batch.unit)
    drawn = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(0))].flatten()
    return [_Part(number * each, images) for number, images in enumerate(drawn.split(each))]
