"""What `ss-prune doctor` says: what is installed, what each extra would add, and facts about the machine."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PURPOSES = {
    "timm": "models by name as timm:NAME",
    "nni": "pruners and configs of NNI",
    "demo": "the digits that the demo network reads",
    "lightning": "training towards sparse synapses in Lightning",
    "onnx": "writing and checking ONNX files",
    "sweep": "sweeps over options with Ray Tune",
    "train": "fine-tuning timm models with accelerate",
    "plot": "pictures of the benchmarks",
    "docs": "building the documentation",
    "dev": "linter, type checker and tests",
    "all": "all of these",
}
"""What each extra is for; one that is not named here is shown without."""

COMPLETION = "Shell completion: ss-prune --install-completion"


@dataclass(frozen=True)
class Package:
    """A package that something needs; `version` is None where it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True)
class Extra:
    """An extra of this package, and what it asks for."""

    name: str
    purpose: str
    packages: list[Package]

    @property
    def is_there(self) -> bool:
        """True if all of it is installed."""
        return all(package.version is not None for package in self.packages)

    @property
    def command(self) -> str:
        """How to install it."""
        return f"pip install 'ss-pruning[{self.name}]'"


@dataclass(frozen=True)
class Checkup:
    """Everything that `ss-prune doctor` found."""

    required: list[Package]
    extras: list[Extra]
    machine: dict[str, str]

    @property
    def is_well(self) -> bool:
        """True if all that is required is there."""
        return all(package.version is not None for package in self.required)

    def tables(self) -> list[Table]:
        """Return what was found as `rich` tables."""
        from rich.table import Table

        required = Table("required", "version")
        for package in self.required:
            required.add_row(package.name, package.version or "[red]missing[/red]")
        extras = Table("extra", "adds", "")
        for extra in self.extras:
            missing = ", ".join(package.name for package in extra.packages if package.version is None)
            extras.add_row(extra.name, extra.purpose, f"missing: {missing}" if missing else "there")
        machine = Table("machine", "")
        for name, value in self.machine.items():
            machine.add_row(name, value)
        return [required, extras, machine]

    def hints(self) -> list[str]:
        """Return what could be done next, a line each."""
        return [*(extra.command for extra in self.extras if not extra.is_there), COMPLETION]

    def to_json(self) -> str:
        """Return what was found as JSON text."""
        extras = [{**asdict(extra), "installed": extra.is_there} for extra in self.extras]
        values = {"required": [asdict(package) for package in self.required], "extras": extras}
        return (
            json.dumps({"format": "ss-pruning doctor 1", **values, "machine": self.machine}, indent=2) + "\n"
        )


def examine() -> Checkup:
    """Look at the packages that this one declares, and at the machine."""
    required: list[Package] = []
    extras: dict[str, list[Package]] = {}
    for line in _requirements():
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        extra = re.search(r"""extra\s*==\s*["']([^"']+)""", line)
        if name.lower() == "ss-pruning":
            continue  # an extra that gathers others
        (required if extra is None else extras.setdefault(extra[1], [])).append(_package(name))
    found = [Extra(name, PURPOSES.get(name, ""), packages) for name, packages in sorted(extras.items())]
    return Checkup(required, found, _machine())


def _requirements() -> list[str]:
    try:
        return metadata.requires("ss-pruning") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ["numpy", "rich", "safetensors", "torch", "torch-pruning", "torchvision", "typer"]


def _package(name: str) -> Package:
    try:
        return Package(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Package(name, None)


def _machine() -> dict[str, str]:
    import torch

    import ss_pruning

    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "ss-pruning": ss_pruning.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processors": f"{os.cpu_count()}",
        "threads": f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')})",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "linear algebra": _linear_algebra(torch.__config__.show()),
        "oneDNN": "yes" if torch.backends.mkldnn.is_available() else "no",
        "accelerators": ", ".join(devices) if cuda else "none that PyTorch sees",
        "cache": _cache_folder(),
    }


def _linear_algebra(config: str) -> str:
    found = re.search(r"BLAS_INFO=(\w+)", config), re.search(r"LAPACK_INFO=(\w+)", config)
    return ", ".join(match[1] for match in found if match is not None) or "unknown"


def _cache_folder() -> str:
    from ss_pruning._utils import cache as _cache

    return str(_cache.folder())
