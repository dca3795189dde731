"""What a user asks for on the command line: each field is an option, see `ss_pruning.cli.grouped`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ss_pruning import config
from ss_pruning.cli.options import (
    COMPENSATION,
    CRITERION,
    IMAGES,
    MODEL,
    OUTPUT,
    SETTING,
    TRAINING,
    argument,
    option,
    share,
)
from ss_pruning.errors import InputError
from ss_pruning.profiling.runtimes import RUNTIMES

#: The importance by default, with options of its own.
SYNAPTIC = "synaptic"
#: What calibration images may be, besides made ones and those of a folder.
DATA = "data"


Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON on stdout and nothing else.", metavar=""),
]


@dataclass(frozen=True, kw_only=True)
class Preprocessed:
    """How images become a model's inputs.

    Attributes:
        input_size: Size of one input, channels first: CxHxW for images, CxL for one dimension, CxDxHxW for three.
        mean: Mean per channel of images in 0..1.
        std: Deviation per channel.
    """

    input_size: str | None = option(
        None, IMAGES, metavar="CxHxW", show_default="the model's own, else 3x224x224"
    )
    mean: str | None = option(None, IMAGES, metavar="M,M,M", show_default="the model's own")
    std: str | None = option(None, IMAGES, metavar="S,S,S", show_default="the model's own")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images to measure accuracy on.

    Attributes:
        data: digits, cifar10:ROOT (torchvision's copy), or a folder with one folder per class (or with train/ and val/
            of these).
    """

    data: str | None = option(None, IMAGES, metavar="PLACE")


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """What fills a model.

    Attributes:
        weights: Trained weights: .safetensors, or .pth/.pt/.th/.bin with nothing but tensors; no code is run from it.
    """

    weights: str | None = option(None, MODEL, metavar="FILE", show_default="random")


@dataclass(frozen=True, kw_only=True)
class Images(Preprocessed, Labelled):
    """Images with labels, and where they are computed with.

    Attributes:
        device: Compute there: cpu, cuda:0.
    """

    device: str | None = option(None, OUTPUT, show_default="a GPU if any")


@dataclass(frozen=True, kw_only=True)
class Calibrated(Images):
    """Which of the images are evaluated on, and which are calibrated on.

    Attributes:
        images: Measure accuracy on so many of the images, drawn at random.
        calibration: What sensitivity is measured on and compensation calibrates on: data (training images of --data;
            where there are none, some are held out), a folder with images anywhere below it, without labels, or
            synthetic (images made from the model's batch norms; kept for the next time).
        calibration_images: Calibrate on so many images at most, drawn at random; synthetic: make so many.
    """

    images: int | None = option(None, IMAGES, metavar="N", show_default="all", min=1)
    calibration: str | None = option(None, IMAGES, metavar="IMAGES", show_default="data, if there is any")
    calibration_images: int | None = option(
        None, IMAGES, metavar="N", show_default="512; synthetic: up to 256", min=1
    )

    @property
    def photos(self) -> Path | None:
        """The folder of calibration images, if that is what was given."""
        return None if self.calibration in (None, DATA, config.SYNTHETIC) else Path(str(self.calibration))


