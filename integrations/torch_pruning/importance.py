"""Torch-Pruning: `SynapticImportance` for every pruner."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.arrays import Ints
from ss_pruning._utils.modules import checksums, modules_of, parameters_of, tensors_of, unchanged
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import is_depthwise
from ss_pruning.graph.tracing import trace
from ss_pruning.importance import synaptic
from ss_pruning.importance.synaptic import LayerScores, Reads
from ss_pruning.integrations.torch_pruning.recovered_inputs import recover_inputs


class SynapticImportance(synaptic.SynapticImportance, tp.importance.Importance):  # type: ignore[misc]
    """Importance of a channel by what its synapses transport, for every Torch-Pruning pruner and for `prune_`.

    Takes the arguments of `ss_pruning.importance.synaptic.SynapticImportance`, and works without any. In a
    Torch-Pruning pruner who feeds whom is traced anew when a width has changed; without `example_inputs`, the input
    that Torch-Pruning's graph was built with is recovered from what its first layers have read.
    """

    scorer = synaptic.SynapticImportance.scorer  # beside `__call__`: both give the same scores

    _traced: tuple[Any, Any, Connectivity, Any] | None = None
    _round: _Round | None = None

    def __call__(self, group: Any) -> Tensor | None:
        """Scores of the group's channels, `[len(group[0].idxs)]`, not negative; None where nothing reads them.

        Raises:
            InputError: The group belongs to no model that can be traced.
        """
        now = self._current_round(group)
        place = _Places(group[0].root_idxs)
        consumers = (item for item in group if _is_consumer(item.dep, group._DG))
        reads = (Reads(now.path_of(item.dep.target.module), *place(item)) for item in consumers)
        return now.layers.added(reads, place.count)

    def _current_round(self, group: Any) -> _Round:
        """Torch-Pruning gives no sign when a round over its groups begins.

        It has begun when a root comes by that was seen before, or when a number in the model was changed.
        """
        graph, root = group._DG, (group[0].dep.target.module, group[0].idxs[0])
        connectivity = self._trace(graph.model, graph)
        numbers = checksums(self._read(graph.model, connectivity, group))
        now = self._round
        seen = now is None or root in now.roots or not unchanged(numbers, now.numbers)
        if now is None or seen or now.layers.connectivity is not connectivity:
            layers = self._layer_scores(graph.model, connectivity, numbers, partial(self._inputs, graph))
            now = self._round = _Round(layers, {m: path for path, m in modules_of(graph.model).items()})
        now.roots.add(root)
        now.numbers |= numbers
        return now

    def _read(self, model: nn.Module, connectivity: Connectivity, group: Any) -> Mapping[str, Tensor]:
        """What the scores of a group are made from: with the paper's variances only norms and its own layers."""
        if self.statistics != "batchnorm" or self.score == "relevance":
            return tensors_of(model)
        own = {item.dep.target.module for item in group}
        return {
            f"{path}.{name}": tensor
            for path, module in modules_of(model).items()
            if module in own or (path in connectivity.layers and connectivity.layers[path].kind == "norm")
            for name, tensor in tensors_of(module).items()
        }

    def _trace(self, model: nn.Module, graph: Any) -> Connectivity:
        """The connectivity of the model as it is now; kept until a width changes."""
        given = getattr(graph, "connectivity", None)
        if isinstance(given, Connectivity):
            return given
        shapes = tuple(p.shape for p in parameters_of(model).values())
        if self._traced is not None and self._traced[0]() is model and self._traced[1] == shapes:
            return self._traced[2]
        inputs = self._inputs(graph)
        connectivity = trace(model, inputs)
        self._traced = (weakref.ref(model), shapes, connectivity, inputs)
        return connectivity

    def _inputs(self, graph: Any) -> Any:
        if self.example_inputs is not None:
            return self.example_inputs
        given = getattr(graph, "example_inputs", None)
        if given is not None:
            return given
        traced = self._traced
        return traced[3] if traced and traced[0]() is graph.model else recover_inputs(graph.model, graph)


@dataclass
class _Round:
    """One round over all groups, of a model that does not change meanwhile."""

    layers: LayerScores
    paths: dict[nn.Module, str]
    numbers: dict[str, Tensor] = field(default_factory=dict)
    roots: set[tuple[nn.Module, int]] = field(default_factory=set)

    def path_of(self, module: nn.Module) -> str:
        if module not in self.paths:
            raise InputError(
                "the importance was asked about a layer that is not in the group's model; use one "
                "SynapticImportance per model, or build the pruner anew after replacing layers"
            )
        return self.paths[module]


class _Places:
    """Where the channels of a group's items belong in the group's scores."""

    def __init__(self, roots: Sequence[int]) -> None:
        first = list(dict.fromkeys(roots))
        self.count = len(first)
        self.of_root = np.full(max(first, default=-1) + 2, -1)
        self.of_root[first] = np.arange(len(first))

    def __call__(self, item: Any) -> tuple[Ints, Ints]:
        """Channels of the item's layer, and their places; those with no place are left out."""
        roots = np.minimum(np.asarray(item.root_idxs, dtype=np.int64), len(self.of_root) - 1)
        places = self.of_root[roots]
        known = places >= 0
        return np.asarray(item.idxs, dtype=np.int64)[known], places[known]


def _is_consumer(dep: Any, graph: Any) -> bool:
    """True for the input side of a layer that mixes channels (a depthwise one hands its single input on)."""
    module = dep.target.module
    if not isinstance(module, (_ConvNd, nn.Linear)) or is_depthwise(module):
        return False
    return bool(graph.is_in_channel_pruning_fn(dep.handler)) and not graph.is_out_channel_pruning_fn(
        dep.handler
    )
