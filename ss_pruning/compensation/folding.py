"""Compensated surgery: what removed channels carried is moved onto what stays, in closed form and without labels.

Three methods, each for any importance:

* **mean**: what a removed channel carries on average becomes part of the consumer's bias. No data needed where a batch
  norm tells it; without data, other channels are left alone unless they always put out the same.
* **linear**: removed channels are regressed on the kept ones over calibration pixels, `x_r ~ A x_k + b`, and folded:
  `W[:, k] += W[:, r] A`. Exact if the removed channels are linear in the kept ones.
* **reconstruct**: see `ss_pruning.compensation.reconstruction`.

After `mean` and `linear` batch norms follow what is left, see `ss_pruning.compensation.batchnorm`.

A constant folded through a zero-padded convolution is exact inside and wrong at the border, where part of the kernel
sees padding: `mean` and `linear` are exact for 1x1 kernels, padding 0, linear layers, or constants of 0, and
`Outcome.inexact` names the other layers. `reconstruct` fits with the padding as it is.

A bias that a layer does not have goes into the running mean of the norm behind it; where there is none, the layer gets
a bias, and the plan says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning.compensation.normal_equations import is_weighted_sum
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import groups_of, has_statistics, is_depthwise, layer_type_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.activation_stats import StatisticsSource, measure
from ss_pruning.importance.activation_stats.max_pooling import CentresOfWindows
from ss_pruning.importance.calibration import BATCH, Batch
from ss_pruning.importance.regression import Predicted, constant_output, precision, weights_by_group
from ss_pruning.surgery.cut import Cut, give_bias
from ss_pruning.surgery.plan import Plan

#: Why layers are skipped; one that only runs in training, such as an auxiliary head, is idle.
REGISTERED = "only layers of torch's types are compensated, not registered ones"
NO_WEIGHTED_SUM = "its output is not its weight times what it reads, plus a bias"
IDLE = "it does not run on the calibration inputs"
UNKNOWN_MEANS = "no batch norm tells the mean of what it lost; give calibration images, or 'synthetic' ones"

# Of a channel that always puts out the same, the variance is this share of its squared mean at most.
_CONSTANT = 1e-9


@dataclass
class Outcome:
    """What a compensation did.

    Attributes:
        layers: Paths of the layers that were changed.
        inexact: Layers where a constant went through a zero-padded kernel, and is wrong at the border.
        skipped: Layers that could not be compensated, with the reason.
        biases: Layers that got a bias.
    """

    layers: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)


def fold_means_(pruned: nn.Module, traced: TracedModel, plan: Plan, images: Any) -> Outcome:
    """Add what the removed channels carry on average to the biases of their consumers, in place.

    Args:
        pruned: The dense model with `plan` applied; changed in place.
        traced: The dense model; not changed.
        plan: What was cut.
        images: Calibration inputs that means come from; None for the model's own noise, see
            `ss_pruning.importance.activation_stats`.
    """
    source: StatisticsSource = "gaussian" if images is None else Batch.of(images).split(BATCH)
    return _fold_(pruned, traced, plan, source, linear=False)


def fold_linear_(pruned: nn.Module, traced: TracedModel, plan: Plan, images: Any) -> Outcome:
    """Fold the best linear prediction of the removed channels from the kept ones into the consumers, in place.

    Means and covariances are the dense model's, `[C, C]` for each consumer that lost inputs. A removed channel is
    predicted from those of its group, since a grouped convolution has no weight for the others. Layers too wide for a
    covariance get the mean alone (see `ss_pruning.importance.activation_stats.measure`).
    """
    return _fold_(pruned, traced, plan, Batch.of(images).split(BATCH), linear=True)


def _fold_(
    pruned: nn.Module, traced: TracedModel, plan: Plan, source: StatisticsSource, *, linear: bool
) -> Outcome:
    """Fold means, or predictions, as if no border were padded."""
    outcome, norms, inputs = Outcome(), norms_behind(traced.connectivity), traced.example_inputs
    consumers = _consumers(traced, plan, outcome)
    on_noise = source == "gaussian"
    with CentresOfWindows() if on_noise else contextlib.nullcontext():
        statistics = measure(
            traced.model, traced.connectivity, source, inputs, list(consumers), covariance=linear
        )
    guessed = _not_told(traced) if on_noise else frozenset()
    kept_outputs = {cut.path: torch.tensor(cut.kept) for cut in plan.cuts if cut.side == "out"}
    for path, cut in consumers.items():
        module, seen, kept_out = traced.modules[path], statistics[path], kept_outputs.get(path)
        if seen.mean is None:
            outcome.skipped[path] = IDLE
            continue
        mean = _constants(seen.mean, seen.variance) if path in guessed else seen.mean
        if path in guessed and not bool(mean[list(cut.removed)].any()):
            outcome.skipped[path] = UNKNOWN_MEANS
            continue
        inverse = seen.covariance if cut.removed else None
        if inverse is not None:
            inverse = precision(inverse, groups_of(module), seen.rows)
        kept, removed = (torch.tensor(side, dtype=torch.long) for side in (cut.kept, cut.removed))
        predicted = Predicted.of(mean, inverse, kept, removed)
        if predicted.slope is not None:
            _add_inputs(pruned.get_submodule(path), module, predicted, kept_out)
        constant = predicted.constants()
        bias = constant_output(module, constant)
        add_bias(pruned, path, bias if kept_out is None else bias[kept_out.to(bias.device)], norms, outcome)
        outcome.layers.append(path)
        if _is_padded(module) and bool(constant.ne(0).any()):
            outcome.inexact.append(path)
    return outcome


def _not_told(traced: TracedModel) -> frozenset[str]:
    """The layers that read channels of a group without a batch norm: their means on noise are a guess."""
    return frozenset(
        member.path
        for subgroup in traced.coupling.subgroups
        if not any(m.side == "through" and has_statistics(traced.modules[m.path]) for m in subgroup.members)
        for member in subgroup.members
        if member.side == "in"
    )


def _constants(mean: Tensor, variance: Tensor) -> Tensor:
    """What is known of means without any image: those of channels that always put out the same; 0 for others."""
    return mean.where(variance <= _CONSTANT * mean.square(), 0.0)


def _consumers(traced: TracedModel, plan: Plan, outcome: Outcome) -> dict[str, Cut]:
    """The layers that mix channels and lost inputs; those that cannot be compensated are noted as skipped."""
    found = {}
    for cut in plan.cuts:
        module = traced.modules.get(cut.path)
        if module is None or cut.side != "in" or is_depthwise(module):
            continue
        if layer_type_of(module) is not None:
            outcome.skipped[cut.path] = REGISTERED
        elif not is_weighted_sum(module):
            outcome.skipped[cut.path] = NO_WEIGHTED_SUM
        else:
            found[cut.path] = cut
    return found


def _add_inputs(small: nn.Module, module: nn.Module, predicted: Predicted, kept_out: Tensor | None) -> None:
    """`W[:, kept] += W[:, removed] slope`, group by group and tap by tap; groups lose inputs in equal numbers."""
    assert predicted.slope is not None
    weight, groups = weights_by_group(module), groups_of(module)
    lost = weight.transpose(1, 2).flatten(0, 1)[predicted.removed].unflatten(0, (groups, -1)).transpose(1, 2)
    if kept_out is not None:
        lost = lost.flatten(0, 1)[kept_out.to(lost.device)].unflatten(0, (groups, -1))
    slope = predicted.slope.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    own = torch.arange(groups, device=slope.device)
    added = torch.einsum("gor...,gkr->gok...", lost.to(slope), slope[own, :, own])
    weights_by_group(small).add_(added.to(weight))


def _is_padded(module: nn.Module) -> bool:
    """True where part of the kernel may see a padded border, or an output only sees part of the kernel."""
    if not isinstance(module, _ConvNd):
        return False
    if module.transposed:  # which taps an output sees depends on where it is
        return any(n != 1 for n in (*module.kernel_size, *module.stride))
    if all(k == 1 for k in module.kernel_size):
        return False
    plain = type(module).__module__.startswith("torch.nn.")
    return (
        not plain or module.padding == "same" or (not isinstance(module.padding, str) and any(module.padding))
    )


def norms_behind(connectivity: Connectivity) -> dict[str, str]:
    """By layer: the norm that reads its output channel by channel, if nothing else does and it reads nothing else."""
    consumers: dict[str, set[str]] = {}
    for path, edges in connectivity.edges.items():
        for edge in edges:
            consumers.setdefault(edge.source, set()).add(path)
    behind = {}
    for path, layer in connectivity.layers.items():
        edges = connectivity.edges[path]
        if layer.kind != "norm" or len({edge.source for edge in edges}) != 1:
            continue
        source, pairs = edges[0].source, [edge.pairs for edge in edges]  # of each call
        same = all(len(p) == layer.inputs and bool((p[:, 0] == p[:, 1]).all()) for p in pairs)
        if same and consumers[source] == {path} and source not in connectivity.reaches_output:
            behind[source] = path
    return behind


def add_bias(model: nn.Module, path: str, bias: Tensor, norms: Mapping[str, str], outcome: Outcome) -> None:
    """Add to a layer's bias, or to what stands for one."""
    module = model.get_submodule(path)
    if isinstance(module.bias, Tensor):
        module.bias.data.add_(bias.to(module.bias))
        return
    norm = model.get_submodule(norms[path]) if path in norms else None
    mean = getattr(norm, "running_mean", None)
    if isinstance(mean, Tensor):
        mean.sub_(bias.to(mean))
        return
    parameter = give_bias(module)
    outcome.biases.append(path)
    parameter.data.add_(bias.to(parameter))
