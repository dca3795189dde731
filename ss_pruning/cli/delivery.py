"""What `ss-prune recover` and `ss-prune export` do with a file that `ss-prune prune` wrote."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ss_pruning._utils.arrays import random_inputs
from ss_pruning._utils.files import check_apart
from ss_pruning._utils.progress import Progress
from ss_pruning.cli import jobs
from ss_pruning.cli.console import not_interrupted, note
from ss_pruning.cli.request import Calibrated, Exporting, Rebuilt, Recovering, Request
from ss_pruning.config import NoCompensation
from ss_pruning.errors import FileFormatError, InputError
from ss_pruning.io import export as exporting
from ss_pruning.io.checkpoint import architecture_of, load, open_report, save
from ss_pruning.io.dense import check_dense
from ss_pruning.io.int8 import export_int8
from ss_pruning.io.writers import WRITERS
from ss_pruning.profiling.runtimes import RUNTIMES
from ss_pruning.recovery.recover import recover_
from ss_pruning.recovery.report import RecoveryReport
from ss_pruning.recovery.settings import Recovery
from ss_pruning.report.formatting import percent
from ss_pruning.sources.architecture_names import build_named, without_weights
from ss_pruning.sources.models import build_model, input_of
from ss_pruning.sources.preprocessing import Preprocess


class Opened(NamedTuple):
    """A file's two models, and how images become their inputs."""

    spec: str
    dense: nn.Module
    pruned: nn.Module
    preprocess: Preprocess


def open_file(file: Path, wanted: Rebuilt) -> Opened:
    """Rebuild the pruned model, and the dense one with random weights (which cost the same time)."""
    known = _named(file, wanted)
    # What the user says is built as it is; of what the file says, only what is safe.
    build = partial(build_model, wanted.model) if wanted.model else partial(build_named, known, file)
    dense = build()
    usual = input_of(known, dense)
    preprocess = jobs.preprocess_of(usual, wanted)
    if wanted.input_size is None and (size := _settings_beside(file, known).get("input size")):
        preprocess = jobs.preprocess_of(usual, replace(wanted, input_size=size))
        if preprocess.size != usual.size:
            note(f"Input size: {size}, as the report beside the file says.")
    return Opened(known, dense, load(file, build, torch.zeros(1, *preprocess.size)), preprocess)


def _settings_beside(file: Path, spec: str) -> dict[str, Any]:
    """What the report beside a file says that it was pruned with, if it is of that model."""
    try:
        report = open_report(file.parent)
    except (FileFormatError, InputError):
        return {}  # a file on its own
    return report.settings if report.model == spec else {}


def _named(file: Path, wanted: Rebuilt) -> str:
    """What was pruned, as the user says, or else the file."""
    spec = wanted.model or architecture_of(file)
    if spec is None:
        raise InputError(
            f"{str(file)!r} does not name its architecture: say what was pruned, as in --model net.py:build."
        )
    return spec


def request_of(wanted: Recovering, seed: int) -> Request:
    """The dense model and the images, as the user says, or else the file and the report beside it."""
    if wanted.calibration is None and wanted.data is None:
        raise InputError(
            "recover trains on images without labels: say where they are with --calibration DIR or --data, or make "
            "some with --calibration synthetic"
        )
    spec = _named(wanted.file, wanted)
    known = _settings_beside(wanted.file, spec)
    own = {field.name: getattr(wanted, field.name) for field in fields(Calibrated)}
    own["input_size"] = wanted.input_size or known.get("input size")
    model, weights = wanted.model or without_weights(spec, wanted.file), wanted.weights
    if weights is None and (said := known.get("weights")):
        note(f"Dense weights: {said}, as the report beside the file says.")
        weights = said
    return Request(model=model, weights=weights, seed=seed, **own)


