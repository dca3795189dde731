"""Torch-Pruning: `SynapticImportance`, an importance for every pruner."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import permutations, product
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ss_pruning._utils.arrays import Ints
from ss_pruning._utils.hooks import on_input
from ss_pruning._utils.modules import modules_of, parameters_of, tensors_of
from ss_pruning._utils.running import call, preserved
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.layers import groups_of, is_depthwise
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import ActivationStatistics, MomentSource, measure
from ss_pruning.importance.conditional_variance import unexplained
from ss_pruning.importance.relevance import relevance
from ss_pruning.importance.strength import by_input_channel, entropy, share, synaptic_paths, synaptic_power

# So many inputs at most are looked for where several are recovered.
_MOST_INPUTS = 3
_GIVE_INPUTS = "give the input yourself: SynapticImportance(example_inputs=x)"
Score = Literal["share", "strength", "entropy", "relevance"]
Reduction = Literal["sum", "mean", "max"]
Normalizer = Literal["mean", "max", "sum"]


class SynapticImportance(tp.importance.Importance):  # type: ignore[misc]
    """Importance of a channel: what its synapses transport to everything that reads it.

    Works without arguments and data in every Torch-Pruning pruner. For each consumer of the channel in the group the
    scores of its synapses are reduced over the consumer's outputs, then added over the consumers. Scores follow the
    model: they are taken from the current weights, and who feeds whom is traced anew when a width has changed.

    Args:
        statistics: Where variances come from, see `ss_pruning.synaptic_strength`. The default, "gaussian", is the one
            that `benchmarks/accuracy.py` prefers on training images; "batchnorm" is the paper's, and the fastest:
            take it for pruners that regularise, which score at every training step.
        score: "share" of each output's variance (default), "strength" itself, its Gaussian "entropy", or "relevance":
            shares of the model's output, see `ss_pruning.importance.relevance`.
        reduce: How the scores of a channel's synapses to one consumer become one: "sum", "mean" or "max". Means nothing
            to relevance.
        normalizer: Divide the scores of a group by their "mean", "max" or "sum"; None leaves them comparable
            across layers as they are, which is what shares are for.
        example_inputs: What the model's `forward` takes. Without it, the input that Torch-Pruning's graph was built
            with is recovered from what its first layers have read, and the model is run on it to see whether it is.
        conditional: Count less of what the stronger channels that a consumer sees tell already, see
            `ss_pruning.importance.conditional_variance`: where they explain `R^2` of a channel, its score is multiplied
            by `1 - R^2` to this power, from 0 (nothing of it is made up for) to 1 (all). For cuts after which the
            weights that stay are solved anew: `prune_` takes 1 then, and 0.5 where layers compete by these scores.
            Needs batches as `statistics`.

    Raises:
        InputError: An option is unknown or out of range.
    """

    def __init__(
        self,
        statistics: MomentSource = "gaussian",
        score: Score = "share",
        reduce: Reduction = "sum",
        normalizer: Normalizer | None = None,
        example_inputs: Any = None,
        conditional: float = 0.0,
    ) -> None:
        _check("score", score, get_args(Score))
        _check("reduce", reduce, ("sum", "mean", "max"))
        _check("normalizer", normalizer, (None, "mean", "max", "sum"))
        if not 0 <= conditional <= 1:
            raise InputError(f"conditional={conditional!r} must lie in [0, 1]")
        if isinstance(statistics, str):
            _check("statistics", statistics, ("batchnorm", "gaussian"))
            if conditional:
                raise InputError(
                    f"conditional={conditional!r} needs covariances; {statistics!r} has none: give batches"
                )
        self.statistics = (
            list(statistics) if isinstance(statistics, Iterator) else statistics
        )  # each look at it needs them all
        self.score, self.reduce, self.normalizer = score, reduce, normalizer
        self.conditional = conditional
        self.example_inputs = example_inputs
        self._connectivity: tuple[Any, Any, Connectivity] | None = None
        self._statistics: tuple[Connectivity, dict[str, Tensor], dict[str, ActivationStatistics]] | None = (
            None
        )
        self._pass = _Pass()

    def __call__(self, group: Any) -> Tensor | None:
        """Scores of the group's channels, `[len(group[0].idxs)]`, not negative; None where nothing reads them.

        Raises:
            InputError: The group belongs to no model that can be traced.
        """
        graph = group._DG
        model: nn.Module = graph.model
        connectivity = self._trace(model, graph)
        root = group[0].dep.target.module, group[0].idxs[0]
        tensors = self._read(model, connectivity, group)
        self._pass.enter(root, tensors, getattr(graph, "round", None))
        place = _Places(group[0].root_idxs)
        total: Tensor | None = None
        with torch.no_grad():
            for item in group:
                module = item.dep.target.module
                if not _is_consumer(item.dep, graph):
                    continue
                scores = self._layer_scores(model, module, connectivity, graph)
                if scores is None:
                    continue
                if total is None:
                    total = torch.zeros(place.count, device=scores.device)
                rows, roots = (torch.from_numpy(n).to(scores.device) for n in place(item))
                total.index_add_(0, roots, scores[rows].to(total))
        return None if total is None else _normalized(total, self.normalizer)

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
        if (
            self._connectivity is not None
            and self._connectivity[0]() is model
            and self._connectivity[1] == shapes
        ):
            return self._connectivity[2]
        connectivity = trace(model, self._inputs(graph))
        self._connectivity = (weakref.ref(model), shapes, connectivity)
        self._pass = _Pass()
        return connectivity

    def _inputs(self, graph: Any) -> Any:
        if self.example_inputs is not None:
            return self.example_inputs
        given = getattr(graph, "example_inputs", None)
        return given if given is not None else _recover_inputs(graph.model, graph)

    def _layer_scores(
        self, model: nn.Module, module: nn.Module, connectivity: Connectivity, graph: Any
    ) -> Tensor | None:
        """`[in_channels]` scores of a consumer's input channels."""
        known = self._pass.scores
        if module not in known:
            paths = self._pass.paths or {m: name for name, m in modules_of(model).items()}
            self._pass.paths = paths
            if module not in paths:
                raise InputError(
                    "the importance was asked about a layer that is not in the group's model; use one "
                    "SynapticImportance per model, or build the pruner anew after replacing layers"
                )
            path = paths[module]
            if path not in connectivity.layers:
                return None
            statistics = self._measured(model, connectivity, path, graph)
            if self.score == "relevance":
                scores = self._relevance(model, connectivity)[path].to(statistics.variance)
            else:
                power = synaptic_power(module, statistics.variance)
                scores = self._reduced(by_input_channel(module, _scored(power, self.score)))
            if statistics.covariance is not None:
                left = unexplained(statistics.covariance, scores, statistics.rows, groups_of(module))
                scores = scores * left.pow(self.conditional).to(scores)
            known[module] = scores
        return known[module]

    def _relevance(self, model: nn.Module, connectivity: Connectivity) -> dict[str, Tensor]:
        """Of what all layers read; their statistics have been measured."""
        if not self._pass.relevance:
            assert self._statistics is not None
            variances = {
                path: m.variance for path, m in self._statistics[2].items() if path in connectivity.layers
            }
            self._pass.relevance = relevance(model, connectivity, variances)
        return self._pass.relevance

    def _measured(
        self, model: nn.Module, connectivity: Connectivity, path: str, graph: Any
    ) -> ActivationStatistics:
        """Of what arrives at a layer; measured again when a weight has changed."""
        if not self._pass.measured:
            if not self._holds(connectivity):
                inputs = None if self.statistics == "batchnorm" else self._inputs(graph)
                paths = synaptic_paths(connectivity)
                found = measure(
                    model, connectivity, self.statistics, inputs, paths, covariance=self.conditional > 0
                )
                self._statistics = (connectivity, dict(self._pass.numbers), found)
            self._pass.measured = True
        assert self._statistics is not None
        return self._statistics[2][path]

    def _holds(self, connectivity: Connectivity) -> bool:
        """Whether what was measured before still is what would be."""
        return (
            self._statistics is not None
            and self._statistics[0] is connectivity
            and _same(self._pass.numbers, self._statistics[1])
        )

    def _reduced(self, scores: Tensor) -> Tensor:
        if self.reduce == "max":
            return scores.amax(1)
        return scores.sum(1) if self.reduce == "sum" else scores.mean(1)


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


