"""How much of the output goes when a group shrinks, measured: what makes channels of different layers comparable.

Scores order the channels of a group well and compare groups badly: no score of one layer knows what the layers behind
it make of its loss, nor what they can make up for. So every group is shrunk by itself, to a few widths, on a few
images, and its consumers find in place of what is gone what the compensation will leave them:

* "none": nothing; "mean": its mean;
* "linear", "reconstruct": what the channels that stay tell of it, by linear regression;
* "reconstruct": every layer behind is fitted to what it puts out in the dense model, scale and shift a channel, in
place
  of the solve that will come: what that takes back is no output error;
* where batch norms will follow the cut (`ss_pruning.compensation.batchnorm`), they do so here;
* the output error is the share of the output's variance that is lost.

All widths of a group run in one batch, and what comes before it once. The lower convex hull of output error over width
gives each channel the output error that its removal adds, in the order of the scores. What no layer behind takes back
adds up from one to the next, and output error beside whole layers says too little: without "reconstruct" it is measured
again in a model whose other groups are cut as the first measurement would have it. Of both and their sum that is taken
whose whole cut loses least.

The idea of measuring every layer's sensitivity by itself is from Li et al. (2017), "Pruning filters for efficient
ConvNets", section 3.2; they did not repair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ss_pruning._utils.arrays import Floats, Ints
from ss_pruning._utils.running import preserved
from ss_pruning.config import LEAST_IMAGES, SOLVED, Method
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Coupling, PruningGroup, pruned_of, ranks_of, step_scores
from ss_pruning.importance.activation_stats import measure
from ss_pruning.importance.batched_ablation import OTHERWISE, BatchedAblation
from ss_pruning.importance.calibration import Batch

# Widths are measured on so many of the images.
_IMAGES = 32
# Widths, as shares of the most that may go.
_WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
# This share of the scores' mean is added to each: dead channels need a place in the order, too.
_EVEN, _NUDGE = 1e-3, 1e-15


def by_sensitivity(
    model: nn.Module,
    connectivity: Connectivity,
    coupling: Coupling,
    scores: Sequence[Sequence[Floats]],
    images: Any,
    batch: int,
    max_ratio: float,
    method: Method = "reconstruct",
    taken: Callable[[list[list[Floats]]], Ints] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    follow: bool = False,
) -> list[list[Floats]]:
    """Scores in the same order within each group, that tell how much output error each channel set's removal adds.

    Takes at most a pass over 6 x 32 images a group, and one more with `taken`.

    Args:
        model: The dense model; not changed.
        connectivity: Its connectivity.
        coupling: Its groups.
        scores: By group and subgroup, one score a channel set; those with an infinite one stay.
        images: Calibration inputs.
        batch: Activation statistics are taken on so many of them at a time.
        max_ratio: No group will lose a larger share of its channels.
        method: How the cut will be compensated.
        taken: Says by such scores how many steps each group would take, `[groups]`. If it is given, output error is
            measured again: what is added to that of the other groups, cut so.
        progress: Called with (groups done, groups in all), of all measurements.
        follow: Batch norms will follow the cut.

    Returns:
        By group and subgroup, the output error of each channel set as a share of the output's variance.

    Raises:
        InputError: Too few images.
        ModelError: The model's outputs do not tell images apart, or are not finite.
    """
    images = Batch.of(images)
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
    consumers = dict.fromkeys(path for group in coupling.groups for path in _readers(group, connectivity))
    held, others = _held_out(images)
    with preserved(model, training=False), torch.no_grad():
        statistics = measure(
            model, connectivity, others.split(batch), None, list(consumers), covariance=method in SOLVED
        )
        ablation = BatchedAblation(model, connectivity, held, statistics, method, follow)
        if taken is None or not scores:
            return _measured(ablation, coupling, scores, max_ratio, {}, progress)
        half, whole = len(scores), 2 * len(scores)
        alone = _measured(ablation, coupling, scores, max_ratio, {}, lambda n, _: progress(n, whole))
        context = _context(coupling, connectivity, alone, taken(alone))
        joint = _measured(
            ablation, coupling, scores, max_ratio, context, lambda n, _: progress(half + n, whole)
        )
        choices = [alone, joint, _sum(alone, joint)]
        lost = ablation.sensitivity(
            [_context(coupling, connectivity, choice, taken(choice)) for choice in choices]
        )
    return choices[int(lost.argmin())]


def _held_out(images: Any) -> tuple[Batch, Batch]:
    """Images to measure on and the others, on which the regressions are fitted: few rows explain themselves."""
    batch = Batch.of(images)
    rows = torch.arange(len(batch)).reshape(-1, batch.unit)
    chosen = torch.linspace(0, len(rows) - 1, min(max(_IMAGES // batch.unit, 1), len(rows) // 2)).long()
    stays = torch.ones(len(rows), dtype=torch.bool)
    stays[chosen] = False
    return batch[rows[chosen].flatten()], batch[rows[stays].flatten()]


def _readers(group: PruningGroup, connectivity: Connectivity) -> list[str]:
    """The layers that mix channels of the group."""
    members = (m for subgroup in group.subgroups for m in subgroup.members if m.side == "in")
    return list(dict.fromkeys(m.path for m in members if connectivity.layers[m.path].kind == "synaptic"))


def _measured(
    ablation: BatchedAblation,
    coupling: Coupling,
    scores: Sequence[Sequence[Floats]],
    max_ratio: float,
    context: Mapping[str, Ints],
    progress: Callable[[int, int], None],
) -> list[list[Floats]]:
    """By group and subgroup, each channel set's output error, with the other groups cut as the context says."""
    found = []
    for number, (group, subgroups) in enumerate(zip(coupling.groups, scores, strict=True)):
        progress(number, len(scores))
        found.append(_scored(ablation, group, subgroups, max_ratio, context))
    progress(len(scores), len(scores))
    return found


