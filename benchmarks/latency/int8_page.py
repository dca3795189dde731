"""Turn benchmarks/results/int8.json into docs/int8.md: no figure is typed in by hand.

python -m benchmarks.latency.int8_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import DOCS, RESULTS, made_on
from benchmarks.latency.int8 import VARIANTS
from benchmarks.pages import table, write_page
from ss_pruning.report.records import TOO_NOISY, crosses_one

PAGE = DOCS / "int8.md"
HEADS = ("", "file", "of dense", "time", "of dense", "middle half")
BOTH = VARIANTS[-1]


def make_page(found: dict[str, Any], page: Path = PAGE, programs: dict[str, Any] | None = None) -> Path:
    """Write a table for each net, where both together are no gain, and torchao's programs beside onnxruntime."""
    nets = found["nets"]
    return write_page(
        page,
        "int8",
        macs=found["macs"],
        onnxruntime=found["onnxruntime"],
        nets=[{"name": name, "table": net_table(net), **net} for name, net in nets.items()],
        gains=[gain(name, net) for name, net in nets.items()],
        widths=widths_table(found["widths"]) if "widths" in found else "",
        programs=programs_table(programs["nets"]) if programs else "",
        torchao=programs["torchao"] if programs else "",
        versions=made_on(
            [{"versions": found["versions"], "machine": net["machine"]} for net in nets.values()]
        ),
        processors=sorted({net["machine"]["name"] for net in nets.values()}),
    )


def net_table(net: dict[str, Any]) -> str:
    heads = [*HEADS, *([net["measure"], "same class"] if net["trained"] else [])]
    heads = [head for head in heads if head != "same class" or "agreement" in net["variants"][BOTH]]
    return table(heads, (_row(name, net)[: len(heads)] for name in VARIANTS))


def _row(name: str, net: dict[str, Any]) -> list[str]:
    line, dense = net["variants"][name], net["variants"]["dense"]
    low, high = line["of_dense_spread"]
    share = TOO_NOISY if crosses_one((low, high)) else f"{line['of_dense']:.2f}"
    row = [name, f"{line['bytes'] / 1e6:.2f} MB", f"{line['bytes'] / dense['bytes']:.2f}"]
    row += [f"{1000 * line['seconds']:.1f} ms", "" if line is dense else share]
    row += ["" if line is dense else f"{low:.2f} to {high:.2f}"]
    if net["trained"]:
        row += [f"{100 * line['worth']:.1f}"]
        row += [f"{100 * line['agreement']:.1f}" if "agreement" in line else ""]
    return row


def widths_table(found: dict[str, Any]) -> str:
    """Time by width, as a share of the last one's, beside the share of multiply-accumulates."""
    last = int(list(found["widths"])[-1])
    rows = [
        [
            width,
            f"{(int(width) / last) ** 2:.2f}",
            f"{line['of_last']:.2f}",
            "{:.2f} to {:.2f}".format(*line["spread"]),
        ]
        for width, line in found["widths"].items()
    ]
    return table(["width", f"multiply-accumulates, of {last}", f"time, of {last}", "middle half"], rows, "r")


def programs_table(nets: dict[str, Any]) -> str:
    """Files of both kinds of the same nets."""
    heads = [
        "net",
        "",
        "ONNX",
        ".pt2",
        "error",
        "error",
        "same class",
        "same class",
        "time of .pt2",
        "middle half",
    ]
    rows = []
    for name, net in nets.items():
        for variant, found in net["variants"].items():
            kinds = found["onnx"], found["pt2"]
            low, high = found["of_onnx_spread"]
            rows.append(
                [
                    name if net["trained"] else f"{name} (random weights)",
                    variant,
                    *(f"{kind['bytes'] / 1e6:.2f} MB" for kind in kinds),
                    *(f"{100 * kind['error']:.2f}" for kind in kinds),
                    *(f"{100 * kind['agreement']:.1f}" for kind in kinds),
                    TOO_NOISY if crosses_one((low, high)) else f"{found['of_onnx']:.2f}",
                    f"{low:.2f} to {high:.2f}",
                ]
            )
    return table(heads, rows, "ll")


def gain(name: str, net: dict[str, Any]) -> str:
    """Whether both together are smaller and faster than either alone, in words."""
    lines, lacks = net["variants"], []
    for other in ("pruned", "INT8"):
        if lines[BOTH]["bytes"] >= lines[other]["bytes"]:
            lacks.append(f"no smaller than {other} alone")
        low, high = lines[other]["both_of_this_spread"]
        if low >= 1:
            lacks.append(f"slower than {other} alone")
        elif high >= 1:
            lacks.append(f"{TOO_NOISY} whether faster than {other} alone")
    return f"{name}: {', '.join(lacks) or 'smaller and faster than either alone'}"


if __name__ == "__main__":
    more = RESULTS / "int8_program.json"
    programs = json.loads(more.read_text()) if more.is_file() else None
    print(make_page(json.loads((RESULTS / "int8.json").read_text()), programs=programs))
