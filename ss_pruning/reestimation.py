"""Re-estimation: batch norms behind a cut take the mean and the variance of what reaches them now.

A cut changes what reaches the norms, whose statistics are still the dense model's. Off by default, since
`ss_pruning.reconstruction` fits the layers to those very statistics (measured by `python -m benchmarks.accuracy
--reestimate`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ss_pruning.provenance import call, preserved
from ss_pruning.surgery import Plan
from ss_pruning.wiring import Wiring

#: Count, mean and (biased) variance by channel.
_Sample = tuple[int, Tensor, Tensor]


def reestimate_(model: nn.Module, plan: Plan, wiring: Wiring, images: Any) -> list[str]:
    """Set the running statistics of the batch norms behind the first cut, in place and in one pass.

    Each norm is set before it runs, so those behind it see what it will put out from now on. Variances are unbiased,
    as PyTorch keeps them. Over the calls of a norm that runs several times, statistics are those of all that it saw.

    Args:
        model: The dense model with `plan` applied; in evaluation mode for the pass, whatever its mode is.
        plan: What was cut.
        wiring: The wiring of the dense model.
        images: One batch of inputs; the more, the better the estimate.

    Returns:
        Paths of the norms that were set.
    """
    paths = {model.get_submodule(path): path for path in _norms_behind_cuts(model, plan, wiring)}
    seen: dict[nn.Module, _Sample] = {}

    def listen(norm: Any, args: tuple[Any, ...]) -> None:
        now = _sample(args[0])
        count, mean, variance = seen[norm] = _pooled(seen[norm], now) if norm in seen else now
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance * (count / max(count - 1, 1)))

    handles = [norm.register_forward_pre_hook(listen) for norm in paths]
    try:
        with torch.no_grad(), preserved(model, training=False):
            call(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return [path for norm, path in paths.items() if norm in seen]


def _norms_behind_cuts(model: nn.Module, plan: Plan, wiring: Wiring) -> list[str]:
    """Batch norms with running statistics from the first layer on that was cut, in the order in which they run."""
    cut = {cut.path for cut in plan.cuts}
    order = list(wiring.layers)
    first = min((number for number, path in enumerate(order) if path in cut), default=len(order))
    modules = {path: model.get_submodule(path) for path in order[first:]}
    return [p for p, m in modules.items() if isinstance(m, _BatchNorm) and isinstance(m.running_mean, Tensor)]


def _sample(x: Tensor) -> _Sample:
    x = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return x.numel() // x.shape[1], mean.double(), variance.double()


def _pooled(a: _Sample, b: _Sample) -> _Sample:
    """Two samples taken together."""
    count = a[0] + b[0]
    share = b[0] / count
    shift = b[1] - a[1]
    return count, a[1] + share * shift, a[2].lerp(b[2], share) + share * (1 - share) * shift.square()
