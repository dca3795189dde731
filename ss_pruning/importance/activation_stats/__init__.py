"""Variance of what arrives at each synaptic input channel: from the norms' scales, from noise, or from data.

A file a source: `norms`, `noise`, `observed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.importance.activation_stats.noise import on_noise
from ss_pruning.importance.activation_stats.norms import from_norms, norm_scales, on_scales
from ss_pruning.importance.activation_stats.observed import ActivationStatistics, Products, Sums, observe
from ss_pruning.importance.calibration import Batch, stream

__all__ = ["SOURCES", "ActivationStatistics", "StatisticsSource", "from_norms", "measure", "norm_scales"]

#: A name in `SOURCES`, or an iterable of batches, see `ss_pruning.importance.calibration`.
StatisticsSource = str | Iterable[Any]


#: By name, what needs no batches: called with a model, its connectivity, example inputs and the paths of layers.
SOURCES: Mapping[
    str, Callable[[nn.Module, Connectivity, Any, Sequence[str]], dict[str, ActivationStatistics]]
] = {"batchnorm": on_scales, "gaussian": on_noise}


def measure(
    model: nn.Module,
    connectivity: Connectivity,
    source: StatisticsSource,
    example_inputs: Any,
    paths: Sequence[str],
    *,
    covariance: bool = False,
) -> dict[str, ActivationStatistics]:
    """Statistics of the inputs of the layers `paths`; layers that only run in training are told by their norms.

    With `covariance`, and batches as the source, covariances too, which take memory of the square of a width a layer:
    not of what depthwise layers read, nor of more than 4,096 channels.

    Raises:
        InputError: `source` is an unknown name, or an iterable without a batch.
        ModelError: The model does not run on a batch.
    """
    if isinstance(source, str):
        if source not in SOURCES:
            raise InputError(
                f"unknown statistics {source!r}; use {', '.join(map(repr, SOURCES))}, or batches of inputs"
            )
        found = SOURCES[source](model, connectivity, example_inputs, paths)
    elif isinstance(source, Tensor):
        raise InputError(
            "statistics must be an iterable of batches; wrap a single one in a list: statistics=[x]"
        )
    else:
        batches = (batch.parts() for batch in stream(source, example_inputs))
        seen = observe(model, connectivity, batches, paths, Products if covariance else Sums, _count(source))
        found = {path: s.statistics for path, s in seen.items()}
    # Auxiliary heads run in training only: the norms have to tell.
    unseen = [path for path in paths if path not in found]
    found |= on_scales(model, connectivity, None, unseen) if unseen else {}
    return {path: found[path] for path in paths}


def _count(source: Iterable[Any]) -> int:
    """How many samples the batches hold, to tell how far it is; 0 where only reading them would tell."""
    known = isinstance(source, list) and all(isinstance(batch, Batch) for batch in source)
    return sum(map(len, source)) if known else 0
