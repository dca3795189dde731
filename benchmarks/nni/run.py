"""From NNI masks to smaller models: our compaction and NNI's ModelSpeedup on the same masks; a global ratio timed.

    python -m benchmarks.nni.run                # every model; goes on where it was stopped
    python -m benchmarks.nni.run --only resnet18 --no-speedup
    python -m benchmarks.nni.run --global-ratio # ResNet-18, kernels, 0.9: seconds and what was met
    python -m benchmarks.nni.page                 # writes the table into docs/nni.md

Weights are random, and so are scales, shifts and statistics of the norms, as a trained net's would not be 1 and 0.
Channel masks go by NNI's own dependency groups. A difference is the largest one between two outputs, relative to the
masked model's largest output.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, write
from ss_pruning.errors import SSPruningError
from ss_pruning.graph.tracing import trace
from ss_pruning.integrations.nni.pruner import SynapticStrengthPruner, bake, compact, speedup, symbolic_graph

TORCHVISION = ("resnet18", "mobilenet_v2", "densenet121", "resnet50", "vgg16_bn")
TIMM = (
    "mobilenetv3_small_050",
    "regnetx_002",
    "resnet10t",
    "mnasnet_small",
    "ghostnet_050",
    "efficientnet_lite0",
)
MASKS: dict[str, tuple[Any, float]] = {
    "kernel": ([1, 1, -1, -1], 0.9),
    "in_channel": ("in_channel", 0.5),
    "out_channel": ("out_channel", 0.5),
}
SIZE, SPEEDUP_SECONDS = 64, 120


def build(name: str) -> nn.Module:
    """A model with random weights and norms."""
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        model = timm.create_model(name)
    else:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None)
    if name == "vgg16_bn":  # 103 of its 138 million weights would be a classifier for larger images
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 1000)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.3, 0.3),
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 2.0),
                ):
                    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def config_for(model: nn.Module, images: Tensor, kind: str) -> list[dict[str, Any]]:
    """Every convolution but those whose outputs are the model's and, unless whole outputs go, the stem."""
    granularity, ratio = MASKS[kind]
    connectivity = trace(model, images)
    convs = [p for p in connectivity.layers if isinstance(model.get_submodule(p), nn.Conv2d)]
    skipped = [p for p in convs if p in connectivity.reaches_output]
    skipped += convs[:1] if kind != "out_channel" else []
    chosen = [p for p in convs if p not in skipped]
    config = [{"op_names": chosen, "sparse_ratio": ratio, "granularity": granularity}]
    if kind == "kernel":
        return config
    from nni.compression.speedup import auto_set_denpendency_group_ids

    return auto_set_denpendency_group_ids(
        symbolic_graph(model, images), config, prune_axis=int(kind == "in_channel")
    )


def masks_of(pruner: str, model: nn.Module, config: list[dict[str, Any]], images: Tensor) -> tuple[Any, str]:
    """The masks, and the config they really go by: dependency groups that NNI cannot keep are dropped."""
    from nni.compression.base.setting import PruningSetting
    from nni.compression.pruning import L1NormPruner

    for module in model.modules():  # L1NormPruner knows no subclasses
        if isinstance(module, nn.Conv2d):
            PruningSetting.registry.setdefault(type(module).__name__, PruningSetting.registry["Conv2d"])

    def make(config: list[dict[str, Any]]) -> Any:
        twin = copy.deepcopy(model)
        made = (
            SynapticStrengthPruner(twin, config, images) if pruner == "ours" else L1NormPruner(twin, config)
        )
        return made.compress()[1]

    try:
        return make(config), "dependency groups" if len(config) > 1 else "single layers"
    except (SSPruningError, RuntimeError, AssertionError):
        free = [
            {k: v for k, v in c.items() if k not in ("dependency_group_id", "internal_metric_block")}
            for c in config
        ]
        return make(free), "single layers (NNI's dependency groups do not fit)"


