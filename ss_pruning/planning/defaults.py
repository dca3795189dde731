"""What `prune_` takes for what it is not told. Chosen on training images, see docs/accuracy.md."""

from __future__ import annotations

from typing import Any, Literal

from ss_pruning.config import SOLVED, Method
from ss_pruning.importance.sensitivity import LEAST_IMAGES
from ss_pruning.planning.allocation import Scope

#: By scope, what `prune_` takes where no `cost_exponent` is given.
COST_EXPONENT: dict[Scope, float] = {"global": 0.5, "local": 0.5, "sensitivity": 1.0}
#: Where layers compete by relevance, or it has a say: it estimates output error, but not as well as measuring does.
RELEVANCE_EXPONENT = 0.75
#: On noise output error is known less well: it counts with this exponent, and relevance with what is left of 1.
ON_NOISE = 2 / 3


def default_scope(inputs: int, compensation: Method, on_noise: bool) -> Scope:
    """What `prune_` takes where no scope is given, by the number of calibration inputs.

    Without any, "mean" has sensitivity measured on noise, where the model hears it. Plain cuts, whose norms do not
    follow, lose by that as often as they gain.
    """
    if not inputs:
        return "sensitivity" if on_noise and compensation == "mean" else "global"
    return "sensitivity" if inputs >= LEAST_IMAGES else "global"


def default_conditional(compensation: Method, scope: Scope) -> float:
    """What `prune_` takes for `SynapticImportance`: all of what others cannot tell, half where layers compete by it.

    By half is meant the root of `1 - R^2`. Both were chosen on training images.
    """
    if compensation not in SOLVED:
        return 0.0
    return 1.0 if scope == "sensitivity" else 0.5


def default_score(compensation: Method, scope: Scope) -> Literal["share", "relevance"]:
    """What `prune_` takes for `SynapticImportance`: relevance where layers compete and nothing is solved anew."""
    return "relevance" if scope != "local" and compensation not in SOLVED else "share"


def default_recalibrate(compensation: Method) -> bool:
    """What `prune_` takes where nothing is said: norms follow what means and regressions leave.

    Without compensation the cut shall equal the mask, and "reconstruct" fits layers to the norms as they are.
    """
    return compensation in ("mean", "linear")


def default_cost_exponent(importance: Any, scope: Scope, on_noise: bool = False) -> float:
    """What `prune_` takes for an importance; in the measured scope, whether on noise. Chosen on training images."""
    by_relevance = is_relevance(importance) and (scope == "global" or (scope == "sensitivity" and on_noise))
    return RELEVANCE_EXPONENT if by_relevance else COST_EXPONENT[scope]


def is_relevance(importance: Any) -> bool:
    """Whether scores compare from layer to layer, since nothing is lost on the way, see `importance.relevance`."""
    return getattr(importance, "score", None) == "relevance"
