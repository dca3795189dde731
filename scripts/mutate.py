"""Mutation test: break the core in small ways, one at a time, and see whether the tests notice.

python scripts/mutate.py --sample 15 --seed 0          # so many mutants of each module
python scripts/mutate.py planning/allocation --sample 40   # of one module
python scripts/mutate.py --survivors                   # those that survived, against tests written since
python scripts/mutate.py --report                      # write the table in CONTRIBUTING.md anew

A mutant is one changed place: a comparison, an arithmetic or boolean operator, a number, a condition, a call left out.
It runs in a copy of the checkout against the module's own fast tests; it is killed when they fail or take far longer
than they should. Results are kept in benchmarks/results/mutation.json, with every survivor.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch  # noqa: F401 - forks have it then

ROOT = Path(__file__).parents[1]
sys.dont_write_bytecode = True
RESULTS = ROOT / "benchmarks" / "results" / "mutation.json"

# The tests of each module, quickest to fail first.
TESTS = {
    "importance/strength": [
        "ss_pruning/importance/strength.py",
        "tests/sparsity/test_penalty.py",
        "tests/importance/test_strength.py",
    ],
    "importance/conditional_variance": [
        "tests/importance/test_conditional_variance.py",
        "tests/importance/test_removal_errors.py",
    ],
    "planning/allocation": ["tests/planning/test_allocation.py"],
    "_utils/outputs": ["tests/_utils/test_outputs.py"],
}

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
BOOLEAN = {ast.And: ast.Or, ast.Or: ast.And}


class Mutation(NamedTuple):
    """One place to change: the node's number in a walk of the module, what to do there, and how to call it."""

    place: int
    change: Callable[[ast.AST], ast.AST | None]
    line: int
    what: str


def swapped(table: dict[type, type], name: str, at: int | None = None) -> Callable[[ast.AST], None]:
    def change(node: ast.AST) -> None:
        holder = getattr(node, name)
        if at is None:
            setattr(node, name, table[type(holder)]())
        else:
            holder[at] = table[type(holder[at])]()

    return change


def counted_up(node: ast.AST) -> None:
    value = node.value  # type: ignore[attr-defined]
    node.value = not value if isinstance(value, bool) else value + 1  # type: ignore[attr-defined]


def negated(name: str) -> Callable[[ast.AST], None]:
    def change(node: ast.AST) -> None:
        setattr(node, name, ast.UnaryOp(ast.Not(), getattr(node, name)))

    return change


def changes_of(node: ast.AST) -> Iterator[tuple[Callable[[ast.AST], ast.AST | None], str]]:
    """What can be done to one node: a function that changes it (or returns what to put in its place), and a name."""
    if isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            yield swapped(COMPARISONS, "ops", at), f"{type(operator).__name__} swapped"
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        yield swapped(ARITHMETIC, "op"), f"{type(node.op).__name__} swapped"
    elif isinstance(node, ast.BoolOp):
        yield swapped(BOOLEAN, "op"), f"{type(node.op).__name__} swapped"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield counted_up, f"{node.value!r} changed"
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield negated("test"), "condition negated"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield lambda node: node.operand, f"{type(node.op).__name__} dropped"  # type: ignore[attr-defined]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield lambda _: ast.Pass(), "call left out"
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield lambda _: ast.Pass(), f"{type(node).__name__.lower()} left out"


