"""Torch-Pruning's options for heads of attention, taken for the heads that the channel graph has found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ss_pruning.errors import InputError
from ss_pruning.graph.exclusions import Excluded
from ss_pruning.graph.groups import PruningGroup
from ss_pruning.graph.layers import width

KEPT_REASON = "heads stay as prune_num_heads=False asks"


@dataclass(frozen=True)
class HeadOptions:
    """How many heads go.

    Attributes:
        numbers: By layer of queries, keys or values how many heads it has; follows what is cut.
        prune: Whether any go.
        ratios: By layer, the share of its heads that goes after each step; under None, that of all others, if they have
            one of their own.
    """

    numbers: dict[nn.Module, int]
    prune: bool
    ratios: Mapping[nn.Module | None, list[float]]
    _first: dict[nn.Module, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any], schedule: Callable[[float], list[float]]) -> HeadOptions:
        """From the options of `tp.pruner.BasePruner`, and what makes of a ratio the ratio after each step.

        Raises:
            InputError: A ratio does not lie in [0, 1].
        """
        numbers, ratio = options.get("num_heads", {}), options.get("head_pruning_ratio")
        ratios: dict[nn.Module | None, float] = {} if ratio is None else {None: ratio}
        for module, own in (options.get("head_pruning_ratio_dict") or {}).items():
            ratios |= dict.fromkeys(module.modules(), own)
        if wrong := [ratio for ratio in ratios.values() if not 0 <= ratio <= 1]:
            raise InputError(f"head_pruning_ratio={wrong[0]} must lie in [0, 1]")
        first = {module: (heads, width(module, "out")) for module, heads in numbers.items()}
        prune = bool(options.get("prune_num_heads", True))
        return cls(numbers, prune, {m: schedule(ratio) for m, ratio in ratios.items()}, first)

    def stay(self, group: PruningGroup) -> bool:
        """Whether a group of heads must stay."""
        return not self.prune and _of_heads(group)

    def excluded(self, groups: Mapping[str, PruningGroup]) -> list[Excluded]:
        """The groups that stay."""
        return [
            Excluded((group.name,), sum(s.size * s.root.index.shape[1] for s in group.subgroups), KEPT_REASON)
            for group in groups.values()
            if self.stay(group)
        ]

    def ratio_of(self, group: PruningGroup, layers: list[nn.Module]) -> list[float] | None:
        """The share of its heads after each step, where it has one of its own."""
        if not _of_heads(group):
            return None
        return next((self.ratios[m] for m in layers if m in self.ratios), self.ratios.get(None))

    def followed(self) -> dict[nn.Module, int]:
        """The numbers of heads, as the widths of their layers are now."""
        for module, (heads, before) in self._first.items():
            self.numbers[module] = heads * width(module, "out") // before
        return self.numbers


def _of_heads(group: PruningGroup) -> bool:
    return any(subgroup.of_heads for subgroup in group.subgroups)
