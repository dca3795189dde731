"""Synthetic calibration: images made from what batch norms remember of the training data.

Starting from noise with the spectrum of photos, pixels are changed until every batch norm's input has the mean and the
deviation that the norm recorded in training. Small terms ask for outputs that are confident for each image and differ
between images, and for smooth images. Such images are no pictures, but the layers respond to them much as to the real
data, which is all that `ss_pruning.compensation.folding` needs of its calibration images. As in ZeroQ (Cai et al., CVPR
2020) and DeepInversion (Yin et al., CVPR 2020); the statistics are compared in units of the recorded deviation, so no
layer needs a weight of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ss_pruning._utils import cache as _cache
from ss_pruning._utils.arrays import digest, mean_and_variance, tensors_among, with_spectrum_of_photos
from ss_pruning._utils.copying import retyped
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.progress import step
from ss_pruning._utils.running import call, preserved
from ss_pruning.compensation.batch_sizes import sizes_that_run
from ss_pruning.config import SyntheticImages
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.layers import has_statistics

# Counted up when the same model and settings give other images, so that those in the cache are made anew.
_RECIPE = 1

# Images that share one set of statistics, and Adam's rate for them (pixels have a deviation of about 1) and memory.
_BATCH, _RATE, _MEMORY = 64, 0.1, (0.7, 0.95)
_CONFIDENT, _DIVERSE, _SMOOTH = 0.1, 0.1, 0.1
# Share of the variance of the noise that all channels have in common.
_GREY = 0.8
# So many images by default, fewer where they are large: their number of positions in all is bounded.
_MOST, _FEWEST, _POSITIONS = 256, 32, 2**21


def synthesize(model: nn.Module, example_inputs: Any, settings: SyntheticImages) -> Tensor:
    """Make calibration images from a model's batch norms: no data, no labels.

    The work is done on a copy in float32; the model is not touched. The result is the same for the same seed. Steps are
    told to whoever listens (`ss_pruning._utils.progress`).

    Args:
        model: A trained model with batch norms.
        example_inputs: What `forward` takes: one tensor `[batch, channels, positions...]`, alone, in a tuple or in a
            dict; gives the shape, type and place of the result.
        settings: How many images, and how they are made.

    Returns:
        `[images, channels, positions...]`, as the model takes them, that is after any normalisation of pixels; one half
        is made, the other are its mirror images.

    Raises:
        InputError: The inputs are no images.
        ModelError: There is no batch norm with running statistics, the model does not run, or it yields NaN.
    """
    example, steps = _example(example_inputs), settings.steps
    shape = _shape(example, settings)
    unit, most = sizes_that_run(model, example_inputs)
    half = -(-shape[0] // (2 * unit)) * unit
    each = most or max(_BATCH // unit, 1) * unit
    sizes = [min(each, half - begin) for begin in range(0, half, each)]
    generator = torch.Generator().manual_seed(settings.seed)
    listening = _listening(model, example_inputs, example.device, settings.seed)
    made = []
    with torch.inference_mode(False), torch.enable_grad(), listening as listen:
        for number, size in enumerate(sizes):
            noise = _natural_noise((size, *shape[1:]), generator).to(example.device)

            def report(done: int, before: int = number * steps) -> None:
                step(before + done, len(sizes) * steps)

            made.append(_optimise(noise, listen, steps, report))
    found = torch.cat(made)
    return torch.cat([found, found.flip(-1)])[: shape[0]].to(example).contiguous()


def synthetic_images(model: nn.Module, example_inputs: Any, settings: SyntheticImages) -> Tensor:
    """`synthesize` with a cache: `$SS_PRUNING_CACHE`, or else `ss_pruning` in the user's cache folder.

    It knows a model by its structure, its parameters and its buffers. A damaged file is made anew; an unwritable folder
    only costs time.
    """
    example = _example(example_inputs)
    shape = _shape(example, settings)
    name = f"synthetic-{_key(model, shape, settings.steps, settings.seed)}"
    if (found := _kept(name, shape)) is None:
        found = synthesize(model, example_inputs, settings)
        _cache.write(name, {"images": found.float().cpu()})
    return found.to(example).contiguous()


def _shape(example: Tensor, settings: SyntheticImages) -> tuple[int, ...]:
    """Of all images."""
    count = default_images(example) if settings.images is None else settings.images
    return (count, *example.shape[1:])


def _kept(name: str, shape: tuple[int, ...]) -> Tensor | None:
    """What the cache holds under that name, if it is sound."""
    found = (_cache.read(name) or {}).get("images")
    return found if found is not None and found.shape == shape and bool(found.isfinite().all()) else None


def default_images(example: Tensor) -> int:
    """How many images of that size are made unless told."""
    return max(_FEWEST, min(_MOST, _POSITIONS // max(example[0, 0].numel(), 1)))


def _example(inputs: Any) -> Tensor:
    """The one tensor of images in the example inputs."""
    tensors = tensors_among(inputs)
    if len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].dim() >= 3:
        return tensors[0]
    kind = f"a tensor of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
    raise InputError(
        f"synthetic calibration makes images, one float tensor [batch, channels, height, width]; the example input is "
        f"{kind}. Give calibration inputs instead"
    )


def _key(model: nn.Module, *settings: object) -> str:
    """What the result depends on: the recipe, structure and state of the model, and the settings."""
    state = ((name, tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor))
    return digest(state, repr((_RECIPE, settings, model)))[:24]


#: Maps images to the model's output and to how far each batch norm is from its memory.
_Listen = Callable[[Tensor], tuple[Any, list[Tensor]]]


@contextlib.contextmanager
def _listening(model: nn.Module, inputs: Any, device: torch.device, seed: int) -> Iterator[_Listen]:
    """A copy of the model that tells how well its norms recognise what they see."""
    net = retyped(model, lambda tensor: _as_float32(tensor, device)).requires_grad_(False)
    norms = {path: module for path, module in modules_of(net).items() if has_statistics(module)}
    if not norms:
        raise ModelError(
            f"{type(model).__name__} has no batch norm with running statistics, nothing to synthesize from; "
            "give calibration images"
        )
    heard: list[Tensor] = []

    def hear(_: str, norm: nn.Module, x: Tensor) -> None:
        heard.append(_distance(norm, x))

    def listen(images: Tensor) -> tuple[Any, list[Tensor]]:
        heard.clear()
        try:
            output = call(net, pytree.tree_map_only(Tensor, lambda _: images, inputs))
        except Exception as error:
            raise ModelError(
                f"the model does not run on a batch of {list(images.shape)} for synthetic calibration "
                f"({type(error).__name__}: {error}); give calibration images"
            ) from error
        if not heard:
            raise ModelError("the model runs none of its batch norms; give calibration images")
        return output, list(heard)

    with preserved(net, training=False), hooked(norms, hear):
        torch.manual_seed(seed)  # should the model draw numbers of its own
        yield listen


def _as_float32(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there; whole numbers stay what they are."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device, dtype, copy=True)


def _distance(norm: Any, x: Tensor) -> Tensor:
    """Squared differences of mean and deviation from the recorded ones, in units of the recorded deviation."""
    mean, var, eps = norm.running_mean, norm.running_var, norm.eps
    m, v = (moment.flatten() for moment in mean_and_variance(x))
    deviation = (var + eps).sqrt()
    differences: Tensor = ((m - mean) / deviation).square() + ((v + eps).sqrt() / deviation - 1).square()
    return differences.mean()


def _natural_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise of deviation 1 as photos have it: amplitudes fall as 1 / frequency, and the channels are much alike.

    Real images are far closer to it than to white noise, and so are the images made of it.
    """
    images, channels, *sides = shape

    def noise(count: int) -> Tensor:
        return with_spectrum_of_photos(torch.randn(images, count, *sides, generator=generator))

    return math.sqrt(_GREY) * noise(1) + math.sqrt(1 - _GREY) * noise(channels)


