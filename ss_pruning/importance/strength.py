"""Synaptic strength: what a connection transports.

The strength of the synapse from input channel `c` to output channel `k` (Lin, Zhong, Wu and Yan, NeurIPS 2018) is

    s[k, c] = sqrt(v_c) * ||W[k, c]||_F

where `v_c` is the variance of what arrives at channel `c`. The paper is the case `v_c = gamma_c^2`, with `gamma_c` the
scale of the normalisation that feeds the channel. After BatchNorm a channel is `gamma_c z + beta_c` with `z` standard,
and `s^2` is the variance that the synapse hands to its output if channels are independent.

What the number means where the derivation does not hold:

* **gamma < 0.** Only `|gamma|` enters. Behind a ReLU the synapse then sees the other half of the distribution: the
  strength is still the scale of what arrives, but gamma cannot be moved out of the activation.
* **SiLU, GELU, sigmoid and other activations that are not positively homogeneous.** Scaling by gamma does not commute
  with them: the strength is an approximation. `statistics="gaussian"` or batches measure the variance behind them
  instead.
* **Several norms feed one channel** (a residual sum): their variances add, as if independent.
* **No norm behind a channel** (the image, a layer without a norm): `v_c = 1`, and `Strengths.unscaled` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.arrays import power_of_two_above
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import quiet_hooks
from ss_pruning.graph.connectivity import INPUT, Connectivity
from ss_pruning.graph.layers import groups_of
from ss_pruning.graph.refusals import check_bare, check_finite
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import ActivationStatistics, StatisticsSource, measure


class Strengths(dict[str, Tensor]):
    """Strength of every synapse, by module path, each `[out_channels, in_channels // groups]`.

    Attributes:
        unscaled: By module path, `[in_channels]`: True where no norm stands behind the channel.
    """

    def __init__(self, strengths: Mapping[str, Tensor], unscaled: Mapping[str, Tensor]) -> None:
        super().__init__(strengths)
        self.unscaled = dict(unscaled)

    def shares(self) -> dict[str, Tensor]:
        """Share of each synapse in the variance of its output, `s^2 / sum_c s^2`; 0 for an output without any."""
        return {path: share(s.square()) for path, s in self.items()}

    def entropy(self) -> dict[str, Tensor]:
        """Entropy in nats of a Gaussian of the variance that each synapse delivers, `0.5 ln(2 pi e s^2)`.

        Minus infinity for a synapse of strength 0.
        """
        return {path: entropy(s.square()) for path, s in self.items()}


def synaptic_strength(
    model: nn.Module,
    example_inputs: Any,
    statistics: StatisticsSource = "batchnorm",
    *,
    connectivity: Connectivity | None = None,
) -> Strengths:
    """Strength of every synapse of every convolution and linear layer that runs.

    Args:
        model: Any module; not changed.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        statistics: Where variances come from: "batchnorm" (the paper: squared scales of the norms), "gaussian" (no
            data: the model is run on its own noise, every norm putting out `gamma z + beta`), or an iterable of
                batches.
        connectivity: What `trace` found, if it is at hand.

    Returns:
        By module path, `[out_channels, in_channels // groups]`, on the device and in the dtype of the weights, but in
        float32 at least.

    Raises:
        InputError: Unknown statistics, or no batch.
        ModelError: The model does not run on the inputs, or holds NaN or Inf weights.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)
        ... )
        >>> strengths = synaptic_strength(net, torch.zeros(1, 3, 8, 8))
        >>> strengths["3"].shape
        torch.Size([2, 4])
        >>> strengths.unscaled["0"].all().item()  # the image has no norm behind it
        True
    """
    check_bare(model)
    check_finite(model)
    with quiet_hooks(model, example_inputs):
        known = connectivity or trace(model, example_inputs)
        found = list(powers_along(known, model, example_inputs, statistics))
    strengths = {path: power.sqrt() for path, power, _ in found}
    return Strengths(strengths, {path: m.unscaled for path, _, m in found})


@torch.no_grad()
def powers_along(
    connectivity: Connectivity,
    model: nn.Module,
    example_inputs: Any,
    statistics: StatisticsSource = "batchnorm",
) -> Iterator[tuple[str, Tensor, ActivationStatistics]]:
    """Layer by layer the squared strengths, and the statistics that they come from.

    All of a model of 1x1 kernels together would take as much memory as the model.
    """
    modules = modules_of(model)
    for path, m in measure(model, connectivity, statistics, example_inputs, connectivity.weighted).items():
        yield path, synaptic_power(modules[path], m.variance), m


def inner_paths(connectivity: Connectivity) -> list[str]:
    """The weighted layers but first ones (that read the input) and classifiers (whose output is the model's)."""
    return [
        path
        for path in connectivity.weighted
        if all(edge.source != INPUT for edge in connectivity.edges[path])
        and not len(connectivity.reaches_output.get(path, ()))
    ]


def synaptic_power(module: nn.Module, variance: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared strength `v_c ||W[k, c]||^2`, `[out_channels, in_channels // groups]`; differentiable.

    `variance` is that of what arrives, `[in_channels]`; a `weight` is taken in place of the layer's own.
    """
    powers = kernel_powers(module, weight)
    return powers * at_synapses(module, variance.to(powers), len(powers))


def relative_power(module: nn.Module, variance: Tensor) -> Tensor:
    """Squared strengths as `synaptic_power` has them, but for one factor a layer: none overflow, nor do all vanish."""
    weight: Any = module.weight
    return synaptic_power(module, _unit(variance), _unit(weight))


def _unit(numbers: Tensor) -> Tensor:
    """The numbers times a power of two, which is exact: the largest is about 1."""
    numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    return numbers / power_of_two_above(numbers)


def kernel_powers(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Squared Frobenius norm of every 2-D kernel (or single weight), shape `[out_channels, in_channels // groups]`.

    In float32 at least: squares of weights below 2e-4 vanish in half precision. Differentiable; the weight is taken as
    the layer's `weight` gives it (a parametrisation included), unless another one is given.
    """
    weight = module.weight if weight is None else weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if weight.dim() == 2:
        return weight.square()
    elements = weight.flatten(2)
    powers = elements.squeeze(2).square() if elements.shape[2] == 1 else elements.square().sum(2)
    if isinstance(module, _ConvNd) and module.transposed:
        g = module.groups
        return powers.reshape(g, powers.shape[0] // g, -1).transpose(1, 2).reshape(-1, powers.shape[0] // g)
    return powers


def by_kernel(module: nn.Module, weight: Tensor, values: Tensor) -> Tensor:
    """Values of synapses, `[out, in // groups]`, laid out as `weight` is, with taps of size 1."""
    if getattr(module, "transposed", False):
        groups = groups_of(module)
        values = values.reshape(groups, -1, values.shape[1]).transpose(1, 2)
    return values.reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:]))


def at_synapses(module: nn.Module, channels: Tensor, outputs: int) -> Tensor:
    """What belongs to input channels, `[in_channels]`, at each synapse that starts there: `[outputs, in // groups]`."""
    by_group: Tensor = channels.unflatten(0, (groups_of(module), -1))
    return by_group.repeat_interleave(outputs // len(by_group), 0)


def share(power: Tensor) -> Tensor:
    """Each synapse's share in the variance of its output: `[out, in]` in, rows that sum to 1 (or are all 0) out."""
    total = power.sum(1, keepdim=True)
    return power / torch.where(total == 0, torch.ones_like(total), total)


def entropy(power: Tensor) -> Tensor:
    """`0.5 ln(2 pi e s^2)` in nats: entropy of a Gaussian of the variance that the synapse delivers."""
    return 0.5 * (math.log(2 * math.pi * math.e) + power.log())


def by_input_channel(module: nn.Module, scores: Tensor) -> Tensor:
    """Scores of synapses, `[out, in // groups]`, by the input channel they start from: `[in, out // groups]`."""
    by_group: Tensor = scores.unflatten(0, (groups_of(module), -1))
    return by_group.transpose(1, 2).flatten(0, 1)
