"""Variance of what arrives at each synaptic input channel: from the norms' scales, from noise, or from data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.hooks import given, on_input, replaced
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import call, preserved
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import channel_axis
from ss_pruning.importance.calibration import Batch, stream

# Images of noise for Gaussian statistics: of maps each holds many values, of pooled vectors one.
_MAP_IMAGES, _VECTOR_IMAGES = 4, 16
_LEAST_SIDE = 32
# Positions of a batch from which the products of channels are taken, and the widest layer for which they are.
_PRODUCT_POSITIONS, _PRODUCT_CHANNELS = 2**13, 2**12
# Numbers that are summed in float64 at a time.
_CHUNK = 2**20
#: "batchnorm", "gaussian", or an iterable of batches, see `ss_pruning.importance.calibration`.
StatisticsSource = str | Iterable[Any]


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


def measure(
    model: nn.Module,
    connectivity: Connectivity,
    source: StatisticsSource,
    example_inputs: Any,
    paths: Sequence[str],
    *,
    covariance: bool = False,
) -> dict[str, ActivationStatistics]:
    """Statistics of the inputs of the layers `paths`; layers that only run in training are told by their norms.

    With `covariance`, and batches as the source, covariances too, which take memory of the square of a width a layer:
    not of what depthwise layers read, nor of more than 4,096 channels.

    Raises:
        InputError: `source` is an unknown name, or an iterable without a batch.
        ModelError: The model does not run on a batch.
    """
    if isinstance(source, str):
        if source == "batchnorm":
            scales = norm_scales(model, connectivity)
            return {path: from_norms(connectivity, path, scales) for path in paths}
        if source == "gaussian":
            found = _on_noise(model, connectivity, example_inputs, paths)
        else:
            raise InputError(
                f"unknown statistics {source!r}; use 'batchnorm', 'gaussian', or batches of inputs"
            )
    elif isinstance(source, Tensor):
        raise InputError(
            "statistics must be an iterable of batches; wrap a single one in a list: statistics=[x]"
        )
    else:
        batches = stream(source, example_inputs)
        seen = _observe(model, connectivity, batches, paths, _Products if covariance else _Sums)
        found = {path: s.statistics for path, s in seen.items()}
    # Auxiliary heads run in training only: the norms have to tell.
    scales = norm_scales(model, connectivity) if len(found) < len(paths) else {}
    return {path: found[path] if path in found else from_norms(connectivity, path, scales) for path in paths}


def norm_scales(model: nn.Module, connectivity: Connectivity) -> dict[str, Tensor]:
    """Squared scale of every norm channel; 1 for a norm without a scale."""
    scales, modules = {}, modules_of(model)
    for path, layer in connectivity.layers.items():
        if layer.kind == "norm":
            weight = getattr(modules[path], "weight", None)
            scales[path] = torch.ones(layer.outputs) if weight is None else weight.square().flatten()
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


def _on_noise(
    model: nn.Module, connectivity: Connectivity, example_inputs: Any, paths: Sequence[str]
) -> dict[str, ActivationStatistics]:
    """Run the model on its own noise: every norm puts out `gamma z + beta`, and the image is standard noise too.

    Of the example only the shape counts, and not even its batch size unless the model runs on no other. Maps are seen
    with noise that is independent from position to position. Averaging over positions would leave next to nothing of
    that, so heads and gates, which see one vector an image, are seen in a second run, with noise that varies from image
    to image; all positions are alike there, so that a quarter of them will do if the model takes a smaller image.
    """
    seen = _noisy_run(model, connectivity, example_inputs, paths, images=_MAP_IMAGES)
    vectors = [path for path, s in seen.items() if s.values == s.images]
    if vectors:
        small = _may_shrink(example_inputs)
        for shrink in (2, 1) if small else (1,):
            with contextlib.suppress(*[ModelError] * (shrink > 1)):
                seen |= _noisy_run(
                    model,
                    connectivity,
                    example_inputs,
                    vectors,
                    images=_VECTOR_IMAGES,
                    by_image=True,
                    shrink=shrink,
                )
                break
    return {path: s.statistics for path, s in seen.items()}


def _noisy_run(
    model: nn.Module,
    connectivity: Connectivity,
    example_inputs: Any,
    paths: Sequence[str],
    *,
    images: int,
    by_image: bool = False,
    shrink: int = 1,
) -> dict[str, _Seen]:
    """Activation statistics on one batch of noise, on maps of which each side is `1 / shrink` of the example's.

    A model that does not run on so many images sees as many batches, of the example's size.
    """
    example = Batch.of(example_inputs)
    try:
        return _seen_on_noise(model, connectivity, [example.resized(images)], paths, by_image, shrink)
    except ModelError:
        if len(example) == images or shrink > 1:
            raise
    return _seen_on_noise(model, connectivity, [example] * images, paths, by_image, shrink)


def _seen_on_noise(
    model: nn.Module,
    connectivity: Connectivity,
    batches: Iterable[Batch],
    paths: Sequence[str],
    by_image: bool,
    shrink: int,
) -> dict[str, _Seen]:
    """Activation statistics on noise in the place of batches."""
    generator = torch.Generator().manual_seed(0)

    def noise(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        made = torch.randn(t.shape, generator=generator).to(t)
        return made if shrink == 1 else made[..., : t.shape[-2] // shrink, : t.shape[-1] // shrink]

    modules = modules_of(model)
    with contextlib.ExitStack() as undo:
        for path, layer in connectivity.layers.items():
            if layer.kind == "norm":
                hook = _noise_hook(layer.in_axis, generator, by_image)
                undo.callback(on_input(modules[path], hook).remove)
        for path in _unheard(connectivity):
            undo.callback(_shape_only(modules[path]))
        return _observe(model, connectivity, (batch.mapped(noise) for batch in batches), paths)


def _may_shrink(example_inputs: Any) -> bool:
    """True of a single tensor of large images."""
    tensors = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    return len(tensors) == 1 and tensors[0].dim() == 4 and min(tensors[0].shape[2:]) >= 2 * _LEAST_SIDE


def _unheard(connectivity: Connectivity) -> set[str]:
    """Layers that only norms read: when those put out noise, of what such a layer puts out only the shape counts."""
    read: set[str] = set()
    read_by_others = set(connectivity.reaches_output)
    for path, edges in connectivity.edges.items():
        sources = {edge.source for edge in edges}
        read |= sources
        if connectivity.layers[path].kind != "norm":
            read_by_others |= sources
    return {path for path in read - read_by_others if path in connectivity.layers}


def _shape_only(module: nn.Module) -> Callable[[], object]:
    """Let a layer see one image of its batch, and put out zeros in the right shape; returns what undoes it."""
    forward, before = module.forward, vars(module).get("forward")

    def one_image(*args: Any, **kwargs: Any) -> Any:
        x: Tensor = given(module, args, kwargs)
        if channel_axis(module, x) == 0 or len(x) < 2:
            return forward(*args, **kwargs)
        args, kwargs = replaced(module, args, kwargs, x[:1])
        y = forward(*args, **kwargs)
        return y.new_zeros((len(x), *y.shape[1:]))

    vars(module)["forward"] = one_image
    if before is None:
        return lambda: vars(module).pop("forward")
    return lambda: vars(module).update(forward=before)


def _noise_hook(
    axis: int, generator: torch.Generator, by_image: bool
) -> Callable[[nn.Module, Tensor], Tensor]:
    def hook(module: nn.Module, x: Tensor) -> Tensor:
        z = stratified_normal(x, axis, generator, by_image=by_image)
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(
            var, Tensor
        ):  # undo the normalisation that will be applied
            shape = [-1 if a == axis else 1 for a in range(z.dim())]
            eps = float(getattr(module, "eps", 0.0))
            z = z * (var + eps).sqrt().reshape(shape) + mean.reshape(shape)
        return z.to(x.dtype)

    return hook


def stratified_normal(
    like: Tensor, axis: int, generator: torch.Generator, *, by_image: bool = False
) -> Tensor:
    """Standard normal noise, along each channel one quantile from each of `n` strata of equal probability.

    All channels hold the same shuffled quantiles, each rotated by a random amount: as good as independent, and a
    thousandth of the cost of shuffling each.

    Args:
        like: Gives shape and device.
        axis: Where its channels lie.
        generator: Source of randomness.
        by_image: One quantile an image (axis 0) rather than one a value.
    """
    channels, images = like.shape[axis], like.shape[0]
    values = like.numel() // max(channels, 1)
    n = images if by_image and axis else values
    shuffled = _normal_quantiles(n)[torch.randperm(n, generator=generator)].to(like.device)
    turn = torch.randint(n, (channels,), generator=generator).to(like.device)
    sign = torch.randint(2, (channels, 1), generator=generator).to(like.device) * 2 - 1
    z = torch.cat([shuffled, shuffled]).unfold(0, max(n, 1), 1)[turn].mul_(sign)
    if n == 1:  # one stratum has one quantile, and that is 0
        z = torch.randn(channels, 1, generator=generator).to(like.device)
    if n < values:
        z = z.repeat_interleave(values // n, 1)
    rest = [size for a, size in enumerate(like.shape) if a != axis]
    noise: Tensor = z.reshape(channels, *rest).movedim(0, axis)
    return noise


@lru_cache(maxsize=16)
def _normal_quantiles(n: int) -> Tensor:
    """`[n]`, the middles of `n` strata of equal probability, with variance 1."""
    quantiles: Tensor = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()
    scale: Tensor = quantiles.square().mean().sqrt().clamp_min(1e-12)
    return quantiles / scale


@dataclass(frozen=True)
class _Seen:
    """Activation statistics, and how many values a channel and how many images they are from."""

    statistics: ActivationStatistics
    values: int
    images: int


def _by_image(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads as `[images, channels, positions]`, one image where it has no axis for them."""
    axis = channel_axis(module, x)
    x = x.detach().movedim(axis, 1) if axis else x.detach()[None]
    return x.flatten(2) if x.dim() > 2 else x[:, :, None]


