"""The run: epochs of training, pruning in between, a checkpoint after each, the result as a file of ours.

Start it again, or let torchrun restart it, and it goes on from the last epoch, with as many processes as you like: the
order of the images and what is done to each depend on seed and epoch alone. The folder of results has to be visible to
all processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DataLoaderConfiguration, broadcast
from rich.progress import track
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import ss_pruning
from ss_pruning._utils.copying import copied
from ss_pruning._utils.files import make_writable_folder, replacing, write_text
from ss_pruning.errors import InputError, ModelError
from ss_pruning.integrations.finetuning.inputs import (
    check_outputs,
    dense_model,
    loaders,
    preprocess_of,
    spec_of,
    starting_model,
    with_file_opened,
)
from ss_pruning.integrations.finetuning.options import Options
from ss_pruning.io.distributed import check_agreement, fingerprint, sparsify_
from ss_pruning.sources.accuracy import batches
from ss_pruning.sources.models import build_model
from ss_pruning.sparsity.masks import mask_, masks_of, merge_masks_, zero_masks
from ss_pruning.sparsity.penalty import StrengthPenalty, warm_up


class Run:
    """All that training changes: what a checkpoint holds, and how it gets back there."""

    def __init__(
        self, options: Options, accelerator: Accelerator, model: nn.Module, spec: str, steps: int
    ) -> None:
        self.options, self.accelerator, self.spec, self.steps = options, accelerator, spec, steps
        self.model = model.to(accelerator.device)
        self.example = torch.zeros(1, *preprocess_of(options, spec, model).size, device=accelerator.device)
        self.sparsified, self.plan = False, ss_pruning.Plan()
        self.teacher: nn.Module | None = None
        self.imitation: ss_pruning.ImitationLoss | None = None
        self.hooks = contextlib.ExitStack()
        self.log: list[dict[str, float]] = []
        if options.keep_zeros:
            mask_(self.model, zero_masks(self.model))
        self.ema = ModelEmaV3(self.model, decay=options.ema, use_warmup=True)

    def wrap(self) -> None:
        """Build what belongs to this set of parameters: optimiser, penalty and the model for all processes."""
        options = self.options
        check_agreement(self.model)
        try:
            optimizer = create_optimizer_v2(
                self.model, opt=options.opt, lr=options.rate, weight_decay=options.weight_decay
            )
        except (ValueError, AssertionError) as error:
            known = "timm.optim.list_optimizers() names those that there are"
            raise InputError(f"--opt {options.opt}: {error}; {known}") from error
        wanted = options.penalty and not self.sparsified
        self.penalty = StrengthPenalty(self.model, self.example, form=options.form) if wanted else None
        if self.teacher is not None:
            loss = ss_pruning.ImitationLoss(self.model, self.teacher, self.example, self.everywhere)
            self.imitation = self.hooks.enter_context(loss)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)

    def unwrap(self) -> None:
        """Undo `wrap`: the bare model remains, its forward without mixed precision."""
        self.model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.penalty = None
        self.imitation = None
        self.hooks.close()
        self.wrapped, self.optimizer = self.accelerator.free_memory(self.wrapped, self.optimizer)

    def sparsify(self) -> None:
        """Mask the weakest synapses, cut channels to the budget, in all processes alike. The dense model is kept."""
        options, models = self.options, (self.model, self.ema.module)
        if options.distill and options.teacher is None:
            self.teacher = copied(self.model).requires_grad_(False).eval()
            dense = self.teacher
            self.on_first(lambda: ss_pruning.save(dense, options.out / "dense.safetensors", self.spec))
        self.plan = sparsify_(
            models,
            self.example,
            sparsity=options.sparsity or None,
            planned=self.planned if options.cuts else None,
            keep_zeros=options.keep_zeros,
        )
        if options.cuts and self.accelerator.num_processes > 1:
            digest = fingerprint(self.model).hex()[:16]
            # In one piece with the end of the line: torchrun has processes write unbuffered, to one pipe.
            print(f"process {self.accelerator.process_index} was cut to {digest}\n", end="", flush=True)
        self.sparsified = True

    def planned(self) -> ss_pruning.Plan:
        """Which channels stay."""
        options, allocation = self.options, ss_pruning.Allocation(round_to=self.options.round_to)
        budget = {"latency": options.latency} if options.latency else {"macs": options.macs}
        plan, report = ss_pruning.plan(self.model, self.example, allocation=allocation, **budget)
        self.say(f"pruned: {report.macs_before:,} -> {report.macs_after:,} multiply-accumulates")
        return plan

    def save(self) -> None:
        """One file, whole or not at all, that `restore` reads; it holds the plan and the masks."""
        state = {
            "recipe": self.options.recipe(),
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
                write_checkpoint(state, temporary)
            write_text(self.options.out / "log.json", json.dumps(self.log, indent=2) + "\n")

        self.on_first(write)

    def restore(self) -> None:
        """Go on where the last whole epoch ended, if there is one: first the shapes, then what fills them."""
        path = self.options.out / "last.pt"
        if not path.is_file():
            self.wrap()
            return
        saved = read_checkpoint(path)
        if saved["recipe"] != self.options.recipe():
            raise InputError(f"'{path}' is of a run with other options: choose another --out, or delete it")
        self.sparsified, self.plan, self.log = (
            saved["sparsified"],
            self.plan.from_json(saved["plan"]),
            saved["log"],
        )
        for model, name in ((self.model, "model"), (self.ema.module, "ema")):
            self.plan.apply_(merge_masks_(model))
            mask_(model, saved["masks"]).load_state_dict(saved[name])
        if self.sparsified and self.options.distill and self.options.teacher is None:
            self.teacher = ss_pruning.load(
                self.options.out / "dense.safetensors", lambda: build_model(self.spec)
            ).to(self.accelerator.device)
        self.wrap()
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.say(f"going on after epoch {len(self.log)}")

    def everywhere(self, total: Tensor) -> Tensor:
        """A number, added up over all processes."""
        added: Tensor = self.accelerator.reduce(total, "sum")
        return added

    def on_first(self, write: Callable[[], object]) -> None:
        """Let the first process write, and the others wait for it."""
        if self.accelerator.is_main_process:
            write()
        self.accelerator.wait_for_everyone()

    def say(self, text: str) -> None:
        """Print it in the first process."""
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
        extra: Tensor | float = 0.0
        if self.penalty:
            extra = options.penalty * warm_up(step, self.steps * options.penalty_warm_up) * self.penalty()
        self.accelerator.backward(loss + extra)
        self.optimizer.step()
        self.ema.update(self.model, step + 1)
        return loss.detach()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, mixed with the distance to the dense model's feature maps."""
        outputs = self.wrapped(images).float()
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.options.smoothing)
        if self.imitation is None:
            return loss
        with self.accelerator.autocast():
            distance = self.imitation()
        return (1 - self.options.distill) * loss + self.options.distill * distance

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
        return track(batches(loader), what, total=len(loader), disable=not shown, transient=True)


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, but a full disk is an OSError as everywhere, not an error that names positions."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read_checkpoint(path: Path) -> Any:
    """What `Run.save` has written.

    Raises:
        InputError: It is damaged, or something else.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = isinstance(saved, dict) and saved.keys() >= {"recipe", "plan", "masks", "model", "log"}
        why = "" if found else "it holds something else"
    except Exception as error:  # torch has one for each way in which a file can be damaged
        why = f"{type(error).__name__}: {error}"[:200]
    if why:
        raise InputError(
            f"'{path}' is no checkpoint of a run, or damaged ({why}): delete it to begin anew, or choose another --out"
        )
    return saved


def cosine(step: int, steps: int, rising: int) -> float:
    """What the rate is multiplied with: up to 1 in a line, then down to 0 as half a cosine."""
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def start(options: Options, accelerator: Accelerator) -> tuple[Run, DataLoader[Any], DataLoader[Any]]:
    """The run, at its last checkpoint if there is one, and the images to train on and to test."""
    accelerator.print(f"{accelerator.num_processes} process(es), {accelerator.device}", flush=True)
    if accelerator.is_main_process:
        make_writable_folder(options.out)
    if options.batch % accelerator.num_processes:
        raise InputError(
            f"--batch {options.batch} cannot be shared evenly by {accelerator.num_processes} processes"
        )
    spec = spec_of(options)
    model = starting_model(options, spec)
    train, val = accelerator.prepare(*loaders(options, preprocess_of(options, spec, model)))
    here = Run(options, accelerator, model, spec, len(train))
    check_outputs(here.model, here.example, options.data)
    if options.teacher is not None:
        teacher = dense_model(options, spec, options.teacher)
        here.teacher = teacher.to(accelerator.device).requires_grad_(False)
    here.restore()
    return here, train, val


def run(options: Options, accelerator: Accelerator) -> list[dict[str, float]]:
    """Train through all epochs that are left; returns the log by epoch."""
    here, train, val = start(options, accelerator)
    board: Any = None
    if accelerator.is_main_process:
        board = SummaryWriter(options.out / "tensorboard", purge_step=len(here.log) + 1)
    while len(here.log) < options.epochs:
        due = options.prunes and len(here.log) == (options.prune_epoch or 0)
        if due and not here.sparsified:
            here.unwrap()
            here.sparsify()
            here.wrap()
        entry = here.train_epoch(train)
        here.log.append({"epoch": len(here.log) + 1, **entry, "top1": here.accuracy(val)})
        here.save()
        here.say(", ".join(f"{name} {value:.4g}" for name, value in here.log[-1].items()))
        for name, value in here.log[-1].items() if board else ():
            board.add_scalar(name, value, len(here.log))
    if board:
        board.close()
    final = options.out / "final.safetensors"
    here.on_first(lambda: ss_pruning.save(merge_masks_(here.ema.module), final, here.spec))
    here.say(f"averaged weights written: {final}")
    if options.export:
        target = final.with_suffix(f".{options.export}")
        model = here.ema.module.cpu().eval()
        here.on_first(lambda: ss_pruning.export(model, target, here.example.cpu(), options.export))
        here.say(f"exported: {target}")
    return here.log


def finetune(options: Options) -> list[dict[str, float]]:
    """Fine-tune in as many processes as the launcher has started; returns the log by epoch.

    Raises:
        InputError: The options, the images or the weights do not fit.
        ModelError: The loss is not finite.
    """
    accelerator = Accelerator(
        cpu=options.cpu or not torch.accelerator.is_available(),
        mixed_precision=options.amp,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=1))],  # the others wait for the plan
    )
    try:
        return run(with_file_opened(options), accelerator)
    finally:
        accelerator.end_training()
