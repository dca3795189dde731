"""How much of transformers and hybrids goes, one small variant a family: timm, torchvision, Hugging Face from config.

    OMP_NUM_THREADS=1 python -m benchmarks.coverage.transformers            # what is not in the results yet
    OMP_NUM_THREADS=1 python -m benchmarks.coverage.transformers vit_tiny_patch16_224  # these, anew
    python -m benchmarks.coverage.transformers --page                       # docs/coverage_transformers.md

Random weights, one image, local ratio 0.5. Every cut is checked by `prune_` itself (cut == masked in float64), and the
small model takes a step of training.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import DOCS, RESULTS, versions, write
from benchmarks.pages import table, write_page
from ss_pruning import prune_
from ss_pruning.graph.traced import TracedModel
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan

NAME = "coverage_transformers"
Line = dict[str, Any]


def _timm(name: str, px: int) -> nn.Module:
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name)
    if model.pretrained_cfg["input_size"][1] != px:  # type: ignore[index,union-attr]
        model = timm.create_model(name, img_size=px)
    return model


def _torchvision(name: str, px: int) -> nn.Module:
    made: nn.Module = importlib.import_module("torchvision").models.get_model(name)
    return made


def _hugging_face(name: str, px: int) -> nn.Module:
    transformers = importlib.import_module("transformers")
    sizes: dict[str, Any] = {"image_size": px, "num_labels": 10}
    if name == "Swin":
        sizes |= {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2}
    else:
        sizes |= {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 192, "patch_size": 16}
    config = getattr(transformers, f"{name}Config")(**sizes)
    made: nn.Module = getattr(transformers, f"{name}ForImageClassification")(config)
    return made


#: Pixels by timm's name; small where the family allows it.
TIMM = {
    "vit_tiny_patch16_224": 224,
    "deit_tiny_distilled_patch16_224": 64,
    "eva02_tiny_patch14_224": 224,
    "cait_xxs24_224": 64,
    "xcit_nano_12_p16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "maxvit_tiny_tf_224": 224,
    "coatnet_nano_rw_224": 224,
    "levit_128s": 224,
    "mobilevit_xxs": 256,
    "mobilevitv2_050": 256,
    "edgenext_xx_small": 256,
    "efficientformer_l1": 224,
    "efficientvit_b0": 224,
    "pit_ti_224": 224,
    "pvt_v2_b0": 224,
    "twins_svt_small": 224,
    "convit_tiny": 224,
    "crossvit_9_240": 240,
    "visformer_tiny": 224,
    "tiny_vit_5m_224": 224,
    "gcvit_xxtiny": 224,
    "botnet26t_256": 256,
}
MODELS: dict[str, tuple[Callable[[str, int], nn.Module], str, int]] = {
    **{name: (_timm, name, px) for name, px in TIMM.items()},
    **{f"torchvision {name}": (_torchvision, name, 224) for name in ("vit_b_16", "swin_t", "maxvit_t")},
    **{f"transformers {name}": (_hugging_face, name, 64) for name in ("ViT", "Swin", "Dinov2")},
}


def heads_in(traced: TracedModel, plan: Plan | None = None) -> int:
    """How many heads of attention may go, or how many of them a plan leaves."""
    kept = {(cut.path, cut.side): len(cut.kept) / cut.width for cut in plan.cuts} if plan else {}
    groups = [s for group in traced.coupling.groups for s in group.subgroups if s.of_heads]
    return round(sum(s.size * kept.get((s.root.path, s.root.side), 1.0) for s in groups))


def _trains(model: nn.Module, x: Tensor) -> bool:
    output = model.train()(x)
    output = getattr(output, "logits", output)
    sum(t.square().sum() for t in (output if isinstance(output, tuple) else (output,))).backward()
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def measure(make: Callable[[], nn.Module], px: int) -> Line:
    """One model: CPU seconds of tracing and of all, what goes, and what stays for which reason."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(1, 3, px, px)
    before = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    traced = TracedModel.of(model, x)
    trace_seconds, start = time.process_time() - start, time.process_time()
    report = prune_(model, x, ratio=0.5, allocation="local")
    seconds = time.process_time() - start
    return {
        "px": px,
        "params": before,
        "removed": 1 - sum(p.numel() for p in model.parameters()) / before,
        "heads": heads_in(traced),
        "heads left": heads_in(traced, getattr(model, PLAN_ATTRIBUTE)),
        "trace s": round(trace_seconds, 1),
        "s": round(seconds, 1),
        "difference": report.max_error,
        "trains": _trains(model, torch.cat([x, x])),
        "excluded": sorted({left.reason.partition(":")[0] for left in report.excluded}),
    }


def line_of(make: Callable[[], nn.Module], px: int) -> Line:
    """As `measure`, or the error."""
    try:
        return measure(make, px)
    except Exception as error:
        return {"px": px, "error": f"{type(error).__name__}: {error}"[:300]}


def make_page(lines: dict[str, Line]) -> None:
    """Write `docs/coverage_transformers.md` from the results."""
    good = {name: line for name, line in lines.items() if "error" not in line}
    rows = [
        (
            name,
            line["px"],
            f"{line['params'] / 1e6:.1f} M",
            f"{line['removed']:.0%}",
            f"{line['heads left']} of {line['heads']}" if line["heads"] else "none found",
            f"{line['difference']:.0e}",
            line["trace s"],
            line["s"],
            "; ".join(line["excluded"]),
        )
        for name, line in good.items()
    ]
    head = ("model", "px", "parameters", "go", "heads left", "difference", "trace, s", "all, s", "excluded")
    write_page(
        DOCS / f"{NAME}.md",
        NAME,
        models=len(lines),
        shrink=sum(line["heads left"] < line["heads"] for line in good.values()),
        much=sum(line["removed"] >= 0.65 for line in good.values()),
        right=sum(line["difference"] <= 1e-10 and line["trains"] for line in good.values()),
        slow=[name for name, line in good.items() if line["s"] > 60],
        errors={name: line["error"] for name, line in lines.items() if "error" in line},
        table=table(head, rows, "l" + "r" * 7 + "l"),
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="name")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    lines: dict[str, Line] = json.loads(path.read_text("utf-8"))["models"] if path.exists() else {}
    todo = [] if options.page else options.names or [name for name in MODELS if name not in lines]
    for name in todo:
        make, model, px = MODELS[name]
        lines[name] = line_of(partial(make, model, px), px)
        print(name, lines[name], flush=True)
        ordered = {known: lines[known] for known in MODELS if known in lines}
        write(NAME, {"versions": versions(), "models": ordered})
    make_page({name: lines[name] for name in MODELS if name in lines})


if __name__ == "__main__":
    main()
