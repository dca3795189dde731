"""Run `examples/quickstart.ipynb` and keep what it puts out, in the notebook and as `docs/notebook.md`.

    python scripts/notebook.py

Needs the extras `dev`, `demo` and `plot`. A test compares the code of both files, so that neither is forgotten.
"""

from __future__ import annotations

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
PAGE = ROOT / "docs" / "notebook.md"


def main() -> None:
    """Execute, then write both files."""
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)
    nbformat.write(notebook, NOTEBOOK)
    text, pictures = page(notebook)
    for name, content in pictures.items():
        PAGE.with_name(name).write_bytes(content)
    PAGE.write_text(text, encoding="utf-8")


def execute(notebook: Any) -> None:
    """Run all cells in a new kernel and an empty folder; what differs from run to run without need goes."""
    import nbclient

    os.environ |= {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONWARNINGS": "ignore",  # libraries' own, of widgets that are not there
    }
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=600, resources=resources, record_timing=False).execute()
    notebook.metadata.pop("language_info", None)


def page(notebook: Any) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its pictures by the names under which the text shows them."""
    parts, pictures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        # Not "python": blocks of pages in that are run by a test, and this one is run as a notebook.
        parts.append(f"```py\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"notebook_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![what the cell above draws]({name})")
            else:
                parts.append(f"```text\n{output.get('text', data.get('text/plain', '')).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


if __name__ == "__main__":
    main()
