"""The command line: `ss-prune prune`, `score`, `recover`, `finetune`, `export`, `bench`, `compare` and `doctor`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer
from typer.core import TyperGroup

from ss_pruning import config
from ss_pruning.cli import help_texts as texts
from ss_pruning.cli import request as ask
from ss_pruning.cli.console import FAILED, not_interrupted, progress_bars
from ss_pruning.cli.grouped import grouped
from ss_pruning.integrations.finetuning.options import Options
from ss_pruning.recovery.settings import Recovery

if TYPE_CHECKING:
    from ss_pruning.report.records import Report


class _Commands(TyperGroup):
    """Takes no empty argument: `--out ""`, as from a variable that is not set, would mean the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for before, argument in zip(["ss-prune", *args], args, strict=False):
            if not argument or (argument.startswith("--") and argument.endswith("=")):
                ctx.fail(f"nothing is given after '{argument or before}': is a variable not set?")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="ss-prune",
    cls=_Commands,
    help="Make trained networks smaller and faster: prune, recover, fine-tune, export, measure.",
    epilog=texts.EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MOST_LINES = 8


@app.command(epilog=texts.PRUNE_EXAMPLES)
@grouped
def prune(
    context: typer.Context,
    budgets: ask.Budgets,
    request: ask.Request,
    method: ask.Method,
    synaptic: config.Synaptic,
    allocation: config.Allocation,
    output: ask.Output,
    results: TextIO,
) -> None:
    """Prune a model to a budget.

    Channels go; the network becomes smaller and stays an ordinary one. The cut is checked: it must compute what the
    dense model computes with the removed channels masked. Nothing is trained; fine-tune the result as usual.
    """
    budget = budgets.given()
    method.check(synaptic)
    options = {
        **budget,
        "ignore": tuple(request.ignore or ()),
        "compensation": method.repair,
        "allocation": allocation,
    }
    with _output_folder(output.out, request.weights):
        with progress_bars() as progress:
            from ss_pruning.cli import jobs as _job
            from ss_pruning.io.checkpoint import checksum_of_weights

            _job.check_statistics(request, synaptic)
            job = _job.prepare(request, progress)
            dense = None if output.out is None else checksum_of_weights(job.model)
            with _job.input_size_named(request):
                pictures, calibrated_on = _job.calibration_images(request, method.repair, job, progress)
                importance = synaptic if method.importance == ask.SYNAPTIC else method.importance
                options |= {"importance": importance, "calibration": pictures}
                report = _job.run(job, options, request.batch, progress)
            report.settings.update(_job.settings_of(request, method.importance, job), **calibrated_on)
            report.command = _command_line(context)
            report.random_weights = _job.random_weights(request)
            report.file = None if output.out is None else str(output.out / _job.WRITTEN[0])
            content = b"" if output.out is None else _job.packed(job, report, dense)
        with _written_after(output.out, lambda folder: _job.write(content, report, folder)):
            _show(report.to_json() if output.as_json else _told(report), results)
        if output.out is not None and not output.as_json:
            _show([f"written: model.safetensors, report.json and report.html in {output.out}"], results)
            _show_next_steps(report, results)


@app.command(epilog=texts.SCORE_EXAMPLES)
@grouped
def score(source: ask.Source, wanted: ask.Scored, results: TextIO) -> None:
    """Show the synaptic strengths of a model, layer by layer; nothing is changed.

    The strength of a synapse, the connection from one input channel to one output channel, is the norm of its
    weights times the deviation of what it reads. Its share is its part of the variance of that output.
    """
    from ss_pruning._utils.files import check_apart
    from ss_pruning.cli import jobs as _job
    from ss_pruning.report import strength_summary as scores

    if wanted.out is not None:
        scores.check_target(wanted.out)
        check_apart(wanted.out, source.weights)
    request = ask.Request(**vars(source))
    _job.check_statistics(request, config.Synaptic(wanted.statistics))
    with progress_bars() as progress:
        job = _job.prepare(request, progress)
        with _job.input_size_named(request):
            strengths = _job.strengths_of(job, wanted.statistics)
    summary = scores.summarise(strengths, job.model, wanted.weakest)
    facts = {"model": source.model, "statistics": wanted.statistics}
    with _written_after(wanted.out, lambda path: scores.write(path, strengths, summary, facts)):
        tables = scores.tables(summary, source.model)
        _show(scores.as_json(summary, facts) if wanted.as_json else tables, results)


@app.command(epilog=texts.RECOVER_EXAMPLES)
@grouped
def recover(wanted: ask.Recovering, training: Recovery, results: TextIO, as_json: ask.Json = False) -> None:
    """Train a pruned model, without labels, to have the feature maps of the dense one.

    FILE is a model.safetensors of ss-prune prune. A few hundred images and some minutes bring back much of what the
    cut cost; on held-out images the result is never further from the dense model than FILE is.
    """
    from ss_pruning._utils.files import check_apart, check_writable
    from ss_pruning.cli import delivery as _delivery

    request = _delivery.request_of(wanted, training.seed)
    check_writable(wanted.target, wanted.file.stat().st_size if wanted.file.is_file() else 0)
    check_apart(wanted.target, wanted.file, request.weights, wanted.checkpoint)
    if wanted.checkpoint is not None:  # of what is none, it would be said to delete it
        check_apart(wanted.checkpoint, wanted.file, request.weights)
    with progress_bars() as progress:
        report, facts = _delivery.recover(wanted, request, training, progress)
    if as_json:
        typer.echo(json.dumps({**asdict(report), **facts}, indent=2), file=results)
    else:
        typer.echo(
            "\n".join([str(report), *(f"{name}: {value}" for name, value in facts.items())]), file=results
        )


