"""Train or fine-tune a timm model on folders of images, towards sparse synapses, through pruning, in one or many processes.

    python examples/finetune_timm.py resnet50 --weights resnet50.safetensors --data photos --macs 0.5 --epochs 30
    accelerate launch --num_processes 8 --mixed_precision bf16 examples/finetune_timm.py resnet50 ...
    torchrun --nproc-per-node 8 --max-restarts 3 examples/finetune_timm.py resnet50 ...

`--data` holds train/CLASS/* and val/CLASS/*. Three ways to use it:

    prune at once, then fine-tune, taught by the dense net:   --macs 0.5 --prune-epoch 0 --distil 0.5
    train towards sparse synapses, prune, go on:              --penalty 1e-4 --prune-epoch 20 --sparsity 0.6 --macs 0.7
    fine-tune what ss-prune or another run has pruned:        --weights pruned.safetensors

Every epoch ends with a checkpoint in --out. Start the same command again, or let torchrun restart it, and it goes on from
there, with as many processes as you like: the order of the images and what is done to each depend on seed and epoch
alone. --out has to be visible to all processes. TensorBoard: tensorboard --logdir OUT. Needs ss-pruning[train].
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sized
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast
from rich.progress import track
from safetensors import SafetensorError, safe_open
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

import ss_pruning
from ss_pruning._atomic import make_writable_folder, replacing, write_text
from ss_pruning.cloning import copied
from ss_pruning.data import Preprocess
from ss_pruning.distributed import broadcast_plan, check_agreement
from ss_pruning.errors import InputError, ModelError, SSPruningError
from ss_pruning.layers import kernel_powers
from ss_pruning.masks import mask_, masks_of, merge_masks_, synapse_masks
from ss_pruning.models import build_model, input_of
from ss_pruning.preprocessing import transform
from ss_pruning.sparsity import StrengthPenalty, warm_up
from ss_pruning.strength import synaptic_paths
from ss_pruning.surgery import PLAN_ATTRIBUTE

Options = argparse.Namespace
#: What may change between a run and its continuation.
ELSEWHERE = ("out", "workers", "cpu", "data")
TEMPERATURE = 2.0


# ---------------------------------------------------------------- images


class Draws(Sampler[int]):
    """The images of an epoch in random order, each as a number that also says which epoch it is drawn for."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed, self.epoch = images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.images, generator=generator)
        return iter((order + self.epoch * self.images).tolist())


class Augmented(Dataset[Any]):
    """Images by the numbers of `Draws`: what chance does to one depends on seed and number, not on who loads it."""

    def __init__(self, folder: ImageFolder, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, draw: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.seed + draw)
            return self.folder[draw % len(self.folder)]


