"""How much of transformers and hybrids goes, a small variant a file of timm; torchvision, Hugging Face from config.

    OMP_NUM_THREADS=1 python -m benchmarks.coverage.transformers            # what is not in the results yet
    OMP_NUM_THREADS=1 python -m benchmarks.coverage.transformers vit_tiny_patch16_224  # these, anew
    OMP_NUM_THREADS=1 python -m benchmarks.coverage.transformers --narrow   # dimensions within heads, likewise
    python -m benchmarks.coverage.transformers --page                       # docs/coverage_transformers.md

Random weights, one image, local ratio 0.5. Every cut is checked by `prune_` itself (cut == masked in float64), the
small model is written as ONNX and run there, and takes a step of training. Beside it, what Torch-Pruning does.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import DOCS, RESULTS, versions, write
from benchmarks.coverage import heads_by_torch_pruning
from benchmarks.pages import table, write_page
from ss_pruning import Allocation, prune_
from ss_pruning.graph.traced import TracedModel
from ss_pruning.io.export import export
from ss_pruning.planning.head_dimensions import HeadDimensions
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan
from ss_pruning.surgery.same_attention import with_prunable_attention

NAME = "coverage_transformers"
Line = dict[str, Any]


#: A model and the size of images that it takes.
Made = tuple[nn.Module, int]
#: Pixels of images that are tried before a model's own size.
SMALL = 96


def _timm(name: str) -> Made:
    """As small as it takes images; those made without a classifier get one."""
    timm = importlib.import_module("timm")
    model: nn.Module = timm.create_model(name)
    own = model.pretrained_cfg["input_size"][1]  # type: ignore[index,union-attr]
    classes = {} if model.num_classes else {"num_classes": 1000}
    for px, size in ((SMALL, {}), (SMALL, {"img_size": SMALL}), (own, {})):
        try:
            model = timm.create_model(name, **size, **classes).eval()
            with torch.no_grad():
                model(torch.randn(1, 3, px, px))
        except Exception:  # its parts fit other sizes alone
            continue
        return model, px
    raise ValueError(f"timm's {name} does not run")


def _torchvision(name: str) -> Made:
    return importlib.import_module("torchvision").models.get_model(name), 224


def _hugging_face(name: str) -> Made:
    """From a small config: nothing is fetched."""
    transformers = importlib.import_module("transformers")
    stages: dict[str, Any] = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}
    sizes = {
        "Swin": {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
        "ConvNextV2": stages,
        "Segformer": stages | {"decoder_hidden_size": 64, "num_attention_heads": [1, 2, 4, 8]},
    }
    plain = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
    own = sizes.get(name, plain | {"patch_size": 16})
    config = getattr(transformers, f"{name}Config")(**own, image_size=64, num_labels=10)
    return getattr(transformers, f"{name}ForImageClassification")(config), 64


#: Of each file of timm's models with attention by heads a small variant, of some with several kinds more.
TIMM = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_relpos_small_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "flexivit_small",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "convit_tiny",
    "crossvit_9_240",
    "pit_ti_224",
    "tnt_s_legacy_patch16_224",
    "volo_d1_224",
    "nest_tiny",
    "levit_128s",
    "visformer_tiny",
    "twins_svt_small",
    "twins_pcpvt_small",
    "pvt_v2_b0",
    "mvitv2_tiny",
    "hiera_tiny_224",
    "hieradet_small",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "davit_tiny",
    "gcvit_xxtiny",
    "nextvit_small",
    "maxvit_tiny_tf_224",
    "coatnet_nano_rw_224",
    "coat_lite_tiny",
    "caformer_s18",
    "vitamin_small_224",
    "tiny_vit_5m_224",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "efficientvit_m0",
    "swiftformer_xs",
    "shvit_s1",
    "fastvit_sa12",
    "mobilenetv4_hybrid_medium",
    "botnet26t_256",
    "halonet26t",
    "lambda_resnet26t",
    "eca_botnext26ts_256",
    "samvit_base_patch16",
)
MODELS: dict[str, Callable[[], Made]] = {
    **{name: partial(_timm, name) for name in TIMM},
    **{f"torchvision {n}": partial(_torchvision, n) for n in ("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t")},
    **{
        f"transformers {name}": partial(_hugging_face, name)
        for name in ("ViT", "Swin", "Dinov2", "Segformer", "ConvNextV2")
    },
}


#: For comparison.
WITHOUT_ATTENTION = ("transformers ConvNextV2",)


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


def in_onnx(make: Callable[[], Made]) -> str:
    """Empty where the small model's file puts out in onnxruntime what it does, for two batch sizes; else why not."""
    torch.manual_seed(0)
    model, px = make()
    x = torch.randn(1, 3, px, px)
    with tempfile.TemporaryDirectory() as folder:
        try:
            prune_(model.eval(), x, ratio=0.5, allocation="local")
            export(model, f"{folder}/model.onnx", x)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]
    return ""


def measure(make: Callable[[], Made]) -> Line:
    """One model: CPU seconds of tracing and of all, what goes, and what stays for which reason."""
    torch.manual_seed(0)
    model, px = make()
    x, theirs = torch.randn(1, 3, px, px), copy.deepcopy(model).eval()
    before = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    traced = TracedModel.of(with_prunable_attention(model.eval(), x), x)
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
        "torch-pruning": heads_by_torch_pruning.attempt(theirs, x),
        "trains": _trains(model, torch.cat([x, x])),
        "excluded": sorted({left.reason.partition(":")[0] for left in report.excluded}),
    }