@app.command(epilog=texts.FINETUNE_EXAMPLES)
@grouped
def finetune(options: Options) -> None:
    """Train or fine-tune on labelled images, prune on the way, in one or many processes.

    An epoch ends with a checkpoint in --out. The same command goes on from it, with any number of processes:
    torchrun -m ss_pruning.cli finetune ..., or accelerate launch -m ss_pruning.cli finetune ... . Needs the extra
    train.
    """
    from ss_pruning.errors import InputError

    try:
        from ss_pruning.integrations.finetuning.run import finetune
    except ModuleNotFoundError as error:
        raise InputError(f"this needs {error.name}: pip install 'ss-pruning[train]'") from error
    finetune(options)


@app.command(epilog=texts.EXPORT_EXAMPLES)
@grouped
def export(wanted: ask.Exporting, results: TextIO) -> None:
    """Write a pruned model for other runtimes, ONNX, OpenVINO or torch.export, with a free batch size.

    The file is run, in onnxruntime, OpenVINO or torch, and must put out what the model does, or it is not kept. With
    --int8 it computes in eight bits, and how far it is from the model is said.
    """
    with progress_bars() as progress:
        from ss_pruning.cli import delivery as _delivery

        said = _delivery.export(wanted, progress)
    typer.echo(f"written: {said}", file=results)


@app.command(epilog=texts.BENCH_EXAMPLES)
@grouped
def bench(compared: ask.Compared, timed: ask.Timed, results: TextIO, as_json: ask.Json = False) -> None:
    """Measure what pruning gained: dense against pruned, and exported files, in turns, in one process.

    Latency with its spread, throughput, peak memory and file size, for every combination of batch, number type and
    layout; how far the outputs are from the first model's; accuracy where there are labels.
    """
    with progress_bars() as progress:
        import torch

        from ss_pruning.cli import bench as benching
        from ss_pruning.profiling.comparison import settings

        if timed.threads is not None:
            torch.set_num_threads(timed.threads)
        compiled = (False, True) if timed.compiled else (False,)
        wanted = settings(_counts(timed.batch), timed.dtype.split(","), timed.layout.split(","), compiled)
        found = benching.measure(compared, wanted, timed.device, progress)
    _show(found.to_json() if as_json else [benching.table(found)], results)


def _counts(text: str) -> list[int]:
    from ss_pruning.errors import InputError

    if not all(part.strip().isdigit() for part in text.split(",")):
        raise InputError(f"--batch is one or several whole numbers, as in 1,32,256, not {text!r}.")
    return [int(part) for part in text.split(",")]


@app.command(epilog=texts.COMPARE_EXAMPLES)
@grouped
def compare(wanted: ask.SideBySide, results: TextIO) -> None:
    """Put two reports side by side: sizes, accuracy, the width of each layer, the settings that differ.

    A and B are folders that `ss-prune prune --out` has written, or their report.json.
    """
    from ss_pruning._utils.files import check_apart, check_writable, write_text
    from ss_pruning.io.checkpoint import open_report, report_file
    from ss_pruning.report import comparison

    a, b, html = wanted.a, wanted.b, wanted.html
    if html is not None:
        check_writable(html)
        check_apart(html, *map(report_file, (a, b)))
    first, second = open_report(a), open_report(b)
    found = comparison.compare(first, second, str(a), str(b))
    with _written_after(html, lambda path: write_text(path, found.to_html(first, second))):
        _show(found.to_json() if wanted.as_json else [found.table(), *found.notes], results)
    if html is not None and not wanted.as_json:
        _show([f"written: {html}"], results)


@app.command()
@grouped
def doctor(results: TextIO, as_json: ask.Json = False) -> None:
    """Say what is installed, what each extra would add, and what PyTorch makes of this machine.

    Exit code 2 where a package that is needed is missing.
    """
    from ss_pruning.cli import doctor as checks

    found = checks.examine()
    _show(found.to_json() if as_json else [*found.tables(), *found.hints()], results)
    if not found.is_well:
        raise typer.Exit(FAILED)


def _show(found: str | Iterable[Any], results: TextIO) -> None:
    """Print JSON, or tables and texts, as they are."""
    from rich.console import Console

    if isinstance(found, str):
        typer.echo(found, file=results, nl=False)
        return
    console = Console(file=results)
    for entry in found:
        console.print(entry, markup=False)


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
    for parameter in sorted(context.command.params, key=lambda p: p.param_type_name != "argument"):
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


def _told(report: Report) -> Iterator[Any]:
    """What is printed of a report."""
    from rich.text import Text

    from ss_pruning.report.notes import certainty

    yield report.table()
    if "calibration" in (notes := dict(certainty(report))):
        yield notes["calibration"]
    if report.traded_for_time:
        yield f"To save time: {'; '.join(report.traded_for_time)}."
    yield from _about_time(report)
    for entry in report.excluded[:_MOST_LINES]:
        yield Text(f"excluded: {entry.channels:,} channels, {entry.reason}", style="dim")
    if len(report.excluded) > _MOST_LINES:
        yield Text(f"excluded: {len(report.excluded) - _MOST_LINES} more, see the report", style="dim")


def _show_next_steps(report: Report, results: TextIO) -> None:
    """Print commands to copy: no line is broken; what takes more than one line is in the report."""
    from rich.console import Console

    from ss_pruning.report.formatting import printable
    from ss_pruning.report.next_steps import next_steps

    console = Console(file=results, highlight=False)
    console.print()
    for what, command in next_steps(report):
        if "\n" not in command:
            console.print(f"# {what}", style="dim")
            console.print(printable(command), markup=False, soft_wrap=True)
    page = Path(report.file or "").with_name("report.html")
    console.print(printable(f"# In Python: see {page}"), style="dim", markup=False, soft_wrap=True)


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
