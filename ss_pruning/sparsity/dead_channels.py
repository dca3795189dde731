"""What is alive in a masked network: kernels, inputs that never change, channels that nothing reads.

Whether a channel is constant is measured, not derived: the network is run on noise, with the output of every layer
that has something alive behind it replaced by fresh noise, so that no rectifier is shut by accident. What then arrives
unchanged does not depend on the image; what is also the same at every position and for every sample is a constant.
Zero kernels, norms without scale, residual sums, gates and borders are all seen for what they do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import normal_like
from ss_pruning._utils.hooks import hooked
from ss_pruning._utils.running import output_of
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Subgroup
from ss_pruning.graph.layers import channel_axis, groups_of, is_linear_in_weight, mixes_channels, weight_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.strength import at_synapses, by_input_channel, kernel_powers

# Amplitudes of the noise, one run each. Small: gates stay open. Large, both ways: rectifiers open whatever the shift.
_AMPLITUDES = (1.0, 1000.0, -1000.0)
# Largest spread, relative to the largest value, that is rounding.
_ROUNDING = {torch.float64: 1e-12}
_COARSE_ROUNDING = 1e-5


def living_kernels(module: nn.Module) -> Tensor:
    """True for every 2-D kernel (or single weight) with an entry other than 0, `[out, in // groups]`."""
    return kernel_powers(module, weight_of(module).detach().ne(0).float()) > 0


def reading(module: nn.Module, channel: int) -> Tensor:
    """The kernels that read one input channel, as a view of the weight."""
    weight = weight_of(module)
    if isinstance(module, _ConvNd) and module.transposed:
        return weight.data[channel]
    group, position = divmod(channel, weight.shape[1])
    rows = len(weight) // groups_of(module)
    return weight.data[group * rows : (group + 1) * rows, position]


@dataclass
class Liveness:
    """What is alive in one model.

    Attributes:
        kernels: By layer, `[out, in // groups]`: kernels with an entry other than 0.
        still: By layer, `[in]`: channels at which the same arrives whatever the image.
        constant: By layer, `[in]`: of these, the ones at which it is one number at every position.
        value: By layer, `[in]`: that number.
        opaque: Layers that compute their weights, so that a kernel of zeros says nothing about what it does.
    """

    kernels: dict[str, Tensor] = field(default_factory=dict)
    still: dict[str, Tensor] = field(default_factory=dict)
    constant: dict[str, Tensor] = field(default_factory=dict)
    value: dict[str, Tensor] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)


def measure_liveness(traced: TracedModel) -> Liveness:
    """Look at the kernels, and run the network on noise until no further constant is found."""
    kernels, opaque, layers = {}, set(), traced.connectivity.layers
    for path in traced.connectivity.weighted:
        module = traced.modules[path]
        kernels[path] = living_kernels(module).cpu()
        if not is_linear_in_weight(module):
            opaque.add(path)
            kernels[path] = torch.ones_like(kernels[path])
    fed = {path: _fed(traced.connectivity, path) for path in layers}
    still: dict[str, Tensor] = {}
    while True:
        seen = {path: _Arrivals(layer.inputs) for path, layer in layers.items()}
        dead = {path: _dead_outputs(traced, path, kernels.get(path), still.get(path)) for path in layers}
        for amplitude in _AMPLITUDES:
            _run_on_noise(traced, seen, dead, amplitude)
        before = still
        # What was found stays found: unions make this end.
        still = {
            path: a.still() & fed[path] | before.get(path, torch.tensor(False)) for path, a in seen.items()
        }
        if all(path in before and before[path].equal(still[path]) for path in still):
            break
    constant = {path: arrivals.constant() & fed[path] for path, arrivals in seen.items()}
    value = {path: arrivals.high.cpu() for path, arrivals in seen.items()}
    return Liveness(kernels, still, constant, value, opaque)


def wanted_inputs(
    traced: TracedModel, kernels: Mapping[str, Tensor], mixing: Collection[str]
) -> dict[str, Tensor]:
    """By layer, `[in]`: the channels from which a path of living `kernels` leads to the model's output.

    Starts with nothing read and works back from the output, so that blocks that only feed themselves are found too.
    Channels that no subgroup may cut count as read, as does all that layers see which look at several channels together
    (`mixing`).
    """
    subgroups = traced.coupling.subgroups
    alive = {path: torch.ones(len(rows), dtype=torch.bool) for path, rows in kernels.items()}
    for member in (m for s in subgroups for m in s.members if m.side == "out" and m.path in alive):
        alive[member.path][member.index.reshape(-1)] = False
    changed = True
    while changed:
        changed = False
        wanted = {
            path: by_input_channel(traced.modules[path], rows & alive[path][:, None]).any(1)
            for path, rows in kernels.items()
        }
        for subgroup in subgroups:
            read = _reads(subgroup, wanted, traced.connectivity, mixing)
            for member in subgroup.members:
                if member.side != "out" or member.path not in alive:
                    continue
                index = torch.from_numpy(member.index)
                new = read[:, None] & ~alive[member.path][index]
                if bool(new.any()):
                    changed = True
                    alive[member.path][index[new]] = True
    return wanted


def _reads(
    subgroup: Subgroup, wanted: dict[str, Tensor], connectivity: Connectivity, mixing: Collection[str]
) -> Tensor:
    """`[channel sets]`: True where some consumer wants one of the channel set's channels."""
    read = torch.full((subgroup.size,), any(member.path in mixing for member in subgroup.members))
    for member in subgroup.members:
        if is_consumer(member.path, member.side, connectivity):
            read |= wanted[member.path][torch.from_numpy(member.index)].any(1)
    return read