def narrow_layers(traced: TracedModel, plan: Plan) -> tuple[int, int]:
    """In how many layers there are heads, or a single one that mixes, and in how many of them all became narrower."""
    kept = {(cut.path, cut.side): cut.kept for cut in plan.cuts}
    heads = [s.root for group in traced.coupling.groups for s in group.subgroups if s.of_heads]
    found = HeadDimensions(traced.connectivity)
    single = [d.subgroups[0].root for path in traced.connectivity.layers for d in found.of_one(path)]
    rows = [(root, root.index) for root in heads] + [(root, root.index.reshape(1, -1)) for root in single]
    stays = [np.isin(index, kept.get((root.path, "out"), index)).sum(1) for root, index in rows]
    narrower = sum(
        bool((left > 0).all() and (left < index.shape[1]).any())
        for left, (_, index) in zip(stays, rows, strict=True)
    )
    return len(rows), narrower


def narrow(make: Callable[[], Made]) -> Line:
    """The same with dimensions within heads: in how many layers with heads these go, and how much; or the error."""
    torch.manual_seed(0)
    model, px = make()
    x = torch.randn(1, 3, px, px)
    before = sum(p.numel() for p in model.parameters())
    traced = TracedModel.of(with_prunable_attention(model.eval(), x), x)
    start = time.process_time()
    try:
        report = prune_(model, x, ratio=0.5, allocation=Allocation("local", heads="narrow"))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    layers, narrower = narrow_layers(traced, getattr(model, PLAN_ATTRIBUTE))
    return {
        "layers": layers,
        "narrow": narrower,
        "removed": 1 - sum(p.numel() for p in model.parameters()) / before,
        "difference": report.max_error,
        "s": round(time.process_time() - start, 1),
        "trains": _trains(model, torch.cat([x, x])),
        "excluded": sorted({left.reason.partition(":")[0] for left in report.excluded}),
    }


def line_of(make: Callable[[], Made]) -> Line:
    """As `measure`, or the error."""
    try:
        return measure(make)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _said(error: str | None) -> str:
    return "not measured" if error is None else "no" if error else "yes"


def _theirs(line: Line | None) -> str:
    if line is None:
        return "not measured"
    return f"{line['outcome']}, {line['removed']:.0%}" if "removed" in line else line["outcome"]


def attention_shrinks(line: Line) -> bool:
    """Whether heads go, or dimensions within them."""
    return bool(line["heads left"] < line["heads"] or line.get("narrow", {}).get("narrow"))


def _narrow(line: Line | None) -> str:
    if line is None:
        return "not measured"
    return "failed" if "error" in line else f"{line['narrow']} of {line['layers']}, {line['removed']:.0%}"


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
            _said(line.get("onnx")),
            _narrow(line.get("narrow")),
            _theirs(line.get("torch-pruning")),
            "; ".join(line["excluded"]),
        )
        for name, line in good.items()
    ]
    narrowed = [line["narrow"] for line in good.values() if "layers" in line.get("narrow", {})]
    left = "model", "px", "parameters", "go", "heads left", "difference", "trace, s", "all, s"
    write_page(
        DOCS / f"{NAME}.md",
        NAME,
        models=len(lines),
        listed=len(MODELS),
        attending=sum(name not in WITHOUT_ATTENTION for name in good),
        shrink=sum(line["heads left"] < line["heads"] for line in good.values()),
        either=sum(map(attention_shrinks, good.values())),
        whole=[n for n, a in good.items() if a["heads left"] == a["heads"] and n not in WITHOUT_ATTENTION],
        little=[name for name, line in good.items() if line["removed"] < 0.65],
        much=sum(line["removed"] >= 0.65 for line in good.values()),
        right=sum(line["difference"] <= 1e-10 and line["trains"] for line in good.values()),
        onnx=sum(line.get("onnx") == "" for line in good.values()),
        written=sum("onnx" in line for line in good.values()),
        refused={name: line["onnx"] for name, line in good.items() if line.get("onnx")},
        tried=len(narrowed),
        narrowed=sum(line["narrow"] > 0 for line in narrowed),
        exact=sum(line["difference"] <= 1e-10 and line["trains"] for line in narrowed),
        theirs=Counter(line["torch-pruning"]["outcome"] for line in good.values() if "torch-pruning" in line),
        slow=[name for name, line in good.items() if line["s"] > 60],
        errors={name: line["error"] for name, line in lines.items() if "error" in line},
        earlier=[name for name, line in good.items() if line.get("earlier")],
        table=table((*left, "ONNX", "narrow", "TP", "excluded"), rows, "l" + "r" * 7 + "llll"),
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="name")
    parser.add_argument("--narrow", action="store_true", help="measure dimensions within heads alone")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = RESULTS / f"{NAME}.json"
    lines: dict[str, Line] = json.loads(path.read_text("utf-8"))["models"] if path.exists() else {}

    def note(name: str, line: Line) -> None:
        lines[name] = line
        print(name, line, flush=True)
        write(NAME, {"versions": versions(), "models": {k: lines[k] for k in MODELS if k in lines}})

    for name in (options.names or MODELS) if options.narrow else ():
        if options.names or "narrow" not in lines[name]:
            note(name, lines[name] | {"narrow": narrow(MODELS[name])})
    only_page = options.page or options.narrow
    todo = [] if only_page else options.names or [name for name in MODELS if name not in lines]
    for name in todo:
        note(name, line_of(MODELS[name]))
    for name in () if only_page else options.names or MODELS:
        if "onnx" not in lines[name]:
            note(name, lines[name] | {"onnx": in_onnx(MODELS[name])})
    make_page({name: lines[name] for name in MODELS if name in lines})


if __name__ == "__main__":
    main()