def _check(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, allowed))}")


@dataclass
class _Pass:
    """What one round over all groups shares: scores and variances of layers.

    Torch-Pruning gives no sign when a round begins. It has begun when a root comes by that was seen before, or when a
    number in the model was changed: everything is dropped then. `subgroup_scores` says which round it is.
    """

    round: object = None
    numbers: dict[str, Tensor] = field(default_factory=dict)
    roots: set[tuple[nn.Module, int]] = field(default_factory=set)
    scores: dict[nn.Module, Tensor] = field(default_factory=dict)
    measured: bool = False
    paths: dict[nn.Module, str] = field(default_factory=dict)
    relevance: dict[str, Tensor] = field(default_factory=dict)

    def enter(
        self, root: tuple[nn.Module, int], tensors: Mapping[str, Tensor], current: object = None
    ) -> None:
        if current is not None and current is self.round:
            return
        self.round = current
        numbers = {name: _fingerprint(tensor) for name, tensor in tensors.items()}
        if current is not None or root in self.roots or not _same(numbers, self.numbers):
            self.numbers.clear()
            self.roots.clear()
            self.scores.clear()
            self.measured = False
            self.paths.clear()
            self.relevance.clear()
        self.numbers |= numbers
        self.roots.add(root)


def _fingerprint(tensor: Tensor) -> Tensor:
    """One number for each row, which another value anywhere in the row changes; vectors as they are.

    PyTorch does not count what is written through `.data`. Reading all weights (25 million in 8 ms) takes less time and
    memory than keeping and comparing a copy.
    """
    with torch.no_grad():
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if values.dim() < 2:
            return values.clone()
        rows = values.flatten(1)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ _directions(rows.shape[1], rows.device, rows.dtype)


