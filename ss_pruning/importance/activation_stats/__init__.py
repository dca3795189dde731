"""Variance of what arrives at each synaptic input channel: from the norms' scales, from noise, or from data.

A file a source: `norms`, `noise`, `observed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ss_pruning.errors import InputError
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.importance.activation_stats.noise import on_noise
from ss_pruning.importance.activation_stats.norms import from_norms, norm_scales
from ss_pruning.importance.activation_stats.observed import ActivationStatistics, Products, Sums, observe
from ss_pruning.importance.calibration import Batch, stream

__all__ = ["ActivationStatistics", "StatisticsSource", "from_norms", "measure", "norm_scales"]

#: "batchnorm", "gaussian", or an iterable of batches, see `ss_pruning.importance.calibration`.
StatisticsSource = str | Iterable[Any]


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
        if source == "batchnorm":
            scales = norm_scales(model, connectivity)
            return {path: from_norms(connectivity, path, scales) for path in paths}
        if source == "gaussian":
            found = on_noise(model, connectivity, example_inputs, paths)
        else:
            raise InputError(
                f"unknown statistics {source!r}; use 'batchnorm', 'gaussian', or batches of inputs"
            )
    elif isinstance(source, Tensor):
        raise InputError(
            "statistics must be an iterable of batches; wrap a single one in a list: statistics=[x]"
        )
    else:
        batches = (batch.parts() for batch in stream(source, example_inputs))
        seen = observe(model, connectivity, batches, paths, Products if covariance else Sums, _count(source))
        found = {path: s.statistics for path, s in seen.items()}
    # Auxiliary heads run in training only: the norms have to tell.
    scales = norm_scales(model, connectivity) if len(found) < len(paths) else {}
    return {path: found[path] if path in found else from_norms(connectivity, path, scales) for path in paths}


def _count(source: Iterable[Any]) -> int:
    """How many samples the batches hold, to tell how far it is; 0 where only reading them would tell."""
    known = isinstance(source, list) and all(isinstance(batch, Batch) for batch in source)
    return sum(map(len, source)) if known else 0
