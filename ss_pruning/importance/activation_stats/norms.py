"""Variances as the paper has them: from the scales of the norms alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.modules import modules_of
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.importance.activation_stats.observed import ActivationStatistics


def on_scales(
    model: nn.Module, connectivity: Connectivity, _: Any, paths: Sequence[str]
) -> dict[str, ActivationStatistics]:
    """By layer, see `from_norms`; nothing is run."""
    scales = norm_scales(model, connectivity)
    return {path: from_norms(connectivity, path, scales) for path in paths}


def norm_scales(model: nn.Module, connectivity: Connectivity) -> dict[str, Tensor]:
    """Squared scale of every norm channel; 1 for a norm without a scale."""
    scales, modules = {}, modules_of(model)
    for path, layer in connectivity.layers.items():
        if layer.kind == "norm":
            weight = getattr(modules[path], "weight", None)
            weight = torch.ones(layer.outputs) if weight is None else weight
            # In single precision at least: squares of small numbers vanish in half.
            scales[path] = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().flatten()
    return scales


def from_norms(connectivity: Connectivity, path: str, scales: dict[str, Tensor]) -> ActivationStatistics:
    """The paper's case: a channel's variance is the sum of the squared scales of the norms that feed it.

    Where a norm and a layer without a norm meet (a gate, a shortcut), only the norm is counted; where no norm feeds a
    channel its variance is 1, and `unscaled` says so. A module that runs several times gets the mean over its calls.
    Differentiable in the scales. See `ss_pruning.importance.strength` for what gamma means if it is negative or the
    activation is not homogeneous.
    """
    inputs = connectivity.layers[path].inputs
    calls: dict[int, Tensor] = {}
    covered: dict[int, Tensor] = {}
    device = next(iter(scales.values())).device if scales else torch.device("cpu")
    for edge in connectivity.edges[path]:
        before = calls.get(edge.call, torch.zeros(inputs, device=device))
        seen = covered.setdefault(edge.call, torch.zeros(inputs, dtype=torch.bool, device=device))
        if edge.source in scales:
            pairs = edge.pairs.to(device)
            before = before.to(scales[edge.source]).index_add(
                0, pairs[:, 1], scales[edge.source][pairs[:, 0]]
            )
            seen[pairs[:, 1]] = True
        calls[edge.call] = before
    if not calls:
        ones = torch.ones(inputs, device=device)
        return ActivationStatistics(None, ones, torch.ones(inputs, dtype=torch.bool, device=device))
    variance = torch.stack(
        [torch.where(covered[c], calls[c], torch.ones_like(calls[c])) for c in calls]
    ).mean(0)
    return ActivationStatistics(None, variance, ~torch.stack(list(covered.values())).all(0))
