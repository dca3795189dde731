"""Adapters, one package for each framework in which models are pruned, trained or run: `ss_pruning.integrations`."""

from __future__ import annotations

if __name__ == "integrations":
    raise ImportError(
        "this folder is part of ss_pruning and does not work under the bare name 'integrations'; "
        "write 'import ss_pruning.integrations' instead (after 'pip install -e .' in a checkout)"
    )
