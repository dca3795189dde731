"""What `ss-prune recover`, `ss-prune export` and `ss-prune bench` do with a file that `ss-prune prune` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ss_pruning.cli import bench as benching
from ss_pruning.cli import jobs
from ss_pruning.cli.console import ProgressCallback, not_interrupted
from ss_pruning.cli.jobs import size_of
from ss_pruning.cli.request import Recovering, Request
from ss_pruning.config import NoCompensation, Recovery
from ss_pruning.errors import InputError
from ss_pruning.io.checkpoint import architecture_of, load, save
from ss_pruning.profiling.latency import machine
from ss_pruning.recovery.recover import recover_
from ss_pruning.recovery.report import RecoveryReport
from ss_pruning.report.formatting import percent
from ss_pruning.sources.accuracy import accuracy
from ss_pruning.sources.architecture_names import build_named
from ss_pruning.sources.models import build_model, input_of


class Opened(NamedTuple):
    """A file's two models, and the size of one image for them."""

    dense: nn.Module
    pruned: nn.Module
    size: tuple[int, ...]


def open_file(file: Path, spec: str | None, input_size: str | None) -> Opened:
    """Rebuild the pruned model, and the dense one with random weights (which cost the same time).

    Args:
        file: What `save` wrote.
        spec: The dense architecture, where the file does not name it.
        input_size: As in `3x224x224`; the model's own by default.
    """
    known = spec or architecture_of(file)
    if known is None:
        raise InputError(
            f"{str(file)!r} does not name its architecture: say what was pruned, as in --model net.py:build."
        )
    # What the user says is built as it is; of what the file says, only what is safe.
    build = partial(build_model, spec) if spec else partial(build_named, known, file)
    dense = build()
    size = size_of(input_size) if input_size else input_of(known, dense).size
    return Opened(dense, load(file, build, torch.zeros(1, *size)), size)


def bench(
    opened: Opened, wanted: Sequence[benching.Setting], device: torch.device, progress: ProgressCallback
) -> tuple[list[benching.Comparison], dict[str, int]]:
    """Compare the two models in each setting, and their files."""
    models = {"dense": opened.dense, "pruned": opened.pruned}
    found = []
    for done, setting in enumerate(wanted):
        progress(f"timing: {setting}", done, len(wanted))
        found.append(benching.compare(models, opened.size, setting, device))
    return found, {name: benching.file_bytes(model) for name, model in models.items()}


def as_json(comparisons: Sequence[benching.Comparison], sizes: dict[str, int], device: torch.device) -> str:
    """What was measured, as JSON text."""
    content = {
        "machine": machine(device),
        "file_bytes": sizes,
        "comparisons": [comparison.to_dict() for comparison in comparisons],
    }
    return json.dumps(content, indent=2) + "\n"


def recover(
    wanted: Recovering, request: Request, training: Recovery, progress: ProgressCallback
) -> tuple[RecoveryReport, dict[str, Any]]:
    """Recover and write; what was done, and what more there is to say."""
    # Of what the file names only plain options are followed: `load` builds it first.
    named = architecture_of(wanted.file)
    pruned = load(wanted.file, None if request.model == named else lambda: build_model(request.model))
    job = jobs.prepare(request, progress)
    pruned.to(job.device)
    pictures, facts = jobs.calibration_images(request, NoCompensation(), job, progress)
    facts |= _accuracy("accuracy before", pruned, job, progress)
    report = recover_(
        pruned,
        job.model,
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
        raise KeyboardInterrupt
    facts |= _accuracy("accuracy after", pruned, job, progress)
    save(pruned, wanted.target, named)
    return report, {**facts, "written": str(wanted.target)}


def _accuracy(name: str, model: nn.Module, job: jobs.Job, progress: ProgressCallback) -> dict[str, str]:
    """Of the images that were named with labels, if there are any."""
    if job.data is None:
        return {}
    right = accuracy(model, job.data.evaluation, lambda _, done, total: progress(name, done, total))
    return {name: percent(right, 2)}