def is_dead(node: ast.AST) -> bool:
    """True for what no test can or need see: annotations, messages of errors, imports, what needs a GPU."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)):
        return True
    if isinstance(node, (ast.If, ast.IfExp)):
        return bool(
            {"TYPE_CHECKING", "cuda"} & {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        )
    return False


def numbered(tree: ast.AST) -> list[ast.AST]:
    """All nodes that may change, always in the same order."""
    found: list[ast.AST] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        found.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            children = value if isinstance(value, list) else [value]
            todo.extend(child for child in children if isinstance(child, ast.AST) and not is_dead(child))
    return found


def mutations(tree: ast.AST) -> list[Mutation]:
    return [
        Mutation(place, change, getattr(node, "lineno", 0), what)
        for place, node in enumerate(numbered(tree))
        for change, what in changes_of(node)
    ]


def mutated(tree: ast.AST, mutation: Mutation) -> str:
    """The source with one place changed."""
    changed = copy.deepcopy(tree)
    target = numbered(changed)[mutation.place]
    instead = mutation.change(target)
    if instead is not None:
        for node in ast.walk(changed):
            for name, value in ast.iter_fields(node):
                if value is target:
                    setattr(node, name, instead)
                elif isinstance(value, list):
                    value[:] = [instead if entry is target else entry for entry in value]
    return ast.unparse(ast.fix_missing_locations(changed))


def copied() -> Path:
    """A copy of what the tests need."""
    place = Path(tempfile.mkdtemp(prefix="mutants-"))
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("ss_pruning", "integrations", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "conftest.py", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, place / name)
    return place


def survives(place: Path, tests: list[str], limit: float) -> bool:
    """True if the tests pass there within the limit (seconds), in a fork: torch is imported already."""
    child = os.fork()
    if not child:
        _run_tests(place, tests)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run_tests(place: Path, tests: list[str]) -> NoReturn:
    """Run them and end."""
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    os.chdir(place)
    sys.path[:] = [
        str(place),
        *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "scripts"))),
    ]
    os.environ["PYTHONPATH"] = str(place)  # of what tests start
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


def study(module: str, sample: int, seed: int) -> dict[str, object]:
    """Try `sample` mutants of a module, drawn with a seed; return the counts and the survivors."""
    source = (ROOT / "ss_pruning" / f"{module}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    found = mutations(tree)
    chosen = random.Random(seed).sample(found, min(sample, len(found)))
    place = copied()
    try:
        target = place / "ss_pruning" / f"{module}.py"
        begin = time.monotonic()
        if not survives(place, TESTS[module], 900):
            sys.exit(f"the tests of {module} fail as they are")
        limit = 3 * (time.monotonic() - begin) + 20
        survivors = []
        for number, mutation in enumerate(chosen, 1):
            target.write_text(mutated(tree, mutation), encoding="utf-8")
            alive = survives(place, TESTS[module], limit)
            if alive:
                survivors.append(f"{lines[mutation.line - 1].strip()}: {mutation.what}")
            fate = "SURVIVED" if alive else "killed"
            print(
                f"{module} {number}/{len(chosen)} line {mutation.line}: {mutation.what}: {fate}", flush=True
            )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    killed = len(chosen) - len(survivors)
    counts = {"possible": len(found), "tried": len(chosen), "killed": killed, "killed_at_first": killed}
    return {**counts, "seed": seed, "survivors": survivors}


def try_again(module: str, result: dict[str, Any], limit: float = 900) -> dict[str, Any]:
    """Try the survivors of an earlier study once more, against the tests as they are now.

    A survivor counts as killed when every place that its description fits is noticed.
    """
    source = (ROOT / "ss_pruning" / f"{module}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    found = mutations(tree)
    place = copied()
    alive = []
    try:
        for text in result["survivors"]:
            same = [m for m in found if f"{lines[m.line - 1].strip()}: {m.what}" == text]
            for mutation in same:
                target = place / "ss_pruning" / f"{module}.py"
                target.write_text(mutated(tree, mutation), encoding="utf-8")
                if survives(place, TESTS[module], limit):
                    alive.append(text)
                    break
            print(f"{module}: {text}: {'SURVIVED' if text in alive else 'killed'}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {**result, "killed": result["tried"] - len(alive), "survivors": alive}


def table(results: dict[str, dict[str, int]]) -> str:
    """The results as Markdown."""
    keys = ("possible", "tried", "killed_at_first", "killed")
    rows = [
        "| module | mutants possible | tried | killed at first | killed now |",
        "|---|---:|---:|---:|---:|",
    ]
    rows += [f"| `{m}` | {' | '.join(str(r[key]) for key in keys)} |" for m, r in results.items()]
    _, tried, first, killed = (sum(result[key] for result in results.values()) for key in keys)
    seeds = ", ".join(sorted({str(result["seed"]) for result in results.values()}))
    rows.append(f"\n{killed} of {tried} killed ({killed / tried:.0%}), drawn with seed {seeds}.")
    if first != killed:
        rows.append(
            f"At first it was {first / tried:.0%}: tests were written, or added to the module's list, for some that "
            "survived."
        )
    return "\n".join(rows)


def publish(results: dict[str, dict[str, int]]) -> None:
    page = ROOT / "CONTRIBUTING.md"
    text = page.read_text(encoding="utf-8")
    block = f"<!-- mutation -->\n{table(results)}\n<!-- /mutation -->"
    changed = re.sub(r"<!-- mutation -->.*<!-- /mutation -->", lambda _: block, text, flags=re.DOTALL)
    page.write_text(changed, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all by default")
    parser.add_argument("--sample", type=int, default=15, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="only try those again that survived")
    parser.add_argument("--report", action="store_true", help="only write the table in CONTRIBUTING.md anew")
    given = parser.parse_args()
    if unknown := set(given.modules) - TESTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    # Of modules that are no longer studied nothing is kept: their tests are not known.
    results = {module: stored[module] for module in TESTS if module in stored}
    for module in [] if given.report else given.modules or TESTS:
        if given.survivors and module in results:
            results[module] = try_again(module, results[module])
        else:
            results[module] = study(module, given.sample, given.seed)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    publish(results)


if __name__ == "__main__":
    main()
