"""What a command does between its options and its output: build, open, prune or score, write."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ss_pruning._utils.arrays import random_inputs
from ss_pruning._utils.copying import copied
from ss_pruning._utils.files import write_together
from ss_pruning._utils.progress import Progress, time_in_words
from ss_pruning.cli.console import PRUNING, banner, note, shown_as
from ss_pruning.cli.request import DATA, Rebuilt, Request, Source
from ss_pruning.config import SYNTHETIC, Compensation, Synaptic, SyntheticImages
from ss_pruning.errors import InputError, ModelError
from ss_pruning.profiling.latency import as_reported, machine, measure_latency
from ss_pruning.sources.accuracy import accuracy, batches
from ss_pruning.sources.data import open_data, open_photos
from ss_pruning.sources.models import brings_weights, build_model, input_of, is_function, portable_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ss_pruning.importance.strength import Strengths
    from ss_pruning.report.records import Report
    from ss_pruning.sources.data import Data
    from ss_pruning.sources.preprocessing import Preprocess

WRITTEN = ("model.safetensors", "report.json", "report.html")
"""What `ss-prune prune --out` writes into its folder."""
_CALIBRATION_IMAGES = 512
# Seconds.
_WORTH_SAYING = 10


class Job(NamedTuple):
    """What a request comes to: the model with its weights, an input for it, and the data if any."""

    spec: str
    model: nn.Module
    example: Tensor
    preprocess: Preprocess
    data: Data | None
    device: torch.device


def known_weights(request: Request) -> bool:
    """Whether weights are loaded that somebody trained."""
    return request.weights is not None or brings_weights(request.model)


def random_weights(request: Request) -> bool:
    """Whether no weights are loaded that anybody knows of; what a function in a file does is its own affair."""
    return not known_weights(request) and not is_function(request.model)


def check_statistics(request: Request, synaptic: Synaptic) -> None:
    """Refuse what reads images where there are none."""
    if synaptic.statistics == DATA and request.data is None and request.photos is None:
        raise InputError("--statistics data reads images: say where they are with --data.")


def prepare(request: Request, progress: Progress) -> Job:
    """Build the model, load the weights and open the data."""
    model = build(request)
    if is_function(request.model) and not known_weights(request):
        banner(
            "Weights of the function",
            "No --weights were given, so the model has the weights that its function gave it. If those are random, the "
            "result is of no use: give the trained model's weights with --weights FILE.",
        )
    if random_weights(request):
        yolo = request.model.startswith("yolo:")
        trained = "Name the trained file: yolo:best.pt" if yolo else "Give the trained ones: --weights FILE"
        banner(
            "Random weights",
            "The model has random weights: sizes and times mean something, which channels are kept does not, and the "
            f"result is of no use. {trained}.",
        )
    return with_data(request, model)


def build(request: Request) -> nn.Module:
    """The model with its weights, on its device."""
    check_photos(request)
    device = device_named(request.device)
    torch.manual_seed(request.seed)
    return build_model(request.model, request.weights, by_order=request.weights_by_order).to(device)


def with_data(request: Request, model: nn.Module) -> Job:
    """The model with an input for it, and the data if any is asked for."""
    preprocess = preprocess_of(input_of(request.model, model), request)
    data = None
    if request.data is not None:
        data = open_data(
            request.data,
            preprocess,
            calibration_size=_taken_of_data(request),
            evaluation_size=request.images,
            seed=request.seed,
        )
    device = device_named(request.device)
    example = random_inputs(1, preprocess.size, request.seed)
    return Job(request.model, model, example.to(device), preprocess, data, device)


def check_photos(request: Request) -> None:
    """Refuse a folder that is not there."""
    if request.photos is not None and not request.photos.is_dir():
        place = f"{str(request.photos)!r}"
        found = f"{place} is a file" if request.photos.exists() else f"there is no folder {place}"
        raise InputError(f"--calibration is data, synthetic, or a folder of images; {found}.")


@contextlib.contextmanager
def input_size_named(request: Request) -> Iterator[None]:
    """Where a model does not run and nobody has said how large its inputs are, say how to."""
    try:
        yield
    except ModelError as error:
        if request.input_size is not None or "does not run" not in str(error):
            raise
        raise ModelError(
            f"{error}. If its inputs are of another size, say so: --input-size 3x224x224 (channels x height x width), "
            "1x64 (channels x length)"
        ) from error


def preprocess_of(default: Preprocess, request: Source | Rebuilt) -> Preprocess:
    """Apply --input-size, --mean and --std."""
    changes: dict[str, Any] = {}
    if request.input_size is not None:
        size = read_size(request.input_size)
        changes["size"] = size
        if size[1:] != default.size[1:]:
            changes["crop"] = 1.0  # a size that the model's own crop was not made for: use the whole image
        if size[0] != len(default.mean):
            changes |= {"mean": (0.0,) * size[0], "std": (1.0,) * size[0]}
    for name, text in (("mean", request.mean), ("std", request.std)):
        if text is not None:
            changes[name] = _numbers(name, text, changes.get("size", default.size)[0])
    return dataclasses.replace(default, **changes)


def read_size(text: str) -> tuple[int, ...]:
    """Read `CxHxW`, or `CxL`, or `CxDxHxW`."""
    parts = text.lower().replace(",", "x").split("x")
    if not 2 <= len(parts) <= 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(
            f"--input-size is channels x height x width, as in 3x224x224 (or channels x length, as in 1x64; or "
            f"channels x depth x height x width), not {text!r}."
        )
    return tuple(map(int, parts))


def _numbers(name: str, text: str, channels: int) -> tuple[float, ...]:
    wanted = f"--{name} is one number per channel ({channels}), as in 0.5,0.5,0.5, not {text!r}."
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(wanted) from error
    if len(numbers) != channels or not all(map(math.isfinite, numbers)):
        raise InputError(wanted)
    if name == "std" and min(numbers) <= 0:
        raise InputError(f"--std divides the images: its numbers are positive, not {text!r}.")
    return numbers


def device_named(name: str | None) -> torch.device:
    """The device of that name; a GPU, if there is one, by default.

    Raises:
        InputError: This machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).split("\n")[0]
        raise InputError(f"no device {name!r} here ({first}). Use --device cpu.") from error
    return device


