"""Scores of blocks of weights, from the strengths of the synapses they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ss_pruning._utils.modules import device_of
from ss_pruning.graph.connectivity import Connectivity
from ss_pruning.importance.strength import by_input_channel, by_kernel, kernel_powers, share, synaptic_power

Score = Literal["share", "strength"]


class Scores:
    """Scores of blocks of weights, from the strengths of the synapses they belong to."""

    def __init__(
        self,
        model: nn.Module,
        connectivity: Connectivity,
        weights: Mapping[str, Tensor],
        variances: Mapping[str, Tensor],
        score: Score,
    ) -> None:
        """Compute strengths from variances of what arrives, `[in_channels]` by layer.

        `weights` are unmasked; those of other layers are read as they are.
        """
        self.model, self.connectivity, self.score = model, connectivity, score
        self.powers = {
            path: synaptic_power(model.get_submodule(path), variance, weights.get(path))
            for path, variance in variances.items()
        }

    def of(self, path: str, weight: Tensor, scaler: Any) -> Tensor:
        """Scores of the blocks of one weight, in the shape that NNI's scaler gives them."""

        def blocks(values: Tensor) -> Tensor:
            shrunk: Tensor = (
                values if scaler is None else scaler.shrink(values, lambda v: v.sum(-1), keepdim=True)
            )
            return shrunk

        if path not in self.powers or weight.dim() < 2:
            return blocks(weight.abs())
        module = self.model.get_submodule(path)
        power = self.powers[path]
        if self.score == "strength":
            return blocks(_spread(module, weight, power)).sqrt()
        summed = blocks(_spread(module, weight, share(power)))
        axis = 1 if getattr(module, "transposed", False) else 0
        if summed.numel() == summed.shape[axis] == len(power):  # whole outputs: their own shares sum to 1
            return self.delivered[path].to(summed).reshape(summed.shape)
        return summed

    @cached_property
    def delivered(self) -> dict[str, Tensor]:
        """By layer, `[out]`: the shares that the layer's outputs have in what reads them, summed.

        Norms and depthwise layers pass on; what nothing reads (the model's output) is scored by its own strength,
        relative to the layer's largest.
        """
        layers, device = self.connectivity.layers, device_of(self.model)
        out = {path: torch.zeros(layer.outputs, device=device) for path, layer in layers.items()}
        read = {path: torch.zeros_like(values, dtype=torch.bool) for path, values in out.items()}
        for path in reversed(list(layers)):
            reaches = self._at_inputs(path, out[path])
            for edge in self.connectivity.edges[path]:
                if edge.source in out:
                    pairs = edge.pairs.to(device)
                    out[edge.source].index_add_(0, pairs[:, 0], reaches.to(out[edge.source])[pairs[:, 1]])
                    read[edge.source][pairs[:, 0]] = True
            if path in self.powers and not bool(read[path].all()):
                own = self.powers[path].sum(1).sqrt().to(out[path])
                out[path] = torch.where(read[path], out[path], own / own.max().clamp_min(1e-30))
        return out

    def _at_inputs(self, path: str, out: Tensor) -> Tensor:
        layer = self.connectivity.layers[path]
        if layer.kind == "synaptic" and path in self.powers:
            return by_input_channel(self.model.get_submodule(path), share(self.powers[path])).sum(1)
        if layer.kind == "depthwise":
            return out.reshape(layer.inputs, -1).sum(1)
        return out


def _spread(module: nn.Module, weight: Tensor, values: Tensor) -> Tensor:
    """Values of synapses `[out, in // groups]`, spread over the weights of each kernel by their squares."""
    part = weight.square() / by_kernel(module, weight, kernel_powers(module, weight)).clamp_min(1e-38)
    return part * by_kernel(module, weight, values)
