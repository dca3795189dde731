"""What the package promises as a whole: light to import, layered one way, typed, one version."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ss_pruning

ROOT = Path(__file__).parents[1]
CORE = Path(ss_pruning.__file__).parent

# `import ss_pruning` must load none of these.
HEAVY = (
    "accelerate",
    "matplotlib",
    "nni",
    "ray",
    "rich",
    "sklearn",
    "ss_pruning.demo",
    "timm",
    "torch_pruning",
    "typer",
)

# A file may import, when it is loaded, files of its own layer and of those above it in this list.
LAYERS = [
    {
        "_atomic",
        "_choices",
        "_objects",
        "decisions",
        "errors",
        "hooks",
        "labels",
        "pooling_indices",
        "report_style",
        "stages",
        "walking",
    },
    {"_memento"},
    {"_cache", "cloning", "layers", "outputs", "preprocessing", "refusing", "regression"},
    {"agreement", "running"},
    {"wiring"},
    {"_decode", "cifar", "measuring", "pulling", "slots"},
    {"provenance", "staying"},
    {"batches"},
    {"data", "moments", "coupling", "redundancy"},
    {"latency", "liveness", "macs", "prefix", "strength", "surgery"},
    {"layer_times", "relevance"},
    {"planning"},
    {"distributed", "explicit", "following", "masking", "masks", "reordering"},
    {"sparsity", "verification"},
    {"soundness"},
    {"settling"},
    {"hastening"},
    {"compensation", "summing"},
    {"distillation", "folding", "reconstruction", "reestimation", "side_by_side"},
    {"damage"},
    {"cutting", "defaults"},
    {"exporting", "histories", "report"},
    {"_console", "_options", "accounting", "comparison", "report_certainty", "report_parts", "scores"},
    {"comparison_html", "doctor", "report_strength"},
    {"report_html"},
    {"files"},
    {"models"},
    {"named"},
    {"contest"},
    {"_job", "benching", "compaction", "pruning"},
    {"_delivery"},
    {"cli"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer} | {"demo": 1}


def loaded_by(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Run `code` in a fresh interpreter and return which of the modules `names` it loaded."""
    probe = f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def imports_on_load(source: str, package: str = "ss_pruning") -> set[str]:
    """Return the full names that `source`, a file of `package`, imports when it is loaded.

    Imports in functions run later and those under `if TYPE_CHECKING` never: neither counts. `from a import b`
    gives both `a` and `a.b`, since `b` may be a module.
    """
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(([package] if node.level else []) + ([node.module] if node.module else []))
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))
    return found


def core_imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return, for each core file, the parts of `ss_pruning` that it imports when it is loaded."""
    prefix = "ss_pruning."
    return {
        name: {
            found.removeprefix(prefix).split(".")[0] for found in imports_on_load(source) if prefix in found
        }
        & (sources.keys() | {"integrations"})
        for name, source in sources.items()
    }


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """Return what breaks the one-way order among the core files `sources` (name to text)."""
    graph = core_imports(sources)
    wrong = [f"{name} has no place in LAYERS" for name in sources if name not in DEPTH]
    for name, imported in graph.items():
        for other in imported:
            if other == "integrations":
                wrong.append(f"{name} imports integrations outside a function")
            elif DEPTH.get(other, 0) > DEPTH.get(name, 0):
                wrong.append(f"{name} imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"cycle: {' <- '.join(error.args[1])}")
    return sorted(wrong)


def core_sources() -> dict[str, str]:
    """Return name and text of every core file but `__init__`; a subpackage goes by its own name."""
    files = {path.stem: path for path in CORE.glob("*.py") if path.stem != "__init__"}
    files["demo"] = CORE / "demo" / "__init__.py"
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def test_import_is_lean() -> None:
    assert loaded_by("import ss_pruning") == []


@pytest.mark.parametrize("name", ["rich", "typer"])
def test_lean_import_test_can_fail(name: str) -> None:
    assert name in loaded_by(f"import ss_pruning\nimport {name}")


def test_core_imports_go_one_way() -> None:
    assert wrong_imports(core_sources()) == []


def test_core_loads_no_framework_with_its_modules() -> None:
    frameworks = {
        "accelerate",
        "lightning",
        "matplotlib",
        "nni",
        "pytorch_lightning",
        "ray",
        "sklearn",
        "timm",
        "torch_pruning",
    }
    for name, source in core_sources().items():
        roots = {found.split(".")[0] for found in imports_on_load(source)}
        assert not roots & frameworks, name


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"errors": "from ss_pruning.layers import x", "layers": "import ss_pruning.errors"}, "cycle"),
        ({"moments": "from ss_pruning import strength", "strength": ""}, "moments imports strength"),
        ({"moments": "from .strength import Strengths", "strength": ""}, "moments imports strength"),
        ({"moments": "from . import strength", "strength": ""}, "moments imports strength"),
        ({"moments": "try:\n    import ss_pruning.cli\nexcept E: pass", "cli": ""}, "moments imports cli"),
        ({"moments": "class A:\n    from ss_pruning.cli import app", "cli": ""}, "moments imports cli"),
        ({"pruning": "from ss_pruning.integrations import x"}, "pruning imports integrations outside"),
        ({"novel": ""}, "novel has no place"),
    ],
)
def test_one_way_test_can_fail(sources: dict[str, str], message: str) -> None:
    assert any(wrong.startswith(message) for wrong in wrong_imports(sources))


def test_one_way_test_lets_right_imports_pass() -> None:
    late = "def f():\n    from ss_pruning.integrations import x"
    typing_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ss_pruning.cli import app"
    sources = {
        "layers": "from ss_pruning.errors import E",
        "errors": "",
        "pruning": late,
        "moments": typing_only,
    }
    assert wrong_imports(sources | {"cli": "from ss_pruning import layers"}) == []


def test_integrations_load_by_their_full_name() -> None:
    assert loaded_by("import ss_pruning.integrations", ("ss_pruning.integrations",))


def test_masks_are_compacted_without_nni() -> None:
    """Its masks are plain tensors; only its pruners and its speedup need it."""
    assert loaded_by("import ss_pruning.integrations.nni_masks", ("nni", "timm", "torch_pruning")) == []
    blocked = "import sys\nsys.modules['nni'] = None\n"
    assert loaded_by(f"{blocked}import ss_pruning.integrations.nni_masks", ("ss_pruning.compaction",))
    with pytest.raises(subprocess.CalledProcessError) as failure:
        loaded_by(f"{blocked}import ss_pruning.integrations.nni_adapter")
    assert "pip install 'ss-pruning[nni]'" in failure.value.stderr


def test_integrations_refuse_their_bare_name() -> None:
    if not (ROOT / "integrations").is_dir():
        pytest.skip("only a checkout has a folder of that name")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        loaded_by("import integrations")
    assert re.search(r"ImportError: .*write 'import ss_pruning\.integrations' instead", failure.value.stderr)


def test_types_are_announced() -> None:
    assert (Path(ss_pruning.__file__).parent / "py.typed").is_file()


def test_files_name_one_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # No tomllib in Python 3.10: the line is found by its form.
    assert re.findall(r'^version = "(.+)"$', project, flags=re.MULTILINE) == [ss_pruning.__version__]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {ss_pruning.__version__}" in citation.splitlines()


def test_installed_version_is_that_of_the_code() -> None:
    try:
        installed = importlib.metadata.version("ss-pruning")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == ss_pruning.__version__