def _sum(first: Sequence[Sequence[Floats]], second: Sequence[Sequence[Floats]]) -> list[list[Floats]]:
    pairs = zip(first, second, strict=True)
    return [[a + b for a, b in zip(*subgroups, strict=True)] for subgroups in pairs]


def _context(
    coupling: Coupling, connectivity: Connectivity, scores: Sequence[Sequence[Floats]], taken: Ints
) -> dict[str, Ints]:
    """By consumer, the input channels that go when each group takes so many steps."""
    pruned: dict[str, list[Ints]] = {}
    for group, subgroups, steps in zip(coupling.groups, scores, taken.tolist(), strict=True):
        for path, channels in _removed(
            group, ranks_of(subgroups), steps, _readers(group, connectivity)
        ).items():
            pruned.setdefault(path, []).append(channels)
    return {path: np.concatenate(parts) for path, parts in pruned.items()}


def _scored(
    ablation: BatchedAblation,
    group: PruningGroup,
    subgroups: Sequence[Floats],
    max_ratio: float,
    context: Mapping[str, Ints],
) -> list[Floats]:
    consumers, ranks = _readers(group, ablation.connectivity), ranks_of(subgroups)
    summed = step_scores(group, subgroups, ranks)
    free = int(np.isfinite(summed).sum())  # they are ascending: what is kept comes last
    most = min(int(max_ratio * group.steps + 1e-9), group.steps - group.least, free)
    if most < 1 or not consumers:  # nothing is measured where nothing can go, or nobody hears of it
        return [np.full(len(subgroup), np.inf) for subgroup in subgroups]
    stops = np.unique(np.ceil(np.array(_WIDTHS) * most).astype(np.int64))
    cuts = [_removed(group, ranks, int(stop), consumers) for stop in stops]
    own = _removed(group, ranks, group.steps, consumers)
    others = {path: np.setdiff1d(pruned, own.get(path, ())) for path, pruned in context.items()}
    uncut: list[dict[str, Ints]] = [{}] if others else []
    lost = ablation.sensitivity([_joined(others, cut) for cut in (*uncut, *cuts)])
    sensitivity = (lost[1:] - lost[0]).clip(0) if others else lost
    added = added_by(stops, sensitivity, summed)
    per_step = sum(subgroup.size for subgroup in group.subgroups) / group.steps
    found = []
    for rank in ranks:
        values = np.empty(len(rank))
        values[rank] = np.repeat(added / per_step, len(rank) // group.steps)
        found.append(values)
    return found


def _removed(
    group: PruningGroup, ranks: Sequence[Ints], steps: int, consumers: Sequence[str]
) -> dict[str, Ints]:
    """By consumer, the input channels that go with the first `steps` of the group."""
    pruned = pruned_of(group, ranks, steps)
    return {path: pruned[path, "in"] for path in consumers if (path, "in") in pruned}


def _joined(first: Mapping[str, Ints], second: Mapping[str, Ints]) -> dict[str, Ints]:
    return {
        path: np.concatenate([part[path] for part in (first, second) if path in part])
        for path in (*first, *second)
    }


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
