"""What only a command line needs to be told of the fields that are its options: panels, metavars, defaults in words.

Name, type, default and help stand in the classes and their docstrings.
"""

from __future__ import annotations

import re
from typing import Any

import typer

from ss_pruning import config
from ss_pruning.cli.request import (
    Architecture,
    Budgets,
    Calibrated,
    Compared,
    Exporting,
    Finetuning,
    Images,
    Labelled,
    Method,
    Output,
    Preprocessed,
    PrunedFile,
    Recovering,
    Request,
    Scored,
    SideBySide,
    Source,
    Timed,
)
from ss_pruning.errors import InputError
from ss_pruning.integrations.finetuning.options import Sparsifying, Training

_MODEL, _IMAGES, _CRITERION, _OUTPUT = "Model", "Images", "Criterion", "Output"
_COMPENSATION = "Compensation"
_SETTING, _TRAINING = "Setting", "Training"


def _option(panel: str, *names: str, metavar: str | None = "NAME", **more: Any) -> dict[str, Any]:
    return {"param_decls": names, "rich_help_panel": panel, "metavar": metavar, **more}


def _argument(metavar: str) -> dict[str, Any]:
    return {"kind": typer.Argument, "metavar": metavar, "show_default": False}


def _seconds(text: str) -> float:
    """Read --budget-time: 90s, 5m, 1.5h, or a number of seconds.

    Raises:
        InputError: It is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise InputError(f"--budget-time is a time, such as 90s, 5m or 1.5h, not {text!r}.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _multiple(text: str) -> int | str:
    """Read --round-to.

    Raises:
        InputError: It is no number, nor the word.
    """
    if text == "measured":
        return text
    if not text.isdigit():
        raise InputError(f"--round-to is a whole number, such as 8, or measured, not {text!r}.")
    return int(text)


_FRACTION = _option("Budget (exactly one)", metavar="0..1", show_default=False)
#: By the class that has a field, and the field.
TOLD: dict[tuple[type, str], dict[str, Any]] = {
    (config.Allocation, "max_ratio"): {"metavar": "0..1"},
    (config.Allocation, "cost_exponent"): {"metavar": "P"},
    (config.Allocation, "round_to"): {"metavar": "N|measured", "parser": _multiple},
    (config.Allocation, "budget_time"): {"metavar": "TIME", "parser": _seconds},
    (config.Allocation, "scope"): {"metavar": "NAME"},
    (config.Synaptic, "statistics"): {"metavar": "NAME"},
    (config.Synaptic, "score"): {"metavar": "NAME"},
    (config.Synaptic, "conditional"): {"metavar": "0..1"},
    (Preprocessed, "input_size"): _option(
        _IMAGES, metavar="CxHxW", show_default="the model's own, else 3x224x224"
    ),
    (Preprocessed, "mean"): _option(_IMAGES, metavar="M,M,M", show_default="the model's own"),
    (Preprocessed, "std"): _option(_IMAGES, metavar="S,S,S", show_default="the model's own"),
    (Labelled, "data"): _option(_IMAGES, metavar="PLACE", show_default=False),
    (Images, "device"): _option(_OUTPUT, show_default="a GPU if any"),
    (Calibrated, "images"): _option(_IMAGES, metavar="N", show_default="all", min=1),
    (Calibrated, "calibration"): _option(_IMAGES, metavar="IMAGES", show_default="data, if there is any"),
    (Calibrated, "calibration_images"): _option(
        _IMAGES, metavar="N", show_default="512; synthetic: up to 256", min=1
    ),
    (Source, "model"): _argument("MODEL"),
    (Source, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (Source, "weights_by_order"): _option(_MODEL, "--weights-by-order", metavar=""),
    (Source, "seed"): _option(_OUTPUT, metavar="N", min=0, max=2**32 - 1),
    (Request, "batch"): _option(_IMAGES, metavar="N", min=1),
    (Request, "ignore"): _option(_CRITERION, metavar="PATH", show_default=False),
    (Budgets, "macs"): _FRACTION,
    (Budgets, "params"): _FRACTION,
    (Budgets, "ratio"): _FRACTION,
    (Budgets, "latency"): _FRACTION,
    (Method, "importance"): _option(_CRITERION),
    (Method, "compensation"): _option(_COMPENSATION),
    (Method, "recalibrate"): _option(
        _COMPENSATION, "--recalibrate/--no-recalibrate", show_default="with mean and linear", metavar=""
    ),
    (Output, "out"): _option(_OUTPUT, metavar="DIR", show_default=False),
    (Architecture, "model"): _option(_MODEL, "--model", metavar="MODEL", show_default="what the file names"),
    (PrunedFile, "file"): _argument("FILE"),
    (Recovering, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (Recovering, "minutes"): _option(_TRAINING, metavar="M", show_default="5, unless --steps is given"),
    (Recovering, "steps"): _option(_TRAINING, metavar="N", show_default=False),
    (Recovering, "checkpoint"): _option(_TRAINING, metavar="FILE", show_default=False),
    (Recovering, "out"): _option(_OUTPUT, metavar="FILE", show_default="recovered.safetensors beside FILE"),
    (Exporting, "file"): _argument("FILE"),
    (Exporting, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (Exporting, "format"): _option(_OUTPUT, metavar="onnx|pt2", show_default="by the name of --out"),
    (Exporting, "int8"): _option(_OUTPUT, "--int8", metavar=""),
    (Exporting, "calibration"): _option(_IMAGES, metavar="synthetic|DIR", show_default=False),
    (Exporting, "calibration_images"): _option(
        _IMAGES, "--calibration-images", metavar="N", show_default="512; synthetic: up to 256", min=1
    ),
    (Exporting, "out"): _option(_OUTPUT, metavar="FILE", show_default="beside the model"),
    (Compared, "files"): _argument("FILE..."),
    (Compared, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (Compared, "data"): _option(_IMAGES, metavar="PLACE", show_default=False),
    (Compared, "images"): _option(_IMAGES, metavar="N", show_default="all", min=1),
    (Compared, "photos"): _option(_IMAGES, metavar="DIR", show_default="those of --data, else noise"),
    (Timed, "batch"): _option(_IMAGES, metavar="N,N,N"),
    (Timed, "dtype"): _option(_SETTING, metavar="NAME,NAME"),
    (Timed, "layout"): _option(_SETTING, metavar="NAME,NAME"),
    (Timed, "compiled"): _option(_SETTING, "--compiled", metavar=""),
    (Timed, "threads"): _option(_OUTPUT, metavar="N", show_default="torch's own", min=1),
    (Timed, "device"): _option(_OUTPUT, show_default="a GPU if any"),
    (Finetuning, "model"): _argument("MODEL"),
    (Finetuning, "data"): _option(_IMAGES, metavar="DIR", show_default=False),
    (Finetuning, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (Finetuning, "out"): _option(_OUTPUT, metavar="DIR"),
    (Finetuning, "export"): _option(_OUTPUT, metavar=None, show_default=False),
    (Scored, "statistics"): _option(_CRITERION, metavar=None),
    (Scored, "weakest"): _option(_OUTPUT, metavar="N", min=0),
    (Scored, "out"): _option(_OUTPUT, metavar="FILE", show_default=False),
    (SideBySide, "a"): _argument("A"),
    (SideBySide, "b"): _argument("B"),
    (SideBySide, "html"): _option(_OUTPUT, metavar="FILE", show_default=False),
}
#: Of configurations, where no field is told otherwise.
PANELS: dict[type, str] = {
    config.Allocation: _CRITERION,
    config.Synaptic: _CRITERION,
    config.Recovery: _TRAINING,
    Training: _TRAINING,
    Sparsifying: "Sparse training and pruning",
}
#: What cannot be said on a command line, or is said otherwise.
LEFT_OUT = {(config.Allocation, "latency_inputs")}
