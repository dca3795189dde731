"""Arrays: their types, noise in their place (the same on every device), statistics of their channels, digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ss_pruning.errors import InputError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def tensors_among(tree: Any) -> list[Tensor]:
    """The tensors in containers of any nesting, in the order in which they lie; other objects are not looked into."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def power_of_two_above(numbers: Tensor) -> float:
    """The least power of two above all of them, by which they can be divided without rounding; 2^126 or 2^-126 at most.

    Single precision holds no power much beyond.
    """
    _, exponent = torch.frexp(numbers.detach().abs().max())
    return float(2.0 ** int(exponent.clamp(-126, 126)))


def normal_like(inputs: Any, generator: torch.Generator, dtype: torch.dtype | None = None) -> Any:
    """Standard normal numbers in place of each tensor of floating point numbers in `inputs`, by default of its type."""

    def made(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        return drawn.to(tensor.device, dtype or tensor.dtype)

    return pytree.tree_map_only(Tensor, made, inputs)


def random_inputs(batch: int, size: Sequence[int], seed: int = 0) -> Tensor:
    """So many random inputs, `[batch, *size]`, the same for the same seed.

    Raises:
        InputError: They do not fit into memory.
    """
    try:
        return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))
    except RuntimeError as error:
        raise InputError(
            f"{batch} inputs of size {'x'.join(map(str, size))} do not fit into memory; take fewer or smaller ones."
        ) from error


def with_spectrum_of_photos(white: Tensor) -> Tensor:
    """White maps `[images, channels, *sides]` with amplitudes that fall as 1 / frequency; their mean square is 1."""
    axes, sides = tuple(range(2, white.dim())), white.shape[2:]
    waves = [torch.fft.fftfreq(side) * side for side in sides[:-1]]
    waves.append(torch.fft.rfftfreq(sides[-1]) * sides[-1])
    frequency = torch.stack(torch.meshgrid(*waves, indexing="ij")).square().sum(0).sqrt().clamp_min(1)
    maps: Tensor = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) / frequency, s=tuple(sides), dim=axes)
    return maps / maps.square().mean().sqrt()


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of `[N, C, ...]` over all else, `[1, C, 1, ...]`, in single precision at least.

    In two passes: about the mean, as squares of what lies far from 0 lose a small variance. On a CPU
    `torch.var_mean` takes six times as long.
    """
    x = x if x.dtype == torch.float64 else x.float()
    over = [axis for axis in range(x.dim()) if axis != 1]
    mean = x.mean(over, keepdim=True)
    return mean, (x - mean).square_().mean(over, keepdim=True)


def digest(tensors: Iterable[tuple[str, Tensor]], *said: object) -> str:
    """SHA-256 of tensors, their names, types, shapes and values, and of what JSON can say."""
    whole = hashlib.sha256(json.dumps(said).encode())
    for name, tensor in tensors:
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
