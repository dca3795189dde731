"""What the command line offers, and what a user asked for; imports nothing heavy, so that --help is quick."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

#: The importance by default, with options of its own.
SYNAPTIC = "synaptic"


class StatisticsSource(str, Enum):
    """Where the variances of the channels come from."""

    batchnorm = "batchnorm"
    gaussian = "gaussian"
    data = "data"


class Score(str, Enum):
    """What of the strengths is summed."""

    share = "share"
    strength = "strength"
    entropy = "entropy"
    relevance = "relevance"


class Compensation(str, Enum):
    """How what removed channels carried is moved onto what stays."""

    none = "none"
    mean = "mean"
    linear = "linear"
    reconstruct = "reconstruct"


DATA, SYNTHETIC = "data", "synthetic"
"""What calibration images may be, besides those of a folder: of the data, or made from the model."""


class Scope(str, Enum):
    """How layers compete with each other."""

    all_layers = "global"
    each_layer = "local"
    sensitivity = "sensitivity"


class Request(NamedTuple):
    """What both commands are asked, as given on the command line."""

    model: str
    weights: str | None
    weights_by_order: bool
    input_size: str | None
    mean: str | None
    std: str | None
    data: str | None
    statistics: StatisticsSource | None
    seed: int
    device: str | None
    images: int | None = None
    calibration: str | None = None
    calibration_images: int | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Request:
        """Pick them out of the parameters of a command; the others of `params` are its own."""
        own = {name: params[name] for name in cls._fields if name in params}
        statistics = params["statistics"]  # typer has left its text there
        return cls(**{**own, "statistics": None if statistics is None else StatisticsSource(statistics)})
