"""Which layers' outputs are added to what: there, reconstruction can aim at the sum.

A residual sum puts a layer's output on top of a tensor that the pruned model has already got slightly wrong. If that
tensor is known when the layer is solved, the layer can make up for the error instead of adding its own on top. Found by
watching one forward pass: no table of architectures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import output_of
from ss_pruning.graph.layers import ask

_ADDS = frozenset(
    {
        torch.add,
        Tensor.add,
        Tensor.add_,
        Tensor.__add__,
        Tensor.__iadd__,
        Tensor.__radd__,
        torch.Tensor.__radd__,
    }
)
# A norm channel of a slope below this share of the largest hardly reaches the sum: it is not asked to repair it.
_LEAST_SLOPE = 1e-2
_TEST_POINTS = (-8.0, 0.0, 8.0)


@dataclass(frozen=True)
class Sum:
    """What a layer's output is added to.

    Attributes:
        norm: Path of the norm between the layer and the sum, if there is one.
        module: Path of a module that takes or gives the other summand before the layer runs.
        side: Whether it is the first thing that the module takes ("in"), or what it gives ("out").
    """

    norm: str | None
    module: str
    side: Literal["in", "out"]


def find_sums(model: nn.Module, example_inputs: Any, norms: Mapping[str, str]) -> dict[str, Sum]:
    """Layers that end in a sum whose other side is there before they run; by path."""
    watch = _Watch(model, norms)
    output_of(model, example_inputs, hooked(modules_of(model), watch.taking, watch.giving), watch)
    return {path: found for path, found in watch.sums() if found.norm is None or watch.affine(found.norm)}


class _Watch(TorchFunctionMode):
    """Notes which tensors modules take and give, and which are added. Keeps them, so that no `id` is used twice."""

    def __init__(self, model: nn.Module, norms: Mapping[str, str]) -> None:
        super().__init__()
        self.model, self.norms = model, norms
        self.kept: list[Tensor] = []
        self.calls: Counter[str] = Counter()
        self.began: dict[str, int] = {}
        self.places: dict[int, list[tuple[int, str, Literal["in", "out"]]]] = {}
        self.ends: dict[int, tuple[str, str | None]] = {}
        self.added: dict[str, tuple[str | None, int]] = {}
        self.dimensions: dict[str, int] = {}
        self.layers = {norm: path for path, norm in norms.items()}

    def taking(self, path: str, _: nn.Module, x: Any) -> None:
        """A module begins."""
        self.calls[path] += 1
        self.began[path] = len(self.kept)
        if isinstance(x, Tensor):
            self._note(x, path, "in")

    def giving(self, path: str, module: nn.Module, _: Any, output: Any) -> None:
        """A module has ended."""
        if not isinstance(output, Tensor):
            return
        self._note(output, path, "out")
        if path in self.layers:
            self.dimensions[path] = output.dim()
            self.ends[id(output)] = (self.layers[path], path)
        elif isinstance(getattr(module, "weight", None), Tensor):
            self.ends[id(output)] = (path, None)

    def _note(self, tensor: Tensor, path: str, side: Literal["in", "out"]) -> None:
        self.places.setdefault(id(tensor), []).append((len(self.kept), path, side))
        self.kept.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDS and not kwargs and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            a, b = args
            self.kept += (a, b)
            if a.shape == b.shape and a is not b:
                self._adding(a, b)
                self._adding(b, a)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # changed in place, it is no layer's output any more
            self.ends.pop(id(result), None)
            self.kept.append(result)
        return result

    def _adding(self, end: Tensor, other: Tensor) -> None:
        if id(end) in self.ends:
            path, norm = self.ends[id(end)]
            self.added[path] = (norm, id(other))

    def sums(self) -> list[tuple[str, Sum]]:
        """By layer that ran once, a place where the other summand passed before it ran, at a module that ran once."""
        found = []
        for path, (norm, other) in self.added.items():
            for when, module, side in self.places.get(other, []):
                before = when < self.began[path] and self.calls[module] == self.calls[path] == 1
                if before and path != module:
                    found.append((path, Sum(norm, module, side)))
                    break
        return found

    def affine(self, norm: str) -> bool:
        """True if the norm does no more than scale and shift: some have an activation inside, or measure each input."""
        module = self.model.get_submodule(norm)
        if not isinstance(getattr(module, "running_mean", None), Tensor):
            return False
        low, middle, high = _at_points(module, self.dimensions[norm])
        return torch.allclose(high - middle, middle - low, rtol=1e-3, atol=1e-5)


def slope(norm: nn.Module | None, like: Tensor) -> Tensor:
    """By how much the norm scales each channel of `like` (`[N, C, ...]`), ready to divide by; infinite where hardly."""
    if norm is None:
        return torch.ones((), dtype=like.dtype, device=like.device)
    low, _, high = _at_points(norm, like.dim())
    _, deviation = _statistics(norm)
    s = (high - low) / ((_TEST_POINTS[2] - _TEST_POINTS[0]) * deviation)
    s = torch.where(s.abs() > _LEAST_SLOPE * s.abs().max(), s, torch.full_like(s, float("inf")))
    return s.to(like.dtype).reshape(-1, *[1] * (like.dim() - 2))


def _at_points(norm: nn.Module, dimensions: int) -> Tensor:
    """`[points, C]`: what the norm makes of inputs so many standard deviations from the mean."""
    mean, deviation = _statistics(norm)
    points = torch.tensor(_TEST_POINTS, dtype=mean.dtype, device=mean.device)[:, None]
    x = (mean + points * deviation).reshape(len(points), -1, *[1] * (dimensions - 2))
    return ask(norm, {}, x).flatten(1)


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    return mean, (variance + float(getattr(norm, "eps", 0.0))).sqrt()
