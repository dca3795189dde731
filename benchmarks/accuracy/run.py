"""How much accuracy is left after pruning: criteria x compensations x budgets x nets x seeds, on CIFAR-10.

Every run prunes a fresh net by `prune_(model, x, macs=..., importance=...)`: the same groups, the same search for the
budget, the same cut; only the scores differ, and how layers compete. Ours is what `prune_` does by default. Other
criteria rank all channels by their scores (the global scope), as Torch-Pruning does, and are run with scores as they
are (`cost_exponent=0`) and divided by the root of what a channel costs (0.5); the page shows the better one of each
cell. `--better-only` runs both for the first seed and the others for the better one, which is what the page would show.
Any criterion runs in another scope by its name: `"Magnitude L2:scope=sensitivity"`, `SynapticImportance:scope=global`;
ours with another weight of costs, too: `SynapticImportance:cost_exponent=0.25`.
The residual stream of the ResNets stays whole unless `--residual` is given. Calibration images (without labels) and
labelled images (for Taylor and Hessian) are drawn from the training images by the seed, 512 each; accuracy is that on
the test images. What no seed can change is run once. `--calibration none` gives no images to what does without: plain
cuts and `mean`; other criteria than ours take some for `mean` only if they are asked for by name: `--calibration real`.

    python -m benchmarks.accuracy.run --nets resnet20 --macs 0.7 0.5 --compensations none reconstruct
    python -m benchmarks.accuracy.run --compensations none mean --calibration none
    python -m benchmarks.accuracy.run --compensations mean --calibration real
    python -m benchmarks.accuracy.run --compensations mean linear --no-recalibrate
    python -m benchmarks.accuracy.run --nets resnet56 --macs 0.47 --finetune-images 25600
    python -m benchmarks.accuracy.run --better-only --device cuda --jobs 12
    python -m benchmarks.accuracy.run --criteria SynapticImportance SynapticImportance:conditional=1 --split train
    python -m benchmarks.accuracy.page

Each run adds a line to benchmarks/results/accuracy.jsonl; what is there by the same code and settings is not run
again, so a run that was killed goes on. `--jobs` runs several nets, criteria and compensations at a time, each in
the order of its seeds. `page` turns the lines into docs/accuracy.md. Choices are made on `--split train` only.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import io
import itertools
import sys
import time
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import ss_pruning
from benchmarks.accuracy.criteria import (
    BY_CHANCE,
    CALIBRATION,
    CRITERIA,
    OURS,
    Criteria,
    is_known,
    named_options,
)
from benchmarks.common import DATA, RESULTS, add_line, read_lines, versions
from benchmarks.data.cifar import Images, Split, as_input, draw, load, top1
from benchmarks.data.models import CHECKPOINTS, NETS, load_net, stream_layers
from benchmarks.data.training import Recipe, optimiser, train_epoch
from ss_pruning import SyntheticImages, prune_
from ss_pruning.compensation.synthetic_data import synthetic_images
from ss_pruning.config import (
    COMPENSATIONS,
    COST_EXPONENT,
    METHODS,
    SOLVED,
    Allocation,
    Budget,
    Config,
    Scope,
    Synaptic,
)
from ss_pruning.errors import BudgetError, InputError
from ss_pruning.profiling.latency import machine

LINES = RESULTS / "accuracy.jsonl"
LABELLED = 512
FINETUNE_BATCH, FINETUNE_RATE = 128, 0.003
_CORE = Path(str(ss_pruning.__file__)).parent
#: The code that results depend on, by what is used; comments and docstrings do not count.
_SOURCES = {
    "all": [_CORE / "planning" / f"{name}.py" for name in ("allocation", "search")],
    "ours": [
        _CORE / "pruning.py",
        _CORE / "config.py",
        *(
            _CORE / "importance" / f"{name}.py"
            for name in (
                "strength",
                "activation_stats/noise",
                "activation_stats/norms",
                "activation_stats/observed",
                "conditional_variance",
                "relevance",
                "scoring",
                "synaptic",
            )
        ),
    ],
    "compensation": [
        _CORE / "compensation" / f"{name}.py" for name in ("folding", "reconstruction", "residual_sums")
    ],
    "sensitivity": [
        _CORE / "planning" / "ranking.py",
        *(
            _CORE / "importance" / f"{name}.py"
            for name in ("sensitivity", "conditional_variance", "batched_ablation", "shared_prefix")
        ),
    ],
    "synthetic": [_CORE / "compensation" / "synthetic_data.py"],
    "recalibrate": [_CORE / "compensation" / "batchnorm.py"],
}


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    net: str
    macs: float
    criterion: str
    cost_exponent: float
    compensation: str
    seed: int
    calibration: str
    residual: bool
    finetune: int
    split: str
    images: int
    recalibrate: bool = False
    scope: str = "global"

    @property
    def uses_images(self) -> bool:
        return self.calibration != "none"

    def code(self) -> str:
        """A digest of the code that the result depends on."""
        parts = ["all"]
        parts += ["ours"] * self.criterion.startswith(OURS)
        parts += ["compensation"] * (self.compensation != "none")
        parts += ["sensitivity"] * (self.scope == "sensitivity")
        parts += ["synthetic"] * (self.uses_images and self.calibration == "synthetic")
        parts += ["recalibrate"] * (
            self.recalibrate or (self.scope == "sensitivity" and not self.uses_images)
        )
        digest = hashlib.sha256()
        for path in (path for part in parts for path in _SOURCES[part] if path.is_file()):
            digest.update(_without_words(path.read_text()).encode())
        return digest.hexdigest()[:12]


def _without_words(source: str) -> str:
    """The lines of code, without docstrings and comments: any Python finds the same."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def grid(options: argparse.Namespace) -> Iterator[Run]:
    """The runs that were asked for; what no seed can change comes once."""
    methods = [
        (criterion, compensation, scope, exponent)
        for criterion in options.criteria
        for compensation in options.compensations
        for calibration in [calibration_of(criterion, compensation, options)]
        for scope in [scope_of(criterion, compensation, calibration)]
        for exponent in cost_exponents(criterion, scope, compensation, calibration, options.cost_exponents)
    ]
    axes = (options.nets, options.macs, range(options.seeds), methods)
    for net, macs, seed, (criterion, compensation, scope, exponent) in itertools.product(*axes):
        calibration = calibration_of(criterion, compensation, options)
        if seed and not (criterion in BY_CHANCE or calibration != "none" or options.finetune_images):
            continue
        yield Run(
            net=net,
            macs=macs,
            criterion=criterion,
            cost_exponent=exponent,
            compensation=compensation,
            seed=seed,
            calibration=calibration,
            residual=options.residual and net in CHECKPOINTS,
            finetune=options.finetune_images,
            split=options.split,
            images=options.images,
            recalibrate=COMPENSATIONS[compensation]().recalibrate
            if options.recalibrate is None
            else options.recalibrate,  # type: ignore[arg-type]
            scope=scope,
        )


