"""The options of all commands, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ss_pruning.cli.grouped import CRITERION

_MODEL, _IMAGES, _CRITERION, _OUTPUT = "Model", "Images", CRITERION, "Output"
_SETTING, _TRAINING = "Setting", "Training"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="timm:NAME, torchvision:NAME, demo:digits, or path/to/file.py:function. [bold]The last one "
        "executes that file.[/bold] Arguments follow after commas: timm:resnet18,num_classes=10",
    ),
]


def _option(panel: str, *names: str, **what: Any) -> Any:
    """An option in a panel of the help; it takes a name unless another metavar is given."""
    return typer.Option(*names, rich_help_panel=panel, **{"metavar": "NAME", **what})


def _fraction(help_text: str) -> Any:
    return typer.Option(
        metavar="0..1", help=help_text, show_default=False, rich_help_panel="Budget (exactly one)"
    )


Weights = Annotated[
    str | None,
    _option(
        _MODEL,
        help="Trained weights: .safetensors, or .pth/.pt/.th/.bin with nothing but tensors; no code is run "
        "from it.",
        metavar="FILE",
        show_default="random",
    ),
]
ByOrder = Annotated[
    bool,
    _option(
        _MODEL,
        "--weights-by-order",
        help="Match the weights by order and shape instead of by name.",
        metavar="",
    ),
]
InputSize = Annotated[
    str | None,
    _option(
        _IMAGES,
        help="Size of one input, channels first: CxHxW for images, CxL for one dimension, CxDxHxW for three.",
        metavar="CxHxW",
        show_default="the model's own, else 3x224x224",
    ),
]
DataPlace = Annotated[
    str | None,
    _option(
        _IMAGES,
        help="digits, cifar10:ROOT (torchvision's copy), or a folder with one folder per class (or with train/ and "
        "val/ of these).",
        metavar="PLACE",
        show_default=False,
    ),
]
Images = Annotated[
    int | None,
    _option(
        _IMAGES,
        help="Measure accuracy on so many of the images, drawn at random.",
        metavar="N",
        show_default="all",
        min=1,
    ),
]
Mean = Annotated[
    str | None,
    _option(
        _IMAGES, help="Mean per channel of images in 0..1.", metavar="M,M,M", show_default="the model's own"
    ),
]
Std = Annotated[
    str | None,
    _option(_IMAGES, help="Deviation per channel.", metavar="S,S,S", show_default="the model's own"),
]
Statistics = Annotated[
    Literal["batchnorm", "gaussian", "data"],
    _option(
        _CRITERION,
        help="Where the variance of the channels comes from: batchnorm (the paper), gaussian (the model run on its own "
        "noise) or data (the images).",
        metavar=None,
    ),
]
Seed = Annotated[
    int, _option(_OUTPUT, help="Seed of everything random.", metavar="N", min=-(2**63), max=2**63 - 1)
]
Device = Annotated[
    str | None,
    _option(_OUTPUT, help="Compute there: cpu, cuda:0.", show_default="a GPU if any"),
]
Json = Annotated[
    bool,
    _option(_OUTPUT, "--json", help="Print JSON on stdout and nothing else.", metavar=""),
]


Criterion = Annotated[
    str,
    _option(
        _CRITERION,
        help="What decides which channels go: synaptic, or Torch-Pruning's magnitude, magnitude-l1, "
        "bn-scale, lamp, fpgm or random; or one that the model's file registers.",
    ),
]
CompensationOption = Annotated[
    Literal["none", "mean", "linear", "reconstruct"],
    _option(
        _CRITERION,
        help="Move what removed channels carried onto what stays: mean (needs no images), linear or reconstruct "
        "(both calibrate on images, without labels).",
        metavar=None,
    ),
]
CalibrationOption = Annotated[
    str | None,
    _option(
        _CRITERION,
        help="What sensitivity is measured on and compensation calibrates on: data (training images of --data; where "
        "there are none, some are held out), a folder with images anywhere below it, without labels, or synthetic "
        "(images made from the model's batch norms; kept for the next time).",
        metavar="data|synthetic|DIR",
        show_default="data, if there is any",
    ),
]
CalibrationImages = Annotated[
    int | None,
    _option(
        _CRITERION,
        help="Calibrate on so many images at most, drawn at random; synthetic: make so many.",
        metavar="N",
        show_default="512; synthetic: up to 256",
        min=1,
    ),
]
Recalibrate = Annotated[
    bool | None,
    _option(
        _CRITERION,
        "--recalibrate/--no-recalibrate",
        help="At the end, move mean and variance of the batch norms behind the cut as far as what reaches them has "
        "moved, on the calibration images if there are any, else on noise.",
        show_default="with mean and linear",
        metavar="",
    ),
]
Ignore = Annotated[
    list[str] | None,
    _option(
        _CRITERION, help="Leave this module whole; may be given again.", metavar="PATH", show_default=False
    ),
]
OutFolder = Annotated[
    Path | None,
    _option(
        _OUTPUT,
        help="Write model.safetensors, report.json and report.html there, over older ones.",
        metavar="DIR",
        show_default=False,
    ),
]
Weakest = Annotated[
    int,
    _option(_OUTPUT, help="How many of the weakest synapses to list.", metavar="N", min=0),
]
OutFile = Annotated[
    Path | None,
    _option(
        _OUTPUT,
        help="Write all strengths (.safetensors) or the summary (.json).",
        metavar="FILE",
        show_default=False,
    ),
]
FirstReport = Annotated[
    Path,
    typer.Argument(metavar="A", show_default=False, help="A report.json, or the folder that holds it."),
]
SecondReport = Annotated[
    Path, typer.Argument(metavar="B", show_default=False, help="The one to compare with it.")
]
HtmlFile = Annotated[
    Path | None,
    _option(_OUTPUT, help="Write one self-contained page there.", metavar="FILE", show_default=False),
]
Macs = Annotated[float | None, _fraction("Keep this fraction of the multiply-accumulates.")]
Params = Annotated[float | None, _fraction("Keep this fraction of the parameters.")]
Ratio = Annotated[float | None, _fraction("Remove this fraction of the channels.")]
Latency = Annotated[
    float | None, _fraction("Keep this fraction of the time of a forward pass, as measured here.")
]
Batch = Annotated[int, _option(_IMAGES, help="Measure times on so many images at once.", metavar="N", min=1)]

File = Annotated[
    Path, typer.Argument(metavar="FILE", show_default=False, help="A model.safetensors of ss-prune prune.")
]
FileOrModel = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="A model.safetensors of ss-prune prune; or a MODEL as there, which is exported as it is.",
    ),
]
Measured = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        show_default=False,
        help="A model.safetensors of ss-prune prune (dense and pruned are measured), exported files (.onnx), or both; "
        "the others are compared with the first.",
    ),
]
Architecture = Annotated[
    str | None,
    _option(
        _MODEL,
        "--model",
        help="What was pruned, where the file does not name it; as for ss-prune prune. [bold]A .py file is executed."
        "[/bold]",
        metavar="MODEL",
        show_default="what the file names",
    ),
]
ExportFormat = Annotated[
    str | None,
    _option(
        _OUTPUT, help="onnx, or pt2 (torch.export).", metavar="onnx|pt2", show_default="by the name of --out"
    ),
]
ExportOut = Annotated[
    Path | None,
    _option(_OUTPUT, help="File to write.", metavar="FILE", show_default="beside the model"),
]
Int8 = Annotated[
    bool,
    _option(
        _OUTPUT,
        "--int8",
        help="Compute in eight bits (onnx). Ranges come from --calibration.",
        metavar="",
    ),
]
Int8Calibration = Annotated[
    str | None,
    _option(
        _IMAGES,
        help="Images for --int8: a folder with images anywhere below it, without labels, or synthetic (made from the "
        "model's batch norms).",
        metavar="synthetic|DIR",
        show_default=False,
    ),
]
Int8Images = Annotated[
    int | None,
    _option(
        _IMAGES,
        "--calibration-images",
        help="Take so many of them at most, drawn at random.",
        metavar="N",
        show_default="512; synthetic: up to 256",
        min=1,
    ),
]
DenseWeights = Annotated[
    str | None,
    _option(
        _MODEL,
        help="The dense model's trained weights: then its outputs are compared, too.",
        metavar="FILE",
        show_default="random",
    ),
]
Photos = Annotated[
    Path | None,
    _option(
        _IMAGES,
        help="Compare outputs on images of this folder and all below it, without labels.",
        metavar="DIR",
        show_default="those of --data, else noise",
    ),
]
Batches = Annotated[str, _option(_IMAGES, help="Images at a time, one or several.", metavar="N,N,N")]
Dtypes = Annotated[str, _option(_SETTING, help="Number types: float32, bf16, float16.", metavar="NAME,NAME")]
Layouts = Annotated[
    str, _option(_SETTING, help="Memory layouts: contiguous, channels_last.", metavar="NAME,NAME")
]
Compiled = Annotated[bool, _option(_SETTING, "--compiled", help="Also by torch.compile.", metavar="")]
Threads = Annotated[
    int | None,
    _option(_OUTPUT, help="Threads of the CPU.", metavar="N", show_default="torch's own", min=1),
]
Minutes = Annotated[
    float | None,
    _option(_TRAINING, help="Train so long.", metavar="M", show_default="5, unless --steps is given"),
]
Steps = Annotated[
    int | None,
    _option(
        _TRAINING, help="Train so many steps: the same result each time.", metavar="N", show_default=False
    ),
]
Checkpoint = Annotated[
    Path | None,
    _option(
        _TRAINING,
        help="Keep the training there; the same command goes on from it.",
        metavar="FILE",
        show_default=False,
    ),
]
RecoveredFile = Annotated[
    Path | None,
    _option(_OUTPUT, help="File to write.", metavar="FILE", show_default="recovered.safetensors beside FILE"),
]
ModelOrFile = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="As for ss-prune prune, or a model.safetensors that it wrote. A bare word is a name of timm's.",
    ),
]
TrainingData = Annotated[
    Path,
    _option(_IMAGES, help="Folder with train/CLASS/* and val/CLASS/*.", metavar="DIR", show_default=False),
]
StartingWeights = Annotated[
    Path | None,
    _option(
        _MODEL,
        help="Where to start: weights, or a file of ss-prune.",
        metavar="FILE",
        show_default="random",
    ),
]
FinetuningFolder = Annotated[Path, _option(_OUTPUT, help="Folder of checkpoints and results.", metavar="DIR")]
FinetuningExport = Annotated[
    Literal["onnx", "pt2"] | None,
    _option(_OUTPUT, help="Write the result for another runtime, too.", metavar=None, show_default=False),
]