def is_consumer(path: str, side: str, connectivity: Connectivity) -> bool:
    """True for the input side of a layer that mixes channels."""
    return side == "in" and connectivity.layers[path].kind == "synaptic"


def response(module: nn.Module, shape: tuple[int, ...], axis: int, values: Tensor) -> Tensor:
    """What a layer makes of channels that hold `values` everywhere, less what it makes of nothing."""
    shape = (1, *shape[1:]) if axis else shape
    x = values.reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
    with torch.no_grad():
        answer: Tensor = module.forward(x) - module.forward(torch.zeros_like(x))
    return answer


def has_no_border(module: nn.Module, shapes: Iterable[tuple[int, ...]], axis: int) -> bool:
    """True if constant inputs make constant outputs at every position: no zero padding is seen."""
    weight = weight_of(module)
    n = next(iter(shapes := list(shapes)))[axis]
    values = torch.rand(n, generator=torch.Generator().manual_seed(0)).to(weight) + 0.5
    for shape in set(shapes):
        y = response(module, shape, axis, values)
        rows = y.movedim(channel_axis(module, y), 0).flatten(1)
        low, high = rows.aminmax(dim=1)
        if not bool((high - low <= _rounding(rows) * len(values) * rows.abs().max()).all()):
            return False
    return True


class _Arrivals:
    """Extremes and fingerprints of what arrives at each channel of one layer, over all runs."""

    def __init__(self, channels: int) -> None:
        self.low, self.high = torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf)
        self.varies = torch.zeros(channels, dtype=torch.bool)
        self.prints: list[Tensor] = []
        self.calls = 0

    def add(self, x: Tensor, axis: int) -> None:
        rows = x.detach().movedim(axis, 0).flatten(1)
        low, high = rows.aminmax(dim=1)
        self.low, self.high = torch.minimum(low, self.low.to(low)), torch.maximum(high, self.high.to(high))
        weights = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(1)).to(rows)
        print_ = rows @ weights / weights.sum()
        if self.calls == len(self.prints):
            self.prints.append(print_)
        else:
            same = (print_ - self.prints[self.calls]).abs() <= _rounding(rows) * rows.abs().amax(1)
            self.varies = self.varies.to(same.device) | ~same
        self.calls += 1

    def still(self) -> Tensor:
        """`[channels]`: what arrives does not depend on the image."""
        return (~self.varies & self.high.isfinite() & self.low.isfinite()).cpu()

    def constant(self) -> Tensor:
        """`[channels]`: it is one number, everywhere."""
        scale = torch.maximum(self.low.abs(), self.high.abs())
        return self.still() & (self.high - self.low <= _rounding(self.high) * scale).cpu()


def _fed(connectivity: Connectivity, path: str) -> Tensor:
    """`[in]`: channels that a layer feeds. Of others (an embedding of given tokens) noise cannot tell what they do."""
    fed = torch.zeros(connectivity.layers[path].inputs, dtype=torch.bool)
    for edge in connectivity.edges[path]:
        if edge.source in connectivity.layers:
            fed[edge.pairs[:, 1].cpu()] = True
    return fed


def _rounding(x: Tensor) -> float:
    return _ROUNDING.get(x.dtype, _COARSE_ROUNDING)


def _dead_outputs(
    traced: TracedModel, path: str, alive: Tensor | None, still: Tensor | None
) -> Tensor | None:
    """`[out]`: the output channels that depend on nothing that varies; None for a layer that is let run."""
    layer, module = traced.connectivity.layers[path], traced.modules[path]
    if layer.kind == "norm":
        weight = getattr(module, "weight", None)
        dead = torch.zeros(layer.outputs).bool() if weight is None else weight.detach().eq(0).flatten().cpu()
        return dead if still is None or mixes_channels(module) else dead | still
    if alive is None:
        return None
    if still is None:
        return ~alive.any(1)
    return ~(alive & at_synapses(module, ~still, len(alive))).any(1)


def _run_on_noise(
    traced: TracedModel, seen: dict[str, _Arrivals], dead: dict[str, Tensor | None], amplitude: float
) -> None:
    """One pass: record what arrives at every layer, and replace what leaves it alive."""
    generator, layers = torch.Generator().manual_seed(int(abs(amplitude))), traced.connectivity.layers

    def before(path: str, _: nn.Module, x: Tensor) -> None:
        seen[path].add(x, layers[path].in_axis)

    def after(path: str, module: nn.Module, _: Tensor, y: Tensor) -> Tensor | None:
        pruned = dead[path]
        if pruned is None:
            return None
        axis = channel_axis(module, y)
        shape = [-1 if a == axis else 1 for a in range(y.dim())]
        return torch.where(pruned.to(y.device).reshape(shape), y, normal_like(y, generator) * amplitude)

    sign = 1 if amplitude > 0 else -1
    noisy = pytree.tree_map_only(
        Tensor,
        lambda t: sign * t if t.is_floating_point() else t,
        normal_like(traced.example_inputs, generator),
    )
    for arrivals in seen.values():
        arrivals.calls = 0
    output_of(traced.model, noisy, hooked({path: traced.modules[path] for path in layers}, before, after))