def loaders(options: Options, preprocess: Preprocess) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches for all processes together: `Accelerator(split_batches=True)` gives each its part."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocess.size[1:],
                scale=(options.crop, 1),
                interpolation=InterpolationMode(preprocess.interpolation),
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    train, val = (
        ImageFolder(str(options.data / part), change)
        for part, change in (("train", augment), ("val", transform(preprocess)))
    )
    if train.classes != val.classes:
        raise InputError(f"'{options.data}' has other classes in train than in val")
    if len(train) < options.batch:
        raise InputError(f"{len(train)} images are less than one batch: lower --batch {options.batch}")
    shared = {
        "batch_size": options.batch,
        "num_workers": options.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    draws = Draws(len(train), options.seed)
    return (
        DataLoader(Augmented(train, options.seed), sampler=draws, drop_last=True, **shared),
        DataLoader(val, **shared),
    )


# ---------------------------------------------------------------- models


def spec_of(options: Options, classes: int) -> str:
    """The architecture as `ss_pruning.load` takes it, with an output for each class."""
    name = options.model if ":" in options.model else f"timm:{options.model}"
    return name if "num_classes=" in name else f"{name},num_classes={classes}"


def dense_model(options: Options, spec: str, weights: Path | None) -> nn.Module:
    """The architecture, with a new classifier where the weights are of other classes."""
    classes = int(spec.rpartition("=")[2])
    if weights is None:
        return build_model(spec)
    name = options.model if ":" in options.model else f"timm:{options.model}"
    model = build_model(name, weights)
    if getattr(model, "num_classes", classes) != classes:
        model.reset_classifier(classes)  # type: ignore[operator]
    return model


def starting_model(options: Options, spec: str) -> nn.Module:
    """From plain weights, from a file of ss_pruning (pruned, perhaps), or from nothing."""
    torch.manual_seed(options.seed)
    if options.weights is not None and is_ours(options.weights):
        return ss_pruning.load(options.weights, lambda: build_model(spec))
    return dense_model(options, spec, options.weights)


def is_ours(path: Path) -> bool:
    """True for a file that `ss_pruning.save` has written."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return "ss_pruning" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def zeros_of(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Masks that keep all kernels zero that are zero now."""
    paths = synaptic_paths(ss_pruning.trace(model, example))
    alive = {path: kernel_powers(model.get_submodule(path)).detach() > 0 for path in paths}
    return {path: mask for path, mask in alive.items() if not mask.all()}


# ---------------------------------------------------------------- training


class Run:
    """All that training changes: what a checkpoint holds, and how it gets back there."""

    def __init__(
        self, options: Options, accelerator: Accelerator, model: nn.Module, spec: str, steps: int
    ) -> None:
        self.options, self.accelerator, self.spec, self.steps = options, accelerator, spec, steps
        self.model = model.to(accelerator.device)
        self.example = torch.zeros(1, *input_size(options, spec, model), device=accelerator.device)
        self.sparsified, self.plan = False, ss_pruning.Plan()
        self.teacher: nn.Module | None = None
        self.log: list[dict[str, float]] = []
        if options.keep_zeros:
            mask_(self.model, zeros_of(self.model, self.example))
        self.ema = ModelEmaV3(self.model, decay=options.ema, use_warmup=True)

    def wrap(self) -> None:
        """Build what belongs to this set of parameters: optimiser, penalty and the model for all processes."""
        options = self.options
        check_agreement(self.model)
        optimizer = create_optimizer_v2(
            self.model, opt=options.opt, lr=options.rate, weight_decay=options.weight_decay
        )
        wanted = options.penalty and not self.sparsified
        self.penalty = StrengthPenalty(self.model, self.example, form=options.form) if wanted else None
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def unwrap(self) -> None:
        """Undo `wrap`: the bare model remains, its forward without mixed precision."""
        self.model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.penalty = None
        self.wrapped, self.optimizer = self.accelerator.free_memory(self.wrapped, self.optimizer)

    def sparsify(self) -> None:
        """Mask the weakest synapses, cut channels to the budget, in all processes alike. The dense net is kept."""
        options, models = self.options, (self.model, self.ema.module)
        if options.distil and options.teacher is None:
            self.teacher = copied(self.model).requires_grad_(False).eval()
            self.on_first(lambda: ss_pruning.save(self.teacher, options.out / "dense.safetensors", self.spec))
        for model in models:
            merge_masks_(model)
        if options.sparsity:
            masks = synapse_masks(self.scores(), fraction=options.sparsity)
            for model in models:
                merge_masks_(mask_(model, masks))
        if options.macs:
            self.plan = broadcast_plan(self.planned)
            for model in models:
                check_agreement(model)
                self.plan.apply_(model)
                check_agreement(model)
        if options.sparsity or options.keep_zeros:
            masks = zeros_of(self.model, self.example)
            for model in models:
                mask_(model, masks)
        self.sparsified = True

    def scores(self) -> dict[str, Tensor]:
        """Strengths of all synapses but those of first layers and classifiers."""
        strengths = ss_pruning.synaptic_strength(self.model, self.example)
        return {path: strengths[path] for path in StrengthPenalty(self.model, self.example).paths}

    def planned(self) -> ss_pruning.Plan:
        """Which channels stay; found on a copy."""
        twin = copied(self.model)
        vars(twin).pop(PLAN_ATTRIBUTE, None)  # of an earlier cut: only what comes on top is wanted
        report = ss_pruning.prune_(twin, self.example, macs=self.options.macs, round_to=self.options.round_to)
        self.say(f"pruned: {report.macs_before:,} -> {report.macs_after:,} multiply-accumulates")
        plan: ss_pruning.Plan = getattr(twin, PLAN_ATTRIBUTE)
        return plan

    def save(self) -> None:
        """One file, whole or not at all, that `restore` reads; it holds the plan and the masks."""
        state = {
            "recipe": recipe(self.options),
            "sparsified": self.sparsified,
            "plan": self.plan.to_json(),
            "masks": masks_of(self.model),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "log": self.log,
        }

        def write() -> None:
            with replacing(self.options.out / "last.pt") as temporary:
                torch.save(state, temporary)
            write_text(self.options.out / "log.json", json.dumps(self.log, indent=2) + "\n")

        self.on_first(write)

    def restore(self) -> None:
        """Go on where the last whole epoch ended, if there is one: first the shapes, then what fills them."""
        path = self.options.out / "last.pt"
        if not path.is_file():
            self.wrap()
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["recipe"] != recipe(self.options):
            raise InputError(f"'{path}' is of a run with other options: choose another --out, or delete it")
        self.sparsified, self.plan, self.log = (
            saved["sparsified"],
            self.plan.from_json(saved["plan"]),
            saved["log"],
        )
        for model, name in ((self.model, "model"), (self.ema.module, "ema")):
            self.plan.apply_(merge_masks_(model))
            mask_(model, saved["masks"]).load_state_dict(saved[name])
        if self.sparsified and self.options.distil and self.options.teacher is None:
            self.teacher = ss_pruning.load(self.options.out / "dense.safetensors").to(self.accelerator.device)
        self.wrap()
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.say(f"going on after epoch {len(self.log)}")

    def on_first(self, write: Any) -> None:
        """Let the first process write, and the others wait for it."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()

    def say(self, text: str) -> None:
        self.accelerator.print(text, flush=True)

    # ------------------------------------------------------------ steps

    def train_epoch(self, loader: DataLoader[Any]) -> dict[str, float]:
        """One pass over the images; the mean loss of all processes, penalty aside, and the penalty at the end."""
        epoch = len(self.log)
        loader.set_epoch(epoch)  # type: ignore[attr-defined]
        # dropout and the like: another draw in each process, the same after a resume
        torch.manual_seed(1_000_003 * self.options.seed + 1009 * epoch + self.accelerator.process_index)
        self.wrapped.train()
        for module in self.wrapped.modules() if self.options.freeze_norms else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        total = torch.zeros((), device=self.accelerator.device)
        for number, (images, labels) in enumerate(self.watched(loader, f"epoch {epoch + 1}")):
            total += self.step(images, labels, epoch * self.steps + number)
        self.share_buffers()
        loss = self.accelerator.reduce(total / self.steps, "mean").item()
        if not math.isfinite(loss):
            raise ModelError(f"the loss is {loss} in epoch {epoch + 1}: lower --rate or --penalty")
        return {"loss": loss, "penalty": self.penalty().item() if self.penalty else 0.0}

    def step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """One step of the optimiser; returns the loss without the penalty."""
        options = self.options
        rate = options.rate * cosine(step, self.steps * options.epochs, self.steps * options.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad()
        loss = self.loss(images, labels)
        extra = 0.0
        if self.penalty:
            extra = options.penalty * warm_up(step, self.steps * options.penalty_warm_up) * self.penalty()
        self.accelerator.backward(loss + extra)
        self.optimizer.step()
        self.ema.update(self.model, step + 1)
        return loss.detach()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, mixed with the distance to what the dense net says."""
        outputs = self.wrapped(images).float()
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.options.smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(images).float()
        logs = [F.log_softmax(scores / TEMPERATURE, 1) for scores in (outputs, wanted)]
        distance = F.kl_div(*logs, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return (1 - self.options.distil) * loss + self.options.distil * distance

    def share_buffers(self) -> None:
        """Each process has seen other images in its last step: the statistics of the first one count."""
        for model in (self.model, self.ema.module):
            for buffer in model.buffers():
                broadcast(buffer)

    @torch.no_grad()
    def accuracy(self, loader: DataLoader[Any]) -> float:
        """Top-1 of the averaged weights, in %, over the images of all processes."""
        right = seen = 0
        for images, labels in self.watched(loader, "accuracy"):
            with self.accelerator.autocast():
                correct = self.ema.module(images).argmax(1) == labels
            gathered = self.accelerator.gather_for_metrics(correct)
            right, seen = right + int(gathered.sum()), seen + len(gathered)
        return 100 * right / seen

    def watched(self, loader: DataLoader[Any], what: str) -> Any:
        """The batches, with a progress bar in the first process if it has a terminal."""
        shown = self.accelerator.is_main_process and sys.stderr.isatty()
        assert isinstance(loader, Sized)
        return track(loader, what, total=len(loader), disable=not shown, transient=True)


def cosine(step: int, steps: int, rising: int) -> float:
    """What the rate is multiplied with: up to 1 in a line, then down to 0 as half a cosine."""
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def recipe(options: Options) -> dict[str, Any]:
    """The options that decide what comes out."""
    kept = {name: value for name, value in vars(options).items() if name not in ELSEWHERE}
    return {name: str(value) if isinstance(value, Path) else value for name, value in kept.items()}


def input_size(options: Options, spec: str, model: nn.Module) -> tuple[int, int, int]:
    return preprocess_of(options, spec, model).size


def preprocess_of(options: Options, spec: str, model: nn.Module) -> Preprocess:
    """The input that the model was made for, in the asked size."""
    found = input_of(spec, model)
    if not options.size:
        return found
    size = (found.size[0], options.size, options.size)
    return Preprocess(size, found.mean, found.std, found.crop, found.interpolation)


def run(options: Options, accelerator: Accelerator) -> list[dict[str, float]]:
    """Train through all epochs that are left; returns the log by epoch."""
    accelerator.print(f"{accelerator.num_processes} process(es), {accelerator.device}", flush=True)
    if accelerator.is_main_process:
        make_writable_folder(options.out)
    if not (options.data / "train").is_dir() or not (options.data / "val").is_dir():
        raise InputError(
            f"'{options.data}' needs two folders, train and val, with a folder of images for each class"
        )
    spec = spec_of(options, sum(entry.is_dir() for entry in (options.data / "train").iterdir()))
    model = starting_model(options, spec)
    train, val = loaders(options, preprocess_of(options, spec, model))
    here = Run(options, accelerator, model, spec, len(train))
    train, val = accelerator.prepare(train, val)
    if options.teacher is not None:
        here.teacher = (
            dense_model(options, spec, options.teacher).to(accelerator.device).requires_grad_(False)
        )
    here.restore()
    board = board_of(options, accelerator, len(here.log))
    while len(here.log) < options.epochs:
        if len(here.log) == options.prune_epoch and not here.sparsified:
            here.unwrap()
            here.sparsify()
            here.wrap()
        entry = here.train_epoch(train)
        here.log.append({"epoch": len(here.log) + 1, **entry, "top1": here.accuracy(val)})
        here.save()
        here.say(", ".join(f"{name} {value:.4g}" for name, value in here.log[-1].items()))
        for name, value in entry.items() if board else ():
            board.add_scalar(name, value, len(here.log))
        if board:
            board.add_scalar("top1", here.log[-1]["top1"], len(here.log))
    if board:
        board.close()
    final = options.out / "final.safetensors"
    here.on_first(lambda: ss_pruning.save(merge_masks_(here.ema.module), final, spec))
    here.say(f"averaged weights written: {final}")
    return here.log


def board_of(options: Options, accelerator: Accelerator, done: int) -> Any:
    """TensorBoard's writer in the first process, None in the others."""
    if not accelerator.is_main_process:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(options.out / "tensorboard", purge_step=done + 1)


# ---------------------------------------------------------------- command line


def arguments(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s MODEL --data FOLDER ...",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="name of a timm model, or a spec such as torchvision:resnet18"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument(
        "--weights", type=Path, help="where to start: weights, or a file of ss-prune; else random"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/finetune"), help="checkpoints and results [%(default)s]"
    )
    parser.add_argument("--size", type=int, help="side of the images [what the model was made for]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=4, help="loading processes, for each process [%(default)s]"
    )
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    add_training(parser.add_argument_group("training"))
    add_pruning(parser.add_argument_group("sparse training and pruning"))
    options = parser.parse_args(argv)
    prunes = options.macs or options.sparsity
    if options.prune_epoch is None:
        options.prune_epoch = 0 if prunes else -1
    if options.distil and not (prunes or options.teacher):
        parser.error(
            "--distil needs a dense net: prune in this run (--macs, --sparsity), or give --teacher WEIGHTS"
        )
    return options


def add_training(group: Any) -> None:
    group.add_argument("--epochs", type=int, default=30)
    group.add_argument(
        "--batch", type=int, default=128, help="images a step, of all processes together [%(default)s]"
    )
    group.add_argument(
        "--opt", default="sgd", help="any optimiser of timm: sgd, adamw, lamb, ... [%(default)s]"
    )
    group.add_argument("--rate", type=float, default=0.01, help="largest learning rate [%(default)s]")
    group.add_argument(
        "--warm-up", type=int, default=0, help="epochs in which the rate rises; then half a cosine"
    )
    group.add_argument(
        "--weight-decay", type=float, default=1e-4, help="not on norms and biases [%(default)s]"
    )
    group.add_argument("--smoothing", type=float, default=0.0, help="of the labels [%(default)s]")
    group.add_argument("--crop", type=float, default=0.35, help="smallest area that is cropped [%(default)s]")
    group.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights [%(default)s]")
    group.add_argument(
        "--freeze-norms", action="store_true", help="leave statistics of batch norms as they are"
    )
    group.add_argument(
        "--amp", choices=("no", "bf16", "fp16"), help="mixed precision [what accelerate is told]"
    )


def add_pruning(group: Any) -> None:
    group.add_argument(
        "--penalty", type=float, default=0.0, help="weight of the strengths in the loss, until pruned"
    )
    group.add_argument(
        "--form", choices=("strength", "share"), default="strength", help="see StrengthPenalty"
    )
    group.add_argument(
        "--penalty-warm-up", type=int, default=1, help="epochs in which it rises [%(default)s]"
    )
    group.add_argument("--prune-epoch", type=int, help="prune after so many epochs [0]")
    group.add_argument(
        "--sparsity", type=float, default=0.0, help="share of the synapses to mask; they stay 0"
    )
    group.add_argument(
        "--macs", type=float, default=0.0, help="share of the multiply-accumulates to keep: cuts channels"
    )
    group.add_argument("--round-to", type=int, help="widths are multiples of this")
    group.add_argument("--keep-zeros", action="store_true", help="kernels that are 0 in --weights stay 0")
    group.add_argument(
        "--distil", type=float, default=0.0, help="share of the loss that is distance to the dense net"
    )
    group.add_argument("--teacher", type=Path, help="its weights [the model as it is before it is pruned]")


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the others wait while the first one plans
    cpu = options.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(
        split_batches=True, cpu=cpu, mixed_precision=options.amp, kwargs_handlers=[patience]
    )
    try:
        run(options, accelerator)
    except SSPruningError as error:
        print(f"process {accelerator.process_index}: {error}", file=sys.stderr)
        return 2
    finally:
        accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
