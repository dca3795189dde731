"""How others repair a cut: Neuron Merging, GRAIL, and least squares layer by layer; formulas of theirs, code of ours.

All change the weights of consumers alone: the layers that read pruned channels. With `S` the channels that stay,

    Neuron Merging   W'[:, k] = W[:, k] + sum of s_ik W[:, i] over the pruned i that are most similar to k
    GRAIL            W' = W G[:, S] (G[S, S] + ridge)^-1
    least squares    W' = argmin ||Y - X_S W'||^2

where `G` are the products of what is read, position by position, and `X` holds all taps of the kernel. They have the
signature of `ss_pruning.register_compensation`, know convolutions without groups and linear layers, and leave biases
and batch norms as they are.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss_pruning._utils.hooks import hooked
from ss_pruning.compensation.folding import norms_behind
from ss_pruning.compensation.residual_sums import find_sums, slope
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import groups_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.surgery.plan import Plan

#: How much cosine counts beside bias, and the least cosine of filters that are merged: as Neuron Merging's authors ran
#: VGG-16 and ResNet-56 on CIFAR-10 (their `scripts`).
COSINE_COUNTS, LEAST_COSINE = 0.85, 0.1
#: As a share of the mean diagonal; GRAIL's. Least squares have none in the papers: it helps them where images are few.
RIDGE = 1e-3
BATCH = 64
Side = Literal["in", "out"]
SIDES: tuple[Side, Side] = ("in", "out")
#: A module's path, and whether what it reads or what it puts out.
Place = tuple[str, Side]


@dataclass(frozen=True)
class Consumer:
    """A layer that lost inputs.

    Attributes:
        path: Module path.
        kept: Inputs that stay.
        outputs: Outputs that stay.
    """

    path: str
    kept: Tensor
    outputs: Tensor


class _ReachedError(Exception):
    """All that was asked for has been seen; what is behind it need not run."""


def merge_neurons_(pruned: nn.Module, traced: TracedModel, plan: Plan, images: Any = None) -> None:
    """Neuron Merging (Kim et al., NeurIPS 2020, arXiv 2010.13160, section 3), which needs no images.

    Where the input of a consumer is not one layer's, behind a batch norm of its own, pruned channels are only dropped.
    """
    del images
    producers = {norm: path for path, norm in norms_behind(traced.connectivity).items()}
    for consumer in consumers(traced, plan):
        norm = _read_from(traced.connectivity, consumer.path)
        if norm in producers:
            filters = traced.modules[producers[norm]].weight
            scales = merging_scales(filters, traced.modules[norm], consumer.kept)
            mix_(pruned, traced, consumer, scales)


def merging_scales(filters: Any, norm: Any, kept: Tensor) -> Tensor:
    """`[channels, kept]`: by what each channel is replaced; itself, the most similar one that stays, or nothing.

    A pruned filter is about `s` times the one that takes its place, `s` the quotient of their norms. Behind the batch
    norm, with `g`, `b`, `m`, `v` gain, bias, mean and deviation,

        y_i = S y_k + B,    S = s (g_i / g_k) (v_k / v_i),    B = (g_i / v_i) (s (m_k - v_k b_k / g_k) - m_i) + b_i

    and a rectifier passes `S > 0`. That channel stands in for it whose `B / S` is small, on a scale from 0 to 1, and
    whose cosine is large. `B` is then left out, as in the paper. (Its authors' code turns the quotients of gains and
    deviations round, and takes variances for deviations; these formulas follow from what the layers compute.)
    """
    rows = filters.detach().double().flatten(1)
    cosine = F.normalize(rows) @ F.normalize(rows[kept]).T
    gain, bias = norm.weight.detach().double(), norm.bias.detach().double()
    mean, deviation = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
    ratio = rows.norm(dim=1)[:, None] / rows[kept].norm(dim=1)
    gains = gain / deviation
    scale = ratio * gains[:, None] / gains[kept]
    shift = gains[:, None] * (ratio * (mean - bias / gains)[kept] - mean[:, None]) + bias[:, None]
    fits = (scale > 0) & scale.isfinite() & shift.isfinite()
    distance = (shift / scale).abs()
    low = distance.where(fits, torch.inf).amin(1, keepdim=True)
    high = distance.where(fits, -torch.inf).amax(1, keepdim=True)
    distance = (distance - low) / (high - low).clamp(min=1e-12)
    score = COSINE_COUNTS * (1 - cosine) + (1 - COSINE_COUNTS) * distance
    nearest = score.where(fits, torch.inf).argmin(1, keepdim=True)
    merged = scale.where(fits & (cosine >= LEAST_COSINE), 0.0)
    scales = torch.zeros_like(scale).scatter(1, nearest, merged.gather(1, nearest))
    scales[kept] = torch.eye(len(kept)).to(scales)
    return scales


def grail_(pruned: nn.Module, traced: TracedModel, plan: Plan, images: Any) -> None:
    """GRAIL (Tang et al., CPAL 2026, arXiv 2602.23795): what was read, from what still is, no constant."""
    found = consumers(traced, plan)
    dense = observed(traced.model, [(c.path, "in") for c in found], images)
    for c in found:
        rows = dense[c.path, "in"].movedim(1, -1).flatten(0, -2)
        mix_(pruned, traced, c, reconstruction_map((rows.T @ rows).double(), c.kept))


def reconstruction_map(gram: Tensor, kept: Tensor) -> Tensor:
    """`[channels, kept]`: all channels from those that stay, `G[:, S] (G[S, S] + ridge)^-1`."""
    return _solved(gram[kept][:, kept], gram[kept]).T


def least_squares_(pruned: nn.Module, traced: TracedModel, plan: Plan, images: Any) -> None:
    """Each consumer puts out what it did from what stays of its *dense* input; layers do not know of each other."""
    found = consumers(traced, plan)
    dense = observed(traced.model, [(c.path, side) for c in found for side in SIDES], images)
    for c in found:
        solve_(
            pruned.get_submodule(c.path), dense[c.path, "in"][:, c.kept], dense[c.path, "out"][:, c.outputs]
        )


def least_squares_in_order_(
    pruned: nn.Module, traced: TracedModel, plan: Plan, images: Any, shortcuts: bool = False
) -> None:
    """Each consumer puts out what the dense one does from the input that it has in the *pruned* model, in order.

    The second step of He et al. (ICCV 2017, arXiv 1707.06168, section 3.1, on the inputs of "whole model pruning"),
    and what AIMET calls reconstruction.

    Args:
        pruned: Changed in place.
        traced: The dense model.
        plan: What was cut.
        images: To run on.
        shortcuts: The end of a residual branch makes up for the error of the shortcut, too, as in section 3.2.
    """
    found = consumers(traced, plan)
    sums = find_sums(traced.model, images[:1].inputs, norms_behind(traced.connectivity)) if shortcuts else {}
    other: dict[str, Place] = {path: (of.module, of.side) for path, of in sums.items()}
    places = [place for c in found for place in ((c.path, "out"), other.get(c.path)) if place]
    dense = observed(traced.model, places, images)
    for c in found:
        here = [(c.path, "in"), *([other[c.path]] if c.path in other else [])]
        small, wanted = observed(pruned, here, images), dense[c.path, "out"][:, c.outputs]
        if c.path in other:
            norm, place = sums[c.path].norm, other[c.path]
            error = dense[place][:, c.outputs] - small[place]
            wanted = wanted + error / slope(norm and pruned.get_submodule(norm), wanted)
        solve_(pruned.get_submodule(c.path), small[c.path, "in"], wanted)


def observed(model: nn.Module, places: list[Place], images: Any) -> dict[Place, Tensor]:
    """What modules read and put out, of all images; the model runs no further than the last of them."""
    seen: dict[Place, list[Tensor]] = {place: [] for place in places}

    def note(place: Place, x: Tensor) -> None:
        if place in seen:
            seen[place].append(x)
            if len({len(parts) for parts in seen.values()}) == 1:
                raise _ReachedError

    modules = {path: model.get_submodule(path) for path, _ in places}
    watched = hooked(
        modules,
        before=lambda path, _, x: note((path, "in"), x),
        after=lambda path, _, __, y: note((path, "out"), y),
    )
    with torch.no_grad(), watched:
        for batch in images.split(BATCH):
            with contextlib.suppress(_ReachedError):
                model(batch.inputs)
    return {place: torch.cat(parts) for place, parts in seen.items()}


def solve_(layer: Any, x: Tensor, y: Tensor) -> None:
    """The layer's weights become those that put out `y` from `x` best; a bias stays."""
    gram, cross = 0.0, 0.0
    for some, wanted in zip(x.split(BATCH), y.split(BATCH), strict=True):
        rows, targets = rows_of(layer, some), wanted.movedim(1, -1).flatten(0, -2)
        targets = targets if layer.bias is None else targets - layer.bias.detach()
        gram, cross = gram + (rows.T @ rows).double(), cross + (rows.T @ targets).double()
    layer.weight.data.copy_(_solved(gram, cross).T.reshape(layer.weight.shape))


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """`[images * positions, inputs * taps]`: what an output is the weighted sum of, laid out as the weight is."""
    if not isinstance(layer, nn.Conv2d):
        return x
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2).flatten(0, 1)


