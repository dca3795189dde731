"""A model with attention whose heads can go, as long as it computes what the model computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning._utils.copying import shell
from ss_pruning._utils.modules import modules_of
from ss_pruning._utils.running import output_of
from ss_pruning.graph.attention import make_prunable_
from ss_pruning.surgery.equivalence.agreement import compare
from ss_pruning.surgery.equivalence.precision import PRECISIONS, stirred


def with_prunable_attention(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy in whose `torch.nn.MultiheadAttention` heads can go; the model itself if it has none, or would differ.

    Plans for the copy fit the model: cutting it makes prunable what they name.
    """
    if not any(isinstance(module, nn.MultiheadAttention) for module in modules_of(model).values()):
        return model
    prunable = shell(model)
    make_prunable_(prunable)
    dense = stirred(model)
    twin = shell(dense)
    make_prunable_(twin)
    return prunable if _same(dense, twin, example_inputs) else model


def _same(dense: nn.Module, twin: nn.Module, example_inputs: Any) -> bool:
    for precise, change, tolerance in PRECISIONS:
        inputs = pytree.tree_map_only(Tensor, change, example_inputs)
        try:
            expected = output_of(precise(dense), inputs)
        except Exception:  # the model does not run in this precision
            continue
        try:
            compare(expected, output_of(precise(twin), inputs), tolerance)
        except Exception:  # it differs, or code around it reads weights that are held elsewhere now
            return False
        return True
    return False
