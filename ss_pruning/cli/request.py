"""What a user asks for on the command line: each field is an option, see `ss_pruning.cli.grouped`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ss_pruning import config
from ss_pruning.cli import options as option
from ss_pruning.errors import InputError

#: The importance by default, with options of its own.
SYNAPTIC = "synaptic"
#: What calibration images may be, besides those of a folder: of the data, or made from the model.
DATA, SYNTHETIC = "data", "synthetic"


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images with labels, and how they become what a model takes."""

    data: option.DataPlace = None
    input_size: option.InputSize = None
    mean: option.Mean = None
    std: option.Std = None
    device: option.Device = None


@dataclass(frozen=True, kw_only=True)
class Calibrated(Images):
    """Which of the images are evaluated on, and which are calibrated on."""

    images: option.Images = None
    calibration: option.CalibrationOption = None
    calibration_images: option.CalibrationImages = None

    @property
    def photos(self) -> Path | None:
        """The folder of calibration images, if that is what was given."""
        return None if self.calibration in (None, DATA, SYNTHETIC) else Path(str(self.calibration))


@dataclass(frozen=True, kw_only=True)
class Source(Images):
    """A model and the images that belong to it."""

    model: option.Model
    weights: option.Weights = None
    weights_by_order: option.ByOrder = False
    seed: option.Seed = 0


@dataclass(frozen=True, kw_only=True)
class Request(Source, Calibrated):
    """What is to be pruned, and on which images that is judged and calibrated."""

    batch: option.Batch = 1
    ignore: option.Ignore = None


@dataclass(frozen=True)
class Budgets:
    """Exactly one of them is given."""

    macs: option.Macs = None
    params: option.Params = None
    ratio: option.Ratio = None
    latency: option.Latency = None

    def given(self) -> dict[str, float]:
        """By name.

        Raises:
            InputError: None or several were given.
        """
        chosen = {name: value for name, value in vars(self).items() if value is not None}
        if len(chosen) != 1:
            listed = " and ".join(f"--{name}" for name in chosen) or "none"
            raise InputError(
                f"give exactly one of --macs, --params, --latency and --ratio; {listed} was given. "
                "For example, --macs 0.8 keeps 80 % of the multiply-accumulates."
            )
        return chosen


@dataclass(frozen=True)
class Method:
    """What decides which channels go, and what is done about it."""

    importance: option.Criterion = SYNAPTIC
    compensation: option.CompensationOption = "none"
    recalibrate: option.Recalibrate = None

    @property
    def repair(self) -> config.Compensation:
        """The compensation, with its own default for what was not said."""
        kind = config.COMPENSATIONS[self.compensation]
        return kind() if self.recalibrate is None else kind(recalibrate=self.recalibrate)

    def check(self, synaptic: config.Synaptic) -> None:
        """Refuse options of synaptic strength beside another importance.

        Raises:
            InputError: Names the first.
        """
        given = [name for name, value in vars(synaptic).items() if value is not None]
        if given and self.importance != SYNAPTIC:
            raise InputError(f"--{given[0]} belongs to --importance synaptic, not to {self.importance}.")


@dataclass(frozen=True)
class Output:
    """Where the result goes."""

    out: option.OutFolder = None
    as_json: option.Json = False


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """How the model of a file is built, and images become its inputs."""

    model: option.Architecture = None
    input_size: option.InputSize = None
    mean: option.Mean = None
    std: option.Std = None


@dataclass(frozen=True, kw_only=True)
class PrunedFile(Rebuilt):
    """A file that `ss-prune prune` has written."""

    file: option.File


@dataclass(frozen=True, kw_only=True)
class Recovering(PrunedFile, Calibrated):
    """What is recovered, on which images, for how long, and where it goes."""

    weights: option.Weights = None
    minutes: option.Minutes = None
    steps: option.Steps = None
    checkpoint: option.Checkpoint = None
    out: option.RecoveredFile = None

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
        own = {field.name: getattr(self, field.name) for field in fields(Calibrated)}
        own["input_size"] = self.input_size or known.get("input size")
        request = Request(model=spec, weights=self.weights or known.get("weights"), seed=seed, **own)
        if random_weights(request):
            raise InputError(
                "the dense model's weights are what is imitated, and no report beside the file says where they are: "
                "give --weights"
            )
        return request


@dataclass(frozen=True, kw_only=True)
class Exporting(PrunedFile):
    """What is written for other runtimes, and how."""

    file: option.FileOrModel
    weights: option.Weights = None
    format: option.ExportFormat = None
    int8: option.Int8 = False
    calibration: option.Int8Calibration = None
    calibration_images: option.Int8Images = None
    out: option.ExportOut = None

    @property
    def is_pruned(self) -> bool:
        """Whether a file was given, not the name of a model."""
        return self.file.suffix == ".safetensors" or self.file.is_file()

    def target(self) -> Path:
        """The file to write.

        Raises:
            InputError: It is not clear what to write, or an option goes with another one only.
        """
        if self.int8 and self.format not in (None, "onnx"):
            raise InputError("--int8 writes onnx: leave --format out.")
        if self.int8 and self.calibration is None:
            raise InputError(
                "--int8 takes the ranges of activations from images without labels: say where they are with "
                "--calibration DIR, or make some with --calibration synthetic."
            )
        if not self.int8 and self.calibration is not None:
            raise InputError("--calibration belongs to --int8: give both, or none.")
        if self.weights is not None and self.is_pruned:
            raise InputError(f"{str(self.file)!r} holds its own weights: leave --weights out.")
        if self.out is not None:
            return self.out
        if not self.int8 and self.format not in ("onnx", "pt2"):
            raise InputError("say what to write: --format onnx, --format pt2, or --out with such an ending.")
        if not self.is_pruned:
            raise InputError("say where to write: --out FILE.")
        return self.file.with_suffix(".int8.onnx" if self.int8 else f".{self.format}")


@dataclass(frozen=True, kw_only=True)
class Compared(Rebuilt):
    """The files that are measured, and the images that their outputs are compared on."""

    files: option.Measured
    weights: option.DenseWeights = None
    data: option.DataPlace = None
    images: option.Images = None
    photos: option.Photos = None

    @property
    def exported(self) -> list[Path]:
        """The files for other runtimes."""
        return [file for file in self.files if file.suffix == ".onnx"]

    def pruned(self) -> Path | None:
        """The file of ours, if there is one.

        Raises:
            InputError: There are several, or weights without one.
        """
        ours = [file for file in self.files if file.suffix != ".onnx"]
        if len(ours) > 1:
            raise InputError(
                f"of files that are no .onnx one at a time is measured, not {len(ours)}: export the others "
                "(ss-prune export FILE --format onnx)."
            )
        if not ours and self.weights:
            raise InputError("--weights belong to a model.safetensors: files in ONNX hold their own.")
        return ours[0] if ours else None


@dataclass(frozen=True)
class Timed:
    """The settings in which dense and pruned are measured."""

    batch: option.Batches = "1"
    dtype: option.Dtypes = "float32"
    layout: option.Layouts = "contiguous"
    compiled: option.Compiled = False
    threads: option.Threads = None
    device: option.Device = None


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What is trained, on which images, and where it goes."""

    model: option.ModelOrFile
    data: option.TrainingData
    weights: option.StartingWeights = None
    out: option.FinetuningFolder = Path("runs/finetune")
    export: option.FinetuningExport = None
