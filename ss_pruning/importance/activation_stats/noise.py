"""A model run on its own noise: what each norm leads to expect stands in the place of data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import normal_like, tensors_among
from ss_pruning._utils.hooks import given, hooked, replaced_forward
from ss_pruning._utils.modules import modules_of
from ss_pruning.errors import ModelError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import channel_axis
from ss_pruning.importance.activation_stats.observed import ActivationStatistics, Seen, observe
from ss_pruning.importance.calibration import Batch

_LEAST_SIDE = 32


@dataclass(frozen=True)
class _Noise:
    """How noise is laid out.

    Attributes:
        images: In one batch.
        by_image: One value of a channel an image, the same at all positions.
        shrink: Each side of the maps is this part of the example's.
    """

    images: int
    by_image: bool = False
    shrink: int = 1


# Of maps each image holds many values, of pooled vectors one.
_MAPS, _VECTORS = _Noise(4), _Noise(16, by_image=True)


def on_noise(
    model: nn.Module, connectivity: Connectivity, example_inputs: Any, paths: Sequence[str]
) -> dict[str, ActivationStatistics]:
    """Run the model on its own noise: every norm puts out `gamma z + beta`, and the image is standard noise too.

    Of the example only the shape counts, and not even its batch size unless the model runs on no other. Maps are seen
    with noise that is independent from position to position. Averaging over positions would leave next to nothing of
    that, so heads and gates, which see one vector an image, are seen in a second run, with noise that varies from image
    to image; all positions are alike there, so that a quarter of them will do if the model takes a smaller image.
    """
    shrinks = (2, 1) if _may_shrink(example_inputs) else (1,)
    seen = _noisy_run(model, connectivity, example_inputs, paths, _MAPS)
    vectors = [path for path, s in seen.items() if s.values == s.images]
    if vectors:
        for shrink in shrinks:
            with contextlib.suppress(*[ModelError] * (shrink > 1)):
                noise = replace(_VECTORS, shrink=shrink)
                seen |= _noisy_run(model, connectivity, example_inputs, vectors, noise)
                break
    return {path: s.statistics for path, s in seen.items()}


def _noisy_run(
    model: nn.Module,
    connectivity: Connectivity,
    example_inputs: Any,
    paths: Sequence[str],
    noise: _Noise,
) -> dict[str, Seen]:
    """Activation statistics on one batch of noise; on as many batches of the example's size, if it does not run."""
    example = Batch.of(example_inputs)
    try:
        return _seen_on_noise(model, connectivity, [example.resized(noise.images)], paths, noise)
    except ModelError:
        if len(example) == noise.images or noise.shrink > 1:
            raise
    return _seen_on_noise(model, connectivity, [example] * noise.images, paths, noise)


def _seen_on_noise(
    model: nn.Module,
    connectivity: Connectivity,
    batches: Iterable[Batch],
    paths: Sequence[str],
    noise: _Noise,
) -> dict[str, Seen]:
    """Activation statistics on noise in the place of batches."""
    generator = torch.Generator().manual_seed(0)
    modules, layers = modules_of(model), connectivity.layers

    def image(t: Tensor) -> Tensor:
        made: Tensor = normal_like(t, generator)
        if noise.shrink == 1 or not t.is_floating_point():
            return made
        return made[..., : t.shape[-2] // noise.shrink, : t.shape[-1] // noise.shrink]

    def before_norm(path: str, norm: nn.Module, x: Tensor) -> Tensor:
        z = stratified_normal(x, layers[path].in_axis, generator, by_image=noise.by_image)
        return _unnormalised(norm, z, layers[path].in_axis).to(x.dtype)

    with contextlib.ExitStack() as undo:
        undo.enter_context(hooked({p: modules[p] for p in layers if layers[p].kind == "norm"}, before_norm))
        silent: list[Any] = [None]  # what a layer that is not heard has put out last
        unheard = layers.keys() - _heard(connectivity, paths)
        undo.enter_context(
            hooked({p: modules[p] for p in unheard}, after=lambda *call: silent.__setitem__(0, call[-1]))
        )
        for path in unheard - connectivity.reaches_output.keys():
            undo.enter_context(replaced_forward(modules[path], _shape_only(modules[path])))
        for module in modules.values():
            if type(module) is nn.MultiheadAttention and module.batch_first:
                undo.enter_context(replaced_forward(module, _shape_only(module, silent)))
        return observe(model, connectivity, ([batch.mapped(image)] for batch in batches), paths)


def _may_shrink(example_inputs: Any) -> bool:
    """True of a single tensor of large images."""
    tensors = tensors_among(example_inputs)
    return len(tensors) == 1 and tensors[0].dim() == 4 and min(tensors[0].shape[2:]) >= 2 * _LEAST_SIDE


def _heard(connectivity: Connectivity, paths: Sequence[str]) -> set[str]:
    """Layers that reach those of `paths` not only through norms; of all others' outputs only the shape counts."""
    heard: set[str] = set()
    todo = list(paths)
    while todo:
        for source in {edge.source for edge in connectivity.edges[todo.pop()]} - heard:
            if source in connectivity.layers:
                heard.add(source)
                todo += [source] * (connectivity.layers[source].kind != "norm")
    return heard


def _shape_only(module: nn.Module, silent: Sequence[Any] | None = None) -> Callable[..., Any]:
    """A forward pass that sees one image of its batch, and puts out zeros in the right shape.

    With `silent`, of a module that reads just its last tensor; it is called as ever where it reads another.
    """
    forward = module.forward

    def one_image(*args: Any, **kwargs: Any) -> Any:
        x: Tensor = given(module, args, kwargs)
        heard = silent is not None and any(t is not silent[-1] for t in tensors_among((args, kwargs)))
        if heard or channel_axis(module, x) == 0 or len(x) < 2:
            return forward(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t[:1], (args, kwargs))
        return pytree.tree_map_only(
            Tensor, lambda y: y.new_zeros((len(x), *y.shape[1:])), forward(*args, **kwargs)
        )

    return one_image


def _unnormalised(norm: nn.Module, z: Tensor, axis: int) -> Tensor:
    """What a norm makes standard noise `z` of."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return z
    shape = [-1 if a == axis else 1 for a in range(z.dim())]
    eps = float(getattr(norm, "eps", 0.0))
    return z * (var + eps).sqrt().reshape(shape) + mean.reshape(shape)


def stratified_normal(
    like: Tensor, axis: int, generator: torch.Generator, *, by_image: bool = False
) -> Tensor:
    """Standard normal noise, along each channel one quantile from each of `n` strata of equal probability.

    All channels hold the same shuffled quantiles, each rotated by a random amount: as good as independent, and a
    thousandth of the cost of shuffling each. With `by_image` there is one an image (axis 0), not one a value.
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
