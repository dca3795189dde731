"""`ss-prune recover`: train a pruned file, without labels, to do what the dense model did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ss_pruning import config
from ss_pruning.cli import options as option
from ss_pruning.cli.console import not_interrupted, progress_bars
from ss_pruning.cli.request import PrunedFile, Request

if TYPE_CHECKING:
    from torch import nn

    from ss_pruning.recovery.report import RecoveryReport


def _option(help_text: str, metavar: str, default: str | bool = False) -> Any:
    return typer.Option(help=help_text, metavar=metavar, show_default=default, rich_help_panel="Training")


@dataclass(frozen=True)
class Wanted(PrunedFile):
    """What is recovered, on which images, for how long, and where it goes."""

    weights: option.Weights = None
    data: option.DataPlace = None
    images: option.Images = None
    calibration: option.CalibrationOption = None
    calibration_images: option.CalibrationImages = None
    mean: option.Mean = None
    std: option.Std = None
    device: option.Device = None
    minutes: Annotated[float | None, _option("Train so long.", "M", "5, unless --steps is given")] = None
    steps: Annotated[int | None, _option("Train so many steps: the same result each time.", "N")] = None
    checkpoint: Annotated[
        Path | None, _option("Keep the training there; the same command goes on from it.", "FILE")
    ] = None
    out: Annotated[Path | None, _option("File to write.", "FILE", "recovered.safetensors beside FILE")] = None

    @property
    def target(self) -> Path:
        """The file to write."""
        return self.out or self.file.with_name("recovered.safetensors")

    def request(self, seed: int) -> Request:
        """The dense model and the images, as the user says, or else the file and the report beside it.

        Raises:
            InputError: Nobody says where images are, or what the architecture or the weights.
        """
        from ss_pruning.cli.jobs import random_weights
        from ss_pruning.errors import FileFormatError, InputError
        from ss_pruning.io.checkpoint import architecture_of, open_report

        if self.calibration is None and self.data is None:
            raise InputError(
                "recover trains on images without labels: say where they are with --calibration DIR or --data, or make "
                "some with --calibration synthetic"
            )
        spec, known = self.model or architecture_of(self.file), dict[str, Any]()
        if spec is None:
            raise InputError(
                f"{str(self.file)!r} does not name its architecture: say what was pruned, as in --model net.py:build."
            )
        try:
            report = open_report(self.file.parent)
            known = report.settings if report.model == spec else known
        except (FileFormatError, InputError):
            pass  # a file on its own
        request = Request(
            model=spec,
            weights=self.weights or known.get("weights"),
            data=self.data,
            input_size=self.input_size or known.get("input size"),
            mean=self.mean,
            std=self.std,
            seed=seed,
            device=self.device,
            images=self.images,
            calibration=self.calibration,
            calibration_images=self.calibration_images,
        )
        if random_weights(request):
            raise InputError(
                "the dense model's weights are what is imitated, and no report beside the file says where they are: "
                "give --weights"
            )
        return request


def recover(wanted: Wanted, training: config.Recovery, results: TextIO, as_json: option.Json = False) -> None:
    """Recover a pruned model, report, and write the result."""
    from ss_pruning._utils.files import check_apart, check_writable

    check_writable(wanted.target)
    request = wanted.request(training.seed)
    check_apart(wanted.target, wanted.file, request.weights, wanted.checkpoint)
    with progress_bars() as progress:
        report, facts = _recovered(wanted, request, training, progress)
    if as_json:
        typer.echo(json.dumps({**asdict(report), **facts}, indent=2), file=results)
        return
    typer.echo(str(report), file=results)
    for name, value in facts.items():
        typer.echo(f"{name}: {value}", file=results)


def _recovered(
    wanted: Wanted, request: Request, training: config.Recovery, progress: Any
) -> tuple[RecoveryReport, dict[str, Any]]:
    """Recover and write; what was done, and what more there is to say."""
    from ss_pruning import load, recover_, save
    from ss_pruning.cli import jobs
    from ss_pruning.io.checkpoint import architecture_of
    from ss_pruning.sources.models import build_model

    # Of what the file names only plain options are followed: `load` builds it first.
    named = architecture_of(wanted.file)
    pruned = load(wanted.file, None if request.model == named else lambda: build_model(request.model))
    job = jobs.prepare(request, progress)
    pruned.to(job.device)
    pictures, facts = jobs.calibration_images(request, config.NoCompensation(), job, progress)
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


def _accuracy(name: str, model: nn.Module, job: Any, progress: Any) -> dict[str, str]:
    """Of the images that were named with labels, if there are any."""
    from ss_pruning.report.formatting import percent
    from ss_pruning.sources.accuracy import accuracy

    if job.data is None:
        return {}
    right = accuracy(model, job.data.evaluation, lambda _, done, total: progress(name, done, total))
    return {name: percent(right, 2)}
