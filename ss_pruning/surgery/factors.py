"""Channels that are multiplied by a number when others of their layer are cut.

Attention divides products of queries and keys by the root of their width. Much code takes that from the tensors, as
`scaled_dot_product_attention` does, and divides by less where dimensions have gone: what stays makes up for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ss_pruning.graph.connectivity import Key, Side
from ss_pruning.graph.layers import layout_of
from ss_pruning.surgery.cut import Cut, scale_


@dataclass(frozen=True)
class Factor:
    """What channels of a cut layer's output, or of a cut loose tensor, are multiplied by.

    Attributes:
        path: Module path, or the name of a loose tensor.
        side: "out", "through" or "tensor".
        channels: Numbers before the cut; those that go do not count.
        by: The number.
    """

    path: str
    side: Side
    channels: tuple[int, ...]
    by: float

    @property
    def key(self) -> Key:
        """Its layer side."""
        return self.path, self.side

    def before(self, cut: Cut | None) -> Factor:
        """The same in numbers before an earlier cut."""
        if cut is None:
            return self
        channels = tuple(cut.kept[channel] for channel in self.channels)
        return Factor(self.path, self.side, channels, self.by)


def gains(factors: Iterable[Factor], cut: Cut) -> torch.Tensor:
    """`[kept]`: what each channel that stays is multiplied by."""
    found = torch.ones(len(cut.kept))
    for factor in factors:
        if factor.key == cut.key:
            found[torch.isin(torch.tensor(cut.kept), torch.tensor(factor.channels))] *= factor.by
    return found


@torch.no_grad()
def multiply_(modules: Mapping[str, nn.Module], factors: Iterable[Factor], cuts: Iterable[Cut]) -> None:
    """Multiply channels in a model that was cut; tensors that hold them are replaced, not written into."""
    made: dict[Key, Cut] = {cut.key: cut for cut in cuts}
    for factor in factors:
        chosen, cut = set(factor.channels), made[factor.key]
        rows = [i for i, channel in enumerate(cut.kept) if channel in chosen]
        if factor.side == "tensor":
            owner, _, name = factor.path.rpartition(".")
            scale_(modules[owner], name, cut.axis, rows, factor.by)
            continue
        module = modules[factor.path]
        layout = layout_of(module)
        axes = {"weight": 0, "bias": 0} if layout is None else layout.axes["out"]
        for name, axis in axes.items():
            if getattr(module, name, None) is not None:
                scale_(module, name, axis, rows, factor.by)
