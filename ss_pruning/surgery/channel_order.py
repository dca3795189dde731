"""In which order channels arrive in a cut model, where a shuffle stands between."""

from __future__ import annotations

from dataclasses import replace

from ss_pruning.errors import VerificationError
from ss_pruning.graph.channel_index import Side
from ss_pruning.graph.connectivity import Wiring
from ss_pruning.graph.groups import Selection
from ss_pruning.surgery.plan import Cut, Plan


def reordered(plan: Plan, selection: Selection, wiring: Wiring, small: Wiring) -> tuple[Cut, ...]:
    """The cuts, with consumers' channels in the order in which they really arrive in the cut model.

    A shuffle permutes a smaller tensor differently, so the kept channels of what reads it change places. Each arriving
    channel is known by a source channel that feeds it, in the dense wiring and in the small one.

    Raises:
        VerificationError: What arrives is not a permutation of what should.
    """
    cuts = []
    for cut in plan.cuts:
        if cut.side == "in":
            order = _arriving_order(cut.path, selection, wiring, small)
            if sorted(order) != sorted(cut.kept):
                raise VerificationError(f"other channels than the kept ones arrive at '{cut.path}'")
            cut = replace(cut, kept=tuple(order))
        cuts.append(cut)
    return tuple(cuts)


def _arriving_order(path: str, selection: Selection, wiring: Wiring, small: Wiring) -> list[int]:
    dense: dict[tuple[str, int, int], int] = {}
    for feed in wiring.feeds[path]:
        dense |= {(feed.source, feed.call, source): channel for source, channel in feed.pairs.tolist()}
    order: dict[int, int] = {}
    for feed in small.feeds[path]:
        sides: tuple[Side, ...] = ("out", "through", "tensor")
        kept = next((selection[feed.source, s] for s in sides if (feed.source, s) in selection), None)
        for source, channel in feed.pairs.tolist():
            before = dense.get((feed.source, feed.call, kept[source] if kept else source))
            if before is not None:
                order[channel] = before
    return [order.get(channel, -1) for channel in range(small.layers[path].inputs)]
