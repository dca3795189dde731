"""Where a pruned model is compared with the dense one: the feature maps that its blocks and stages end with.

A stage is a run of blocks on maps of one size; its end carries all that later layers get to see, and its channels mean
the same in both models, but that some are missing. So do those of a block within a stage that has lost none, as in a
residual stream that keeps all of its channels. Found by running both models, and by the label probe where channels are
missing; names of modules say nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import call, preserved
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.layers import kind_of
from ss_pruning.graph.tracing import Source, trace_outputs
from ss_pruning.surgery.plan import plan_of

#: Shapes of what modules return, by path, in the order in which they return it.
_Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Place:
    """A module whose output both models are compared at.

    Attributes:
        path: Module path in both models; "" is the model itself.
        axis: Axis of the output that holds the channels, where some are missing.
        kept: By channel of the pruned model's output, its number in the dense model's; None: all are there.
    """

    path: str
    axis: int = 1
    kept: tuple[int, ...] | None = None

    def of_dense(self, output: Tensor) -> Tensor:
        """What the pruned model should return, of what the dense one does."""
        if self.kept is None:
            return output
        return output.index_select(self.axis, torch.tensor(self.kept, device=output.device))


def find_places(model: nn.Module, dense: nn.Module, example_inputs: Any) -> tuple[Place, ...]:
    """The ends of the stages of both models, and of blocks that lost no channel; the outputs where there is no other.

    The pruned model carries its plan; neither is changed.

    Raises:
        InputError: A model does not run on the inputs, there is no tensor that both have, or the pruned one carries no
            plan that tells which channels it kept.
    """
    ours, theirs = _outputs(model, example_inputs, "pruned"), _outputs(dense, example_inputs, "dense")
    shared = {path: shape for path, shape in theirs.items() if _is_thinner(ours.get(path), shape)}
    blocks = _blocks(dense)
    ends = _ends({path: shape for path, shape in shared.items() if path in blocks})
    if len(ends) < 2:  # no blocks, or one around all layers
        ends = _ends(shared)
    whole = {path for path in _maps(shared) if path in blocks and ours[path] == theirs[path]}
    ends = [path for path in shared if path in whole or path in ends]
    axes = {path: axis for path in ends if (axis := _odd_axis(ours[path], theirs[path])) is not None}
    kept = _kept(model, dense, example_inputs, axes) if axes else {}
    places = [
        Place(path, axes.get(path, 1), kept.get(path)) for path in ends if path in kept or path not in axes
    ]
    if not places and theirs.get("") is not None and ours.get("") == theirs[""]:
        places = [Place("")]
    if not places:
        raise InputError("the two models have no feature map and no output in common that could be compared")
    return tuple(places)


def _outputs(model: nn.Module, example_inputs: Any, which: str) -> _Shapes:
    """What modules that run once return, if it is one tensor; the outermost, where one returns what another did."""
    returned: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def note(path: str, _: nn.Module, __: Any, output: Any) -> None:
        calls[path] += 1
        if isinstance(output, Tensor) and output.is_floating_point():
            returned[path] = output

    try:
        with torch.no_grad(), preserved(model, training=False), hooked(modules_of(model), after=note):
            call(model, example_inputs)
    except Exception as error:
        raise InputError(
            f"the {which} model does not run on these images ({type(error).__name__}: {error}); give images of the "
            "size, type and device that it takes, and example_inputs= where it takes just so many at once"
        ) from error
    outermost = {id(output): path for path, output in returned.items()}
    return {p: output.shape for p, output in returned.items() if calls[p] == 1 and outermost[id(output)] == p}


def _is_thinner(ours: torch.Size | None, theirs: torch.Size) -> bool:
    """Whether a shape differs on one axis at most, on which it is smaller."""
    if ours is None or len(ours) != len(theirs):
        return False
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    return not pairs or (len(pairs) == 1 and pairs[0][0] < pairs[0][1])


def _odd_axis(ours: torch.Size, theirs: torch.Size) -> int | None:
    return next((axis for axis, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def _blocks(model: nn.Module) -> set[str]:
    """Paths of modules with at least two layers inside that mix channels or positions."""
    layers = [p for p, m in modules_of(model).items() if kind_of(m) in ("synaptic", "depthwise")]
    inside = Counter(
        ".".join(parts[:depth])
        for parts in (path.split(".") for path in layers if path)
        for depth in range(len(parts))
    )
    return {path for path, count in inside.items() if count > 1}


def _ends(shapes: Mapping[str, torch.Size]) -> list[str]:
    """The last of each run of feature maps with the same positions."""
    maps = _maps(shapes).items()
    return [[path for path, _ in run][-1] for _, run in groupby(maps, key=lambda item: item[1][2:])]


def _maps(shapes: Mapping[str, torch.Size]) -> _Shapes:
    """Those with more than one position, and the usual number of axes."""
    maps = {path: shape for path, shape in shapes.items() if math.prod(shape[2:]) > 1}
    usual = Counter(map(len, maps.values())).most_common(1)
    return {path: shape for path, shape in maps.items() if len(shape) == usual[0][0]}


def _kept(
    model: nn.Module, dense: nn.Module, example_inputs: Any, axes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """By place, which channels of the dense model are there; places where that cannot be told are left out."""
    plan = plan_of(model)
    if not plan.cuts:
        raise InputError(
            f"the pruned model carries no plan, and '{next(iter(axes))}' puts out fewer channels than in the dense "
            "one: give what prune_ or compact_ has made, without anything around it, or read it with ss_pruning.load"
        )
    numbers = {cut.path: cut.kept for cut in plan.cuts if cut.side != "in"}
    try:
        ours, theirs = (trace_outputs(net, example_inputs, axes) for net in (model, dense))
    except ModelError:  # some code between layers has no gradient
        return {}
    found = {path: _matched(ours[path], theirs[path], numbers) for path in axes}
    return {path: kept for path, kept in found.items() if kept is not None}


def _matched(
    ours: Sequence[frozenset[Source]],
    theirs: Sequence[frozenset[Source]],
    numbers: Mapping[str, Sequence[int]],
) -> tuple[int, ...] | None:
    """By channel of a pruned output, the dense channel made from the same sources; None if one has none."""
    waiting: dict[frozenset[Source], deque[int]] = defaultdict(deque)
    stays = {path: set(kept) for path, kept in numbers.items()}
    for channel, sources in enumerate(theirs):
        left = frozenset((path, c) for path, c in sources if path not in stays or c in stays[path])
        waiting[left].append(channel)
    found = []
    for sources in ours:
        known = frozenset((path, numbers[path][c] if path in numbers else c) for path, c in sources)
        if not known or not waiting[known]:
            return None
        found.append(waiting[known].popleft())
    return tuple(found)