def calibration_of(criterion: str, compensation: str, options: argparse.Namespace) -> str:
    """What a run calibrates on; "none" where it has no use for images, or can do without and was not told otherwise."""
    if criterion.startswith(OURS) or compensation in SOLVED:
        return options.calibration or "real"
    return (options.calibration or "none") if compensation == "mean" else "none"


def resolved(
    compensation: str, calibration: str, scope: Scope | None = None, importance: Any = None
) -> Config:
    """The effective settings of `prune_`."""
    asked = Config(Budget("macs", 0.5), Allocation(scope), COMPENSATIONS[compensation](), importance)
    return asked.resolve(0 if calibration == "none" else CALIBRATION)


def scope_of(criterion: str, compensation: str, calibration: str) -> Scope:
    """The one in the criterion's name; else ours has the default, and others rank by score."""
    default: Scope = "global"
    if criterion.startswith(OURS):
        default = resolved(compensation, calibration).allocation.scope or default
    return named_options(criterion).get("scope", default)  # type: ignore[return-value]


def cost_exponents(
    criterion: str, scope: Scope, compensation: str, calibration: str, chosen: list[float]
) -> list[float]:
    """The one in the criterion's name; else ours, and output error that was measured, is weighed as by default."""
    named = named_options(criterion)
    if "cost_exponent" in named:
        return [float(named["cost_exponent"])]
    if not criterion.startswith(OURS):
        return [COST_EXPONENT[scope]] if scope == "sensitivity" else chosen
    plain = not named.keys() - {"scope"}
    importance = Synaptic(score=None if plain else named.get("score", "share"))  # type: ignore[arg-type]
    return [resolved(compensation, calibration, scope, importance).allocation.cost_exponent or 0.0]


