"""The Python blocks of a page run, one after the other, as a consumer would type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Pages, and the packages that they need besides our own dependencies.
PAGES = {
    "distributed.md": ("pytorch_lightning",),
    "exporting.md": ("onnxruntime", "onnxscript"),
    "recovery_how.md": ("sklearn",),
    "sparse_training.md": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    missing = [name for name in PAGES[page] if not find_spec(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: optional extras")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert len(blocks) > 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
