"""The notebook: it runs, and what is stored of it, there and on its page, is of the code as it is."""

from __future__ import annotations

import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.scripts import loaded

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded(ROOT / "scripts" / "notebook.py")


def test_outputs_are_those_of_the_code(script: ModuleType) -> None:
    """Whoever changes a cell runs the script, which writes the page."""
    cells = json.loads(script.NOTEBOOK.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    shown = re.findall(r"```py\n(.*?)\n```", script.PAGE.read_text("utf-8"), re.DOTALL)
    assert ["".join(cell["source"]) for cell in code] == shown, "run: python scripts/notebook.py"
    assert all(cell["outputs"] for cell in code[1:])
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]


def test_the_page_shows_what_is_stored(script: ModuleType) -> None:
    text = script.PAGE.read_text("utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 2
    assert all((script.PAGE.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    stored = text + script.NOTEBOOK.read_text("utf-8")
    assert not any(word in stored for word in ("/tmp", "site-packages", "stderr"))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="running notebooks needs nbclient and ipykernel")
    for name in ("nbclient", "ipykernel", "matplotlib", "sklearn"):
        if find_spec(name) is None:
            pytest.skip(f"the notebook needs {name}")
    for name in ("PYTHONPATH", "MPLBACKEND", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")  # what the script sets is taken back
    notebook = nbformat.read(script.NOTEBOOK, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the client's own event loop
        script.execute(notebook)
    text, pictures = script.page(notebook)
    assert len(pictures) == 2
    dense, pruned, recovered = map(
        float, re.search(r"dense ([\d.]+)%.* ([\d.]+)%.* ([\d.]+)%", text).groups()
    )
    assert dense > 97
    assert recovered > pruned - 1
    assert "True" in text
