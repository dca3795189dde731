"""Torch-Pruning's magnitude on nets with attention, told their heads, at the ratio that just meets the budget.

It is helped where it would fail: a stream whose patches are merged, in which it cuts too little behind the merging,
stays whole. Swin's heads it leaves as they are.
"""

from __future__ import annotations

import copy

import torch_pruning as tp
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from benchmarks.accuracy.attention.ways import OutOfReachError
from benchmarks.coverage.heads_by_torch_pruning import prune
from ss_pruning.graph.layers import width
from ss_pruning.profiling.macs import count_macs

# All are tried, since more may be left at a larger one; no layer loses more than the last, as in ours.
_RATIOS = [step / 50 for step in range(1, 46)]
_LARGEST = _RATIOS[-1]


def prune_by_magnitude(model: nn.Module, macs: float, x: Tensor, everywhere: bool) -> nn.Module:
    """A smaller copy with at most this share of the multiply-accumulates.

    Args:
        model: Not changed.
        macs: Share to keep.
        x: What it takes.
        everywhere: Rank all channels together ("global pruning"); else each layer loses the same share.

    Raises:
        OutOfReachError: No ratio meets the budget.
    """
    goal = macs * count_macs(model, x)[0]
    tried = [_cut(model, x, ratio, everywhere) for ratio in _RATIOS]
    within = [(count, small) for small in tried if (count := count_macs(small, x)[0]) <= goal]
    if not within:
        raise OutOfReachError(f"{macs:.0%} of the multiply-accumulates cannot be reached")
    return max(within, key=lambda pair: pair[0])[1]


def _cut(model: nn.Module, x: Tensor, ratio: float, everywhere: bool) -> nn.Module:
    small = copy.deepcopy(model)
    prune(
        small,
        x,
        ["head", *_merged(model)],
        ratio,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=everywhere,
        max_pruning_ratio=_LARGEST,
    )
    return small.eval()


def _merged(model: nn.Module) -> list[str]:
    """Layers that write a stream of which patches are merged: those before the merging that are as wide."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, PatchMerging):
            before = list(layers)[: list(layers).index(f"{path}.reduction")]
            found += [p for p in before if width(layers[p], "out") == module.dim]
    return found