class _Sums:
    """Running sums of one layer's input, in float64."""

    def __init__(self) -> None:
        self.values, self.images = 0, 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def __call__(self, module: nn.Module, x: Tensor) -> None:
        rows = _by_image(module, x)
        self.images += len(rows)
        self.values += len(rows) * rows.shape[2]
        for part in rows.split(max(_CHUNK // max(rows[:1].numel(), 1), 1)):
            numbers = part.double()
            self.total = self.total + numbers.sum((0, 2))
            self.squares = self.squares + numbers.square().sum((0, 2))

    def seen(self, dtype: torch.dtype) -> _Seen:
        mean = torch.as_tensor(self.total / self.values)
        variance = (torch.as_tensor(self.squares / self.values) - mean.square()).clamp_min(0)
        dtype = torch.promote_types(dtype, torch.float32)
        statistics = ActivationStatistics(
            mean.to(dtype), variance.to(dtype), torch.zeros_like(mean, dtype=torch.bool)
        )
        return _Seen(statistics, self.values, self.images)


class _Products(_Sums):
    """With the products of channels, at positions drawn from each batch.

    They are taken about the first batch's mean: products in single precision would lose a variance that is small
    beside the mean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn, self.about = 0, torch.zeros(())
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, module: nn.Module, x: Tensor) -> None:
        super().__call__(module, x)
        rows = self._drawn(_by_image(module, x))
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not self.drawn:
            self.about = rows.mean(1, keepdim=True)
        centred = rows - self.about
        with torch.autocast(rows.device.type, enabled=False):
            products = centred @ centred.T
        self.drawn += centred.shape[1]
        self.first = self.first + centred.sum(1, dtype=torch.float64)
        self.second = self.second + products.double()

    def _drawn(self, x: Tensor) -> Tensor:
        """`[channels, rows]`: so many positions of each image, the same in all of a batch."""
        each = -(-_PRODUCT_POSITIONS // max(len(x), 1))
        if x.shape[2] > each:
            drawn = torch.randperm(x.shape[2], generator=self.generator)[:each]
            x = x.index_select(2, drawn.to(x.device))
        return x.transpose(0, 1).flatten(1)

    def seen(self, dtype: torch.dtype) -> _Seen:
        seen = super().seen(dtype)
        mean = torch.as_tensor(self.first / max(self.drawn, 1))
        covariance = torch.as_tensor(self.second / max(self.drawn, 1)) - mean.outer(mean)
        statistics = replace(seen.statistics, covariance=covariance, rows=self.drawn)
        return replace(seen, statistics=statistics)


def _observe(
    model: nn.Module,
    connectivity: Connectivity,
    batches: Iterable[Batch],
    paths: Sequence[str],
    kind: type[_Sums] = _Sums,
) -> dict[str, _Seen]:
    """Statistics of each layer's input over all positions of all batches, in one pass; only of layers that ran."""
    sums: dict[str, _Sums] = {}
    for path in paths:  # a depthwise layer reads each channel by itself
        layer = connectivity.layers[path]
        plain = layer.kind == "depthwise" or layer.inputs > _PRODUCT_CHANNELS
        sums[path] = (_Sums if plain else kind)()
    modules = modules_of(model)
    count = 0
    try:
        with contextlib.ExitStack() as undo, preserved(model, training=False), torch.no_grad():
            for path, s in sums.items():
                undo.callback(on_input(modules[path], s).remove)
            for batch in batches:
                call(model, batch.inputs)
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
    return found
