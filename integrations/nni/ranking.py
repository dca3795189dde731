"""From scores to NNI masks: as NNI does it, but for global groups, which get one exact order of all scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from nni.compression.pruning.tools import generate_sparsity
from torch import Tensor

from ss_pruning.errors import InputError

Metrics = dict[str, dict[str, Tensor]]


def generate_masks(metrics: Metrics, target_spaces: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """Masks by module and target, 1 for what stays, from scores in block shape and NNI's settings of the targets.

    Raises:
        InputError: Settings that exclude each other.
    """
    _check_dependencies(metrics, target_spaces)
    groups: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    spaces = {path: dict(targets) for path, targets in target_spaces.items()}
    for path, targets in spaces.items():
        for name, space in targets.items():
            if space.global_group_id is not None and space.sparse_ratio is not None:
                groups[space.global_group_id].append((path, name))
    ranked = {path: dict(scores) for path, scores in metrics.items()}
    for members in groups.values():
        kept = rank_globally([(metrics[p][n], spaces[p][n]) for p, n in members])
        for (path, name), mask in zip(members, kept, strict=True):
            ranked[path][name] = mask
            spaces[path][name] = _Decided(spaces[path][name])
    masks: Metrics = generate_sparsity(ranked, spaces)
    return masks


class _Decided:
    """A target whose scores already are its mask: to NNI one with a threshold, and all else as it was."""

    sparse_threshold = 0.5
    sparse_ratio = global_group_id = min_sparse_ratio = max_sparse_ratio = None

    def __init__(self, space: Any) -> None:
        self._space = space

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)


def _check_dependencies(metrics: Metrics, spaces: Mapping[str, Mapping[str, Any]]) -> None:
    """NNI averages the scores of dependent targets, and takes them out of everything else."""
    shapes: dict[Any, tuple[str, torch.Size]] = {}
    for path, targets in spaces.items():
        for name, space in targets.items():
            if space.dependency_group_id is None:
                continue
            if (
                space.global_group_id is not None
                or space.sparse_threshold is not None
                or space.sparse_ratio is None
            ):
                raise InputError(
                    f"'{path}': a dependency_group_id goes with a sparse_ratio, not with a global_group_id or a "
                    "sparse_threshold"
                )
            shape = metrics[path][name].shape
            first, other = shapes.setdefault(space.dependency_group_id, (path, shape))
            if shape != other:
                raise InputError(
                    f"'{first}' and '{path}' have one dependency_group_id but scores of shapes {tuple(other)} and "
                    f"{tuple(shape)}; what layers share are outputs or inputs: set granularity 'out_channel' or "
                    "'in_channel'"
                )


def rank_globally(targets: list[tuple[Tensor, Any]]) -> list[Tensor]:
    """Keep-masks for targets, scores and NNI's settings, that share one ratio of their weights.

    All blocks are put in one order, lowest score first, ties in the order of the targets; the longest prefix that does
    not exceed the ratio goes. Before it goes what `min_sparse_ratio` of each target asks for; what
    `max_sparse_ratio` protects, and the best block of each target if the ratio is below 1, stays.
    """
    ratios = {space.sparse_ratio for _, space in targets}
    if len(ratios) > 1:
        raise InputError(f"the members of a global group have different ratios: {sorted(ratios)}")
    ratio = ratios.pop()
    keys, grains, forced = [], [], []
    for scores, space in targets:
        n, size = scores.numel(), space.target.numel()
        grain = size // n
        low = int(n * (space.min_sparse_ratio or 0.0) + 1e-9)
        cap = space.max_sparse_ratio if space.max_sparse_ratio is not None else 1.0
        high = min(int(n * cap + 1e-9), n if ratio == 1 else n - 1)
        flat = scores.detach().flatten().double().cpu()
        place = torch.empty(n, dtype=torch.long)
        place[flat.argsort(stable=True)] = torch.arange(n)
        keys.append(flat.masked_fill(place >= high, torch.inf))
        grains.append(torch.full((n,), grain))
        forced.append(place < min(low, high))
    pruned = _lowest(torch.cat(keys), torch.cat(grains), torch.cat(forced), ratio)
    parts = (~pruned).split([scores.numel() for scores, _ in targets])
    return [part.reshape(scores.shape).to(scores) for part, (scores, _) in zip(parts, targets, strict=True)]


def _lowest(keys: Tensor, grains: Tensor, forced: Tensor, ratio: float) -> Tensor:
    """`[blocks]`, True for what goes: the forced, then the longest prefix of the rest within the ratio of weights."""
    budget = int(int(grains.sum()) * ratio + 1e-6)
    order = keys.masked_fill(forced, -torch.inf).argsort(stable=True)
    allowed = keys[order].isfinite() | forced[order]
    order = order[allowed]
    count = int(torch.searchsorted(grains[order].cumsum(0), budget, right=True))
    pruned = forced.clone()
    pruned[order[:count]] = True
    return pruned
