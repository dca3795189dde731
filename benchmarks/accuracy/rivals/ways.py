"""What is compared: by whom channels are chosen, and what repairs the cut; and how a run is told from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.accuracy.rivals.compensations import (
    grail_,
    least_squares_,
    least_squares_in_order_,
    merge_neurons_,
)
from benchmarks.common import RESULTS
from ss_pruning.compensation.folding import fold_linear_, fold_means_
from ss_pruning.compensation.reconstruction import reconstruct_

PATH = RESULTS / "rivals.jsonl"
#: Net and share of the multiply-accumulates.
POINTS = (("resnet20", 0.5), ("resnet56", 0.47), ("vgg16bn", 0.5))
#: By whom channels are chosen.
CHANNELS = {"magnitude": "uniform L1", "ours": "ours"}
Line = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to repair a cut.

    Attributes:
        title: Its name on the page.
        repair: Changes the weights of the cut model, with the signature of `ss_pruning.register_compensation`.
        images: Whether it needs images without labels.
        recalibrates: Whether batch norms follow what is left afterwards, on the same images, or on noise.
        ours: Whether it is this package's.
    """

    title: str
    repair: Callable[..., Any]
    images: bool = True
    recalibrates: bool = False
    ours: bool = False


def _nothing(*_: Any) -> None:
    """What is masked is what is cut."""


WAYS = {
    "none": Way("plain cut", _nothing, images=False),
    "merging": Way("Neuron Merging", merge_neurons_, images=False),
    "mean": Way("`mean`", fold_means_, images=False, recalibrates=True, ours=True),
    "norms": Way("plain cut, norms recalibrated", _nothing, recalibrates=True),
    "grail": Way("GRAIL", grail_),
    "grail, norms": Way("GRAIL, norms recalibrated", grail_, recalibrates=True),
    "least squares": Way("least squares, dense inputs", least_squares_),
    "least squares in order": Way("least squares in order (AIMET)", least_squares_in_order_),
    "least squares with shortcuts": Way(
        "least squares with shortcuts (He et al.)",
        partial(least_squares_in_order_, shortcuts=True),
    ),
    "linear": Way("`linear`", fold_linear_, recalibrates=True, ours=True),
    "reconstruct": Way("`reconstruct`", reconstruct_, ours=True),
}


def key(line: Line) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return tuple(line[name] for name in ("net", "macs", "channels", "way", "seed", "split"))