def _taken_of_data(request: Request) -> int:
    """How many images of the data are calibrated on: none where all come from elsewhere, so that none are held out."""
    if request.calibration in (None, DATA):
        return request.calibration_images or _CALIBRATION_IMAGES
    return 0


def calibration_images(
    request: Request, repair: Compensation, job: Job, progress: Progress
) -> tuple[list[Tensor] | Tensor | None, dict[str, str]]:
    """Unlabelled images, if there are any or an option needs some, and what to say of them in the report."""
    said = {} if request.calibration is None else {"calibration": request.calibration}
    if request.calibration == SYNTHETIC:
        from ss_pruning.compensation.synthetic_data import synthetic_images

        wanted = SyntheticImages(request.calibration_images, seed=request.seed)
        with shown_as("synthesizing calibration images", progress):
            return synthetic_images(job.model, job.example, wanted), said
    if request.photos is not None:
        images, which = _photos_of(request.photos, request, job)
        return images, {**said, "calibration images": which}
    if not repair.solves and request.calibration is None and job.data is None:
        return None, said
    if job.data is None:
        needed_by = f"--compensation {repair.method}" if repair.solves else "--calibration data"
        without = "; --compensation mean does without" if repair.solves else ""
        raise InputError(
            f"{needed_by} calibrates on images: say where they are with --data, or --calibration DIR, or make some "
            f"with --calibration synthetic{without}."
        )
    return _pictures(job.data, job), {**said, "calibration images": _which(job.data)}


def _photos_of(folder: Path, request: Request, job: Job) -> tuple[list[Tensor], str]:
    """The images of a folder without labels, and which of them they are."""
    evaluated = frozenset() if job.data is None else job.data.evaluated_files()
    size = request.calibration_images or _CALIBRATION_IMAGES
    found = open_photos(folder, job.preprocess, size=size, seed=request.seed, evaluated=evaluated)
    which = f"{found.used:,} of {found.found:,} images below {folder}"
    if found.evaluated:
        which += f"; {found.evaluated:,} more are evaluated on, and not calibrated on"
        note(f"Calibration images: {which}.")
    return [images.to(job.device) for images in batches(found.images)], which


def _which(data: Data) -> str:
    """Which images of the data are calibrated on; said aloud where they are taken from those to be evaluated on."""
    count = len(data.calibration.dataset)  # type: ignore[arg-type]
    if not data.held_out:
        return f"{count:,} training images of {data.name}"
    which = f"{count:,} images of {data.name}, held out: it has no split into train/ and val/, and accuracy is measured"
    which += " on the others"
    note(f"Calibration images: {which}.")
    return which


