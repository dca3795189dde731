"""How much of the output goes when a group shrinks: what makes channels of different layers comparable.

Scores order the channels of a group well and compare groups badly: no score of one layer knows what the layers behind
it make of its loss, nor what they can make up for. How the error of a group grows with its width, as its consumers
see it, follows in closed form from what they read (`ss_pruning.importance.conditional_variance`). What the output
makes of it is measured: every group is shrunk by itself to a few widths, on a few images, and its consumers find in
place of what is gone what the compensation will leave them:

* "none": nothing; "mean": its mean;
* "linear", "reconstruct": what the channels that stay tell of it, by linear regression;
* "reconstruct": every layer behind is fitted to what it puts out in the dense model, scale and shift a channel, in
  place of the solve that will come: what that takes back is no output error;
* where batch norms will follow the cut (`ss_pruning.compensation.batchnorm`), they do so here;
* the output error is the share of the output's variance that is lost.

Several groups run in one batch, each in a copy of its own, and what comes before them once. The lower convex hull of
output error over width gives each channel the output error that its removal adds, in the order of the scores. What no
layer behind takes back adds up from one to the next, and output error beside whole layers says too little: without
"reconstruct" it is measured again in a model whose other groups are cut as the first measurement would have it. Both,
their sum and whatever else the caller ranks by compete: that is taken whose whole cut loses least.

The idea of measuring every layer's sensitivity by itself is from Li et al. (2017), "Pruning filters for efficient
ConvNets", section 3.2; they did not repair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning._utils.progress import part, step
from ss_pruning._utils.running import preserved
from ss_pruning.config import LEAST_IMAGES, Method
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import PruningGroup, ranks_of, step_scores
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.activation_stats import ActivationStatistics, measure
from ss_pruning.importance.batched_ablation import OTHERWISE, BatchedAblation, is_output, output_key
from ss_pruning.importance.calibration import BATCH, Batch

# What is small, so many numbers an input at most, can be measured thoroughly.
_SMALL = 2**14
# Copies that run at a time have about so many images together.
_ROWS = 64
# This share of the scores' mean is added to each: dead channels need a place in the order, too.
_EVEN, _NUDGE = 1e-3, 1e-15


#: By group and subgroup, one a channel set.
Scores = list[list[Floats]]


@dataclass(frozen=True)
class Effort:
    """How output error is measured.

    Attributes:
        images: On so many of the images.
        widths: At these, as shares of the most that may go; between them the local error tells how it grows.
    """

    images: int
    widths: tuple[float, ...]


#: Where the layers behind are fitted, which forgives most of it; for large inputs; for small ones.
REFITTED, QUICK = Effort(8, (0.5, 1.0)), Effort(16, (0.5, 1.0))
THOROUGH = Effort(32, (0.125, 0.25, 0.5, 0.75, 1.0))


@dataclass(frozen=True)
class Shrinking:
    """How groups are going to shrink.

    Attributes:
        max_ratio: No group will lose a larger share of its channels.
        method: How the cut will be compensated.
        follow: Batch norms will follow the cut.
        taken: From scores, `[groups]`: how many steps each group would take to meet the budget. If it is given, output
            error is measured a second time (not with "reconstruct"), with all other groups cut by so many steps.
        rivals: From the measured sensitivities, all scores that compete; those win whose cut by `taken` loses least.
        effort: How output error is measured; by default what suits method and images.
    """

    max_ratio: float = 0.9
    method: Method = "reconstruct"
    follow: bool = False
    taken: Callable[[Scores], Ints] | None = None
    rivals: Callable[[list[Scores]], list[Scores]] = list
    effort: Effort | None = None


def by_sensitivity(
    traced: TracedModel,
    scores: Sequence[Sequence[Floats]],
    images: Any,
    shrinking: Shrinking,
    known: Mapping[str, ActivationStatistics] | None = None,
) -> Scores:
    """Scores in the same order within each group, that tell how much output error each channel set's removal adds.

    Takes a pass over all images, at most one over 40 a group (over 192 where inputs are small and nothing is fitted
    behind), and as much again with `taken`. Groups done, of all measurements, are told to whoever listens
    (`ss_pruning._utils.progress`).

    Args:
        traced: The dense model; not changed.
        scores: By group and subgroup, one score a channel set; those with an infinite one stay.
        images: Calibration inputs.
        shrinking: How groups are going to shrink.
        known: Statistics of what layers read, with covariances, if they are at hand: of images that output error is
            not measured on, see `set_aside`; else they are measured on those.

    Returns:
        By group and subgroup, the output error of each channel set as a share of the output's variance.

    Raises:
        InputError: Too few images.
        ModelError: The model's outputs do not tell images apart, or are not finite.
    """
    images = Batch.of(images)
    _check(images)
    model, connectivity, groups = traced.model, traced.connectivity, traced.coupling.groups
    consumers = dict.fromkeys(path for group in groups for path in _consumers(group, connectivity))
    effort = shrinking.effort or effort_for(shrinking.method, images)
    held, others = set_aside(images, effort.images)
    with preserved(model, training=False), torch.no_grad():
        statistics = known or {}
        if not consumers.keys() <= statistics.keys():
            with part(0.0, 0.0):  # one pass, beside many
                statistics = measure(
                    model, connectivity, others.split(BATCH), None, list(consumers), covariance=True
                )
        ablation = BatchedAblation(model, connectivity, held, statistics, shrinking.method, shrinking.follow)
        pairs = zip(groups, scores, strict=True)
        shrinkages = [
            _shrinkage(ablation, group, subgroups, shrinking.max_ratio, effort.widths)
            for group, subgroups in pairs
        ]
        taken, again = shrinking.taken, shrinking.method != "reconstruct"
        count = len(scores) * (1 if taken is None or not again else 2)
        alone = _measured(ablation, shrinkages, [0] * len(scores), lambda done: step(done, count))
        if taken is None or not scores:
            return alone
        found = [alone]
        if again:
            context = taken(alone).tolist()
            beside = _measured(ablation, shrinkages, context, lambda done: step(len(scores) + done, count))
            found += [beside, _sum(alone, beside)]
        choices = shrinking.rivals(found)
        cuts = [_joined(shrinkages, taken(choice).tolist()) for choice in choices]
        return choices[_least(ablation, cuts)]


def effort_for(method: Method, images: Batch) -> Effort:
    """How output error is measured by default, when the cut is compensated so, on such images."""
    if method == "reconstruct":
        return REFITTED
    return THOROUGH if images.numbers <= _SMALL else QUICK


def _check(images: Batch) -> None:
    if images.most:
        raise ModelError(
            f"the model runs on no more than {images.most} inputs at once, so that channels cannot be measured side by "
            f"side; {OTHERWISE}"
        )
    if len(images) < LEAST_IMAGES:
        raise InputError(
            f"allocation='sensitivity' needs {LEAST_IMAGES} calibration inputs or more, there are {len(images)}; give "
            f"more, or {OTHERWISE}"
        )


def set_aside(images: Any, count: int) -> tuple[Batch, Batch]:
    """Images to measure on and the others, on which the regressions are fitted: few rows explain themselves."""
    batch = Batch.of(images)
    units = len(batch) // batch.unit
    chosen = torch.linspace(0, units - 1, min(max(count // batch.unit, 1), units // 2)).long()
    others = torch.arange(units)[~torch.isin(torch.arange(units), chosen)]
    return batch.of_units(chosen), batch.of_units(others)


def _consumers(group: PruningGroup, connectivity: Connectivity) -> list[str]:
    """The layers that read channels of the group and mix them."""
    members = (m for m in group.members if m.side == "in")
    return list(dict.fromkeys(m.path for m in members if connectivity.layers[m.path].kind == "synaptic"))


@dataclass(frozen=True)
class _Shrinkage:
    """How a group shrinks, and what its consumers lose by that.

    Attributes:
        ranks: By subgroup, the channel sets in the order in which they go.
        scores: `[steps]`, what goes with each step.
        order: By consumer, `[steps, channels a step]`, the channels that go with each step; those that no layer reads
            by `output_key` of the one that makes them.
        most: So many steps may go.
        error: `[most]`, the local error after each of them.
        shares: Of the most that may go: where output error is measured.
    """

    ranks: list[Ints]
    scores: Floats
    order: dict[str, Ints]
    most: int
    error: Floats
    shares: tuple[float, ...]

    def cut(self, steps: int) -> dict[str, Ints]:
        """By consumer, the channels that go with so many steps."""
        return {path: channels[:steps].ravel() for path, channels in self.order.items() if steps}

    @property
    def widths(self) -> list[int]:
        """The numbers of steps at which output error is measured; none where nothing can go, or nobody hears of it."""
        return sorted({math.ceil(share * self.most) for share in self.shares}) if self.order else []

    def spread(self, lost: Sequence[float]) -> list[Floats]:
        """By subgroup, the output error that each channel set adds, when so much is lost at the widths."""
        if not lost:
            return [np.full(len(rank), np.inf) for rank in self.ranks]
        stops = np.arange(1, self.most + 1)
        # Where the local error says that nothing is lost it says nothing of how that grows, either.
        error = np.maximum.accumulate(self.error) + _NUDGE * stops
        measured = error[np.array(self.widths) - 1]
        grown = np.interp(error, [0.0, *measured], [0.0, *lost])
        added = added_by(stops, grown, self.scores)
        count = len(self.scores)
        found = []
        for rank in self.ranks:
            values = np.empty(len(rank))
            values[rank] = np.repeat(added * count / sum(map(len, self.ranks)), len(rank) // count)
            found.append(values)
        return found


def _shrinkage(
    ablation: BatchedAblation,
    group: PruningGroup,
    subgroups: Sequence[Floats],
    max_ratio: float,
    shares: tuple[float, ...] = QUICK.widths,
) -> _Shrinkage:
    ranks = ranks_of(subgroups)
    scores = step_scores(group, subgroups, ranks)  # they are ascending: what is kept comes last
    most = min(int(max_ratio * group.steps + 1e-9), group.steps - group.least, int(np.isfinite(scores).sum()))
    order = _order(group, ranks, _consumers(group, ablation.connectivity)) if most > 0 else {}
    read = {path: channels for path, channels in order.items() if not is_output(path)}
    error = np.zeros(max(most, 0)) if read else scores[: max(most, 0)].copy()
    for path, channels in read.items():
        error += ablation.removal_errors(path, channels[:most].ravel()).reshape(most, -1).sum(1)
    return _Shrinkage(ranks, scores, order, most, np.cumsum(error).clip(0), shares)


def _order(group: PruningGroup, ranks: Sequence[Ints], consumers: Sequence[str]) -> dict[str, Ints]:
    """By consumer, `[steps, channels a step]`: the channels that go with each step, see `_Shrinkage`."""
    parts: dict[str, list[Ints]] = {path: [] for path in consumers}
    for subgroup, rank in zip(group.subgroups, ranks, strict=True):
        for member in subgroup.members:
            if member.side == "in" and member.path in parts:
                parts[member.path].append(member.index[rank].reshape(group.steps, -1))
        for member in subgroup.unread:
            parts.setdefault(output_key(member.path), []).append(member.index[rank].reshape(group.steps, -1))
    return {path: np.concatenate(columns, 1) for path, columns in parts.items()}


def _measured(
    ablation: BatchedAblation,
    shrinkages: Sequence[_Shrinkage],
    context: Sequence[int],
    progress: Callable[[int], None],
) -> list[list[Floats]]:
    """By group and subgroup, what each channel set adds to the output error of the others, cut by so many steps."""
    found: dict[tuple[int, int], float] = {}
    for numbers in _parts(ablation, shrinkages, progress):
        runs = [(n, width) for n in numbers for width in (0, *shrinkages[n].widths) if width or any(context)]
        cuts = [_joined(shrinkages, [*context[:n], width, *context[n + 1 :]]) for n, width in runs]
        found |= dict(zip(runs, ablation.sensitivity(cuts).tolist(), strict=True))
    return [
        s.spread([max(found[n, width] - found.get((n, 0), 0.0), 0.0) for width in s.widths])
        for n, s in enumerate(shrinkages)
    ]


def _least(ablation: BatchedAblation, cuts: Sequence[Mapping[str, Ints]]) -> int:
    """The number of the cut that loses least; of those that lose the same, the first."""
    size = max(1, _ROWS // len(ablation.batch) - 1)
    parts = [ablation.sensitivity(cuts[start : start + size]) for start in range(0, len(cuts), size)]
    return int(np.concatenate(parts).argmin())


def _parts(
    ablation: BatchedAblation, shrinkages: Sequence[_Shrinkage], progress: Callable[[int], None]
) -> Iterator[list[int]]:
    """The numbers of groups that are measured in one batch: neighbours, of which little runs in vain."""
    begin = {n: min(map(ablation.begin, s.order)) for n, s in enumerate(shrinkages) if s.widths}
    order = sorted(begin, key=begin.__getitem__)
    size = at_a_time(len(ablation.batch), max((len(s.shares) for s in shrinkages), default=1))
    for start in range(0, len(order), size):
        progress(start)
        yield order[start : start + size]
    progress(len(shrinkages))


def at_a_time(images: int, widths: int) -> int:
    """How many groups are measured in one batch, each at so many widths."""
    return max(1, (_ROWS // images - 1) // widths)


def _joined(shrinkages: Sequence[_Shrinkage], steps: Sequence[int]) -> dict[str, Ints]:
    """By consumer, the input channels that go when each group takes so many steps."""
    pruned: dict[str, list[Ints]] = {}
    for shrinkage, count in zip(shrinkages, steps, strict=True):
        for path, channels in shrinkage.cut(count).items():
            pruned.setdefault(path, []).append(channels)
    return {path: np.concatenate(parts) for path, parts in pruned.items()}


def _sum(first: Sequence[Sequence[Floats]], second: Sequence[Sequence[Floats]]) -> list[list[Floats]]:
    pairs = zip(first, second, strict=True)
    return [[a + b for a, b in zip(*subgroups, strict=True)] for subgroups in pairs]


def added_by(stops: Ints, sensitivity: Floats, scores: Floats) -> Floats:
    """`[steps]`: the output error that each step adds, growing from step to step.

    Args:
        stops: Numbers of steps after which the output error was measured, ascending.
        sensitivity: What it was; between the corners of its lower convex hull it is spread as the scores are.
        scores: `[steps]`, ascending; what is infinite stays so.
    """
    corners = _hull(np.array([0, *stops]), np.maximum.accumulate([0.0, *sensitivity]))
    ends = np.array([stop for stop, _ in corners])
    most = ends[-1]
    weights = scores[:most] + max(float(scores[:most].mean()), 1e-300) * _EVEN
    piece = np.diff([at for _, at in corners]) / np.add.reduceat(weights, ends[:-1])
    added = np.sort(weights * np.repeat(piece, np.diff(ends)))
    beyond = np.where(np.isfinite(scores[most:]), added[-1], np.inf)
    # Where nothing is lost the order of the scores must not be, either.
    ordered: Floats = np.concatenate([added, beyond]) + _NUDGE * np.arange(len(scores))
    return ordered


def _hull(x: Ints, y: Floats) -> list[tuple[int, float]]:
    """The corners of the lower convex hull of points that ascend in x."""
    corners: list[tuple[int, float]] = []
    for c in zip(x.tolist(), y.tolist(), strict=True):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (c[1] - b[1]) * (b[0] - a[0]) > (b[1] - a[1]) * (c[0] - b[0]):
                break
            corners.pop()
        corners.append(c)
    return corners
