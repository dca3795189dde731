"""CPU seconds from a fresh model to a cut one: Torch-Pruning and ours, in turns, in one process.

Over the models of the coverage run that both sides prune rightly, on the same image, local ratio 0.5, the classifier
kept. Three works, each on a copy of its own:

- `tp`: `BasePruner` with `GroupMagnitudeImportance` (L2), built and stepped once;
- `same`: `prune_` with that same importance;
- `default`: `prune_` as it comes, which runs the net on noise to see the variance of every channel.

`prune_` verifies its cut on a copy, which Torch-Pruning does not do: those seconds are told apart. Copying the model,
and what the first call in a process costs, count for nobody. A line per model is appended to
`results/prune_times.jsonl`; what is there for the same code is not run again. Totals go to `results/prune_times.json`,
and from there to `docs/coverage.md` (`python -m benchmarks.coverage.page`).

    OMP_NUM_THREADS=1 python -m benchmarks.coverage.prune_times
    OMP_NUM_THREADS=1 python -m benchmarks.coverage.prune_times timm:resnet18 --again
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.common import RESULTS, write
from benchmarks.coverage import run as coverage
from benchmarks.coverage.worker import MAX_RATIO, RATIO, Stages, _is_classifier, build, example_for
from ss_pruning import prune_
from ss_pruning.config import Allocation

LINES = RESULTS / "prune_times.jsonl"
WARM_UP = "timm:test_resnet"
#: Where Torch-Pruning takes more seconds than this, a few models would decide the total.
SLOW = 10.0
Line = dict[str, Any]


def torch_pruning(model: nn.Module, x: Tensor, _: Stages) -> None:
    """Build Torch-Pruning's graph, score and cut."""
    tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=RATIO,
        max_pruning_ratio=MAX_RATIO,
        pruning_ratio_dict={},
        ignored_layers=[m for m in model.modules() if _is_classifier(m)],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        customized_pruners={},
        channel_groups={},
    ).step()


def ours(importance: Callable[[], Any]) -> Callable[[nn.Module, Tensor, Stages], None]:
    """Trace, score, verify and cut; the stages say how long each took."""

    def work(model: nn.Module, x: Tensor, stages: Stages) -> None:
        prune_(
            model,
            x,
            ratio=RATIO,
            allocation=Allocation(scope="local", max_ratio=MAX_RATIO),
            importance=importance(),
            progress=stages.progress,
        )

    return work


WORKS = {
    "tp": torch_pruning,
    "same": ours(tp.importance.GroupMagnitudeImportance),
    "default": ours(lambda: None),
}


def measure(spec: str, order: Sequence[str]) -> Line:
    """CPU seconds of every work on one model; what goes wrong is told in place of them."""
    dense = build(spec)
    x, line = example_for(dense), {"spec": spec}
    for name in order:
        model, stages = copy.deepcopy(dense), Stages()
        gc.collect()
        started = time.process_time()
        try:
            WORKS[name](model, x, stages)
        except Exception as error:  # told, and left out of the totals
            line[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
            continue
        seconds = time.process_time() - started
        line[name] = {"seconds": round(seconds, 3)}
        if name != "tp":
            line[name]["verify"] = round(stages.seconds["verify"], 3)
    return line


def read_lines() -> dict[str, Line]:
    """The last line of each model."""
    text = LINES.read_text().splitlines() if LINES.is_file() else []
    return {line["spec"]: line for line in map(json.loads, filter(str.strip, text))}


def totals(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the models on which all works ran; `bare` is without verification."""
    whole = [line for line in lines if all("seconds" in line[name] for name in WORKS)]
    sums = {name: sum(line[name]["seconds"] for line in whole) for name in WORKS}
    verify = {name: sum(line[name].get("verify", 0.0) for line in whole) for name in WORKS}
    return {
        "models": len(whole),
        "slow": sorted(line["spec"] for line in whole if line["tp"]["seconds"] > SLOW),
        "seconds": sums,
        "bare": {name: sums[name] - verify[name] for name in WORKS},
        "codes": sorted({line["code"] for line in whole}),
    }


def both(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The totals over all models, and over those on which Torch-Pruning is not slow."""
    lines = list(lines)
    every = totals(lines)
    return {"all": every, "rest": totals(line for line in lines if line["spec"] not in every["slow"])}


def main() -> int:
    """Measure what is missing, print the totals."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", help="timm:NAME or torchvision:NAME; default: all that both prune"
    )
    parser.add_argument("--again", action="store_true", help="measure what is there for this code, too")
    parser.add_argument(
        "--limit", type=float, default=600, help="start no further model after so many seconds"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    statuses = {key: line["status"] for key, line in coverage.latest(coverage.read_lines()).items()}
    pruned = {spec for spec, _ in statuses if all(statuses.get((spec, s)) == "ok" for s in ("ours", "tp"))}
    code, done = coverage.code_version("ours"), read_lines()
    names = options.names or sorted(pruned)
    random.Random(0).shuffle(names)  # so that a run that is cut short is a fair sample
    todo = [s for s in names if options.again or done.get(s, {}).get("code") != code]
    began = time.perf_counter()
    measure(WARM_UP, list(WORKS))
    with LINES.open("a") as file:
        for i, spec in enumerate(todo):
            if time.perf_counter() - began > options.limit:
                print(f"{len(todo) - i} models are left: run it again")
                break
            turn = i % len(WORKS)
            line = {**measure(spec, [*list(WORKS)[turn:], *list(WORKS)[:turn]]), "code": code}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(json.dumps(line), flush=True)
    times = {"listed": len(pruned), **both(read_lines().values())}
    print(json.dumps(times, indent=2))
    write("prune_times", times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
