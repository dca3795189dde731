"""What a channel says that the stronger ones do not: the part of it that no compensation can make up for.

Where the weights that stay are solved anew after a cut, what the others can tell of a channel is not lost. Channels
are taken from the strongest down, and each counts with the variance that is left of it once those before it are known:
the squared diagonal of the Cholesky factor of their covariance in that order. Optimal brain surgeon (Hassibi and Stork
1993) removes by the same quantity, one after the other and from the other end; this order needs no loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the variances, as a share of their mean.
_RIDGE = 1e-3
# How often it is made ten times larger where rounding has left the covariance indefinite.
_TRIES = 6


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
    size = len(covariance) // groups
    blocks = covariance.double().unflatten(0, (groups, size)).unflatten(2, (groups, size))
    own = torch.arange(groups, device=covariance.device)
    blocks = blocks[own, :, own]  # [groups, size, size]
    strengths = order_by.to(covariance.device).reshape(groups, size)
    order = strengths.argsort(stable=True, dim=1, descending=True)
    blocks = blocks.gather(1, order[:, :, None].expand_as(blocks)).gather(2, order[:, None].expand_as(blocks))
    variance = blocks.diagonal(dim1=1, dim2=2)
    ridge = max(_RIDGE, size / max(rows, 1)) * variance.mean(1, keepdim=True)
    floor = torch.finfo(torch.float64).tiny
    factor, ridge = ridged_factor(blocks, ridge + floor)
    if factor is None:  # whoever reads the scores refuses NaN
        return torch.full_like(order_by, torch.nan)
    left = (factor.diagonal(dim1=1, dim2=2).square() - ridge) / variance.clamp_min(floor)
    return torch.empty_like(left).scatter_(1, order, left.clamp(0, 1)).flatten()


def ridged_factor(covariance: Tensor, ridge: Tensor) -> tuple[Tensor | None, Tensor]:
    """Cholesky factor of `[..., n, n]` with `ridge`, `[..., 1]`, on the diagonal, and the ridge that it took.

    Where rounding has left the covariance indefinite the ridge is made larger. Only NaN has no factor.
    """
    for _ in range(_TRIES):
        added = torch.diag_embed(ridge.expand(covariance.shape[:-1]))
        factor, failed = torch.linalg.cholesky_ex(covariance + added)
        if not bool(failed.any()):
            return factor, ridge
        ridge = 10 * ridge
    return None, ridge
