"""Models and exported files on one machine: latency, memory, file size, and what their outputs are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.arrays import random_inputs
from ss_pruning._utils.progress import Progress
from ss_pruning.cli import delivery, jobs
from ss_pruning.cli.request import Compared
from ss_pruning.compensation.fidelity import Reference
from ss_pruning.errors import InputError
from ss_pruning.importance.calibration import gather
from ss_pruning.io.checkpoint import packed
from ss_pruning.profiling.comparison import Setting, SpeedComparison, compare_speeds
from ss_pruning.profiling.exported_model import ExportedModel
from ss_pruning.profiling.latency import machine
from ss_pruning.profiling.runtimes import RUNTIMES
from ss_pruning.report.formatting import count, percent, rich_table
from ss_pruning.report.records import TOO_NOISY, Fidelity, crosses_one
from ss_pruning.sources.accuracy import accuracy
from ss_pruning.sources.data import Data, open_data, open_photos
from ss_pruning.sources.models import build_model, input_of
from ss_pruning.sources.preprocessing import Preprocess
from ss_pruning.sources.weights import load_weights

if TYPE_CHECKING:
    from rich.table import Table

#: Outputs are compared on so many inputs: of noise where there are no images, of photos at most.
NOISE, PHOTOS = 64, 512


@dataclass(frozen=True)
class Worth:
    """What the outputs of the models are worth.

    Attributes:
        reference: The model whose outputs the others are compared with: the first that has weights.
        on: The inputs, in words.
        fidelity: By name.
        accuracy: By name, where there are labels.
    """

    reference: str
    on: str
    fidelity: dict[str, Fidelity]
    accuracy: dict[str, float]


@dataclass(frozen=True)
class BenchResult:
    """All that was measured, by name of the model; the first one is what the others are compared with."""

    machine: dict[str, str]
    file_bytes: dict[str, int]
    comparisons: list[SpeedComparison]
    outputs: Worth | None

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def file_bytes(model: nn.Module) -> int:
    """Size of the file that `save` writes."""
    return len(packed(model)[0])


def measure(
    wanted: Compared, settings: Sequence[Setting], device: str | None, progress: Progress
) -> BenchResult:
    """Open what is to be measured, and measure it in each setting."""
    models, sizes, preprocess = _opened(wanted)
    place = torch.device("cpu") if device is None and wanted.exported else jobs.device_named(device)
    found = []
    for done, setting in enumerate(settings):
        progress(f"timing: {setting}", done, len(settings))
        found.append(compare_speeds(models, preprocess.size, setting, place))
    # A dense model without weights costs the same time; its outputs mean nothing.
    alive = {name: model for name, model in models.items() if name != "dense" or wanted.weights}
    outputs = worth(alive, wanted, preprocess) if len(alive) > 1 or wanted.data else None
    return BenchResult(machine(place), sizes, found, outputs)


def _opened(wanted: Compared) -> tuple[dict[str, nn.Module], dict[str, int], Preprocess]:
    """The models by name, the sizes of their files, and how images become their inputs."""
    models: dict[str, nn.Module] = {}
    preprocess, file = None, wanted.pruned()
    if file is not None:
        opened = delivery.open_file(file, wanted)
        if wanted.weights:
            load_weights(opened.dense, wanted.weights)
        models, preprocess = {"dense": opened.dense, "pruned": opened.pruned}, opened.preprocess
    sizes = {name: file_bytes(model) for name, model in models.items()}
    exported = {name: RUNTIMES[path.suffix](path) for name, path in _named(wanted.exported)}
    sizes |= {name: model.bytes for name, model in exported.items()}
    models |= exported
    return models, sizes, preprocess or _preprocess(wanted, next(iter(exported.values())))


def _named(files: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Names to show: of the files alone, unless two are called the same."""
    alone = len({file.name for file in files}) == len(files)
    return ((file.name if alone else str(file), file) for file in files)


def _preprocess(wanted: Compared, model: ExportedModel) -> Preprocess:
    """Of files alone: what the user says, and the size that is in the file."""
    if model.inputs != 1:
        raise InputError(f"{model.path.name} takes {model.inputs} inputs, and files of one are compared.")
    if wanted.model:
        return jobs.preprocess_of(input_of(wanted.model, build_model(wanted.model)), wanted)
    if (wanted.data or wanted.photos) and not (wanted.mean and wanted.std):
        raise InputError(
            "exported files do not say how images become their inputs: name the model as for ss-prune prune (--model), "
            "or give --mean and --std."
        )
    if model.size is None and wanted.input_size is None:
        raise InputError(f"{model.path.name} takes inputs of any size: say which, with --input-size.")
    size = model.size or (3, 224, 224)
    plain = Preprocess(size, (0.0,) * size[0], (1.0,) * size[0])
    return jobs.preprocess_of(plain, wanted)