@lru_cache(maxsize=256)
def _directions(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=dtype).to(device)


def _same(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> bool:
    """Whether no number has changed of those that both hold."""
    pairs = [(now[name], then[name]) for name in now if name in then]
    return all(x.device == y.device and x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def _scored(power: Tensor, score: Score) -> Tensor:
    """Scores of synapses, not negative: pruners take roots of sums."""
    if score == "share":
        return share(power)
    if score == "strength":
        return power.sqrt()
    # Differential entropy may be negative. Only its order and differences mean something, so it is counted from the
    # weakest living synapse of the layer; a dead one stays at 0.
    nats = entropy(power)
    alive = torch.isfinite(nats)
    if not alive.any():
        return torch.zeros_like(power)
    return torch.where(alive, nats - nats[alive].min() + 1e-6, torch.zeros_like(nats))


def _normalized(scores: Tensor, normalizer: Normalizer | None) -> Tensor:
    if normalizer is None:
        return scores
    scale = {"mean": scores.mean(), "max": scores.max(), "sum": scores.sum()}[normalizer]
    return scores / scale.clamp_min(torch.finfo(scores.dtype).tiny)


def _is_consumer(dep: Any, graph: Any) -> bool:
    """True for the input side of a layer that mixes channels (a depthwise one hands its single input on)."""
    module = dep.target.module
    if not isinstance(module, (_ConvNd, nn.Linear)) or is_depthwise(module):
        return False
    return bool(graph.is_in_channel_pruning_fn(dep.handler)) and not graph.is_out_channel_pruning_fn(
        dep.handler
    )


def _recover_inputs(model: nn.Module, graph: Any) -> Any:
    """The example input that Torch-Pruning's graph was built with, from what autograd saved at the first layers.

    Views remember what they are of, and a sum or a concatenation of inputs may be split again: whatever it is, the
    model must run on it and hand the same to those layers.
    """
    stems: dict[nn.Module, list[Tensor]] = {}
    for node in getattr(graph, "module2node", {}).values():
        if isinstance(node.module, (_ConvNd, nn.Linear)) and (saved := _saved_inputs(node.grad_fn)):
            stems[node.module] = saved
    tensors = [saved for each in stems.values() for saved in each]
    for candidate in _candidates(tensors) if tensors else ():
        if _reproduces(model, candidate, stems):
            return candidate
    raise InputError(f"the example input cannot be recovered from Torch-Pruning's graph; {_GIVE_INPUTS}")


def _saved_inputs(grad_fn: Any, depth: int = 4) -> list[Tensor]:
    """What a layer's operation has kept that no other operation has made, and no parameter is."""
    if grad_fn is None or not depth:
        return []
    names = (name for name in dir(grad_fn) if name in ("_saved_input", "_saved_mat1", "_saved_self"))
    found = [value for name in names if isinstance(value := getattr(grad_fn, name), Tensor)]
    fresh = [t.detach() if t._base is None else t for t in found if t.grad_fn is None and not t.requires_grad]
    if found:
        return fresh
    # A linear layer on more than two axes is folded before and unfolded after.
    return next((s for f, _ in grad_fn.next_functions if (s := _saved_inputs(f, depth - 1))), [])


def _candidates(saved: Sequence[Tensor]) -> Iterator[Any]:
    """What the inputs may have been: one of the tensors, what it is a view of, parts of it, or all in some order."""
    distinct = {(t.data_ptr(), t.shape): t for t in saved}
    whole = {
        (b.data_ptr(), b.shape): b for t in distinct.values() for b in [t if t._base is None else t._base]
    }
    for tensor in (*distinct.values(), *whole.values()):
        yield tensor.detach()
    if 1 < len(whole) <= _MOST_INPUTS:
        for order in permutations(whole.values()):
            yield tuple(t.detach() for t in order)
    for tensor in distinct.values():
        for axis, parts in product(range(min(tensor.dim(), 2)), range(2, _MOST_INPUTS + 1)):
            if tensor.shape[axis] % parts == 0:
                pieces = tensor.detach().chunk(parts, axis)
                yield pieces[0]
                yield pieces


def _reproduces(model: nn.Module, inputs: Any, stems: Mapping[nn.Module, Sequence[Tensor]]) -> bool:
    """Whether the model runs on it and its first layers then read what they had read."""
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in stems}
    handles = [on_input(module, lambda m, x: seen[m].append(x)) for module in stems]
    try:
        with preserved(model, training=False), torch.no_grad():
            call(model, inputs)
    except Exception:  # of the model's own code: it was no input
        return False
    finally:
        for handle in handles:
            handle.remove()
    return all(
        any(x.numel() == saved.numel() and x.reshape(saved.shape).equal(saved) for x in seen[module])
        for module, each in stems.items()
        for saved in each
    )
