"""What layers cost in seconds at other widths: each measured alone, once a machine, and interpolated between.

Multiply-accumulates do not say how long a layer takes: early layers of a network wait for memory, and hardware works in
blocks of channels, so that time goes in steps where MACs go in a line. The table knows both.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils import cache as _cache
from ss_pruning._utils.arrays import Floats
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.modules import device_of, modules_of
from ss_pruning._utils.running import checked_call, preserved
from ss_pruning.graph.connectivity import Connectivity, Key, Side
from ss_pruning.graph.groups import PruningGroup
from ss_pruning.graph.layers import channel_axis, groups_of, is_depthwise, width
from ss_pruning.profiling.latency import machine, race
from ss_pruning.surgery.cut import Cut, cut_layer

#: Shares of a layer's inputs and outputs at which it is measured.
GRID = (0.125, 0.5, 1.0)
#: Multiples that widths may be rounded to.
ROUNDINGS = (1, 2, 4, 8, 16, 32)
_BLOCK = ROUNDINGS[-1]
#: A coarser rounding must spare more than this share of a group's time.
_WORTH = 0.02
#: What a layer saves when it vanishes is at least this share of its time.
_LEAST = 0.05


@dataclass(frozen=True)
class LayerLatency:
    """One layer's cost.

    Attributes:
        grid: `[inputs, outputs]`, seconds at the shares `GRID` of the two widths; equal rows if it has only one.
        waste: By side, `[roundings]`: by how much a width just above a block, a multiple of `ROUNDINGS[i]` but of
            no larger one, costs more than its share of the next block; no entry where the side is too narrow to tell.
    """

    grid: Floats
    waste: Mapping[str, Floats]

    def at(self, inputs: float, outputs: float) -> float:
        """Seconds at these shares of the widths, interpolated."""
        by_output = [float(np.interp(inputs, GRID, self.grid[:, o])) for o in range(len(GRID))]
        return float(np.interp(outputs, GRID, by_output))


@dataclass(frozen=True)
class LatencyTable:
    """The layers of one model, in seconds: by path, the cost and the sides whose widths it depends on."""

    layers: Mapping[str, tuple[LayerLatency, Key | None, Key | None]]

    def total(self, share: Mapping[Key, float]) -> float:
        """Seconds of all layers when their sides keep these shares of their widths."""
        return sum(
            time.at(share[into] if into else 1.0, share[out] if out else 1.0)
            for time, into, out in self.layers.values()
        )

    def slope(self, share: Mapping[Key, float]) -> dict[Key, float]:
        """Seconds that the whole width of each side is worth, from what halving it saves."""
        found = dict.fromkeys(share, 0.0)
        for time, into, out in self.layers.values():
            whole = time.at(1.0, 1.0)
            for key, halved in ((into, (0.5, 1.0)), (out, (1.0, 0.5))):
                if key is not None:  # noise may say that less takes longer
                    found[key] += max(2 * (whole - time.at(*halved)), _LEAST * whole)
        return found

    def rounding(self, group: PruningGroup) -> int:
        """The finest multiple for the group's widths that wastes next to nothing of what its layers take."""
        wasted, whole = np.zeros(len(ROUNDINGS)), 0.0
        for member in group.members:
            time, _, _ = self.layers.get(member.path, (None, None, None))
            if time is not None and member.side in time.waste:
                seconds = time.at(1.0, 1.0)
                wasted, whole = wasted + seconds * time.waste[member.side], whole + seconds
        fine = [r for r, waste in zip(ROUNDINGS, wasted, strict=True) if waste <= _WORTH * whole]
        size = min(subgroup.size for subgroup in group.subgroups)
        return next((r for r in fine if size >= 2 * r), 1)


def latency_table(model: nn.Module, example_inputs: Any, connectivity: Connectivity) -> LatencyTable:
    """Measure every layer of a model alone, on inputs of the shapes that reach it; kept on disk for the next time."""
    modules = modules_of(model)
    arriving = _arrivals(model, example_inputs, connectivity.layers)
    layers: dict[str, tuple[LayerLatency, Key | None, Key | None]] = {}
    with torch.inference_mode():
        for path, (x, calls) in arriving.items():
            layer = connectivity.layers[path]
            into: Key | None = (path, "in") if layer.kind == "synaptic" else None
            side: Side = "through" if layer.kind in ("norm", "response") else "out"
            out: Key | None = None if layer.kind == "positional" else (path, side)
            found = _kept_or_measured(modules[path], x, layer.kind, side)
            layers[path] = LayerLatency(calls * found.grid, found.waste), into, out
    return LatencyTable(layers)


