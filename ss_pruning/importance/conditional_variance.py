"""What a channel says that the stronger ones do not: the part of it that no compensation can make up for.

Where the weights that stay are solved anew after a cut, what the others can tell of a channel is not lost. Channels
are taken from the strongest down, and each counts with the variance that is left of it once those before it are known:
the squared diagonal of the Cholesky factor of their covariance in that order. Optimal brain surgeon (Hassibi and Stork
1993) removes by the same quantity, one after the other and from the other end; this order needs no loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ss_pruning.importance.regression import blocks, ridged_factor


def unexplained(covariance: Tensor, order_by: Tensor, rows: int, groups: int = 1) -> Tensor:
    """Share of each channel's variance that the stronger channels of its group leave open, `1 - R^2`: `[channels]`.

    Of two channels that are equal the stronger has what it has without the other, and the weaker 0. Few rows explain
    too well; the ridge grows with the channels a row.

    Args:
        covariance: `[channels, channels]` of what arrives.
        order_by: `[channels]`, how strong each is.
        rows: How many observations the covariance is from.
        groups: Of the layer that reads them; channels of other groups are of no use to it.
    """
    own = blocks(covariance.double(), groups)
    order = order_by.to(own.device).reshape(groups, -1).argsort(stable=True, dim=1, descending=True)
    own = own.gather(1, order[:, :, None].expand_as(own)).gather(2, order[:, None].expand_as(own))
    variance = own.diagonal(dim1=1, dim2=2)
    factor, ridge = ridged_factor(own, rows)
    if factor is None:  # whoever reads the scores refuses NaN
        return torch.full_like(order_by, torch.nan)
    floor = torch.finfo(torch.float64).tiny
    left = (factor.diagonal(dim1=1, dim2=2).square() - ridge) / variance.clamp_min(floor)
    return torch.empty_like(left).scatter_(1, order, left.clamp(0, 1)).flatten()
