"""What a model costs as a function of how far each group has shrunk.

Exact and cheap, since MACs and parameters of a layer are bilinear in its input and output widths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor, nn

from ss_pruning._utils.arrays import Floats
from ss_pruning._utils.modules import parameters_of
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity, Edge
from ss_pruning.graph.groups import PruningGroup
from ss_pruning.graph.layers import LayerType, layer_type_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.profiling.layer_latency import LatencyTable
from ss_pruning.profiling.macs import count_macs, macs_between_layers
from ss_pruning.surgery.plan import Plan

#: What a channel can cost; "latency" is in seconds, as `Costs.times` has them.
Cost = Literal["macs", "params", "latency"]


class Costs:
    """MACs, parameters and seconds of the model as functions of how far each group has shrunk.

    Attributes:
        macs: Multiply-accumulates of the dense model.
        layer_macs: The same by layer path.
        params: Parameters of the dense model.
        times: What the layers take; None unless latency is the budget.
    """

    times: LatencyTable | None = None

    def __init__(self, traced: TracedModel) -> None:
        coupling = traced.coupling
        self.keys = list(coupling.widths)
        self.number = {key: i for i, key in enumerate(self.keys)}
        self.widths: Floats = np.array([coupling.widths[key] for key in self.keys], dtype=np.float64)
        self.macs, self.layer_macs = count_macs(traced.model, traced.example_inputs)
        parameters = parameters_of(traced.model)
        self.params = sum(p.numel() for p in parameters.values())
        # One row a term: amount, and the two sides it is proportional to (the last, constant side is always full).
        self.mac_terms: list[tuple[float, int, int]] = []
        self.param_terms: list[tuple[float, int, int]] = []
        self.estimated = False  # whether operations of a layer were shared among several tensors
        self.excluded, self.lone = coupling.excluded, coupling.lone
        self._collect(traced.modules, parameters, traced.connectivity)
        if not self.in_layers:
            between = macs_between_layers(traced.model, traced.example_inputs)
            self._collect_between(between, traced.connectivity)

    def _collect(
        self,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, Tensor],
        connectivity: Connectivity,
    ) -> None:
        full = len(self.keys)
        for path, layer in connectivity.layers.items():
            if layer.kind == "positional":
                continue
            out = self.number[(path, "through") if layer.kind in ("norm", "response") else (path, "out")]
            mixes = layer.kind == "synaptic" and path not in self.lone
            into = self.number[path, "in"] if mixes else full
            if (own := layer_type_of(modules[path])) is not None:
                self._collect_registered(path, modules[path], own)
                continue
            self.mac_terms.append((self.layer_macs.get(path, 0), into, out))
            for name, parameter in modules[path]._parameters.items():
                if parameter is None:
                    continue
                both = mixes and name == "weight"
                self.param_terms.append((parameter.numel(), into if both else full, out))
        for name in connectivity.loose:
            if name in parameters:
                self.param_terms.append((parameters[name].numel(), full, self.number[name, "tensor"]))

    def _collect_registered(self, path: str, module: nn.Module, own: LayerType) -> None:
        """Each tensor shrinks with the sides that lie in it; operations are shared among matrices by their sizes."""
        sides = [(own.axes[side], self.number[path, side]) for side in ("in", "out")]
        matrices: list[tuple[float, int, int]] = []
        for name, parameter in module.named_parameters():
            found = [number for names, number in sides if name in names]
            if found:
                term = parameter.numel(), found[0] if len(found) == 2 else len(self.keys), found[-1]
                self.param_terms.append(term)
                matrices += [term] if parameter.dim() > 1 else []
        total = sum(size for size, _, _ in matrices)
        self.mac_terms += [(self.layer_macs.get(path, 0) * n / total, a, b) for n, a, b in matrices]
        self.estimated |= len(matrices) != 1

    def _collect_between(self, macs: Mapping[str, int], connectivity: Connectivity) -> None:
        """Operations of attention shrink with queries and keys, and with values, each by their share of the channels.

        All others (recurrent layers, products with tensors that no layer owns) count as if they stayed.
        """
        for path, amount in macs.items():
            mixing = self._mixing(connectivity.edges.get(path, ()))
            if not mixing or (path, "in") not in self.number:
                continue
            total, full = sum(mixing.values()), len(self.keys)
            values = connectivity.layers[path].inputs
            each = amount / (total / 2 + values)  # of a channel of queries (and its key's), or of values
            self.mac_terms.append((each * values, full, self.number[path, "in"]))
            self.mac_terms += [(each * count / 2, full, side) for side, count in mixing.items()]
            self.estimated = True

    def _mixing(self, edges: Iterable[Edge]) -> dict[int, int]:
        """By side, how many channels of queries and keys it makes."""
        found: dict[int, int] = {}
        for edge in (edge for edge in edges if edge.heads is not None):
            sides = [self.number.get((edge.source, side)) for side in ("out", "through")]
            side = next((side for side in sides if side is not None), None)
            if side is not None and edge.heads is not None:
                found[side] = len(edge.heads.pairs[:, 0].unique())
        return found

    @property
    def in_layers(self) -> bool:
        """True if all multiply-accumulates are inside layers (none in attention, say), so that `after` is exact."""
        return not self.estimated and self.macs == sum(amount for amount, _, _ in self.mac_terms)

    def macs_after(self, plan: Plan) -> int:
        """Multiply-accumulates after the cut; only exact if all are `in_layers`."""
        removed = np.zeros(len(self.keys))
        for cut in plan.cuts:
            removed[self.number[cut.key]] = cut.width - len(cut.kept)
        return round(self.after("macs", removed))

    def removed_per_step(self, groups: Sequence[PruningGroup]) -> Floats:
        """`[groups, sides]`: how many channels of each side one step of each group removes."""
        removed = np.zeros((len(groups), len(self.keys)))
        for u, group in enumerate(groups):
            for member in group.members:
                removed[u, self.number[member.key]] += member.index.size / group.steps
        return removed

    def per_channel_set(self, groups: Sequence[PruningGroup], kind: Cost) -> Floats:
        """`[groups]`: what the dense model saves with the first channel set of each group, as a share of its cost."""
        saved = self.removed_per_step(groups) @ (self._slope(kind) / self.widths)
        channel_sets = np.array([group.size / group.steps for group in groups])
        saved_each: Floats = saved / channel_sets / self.dense(kind)
        return saved_each

    def _slope(self, kind: Cost) -> Floats:
        """`[sides]`: what the whole width of each side is worth."""
        if kind == "latency":
            slopes = self._measured().slope(dict.fromkeys(self.keys, 1.0))
            return np.array([slopes[key] for key in self.keys])
        terms = np.array(self.mac_terms if kind == "macs" else self.param_terms).reshape(-1, 3)
        slope = np.zeros(len(self.keys) + 1)  # the last side is always full
        for side in (1, 2):
            np.add.at(slope, terms[:, side].astype(np.int64), terms[:, 0])
        return slope[:-1]

    def held(self, kind: Cost) -> str:
        """What layers whose outputs stay cost in the dense model, by the three reasons that cost most."""
        terms = self.mac_terms if kind == "macs" else self.param_terms
        cost: dict[str, float] = defaultdict(float)
        for amount, _, out in terms:
            cost[self.keys[out][0]] += amount
        held = sorted(
            ((sum(cost[p] for p in left.paths), left) for left in self.excluded), key=lambda h: -h[0]
        )
        parts = []
        for amount, left in held[:3]:
            first = sorted(left.paths, key=lambda path: -cost[path])[:2]
            more = f" and {len(left.paths) - 2} others" if len(left.paths) > 2 else ""
            share = amount / self.dense(kind)
            parts.append(f"{share:.1%} in {', '.join(map(repr, first))}{more} ({left.reason})")
        said = f". Of the {kind}, layers that keep their outputs hold {'; '.join(parts)}" if parts else ""
        outside = self.macs - sum(amount for amount, _, _ in self.mac_terms) if kind == "macs" else 0
        if not outside:
            return said
        return f"{said}. {outside / self.macs:.1%} outside of layers count as if they stayed"

    def multiples(
        self, round_to: int | Literal["measured"] | None, groups: Sequence[PruningGroup]
    ) -> int | dict[str, int] | None:
        """What widths are rounded to; by a group's name where the layers' times are to say so."""
        if round_to != "measured":
            return round_to
        return {group.name: self._measured().rounding(group) for group in groups}

    def _measured(self) -> LatencyTable:
        if self.times is None:
            raise InputError("costs in seconds need measured layer times: set Costs.times")
        return self.times

    def dense(self, kind: Cost) -> float:
        """What the dense model costs."""
        if kind == "latency":
            return self.after(kind, np.zeros(len(self.keys)))
        return self.macs if kind == "macs" else self.params

    def after(self, kind: Cost, removed: Floats) -> float:
        """Cost when `removed` (`[sides]`) channels are gone."""
        share = np.append((self.widths - removed) / self.widths, 1.0)
        if kind == "latency":
            return self._measured().total(dict(zip(self.keys, share[:-1].tolist(), strict=True)))
        terms = np.array(self.mac_terms if kind == "macs" else self.param_terms).reshape(-1, 3)
        into, out = terms[:, 1].astype(np.int64), terms[:, 2].astype(np.int64)
        saved = float((terms[:, 0] * (1 - share[into] * share[out])).sum())
        return self.dense(kind) - saved