def _arrivals(model: nn.Module, example_inputs: Any, paths: Collection[str]) -> dict[str, tuple[Tensor, int]]:
    """By path: an empty tensor like what the layer is called on, and how often it is."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def note(path: str, _: nn.Module, arriving: Tensor) -> None:
        x, calls = seen.get(path, (arriving.to("meta"), 0))
        seen[path] = x, calls + 1

    modules = {path: model.get_submodule(path) for path in paths}
    with hooked(modules, note), preserved(model, training=False), torch.no_grad():
        checked_call(model, example_inputs)
    return seen


def _kept_or_measured(module: nn.Module, x: Tensor, kind: str, side: Side) -> LayerLatency:
    device = device_of(module)
    what = type(module).__qualname__, repr(module), tuple(x.shape), x.stride(), x.dtype, kind
    recipe = repr((what, machine(device), GRID, ROUNDINGS))
    name = f"layer-{hashlib.sha256(recipe.encode()).hexdigest()[:24]}"
    kept = _from_cache(name)
    if kept is not None:
        return kept
    time = _Lone(module, x, device, kind, side).measured()
    tensors = {"grid": time.grid, **{f"waste.{key}": value for key, value in time.waste.items()}}
    _cache.write(name, {key: torch.from_numpy(value) for key, value in tensors.items()})
    return time


def _from_cache(name: str) -> LayerLatency | None:
    found = _cache.read(name)
    arrays = {key: tensor.double().numpy() for key, tensor in found.items()} if found else {}
    waste = {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith("waste.")}
    grid = arrays.get("grid")
    if (
        grid is None
        or grid.shape != (len(GRID),) * 2
        or any(len(w) != len(ROUNDINGS) for w in waste.values())
    ):
        return None  # not there, or not ours
    return LayerLatency(grid, waste)


class _Lone:
    """One layer out of its model, cut to any width and timed."""

    def __init__(self, module: nn.Module, x: Tensor, device: torch.device, kind: str, side: Side) -> None:
        self.module = copy.deepcopy(module).eval()
        self.module._forward_hooks.clear()
        self.module._forward_pre_hooks.clear()
        noise = torch.Generator(device).manual_seed(0)  # the user's random state is not ours to spend
        self.x = torch.zeros_like(x, device=device)
        if x.is_floating_point():
            self.x.normal_(generator=noise)
        self.device, self.kind, self.side = device, kind, side
        self.inputs, self.outputs = width(self.module, "in"), width(self.module, "out")

    def measured(self) -> LayerLatency:
        """The layer's times; proportional to its widths where it cannot be cut to any."""
        try:
            return LayerLatency(self._grid(), self._waste())
        except (RuntimeError, ValueError, IndexError, TypeError):
            scale = np.outer(GRID, GRID) if self.kind == "synaptic" else np.outer(np.ones(3), GRID)
            return LayerLatency(self._seconds(self.inputs, self.outputs) * scale, {})

    def _grid(self) -> Floats:
        conv = self.module
        if isinstance(conv, _ConvNd) and groups_of(conv) > 1 and not is_depthwise(conv):
            raise ValueError("its widths go in steps of its groups")
        widths = [[max(1, round(n * share)) for share in GRID] for n in (self.inputs, self.outputs)]
        if self.kind != "synaptic":
            one = [self._seconds(self.inputs, o) for o in widths[1]]
            return np.array([one] * len(GRID))
        return np.array([[self._seconds(i, o) for o in widths[1]] for i in widths[0]])

    def _waste(self) -> dict[str, Floats]:
        sides = ("in", "out") if self.kind == "synaptic" else (self.side,)
        found = {}
        for side in sides:
            full = self.inputs if side == "in" else self.outputs
            base = int(0.75 * full) // _BLOCK * _BLOCK - _BLOCK
            if base > 0:
                found[side] = self._waste_above(base, side)
        return found

    def _waste_above(self, base: int, side: str) -> Floats:
        """The cost of widths just above `base`, against a straight line between the blocks at both ends."""

        def seconds(n: int) -> float:
            return self._seconds(*((n, self.outputs) if side == "in" else (self.inputs, n)))

        low, high = seconds(base), seconds(base + _BLOCK)
        line = [low + (high - low) * r / _BLOCK for r in ROUNDINGS[:-1]]
        waste = [seconds(base + r) / at - 1 for r, at in zip(ROUNDINGS[:-1], line, strict=True)]
        return np.array([*waste, 0.0])

    def _seconds(self, inputs: int, outputs: int) -> float:
        layer = copy.deepcopy(self.module)
        if outputs < self.outputs:
            cut_layer(layer, Cut("", self.side, self.outputs, tuple(range(outputs))))
        if inputs < self.inputs and self.kind == "synaptic":
            cut_layer(layer, Cut("", "in", self.inputs, tuple(range(inputs))))
        x = self._narrowed(inputs if self.kind == "synaptic" else outputs)
        (timing,) = race([lambda: layer(x)], self.device, 0.02, (3, 9), 1.0)
        return min(timing.seconds)  # noise only ever adds

    def _narrowed(self, channels: int) -> Tensor:
        axis = channel_axis(self.module, self.x) if self.kind == "synaptic" else 1
        if isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)) and self.x.shape[-1] == self.inputs:
            axis = self.x.dim() - 1
        if channels == self.x.shape[axis]:
            return self.x
        last = self.x.dim() == 4 and not self.x.is_contiguous()
        return self.x.narrow(axis, 0, channels).contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
