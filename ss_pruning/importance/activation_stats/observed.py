"""Mean, variance and covariance of what arrives at layers, summed over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ss_pruning._utils.arrays import power_of_two_above
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.progress import step
from ss_pruning._utils.running import call, preserved
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import channel_axis
from ss_pruning.graph.refusals import infinite_numbers
from ss_pruning.importance.calibration import Batch

# Positions of a batch from which the products of channels are taken, and the widest layer for which they are.
_PRODUCT_POSITIONS, _PRODUCT_CHANNELS = 2**13, 2**12
# Numbers that are summed in float64 at a time.
_CHUNK = 2**20


@dataclass(frozen=True)
class ActivationStatistics:
    """Per-channel mean and variance at the input of one layer.

    Attributes:
        mean: `[in_channels]`; None where the source only knows variances.
        variance: `[in_channels]`.
        unscaled: `[in_channels]`, True where no norm stands behind the channel (its variance is then taken as 1).
        covariance: `[in_channels, in_channels]` in float64, from a sample of the positions, if it was asked for.
        rows: How many positions that sample has.
    """

    mean: Tensor | None
    variance: Tensor
    unscaled: Tensor
    covariance: Tensor | None = None
    rows: int = 0


@dataclass(frozen=True)
class Seen:
    """Activation statistics, and how many values a channel and how many images they are from."""

    statistics: ActivationStatistics
    values: int
    images: int


def _by_image(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads as `[images, channels, positions]`, one image where it has no axis for them."""
    axis = channel_axis(module, x)
    x = x.detach().movedim(axis, 1) if axis else x.detach()[None]
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


class Sums:
    """Running sums of one layer's input, in float64.

    Attributes:
        share: What is read next comes from this share of a batch.
    """

    def __init__(self) -> None:
        self.values, self.images, self.share = 0, 0, 1.0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def __call__(self, module: nn.Module, x: Tensor) -> None:
        """Add what the layer reads in one call."""
        rows = _by_image(module, x)
        self.images += len(rows)
        self.values += len(rows) * rows.shape[2]
        for part in rows.split(max(_CHUNK // max(rows[:1].numel(), 1), 1)):
            numbers = part.double()
            self.total = self.total + numbers.sum((0, 2))
            self.squares = self.squares + numbers.square().sum((0, 2))

    def seen(self, dtype: torch.dtype) -> Seen:
        """Statistics of all that was added, in that precision, single at least."""
        mean = torch.as_tensor(self.total / self.values)
        variance = (torch.as_tensor(self.squares / self.values) - mean.square()).clamp_min(0)
        dtype = torch.promote_types(dtype, torch.float32)
        statistics = ActivationStatistics(
            mean.to(dtype), variance.to(dtype), torch.zeros_like(mean, dtype=torch.bool)
        )
        return Seen(statistics, self.values, self.images)


def positions_of(images: int, batch: int) -> int:
    """From how many positions products are taken, of so many images in batches of so many."""
    return -(-images // batch) * _PRODUCT_POSITIONS


class Products(Sums):
    """With the products of channels, at positions drawn from each batch.

    They are taken about the first batch's mean, and in units of its largest distance from there: products in single
    precision would lose a variance that is small beside the mean, and end at 1e-38.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn, self.about, self.unit = 0, torch.zeros(()), 1.0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, module: nn.Module, x: Tensor) -> None:
        """Add what the layer reads in one call."""
        super().__call__(module, x)
        rows = self._drawn(_by_image(module, x))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not self.drawn:
            self.about = rows.mean(1, keepdim=True)
            self.unit = power_of_two_above(rows - self.about)
        centred = (rows - self.about).div_(self.unit)
        with torch.autocast(rows.device.type, enabled=False):
            products = centred @ centred.T
        self.drawn += centred.shape[1]
        self.first = self.first + centred.sum(1, dtype=torch.float64)
        self.second = self.second + products.double()

    def _drawn(self, x: Tensor) -> Tensor:
        """`[channels, rows]`: so many positions of each image, the same in all that run at once."""
        each = math.ceil(_PRODUCT_POSITIONS * self.share / max(len(x), 1))
        if x.shape[2] > each:
            drawn = torch.randperm(x.shape[2], generator=self.generator)[:each]
            x = x.index_select(2, drawn.to(x.device))
        return x.transpose(0, 1).flatten(1)

    def seen(self, dtype: torch.dtype) -> Seen:
        """Likewise, with the covariance."""
        seen = super().seen(dtype)
        mean = torch.as_tensor(self.first / max(self.drawn, 1))
        covariance = (torch.as_tensor(self.second / max(self.drawn, 1)) - mean.outer(mean)) * self.unit**2
        statistics = replace(seen.statistics, covariance=covariance, rows=self.drawn)
        return replace(seen, statistics=statistics)


def observe(
    model: nn.Module,
    connectivity: Connectivity,
    batches: Iterable[list[Batch]],
    paths: Sequence[str],
    kind: type[Sums] = Sums,
    samples: int = 0,
) -> dict[str, Seen]:
    """Statistics of each layer's input over all positions of all batches, in one pass; only of layers that ran.

    Raises:
        InputError: There is no batch.
        ModelError: The model does not run on a batch, or a layer reads NaN or Inf.
    """
    sums: dict[str, Sums] = {}
    for path in paths:  # a depthwise layer reads each channel by itself
        layer = connectivity.layers[path]
        plain = layer.kind == "depthwise" or layer.inputs > _PRODUCT_CHANNELS
        sums[path] = (Sums if plain else kind)()
    modules = modules_of(model)
    count, seen = 0, 0
    try:
        watched = hooked({path: modules[path] for path in sums}, lambda path, layer, x: sums[path](layer, x))
        with watched, preserved(model, training=False), torch.no_grad():
            for parts in batches:
                for part in parts:
                    for s in sums.values():
                        s.share = len(part) / max(sum(map(len, parts)), 1)
                    call(model, part.inputs)
                    seen += len(part)
                    if samples:
                        step(seen, samples)
                count += 1
    except InputError:
        raise
    except Exception as error:
        raise ModelError(
            f"the model does not run on batch {count} ({type(error).__name__}: {error}); batches are inputs as the "
            "example inputs are, and may have labels behind them"
        ) from error
    if not count:
        raise InputError("the calibration batches are empty")
    found = {}
    for path, s in sums.items():
        weight = modules[path].weight
        if s.values and isinstance(weight, Tensor):
            found[path] = s.seen(weight.dtype)
            if not bool(found[path].statistics.variance.isfinite().all()):
                raise ModelError(f"'{path}' reads {infinite_numbers(weight.dtype)}")
    return found
