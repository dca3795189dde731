"""Leaves out, where an optional package is missing, the modules that cannot be imported without it."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = {
    "nni": "integrations/nni/*.py",
    "pytorch_lightning": "integrations/lightning/*.py",
    "typer": "ss_pruning/cli/*.py",
}
collect_ignore_glob = [f"**/{files}" for name, files in _NEEDED.items() if not find_spec(name)]
