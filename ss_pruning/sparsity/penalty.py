"""Training towards sparse synapses: a penalty on their strengths, and its proximal step.

    penalty = StrengthPenalty(model, example_inputs)
    (loss + 1e-4 * penalty()).backward()  # either: the L1 norm of all strengths in the loss
    optimizer.step()
    penalty.shrink_(1e-4 * lr)  # or: no term in the loss, but this after the step, which gives exact zeros

**In front of a normalisation a penalty on norms can be met for free**: the scale of a kernel row `W[k]` does not matter
to a batch norm behind it, so all its kernels can shrink together without anything being decided. The gradient step then
turns into a larger and larger relative one, as with weight decay, and small kernels do vanish first; but the value of
the penalty says little. `form="share"` is free of that: `sum_c s[k, c] / sqrt(sum_c s[k, c]^2)` (the L1 over the L2
norm, the sum of the square roots of the shares) is 1 for an output with one synapse and `sqrt(n)` for one with `n`
equal ones, and does not change when `W[k]` is rescaled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import width
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import from_norms, norm_scales
from ss_pruning.importance.strength import (
    at_synapses,
    by_kernel,
    inner_paths,
    kernel_powers,
    synaptic_power,
)
from ss_pruning.sparsity.reparametrization import explicit_strength

Form = Literal["strength", "share"]


class StrengthPenalty:
    """The term that sparse training adds to the loss: a differentiable scalar; or a proximal step in its place.

    Attributes:
        paths: The layers whose synapses count.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        form: Form = "strength",
        ignore: Collection[str] = (),
        whole: bool = False,
        connectivity: Connectivity | None = None,
    ) -> None:
        """Find out who feeds whom, once.

        Args:
            model: The bare model (inside DistributedDataParallel: `ddp.module`); it is only read.
            example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
            form: "strength": `sum s`; "share": per output, the L1 over the L2 norm of its strengths.
            ignore: Paths of layers that do not count.
            whole: Count first layers (that read the model's input) and classifiers (whose output is the model's), too.
            connectivity: What `trace` found, if it is at hand.

        Raises:
            InputError: Unknown form or path, or no layer is left to count.
            ModelError: The model does not run on the inputs.
        """
        if form not in ("strength", "share"):
            raise InputError(f"form={form!r} is unknown; use 'strength' or 'share'")
        self.model, self.form = model, form
        self.connectivity = connectivity or trace(model, example_inputs)
        unknown = sorted(set(ignore) - set(self.connectivity.layers))
        if unknown:
            raise InputError(f"ignore names no layer that ran: {', '.join(unknown)}")
        paths = self.connectivity.weighted if whole else inner_paths(self.connectivity)
        self.paths = tuple(path for path in paths if path not in ignore)
        if not self.paths:
            raise InputError("no layer is left to penalise; with whole=True first and last layers count, too")
        scales = norm_scales(model, self.connectivity)
        if all(bool(from_norms(self.connectivity, path, scales).unscaled.all()) for path in self.paths):
            warnings.warn(
                "no norm stands behind any of the layers: their strengths are plain kernel norms (scale 1)",
                stacklevel=2,
            )

    def __call__(self) -> Tensor:
        """The penalty now, a scalar, differentiable in the weights and in the scales of the norms.

        Raises:
            ModelError: The model was cut since it was traced.
        """
        self._check_widths()
        reduce = torch.sum if self.form == "strength" else concentration
        return _penalty(self.model, self.connectivity, self.paths, reduce)

    @torch.no_grad()
    def shrink_(self, amount: float) -> None:
        """The proximal step of `amount` times the L1 norm of the strengths, the norms' scales held fixed.

        A kernel's norm shrinks by `amount * sqrt(v_c)`, to exactly 0 if that is all it has (group soft-thresholding;
        Yuan and Lin 2006, eq. 2.4). Call it after `optimizer.step()`, with the penalty's weight times the rate.

        Raises:
            InputError: A negative amount, or form "share", which has no such step.
            ModelError: The model was cut since it was traced.
        """
        if not amount >= 0 or self.form != "strength":
            raise InputError(
                f"amount={amount} with form={self.form!r}: give an amount >= 0 and form='strength'"
            )
        self._check_widths()
        scales = norm_scales(self.model, self.connectivity)
        modules = {path: self.model.get_submodule(path) for path in self.paths}
        weights = {path: trainable_weight(m) for path, m in modules.items() if explicit_strength(m) is None}
        for path, module in modules.items():
            if (strength := explicit_strength(module)) is not None:
                strength.copy_(nn.functional.softshrink(strength, amount))
                continue
            weight = weights[path]
            norms = kernel_powers(module, weight).sqrt()
            deviation = from_norms(self.connectivity, path, scales).variance.sqrt()
            step = amount * at_synapses(module, deviation.to(norms), len(norms))
            weight.mul_(by_kernel(module, weight, torch.where(norms > step, 1 - step / norms, 0.0)))

    def _check_widths(self) -> None:
        """Who feeds whom was found out for the widths of then."""
        for path in self.paths:
            layer, module = self.connectivity.layers[path], self.model.get_submodule(path)
            if (width(module, "in"), width(module, "out")) != (layer.inputs, layer.outputs):
                raise ModelError(
                    f"'{path}' has other widths than when the penalty was made: after a cut make it anew"
                )

    def add_gradients_(self, weight: float) -> None:
        """Add the gradient of `weight` times the penalty to what `backward` has left in `.grad`."""
        (weight * self()).backward()