def strengths_of(job: Job, statistics: str) -> Strengths:
    """Return the strength of every synapse of the model."""
    from ss_pruning import synaptic_strength

    source: Any = statistics
    if statistics == DATA and job.data is not None:
        source = _pictures(job.data, job)
    strengths: Strengths = synaptic_strength(job.model, job.example, statistics=source)
    return strengths


def _pictures(data: Data, job: Job) -> list[Tensor]:
    return [images.to(job.device) for images in data.calibration_images()]


def _timed_on(job: Job, batch: int) -> Tensor:
    """Random images, so many at a time, to time the model on."""
    return random_inputs(batch, job.preprocess.size).to(job.device)


def run(job: Job, options: dict[str, Any], batch: int, progress: Progress) -> Report:
    """Measure, prune in place, measure again."""
    from ss_pruning import prune_

    size, dense = _tensor_bytes(job.model), copied(job.model)
    before = accuracy_of("accuracy, dense", job.model, job, progress)
    _note_classes(job)

    stage = partial(_stage, progress, list[int]())
    timed_on = _timed_on(job, batch)
    options["allocation"] = dataclasses.replace(options["allocation"], latency_inputs=timed_on)
    report: Report = prune_(job.model, job.example, progress=stage, **options)
    report.settings.update({"ignore": options["ignore"], "batch": batch, "timed on": _place(job.device)})
    times = {} if report.latency_before is not None else _times(dense, job.model, timed_on, progress)
    after = accuracy_of("accuracy, pruned", job.model, job, progress)
    return dataclasses.replace(
        report,
        model=job.spec,
        accuracy_before=before,
        accuracy_after=after,
        images=None if job.data is None else len(job.data.evaluation.dataset),  # type: ignore[arg-type]
        bytes_before=size,
        bytes_after=_tensor_bytes(job.model),
        **times,
    )


def _stage(progress: Progress, told: list[int], name: str, done: int, total: int) -> None:
    """Show how far pruning is; what it is expected to take is said once, where it is worth saying."""
    if not told and total >= 1000 * _WORTH_SAYING:
        told.append(total)
        note(f"Pruning takes {time_in_words(total / 1000)}.")
    progress(f"{PRUNING}: {name}", done, total)


def _times(dense: nn.Module, pruned: nn.Module, inputs: Tensor, progress: Progress) -> dict[str, Any]:
    """Fewer multiply-accumulates need not mean less time: whoever prunes sees both."""
    progress("time, dense and pruned", 0, 1)
    timings = measure_latency([dense, pruned], inputs, precision=0.01, rounds=(5, 25), seconds=5)
    progress("time, dense and pruned", 1, 1)
    return as_reported(*timings)


def _place(device: torch.device) -> str:
    found = machine(device)
    threads = "" if found["threads"] == "-" else f", threads: {found['threads']}"
    return f"{found['name']}{threads}"


def accuracy_of(name: str, model: nn.Module, job: Job, progress: Progress) -> float | None:
    """Of the images that were named with labels, shown under a name while it is measured; None without any."""
    if job.data is None:
        return None
    with shown_as(name, progress):
        return accuracy(model, job.data.evaluation)


def _note_classes(job: Job) -> None:
    """Warn where the accuracy may mean nothing: a label is only an index into the model's outputs."""
    if job.data is None:
        return
    with torch.inference_mode():
        outputs = job.model(job.example).shape[1]
    if outputs > job.data.classes:
        note(
            f"The model has {outputs} outputs, the data {job.data.classes} classes: accuracy only means "
            "something if these are the model's first classes, in this order."
        )


def _tensor_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def settings_of(request: Request, importance: str, job: Job) -> dict[str, Any]:
    """Return what the command adds to the settings that the pruning itself records."""
    return {
        "model": request.model,
        "weights": request.weights,
        "data": request.data,
        "importance": importance,
        "input size": "x".join(map(str, job.preprocess.size)),
        "seed": request.seed,
        "device": str(job.device),
    }


def packed(job: Job, report: Report, dense: str | None) -> bytes:
    """The pruned model's file, which keeps the dense weights' checksum; the report notes its own."""
    from ss_pruning.io import checkpoint as files

    content, report.model_sha256 = files.packed(job.model, portable_name(job.spec, job.model), dense)
    return content


def write(content: bytes, report: Report, out: Path) -> None:
    """Write the pruned model and the report in its two forms, together."""
    contents = content, report.to_json().encode(), report.to_html().encode()
    write_together({out / name: each for name, each in zip(WRITTEN, contents, strict=True)})