def _optimise(noise: Tensor, listen: _Listen, steps: int, report: Callable[[int], None]) -> Tensor:
    """One batch of images: Adam on the pixels, with a rate that falls to nothing as half a cosine.

    Every other step sees them mirrored, so that the mirror images serve as well as they do.
    """
    layout = torch.channels_last if noise.dim() == 4 else torch.contiguous_format
    pixels = noise.to(memory_format=layout).requires_grad_()
    adam = torch.optim.Adam([pixels], lr=_RATE, betas=_MEMORY)
    for number in range(steps):
        adam.param_groups[0]["lr"] = _RATE * (1 + math.cos(math.pi * number / steps)) / 2
        output, distances = listen(pixels.flip(-1) if number % 2 else pixels)
        loss = torch.stack(distances).mean() + _SMOOTH * _roughness(pixels) + _indecision(output)
        if not loss.isfinite():
            raise ModelError(
                "synthetic calibration met NaN or Inf: the model overflows on noise; give calibration images"
            )
        (pixels.grad,) = torch.autograd.grad(loss, pixels)
        adam.step()
        report(number + 1)
    return pixels.detach()


def _roughness(images: Tensor) -> Tensor:
    """Mean squared difference of neighbours, summed over the axes of positions."""
    return sum(
        (images.diff(dim=axis).square().mean() for axis in range(2, images.dim()) if images.shape[axis] > 1),
        start=images.new_zeros(()),
    )


def _indecision(output: Any) -> Tensor | float:
    """Low where a classifier is sure of each image and names all classes alike; 0 for other outputs."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        return 0.0
    logs = F.log_softmax(output, 1)
    each = -(logs.exp() * logs).sum(1).mean()
    mean = logs.exp().mean(0)
    return _CONFIDENT * each + _DIVERSE * (mean * mean.clamp_min(1e-12).log()).sum()
