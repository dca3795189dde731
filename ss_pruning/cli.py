"""The command line: `ss-prune prune` and `ss-prune score`."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ss_pruning._choices import Importance, Moments, Request, Scope, Score
from ss_pruning._console import guarded, progress_bars

if TYPE_CHECKING:
    from ss_pruning.report import Report

app = typer.Typer(
    name="ss-prune",
    help="Prune convolutional networks by synaptic strength.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_MODEL, _IMAGES, _CRITERION, _OUTPUT = "Model", "Images", "Criterion", "Output"

_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="timm:NAME, torchvision:NAME, demo:digits, or path/to/file.py:function. [bold]The last one "
        "executes that file.[/bold] Arguments follow after commas: timm:resnet18,num_classes=10",
    ),
]
_Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights: .safetensors, or .pth/.pt/.th/.bin with nothing but tensors; no code is run "
        "from it.",
        show_default="random",
        rich_help_panel=_MODEL,
    ),
]
_ByOrder = Annotated[
    bool,
    typer.Option(
        "--weights-by-order",
        metavar="",
        help="Match the weights by order and shape instead of by name.",
        rich_help_panel=_MODEL,
    ),
]
_InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="CxHxW",
        help="Size of one image.",
        show_default="the model's own, else 3x224x224",
        rich_help_panel=_IMAGES,
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="digits, cifar10:PATH, a folder with one folder per class (or with train/ and val/ of these), "
        "or a .tar of that layout.",
        show_default=False,
        rich_help_panel=_IMAGES,
    ),
]
_Images = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Measure accuracy on so many of the images, drawn at random.",
        show_default="all",
        rich_help_panel=_IMAGES,
    ),
]
_Mean = Annotated[
    str | None,
    typer.Option(
        metavar="M,M,M",
        help="Mean per channel of images in 0..1.",
        show_default="the model's own",
        rich_help_panel=_IMAGES,
    ),
]
_Std = Annotated[
    str | None,
    typer.Option(
        metavar="S,S,S",
        help="Deviation per channel.",
        show_default="the model's own",
        rich_help_panel=_IMAGES,
    ),
]
_Moments = Annotated[
    Moments,
    typer.Option(
        metavar="NAME",
        help="Where the variance of the channels comes from: batchnorm (the paper), gaussian (the network "
        "run on its own noise) or data (the images).",
        rich_help_panel=_CRITERION,
    ),
]
_Seed = Annotated[int, typer.Option(metavar="N", help="Seed of everything random.", rich_help_panel=_OUTPUT)]
_Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compute there: cpu, cuda:0.",
        show_default="a GPU if any",
        rich_help_panel=_OUTPUT,
    ),
]
_Json = Annotated[
    bool,
    typer.Option(
        "--json", metavar="", help="Print JSON on stdout and nothing else.", rich_help_panel=_OUTPUT
    ),
]


def _fraction(help_text: str) -> Any:
    return typer.Option(
        metavar="0..1", help=help_text, show_default=False, rich_help_panel="Budget (exactly one)"
    )


_PRUNE_HELP = """Prune a model to a budget.

Channels go; the network becomes smaller and stays an ordinary one. The cut is checked: it must compute what \
the dense model computes with the removed channels masked. Nothing is trained; fine-tune the result as usual.
"""

_PRUNE_EXAMPLES = """
[bold]Examples[/bold]

Half the multiply-accumulates of the built-in demo, with accuracy before and after:

    ss-prune prune demo:digits --macs 0.5 --data digits --out runs/digits

Your own weights, and a report:

    ss-prune prune timm:resnet50 --weights resnet50.safetensors --macs 0.8 --out runs/r50

A model of your own, four fifths of its parameters, one layer left alone:

    ss-prune prune net.py:build --weights net.pth --input-size 3x32x32 --params 0.8 --ignore head

Another criterion for comparison:

    ss-prune prune demo:digits --macs 0.5 --data digits --importance magnitude
"""

_SCORE_HELP = """Show the synaptic strengths of a model, layer by layer; nothing is changed.

The strength of a synapse, the connection from one input channel to one output channel, is the norm of its \
weights times the deviation of what it reads. Its share is its part of the variance of that output.
"""

_SCORE_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune score torchvision:resnet18 --weights resnet18.pth

    ss-prune score demo:digits --out strengths.safetensors
"""


