"""What a fine-tuning run can be asked for; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ss_pruning.config import Allocation, Budget, check_seed
from ss_pruning.errors import InputError

#: What may change between a run and its continuation.
_ELSEWHERE = ("out", "workers", "cpu", "data", "export")
#: The smallest and the largest value of numbers that nobody else checks before the training begins.
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "batch", "size"), (1, math.inf)),
    **dict.fromkeys(("warm_up", "penalty_warm_up", "prune_epoch", "workers"), (0, math.inf)),
    **dict.fromkeys(("rate", "weight_decay", "penalty"), (0, math.inf)),
    **dict.fromkeys(("smoothing", "crop", "ema", "distill"), (0, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, on which images, and where it goes.

    Attributes:
        model: As for ss-prune prune, or a model.safetensors that it wrote. A bare word is a name of timm's.
        data: Folder with train/CLASS/* and val/CLASS/*.
        weights: Where to start: weights, or a file of ss-prune.
        out: Folder of checkpoints and results.
        export: Write the result for another runtime, too.
    """

    model: str
    data: Path
    weights: Path | None = None
    out: Path = Path("runs/finetune")
    export: Literal["onnx", "pt2"] | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """How weights are trained.

    Attributes:
        epochs: Passes over the training images.
        batch: Images a step, of all processes together.
        opt: Any optimiser of timm: sgd, adamw, lamb and so on.
        rate: Largest learning rate.
        warm_up: Epochs in which the rate rises; then it falls as half a cosine.
        weight_decay: Not on norms and biases.
        smoothing: Of the labels.
        crop: Smallest area that is cropped.
        ema: Decay of the averaged weights.
        freeze_norms: Leave statistics of batch norms as they are.
        amp: Mixed precision; by default what accelerate is told.
        distill: Share of the loss that is the imitation loss, distance to the dense model's feature maps.
        teacher: The dense model's weights; by default those of the model before this run prunes it.
        size: Side of the images; by default what the model was made for.
        workers: Loading processes, for each process.
        cpu: Leave accelerators alone.
        seed: Of everything random.
    """

    epochs: int = 30
    batch: int = 128
    opt: str = "sgd"
    rate: float = 0.01
    warm_up: int = 0
    weight_decay: float = 1e-4
    smoothing: float = 0.0
    crop: float = 0.35
    ema: float = 0.999
    freeze_norms: bool = False
    amp: Literal["no", "bf16", "fp16"] | None = None
    distill: float = 0.0
    teacher: Path | None = None
    size: int | None = None
    workers: int = 4
    cpu: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Sparsifying:
    """How and when the model becomes smaller.

    Attributes:
        penalty: Weight of the synaptic strengths in the loss, until the model is pruned.
        form: What of the strengths the penalty sums.
        penalty_warm_up: Epochs in which the penalty rises.
        prune_epoch: Prune after so many epochs; by default at once.
        sparsity: Share of the synapses to mask; they stay 0.
        macs: Share of the multiply-accumulates to keep: cuts channels.
        latency: Share of the time of a forward pass to keep, as measured here: cuts channels.
        round_to: Widths are multiples of this.
        keep_zeros: Kernels that are 0 in the weights stay 0.
    """

    penalty: float = 0.0
    form: Literal["strength", "share"] = "strength"
    penalty_warm_up: int = 1
    prune_epoch: int | None = None
    sparsity: float = 0.0
    macs: float | None = None
    latency: float | None = None
    round_to: int | None = None
    keep_zeros: bool = False


@dataclass(frozen=True, kw_only=True)
class Options(Sparsifying, Training, Task):
    """All of it.

    Raises:
        InputError: Options exclude or need each other.
    """

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (least <= value <= most and math.isfinite(value)):
                wanted = f"{least} or more" if most == math.inf else f"from {least} to {most}"
                raise InputError(f"--{name.replace('_', '-')} {value}: give a number, {wanted}")
        check_seed(self.seed)
        if self.macs is not None and self.latency is not None:
            raise InputError("give --macs or --latency, not both")
        if self.cuts:
            Budget.of(macs=self.macs, latency=self.latency)
        Allocation(round_to=self.round_to)
        if not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity {self.sparsity}: give a share, from 0 to less than 1")
        if self.prune_epoch is not None and self.prune_epoch >= self.epochs:
            raise InputError(
                f"--prune-epoch {self.prune_epoch} is never reached in --epochs {self.epochs}: give a smaller one"
            )
        if self.prune_epoch is not None and not self.prunes:
            raise InputError("--prune-epoch needs --macs, --latency or --sparsity")
        if self.distill and not (self.prunes or self.teacher):
            raise InputError(
                "--distill needs a dense model: prune in this run (--macs, --latency, --sparsity), or give --teacher "
                "WEIGHTS"
            )

    @property
    def cuts(self) -> bool:
        """Whether channels are cut."""
        return self.macs is not None or self.latency is not None

    @property
    def prunes(self) -> bool:
        """Whether the model becomes sparser or smaller in this run."""
        return self.cuts or bool(self.sparsity)

    def recipe(self) -> dict[str, Any]:
        """The options that decide what comes out."""
        kept = {name: value for name, value in asdict(self).items() if name not in _ELSEWHERE}
        return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}
