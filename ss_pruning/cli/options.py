"""What only a command line needs to be told of the fields that are its options: panels, metavars, defaults in words.

Name, type, default and help stand in the classes and their docstrings.
"""

from __future__ import annotations

import re
from typing import Any

import typer

from ss_pruning import config
from ss_pruning.cli import request as ask
from ss_pruning.errors import InputError
from ss_pruning.integrations.finetuning.options import Sparsifying, Training
from ss_pruning.recovery.settings import Recovery

_MODEL, _IMAGES, _CRITERION, _OUTPUT = "Model", "Images", "Criterion", "Output"
_COMPENSATION = "Compensation"
_SETTING, _TRAINING = "Setting", "Training"


def _option(panel: str, *names: str, metavar: str | None = "NAME", **more: Any) -> dict[str, Any]:
    return {"param_decls": names, "rich_help_panel": panel, "metavar": metavar, **more}


def _argument(metavar: str) -> dict[str, Any]:
    return {"kind": typer.Argument, "metavar": metavar, "show_default": False}


def _seconds(text: str) -> float:
    """Read --budget-time: 90s, 5m, 1.5h, or a number of seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise InputError(f"--budget-time is a time, such as 90s, 5m or 1.5h, not {text!r}.")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _multiple(text: str) -> int | str:
    """Read --round-to."""
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
    (ask.Preprocessed, "input_size"): _option(
        _IMAGES, metavar="CxHxW", show_default="the model's own, else 3x224x224"
    ),
    (ask.Preprocessed, "mean"): _option(_IMAGES, metavar="M,M,M", show_default="the model's own"),
    (ask.Preprocessed, "std"): _option(_IMAGES, metavar="S,S,S", show_default="the model's own"),
    (ask.Labelled, "data"): _option(_IMAGES, metavar="PLACE", show_default=False),
    (ask.Images, "device"): _option(_OUTPUT, show_default="a GPU if any"),
    (ask.Calibrated, "images"): _option(_IMAGES, metavar="N", show_default="all", min=1),
    (ask.Calibrated, "calibration"): _option(_IMAGES, metavar="IMAGES", show_default="data, if there is any"),
    (ask.Calibrated, "calibration_images"): _option(
        _IMAGES, metavar="N", show_default="512; synthetic: up to 256", min=1
    ),
    (ask.Source, "model"): _argument("MODEL"),
    (ask.Weighted, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (ask.Source, "weights_by_order"): _option(_MODEL, "--weights-by-order", metavar=""),
    (ask.Source, "seed"): _option(_OUTPUT, metavar="N", min=0, max=2**32 - 1),
    (ask.Request, "batch"): _option(_IMAGES, metavar="N", min=1),
    (ask.Request, "ignore"): _option(_CRITERION, metavar="PATH", show_default=False),
    (ask.Budgets, "macs"): _FRACTION,
    (ask.Budgets, "params"): _FRACTION,
    (ask.Budgets, "ratio"): _FRACTION,
    (ask.Budgets, "latency"): _FRACTION,
    (ask.Method, "importance"): _option(_CRITERION),
    (ask.Method, "compensation"): _option(_COMPENSATION),
    (ask.Method, "recalibrate"): _option(
        _COMPENSATION, "--recalibrate/--no-recalibrate", show_default="with mean and linear", metavar=""
    ),
    (ask.Output, "out"): _option(_OUTPUT, metavar="DIR", show_default=False),
    (ask.Architecture, "model"): _option(
        _MODEL, "--model", metavar="MODEL", show_default="what the file names"
    ),
    (ask.PrunedFile, "file"): _argument("FILE"),
    (ask.Recovering, "minutes"): _option(_TRAINING, metavar="M", show_default="5, unless --steps is given"),
    (ask.Recovering, "steps"): _option(_TRAINING, metavar="N", show_default=False),
    (ask.Recovering, "checkpoint"): _option(_TRAINING, metavar="FILE", show_default=False),
    (ask.Recovering, "out"): _option(
        _OUTPUT, metavar="FILE", show_default="recovered.safetensors beside FILE"
    ),
    (ask.Exporting, "file"): _argument("FILE"),
    (ask.Exporting, "format"): _option(_OUTPUT, metavar="onnx|pt2", show_default="by the name of --out"),
    (ask.Exporting, "int8"): _option(_OUTPUT, "--int8", metavar=""),
    (ask.Exporting, "calibration"): _option(_IMAGES, metavar="synthetic|DIR", show_default=False),
    (ask.Exporting, "calibration_images"): _option(
        _IMAGES, "--calibration-images", metavar="N", show_default="512; synthetic: up to 256", min=1
    ),
    (ask.Exporting, "out"): _option(_OUTPUT, metavar="FILE", show_default="beside the model"),
    (ask.Compared, "files"): _argument("FILE..."),
    (ask.Compared, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (ask.Compared, "images"): _option(_IMAGES, metavar="N", show_default="all", min=1),
    (ask.Compared, "photos"): _option(_IMAGES, metavar="DIR", show_default="those of --data, else noise"),
    (ask.Timed, "batch"): _option(_IMAGES, metavar="N,N,N"),
    (ask.Timed, "dtype"): _option(_SETTING, metavar="NAME,NAME"),
    (ask.Timed, "layout"): _option(_SETTING, metavar="NAME,NAME"),
    (ask.Timed, "compiled"): _option(_SETTING, "--compiled", metavar=""),
    (ask.Timed, "threads"): _option(_OUTPUT, metavar="N", show_default="torch's own", min=1),
    (ask.Timed, "device"): _option(_OUTPUT, show_default="a GPU if any"),
    (ask.Finetuning, "model"): _argument("MODEL"),
    (ask.Finetuning, "data"): _option(_IMAGES, metavar="DIR", show_default=False),
    (ask.Finetuning, "weights"): _option(_MODEL, metavar="FILE", show_default="random"),
    (ask.Finetuning, "out"): _option(_OUTPUT, metavar="DIR"),
    (ask.Finetuning, "export"): _option(_OUTPUT, metavar=None, show_default=False),
    (ask.Scored, "statistics"): _option(_CRITERION, metavar=None),
    (ask.Scored, "weakest"): _option(_OUTPUT, metavar="N", min=0),
    (ask.Scored, "out"): _option(_OUTPUT, metavar="FILE", show_default=False),
    (ask.SideBySide, "a"): _argument("A"),
    (ask.SideBySide, "b"): _argument("B"),
    (ask.SideBySide, "html"): _option(_OUTPUT, metavar="FILE", show_default=False),
}
#: Of configurations, where no field is told otherwise.
PANELS: dict[type, str] = {
    config.Allocation: _CRITERION,
    config.Synaptic: _CRITERION,
    Recovery: _TRAINING,
    Training: _TRAINING,
    Sparsifying: "Sparse training and pruning",
}
#: What cannot be said on a command line, or is said otherwise.
LEFT_OUT = {(config.Allocation, "latency_inputs")}
