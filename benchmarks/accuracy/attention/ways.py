"""What is compared on nets with attention, and how a run is told from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.common import RESULTS

PATH = RESULTS / "attention.jsonl"
BUDGETS = (0.7, 0.5, 0.3)
#: Of recovery.
STEPS = 500
Line = dict[str, Any]


class OutOfReachError(ValueError):
    """Even without all that may go, more is left than the budget."""


@dataclass(frozen=True)
class Way:
    """A way to make a net smaller.

    Attributes:
        title: Its name on the page.
        draws: Whether calibration images that are drawn play a part.
        ours: Whether it is this package's.
    """

    title: str
    draws: bool = True
    ours: bool = True


WAYS = {
    "none": Way("`prune_`, no images", draws=False),
    "mean": Way("`prune_`, `mean`, no images", draws=False),
    "none, images": Way("`prune_`, scores from images"),
    "mean, images": Way("`prune_`, `mean`, images"),
    "reconstruct, local": Way("`prune_`, `reconstruct`, every layer alike"),
    "reconstruct, whole heads": Way("`prune_`, `reconstruct`, whole heads"),
    "reconstruct": Way("`prune_`, `reconstruct`"),
    "closed form": Way("uniform closed form (MLPs, queries and keys)", ours=False),
    "closed form, values": Way("uniform closed form (values, too)", ours=False),
    "magnitude, uniform": Way("Torch-Pruning, magnitude, uniform", draws=False, ours=False),
    "magnitude, global": Way("Torch-Pruning, magnitude, global", draws=False, ours=False),
    "recovered, whole heads": Way("`prune_`, `reconstruct`, whole heads, then `recover_`"),
}


def key(line: Line) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return tuple(line[name] for name in ("net", "macs", "way", "seed", "split"))