def export(wanted: Exporting, progress: Progress) -> str:
    """Write a model for other runtimes; what there is to say of it.

    Raises:
        InputError: The file is one of another runtime already.
    """
    if wanted.file.suffix in RUNTIMES:
        raise InputError(
            f"'{wanted.file}' is exported already: give the .safetensors file it was made from. In eight bits a file "
            "in ONNX can be written in Python: ss_pruning.export_int8('float.onnx', 'int8.onnx', images)"
        )
    target = _target(wanted)
    check_apart(target, wanted.file, wanted.weights)
    request = Request(
        model=str(wanted.file), calibration=wanted.calibration, calibration_images=wanted.calibration_images
    )
    jobs.check_photos(request)
    spec, model, preprocess = _to_export(wanted)
    example = random_inputs(1, preprocess.size)
    if not wanted.int8:
        written = exporting.export(model, target, example, wanted.format)  # type: ignore[arg-type]
        return (
            f"{written.path} ({written.bytes / 1e6:.1f} MB); its outputs differ from the model's by at most "
            f"{written.max_error:.1e} of the largest"
        )
    job = jobs.Job(spec, model, example, preprocess, None, example.device)
    images, _ = jobs.calibration_images(request, NoCompensation(), job, progress)
    return str(export_int8(model, target, images, wanted.format))  # type: ignore[arg-type]


def _to_export(wanted: Exporting) -> tuple[str, nn.Module, Preprocess]:
    if wanted.is_pruned:
        opened = open_file(wanted.file, wanted)
        return opened.spec, opened.pruned, opened.preprocess
    spec = str(wanted.file)
    model = build_model(spec, wanted.weights)
    return spec, model, jobs.preprocess_of(input_of(spec, model), wanted)


def recover(
    wanted: Recovering, request: Request, training: Recovery, progress: Progress
) -> tuple[RecoveryReport, dict[str, Any]]:
    """Recover and write; what was done, and what more there is to say."""
    pruned = load(wanted.file, None if wanted.model is None else lambda: build_model(request.model))
    dense = jobs.build(request)
    check_dense(dense, wanted.file, known=jobs.known_weights(request))
    job = jobs.with_data(request, dense)
    pruned.to(job.device)
    pictures, facts = jobs.calibration_images(request, NoCompensation(), job, progress)
    facts |= _accuracy("accuracy before", pruned, job, progress)
    report = recover_(
        pruned,
        dense,
        pictures,
        example_inputs=job.example,
        steps=wanted.steps,
        minutes=5.0 if wanted.minutes is None and wanted.steps is None else wanted.minutes,
        settings=training,
        checkpoint=wanted.checkpoint,
        progress=lambda _, done, total: progress("recovering", done, total),
    )
    not_interrupted()
    if report.stopped == "interrupted":
        lost = "What was trained is not kept: with --checkpoint FILE it is, and the same command goes on from there."
        note(f"The same command goes on from {wanted.checkpoint}." if wanted.checkpoint else lost)
        raise KeyboardInterrupt
    facts |= _accuracy("accuracy after", pruned, job, progress)
    save(pruned, wanted.target, architecture_of(wanted.file), dense)
    return report, {**facts, "written": str(wanted.target)}


def _accuracy(name: str, model: nn.Module, job: jobs.Job, progress: Progress) -> dict[str, str]:
    """Of the images that were named with labels, if there are any."""
    right = jobs.accuracy_of(name, model, job, progress)
    return {} if right is None else {name: percent(right, 2)}


def _target(wanted: Exporting) -> Path:
    """The file to write."""
    if wanted.int8 and wanted.format not in (None, "onnx", "pt2"):
        raise InputError("--int8 writes onnx, which OpenVINO reads as well, or pt2: say one of these.")
    if wanted.int8 and wanted.calibration is None:
        raise InputError(
            "--int8 takes the ranges of activations from images without labels: say where they are with "
            "--calibration DIR, or make some with --calibration synthetic."
        )
    if not wanted.int8 and wanted.calibration is not None:
        raise InputError("--calibration belongs to --int8: give both, or none.")
    if wanted.weights is not None and wanted.is_pruned:
        raise InputError(f"{str(wanted.file)!r} holds its own weights: leave --weights out.")
    if wanted.out is not None:
        return wanted.out
    if not wanted.int8 and wanted.format not in WRITERS:
        raise InputError(
            "say what to write: --format onnx, --format openvino, --format pt2, or --out with such an ending."
        )
    if not wanted.is_pruned:
        raise InputError("say where to write: --out FILE.")
    ending = WRITERS[wanted.format or "onnx"].endings[0]  # type: ignore[index]
    return wanted.file.with_suffix(f".int8{ending}" if wanted.int8 else ending)
