"""What the package promises as a whole: light to import, layered one way, typed, one version."""

from __future__ import annotations

import ast
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
    "ss_pruning.sources.demo",
    "timm",
    "torch_pruning",
    "typer",
)


def loaded_by(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Run `code` in a fresh interpreter and return which of the modules `names` it loaded."""
    probe = f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def linted(config: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says by a configuration."""
    code = (
        f"from importlinter.cli import lint_imports; sys.exit(lint_imports(config_filename={str(config)!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_import_is_lean() -> None:
    assert loaded_by("import ss_pruning") == []


@pytest.mark.parametrize("name", ["rich", "typer"])
def test_lean_import_test_can_fail(name: str) -> None:
    pytest.importorskip(name, reason="an optional extra: pip install 'ss-pruning[cli]'")
    assert name in loaded_by(f"import ss_pruning\nimport {name}")


def test_imports_go_one_way_and_the_core_knows_no_framework() -> None:
    pytest.importorskip("importlinter", reason="needs import-linter")
    done = linted(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout


def test_the_linter_can_fail(tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="needs import-linter")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wrong = tmp_path / "pyproject.toml"
    wrong.write_text(
        text.replace('    "surgery",\n    "graph",\n', '    "graph",\n    "surgery",\n'), encoding="utf-8"
    )
    assert wrong.read_text(encoding="utf-8") != text
    assert "BROKEN" in linted(wrong).stdout


def test_no_folder_is_crowded_and_each_says_what_it_is_for() -> None:
    for folder in {path.parent for top in (CORE, ROOT / "integrations") for path in top.rglob("*.py")}:
        files = list(folder.glob("*.py"))
        assert len(files) <= 12, folder
        assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""'), folder


def test_packages_name_files_that_they_have() -> None:
    for package in CORE.rglob("__init__.py"):
        said = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
        named = re.findall(r"`(\w+)`", said)
        there = {path.stem for path in package.parent.iterdir()}
        assert not set(named) - there - {"digits"}, f"{package}: {named}"


def test_integrations_load_by_their_full_name() -> None:
    assert loaded_by("import ss_pruning.integrations", ("ss_pruning.integrations",))


def test_everything_is_imported_without_nni() -> None:
    code = "import sys; sys.modules['nni'] = None\nfrom ss_pruning import *\nprint(prune_, GraphPruner)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


def test_masks_are_compacted_without_nni() -> None:
    """Its masks are plain tensors; only its pruners and its speedup need it."""
    assert loaded_by("import ss_pruning.integrations.nni.masks", ("nni", "timm", "torch_pruning")) == []
    blocked = "import sys\nsys.modules['nni'] = None\n"
    assert loaded_by(
        f"{blocked}import ss_pruning.integrations.nni.masks", ("ss_pruning.sparsity.compaction",)
    )
    with pytest.raises(subprocess.CalledProcessError) as failure:
        loaded_by(f"{blocked}import ss_pruning.integrations.nni.pruner")
    assert "pip install 'ss-pruning[nni]'" in failure.value.stderr


WITHOUT_CLI = "import sys\nsys.modules |= {'rich': None, 'typer': None}\n"


def test_the_library_needs_nothing_of_the_command_line(tmp_path: Path) -> None:
    code = f"""
import torch, ss_pruning
from torch import nn
x = torch.zeros(1, 3, 8, 8)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
report = ss_pruning.prune_(model, x, params=0.6)
print(report, repr(report))
report.save_html({str(tmp_path / "report.html")!r})
report.save_json({str(tmp_path / "report.json")!r})
ss_pruning.compact_(model, x).to_json()
"""
    loaded_by(WITHOUT_CLI + code)
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_the_command_says_in_a_sentence_what_it_lacks() -> None:
    code = f"{WITHOUT_CLI}from ss_pruning.cli.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"ss-prune needs \w+, .*: pip install 'ss-pruning\[cli\]'\n", done.stderr), (
        done.stderr
    )


def test_other_missing_packages_are_not_laid_to_the_command_line() -> None:
    pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")
    code = "import sys\nsys.modules['ss_pruning.cli.options'] = None\nfrom ss_pruning.cli.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "ModuleNotFoundError" in done.stderr


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
