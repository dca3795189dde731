"""`SynapticImportance`: a channel counts as much as its synapses transport to everything that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ss_pruning._utils.arrays import Ints
from ss_pruning._utils.modules import checksums, modules_of, tensors_of, unchanged
from ss_pruning.config import Score
from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.graph.groups import Member, Subgroup
from ss_pruning.graph.layers import groups_of
from ss_pruning.importance.activation_stats import SOURCES, ActivationStatistics, StatisticsSource, measure
from ss_pruning.importance.conditional_variance import unexplained
from ss_pruning.importance.relevance import relevance
from ss_pruning.importance.strength import (
    by_input_channel,
    entropy,
    relative_power,
    share,
    synaptic_power,
)

Reduction = Literal["sum", "mean", "max"]
Normalizer = Literal["mean", "max", "sum"]


class SynapticImportance:
    """Importance of a channel: what its synapses transport to everything that reads it.

    For each consumer of the channel the scores of its synapses are reduced over the consumer's outputs, then added
    over the consumers. Scores follow the model: they are taken from the current weights.

    Args:
        statistics: Where variances come from, see `ss_pruning.synaptic_strength`. The default, "gaussian", is the one
            that `benchmarks/accuracy/run.py` prefers on training images; "batchnorm" is the paper's, and the fastest:
            take it for pruners that regularise, which score at every training step.
        score: "share" of each output's variance (default), "strength" itself, its Gaussian "entropy", or "relevance":
            shares of the model's output, see `ss_pruning.importance.relevance`.
        reduce: How the scores of a channel's synapses to one consumer become one: "sum", "mean" or "max". Means nothing
            to relevance.
        normalizer: Divide the scores of a layer by their "mean", "max" or "sum"; None leaves them comparable
            across layers as they are, which is what shares are for.
        example_inputs: What the model's `forward` takes, where whoever asks for scores cannot tell.
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
        statistics: StatisticsSource = "gaussian",
        score: Score = "share",
        reduce: Reduction = "sum",
        normalizer: Normalizer | None = None,
        example_inputs: Any = None,
        conditional: float = 0.0,
    ) -> None:
        _check("score", score, get_args(Score))
        _check("reduce", reduce, get_args(Reduction))
        _check("normalizer", normalizer, (None, *get_args(Normalizer)))
        if not 0 <= conditional <= 1:
            raise InputError(f"conditional={conditional!r} must lie in [0, 1]")
        if isinstance(statistics, str):
            _check("statistics", statistics, tuple(SOURCES), ", or batches of inputs")
            if conditional:
                raise InputError(
                    f"conditional={conditional!r} needs covariances; {statistics!r} has none: give batches"
                )
        # A generator is read once, and each measurement needs all batches.
        self.statistics = list(statistics) if isinstance(statistics, Iterator) else statistics
        self.score, self.reduce, self.normalizer = score, reduce, normalizer
        self.conditional = conditional
        self.example_inputs = example_inputs
        self._measured: _Measured | None = None

    def scorer(self, model: nn.Module, connectivity: Connectivity, example_inputs: Any) -> LayerScores:
        """What scores the subgroups of a model as it is now; it must not change as long as that is used."""
        inputs = example_inputs if self.example_inputs is None else self.example_inputs
        numbers = checksums(self._measured_from(model, connectivity))
        return self._layer_scores(model, connectivity, numbers, lambda: inputs)

    @property
    def known(self) -> Mapping[str, ActivationStatistics] | None:
        """The statistics that were measured last, by layer path; None before that."""
        return None if self._measured is None else self._measured.statistics

    def _layer_scores(
        self,
        model: nn.Module,
        connectivity: Connectivity,
        numbers: Mapping[str, Tensor],
        inputs: Callable[[], Any],
    ) -> LayerScores:
        """Statistics are measured, on inputs that are asked for then, unless those of the same numbers are at hand."""
        held = self._measured
        if held is None or held.connectivity is not connectivity or not unchanged(numbers, held.numbers):
            needed = None if self.statistics == "batchnorm" else inputs()
            paths, covariance = connectivity.weighted, self.conditional > 0
            found = measure(model, connectivity, self.statistics, needed, paths, covariance=covariance)
            held = self._measured = _Measured(connectivity, numbers, found)
        return LayerScores(self, model, connectivity, held.statistics)

    def _measured_from(self, model: nn.Module, connectivity: Connectivity) -> Mapping[str, Tensor]:
        """The tensors on which activation statistics depend: with the paper's variances only those of norms."""
        if self.statistics != "batchnorm":
            return tensors_of(model)
        modules = modules_of(model)
        norms = [path for path, layer in connectivity.layers.items() if layer.kind == "norm"]
        return {
            f"{path}.{name}": tensor for path in norms for name, tensor in tensors_of(modules[path]).items()
        }


@dataclass(frozen=True)
class _Measured:
    """Activation statistics, and of what they are."""

    connectivity: Connectivity
    numbers: Mapping[str, Tensor]
    statistics: Mapping[str, ActivationStatistics]


