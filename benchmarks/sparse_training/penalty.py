"""What the penalty costs: a training step of ResNet-20 with and without it, interleaved in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.sparse_training.penalty

Writes benchmarks/results/penalty.json: median seconds a step, and the ratio of each form to the plain step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import write
from benchmarks.data.models import cifar_resnet
from ss_pruning.sparsity.penalty import StrengthPenalty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = cifar_resnet("resnet20").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch,))
    sgd = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
    penalties = {form: StrengthPenalty(model, images[:1], form=form) for form in ("strength", "share")}

    def step(what: str) -> None:
        sgd.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        if what in penalties:
            loss = loss + 0.0 * penalties[what]()
        loss.backward()
        sgd.step()
        if what == "proximal":
            penalties["strength"].shrink_(0.0)

    names = ("plain", *penalties, "proximal")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(options.repeats + 1):
        for name in names:
            taken = timed(lambda name=name: step(name))
            if repeat:  # the first round warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: medians[name] / medians["plain"] for name in names[1:]}
    for name, ratio in ratios.items():
        print(f"{name}: {medians[name]:.3f} s a step, {ratio:.3f} x the plain one")
    result = {"median_seconds": medians, "ratio_to_plain": ratios, "batch": options.batch}
    write("penalty", {**result, "repeats": options.repeats, "threads": torch.get_num_threads()})


def timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