class Bench:
    """Holds what runs share: images, dense accuracies, gradients."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data, self.weights, self.device = options.data, options.weights, torch.device(options.device)
        torch.backends.cudnn.allow_tf32 = False  # a GPU computes as precisely as a CPU
        self.train = load(self.data, "train")
        measured = self.train if options.split == "train" else load(self.data, "test")
        self.measured = self._here(draw(measured, options.images, seed=0))
        self.criteria = Criteria()
        self.dense: dict[str, float] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        """Prune a fresh net and measure what is left."""
        if run.net not in self.dense:
            self.dense[run.net] = top1(self._fresh(run.net), self.measured)
        model = self._fresh(run.net)
        labelled = self._here(draw(self.train, LABELLED, 10_000 + run.seed))
        example = torch.zeros(1, 3, 32, 32, device=self.device)
        calibration = self._calibration(run, model, example)
        importance = self.criteria(run.criterion, model, run.net, run.seed, labelled, calibration)
        torch.manual_seed(run.seed)
        started = time.perf_counter()
        report = prune_(
            model,
            example,
            macs=run.macs,
            importance=importance,
            allocation=Allocation(scope=run.scope, cost_exponent=run.cost_exponent),
            ignore=stream_layers(model) if run.net in CHECKPOINTS and not run.residual else (),
            compensation=COMPENSATIONS[run.compensation](recalibrate=run.recalibrate),
            calibration=calibration,
        )
        result: dict[str, Any] = {
            "dense": self.dense[run.net],
            "macs_kept": report.macs_after / report.macs_before,
            "params_kept": report.params_after / report.params_before,
            "excluded": sorted({left.reason for left in report.excluded if "relies on" in left.reason}),
            "prune_seconds": round(time.perf_counter() - started, 2),
        }
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        result["top1"] = top1(model, self.measured)
        if run.finetune:
            finetune(model, self.train, run.finetune, run.seed)
            result["top1_finetuned"] = top1(model, self.measured)
        return result

    def _fresh(self, net: str) -> nn.Module:
        model = load_net(net, self.data, self.weights)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _here(self, images: Images) -> Images:
        return images[0].to(self.device), images[1].to(self.device)

    def _calibration(self, run: Run, model: nn.Module, example: Tensor) -> Tensor | None:
        if not run.uses_images:
            return None
        if run.calibration == "synthetic":
            return synthetic_images(model, example, SyntheticImages(seed=run.seed))
        return as_input(draw(self.train, CALIBRATION, run.seed)[0].to(self.device))


def finetune(model: nn.Module, images: Images, count: int, seed: int) -> None:
    """Train on `count` images, in whole passes over all of them or one over fewer, shifted and flipped.

    SGD, a rate that warms up and falls to nothing. Norms keep the dense statistics, to which the weights were solved.
    """
    passes = -(-count // len(images[0]))
    recipe = Recipe(
        epochs=passes, rate=FINETUNE_RATE, batch=FINETUNE_BATCH, warm_up=0.1, seed=seed, frozen_norms=True
    )
    each = draw(images, count // passes, seed)
    sgd, schedule = optimiser(model, recipe, max(1, len(each[0]) // FINETUNE_BATCH) * passes)
    for epoch in range(passes):
        train_epoch(model, each, sgd, schedule, recipe, epoch)


def is_worse(run: Run, lines: Iterable[dict[str, Any]]) -> bool:
    """True if the first seed was run with several cost exponents, and did better, untuned, with another than this."""
    first = {**asdict(run), "seed": 0}
    free = ("cost_exponent", "finetune")
    top1: dict[float, float] = {}
    for line in lines:
        defaults = {name: field.default for name, field in Run.__dataclass_fields__.items()}
        same = all(
            line.get(name, defaults[name]) == value for name, value in first.items() if name not in free
        )
        if same and line["top1"] is not None:
            top1[line["cost_exponent"]] = line["top1"]
    return run.cost_exponent in top1 and top1[run.cost_exponent] < max(top1.values())


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a line the result of a run by some code."""
    return (
        *(line.get(name, field.default) for name, field in Run.__dataclass_fields__.items()),
        line["code"],
    )  # older lines lack some


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument(
        "--criteria", nargs="+", default=list(CRITERIA), metavar="NAME", help=", ".join(CRITERIA)
    )
    parser.add_argument("--compensations", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--macs", nargs="+", type=float, default=[0.9, 0.7, 0.5, 0.3], help="shares to keep")
    parser.add_argument(
        "--cost-exponents",
        nargs="+",
        type=float,
        default=[0.0, COST_EXPONENT["global"]],
        help="for other criteria than ours",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--better-only",
        action="store_true",
        help="after the first seed, run only the better cost exponent of each",
    )
    parser.add_argument(
        "--calibration",
        choices=("real", "synthetic", "none"),
        help="default: real for ours and where it is needed, else none",
    )
    parser.add_argument("--residual", action="store_true", help="prune the residual stream, too")
    parser.add_argument(
        "--recalibrate", action=argparse.BooleanOptionalAction, help="by default with mean and linear"
    )
    parser.add_argument("--finetune-images", type=int, default=0, metavar="N", help="then train on N images")
    parser.add_argument("--images", type=int, default=10_000, help="measure on so many, from a fixed shuffle")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="images to measure on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time, with one CPU thread each")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10-png.tar and pretrained/")
    parser.add_argument(
        "--weights", type=Path, default=Path("runs"), help="folder of benchmarks.data.train_cifar"
    )
    parser.add_argument("--results", type=Path, default=LINES, metavar="FILE")
    options = parser.parse_args()
    for name in options.criteria:
        if not is_known(name):
            parser.error(f"no criterion {name!r}; there are {', '.join(CRITERIA)}")
    needing = [name for name in options.compensations if name in SOLVED]
    if options.calibration == "none" and needing:
        parser.error(f"{needing[0]} needs images to calibrate on")
    return options


