"""What a network with zeros in it weighs: dense, and counted over its living kernels. Nothing here is a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning.liveness import living_kernels
from ss_pruning.planning import count_macs
from ss_pruning.wiring import Wiring

_INDEX_BYTES = 4


@dataclass(frozen=True)
class Size:
    """One model in numbers.

    Attributes:
        params: Parameters, zeros included.
        synapses: Connections (2-D kernels, single weights of linear layers).
        living_synapses: Those that are not zero.
        macs: Multiply-accumulates of one forward pass on the example inputs, as dense hardware does them.
        living_macs: The same counted over living synapses: what is left for something that skips zero kernels.
        bytes: All tensors as they are.
        sparse_bytes: The same with every convolution and linear weight stored as its living kernels and a 4-byte index
            for each, where that is less.
    """

    params: int
    synapses: int
    living_synapses: int
    macs: int
    living_macs: int
    bytes: int
    sparse_bytes: int


def size_of(model: nn.Module, example_inputs: Any, wiring: Wiring) -> Size:
    """Count `model`, of which `wiring` names the layers."""
    macs, by_path = count_macs(model, example_inputs)
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(_bytes(t) for t in tensors)
    synapses = living = living_macs = saved = 0
    for path, layer in wiring.layers.items():
        if layer.kind not in ("synaptic", "depthwise"):
            continue
        module = model.get_submodule(path)
        weight, alive = module.weight, living_kernels(module)
        assert isinstance(weight, Tensor)
        here = int(alive.sum())
        synapses, living = synapses + alive.numel(), living + here
        living_macs -= by_path.get(path, 0) * (alive.numel() - here) // alive.numel()
        sparse = here * (_bytes(weight) // alive.numel() + _INDEX_BYTES)
        saved += max(0, _bytes(weight) - sparse)
    params = sum(p.numel() for p in model.parameters())
    return Size(params, synapses, living, macs, macs + living_macs, total, total - saved)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
