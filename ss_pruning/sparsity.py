"""Training towards sparse synapses: a penalty on their strengths."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ss_pruning.moments import from_norms, norm_scales
from ss_pruning.strength import synaptic_paths, synaptic_power
from ss_pruning.wiring import Wiring


def strength_penalty(model: nn.Module, wiring: Wiring, paths: Collection[str] | None = None) -> Tensor:
    """The L1 norm of all synaptic strengths, `sum |gamma_c| ||W[k, c]||` (Lin et al., NeurIPS 2018), as a scalar.

    Differentiable in the weights and in the scales of the norms. A synapse of strength 0 gets the gradient 0 (a
    subgradient), so that what a mask has removed stays removed.

    Args:
        model: The model, in any mode.
        wiring: What `trace` found for it.
        paths: Layers whose synapses count; all by default.

    Examples:
        >>> import torch
        >>> from ss_pruning import trace
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> strength_penalty(net, trace(net, torch.zeros(2, 2))).item()
        7.0
    """
    scales = norm_scales(model, wiring)
    total: Tensor | None = None
    for path in synaptic_paths(wiring) if paths is None else paths:
        power = synaptic_power(model.get_submodule(path), from_norms(wiring, path, scales).variance)
        alive = power > 0
        here = torch.where(alive, torch.where(alive, power, 1.0).sqrt(), 0.0).sum()
        total = here if total is None else total + here
    return torch.zeros(()) if total is None else total
