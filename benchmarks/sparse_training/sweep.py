"""Sweep over penalty weight, share of synapses that goes and criterion, with Ray Tune: a table, JSON and a plot.

    python -m benchmarks.sparse_training.sweep --data FOLDER   # Fashion-MNIST, on this machine
    python -m benchmarks.sparse_training.sweep --data FOLDER --dataset cifar10 --images 0 --epochs 10
    python -m benchmarks.sparse_training.sweep --data FOLDER --address auto   # on its Ray cluster

One model is trained for each penalty weight, then pruned, fine-tuned and compacted for each share and criterion, as
`benchmarks/sparse_training/paper.py` does it. Start the same command again after a crash or a kill, and it goes on:
what Ray knows of its trials comes back by `Tuner.restore`, models go on from their last whole epoch, and trials that
have ended are read from their files. On a cluster, --data and --out have to be visible to all machines under the same
path. Ray keeps its state in pickles: go on with no folder that others could write to.

Run from the root of the repository; needs ss-pruning[sweep].
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Ray reports versions, platform and size of the cluster to its makers unless told not to; trying an example should
# send nothing to anybody. A cluster that is already running has its own setting.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
from ray import tune

from benchmarks.common import DATA, ROOT, versions
from benchmarks.data.cifar import Images, draw, load_dataset
from benchmarks.data.training import Recipe
from benchmarks.sparse_training.paper import (
    CRITERIA,
    NETS,
    Pruning,
    Training,
    prune_and_tune,
    report,
    trained,
)
from benchmarks.sparse_training.sweep_page import Row, kept, plot
from ss_pruning._utils.files import make_writable_folder, write_text
from ss_pruning.errors import InputError, SSPruningError

Options = argparse.Namespace
#: What may change between a sweep and its continuation.
ELSEWHERE = ("data", "out", "address", "cpus", "at_a_time")


def training_of(options: Options, weight: float) -> Training:
    recipe = Recipe(epochs=options.epochs, batch=options.batch, seed=options.seed)
    return Training(options.net, options.width, options.dataset, weight, recipe=recipe)


def images_of(options: Options) -> tuple[Images, Images]:
    """Those to train on, as many as were asked for, and those to test on."""
    train, test = (load_dataset(options.dataset, options.data, split) for split in ("train", "test"))
    return (draw(train, options.images, options.seed) if options.images else train), test


def quiet(_: str) -> None:
    pass


# ------------------------------------------------------------ what a worker does


def train_net(config: dict[str, Any], options: Options) -> None:
    """A trial of the first stage: the model of one penalty weight."""
    torch.set_num_threads(options.cpus)
    training = training_of(options, config["weight"])
    trained(training, images_of(options)[0], options.out / "nets", quiet)
    tune.report({"epochs": training.recipe.epochs})


def prune_net(config: dict[str, Any], options: Options) -> None:
    """A trial of the second stage: one of those models pruned, fine-tuned and compacted. One file is its result."""
    torch.set_num_threads(options.cpus)
    training = training_of(options, config["weight"])
    tuning = replace(training.recipe, epochs=options.finetune_epochs, rate=options.finetune_rate)
    pruning = Pruning(config["criterion"], config["sparsity"], tuning)
    path = result_path(options, **config)
    if not path.is_file():
        sets, nets = images_of(options), options.out / "nets"
        model = trained(training, sets[0], nets, quiet)
        found, _, made = prune_and_tune(training, pruning, model, sets, nets, quiet)
        write_text(path, json.dumps(report(training, pruning, found, made), indent=2) + "\n")
    tune.report({"top1": json.loads(path.read_text("utf-8"))["top1"]["fine-tuned"]})


def result_path(options: Options, weight: float, criterion: str, sparsity: float) -> Path:
    return options.out / "results" / f"{weight:g}-{criterion}-{sparsity:g}.json"


# ------------------------------------------------------------ what the driver does


def stage(name: str, trial: Callable[..., None], grid: dict[str, list[Any]], options: Options) -> None:
    """All trials of a grid that have not ended yet.

    Raises:
        InputError: Trials failed; says why, and how to go on.
    """
    work = tune.with_resources(tune.with_parameters(trial, options=options), {"cpu": options.cpus})
    folder = options.out / "ray" / name
    if any(folder.glob("experiment_state-*.json")) and tune.Tuner.can_restore(str(folder)):
        print(f"{name}: going on", flush=True)
        tuner = tune.Tuner.restore(str(folder), work, restart_errored=True)
    else:
        tuner = tune.Tuner(
            work,
            param_space={key: tune.grid_search(values) for key, values in grid.items()},
            tune_config=tune.TuneConfig(max_concurrent_trials=options.at_a_time, reuse_actors=True),
            run_config=tune.RunConfig(name=name, storage_path=str(folder.parent), verbose=1),
        )
    if errors := tuner.fit().errors:
        why = str(errors[0]).strip().splitlines()[-1]
        raise InputError(f"{name}: {len(errors)} trials failed; start again to retry them. The first: {why}")


def connect(options: Options) -> None:
    """To the cluster that was named, or to one that lives as long as this process."""
    names = {"OMP_NUM_THREADS": str(options.cpus)}
    if options.address:
        excluded = ["/runs", "/docs", "/tests", ".git", "*.jsonl"]
        code = {"working_dir": str(ROOT), "excludes": excluded}
        ray.init(options.address, runtime_env={"env_vars": names, **code})
    else:  # "local", whatever cluster may be running here
        names["PYTHONPATH"] = str(ROOT)
        ray.init("local", include_dashboard=False, runtime_env={"env_vars": names})


def sweep(options: Options) -> list[Row]:
    """Both stages; returns the results in the order of the options."""
    check_recipe(options)
    images_of(options)  # what is missing is said before anything starts
    connect(options)
    grid = {"weight": options.weights, "criterion": options.criteria, "sparsity": options.sparsities}
    stage("nets", train_net, {"weight": options.weights}, options)
    stage("pruned", prune_net, grid, options)
    return [
        json.loads(result_path(options, weight, criterion, sparsity).read_text("utf-8"))
        for weight in options.weights
        for criterion in options.criteria
        for sparsity in options.sparsities
    ]


def recipe_of(options: Options) -> dict[str, Any]:
    """The options that the results depend on."""
    return {name: value for name, value in vars(options).items() if name not in ELSEWHERE}


def check_recipe(options: Options) -> None:
    """A folder holds one sweep.

    Raises:
        InputError: It holds another one.
    """
    make_writable_folder(options.out / "results")
    path, recipe = options.out / "sweep.options.json", recipe_of(options)
    if path.is_file() and json.loads(path.read_text("utf-8")) != recipe:
        raise InputError(
            f"'{options.out}' holds a sweep with other options: choose another --out, or delete it"
        )
    write_text(path, json.dumps(recipe, indent=2) + "\n")


# ------------------------------------------------------------ what comes out


def show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Top-1 on the test images, %; what is left after compaction", title_justify="left")
    for name in ("penalty", "criterion", "gone"):
        table.add_column(name)
    for name in ("trained", "pruned", "tuned", "MACs", "params"):
        table.add_column(name, justify="right")
    for row in rows:
        top = (f"{row['top1'][name]:.2f}" for name in ("trained", "pruned", "fine-tuned"))
        left = (f"{kept(row, what):.3f}" for what in ("macs", "params"))
        table.add_row(f"{row['weight']:g}", row["criterion"], f"{row['sparsity']:.0%}", *top, *left)
    Console().print(table)


def arguments(argv: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--weights", nargs="+", type=float, default=[0.0, 1e-3], help="of the penalty in training")
    add("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.9], help="shares of the synapses that go")
    add("--criteria", nargs="+", choices=CRITERIA, default=["strength", "kernel norm", "random"])
    add("--net", choices=sorted(NETS), default="vgg16bn")
    add("--width", type=float, default=0.125, help="of VGG and ResNet-18: the usual width is 1")
    add("--dataset", choices=("cifar10", "fashion-mnist"), default="fashion-mnist")
    add("--images", type=int, default=5000, help="drawn from those to train on; 0 for all")
    add("--epochs", type=int, default=4)
    add("--finetune-epochs", type=int, default=1)
    add("--finetune-rate", type=float, default=0.02)
    add("--batch", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--data", type=Path, default=DATA, help="folder of the images")
    add("--out", type=Path, default=Path("runs/sweep"), help="nets, results, table and plot")
    add(
        "--address",
        help="of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; without it, this machine alone",
    )
    add("--cpus", type=int, default=1, help="cores for each trial")
    add("--at-a-time", type=int, help="trials at a time; without it, as many as there are cores for")
    options = parser.parse_args(argv)
    options.data, options.out = options.data.resolve(), options.out.resolve()
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    try:
        rows = sweep(options)
    except SSPruningError as error:
        print(error, file=sys.stderr)
        return 2
    result = {"options": recipe_of(options), "rows": rows, "versions": versions()}
    write_text(options.out / "sweep.json", json.dumps(result, indent=2) + "\n")
    plot(rows, options.out / "sweep.svg")
    show(rows)
    print(f"written: {options.out / 'sweep.json'}, {options.out / 'sweep.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