@dataclass(frozen=True, kw_only=True)
class Source(Images, Weighted):
    """A model and the images that belong to it.

    Attributes:
        model: timm:NAME, torchvision:NAME, yolo:FILE, demo:digits, or path/to/file.py:function. **The last one executes
            that file.** Arguments follow after commas: timm:resnet18,num_classes=10
        weights_by_order: Match the weights by order and shape instead of by name.
        seed: Seed of everything random.
    """

    model: str = argument("MODEL")
    weights_by_order: bool = option(False, MODEL, "--weights-by-order", metavar="")
    seed: int = option(0, OUTPUT, metavar="N", min=0, max=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class Request(Source, Calibrated):
    """What is to be pruned, and on which images that is judged and calibrated.

    Attributes:
        batch: Measure times on so many images at once.
        ignore: Keep all channels of this module; may be given again.
    """

    batch: int = option(1, IMAGES, metavar="N", min=1)
    ignore: list[str] | None = option(None, CRITERION, metavar="PATH")


@dataclass(frozen=True)
class Budgets:
    """Exactly one of them is given.

    Attributes:
        macs: Keep this fraction of the multiply-accumulates.
        params: Keep this fraction of the parameters.
        ratio: Remove this fraction of the channels.
        latency: Keep this fraction of the time of a forward pass, as measured here.
    """

    macs: float | None = option(None, "Budget (exactly one)", metavar="0..1", parser=share)
    params: float | None = option(None, "Budget (exactly one)", metavar="0..1", parser=share)
    ratio: float | None = option(None, "Budget (exactly one)", metavar="0..1", parser=share)
    latency: float | None = option(None, "Budget (exactly one)", metavar="0..1", parser=share)

    def given(self) -> dict[str, float]:
        """By name."""
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        if len(chosen) != 1:
            listed = " and ".join(f"--{name}" for name in chosen) + " were" if chosen else "none was"
            raise InputError(
                f"give exactly one of --macs, --params, --latency and --ratio; {listed} given. "
                "For example, --macs 0.8 keeps 80 % of the multiply-accumulates."
            )
        return chosen


@dataclass(frozen=True)
class Method:
    """What decides which channels go, and what is done about it.

    Attributes:
        importance: What decides which channels go: synaptic, or Torch-Pruning's magnitude, magnitude-l1, bn-scale,
            lamp, fpgm or random; or one that the model's file registers.
        compensation: Move what removed channels carried onto what stays: none, mean (needs no images), linear or
            reconstruct (both calibrate on images, without labels).
        recalibrate: At the end, move mean and variance of the batch norms behind the cut as far as what reaches them
            has moved, on the calibration images if there are any, else on noise.
    """

    importance: str = option(SYNAPTIC, CRITERION)
    compensation: config.Method = option("none", COMPENSATION)
    recalibrate: bool | None = option(
        None, COMPENSATION, "--recalibrate/--no-recalibrate", show_default="with mean and linear", metavar=""
    )

    @property
    def repair(self) -> config.Compensation:
        """The compensation, with its own default for what was not said."""
        kind = config.COMPENSATIONS[self.compensation]
        return kind() if self.recalibrate is None else kind(recalibrate=self.recalibrate)

    def check(self, synaptic: config.Synaptic) -> None:
        """Refuse options of synaptic strength beside another importance."""
        given = [name for name, value in vars(synaptic).items() if value is not None]
        if given and self.importance != SYNAPTIC:
            raise InputError(f"--{given[0]} belongs to --importance synaptic, not to {self.importance}.")


@dataclass(frozen=True)
class Output:
    """Where the result goes.

    Attributes:
        out: Write model.safetensors, report.json and report.html there, over older ones.
    """

    out: Path | None = option(None, OUTPUT, metavar="DIR")
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class Rebuilt(Preprocessed):
    """How the model of a file is built, and how images become its inputs.

    Attributes:
        input_size: Size of one input, as for ss-prune prune.
        model: What was pruned, where the file does not name it; as for ss-prune prune. **A .py file is executed.**
    """

    input_size: str | None = option(
        None, IMAGES, metavar="CxHxW", show_default="that of the report beside FILE, else the model's own"
    )
    model: str | None = option(None, MODEL, "--model", metavar="MODEL", show_default="what the file names")


@dataclass(frozen=True, kw_only=True)
class PrunedFile(Rebuilt):
    """A file that `ss-prune prune` has written.

    Attributes:
        file: A model.safetensors of ss-prune prune.
    """

    file: Path = argument("FILE")


@dataclass(frozen=True, kw_only=True)
class Recovering(PrunedFile, Calibrated, Weighted):
    """What is recovered, on which images, for how long, and where it goes.

    Attributes:
        weights: The dense model's trained weights.
        calibration: Images to train on; no labels are used: data (training images of --data), a folder with images
            anywhere below it, or synthetic (made from the dense model's batch norms; kept for the next time).
        calibration_images: Train on so many of them at most, drawn at random; synthetic: make so many.
        minutes: Train so long.
        steps: Train so many steps: the same result each time.
        checkpoint: Keep the training there; the same command goes on from it.
        out: File to write.
    """

    weights: str | None = option(
        None, MODEL, metavar="FILE", show_default="those that the report beside FILE names, else random"
    )
    minutes: float | None = option(None, TRAINING, metavar="M", show_default="5, unless --steps is given")
    steps: int | None = option(None, TRAINING, metavar="N")
    checkpoint: Path | None = option(None, TRAINING, metavar="FILE")
    out: Path | None = option(None, OUTPUT, metavar="FILE", show_default="recovered.safetensors beside FILE")

    @property
    def target(self) -> Path:
        """The file to write."""
        return self.out or self.file.with_name("recovered.safetensors")


@dataclass(frozen=True, kw_only=True)
class Exporting(PrunedFile, Weighted):
    """What is written for other runtimes, and how.

    Attributes:
        file: A model.safetensors of ss-prune prune; or a MODEL as there, which is exported as it is.
        format: onnx, openvino, or pt2 (torch.export).
        int8: Compute in eight bits (onnx, pt2). Ranges come from --calibration.
        calibration: Images for --int8: a folder with images anywhere below it, without labels, or synthetic (made from
            the model's batch norms).
        calibration_images: Take so many of them at most, drawn at random.
        out: File to write.
    """

    format: str | None = option(
        None, OUTPUT, metavar="onnx|openvino|pt2", show_default="by the name of --out"
    )
    int8: bool = option(False, OUTPUT, "--int8", metavar="")
    calibration: str | None = option(None, IMAGES, metavar="synthetic|DIR")
    calibration_images: int | None = option(
        None, IMAGES, "--calibration-images", metavar="N", show_default="512; synthetic: up to 256", min=1
    )
    out: Path | None = option(None, OUTPUT, metavar="FILE", show_default="beside the model")

    @property
    def is_pruned(self) -> bool:
        """Whether a file was given (or the folder that holds it, which is refused), not the name of a model."""
        return self.file.suffix == ".safetensors" or self.file.exists()


@dataclass(frozen=True, kw_only=True)
class Compared(Rebuilt, Labelled):
    """The files that are measured, and the images that their outputs are compared on.

    Attributes:
        files: A model.safetensors of ss-prune prune (dense and pruned are measured), exported files (.onnx, .xml), or
            both; the others are compared with the first.
        weights: The dense model's trained weights: then its outputs are compared, too.
        images: Measure accuracy on so many of the images, drawn at random.
        photos: Compare outputs on images of this folder and all below it, without labels.
    """

    files: list[Path] = argument("FILE...")
    weights: str | None = option(None, MODEL, metavar="FILE", show_default="random")
    images: int | None = option(None, IMAGES, metavar="N", show_default="all", min=1)
    photos: Path | None = option(None, IMAGES, metavar="DIR", show_default="those of --data, else noise")

    @property
    def exported(self) -> list[Path]:
        """The files for other runtimes."""
        return [file for file in self.files if file.suffix in RUNTIMES]

    def pruned(self) -> Path | None:
        """The file of ours, if there is one."""
        ours = [file for file in self.files if file.suffix not in RUNTIMES]
        if len(ours) > 1:
            raise InputError(
                f"of files that are not exported one at a time is measured, not {len(ours)}: export the others "
                "(ss-prune export FILE --format onnx)."
            )
        if not ours and self.weights:
            raise InputError("--weights belong to a model.safetensors: exported files hold their own.")
        return ours[0] if ours else None


@dataclass(frozen=True)
class Timed:
    """The settings in which dense and pruned are measured.

    Attributes:
        batch: Images at a time, one or several.
        dtype: Number types: float32, bf16, float16.
        layout: Memory layouts: contiguous, channels_last.
        compiled: Also by torch.compile.
        threads: Threads of the CPU.
        device: Compute there: cpu, cuda:0.
    """

    batch: str = option("1", IMAGES, metavar="N,N,N")
    dtype: str = option("float32", SETTING, metavar="NAME,NAME")
    layout: str = option("contiguous", SETTING, metavar="NAME,NAME")
    compiled: bool = option(False, SETTING, "--compiled", metavar="")
    threads: int | None = option(None, OUTPUT, metavar="N", show_default="torch's own", min=1)
    device: str | None = option(None, OUTPUT, show_default="a GPU if any")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What is said of the strengths, and where it goes.

    Attributes:
        statistics: Where the variance of the channels comes from: batchnorm (the paper), gaussian (the model run on its
            own noise) or data (the images).
        weakest: How many of the weakest synapses to list.
        out: Write all strengths (.safetensors) or the summary (.json).
    """

    statistics: config.Statistics = option("batchnorm", CRITERION, metavar=None)
    weakest: int = option(10, OUTPUT, metavar="N", min=0)
    out: Path | None = option(None, OUTPUT, metavar="FILE")
    as_json: Json = False


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Two reports, and where their comparison goes.

    Attributes:
        a: A report.json, or the folder that holds it.
        b: The one to compare with it.
        html: Write one self-contained page there.
    """

    a: Path = argument("A")
    b: Path = argument("B")
    html: Path | None = option(None, OUTPUT, metavar="FILE")
    as_json: Json = False
