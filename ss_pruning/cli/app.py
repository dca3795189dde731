"""The command line: `ss-prune prune`, `score`, `export`, `bench`, `compare` and `doctor`."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import typer

from ss_pruning import config
from ss_pruning.cli import options as option
from ss_pruning.cli.choices import SYNAPTIC, Compensation, Request, Score, StatisticsSource
from ss_pruning.cli.console import FAILED, guarded, not_interrupted, progress_bars

if TYPE_CHECKING:
    from ss_pruning.report.records import Report

app = typer.Typer(
    name="ss-prune",
    help="Prune convolutional networks by synaptic strength.",
    epilog=option.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MOST_LINES = 8


@app.command(help=option.PRUNE_HELP, epilog=option.PRUNE_EXAMPLES)
def prune(
    context: typer.Context,
    model: option.Model,
    macs: option.Macs = None,
    params: option.Params = None,
    ratio: option.Ratio = None,
    latency: option.Latency = None,
    weights: option.Weights = None,
    weights_by_order: option.ByOrder = False,
    data: option.DataPlace = None,
    images: option.Images = None,
    input_size: option.InputSize = None,
    mean: option.Mean = None,
    std: option.Std = None,
    batch: option.Batch = 1,
    importance: option.Criterion = SYNAPTIC,
    statistics: option.Statistics = None,
    score: option.ScoreOption = None,
    scope: option.ScopeOption = None,
    max_ratio: option.MaxRatio = 0.9,
    cost_exponent: option.CostExponent = None,
    round_to: option.RoundTo = None,
    compensation: option.CompensationOption = Compensation.none,
    calibration: option.CalibrationOption = None,
    calibration_images: option.CalibrationImages = None,
    recalibrate: option.Recalibrate = None,
    ignore: option.Ignore = None,
    out: option.OutFolder = None,
    seed: option.Seed = 0,
    device: option.Device = None,
    as_json: option.Json = False,
) -> None:
    """Prune a model to a budget, report, and write the result."""
    with guarded() as results:
        budget = _budget(macs=macs, params=params, ratio=ratio, latency=latency)
        _check_synaptic_options(importance, statistics, score)
        needed_by = _needs_images(compensation)
        request = Request.of(context.params)
        options = {
            **budget,
            "ignore": tuple(ignore or ()),
            "compensation": _compensation(compensation, recalibrate),
            "allocation": config.Allocation(
                None if scope is None else scope.value, max_ratio, _multiple(round_to), cost_exponent
            ),
        }
        with _output_folder(out, weights):
            with progress_bars() as progress:
                from ss_pruning.cli import jobs as _job

                job = _job.prepare(request, progress)
                with _job.input_size_named(request):
                    pictures, calibrated_on = _job.calibration_images(request, needed_by, job, progress)
                    options |= {
                        "importance": _job.make_importance(importance, score, request),
                        "calibration": pictures,
                    }
                    report = _job.run(job, options, batch, progress)
                report.settings.update(_job.settings_of(request, importance, job), **calibrated_on)
                report.command = _command_line(context)
                report.random_weights = _job.random_weights(request)
                report.file = None if out is None else str(out / _job.WRITTEN[0])
                content = b"" if out is None else _job.packed(job, report)
            with _written_after(out, lambda folder: _job.write(content, report, folder)):
                _show(report, as_json, results)
            if out is not None and not as_json:
                _print(f"written: model.safetensors, report.json and report.html in {out}", file=results)
                _show_next_steps(report, results)


@app.command(help=option.SCORE_HELP, epilog=option.SCORE_EXAMPLES)
def score(
    context: typer.Context,
    model: option.Model,
    weights: option.Weights = None,
    weights_by_order: option.ByOrder = False,
    data: option.DataPlace = None,
    input_size: option.InputSize = None,
    mean: option.Mean = None,
    std: option.Std = None,
    statistics: option.Statistics = StatisticsSource.batchnorm,
    weakest: option.Weakest = 10,
    out: option.OutFile = None,
    seed: option.Seed = 0,
    device: option.Device = None,
    as_json: option.Json = False,
) -> None:
    """Summarise the strengths of a model, and write them."""
    with guarded() as results:
        from ss_pruning._utils.files import check_apart
        from ss_pruning.cli import jobs as _job
        from ss_pruning.report import strength_summary as scores

        if out is not None:
            scores.check_target(out)
            check_apart(out, weights)
        request = Request.of(context.params)
        with progress_bars() as progress:
            job = _job.prepare(request, progress)
            with _job.input_size_named(request):
                strengths = _job.strengths_of(request, job)
        summary = scores.summarise(strengths, job.model, weakest)
        facts = {"model": model, "statistics": (statistics or StatisticsSource.batchnorm).value}
        with _written_after(out, lambda path: scores.write(path, strengths, summary, facts)):
            scores.show(summary, facts, as_json, results)


@app.command(help=option.EXPORT_HELP, epilog=option.EXPORT_EXAMPLES)
def export(
    file: option.File,
    format: option.ExportFormat = None,  # noqa: A002 - the option's name
    out: option.ExportOut = None,
    model: option.Architecture = None,
    input_size: option.InputSize = None,
) -> None:
    """Write a pruned model for another runtime, and say how far the file is from the model."""
    with guarded():
        from ss_pruning._utils.files import check_apart
        from ss_pruning.cli import delivery as _delivery
        from ss_pruning.errors import InputError
        from ss_pruning.io import export as exporting
        from ss_pruning.sources.preprocessing import random_inputs

        if out is None and format not in ("onnx", "pt2"):
            raise InputError("say what to write: --format onnx, --format pt2, or --out with such an ending.")
        target = out or file.with_suffix(f".{format}")
        check_apart(target, file)
        opened = _delivery.open_file(file, model, input_size)
        example = random_inputs(1, opened.size)
        written = exporting.export(opened.pruned, target, example, format)  # type: ignore[arg-type]
    typer.echo(
        f"written: {written.path} ({written.bytes / 1e6:.1f} MB); its outputs differ from the model's by at most "
        f"{written.max_error:.1e} of the largest"
    )


@app.command(help=option.BENCH_HELP, epilog=option.BENCH_EXAMPLES)
def bench(
    file: option.File,
    batch: option.Batches = "1",
    dtype: option.Dtypes = "float32",
    layout: option.Layouts = "contiguous",
    compiled: option.Compiled = False,
    model: option.Architecture = None,
    input_size: option.InputSize = None,
    threads: option.Threads = None,
    device: option.Device = None,
    as_json: option.Json = False,
) -> None:
    """Measure dense against pruned."""
    with guarded(), progress_bars() as progress:
        import torch

        from ss_pruning.cli import bench as benching
        from ss_pruning.cli import delivery as _delivery
        from ss_pruning.cli import jobs as _job

        if threads is not None:
            torch.set_num_threads(threads)
        wanted = benching.settings(
            _counts(batch), dtype.split(","), layout.split(","), (False, True) if compiled else (False,)
        )
        place = _job.device_of(device)
        opened = _delivery.open_file(file, model, input_size)
        comparisons, sizes = _delivery.bench(opened, wanted, place, progress)
    if as_json:
        typer.echo(_delivery.as_json(comparisons, sizes, place), nl=False)
        return
    from rich.console import Console

    Console().print(benching.table(comparisons, sizes, place))


def _counts(text: str) -> list[int]:
    from ss_pruning.errors import InputError

    if not all(part.strip().isdigit() for part in text.split(",")):
        raise InputError(f"--batch is one or several whole numbers, as in 1,32,256, not {text!r}.")
    return [int(part) for part in text.split(",")]


@app.command(help=option.COMPARE_HELP, epilog=option.COMPARE_EXAMPLES)
def compare(
    a: option.FirstReport,
    b: option.SecondReport,
    html: option.HtmlFile = None,
    as_json: option.Json = False,
) -> None:
    """Put two reports side by side."""
    with guarded() as results:
        from ss_pruning._utils.files import check_apart, check_writable, write_text
        from ss_pruning.io.checkpoint import open_report, report_file
        from ss_pruning.report import comparison

        if html is not None:
            check_writable(html)
            check_apart(html, *map(report_file, (a, b)))
        first, second = open_report(a), open_report(b)
        found = comparison.compare(first, second, str(a), str(b))
        with _written_after(html, lambda path: write_text(path, found.to_html(first, second))):
            if as_json:
                typer.echo(found.to_json(), file=results, nl=False)
            else:
                _print(found.table(), *found.notes, file=results)
        if html is not None and not as_json:
            _print(f"written: {html}", file=results)


@app.command(help=option.DOCTOR_HELP)
def doctor(as_json: option.Json = False) -> None:
    """Say what is installed and what could be."""
    with guarded():
        from ss_pruning.cli import doctor as checks

        found = checks.examine()
    if as_json:
        typer.echo(found.to_json(), nl=False)
    else:
        _print(*found.tables(), *found.hints())
    if not found.is_well:
        raise typer.Exit(FAILED)


def _print(*entries: Any, file: TextIO | None = None) -> None:
    """Print tables, and texts as they are, on stdout."""
    from rich.console import Console

    console = Console(file=file)
    for entry in entries:
        console.print(entry, markup=False)


def _budget(**given: float | None) -> dict[str, float]:
    from ss_pruning.errors import InputError

    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        listed = " and ".join(f"--{name}" for name in chosen) or "none"
        raise InputError(
            f"give exactly one of --macs, --params, --latency and --ratio; {listed} was given. "
            "For example, --macs 0.8 keeps 80 % of the multiply-accumulates."
        )
    return chosen


def _compensation(choice: Compensation, recalibrate: bool | None) -> config.Compensation:
    kind = config.COMPENSATIONS[choice.value]
    return kind() if recalibrate is None else kind(recalibrate=recalibrate)


def _multiple(text: str | None) -> int | Literal["measured"] | None:
    from ss_pruning.errors import InputError

    if text is None or text == "measured":
        return None if text is None else "measured"
    if not text.isdigit():
        raise InputError(f"--round-to is a whole number, such as 8, or measured, not {text!r}.")
    return int(text)


def _check_synaptic_options(
    importance: str, statistics: StatisticsSource | None, score: Score | None
) -> None:
    from ss_pruning.errors import InputError

    given = {"--statistics": statistics is not None, "--score": score is not None}
    for name in (name for name, is_given in given.items() if is_given):
        if importance != SYNAPTIC:
            raise InputError(f"{name} belongs to --importance synaptic, not to {importance}.")


def _needs_images(compensation: Compensation) -> str | None:
    """The option that cannot do without calibration images, if there is one."""
    if compensation in (Compensation.linear, Compensation.reconstruct):
        return f"--compensation {compensation.value}"
    return None


@contextlib.contextmanager
def _written_after(out: Path | None, write: Callable[[Path], None]) -> Iterator[None]:
    """Print in the block, and write then: a full disk does not cost what is shown, nor a closed pipe the files."""
    not_interrupted()
    try:
        yield
    finally:
        if out is not None:
            write(out)


@contextlib.contextmanager
def _output_folder(out: Path | None, weights: str | None) -> Iterator[None]:
    """Prove before the work that `out` can be written; leave no empty folder behind when the work fails."""
    from ss_pruning._utils.files import check_apart, check_writable, make_writable_folder

    if out is None:
        yield
        return
    from ss_pruning.cli.jobs import WRITTEN

    is_new = not os.path.exists(out)
    make_writable_folder(out)
    for name in WRITTEN:
        check_writable(out / name)
        check_apart(out / name, weights)
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()  # only if empty
        raise


def _command_line(context: typer.Context) -> str:
    """Write the command as it can be run again: what was given, not what was defaulted."""
    words = ["ss-prune", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif value is True:
            words.append(parameter.opts[0])
        else:
            for entry in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(entry.value if isinstance(entry, Enum) else entry)]
    return shlex.join(words)


def _show(report: Report, as_json: bool, results: TextIO) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(report.to_json(), file=results, nl=False)
        return
    console = Console(file=results)
    console.print(report.table())
    for sentence in _about_time(report):
        console.print(sentence, markup=False)
    for entry in report.excluded[:_MOST_LINES]:
        console.print(f"excluded: {entry.channels:,} channels, {entry.reason}", style="dim", markup=False)
    if len(report.excluded) > _MOST_LINES:
        console.print(f"excluded: {len(report.excluded) - _MOST_LINES} more, see the report", style="dim")


def _show_next_steps(report: Report, results: TextIO) -> None:
    """Print commands to copy: no line is broken."""
    from rich.console import Console

    from ss_pruning.report.formatting import printable
    from ss_pruning.report.next_steps import next_steps

    console = Console(file=results, highlight=False)
    for what, commands in next_steps(report):
        console.print(f"\n{what}:", style="bold")
        console.print(printable(commands), markup=False, soft_wrap=True)


def _about_time(report: Report) -> Iterator[str]:
    from ss_pruning.report.formatting import percent

    if report.too_noisy and report.latency_spread is not None:
        low, high = map(percent, report.latency_spread)
        yield (
            f"Whether time is saved is too noisy to tell: in half of the turns the pruned model took {low} to {high} "
            "of the dense one's time. ss-prune bench takes more turns; larger batches (--batch) are less noisy."
        )
    elif _saved_little_time(report):
        yield (
            "Of what is saved in multiply-accumulates less than half is saved in time, on this machine and batch "
            "(--batch); --latency prunes to a time."
        )


def _saved_little_time(report: Report) -> bool:
    """Less than half of the share that is saved of the multiply-accumulates; a latency was not asked for."""
    if report.latency_ratio is None or "latency" in report.settings:
        return False
    return 1 - report.latency_ratio < (1 - report.macs_after / report.macs_before) / 2
