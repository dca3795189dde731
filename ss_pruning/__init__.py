"""Prune CNNs by synaptic strength: score every connection, cut channels exactly, keep the model working."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ss_pruning import errors
from ss_pruning.graph.groups import couple
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.strength import Strengths, synaptic_strength
from ss_pruning.surgery.plan import Plan

if TYPE_CHECKING:
    from ss_pruning.integrations.torch_pruning.importance import SynapticImportance
    from ss_pruning.io.checkpoint import load, save
    from ss_pruning.io.export import export
    from ss_pruning.profiling.latency import measure_latency
    from ss_pruning.pruning import prune_
    from ss_pruning.report.records import Report
    from ss_pruning.sparsity.compaction import compact_

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
    "Report": "ss_pruning.report.records",
    "SynapticImportance": "ss_pruning.integrations.torch_pruning.importance",
    "compact_": "ss_pruning.sparsity.compaction",
    "export": "ss_pruning.io.export",
    "load": "ss_pruning.io.checkpoint",
    "measure_latency": "ss_pruning.profiling.latency",
    "prune_": "ss_pruning.pruning",
    "save": "ss_pruning.io.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ss_pruning' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
