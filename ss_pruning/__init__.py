"""Prune CNNs by synaptic strength: score every connection, cut channels exactly, keep the model working."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ss_pruning import errors
from ss_pruning.config import (
    Allocation,
    FoldLinear,
    FoldMean,
    NoCompensation,
    Reconstruct,
    Synaptic,
    SyntheticImages,
)
from ss_pruning.recovery.settings import Recovery

if TYPE_CHECKING:
    from ss_pruning.compensation.apply import register_compensation
    from ss_pruning.graph.layers import register_layer
    from ss_pruning.importance.scoring import register_importance
    from ss_pruning.importance.strength import Strengths, synaptic_strength
    from ss_pruning.integrations.nni.pruner import SynapticStrengthPruner
    from ss_pruning.integrations.torch_pruning.importance import SynapticImportance
    from ss_pruning.integrations.torch_pruning.pruner import GraphPruner
    from ss_pruning.io.checkpoint import load, save
    from ss_pruning.io.dense import load_dense
    from ss_pruning.io.export import export
    from ss_pruning.io.int8 import export_int8
    from ss_pruning.profiling.latency import measure_latency
    from ss_pruning.pruning import plan, prune_
    from ss_pruning.recovery.imitation import ImitationLoss
    from ss_pruning.recovery.recover import recover_
    from ss_pruning.recovery.report import RecoveryReport
    from ss_pruning.report.records import Report
    from ss_pruning.sparsity.compaction import compact_
    from ss_pruning.sparsity.penalty import StrengthPenalty
    from ss_pruning.surgery.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "FoldLinear",
    "FoldMean",
    "GraphPruner",
    "ImitationLoss",
    "NoCompensation",
    "Plan",
    "Reconstruct",
    "Recovery",
    "RecoveryReport",
    "Report",
    "StrengthPenalty",
    "Strengths",
    "Synaptic",
    "SynapticImportance",
    "SynapticStrengthPruner",
    "SyntheticImages",
    "compact_",
    "errors",
    "export",
    "export_int8",
    "load",
    "load_dense",
    "measure_latency",
    "plan",
    "prune_",
    "recover_",
    "register_compensation",
    "register_importance",
    "register_layer",
    "save",
    "synaptic_strength",
]
if find_spec("nni") is None:  # `from ss_pruning import *` would ask for it
    __all__.remove("SynapticStrengthPruner")

# Loaded on first use, so that `import ss_pruning` stays light.
_LAZY = {
    "GraphPruner": "integrations.torch_pruning.pruner",
    "ImitationLoss": "recovery.imitation",
    "Plan": "surgery.plan",
    "RecoveryReport": "recovery.report",
    "Report": "report.records",
    "StrengthPenalty": "sparsity.penalty",
    "Strengths": "importance.strength",
    "SynapticImportance": "integrations.torch_pruning.importance",
    "SynapticStrengthPruner": "integrations.nni.pruner",
    "compact_": "sparsity.compaction",
    "export": "io.export",
    "export_int8": "io.int8",
    "load": "io.checkpoint",
    "load_dense": "io.dense",
    "measure_latency": "profiling.latency",
    "plan": "pruning",
    "prune_": "pruning",
    "recover_": "recovery.recover",
    "register_compensation": "compensation.apply",
    "register_importance": "importance.scoring",
    "register_layer": "graph.layers",
    "save": "io.checkpoint",
    "synaptic_strength": "importance.strength",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ss_pruning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ss_pruning.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
