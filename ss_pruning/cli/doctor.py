"""What `ss-prune doctor` says: what is installed, what each extra would add, and facts about the machine."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PURPOSES = {
    "cli": "the command ss-prune",
    "timm": "models by name as timm:NAME",
    "ultralytics": "YOLO models: prune_yolo, and by name as yolo:NAME",
    "nni": "pruners and configs of NNI",
    "demo": "the digits that the demo network reads",
    "lightning": "training towards sparse synapses in Lightning",
    "onnx": "writing and checking ONNX files",
    "openvino": "writing, checking and measuring OpenVINO's files",
    "torchao": "INT8 as programs of torch.export",
    "sweep": "sweeps over options with Ray Tune",
    "train": "ss-prune finetune: with labels, in many processes, by accelerate",
    "plot": "pictures of the benchmarks",
    "docs": "building the documentation",
    "dev": "linter, type checker and tests",
    "all": "all of these",
}
"""What each extra is for; one that is not named here is shown without."""

COMPLETION = "Shell completion: ss-prune --install-completion"

Versions = dict[str, "str | None"]
"""Packages and their versions, None where one is missing."""


@dataclass
class Checkup:
    """Everything that `ss-prune doctor` found: what is required, what each extra asks for, the machine."""

    required: Versions = field(default_factory=dict)
    extras: dict[str, Versions] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def is_well(self) -> bool:
        """True if all that is required is there."""
        return not _missing(self.required)

    def tables(self) -> list[Table]:
        """Return what was found as `rich` tables."""
        from rich.table import Table

        required, extras, machine = (
            Table("required", "version"),
            Table("extra", "adds", ""),
            Table("machine", ""),
        )
        for package, version in self.required.items():
            required.add_row(package, version or "[red]missing[/red]")
        for name, packages in sorted(self.extras.items()):
            missing = ", ".join(_missing(packages))
            extras.add_row(name, PURPOSES.get(name, ""), f"missing: {missing}" if missing else "there")
        for name, value in self.machine.items():
            machine.add_row(name, value)
        return [required, extras, machine]

    def hints(self) -> Iterator[str]:
        """Yield what could be done next, a line each."""
        for name, packages in sorted(self.extras.items()):
            if _missing(packages):
                yield f"pip install 'ss-pruning[{name}]'"
        yield COMPLETION

    def to_json(self) -> str:
        """Return what was found as JSON text."""
        extras = {
            name: {
                "purpose": PURPOSES.get(name, ""),
                "installed": not _missing(packages),
                "packages": packages,
            }
            for name, packages in sorted(self.extras.items())
        }
        found = {"required": self.required, "extras": extras, "machine": self.machine}
        return json.dumps({"format": "ss-pruning doctor 2", **found}, indent=2) + "\n"


def examine() -> Checkup:
    """Look at the packages that this one declares, and at the machine."""
    found = Checkup(machine=_machine())
    for line in _requirements():
        package = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        extra = re.search(r"""extra\s*==\s*["']([^"']+)""", line)
        if package.lower() != "ss-pruning":  # an extra that gathers others
            versions = found.required if extra is None else found.extras.setdefault(extra[1], {})
            versions[package] = _version(package)
    return found


def _missing(packages: Versions) -> list[str]:
    return [name for name, version in packages.items() if version is None]


def _requirements() -> list[str]:
    try:
        return metadata.requires("ss-pruning") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ["jinja2", "numpy", "safetensors", "torch", "torch-pruning", "torchvision"]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str]:
    """What times depend on, and what a report of a fault should tell; at once, where `collect_env` takes seconds."""
    import torch

    import ss_pruning
    from ss_pruning._utils import cache
    from ss_pruning.profiling.latency import machine

    here = machine(torch.device("cpu"))
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "ss-pruning": ss_pruning.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processor": here["name"],
        "threads": here["threads"],
        "linear algebra": ", ".join(
            sorted(set(re.findall(r"(?:BLAS|LAPACK)_INFO=(\w+)", torch.__config__.show())))
        ),
        "accelerators": ", ".join(devices) or "none that PyTorch sees",
        "cache": str(cache.folder()),
    }
