"""What pruning gains in time: dense and pruned models in turns, in one process, at budgets of MACs and of time.

    OMP_NUM_THREADS=2 python -m benchmarks.latency --parts budget settings targets
    python -m benchmarks.latency --parts trained       # needs CIFAR-10 and the checkpoints, see --data
    python -m benchmarks.latency --device cuda --parts budget settings compiled targets
    python -m benchmarks.latency --page                # writes docs/latency.md from what is there

A CPU that does something else at the same time shows in the spreads. On a GPU the settings are batch 1, 32 and 256 at
224 pixels, which needs about 24 GiB for ResNet-50 in float32. Weights are random except in `trained`: they cost the
same time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.accuracy import add_line, read_lines
from benchmarks.common import DATA, RESULTS, versions
from ss_pruning import prune_
from ss_pruning.benching import Comparison, Setting, compare, file_bytes, settings
from ss_pruning.latency import machine
from ss_pruning.planning import Costs, Floats
from ss_pruning.report import Report

LINES = RESULTS / "latency.jsonl"
PARTS = ("budget", "settings", "compiled", "targets", "trained")
MACS = 0.5
#: Ways to reach the same budget of MACs.
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "round_to=8": {"round_to": 8},
    'round_to="measured"': {"round_to": "measured"},
    'cost_exponent=1, round_to="measured"': {"cost_exponent": 1.0, "round_to": "measured"},
    'scope="local", round_to="measured"': {"scope": "local", "round_to": "measured"},
}
NETS = ("resnet50", "mobilenet_v3_large")
TARGETS = (0.75, 0.6, 0.5)
_LIMIT = 25.0  # seconds of timing a comparison


def dense_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    return model


class Bench:
    """Prunes, measures, and writes one line a comparison."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.size = 3, options.pixels, options.pixels

    def images(self, batch: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.size, generator=noise).to(self.device)

    def pruned(self, dense: nn.Module, **how: Any) -> tuple[nn.Module, Report]:
        model = copy.deepcopy(dense).to(self.device)
        report = prune_(
            model, self.images(1), latency_inputs=self.images(self.options.batch), progress=show, **how
        )
        return model.cpu(), report

    def line(self, part: str, **what: Any) -> None:
        facts = {"machine": machine(self.device), "pixels": self.options.pixels, "versions": versions()}
        add_line({"part": part, **what, **facts}, self.options.results)
        print(part, {key: value for key, value in what.items() if key != "comparison"}, flush=True)

    def compared(
        self, part: str, net: str, models: dict[str, nn.Module], setting: Setting, facts: dict[str, Any]
    ) -> Comparison:
        found = compare(models, self.size, setting, self.device, seconds=_LIMIT)
        for way, ratio in found.ratios.items():
            print(
                f"  {net}, {setting}, {way}: {1000 * found.speeds[way].seconds:.1f} ms, {ratio:.3f}",
                flush=True,
            )
        self.line(part, net=net, comparison=found.to_dict(), facts=facts)
        return found

    def at_budget(self, net: str) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        models, facts = {"dense": dense_net(net)}, {}
        for way, how in WAYS.items():
            models[way], report = self.pruned(models["dense"], macs=MACS, **how)
            facts[way] = {**kept(report), "file": file_bytes(models[way]) / file_bytes(models["dense"])}
        return models, facts

    def budget(self) -> None:
        """The same MACs in several ways, at one batch size."""
        models, facts = self.at_budget("resnet50")
        (setting,) = settings([self.options.batch])
        self.compared("budget", "resnet50", models, setting, facts)

    def settings(self) -> None:
        """Two of them in the settings that people deploy in."""
        models, facts = self.at_budget("resnet50")
        few = {name: models[name] for name in ("dense", "default", 'round_to="measured"')}
        layouts, dtypes = ("contiguous", "channels_last"), ("float32", "bf16")
        _, *others = settings([self.options.batch], dtypes, layouts)  # the first is that of `budget`
        for setting in (*others, *settings([1, 32])):
            self.compared("settings", "resnet50", few, setting, facts)

    def compiled(self) -> None:
        """Through torch.compile."""
        models, facts = self.at_budget("resnet50")
        few = {name: models[name] for name in ("dense", 'round_to="measured"')}
        for setting in settings([self.options.batch], compiled=[True]):
            self.compared("compiled", "resnet50", few, setting, facts)

    def targets(self) -> None:
        """Latency targets, measured once more by a comparison of its own."""
        (setting,) = settings([self.options.batch])
        for net in self.options.nets:
            dense = dense_net(net)
            for target in self.options.targets:
                model, report = self.pruned(dense, latency=target)
                again = compare(
                    {"dense": dense, "pruned": model}, self.size, setting, self.device, seconds=_LIMIT
                )
                self.line(
                    "targets",
                    net=net,
                    batch=self.options.batch,
                    target=target,
                    found=report.latency_ratio,
                    again=again.ratios["pruned"],
                    seconds=sum(report.seconds.values()),
                    **kept(report),
                )

    def trained(self) -> None:
        """Accuracy of a trained net at the same measured latency: what does the table of layer times help?"""
        from benchmarks.cifar_data import as_input, draw, load, top1
        from benchmarks.cifar_models import load_net

        data = self.options.data
        train, test = load(data, "train"), draw(load(data, "test"), 10_000, 0)
        pictures = as_input(draw(train, 512, self.options.seed)[0])
        for name, (by_macs, round_to) in TABLE_USES.items():
            dense = load_net("resnet56", data, Path("runs")).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for target in self.options.targets:
                model = copy.deepcopy(dense)
                with costs_of_macs() if by_macs else contextlib.nullcontext():
                    report = prune_(
                        model,
                        pictures[:1],
                        latency=target,
                        latency_inputs=pictures[:128],
                        round_to=round_to,
                        compensation="reconstruct",
                        calibration=pictures,
                    )
                setting = Setting(batch=128, layout="channels_last")
                again = compare(
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
    by_time = Costs.per_family

    def by_macs(self: Costs, units: Any, kind: Any) -> Floats:
        return by_time(self, units, "macs" if kind == "latency" else kind)

    Costs.per_family = by_macs  # type: ignore[method-assign]
    try:
        yield
    finally:
        Costs.per_family = by_time  # type: ignore[method-assign]


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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["budget", "settings", "targets"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="by default 8 on a CPU, 256 on a GPU")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help="for targets")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="of the calibration images of trained")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10-png.tar and pretrained/")
    parser.add_argument("--results", type=Path, default=LINES, metavar="FILE")
    parser.add_argument("--page", action="store_true", help="write docs/latency.md, measure nothing")
    options = parser.parse_args()
    if options.page:
        from benchmarks.latency_page import write_page

        print(f"written: {write_page(read_lines(options.results))}")
        return 0
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
