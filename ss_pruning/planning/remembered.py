"""What took long to measure is kept by content: a run that was killed, or has another budget, goes on from there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import ss_pruning
from ss_pruning._utils import cache as files
from ss_pruning._utils.arrays import Floats, digest
from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import output_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.calibration import Batch
from ss_pruning.importance.sensitivity import Scores

#: Whatever took less than so many seconds is not worth a file.
WORTH = 5.0


@cache
def _code() -> str:
    """A digest of the package's own code: another version measures anew."""
    whole = hashlib.sha256()
    for path in sorted(Path(ss_pruning.__file__).parent.rglob("*.py")):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def key_of(traced: TracedModel, images: Batch, scores: Sequence[Sequence[Floats]], *settings: object) -> str:
    """A name for what is measured on a model: the same for the same weights, groups, images, scores and settings.

    Of the model its class, structure and outputs for the example inputs count, of settings what they print.
    """
    groups = [
        (group.name, sorted(group.paths()), [s.size for s in group.subgroups])
        for group in traced.coupling.groups
    ]
    # Outputs stand for the code of its methods, of which there is no digest.
    outputs = tensors_in(output_of(traced.model, traced.example_inputs))
    tensors = [
        *traced.model.state_dict().items(),
        *enumerate(pytree.tree_leaves((images.source, images.rows))),
        *outputs.items(),
        *enumerate(torch.from_numpy(part) for subgroups in scores for part in subgroups),
    ]
    named = ((str(name), tensor) for name, tensor in tensors if isinstance(tensor, Tensor))
    whole = digest(named, _code(), torch.__version__, repr((settings, groups, traced.model)))
    return f"measured-{whole[:24]}"


def remembered(key: str | None, measure: Callable[[], Scores], shapes: Sequence[Sequence[Floats]]) -> Scores:
    """What is kept under a key, in these shapes, or what is measured now; without a key nothing is kept."""
    known = None if key is None else files.read(key)
    if known is not None and (found := _unpacked(known, shapes)) is not None:
        return found
    begin = time.perf_counter()
    result = measure()
    if key is not None and time.perf_counter() - begin > WORTH:
        files.write(
            key, {"values": torch.from_numpy(np.concatenate([part for group in result for part in group]))}
        )
    return result


def _unpacked(tensors: dict[str, Tensor], shapes: Sequence[Sequence[Floats]]) -> Scores | None:
    """As it was measured; None where the file holds something else."""
    values, sizes = tensors.get("values"), [len(part) for group in shapes for part in group]
    if (
        values is None
        or values.dtype != torch.float64
        or values.shape != (sum(sizes),)
        or values.isnan().any()
    ):
        return None
    parts = iter(np.split(values.numpy(), np.cumsum(sizes)[:-1]))
    return [[next(parts) for _ in group] for group in shapes]
