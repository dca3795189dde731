"""Reconstruction: solve the remaining weights anew so that the pruned model puts out what the dense one does.

Layer by layer in forward order, each layer's weights and bias are fitted by ridge least squares: fed with the *pruned*
model's input it should reproduce the *dense* layer's output. That moves what removed channels carried onto what stays,
and repairs what went wrong upstream. A layer whose output is added to something that is known already (the end of a
residual branch) reproduces the dense *sum*: else the errors of all branches would pile up in the stream, where no
other layer sees them. Norms keep the dense statistics. No labels.

Both models run on a few images at a time, as far as the layer that is to be solved, and go on from there when it has
been (`ss_pruning.compensation.passes.partial`). First layers see many positions of an image, so that few images do.
What passes hold while they wait is bounded: those that do not fit begin anew at the next layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.progress import step
from ss_pruning._utils.running import preserved
from ss_pruning.compensation.folding import IDLE, NO_WEIGHTED_SUM, REGISTERED, Outcome, add_bias, norms_behind
from ss_pruning.compensation.normal_equations import (
    NormalEquations,
    is_weighted_sum,
    outputs_at,
    positions_of,
    with_images,
)
from ss_pruning.compensation.passes.calls import Calls
from ss_pruning.compensation.passes.lockstep import Lockstep, Meeting
from ss_pruning.compensation.passes.memory import give_back
from ss_pruning.compensation.residual_sums import find_sums
from ss_pruning.errors import ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import layer_type_of, width
from ss_pruning.graph.refusals import infinite_numbers
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch
from ss_pruning.importance.regression import weights_by_group
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.factors import gains
from ss_pruning.surgery.plan import Plan

# Of so many images (or positions of a single one) one chooses the ridge, and is not fitted on.
_HELD_OUT = 5
# Rows that a layer is fitted on: so many a parameter of an output, within these bounds.
_ROWS_EACH, _FEWEST_ROWS, _MOST_ROWS = 256, 2**13, 2**16
# Neighbouring positions say much the same: rows come from so many images, and from no larger share of their positions.
_LEAST_IMAGES, _SHARE = 32, 0.25


def reconstruct_(pruned: nn.Module, traced: TracedModel, plan: Plan, images: Any) -> Outcome:
    """Re-solve every layer of `pruned`, in place and in forward order, to put out what the dense model does.

    What is held between layers is bounded, see `ss_pruning.compensation.passes.memory`; the result does not depend on
    the bound.

    Raises:
        ModelError: A layer does not run in the dense model as it does in the pruned one, or is not finite.
    """
    batch, dense, connectivity = Batch.of(images), traced.model, traced.connectivity
    outcome, norms = Outcome(), norms_behind(connectivity)
    paths = _solvable(pruned, connectivity, plan, outcome)
    found = find_sums(dense, batch[: batch.unit].inputs, norms)
    sums = {path: found[path] for path in paths if path in found and not _runs_again(connectivity, path)}
    wanted = {cut.path: _Wanted.of(plan, cut) for cut in plan.cuts if cut.side == "out"}
    solved = map(pruned.get_submodule, connectivity.layers)
    with (
        torch.no_grad(),
        preserved(pruned, training=False, but=solved),
        preserved(dense, training=False),
        Calls(pruned) as small,
        Calls(dense) as large,
    ):
        models = Lockstep(small, large, batch, paths, sums)
        for path in models.order:
            equations = _equations(models, path, pruned.get_submodule(path), wanted.get(path))
            if not equations.rows:
                continue
            weight, bias = equations.solve()
            if not bool(weight.isfinite().all() & bias.isfinite().all()):
                raise ModelError(f"'{path}' reads or puts out {infinite_numbers(weight.dtype)}")
            weights_by_group(equations.module).copy_(weight)
            add_bias(pruned, path, bias, norms, outcome)
            outcome.layers.append(path)
            give_back()
            step(len(outcome.layers), len(models.order))
    outcome.skipped |= dict.fromkeys((path for path in paths if path not in outcome.layers), IDLE)
    return outcome


def _solvable(pruned: nn.Module, connectivity: Connectivity, plan: Plan, outcome: Outcome) -> list[str]:
    """Layers behind a cut that run once and whose output is linear in their weight; frozen ones are meant to stay."""
    touched = {cut.path for cut in plan.cuts}
    trained = any(weight.requires_grad for weight in pruned.parameters())
    paths: list[str] = []
    reached = False
    for path, layer in connectivity.layers.items():
        module = pruned.get_submodule(path)
        reached = reached or path in touched
        if not reached or layer.kind not in ("synaptic", "depthwise"):
            continue
        if layer_type_of(module) is not None:
            outcome.skipped[path] = REGISTERED
            continue
        if trained and not any(weight.requires_grad for weight in module.parameters()):
            outcome.skipped[path] = "it is frozen, while other layers are not"
        elif _counts(module.weight):
            outcome.skipped[path] = "its weight counts 0, 1, 2, ...: it decodes, nothing was learned"
        elif module._parameters.keys() - {"weight", "bias"}:
            outcome.skipped[path] = "it has parameters beside weight and bias"
        elif not is_weighted_sum(module):
            outcome.skipped[path] = NO_WEIGHTED_SUM
        else:
            paths.append(path)
    return paths


def _runs_again(connectivity: Connectivity, path: str) -> bool:
    """Whether a layer is called several times in a pass."""
    return len({edge.call for edge in connectivity.edges[path]}) > 1


def _counts(weight: Any) -> bool:
    """Whether it is whole numbers one after another, as detectors decode distances with; no training leaves those."""
    numbers = weight.detach().flatten().double()
    return len(numbers) > 2 and bool((numbers == torch.arange(len(numbers)).to(numbers)).all())


@dataclass(frozen=True)
class _Wanted:
    """Of a layer that lost outputs: those that stay, and what they are multiplied by."""

    kept: Tensor
    gains: Tensor

    @classmethod
    def of(cls, plan: Plan, cut: Cut) -> _Wanted:
        return cls(torch.tensor(cut.kept), gains(plan.factors, cut))

    def __call__(self, y: Tensor) -> Tensor:
        """Of `[..., outputs]` of the dense layer."""
        y = y.index_select(-1, self.kept.to(y.device))
        return y if bool((self.gains == 1).all()) else y * self.gains.to(y)


def _equations(models: Lockstep, path: str, module: nn.Module, wanted: _Wanted | None) -> NormalEquations:
    """Of one layer, from as many images as it needs."""
    equations, total = NormalEquations(module), max(len(models.batch), 1)
    each = models.sizes[path] / width(models.large.modules[path], "out")
    rows, images = rows_wanted(equations.parameters, each, total)
    share = rows / (images * each)
    for meeting in models.at(path, images):
        x, dense = with_images(module, meeting.x), with_images(module, meeting.wanted)
        size = dense.shape[2:]
        drawn = torch.Generator().manual_seed(int(meeting.numbers[0]) if len(meeting.numbers) else 0)
        count = positions_of(module, dense)
        positions = torch.randperm(count, generator=drawn)[: math.ceil(share * count)].to(x.device)
        y = _targets(module, meeting, positions, wanted)
        alone = total == len(x) == 1
        numbers = torch.arange(len(positions)) if alone else _numbers(meeting.numbers, len(x), total)
        for held_out in (False, True):
            where = ((numbers % _HELD_OUT == 1) == held_out).to(x.device)
            if alone:
                equations.add(x, y[:, where], positions[where], held_out, size)
            else:
                equations.add(x[where], y[where], positions, held_out, size)
    return equations


def rows_wanted(parameters: int, positions: float, total: int) -> tuple[float, int]:
    """How many rows a layer is fitted on, and of how many of `total` images, of so many `positions`, they come."""
    rows = min(max(_ROWS_EACH * parameters, _FEWEST_ROWS), _MOST_ROWS)
    images = min(max(math.ceil(rows / (_SHARE * positions)), _LEAST_IMAGES), total)
    return min(rows, images * positions), images


def _numbers(images: Tensor, rows: int, total: int) -> Tensor:
    """`[rows]`: of which image each is. A layer may see several of one, such as windows."""
    each, rest = divmod(rows, max(len(images), 1))
    return torch.arange(rows) if rest or total < 2 else images.repeat_interleave(each)


def _targets(module: nn.Module, meeting: Meeting, positions: Tensor, wanted: _Wanted | None) -> Tensor:
    """`[images, positions, outputs]`: what the layer shall put out, also to make up for what it is added to."""

    def at(y: Tensor) -> Tensor:
        return outputs_at(module, with_images(module, y), positions)

    small, large = meeting.others or (None, None)
    y = at(meeting.wanted) if large is None else at(meeting.wanted).float() + at(large).float()
    y = y if wanted is None else wanted(y)
    return y if small is None else y.float() - at(small).float()
