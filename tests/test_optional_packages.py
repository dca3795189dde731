"""Each module of tests can be imported without the optional packages, or says which it needs before it needs them."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What one package brings along.
_BRINGS = {"nni": ("schema",), "torchvision": ("PIL",), "typer": ("rich",)}
_OURS = ("benchmarks", "examples", "scripts", "ss_pruning", "tests")


@cache
def always_there() -> frozenset[str]:
    """What a wheel without an extra and the script that tests it install, and what comes with Python."""
    needs = [need for need in requires("ss-pruning") or [] if "extra ==" not in need]
    names = {re.split(r"[^\w-]", need)[0].replace("-", "_").lower() for need in needs}
    return frozenset({*names, *_BRINGS["torchvision"], "pytest", "hypothesis", *sys.stdlib_module_names})


def file_of(module: str) -> Path | None:
    """Where one of ours is."""
    path = ROOT.joinpath(*module.split("."))
    found = (each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file())
    return next(found, None)


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, but for those that only a type checker reads, or that have another way (`try`)."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.unparse(statement.test):
            yield from run_at_import([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.With):
            yield from run_at_import(statement.body)
        else:
            yield statement


@cache
def imported(path: Path) -> tuple[tuple[int, str], ...]:
    """Lines and modules that a file imports, and with each the packages that it is in."""
    found = []
    for each in run_at_import(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(each, ast.Import):
            found += [(each.lineno, alias.name) for alias in each.names]
        elif isinstance(each, ast.ImportFrom) and each.module:
            parts = each.module.split(".")
            names = [".".join(parts[: n + 1]) for n in range(len(parts))]
            names += [f"{each.module}.{alias.name}" for alias in each.names]
            found += [(each.lineno, name) for name in names]
    return tuple(found)


def needed(path: Path, seen: set[Path]) -> set[str]:
    """The packages of others that a file needs, through all of ours that it imports."""
    seen.add(path)
    return {name for _, module in imported(path) for name in reached(module, seen)}


def reached(module: str, seen: set[Path]) -> set[str]:
    if module.split(".")[0] not in _OURS:
        return {module.split(".")[0]} - always_there()
    path = file_of(module)
    return needed(path, seen) if path and path not in seen else set()


def unsaid(path: Path) -> set[str]:
    """What a module of tests needs before it has said so."""
    text, said = path.read_text(encoding="utf-8"), {}
    for match in re.finditer(r'^(?:    )?(?:\w+ = )?pytest\.importorskip\(\s*"(\w+)', text, re.MULTILINE):
        for name in (match[1], *_BRINGS.get(match[1], ())):
            said.setdefault(name, text[: match.start()].count("\n") + 1)
    seen = {path}
    return {
        f"{name}, by line {line}"
        for line, module in imported(path)
        for name in reached(module, seen)
        if said.get(name, line) >= line
    }


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "tests").rglob("test_*.py")),
    ids=lambda path: path.relative_to(ROOT / "tests").as_posix(),
)
def test_says_what_it_needs(path: Path) -> None:
    assert unsaid(path) == set()
