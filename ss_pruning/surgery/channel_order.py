"""In which order channels arrive in a cut model, where a shuffle stands between."""

from __future__ import annotations

from dataclasses import replace

from ss_pruning.errors import VerificationError
from ss_pruning.graph.connectivity import Connectivity, Side
from ss_pruning.graph.groups import Selection
from ss_pruning.surgery.cut import Cut
from ss_pruning.surgery.plan import Plan


def reordered(
    plan: Plan, selection: Selection, connectivity: Connectivity, small: Connectivity
) -> tuple[Cut, ...]:
    """The cuts, with consumers' channels in the order in which they really arrive in the cut model.

    A shuffle permutes a smaller tensor differently, so the kept channels of what reads it change places. Each arriving
    channel is known by a source channel that feeds it, in the dense connectivity and in the small one.
    """
    cuts = []
    for cut in plan.cuts:
        if cut.side == "in":
            order = _arriving_order(cut.path, selection, connectivity, small)
            if sorted(order) != sorted(cut.kept):
                raise VerificationError(f"other channels than the kept ones arrive at '{cut.path}'")
            cut = replace(cut, kept=tuple(order))
        cuts.append(cut)
    return tuple(cuts)


def _arriving_order(
    path: str, selection: Selection, connectivity: Connectivity, small: Connectivity
) -> list[int]:
    dense: dict[tuple[str, int, int], int] = {}
    for edge in connectivity.edges[path]:
        dense |= {(edge.source, edge.call, source): channel for source, channel in edge.pairs.tolist()}
    order: dict[int, int] = {}
    for edge in small.edges[path]:
        sides: tuple[Side, ...] = ("out", "through", "tensor")
        kept = next((selection[edge.source, s] for s in sides if (edge.source, s) in selection), None)
        for source, channel in edge.pairs.tolist():
            before = dense.get((edge.source, edge.call, kept[source] if kept else source))
            if before is not None:
                order[channel] = before
    return [order.get(channel, -1) for channel in range(small.layers[path].inputs)]