def strength_penalty(
    model: nn.Module, connectivity: Connectivity, paths: Collection[str] | None = None
) -> Tensor:
    """The L1 norm of all synaptic strengths, `sum |gamma_c| ||W[k, c]||` (Lin et al., NeurIPS 2018), as a scalar.

    Differentiable in the weights and in the scales of the norms. A synapse of strength 0 gets the gradient 0 (a
    subgradient), so that what a mask has removed stays removed.

    Args:
        model: The model, in any mode.
        connectivity: What `trace` found for it.
        paths: Layers whose synapses count; all by default.

    Examples:
        >>> import torch
        >>> from ss_pruning.graph import trace
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> strength_penalty(net, trace(net, torch.zeros(2, 2))).item()
        7.0
    """
    return _penalty(model, connectivity, connectivity.weighted if paths is None else paths, torch.sum)


def _penalty(
    model: nn.Module, connectivity: Connectivity, paths: Collection[str], reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    scales = norm_scales(model, connectivity)
    total: Tensor | None = None
    for path in paths:
        power = synaptic_power(model.get_submodule(path), from_norms(connectivity, path, scales).variance)
        here = reduce(_root(power))
        total = here if total is None else total + here
    return torch.zeros(()) if total is None else total


def _root(power: Tensor) -> Tensor:
    """The square root, with the gradient 0 at 0."""
    alive = power > 0
    return torch.where(alive, torch.where(alive, power, 1.0).sqrt(), 0.0)


def concentration(strengths: Tensor) -> Tensor:
    """The roots of all shares, summed: over outputs, `sum_c s / sqrt(sum_c s^2)`; `[out, in]` in, a scalar out."""
    total = _root(strengths.square().sum(1))
    return (strengths.sum(1) / torch.where(total > 0, total, 1.0)).sum()


def warm_up(step: int, steps: int) -> float:
    """What to multiply the penalty's weight with in step `step`, counted from 0: rises to 1 over `steps`, and stays."""
    return min(1.0, (step + 1) / max(1, steps))


def trainable_weight(module: nn.Module) -> Tensor:
    """The parameter that holds a layer's weight, behind a mask too.

    Raises:
        ModelError: The weight is computed from several parameters.
    """
    if not parametrize.is_parametrized(module, "weight"):
        weight: Any = module.weight
    else:
        parametrizations: Any = module.parametrizations
        weight = getattr(parametrizations["weight"], "original", None)
    if not isinstance(weight, nn.Parameter):
        raise ModelError(
            f"the weight of a {type(module).__name__} is computed from several parameters: use the gradient "
            "step, or remove the parametrisation"
        )
    return weight