def _solved(gram: Tensor, cross: Tensor) -> Tensor:
    """`(gram + ridge)^-1 cross`."""
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    solution: Tensor = torch.linalg.solve(gram + ridge, cross)
    return solution


def mix_(pruned: nn.Module, traced: TracedModel, consumer: Consumer, mix: Tensor) -> None:
    """The consumer reads each channel as the sum of those that stay that `mix`, `[channels, kept]`, says it is."""
    dense = traced.modules[consumer.path].weight.detach().double()[consumer.outputs]  # type: ignore[union-attr, index, operator]
    pruned.get_submodule(consumer.path).weight.data.copy_(torch.einsum("oc...,ck->ok...", dense, mix))  # type: ignore[union-attr, operator]


def consumers(traced: TracedModel, plan: Plan) -> list[Consumer]:
    """In the order in which they run."""
    kept = {(cut.path, cut.side): torch.tensor(cut.kept) for cut in plan.cuts}
    found = []
    for path, layer in traced.connectivity.layers.items():
        if (path, "in") in kept and layer.kind == "synaptic":
            assert groups_of(traced.modules[path]) == 1, f"'{path}' has groups"
            outputs = kept.get((path, "out"), torch.arange(layer.outputs))
            found.append(Consumer(path, kept[path, "in"], outputs))
    return found


def _read_from(connectivity: Connectivity, path: str) -> str:
    """The one source of a layer that it reads channel by channel; "" if there is none."""
    (edge, *others) = connectivity.edges[path]
    same = bool((edge.pairs[:, 0] == edge.pairs[:, 1]).all())
    return edge.source if same and not others else ""
