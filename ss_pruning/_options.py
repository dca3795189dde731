"""The options of both commands, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ss_pruning._choices import Calibration, Compensation, Importance, Moments, Scope, Score

_MODEL, _IMAGES, _CRITERION, _OUTPUT = "Model", "Images", "Criterion", "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="timm:NAME, torchvision:NAME, demo:digits, or path/to/file.py:function. [bold]The last one "
        "executes that file.[/bold] Arguments follow after commas: timm:resnet18,num_classes=10",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Trained weights: .safetensors, or .pth/.pt/.th/.bin with nothing but tensors; no code is run "
        "from it.",
        show_default="random",
        rich_help_panel=_MODEL,
    ),
]
ByOrder = Annotated[
    bool,
    typer.Option(
        "--weights-by-order",
        metavar="",
        help="Match the weights by order and shape instead of by name.",
        rich_help_panel=_MODEL,
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="CxHxW",
        help="Size of one image.",
        show_default="the model's own, else 3x224x224",
        rich_help_panel=_IMAGES,
    ),
]
DataPlace = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="digits, cifar10:PATH, a folder with one folder per class (or with train/ and val/ of these), "
        "or a .tar of that layout.",
        show_default=False,
        rich_help_panel=_IMAGES,
    ),
]
Images = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Measure accuracy on so many of the images, drawn at random.",
        show_default="all",
        rich_help_panel=_IMAGES,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="M,M,M",
        help="Mean per channel of images in 0..1.",
        show_default="the model's own",
        rich_help_panel=_IMAGES,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        metavar="S,S,S",
        help="Deviation per channel.",
        show_default="the model's own",
        rich_help_panel=_IMAGES,
    ),
]
MomentsOption = Annotated[
    Moments | None,
    typer.Option(
        metavar="NAME",
        help="Where the variance of the channels comes from: batchnorm (the paper), gaussian (the network "
        "run on its own noise) or data (the images). To prune, the calibration images if there are any, "
        "else gaussian; to score, batchnorm.",
        show_default=False,
        rich_help_panel=_CRITERION,
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of everything random.", rich_help_panel=_OUTPUT)]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compute there: cpu, cuda:0.",
        show_default="a GPU if any",
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", metavar="", help="Print JSON on stdout and nothing else.", rich_help_panel=_OUTPUT
    ),
]


def _fraction(help_text: str) -> Any:
    return typer.Option(
        metavar="0..1", help=help_text, show_default=False, rich_help_panel="Budget (exactly one)"
    )


Criterion = Annotated[
    Importance,
    typer.Option(
        metavar="NAME",
        help="What decides which channels go: synaptic, or Torch-Pruning's magnitude, magnitude-l1, "
        "bn-scale, lamp, fpgm or random.",
        rich_help_panel=_CRITERION,
    ),
]
ScoreOption = Annotated[
    Score | None,
    typer.Option(
        metavar="NAME",
        help="What synaptic importance is made of: share, strength or entropy.",
        show_default="the importance's own",
        rich_help_panel=_CRITERION,
    ),
]
ScopeOption = Annotated[
    Scope,
    typer.Option(
        metavar="NAME",
        help="Rank channels across all layers (global) or within each (local).",
        rich_help_panel=_CRITERION,
    ),
]
CompensationOption = Annotated[
    Compensation,
    typer.Option(
        metavar="NAME",
        help="Move what removed channels carried onto what stays: mean (needs no images), linear or reconstruct "
        "(both calibrate on images, without labels).",
        rich_help_panel=_CRITERION,
    ),
]
CalibrationOption = Annotated[
    Calibration | None,
    typer.Option(
        metavar="NAME",
        help="What compensation calibrates on: data (training images of --data) or distilled (images made from the "
        "model's batch norms; kept for the next time).",
        show_default="data, if there is any",
        rich_help_panel=_CRITERION,
    ),
]
MaxRatio = Annotated[
    float,
    typer.Option(
        metavar="0..1",
        help="Never remove more than this fraction of a layer's channels.",
        rich_help_panel=_CRITERION,
    ),
]
CostExponent = Annotated[
    float,
    typer.Option(
        metavar="P",
        help="Divide scores by what a channel costs, to this power; 0 ignores costs, 1 is importance per cost.",
        rich_help_panel=_CRITERION,
    ),
]
RoundTo = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Keep widths multiples of this.",
        show_default=False,
        rich_help_panel=_CRITERION,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="Leave this module whole; may be given again.",
        show_default=False,
        rich_help_panel=_CRITERION,
    ),
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write model.safetensors, report.json and report.html there, over older ones.",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Weakest = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="How many of the weakest synapses to list.",
        rich_help_panel=_OUTPUT,
    ),
]
OutFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write all strengths (.safetensors) or the summary (.json).",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
Macs = Annotated[float | None, _fraction("Keep this fraction of the multiply-accumulates.")]
Params = Annotated[float | None, _fraction("Keep this fraction of the parameters.")]
Ratio = Annotated[float | None, _fraction("Remove this fraction of the channels.")]

PRUNE_HELP = """Prune a model to a budget.

Channels go; the network becomes smaller and stays an ordinary one. The cut is checked: it must compute what \
the dense model computes with the removed channels masked. Nothing is trained; fine-tune the result as usual.
"""

PRUNE_EXAMPLES = """
[bold]Examples[/bold]

Half the multiply-accumulates of the built-in demo, with accuracy before and after:

    ss-prune prune demo:digits --macs 0.5 --data digits --out runs/digits

Your own weights, and a report:

    ss-prune prune timm:resnet50 --weights resnet50.safetensors --macs 0.8 --out runs/r50

A model of your own, four fifths of its parameters, one layer left alone:

    ss-prune prune net.py:build --weights net.pth --input-size 3x32x32 --params 0.8 --ignore head

A net that keeps working, without any image:

    ss-prune prune net.py:build --weights net.pth --macs 0.7 --compensation reconstruct --calibration distilled

Another criterion for comparison:

    ss-prune prune demo:digits --macs 0.5 --data digits --importance magnitude
"""

SCORE_HELP = """Show the synaptic strengths of a model, layer by layer; nothing is changed.

The strength of a synapse, the connection from one input channel to one output channel, is the norm of its \
weights times the deviation of what it reads. Its share is its part of the variance of that output.
"""

SCORE_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune score torchvision:resnet18 --weights resnet18.pth

    ss-prune score demo:digits --out strengths.safetensors
"""
