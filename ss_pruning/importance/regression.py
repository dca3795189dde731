"""What the channels that stay tell of those that go: linear regression within each group of the layer that reads them.

One ridge and one formula for all who ask: the sensitivity of a layer, its compensation, and scores that leave out what
stronger channels tell. So what is predicted is what will be done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning.errors import ModelError
from ss_pruning.graph.layers import groups_of, weight_of

# Added to the variances, as a share of their mean in the group; at least so much.
_RIDGE = 1e-3
# How often it is made ten times larger where rounding has left the covariance indefinite.
_TRIES = 6


def ridged_factor(covariance: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Cholesky factor of `[groups, n, n]` with a ridge on the diagonals, and that ridge, `[groups, 1]`.

    Few rows explain too well, so the ridge grows with the channels a row. Where rounding has left the covariance
    indefinite it is made larger.

    Raises:
        ModelError: It is not finite: only NaN has no factor.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    ridge = _share(covariance.shape[-1], rows) * variance + torch.finfo(covariance.dtype).tiny
    for _ in range(_TRIES):
        added = torch.diag_embed(ridge.expand(covariance.shape[:-1]))
        factor, failed = torch.linalg.cholesky_ex(covariance + added)
        if not bool(failed.any()):
            return factor, ridge
        ridge = 10 * ridge
    raise ModelError("what a layer reads is not finite on the calibration inputs; check them")


def _share(channels: int, rows: int) -> float:
    return max(_RIDGE, channels / max(rows, 1))


def blocks(covariance: Tensor, groups: int) -> Tensor:
    """Of `[channels, channels]`, what belongs to one group each: `[groups, n, n]`."""
    size = len(covariance) // groups
    own = torch.arange(groups, device=covariance.device)
    found: Tensor = covariance.unflatten(0, (groups, size)).unflatten(2, (groups, size))[own, :, own]
    return found


def precision(covariance: Tensor, groups: int, rows: int) -> Tensor:
    """Inverse of the covariance with its ridge, `[channels, channels]`: all regressions among channels follow from it.

    Channels of other groups tell nothing of a channel: the layer could not use it.

    Raises:
        ModelError: It is not finite.
    """
    factor, _ = ridged_factor(blocks(covariance, groups), rows)
    inverse: Tensor = torch.block_diag(*torch.cholesky_inverse(factor))
    return inverse


@dataclass(frozen=True)
class Predicted:
    """What a layer reads on removed channels is taken for `constant + kept channels @ slope`.

    Attributes:
        removed: `[removed]`, which channels go.
        kept: `[kept]`, the others.
        slope: `[kept, removed]`; None for a constant alone.
        constant: `[removed]`; both in float64.
    """

    removed: Tensor
    kept: Tensor
    slope: Tensor | None
    constant: Tensor

    @staticmethod
    def of(mean: Tensor, precision: Tensor | None, kept: Tensor, removed: Tensor) -> Predicted:
        """From the statistics of what is read; the mean alone without `precision`, see there."""
        kept, removed, mean = kept.to(mean.device), removed.to(mean.device), mean.double()
        if precision is None:
            return Predicted(removed, kept, None, mean[removed])
        rows = precision[removed]
        factor = torch.linalg.cholesky(rows[:, removed])
        slope = -torch.cholesky_solve(rows[:, kept], factor)
        return Predicted(removed, kept, slope.T, mean[removed] - slope @ mean[kept])

    def constants(self) -> Tensor:
        """`[channels]`, with zeros for those that stay."""
        every = self.constant.new_zeros(len(self.kept) + len(self.removed))
        every[self.removed] = self.constant
        return every

    def fill_(self, channels: Tensor, constant: bool = True) -> None:
        """Replace them in `[..., channels]`; without the constant, which the layer's bias may have."""
        value = self.constant.float() if constant else torch.zeros_like(self.constant).float()
        if self.slope is not None:
            value = value + channels[..., self.kept].float() @ self.slope.float()
        channels[..., self.removed] = value.to(channels.dtype)


def weights_by_group(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A view of the weight, or of another in its place: `[groups, outputs of a group, inputs of a group, ...]`."""
    weight = weight_of(module) if weight is None else weight
    by_group: Tensor = weight.detach().unflatten(0, (groups_of(module), -1))
    # Transposed convolutions store inputs first.
    return by_group.transpose(1, 2) if isinstance(module, _ConvNd) and module.transposed else by_group


def constant_output(module: nn.Module, constant: Tensor) -> Tensor:
    """`[out_channels]`: what a layer makes of constants in its inputs, `[in_channels]`, far from any border."""
    taps = weights_by_group(module).double()
    taps = taps.flatten(3).sum(3) if taps.dim() > 3 else taps
    if isinstance(module, _ConvNd) and module.transposed:
        taps = taps / math.prod(module.stride)  # an output sees some of the taps, on average so many
    by_group = constant.to(taps).unflatten(0, (len(taps), -1))
    return torch.einsum("goi,gi->go", taps, by_group).flatten()