Job = list[tuple[Run, str]]


def jobs_of(todo: Iterable[tuple[Run, str]], options: argparse.Namespace) -> list[Job]:
    """Runs with the digests of their code, split into what can go on side by side."""
    if options.jobs == 1:
        return [list(todo)]
    found: dict[tuple[str, ...], Job] = defaultdict(list)
    for run, code in todo:
        found[run.compensation, run.net, run.criterion].append((run, code))
    return [found[key] for key in sorted(found, key=lambda key: METHODS.index(key[0]), reverse=True)]


def work(job: Job, bench: Bench, options: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    """Do the runs one after the other; each adds a line to the file."""
    for number, (run, code) in enumerate(job, 1):
        if options.better_only and is_worse(run, lines):
            continue
        started = time.perf_counter()
        try:
            result = bench(run)
        except BudgetError as error:
            result = {"top1": None, "error": str(error)}
        seconds = round(time.perf_counter() - started, 1)
        where = machine(torch.device(options.device))
        line = {**asdict(run), "code": code, **result, "seconds": seconds, "machine": where}
        line["versions"] = versions()
        add_line(line, options.results)
        lines.append(line)
        tuned = f", fine-tuned {result['top1_finetuned']:.2f}" if "top1_finetuned" in result else ""
        left = "out of reach" if result["top1"] is None else f"{result['top1']:.2f}"
        what = f"{run.net} {run.macs:g} {run.criterion} ({run.cost_exponent:g}) {run.compensation}"
        print(
            f"{number}/{len(job)} {what} {run.calibration} seed {run.seed}: {left}{tuned} ({seconds} s)",
            flush=True,
        )


_worker: Callable[[Job], None]


def _start(options: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    """Set up a process that takes jobs."""
    global _worker
    torch.set_num_threads(1)
    _worker = functools.partial(work, bench=Bench(options), options=options, lines=lines)


def _next(job: Job) -> None:
    _worker(job)


def main() -> int:
    options = arguments()
    lines = read_lines(options.results)
    done = {key(line) for line in lines}
    todo = [(run, run.code()) for run in grid(options)]
    jobs = jobs_of(((run, code) for run, code in todo if (*asdict(run).values(), code) not in done), options)
    try:
        if options.jobs == 1:
            work(jobs[0], Bench(options), options, lines)
            return 0
        for split in get_args(Split):
            load(options.data, split)  # decoded once, for all
        pool = ProcessPoolExecutor(options.jobs, get_context("spawn"), _start, (options, lines))
        with pool:
            for result in [pool.submit(_next, job) for job in jobs]:
                result.result()
    except (InputError, FileNotFoundError) as error:
        print(f"{error}\nSay where the data is with --data FOLDER.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