def worth(models: dict[str, nn.Module], wanted: Compared, preprocess: Preprocess) -> Worth:
    """Compare the outputs with those of the first model, and with labels where there are any."""
    data = None
    if wanted.data is not None:
        data = open_data(wanted.data, preprocess, calibration_size=0, evaluation_size=wanted.images)
    inputs, on = _inputs(wanted, preprocess, data)
    first, *others = models
    reference = Reference(_Flat(models[first]), gather(inputs, None))
    return Worth(
        first,
        on,
        {name: reference.fidelity(_Flat(models[name])) for name in others},
        {name: accuracy(model, data.evaluation) for name, model in models.items()} if data else {},
    )


def _inputs(wanted: Compared, preprocess: Preprocess, data: Data | None) -> tuple[Any, str]:
    if wanted.photos is not None:
        photos = open_photos(wanted.photos, preprocess, size=PHOTOS)
        return photos.images, f"{photos.used:,} images of {wanted.photos}"
    if data is not None:
        return data.evaluation, f"images of {data.name}"
    return random_inputs(NOISE, preprocess.size), f"{NOISE} inputs of noise"


class _Flat(nn.Module):
    """A model whose outputs go by order: exported files know no names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The tensors among the outputs."""
        return tuple(leaf for leaf in pytree.tree_leaves(self.model(x)) if isinstance(leaf, Tensor))


def table(found: BenchResult) -> Table:
    """What was measured, for the terminal: a column for each model."""
    first, *others = found.file_bytes
    where = ", ".join(f"{key} {value}" for key, value in found.machine.items())
    title = f"{first} against {', '.join(others)}" if others else first
    return rich_table(title, ("", *found.file_bytes), _rows(found), where)


def _rows(found: BenchResult) -> Iterator[list[str]]:
    sizes, first = found.file_bytes, next(iter(found.file_bytes))
    for comparison in found.comparisons:
        yield []
        yield [f"{comparison.setting} ({comparison.rounds} rounds)"]
        yield from _speed_rows(comparison, first)
    yield []
    yield ["file", *(count(size, "B") for size in sizes.values())]
    yield ["  of first", "", *(percent(sizes[name] / sizes[first]) for name in sizes if name != first)]
    if found.outputs is not None:
        yield []
        yield from _worth_rows(found.outputs, list(sizes))


def _speed_rows(comparison: SpeedComparison, first: str) -> Iterator[list[str]]:
    speeds = comparison.speeds.values()
    yield ["  median", *(_milli(speed.seconds) for speed in speeds)]
    yield ["  middle half", *(f"{_milli(speed.low)} to {_milli(speed.high)}" for speed in speeds)]
    shares = [
        TOO_NOISY if crosses_one(comparison.spreads[name]) else percent(share)
        for name, share in comparison.ratios.items()
        if name != first
    ]
    yield ["  of first", "", *shares]
    yield ["  images", *(f"{speed.images_per_second:,.1f} /s" for speed in speeds)]
    if any(speed.peak_bytes for speed in speeds):
        yield ["  peak memory", *(count(s.peak_bytes, "B") if s.peak_bytes else "" for s in speeds)]


def _worth_rows(found: Worth, names: Sequence[str]) -> Iterator[list[str]]:
    def row(title: str, value: Callable[[Fidelity], str]) -> list[str]:
        shown = {name: value(fidelity) for name, fidelity in found.fidelity.items()}
        return [title, *(shown.get(name, "") for name in names)]

    yield [f"outputs against {found.reference}, on {found.on}"]
    yield row("  error", lambda fidelity: percent(fidelity.error, 2))
    if any(fidelity.agreement is not None for fidelity in found.fidelity.values()):
        yield row("  same class", lambda f: "" if f.agreement is None else percent(f.agreement))
    if found.accuracy:
        shown = (percent(found.accuracy[name], 2) if name in found.accuracy else "" for name in names)
        yield ["  accuracy", *shown]


def _milli(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
