"""What a channel says that the stronger ones do not: the part of it that no compensation can make up for.

Where the weights that stay are solved anew after a cut, what the others can tell of a channel is not lost. Channels
are taken from the strongest down, and each counts with the variance that is left of it once those before it are known:
the squared diagonal of the Cholesky factor of their covariance in that order. Optimal brain surgeon (Hassibi and Stork
1993) removes by the same quantity, one after the other and from the other end; this order needs no loop.

For a set of channels the same tells what a consumer loses, for every width at once. It reads channels of covariance `C`
and mean `m` through weights `W`. Its taps are taken to read alike and independently, so that all that matters of them
is `G = sum of W' W` over outputs and taps. When the channels `r` go and `k` stay, of its output is lost

* "none": `tr(G_rr C_rr)` and what the means put out;
* "mean": `tr(G_rr C_rr)`;
* "linear", "reconstruct": `tr(G_rr S)` with the Schur complement `S = C_rr - C_rk C_kk^-1 C_kr`, which is what a
  regression on the kept channels leaves.

`S` is the inverse of the block `P_rr` of the precision `P = C^-1`. With the Cholesky factor `P = R R'` in the order in
which channels go, the inverse of every leading block is `R^-T R^-1` of that block, and the trace a sum over the first
rows of `R^-1`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning.config import SOLVED, Method
from ss_pruning.importance.activation_stats import ActivationStatistics
from ss_pruning.importance.regression import blocks, ridged_factor, weights_by_group


def unexplained(covariance: Tensor, order_by: Tensor, rows: int, groups: int = 1) -> Tensor:
    """Share of each channel's variance that the stronger channels of its group leave open, `1 - R^2`: `[channels]`.

    Of two channels that are equal the stronger has what it has without the other, and the weaker 0. Few rows explain
    too well; the ridge grows with the channels a row.

    Args:
        covariance: `[channels, channels]` of what arrives.
        order_by: `[channels]`, how strong each is.
        rows: How many observations the covariance is from.
        groups: Of the layer that reads them; channels of other groups are of no use to it.

    Raises:
        ModelError: It is not finite.
    """
    own = blocks(covariance.double(), groups)
    order = order_by.to(own.device).reshape(groups, -1).argsort(stable=True, dim=1, descending=True)
    own = own.gather(1, order[:, :, None].expand_as(own)).gather(2, order[:, None].expand_as(own))
    variance = own.diagonal(dim1=1, dim2=2)
    factor, ridge = ridged_factor(own, rows)
    floor = torch.finfo(torch.float64).tiny
    left = (factor.diagonal(dim1=1, dim2=2).square() - ridge) / variance.clamp_min(floor)
    return torch.empty_like(left).scatter_(1, order, left.clamp(0, 1)).flatten()


def removal_errors(
    module: nn.Module,
    statistics: ActivationStatistics,
    precision: Tensor | None,
    order: Tensor,
    method: Method,
) -> Tensor:
    """`[removed]`: the share of the output's variance that goes with each channel, those before it being gone.

    Args:
        module: The layer; a convolution, grouped or transposed or not, or linear.
        statistics: Of what it reads. Without a covariance channels are taken to be independent.
        precision: Inverse of that covariance, for methods that solve; None takes means in place of regressions.
        order: `[removed]`, channels in the order in which they go; all others stay.
        method: How the cut is compensated.
    """
    power = _power(weights_by_group(module).double())
    covariance = statistics.covariance
    covariance = torch.diag(statistics.variance.double()) if covariance is None else covariance
    total = (power * covariance).sum().clamp_min(torch.finfo(torch.float64).tiny)
    own = power[order][:, order]
    if method in SOLVED and precision is not None:
        return _unexplained(own, precision[order][:, order]) / total
    lost = own * covariance[order][:, order]
    if method == "none":
        lost = lost + _of_means(module, statistics.mean, order)
    return (2 * lost.tril().sum(1) - lost.diagonal()) / total


def _power(weight: Tensor) -> Tensor:
    """`[inputs, inputs]`, products of input channels summed over outputs and taps; 0 between groups."""
    rows = weight.flatten(3) if weight.dim() > 3 else weight[..., None]
    rows = rows.transpose(2, 3).flatten(1, 2)
    power: Tensor = torch.block_diag(*(rows.transpose(1, 2) @ rows))
    return power


def _unexplained(power: Tensor, precision: Tensor) -> Tensor:
    """`[removed]`, what each adds to `tr(G_rr P_rr^-1)`, in the order given."""
    factor = torch.linalg.cholesky(precision)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    added: Tensor = ((inverse @ power) * inverse).sum(1)
    return added


def _of_means(module: nn.Module, mean: Tensor | None, order: Tensor) -> Tensor:
    """`[removed, removed]`: products of what the means of channels put out, summed over outputs.

    All taps see the same mean at once; of a transposed convolution an output sees few, and they are taken one by one.
    """
    assert mean is not None
    weight = weights_by_group(module).double()
    if weight.dim() > 3 and not (isinstance(module, _ConvNd) and module.transposed):
        weight = weight.flatten(3).sum(3)
    constant = mean.double()[order]
    return _power(weight)[order][:, order] * constant.outer(constant)
