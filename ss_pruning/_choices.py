"""What the command line offers, and what a user asked for; imports nothing heavy, so that --help is quick."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Importance(str, Enum):
    """What decides which channels go."""

    synaptic = "synaptic"
    magnitude = "magnitude"
    magnitude_l1 = "magnitude-l1"
    bn_scale = "bn-scale"
    lamp = "lamp"
    fpgm = "fpgm"
    random = "random"


class Moments(str, Enum):
    """Where the variances of the channels come from."""

    batchnorm = "batchnorm"
    gaussian = "gaussian"
    data = "data"


class Score(str, Enum):
    """What of the strengths is summed."""

    share = "share"
    strength = "strength"
    entropy = "entropy"


class Scope(str, Enum):
    """Whether layers compete with each other."""

    all_layers = "global"
    each_layer = "local"


class Request(NamedTuple):
    """What both commands are asked, as given on the command line."""

    model: str
    weights: str | None
    by_order: bool
    input_size: str | None
    mean: str | None
    std: str | None
    data: str | None
    images: int | None
    moments: Moments
    seed: int
    device: str | None
