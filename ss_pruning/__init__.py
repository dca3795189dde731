"""Prune CNNs by synaptic strength: score every connection, cut channels exactly, keep the model working."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ss_pruning import errors
from ss_pruning.coupling import couple
from ss_pruning.provenance import trace
from ss_pruning.strength import Strengths, synaptic_strength
from ss_pruning.surgery import Plan

if TYPE_CHECKING:
    from ss_pruning.compaction import compact_
    from ss_pruning.exporting import export
    from ss_pruning.files import load, save
    from ss_pruning.integrations.torch_pruning_adapter import SynapticImportance
    from ss_pruning.latency import measure_latency
    from ss_pruning.pruning import prune_
    from ss_pruning.report import Report

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Report",
    "Strengths",
    "SynapticImportance",
    "compact_",
    "couple",
    "errors",
    "export",
    "load",
    "measure_latency",
    "prune_",
    "save",
    "synaptic_strength",
    "trace",
]

# Loaded on first use, so that `import ss_pruning` stays light.
_LAZY = {
    "Report": "ss_pruning.report",
    "SynapticImportance": "ss_pruning.integrations.torch_pruning_adapter",
    "compact_": "ss_pruning.compaction",
    "export": "ss_pruning.exporting",
    "load": "ss_pruning.files",
    "measure_latency": "ss_pruning.latency",
    "prune_": "ss_pruning.pruning",
    "save": "ss_pruning.files",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ss_pruning' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
