"""INT8 by torchao, as `.pt2`, beside onnxruntime's: size, what the outputs are worth, and time once compiled.

    python -m benchmarks.latency.int8_program --nets resnet18 resnet50    # adds to results/int8_program.json
    python -m benchmarks.latency.int8_page                                # docs/int8.md

The nets, images and cuts of `benchmarks.latency.int8`. Each file is compared with the same net in float, on images that
nothing was calibrated on. Timed in a fresh process, where the `.pt2` must put out the same: compiled by inductor
with frozen weights, which needs a C++ compiler; one thread, the two in turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, ROOT, write
from benchmarks.latency.int8 import CASES, MACS, Case, in_turns, random_case
from ss_pruning import Allocation, export_int8, prune_
from ss_pruning.compensation.fidelity import Reference
from ss_pruning.importance.calibration import gather
from ss_pruning.profiling.latency import machine
from ss_pruning.profiling.onnx_model import OnnxModel

NETS: dict[str, Callable[[], Case]] = {**CASES, "resnet50": lambda: random_case("resnet50")}


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Dense and pruned, each in both formats."""
    found = {"dense": both(case.model, case, folder)}
    trained = case.labels is not None
    prune_(
        case.model,
        case.calibration[:1],
        macs=MACS,
        allocation=Allocation(round_to=case.round_to),
        compensation="reconstruct" if trained else "none",
        calibration=case.calibration if trained else None,
        ignore=case.ignore,
    )
    found["pruned"] = both(case.model, case, folder)
    return {"variants": found, "trained": trained, "images": len(case.others), "side": case.others.shape[-1]}


def both(model: nn.Module, case: Case, folder: Path) -> dict[str, Any]:
    """One net in both formats."""
    reference = Reference(model, gather(case.others, None))
    files = {kind: export_int8(model, folder / f"a.{kind}", case.calibration) for kind in ("onnx", "pt2")}
    program = torch.export.load(files["pt2"].path).module()
    runs = {"onnx": OnnxModel(files["onnx"].path), "pt2": program}
    torch.save({"images": case.others[:4], "outputs": program(case.others[:4]).detach()}, folder / "known.pt")
    code = "from benchmarks.latency.int8_program import elsewhere; elsewhere()"
    said = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(said.stdout)
    for kind, run in runs.items():
        fidelity = reference.fidelity(run)
        facts = {"bytes": files[kind].bytes, "error": fidelity.error, "agreement": fidelity.agreement}
        found[kind] = {**facts, "seconds": found[kind]}
    return found


@torch.no_grad()
def elsewhere() -> None:
    """In a fresh process: that the `.pt2` puts out the same there, and the times of both."""
    import torch._inductor.config
    import torchao.quantization.pt2e  # noqa: F401 - knows the operators of the file

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    known = torch.load(folder / "known.pt")
    program = torch.export.load(folder / "a.pt2").module()
    assert torch.equal(program(known["images"]), known["outputs"])
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(program)
        onnx, pt2 = in_turns([OnnxModel(folder / "a.onnx"), compiled], known["images"][:1])
    ratio = {"of_onnx": pt2.over(onnx), "of_onnx_spread": pt2.spread_over(onnx)}
    print(json.dumps({"onnx": onnx.median, "pt2": pt2.levelled(onnx).median, **ratio}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.nets:
        file = options.results / "int8_program.json"
        known = json.loads(file.read_text()) if file.is_file() else {"nets": {}}
        with tempfile.TemporaryDirectory() as folder:
            found = measured(NETS[name](), Path(folder))
        known["nets"][name] = {**found, "machine": machine(torch.device("cpu"))}
        tools = {"torchao": version("torchao"), "onnxruntime": version("onnxruntime")}
        write("int8_program", {**known, "macs": MACS, **tools}, options.results)
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