def difference(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        x, y = a(images), b(images)
    return float((x - y).abs().max() / x.abs().max())


def compacted(model: nn.Module, masks: Any, images: Tensor) -> dict[str, Any]:
    """Our side of one case; for masked filters also with their norms masked."""
    begin = time.perf_counter()
    small, report = compact(model, masks, images)
    found = {
        "seconds": time.perf_counter() - begin,
        "params": report.after.params,
        "living_synapses": report.after.living_synapses,
        "macs": report.after.macs,
        "difference_float64": report.max_error,
        "difference_float32": difference(bake(model, masks), small, images),
        "stays": {left.reason: left.channels for left in report.excluded},
    }
    if all(mask["weight"].flatten(1).std(1).max() == 0 for mask in masks.values()):
        found["params_norms_masked"] = compact(model, masks, images, norms="mask")[1].after.params
    return found


def sped_up(model: nn.Module, masks: Any, images: Tensor) -> dict[str, Any]:
    """NNI's side."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no result within {SPEEDUP_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SPEEDUP_SECONDS)
    begin = time.perf_counter()
    try:
        fast = speedup(model, masks, images)
        return {
            "seconds": time.perf_counter() - begin,
            "params": sum(p.numel() for p in fast.parameters()),
            "difference_float32": difference(bake(model, masks), fast, images),
            "difference_norms_masked": difference(bake(model, masks, images, norms="mask"), fast, images),
        }
    except Exception as error:  # its failures are what this records
        cause = error.__cause__ or error
        return {"error": f"{type(cause).__name__}: {str(cause).splitlines()[0][:160] if str(cause) else ''}"}
    finally:
        signal.alarm(0)


def run(names: list[str], with_speedup: bool) -> None:
    """All cases of the models that have no result yet; written after each."""
    path = RESULTS / "nni_compaction.json"
    result = json.loads(path.read_text()) if path.exists() else {"size": SIZE, "cases": {}}
    for name in names:
        for kind in MASKS:
            model, images = (
                build(name),
                torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)),
            )
            config = config_for(model, images, kind)
            for pruner in ("ours", "l1"):
                case = result["cases"].setdefault(f"{name} {kind} {pruner}", {})
                jobs: dict[str, Callable[..., Any]] = {"compact": compacted, "speedup": sped_up}
                todo = [job for job in jobs if job not in case and (with_speedup or job == "compact")]
                if not todo:
                    continue
                masks, by = masks_of(pruner, model, config, images)
                case |= {"params": sum(p.numel() for p in model.parameters()), "masks": by}
                for job in todo:
                    case[job] = jobs[job](model, masks, images)
                    print(name, kind, pruner, job, case[job], flush=True)
                write("nni_compaction", {key: result[key] for key in ("size", "cases")} | _kept(result))


def _kept(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("global_ratio",) if key in result}


def global_ratio() -> None:
    """ResNet-18, 0.9 of the kernels in one global group: seconds of `compress()`, and the ratio that came out."""
    from nni.compression.pruning import L1NormPruner

    path = RESULTS / "nni_compaction.json"
    result = json.loads(path.read_text()) if path.exists() else {"size": SIZE, "cases": {}}
    images = torch.randn(2, 3, SIZE, SIZE)
    config = [
        {"op_types": ["Conv2d"], "sparse_ratio": 0.9, "global_group_id": 1, "granularity": [1, 1, -1, -1]}
    ]
    rows = {}
    for pruner in ("ours", "l1"):
        model = build("resnet18")
        made = (
            SynapticStrengthPruner(model, config, images) if pruner == "ours" else L1NormPruner(model, config)
        )
        begin, cpu = time.perf_counter(), time.process_time()
        masks = made.compress()[1]
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        layers = [(int((m["weight"] == 0).sum()), m["weight"].numel()) for m in masks.values()]
        rows[pruner] = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "ratio": sum(gone for gone, _ in layers) / sum(n for _, n in layers),
            "empty_layers": sum(gone == n for gone, n in layers),
        }
        print(pruner, rows[pruner], flush=True)
    write("nni_compaction", {"size": result["size"], "cases": result["cases"], "global_ratio": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[*TORCHVISION, *TIMM], help="models to run")
    parser.add_argument("--no-speedup", action="store_true", help="leave NNI's ModelSpeedup out")
    parser.add_argument("--global-ratio", action="store_true", help="only the cost of a global ratio")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.global_ratio:
        global_ratio()
    else:
        run(options.only, not options.no_speedup)


if __name__ == "__main__":
    main()
