"""What pruning gains in time: dense and pruned models in turns, in one process, at budgets of MACs and of time.

    OMP_NUM_THREADS=2 python -m benchmarks.latency.run     # budget, settings, compiled, targets
    python -m benchmarks.latency.run --parts trained       # needs CIFAR-10 and the checkpoints, see --data
    python -m benchmarks.latency.run --device cuda
    python -m benchmarks.latency.page                      # writes docs/latency.md from what is there

Every comparison is a line, written when it is done. A run that was stopped goes on where it was, on the same day or by
the name that it was given (--run); under another name everything is measured once more. A CPU that does something else
at the same time shows in the spreads. On a GPU the settings are batch 1, 32 and 256 at 224 pixels, which needs about
24 GiB for ResNet-50 in float32. Weights are random except in `trained`: they cost the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.common import DATA, RESULTS, add_line, read_lines, versions
from ss_pruning import prune_
from ss_pruning._utils.arrays import Floats
from ss_pruning.cli.bench import file_bytes
from ss_pruning.config import Allocation
from ss_pruning.planning.costs import Costs
from ss_pruning.profiling.comparison import DTYPES, LAYOUTS, Setting, compare_speeds, settings
from ss_pruning.profiling.latency import machine
from ss_pruning.report.records import Report

LINES = RESULTS / "latency.jsonl"
PARTS = ("budget", "settings", "compiled", "targets", "trained")
MACS = 0.5
#: Ways to reach the same budget of MACs.
WAYS: dict[str, Allocation] = {
    "default": Allocation(),
    "round_to=8": Allocation(round_to=8),
    'round_to="measured"': Allocation(round_to="measured"),
    'cost_exponent=1, round_to="measured"': Allocation(cost_exponent=1.0, round_to="measured"),
    'scope="local", round_to="measured"': Allocation("local", round_to="measured"),
}
NETS = ("resnet50", "mobilenet_v3_large")
TARGETS = (0.6,)
_LIMIT = 25.0  # seconds of timing a comparison


def what_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for two lines that measured the same thing on the same machine."""
    machine = tuple(line["machine"].values())
    if "comparison" in line:
        return line["part"], line["net"], machine, tuple(line["comparison"]["setting"].values())
    return (
        line["part"],
        line["net"],
        machine,
        *(line.get(key) for key in ("target", "batch", "use", "seed")),
        *(line.get("dtype", "float32"), line.get("layout", "contiguous")),
    )


def dense_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    return model


