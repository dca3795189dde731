"""Options as fields of dataclasses, and what a command line needs to be told of those of the library's own classes.

Name, type, default and help stand in the classes and their docstrings.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Any

import typer

from ss_pruning import config
from ss_pruning.errors import InputError
from ss_pruning.integrations.finetuning.options import Sparsifying, Task, Training
from ss_pruning.recovery.settings import Recovery

#: Panels of the help.
MODEL, IMAGES, CRITERION, COMPENSATION = "Model", "Images", "Criterion", "Compensation"
SETTING, TRAINING, OUTPUT = "Setting", "Training", "Output"


def option(default: Any, panel: str, *names: str, metavar: str | None = "NAME", **told: Any) -> Any:
    """A field of a dataclass that is an option, in a panel of the help, and what else typer is told of it."""
    shown = {"param_decls": names, "rich_help_panel": panel, "metavar": metavar, **told}
    return field(default=default, metadata=shown)


def argument(metavar: str) -> Any:
    """A field that is an argument, which has to be given."""
    return field(
        metadata={"kind": typer.Argument, "metavar": metavar, "show_default": False, "rich_help_panel": None}
    )


def share(text: str) -> float:
    """Read a share: 0.5, or 50%."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise InputError(f"a share is a number between 0 and 1, such as 0.5, or 50%, not {text!r}.") from None


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


#: Of the library's own classes: by class and field, what a field of our own would say itself.
TOLD: dict[tuple[type, str], dict[str, Any]] = {
    (config.Allocation, "max_ratio"): {"metavar": "0..1"},
    (config.Allocation, "cost_exponent"): {"metavar": "P"},
    (config.Allocation, "round_to"): {"metavar": "N|measured", "parser": _multiple},
    (config.Allocation, "budget_time"): {"metavar": "TIME", "parser": _seconds},
    (config.Allocation, "scope"): {"metavar": "NAME"},
    (config.Synaptic, "statistics"): {"metavar": "NAME"},
    (config.Synaptic, "score"): {"metavar": "NAME"},
    (config.Synaptic, "conditional"): {"metavar": "0..1"},
    (Sparsifying, "macs"): {"parser": share},
    (Sparsifying, "latency"): {"parser": share},
    (Task, "model"): dict(argument("MODEL").metadata),
    (Task, "data"): {"metavar": "DIR", "show_default": False, "rich_help_panel": IMAGES},
    (Task, "weights"): {"metavar": "FILE", "show_default": "random", "rich_help_panel": MODEL},
    (Task, "out"): {"metavar": "DIR"},
}
#: Of these, where no field is told otherwise.
PANELS: dict[type, str] = {
    config.Allocation: CRITERION,
    config.Synaptic: CRITERION,
    Recovery: TRAINING,
    Training: TRAINING,
    Sparsifying: "Sparse training and pruning",
    Task: OUTPUT,
}
#: What cannot be said on a command line, or is said otherwise.
LEFT_OUT = {(config.Allocation, "latency_inputs")}
