"""Walk one model through `prune_` as somebody who reads the code does, and count the stops.

    python scripts/walk.py            # the numbers
    python scripts/walk.py --steps    # and each step

A function is read once, where it is called first, and the next one then: each change of file on the way is a stop. A
call is upward where what is called lies in a package above the caller's, in the order of pyproject.toml: a callback
that climbs back up.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch
from torch import nn

import ss_pruning

ROOT = Path(__file__).parents[1]
CORE = Path(str(ss_pruning.__file__)).parent


class Step(NamedTuple):
    """From one function to another."""

    caller: CodeType
    called: CodeType


class Walk:
    """Notes, as a profiler, from where each function of the core is called first."""

    def __init__(self) -> None:
        self.read: set[CodeType] = set()
        self.steps: list[Step] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code in self.read or not _is_core(code):
            return
        self.read.add(code)
        caller = next((f.f_code for f in _callers(frame) if _is_core(f.f_code)), None)
        if caller is not None:
            self.steps.append(Step(caller, code))

    def files(self, but: str = "-") -> list[str]:
        """The files of what was read, in that order; those of one package left out."""
        codes = [self.steps[0].caller, *(step.called for step in self.steps)]
        return [file for file in map(file_of, codes) if not file.startswith(f"{but}/")]

    def upward(self) -> list[Step]:
        """The calls of what lies in a package above."""
        height = floors()
        return [step for step in self.steps if _height(step.called, height) > _height(step.caller, height)]


def stops(files: list[str]) -> int:
    """How often the file changes; the first one counts."""
    return 1 + sum(a != b for a, b in itertools.pairwise(files))


def _callers(frame: FrameType) -> Iterator[FrameType]:
    above = frame.f_back
    while above is not None:
        yield above
        above = above.f_back


def _is_core(code: CodeType) -> bool:
    path = Path(code.co_filename)
    return CORE in path.parents and not code.co_name.startswith("<")


def file_of(code: CodeType) -> str:
    """Its path below the package."""
    return str(Path(code.co_filename).relative_to(CORE).with_suffix(""))


def is_tool(code: CodeType) -> bool:
    """Whether it is of what every package uses: hooks and calls of a model come back from there."""
    return file_of(code).startswith("_utils/")


def floors() -> dict[str, int]:
    """By package, how high it lies; those that may not import each other lie on one floor."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^layers = \[(.*?)\]", text, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    names = re.findall(r'"([^"]+)"', found[1])
    return {name: -level for level, line in enumerate(names) for name in line.split(" : ")}


def _height(code: CodeType, height: dict[str, int]) -> int:
    return height[file_of(code).partition("/")[0]]


def net() -> nn.Module:
    """Two convolutions in a residual block, with all that the main job looks at and nothing more."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def walked() -> Walk:
    """What `prune_` does with one model and no options."""
    model, x, walk = net(), torch.randn(2, 3, 8, 8), Walk()
    ss_pruning.prune_(net(), x, macs=0.7)  # what is imported and looked up once is no part of it
    sys.setprofile(walk)
    try:
        ss_pruning.prune_(model, x, macs=0.7)
    finally:
        sys.setprofile(None)
    return walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", action="store_true", help="print who calls what first")
    options = parser.parse_args()
    walk = walked()
    upward = walk.upward()
    for step in walk.steps if options.steps else ():
        caller, called = (f"{file_of(code)}.{code.co_name}" for code in step)
        print(f"{'^' if step in upward else ' '} {caller} -> {called}")
    print(f"{len(walk.read)} functions")
    for what, files in (("in all", walk.files()), ("without _utils", walk.files("_utils"))):
        print(f"{what}: {len(set(files))} files, {stops(files)} stops")
    print(
        f"{len(upward)} calls go up, {sum(not is_tool(step.caller) for step in upward)} of them not from _utils"
    )


if __name__ == "__main__":
    main()