@app.command(help=_PRUNE_HELP, epilog=_PRUNE_EXAMPLES)
def prune(
    context: typer.Context,
    model: _Model,
    macs: Annotated[float | None, _fraction("Keep this fraction of the multiply-accumulates.")] = None,
    params: Annotated[float | None, _fraction("Keep this fraction of the parameters.")] = None,
    ratio: Annotated[float | None, _fraction("Remove this fraction of the channels.")] = None,
    weights: _Weights = None,
    weights_by_order: _ByOrder = False,
    data: _Data = None,
    images: _Images = None,
    input_size: _InputSize = None,
    mean: _Mean = None,
    std: _Std = None,
    importance: Annotated[
        Importance,
        typer.Option(
            metavar="NAME",
            help="What decides which channels go: synaptic, or Torch-Pruning's magnitude, magnitude-l1, "
            "bn-scale, lamp, fpgm or random.",
            rich_help_panel=_CRITERION,
        ),
    ] = Importance.synaptic,
    moments: _Moments = Moments.batchnorm,
    score: Annotated[
        Score | None,
        typer.Option(
            metavar="NAME",
            help="What synaptic importance is made of: share, strength or entropy.",
            show_default="the importance's own",
            rich_help_panel=_CRITERION,
        ),
    ] = None,
    scope: Annotated[
        Scope,
        typer.Option(
            metavar="NAME",
            help="Rank channels across all layers (global) or within each (local).",
            rich_help_panel=_CRITERION,
        ),
    ] = Scope.all_layers,
    max_ratio: Annotated[
        float,
        typer.Option(
            metavar="0..1",
            help="Never remove more than this fraction of a layer's channels.",
            rich_help_panel=_CRITERION,
        ),
    ] = 0.9,
    round_to: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Keep widths multiples of this.",
            show_default=False,
            rich_help_panel=_CRITERION,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Leave this module whole; may be given again.",
            show_default=False,
            rich_help_panel=_CRITERION,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write model.safetensors, report.json and report.html there, over older ones.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    seed: _Seed = 0,
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Prune a model to a budget, report, and write the result."""
    with guarded():
        budget = _budget(macs=macs, params=params, ratio=ratio)
        _check_synaptic_options(importance, moments, score)
        request = Request(
            model=model,
            weights=weights,
            by_order=weights_by_order,
            input_size=input_size,
            mean=mean,
            std=std,
            data=data,
            images=images,
            moments=moments,
            seed=seed,
            device=device,
        )
        options = {
            **budget,
            "ignore": tuple(ignore or ()),
            "round_to": round_to,
            "scope": scope.value,
            "max_ratio": max_ratio,
        }
        with _output_folder(out), progress_bars() as progress:
            from ss_pruning import _job

            job = _job.prepare(request, progress)
            chosen = _job.make_importance(importance, score, request, job)
            report = _job.run(job, chosen, options, progress)
            report.settings.update(options | _job.settings_of(request, importance, chosen, job))
            report.command = _command_line(context)
            if out is not None:
                _job.write(job, report, out)
    _show(report, out, as_json)


@app.command(help=_SCORE_HELP, epilog=_SCORE_EXAMPLES)
def score(
    model: _Model,
    weights: _Weights = None,
    weights_by_order: _ByOrder = False,
    data: _Data = None,
    input_size: _InputSize = None,
    mean: _Mean = None,
    std: _Std = None,
    moments: _Moments = Moments.batchnorm,
    weakest: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="How many of the weakest synapses to list.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 10,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write all strengths (.safetensors) or the summary (.json).",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    seed: _Seed = 0,
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Summarise the strengths of a model, and write them."""
    with guarded(), progress_bars() as progress:
        from ss_pruning import _job, scores

        if out is not None:
            scores.check_target(out)
        request = Request(
            model=model,
            weights=weights,
            by_order=weights_by_order,
            input_size=input_size,
            mean=mean,
            std=std,
            data=data,
            images=None,
            moments=moments,
            seed=seed,
            device=device,
        )
        job = _job.prepare(request, progress)
        strengths = _job.strengths_of(request, job)
        summary = scores.summarise(strengths, job.model, weakest)
        facts = {"model": model, "moments": moments.value}
        if out is not None:
            scores.write(out, strengths, summary, facts)
    scores.show(summary, facts, as_json)


def _budget(**given: float | None) -> dict[str, float]:
    from ss_pruning.errors import InputError

    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        listed = " and ".join(f"--{name}" for name in chosen) or "none"
        raise InputError(
            f"give exactly one of --macs, --params and --ratio; {listed} was given. "
            "For example, --macs 0.8 keeps 80 % of the multiply-accumulates."
        )
    return chosen


def _check_synaptic_options(importance: Importance, moments: Moments, score: Score | None) -> None:
    from ss_pruning.errors import InputError

    given = {"--moments": moments is not Moments.batchnorm, "--score": score is not None}
    for option in (name for name, is_given in given.items() if is_given):
        if importance is not Importance.synaptic:
            raise InputError(f"{option} belongs to --importance synaptic, not to {importance.value}.")


@contextlib.contextmanager
def _output_folder(out: Path | None) -> Iterator[None]:
    """Prove before the work that `out` can be written; leave no empty folder behind when the work fails."""
    from ss_pruning._atomic import make_writable_folder

    if out is None:
        yield
        return
    is_new = not out.exists()
    make_writable_folder(out)
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


def _show(report: Report, out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        typer.echo(report.to_json(), nl=False)
        return
    console = Console()
    console.print(report.table())
    for entry in report.left_whole:
        console.print(f"left whole: {entry.channels:,} channels, {entry.reason}", style="dim", markup=False)
    if out is not None:
        console.print(f"written: model.safetensors, report.json and report.html in {out}", markup=False)


if __name__ == "__main__":
    app()