class Bench:
    """Prunes, measures, and writes one line a comparison."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.size = 3, options.pixels, options.pixels
        self.machine = machine(self.device)
        self.done = {what_of(line) for line in read_lines(options.results) if line.get("run") == options.run}
        self.made: dict[tuple[str, str], tuple[nn.Module, dict[str, Any]]] = {}

    def todo(self, part: str, net: str, setting: Setting | None = None, **what: Any) -> bool:
        """Whether this run has no line of it yet."""
        compared = {"comparison": {"setting": asdict(setting)}} if setting else {}
        return (
            what_of({"part": part, "net": net, "machine": self.machine, **what, **compared}) not in self.done
        )

    def images(self, batch: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.size, generator=noise).to(self.device)

    def pruned(
        self, dense: nn.Module, setting: Setting, allocation: Allocation, **budget: float
    ) -> tuple[nn.Module, Report]:
        """A copy, pruned as the model that runs in this setting."""
        place = {"dtype": DTYPES[setting.dtype], "memory_format": LAYOUTS[setting.layout]}
        model = copy.deepcopy(dense).to(self.device, **place)
        few, many = (self.images(count).to(**place) for count in (1, setting.batch))
        report = prune_(
            model, few, allocation=replace(allocation, latency_inputs=many), progress=show, **budget
        )
        return model.cpu(), report

    def line(self, part: str, **what: Any) -> None:
        facts = {"machine": self.machine, "pixels": self.options.pixels, "run": self.options.run}
        facts["versions"] = versions()
        add_line({"part": part, **what, **facts}, self.options.results)
        print(part, {key: value for key, value in what.items() if key != "comparison"}, flush=True)

    def compared(self, part: str, net: str, ways: Sequence[str], setting: Setting) -> None:
        """The dense net and those pruned in some ways to half its MACs, unless this run has them already."""
        if not self.todo(part, net, setting):
            return
        made = {way: self.at_budget(net, way) for way in ("dense", *ways)}
        models = {way: model for way, (model, _) in made.items()}
        found = compare_speeds(models, self.size, setting, self.device, seconds=_LIMIT)
        for way, ratio in found.ratios.items():
            milliseconds = 1000 * found.speeds[way].seconds
            print(f"  {net}, {setting}, {way}: {milliseconds:.1f} ms, {ratio:.3f}", flush=True)
        self.line(part, net=net, comparison=found.to_dict(), facts={way: made[way][1] for way in ways})

    def at_budget(self, net: str, way: str) -> tuple[nn.Module, dict[str, Any]]:
        """Made once, since planning takes time too."""
        if way == "dense":
            return self.made.setdefault((net, way), (dense_net(net), {}))
        if (net, way) not in self.made:
            dense, _ = self.at_budget(net, "dense")
            (setting,) = settings([self.options.batch])
            model, report = self.pruned(dense, setting, WAYS[way], macs=MACS)
            self.made[net, way] = model, {**kept(report), "file": file_bytes(model) / file_bytes(dense)}
        return self.made[net, way]

    def budget(self) -> None:
        """The same MACs in several ways, at one batch size."""
        (setting,) = settings([self.options.batch])
        self.compared("budget", "resnet50", list(WAYS), setting)

    def settings(self) -> None:
        """Two of them in the settings that people deploy in."""
        layouts, dtypes = ("contiguous", "channels_last"), ("float32", "bf16")
        _, *others = settings([self.options.batch], dtypes, layouts)  # the first is that of `budget`
        for setting in (*others, *settings([1, 32])):
            self.compared("settings", "resnet50", ("default", 'round_to="measured"'), setting)

    def compiled(self) -> None:
        """Through torch.compile."""
        (setting,) = settings([self.options.batch], compiled=[True])
        self.compared("compiled", "resnet50", ('round_to="measured"',), setting)

    def targets(self) -> None:
        """Latency targets, measured once more by a comparison of its own; on a GPU also as GPUs like it best."""
        places = [("float32", "contiguous"), ("bf16", "channels_last")]
        places = places[: 1 + (self.device.type == "cuda")]
        for net, target, (dtype, layout) in product(self.options.nets, self.options.targets, places):
            setting = Setting(self.options.batch, dtype, layout)
            what = {"batch": setting.batch, "dtype": dtype, "layout": layout, "target": target}
            if not self.todo("targets", net, **what):
                continue
            dense = dense_net(net)
            model, report = self.pruned(dense, setting, Allocation(), latency=target)
            again = compare_speeds(
                {"dense": dense, "pruned": model}, self.size, setting, self.device, seconds=_LIMIT
            )
            self.line(
                "targets",
                net=net,
                **what,
                found=report.latency_ratio,
                again=again.ratios["pruned"],
                seconds=sum(report.seconds.values()),
                **kept(report),
            )

    def trained(self) -> None:
        """Accuracy of a trained net at the same measured latency: what does the table of layer times help?"""
        from benchmarks.data.cifar import as_input, draw, load, top1
        from benchmarks.data.models import load_net

        data = self.options.data
        train, test = load(data, "train"), draw(load(data, "test"), 10_000, 0)
        pictures = as_input(draw(train, 512, self.options.seed)[0])
        for name, (by_macs, round_to) in TABLE_USES.items():
            dense = load_net("resnet56", data, Path("runs")).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for target in self.options.targets:
                if not self.todo("trained", "resnet56", target=target, use=name, seed=self.options.seed):
                    continue
                model = copy.deepcopy(dense)
                with costs_of_macs() if by_macs else contextlib.nullcontext():
                    report = prune_(
                        model,
                        pictures[:1],
                        latency=target,
                        allocation=Allocation(round_to=round_to, latency_inputs=pictures[:128]),
                        compensation="reconstruct",
                        calibration=pictures,
                    )
                setting = Setting(batch=128, layout="channels_last")
                again = compare_speeds(
                    {"dense": dense, "pruned": model}, (3, 32, 32), setting, self.device, seconds=10.0
                )
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                self.line(
                    "trained",
                    net="resnet56",
                    use=name,
                    seed=self.options.seed,
                    target=target,
                    found=report.latency_ratio,
                    again=again.ratios["pruned"],
                    dense_top1=top1(dense, test),
                    top1=top1(model, test),
                    **kept(report),
                )


#: What of the table is used on the way to a latency: (whether channels are weighed by MACs instead of time, rounding).
TABLE_USES: dict[str, tuple[bool, Any]] = {
    "nothing: importance by MACs, any width": (True, None),
    "widths only: importance by MACs, measured rounding": (True, "measured"),
    "times only: importance by time, any width": (False, None),
    "both: importance by time, measured rounding": (False, "measured"),
}


@contextlib.contextmanager
def costs_of_macs() -> Iterator[None]:
    """While it lasts, a latency target weighs channels by the MACs that they cost, not by the time."""
    by_time = Costs.per_channel_set

    def by_macs(self: Costs, units: Any, kind: Any) -> Floats:
        return by_time(self, units, "macs" if kind == "latency" else kind)

    Costs.per_channel_set = by_macs  # type: ignore[method-assign]
    try:
        yield
    finally:
        Costs.per_channel_set = by_time  # type: ignore[method-assign]


def kept(report: Report) -> dict[str, float]:
    return {
        "macs_kept": report.macs_after / report.macs_before,
        "params_kept": report.params_after / report.params_before,
    }


def show(stage: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{stage} {done}/{total}        ", end="", file=sys.stderr)


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:4]))
    parser.add_argument(
        "--run", default=date.today().isoformat(), help="its name: what it has is not measured again"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="by default 8 on a CPU, 256 on a GPU")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help="for targets")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="of the calibration images of trained")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10-png.tar and pretrained/")
    parser.add_argument("--results", type=Path, default=LINES, metavar="FILE")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "No CUDA device here. This needs one GPU with about 24 GiB (batch 256 at 224 pixels in float32), a torch "
            "built for it, and about 20 minutes; nothing else should run on it.",
            file=sys.stderr,
        )
        return 2
    options.batch = options.batch or (256 if options.device.startswith("cuda") else 8)
    bench = Bench(options)
    for part in options.parts:
        getattr(bench, part)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
