"""Which models can be pruned: plain Torch-Pruning and ours side by side, over timm's and torchvision's families.

Each model and side runs in a process of its own (forked from one that has imported everything) with a limit on CPU
time. Local ratio 0.5, the classifier kept, random weights. A line per model and side is appended to
`results/coverage.jsonl`; what is there for the same code is not run again, so the run can be stopped at any time.
`python -m benchmarks.coverage.page` makes `docs/coverage.md` of it.

    OMP_NUM_THREADS=1 python -m benchmarks.coverage.run
    OMP_NUM_THREADS=1 python -m benchmarks.coverage.run timm:resnet18 torchvision:vgg11 --only ours
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT
from benchmarks.coverage import worker
from benchmarks.coverage.names import Candidate, default_names

LINES = RESULTS / "coverage.jsonl"
#: CPU seconds that a model and side may take.
TIMEOUT = 60.0
Line = dict[str, Any]


def code_version(side: str) -> str:
    """A fingerprint of the code that a side's results depend on."""
    files = [Path(worker.__file__)]
    if side == "ours":
        for package in ("_utils", "graph", "importance", "planning", "surgery"):
            files += sorted((ROOT / "ss_pruning" / package).rglob("*.py"))
        files += [ROOT / "ss_pruning" / "pruning.py", ROOT / "ss_pruning" / "profiling" / "macs.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    return f"{digest.hexdigest()[:12]} torch {torch.__version__} torch-pruning {version('torch-pruning')}"


def read_lines(path: Path = LINES) -> list[Line]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def latest(lines: Iterable[Line]) -> dict[tuple[str, str], Line]:
    """The last line of each model and side."""
    return {(line["spec"], line["side"]): line for line in lines}


def compact() -> None:
    """Keep the last line of each model and side only."""
    lines = latest(read_lines())
    part = LINES.with_suffix(".part")
    part.write_text("".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)))
    os.replace(part, LINES)


def _child(spec: str, side: str, timeout: float, connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        connection.send(worker.examine(partial(worker.known, spec), side, timeout))
    except BaseException as error:  # the dense model itself fails, or memory runs out
        said = f"{type(error).__name__}: {error} at {traceback.format_exc()[-300:]}"
        connection.send({"status": "dense fails", "error": said})
    connection.close()


def run_one(spec: str, side: str, timeout: float) -> Line:
    """Run one side on one model in a process of its own; one that hangs is killed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(spec, side, timeout, sender))
    started = time.perf_counter()
    process.start()
    sender.close()
    line: Line = {"status": "killed", "error": "the process died or hung"}
    try:
        if receiver.poll(10 * timeout):
            line = receiver.recv()
    except EOFError:
        pass
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    wall = round(time.perf_counter() - started, 2)
    return {"spec": spec, "side": side, **line, "wall": wall, "code": code_version(side)}


def pending(specs: list[str], sides: list[str], again: bool) -> Iterator[tuple[str, str]]:
    """What is not in the file for this code yet."""
    done = latest(read_lines())
    for side in sides:
        code = code_version(side)
        for spec in specs:
            if again or done.get((spec, side), {}).get("code") != code:
                yield spec, side


def run(specs: list[str], sides: list[str], *, jobs: int, timeout: float, again: bool) -> None:
    todo = list(pending(specs, sides, again))
    codes = {side: code_version(side) for side in sides}
    print(f"{len(todo)} of {len(specs) * len(sides)} to run", flush=True)
    with ThreadPoolExecutor(jobs) as pool, LINES.open("a") as file:
        results = pool.map(lambda job: run_one(*job, timeout), todo)
        for i, line in enumerate(results, 1):
            line["code"] = codes[line["side"]]
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{i}/{len(todo)} {_headline(line)}", flush=True)


def _headline(line: Line) -> str:
    removed = f"{line['removed']:.0%} removed" if "removed" in line else ""
    said = line.get("error", "")[:160]
    return f"{line['spec']} {line['side']}: {line['status']} {line.get('seconds', 0):.1f} s {removed} {said}"


def chosen(names: list[str], family: str | None) -> list[Candidate]:
    """The models asked for; a bare name is one of timm's."""
    if names:
        return [Candidate(n if ":" in n else f"timm:{n}", "given", 0, 1.0, 9) for n in names]
    return [c for c in default_names() if family is None or family in c.family]


def main() -> int:
    """Run what is missing; `benchmarks.coverage.page` writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="timm:NAME or torchvision:NAME; default: one per family")
    parser.add_argument("--family", help="only families whose module/name contains this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", choices=worker.SIDES, help="only one side")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="CPU seconds a model and side")
    parser.add_argument("--again", action="store_true", help="run what is there for this code, too")
    options = parser.parse_args()
    candidates = chosen(options.names, options.family)
    sides = [options.only] if options.only else list(worker.SIDES)
    specs = [c.spec for c in candidates]
    run(specs, sides, jobs=options.jobs, timeout=options.timeout, again=options.again)
    if not options.names and not options.family:
        compact()
    return 0


if __name__ == "__main__":
    sys.exit(main())