@dataclass(frozen=True)
class Reads:
    """Where the consumer `path` reads what is scored: `[n]` input channels, and the scored one that arrives at each."""

    path: str
    channels: Ints
    places: Ints


class LayerScores:
    """Scores of what each layer reads in one state of a model, computed when they are first asked for."""

    def __init__(
        self,
        importance: SynapticImportance,
        model: nn.Module,
        connectivity: Connectivity,
        statistics: Mapping[str, ActivationStatistics],
    ) -> None:
        self.importance, self.connectivity = importance, connectivity
        self._model, self._modules, self._statistics = model, modules_of(model), statistics
        self._known: dict[str, Tensor] = {}

    def __call__(self, subgroup: Subgroup) -> Tensor | None:
        """`[size]`, not negative: the score of each channel set; None where nothing reads them."""
        if subgroup.head is not None and subgroup.unread:
            return self._of_products(subgroup, subgroup.head)
        reads = (
            Reads(m.path, m.index.reshape(-1), np.repeat(np.arange(subgroup.size), m.index.shape[1]))
            for m in subgroup.members
            if m.side == "in"
        )
        return self.added(reads, subgroup.size)

    @torch.no_grad()
    def added(self, reads: Iterable[Reads], count: int) -> Tensor | None:
        """`[count]`: for each channel the sum over its consumers, normalised; None where no layer that mixes reads."""
        total: Tensor | None = None
        for read in reads:
            layer = self.connectivity.layers.get(read.path)
            if layer is None or layer.kind != "synaptic":
                continue
            scores = self.of(read.path)
            if total is None:
                total = torch.zeros(count, device=scores.device)
            channels, places = (torch.from_numpy(n).to(scores.device) for n in (read.channels, read.places))
            total.index_add_(0, places, scores[channels].to(total))
        normalizer = self.importance.normalizer
        return total if total is None or normalizer is None else _normalized(total, normalizer)

    def _of_products(self, subgroup: Subgroup, head: Member) -> Tensor | None:
        """Of dimensions of queries and keys: what their head delivers, by shares in the variance of its logits."""
        powers = torch.ones(subgroup.size)
        for member in subgroup.members:
            layer = self.connectivity.layers.get(member.path)
            if member.side == "out" and layer is not None and layer.kind == "synaptic":
                made = self._variance_of_outputs(member.path)
                powers = powers * made[torch.from_numpy(member.index)].prod(1).to(powers)
        channels = head.index.reshape(-1)
        delivered = self.added([Reads(head.path, channels, np.zeros_like(channels))], 1)
        return None if delivered is None else share(powers[None])[0].to(delivered) * delivered

    @torch.no_grad()
    def _variance_of_outputs(self, path: str) -> Tensor:
        """`[out_channels]`, by what the layer reads."""
        module, seen = self._modules[path], self._statistics[path]
        if seen.covariance is None or not isinstance(module, nn.Linear):
            return synaptic_power(module, seen.variance).sum(1)
        weight = module.weight.double()
        return (weight @ seen.covariance.to(weight) * weight).sum(1)

    def of(self, path: str) -> Tensor:
        """`[in_channels]` scores of what a synaptic layer reads."""
        if path not in self._known:
            module, seen = self._modules[path], self._statistics[path]
            scores = self._of_inputs(path)
            if seen.covariance is not None:
                left = unexplained(seen.covariance, scores, seen.rows, groups_of(module))
                scores = scores * left.pow(self.importance.conditional).to(scores)
            self._known[path] = scores
        return self._known[path]

    def _of_inputs(self, path: str) -> Tensor:
        module, variance = self._modules[path], self._statistics[path].variance
        if self.importance.score == "relevance":
            return self._relevance[path].to(variance)
        score = self.importance.score
        power = (relative_power if score == "share" else synaptic_power)(module, variance)
        synapses = _scored(power, score)
        return _reduced(by_input_channel(module, synapses), self.importance.reduce)

    @cached_property
    def _relevance(self) -> dict[str, Tensor]:
        variances = {
            path: s.variance for path, s in self._statistics.items() if path in self.connectivity.layers
        }
        return relevance(self._model, self.connectivity, variances)


def _check(name: str, value: Any, allowed: tuple[Any, ...], more: str = "") -> None:
    if value not in allowed:
        raise InputError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, allowed))}{more}")


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


def _reduced(scores: Tensor, reduce: Reduction) -> Tensor:
    """`[channels, synapses]` to `[channels]`."""
    if reduce == "max":
        return scores.amax(1)
    return scores.sum(1) if reduce == "sum" else scores.mean(1)


def _normalized(scores: Tensor, normalizer: Normalizer) -> Tensor:
    scale = {"mean": scores.mean(), "max": scores.max(), "sum": scores.sum()}[normalizer]
    return scores / scale.clamp_min(torch.finfo(scores.dtype).tiny)
