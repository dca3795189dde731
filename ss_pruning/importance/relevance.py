"""Relevance: how much of the model's output rests on what a channel carries, handed back from layer to layer.

The output has relevance 1, spread evenly over its channels. Each output channel of a layer hands what it has to the
layer's inputs, by their shares in its variance (`ss_pruning.importance.strength.share`); each input hands it to the
norms that feed it, by their variances, and half of it to layers without a norm (gates, shortcuts) where there are both.
Nothing is lost on the way and nothing is made, which is what makes channels of different layers comparable: each layer
of a chain has relevance 1 in all, and a residual branch what it adds to the stream. Shares alone cannot tell a branch
that hardly matters from one that everything goes through. Where no channel is seen to reach the output (a detector that
detects nothing, outputs that are only counted or compared), all channels count as outputs that no layer reads.

Scores were handed back like this before: Yu et al. (CVPR 2018), "NISP", by weights; Bach et al. (2015), "On pixel-wise
explanations", by activations of one image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ss_pruning._utils.modules import modules_of
from ss_pruning.graph.connectivity import Connectivity, Edge, Layer
from ss_pruning.graph.layers import groups_of
from ss_pruning.importance.activation_stats import norm_scales
from ss_pruning.importance.strength import relative_power


@torch.no_grad()
def relevance(
    model: nn.Module, connectivity: Connectivity, variances: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Relevance of what each layer reads, by module path, `[in_channels]` in float64 on the CPU.

    A module that runs several times hands back the same each time; what feeds it and runs after it gets nothing.

    `variances` are those of what arrives at each convolution and linear layer, `[in_channels]`, by path.
    """
    modules = modules_of(model)
    scales = {path: scale.double().cpu() for path, scale in norm_scales(model, connectivity).items()}
    held = {
        path: torch.zeros(layer.outputs, dtype=torch.float64) for path, layer in connectivity.layers.items()
    }
    ends = _ends(connectivity)
    outputs = sum(map(len, ends.values()))
    for path, channels in ends.items():
        held[path][channels] = 1 / outputs
    found = {}
    for path in reversed(connectivity.layers):
        found[path] = _at_inputs(modules[path], connectivity.layers[path], held[path], variances.get(path))
        edges = [edge for edge in connectivity.edges[path] if edge.source in held]
        for source, channels, amount in _handed(edges, found[path], scales):
            held[source].index_add_(0, channels, amount)
    return found


def _ends(connectivity: Connectivity) -> dict[str, Tensor]:
    """By layer, the channels that the output consists of, as far as that can be seen."""
    reached = connectivity.reaches_output.items()
    ends = {path: channels for path, channels in reached if path in connectivity.layers and len(channels)}
    if ends:
        return ends
    read = {edge.source for edges in connectivity.edges.values() for edge in edges}
    unread = [path for path in connectivity.layers if path not in read]
    return {
        path: torch.arange(connectivity.layers[path].outputs)
        for path in unread or list(connectivity.layers)[-1:]
    }


def _at_inputs(module: nn.Module, layer: Layer, held: Tensor, variance: Tensor | None) -> Tensor:
    """What the inputs of a layer have, given what its outputs have."""
    if variance is not None:
        power = relative_power(module, variance).float()
        total = power.sum(1)
        rate = torch.where(total > 0, held.to(total) / total, 0)  # of its inputs' variance, for each output
        by_group = (t.unflatten(0, (groups_of(module), -1)) for t in (power, rate))
        return torch.einsum("gkc,gk->gc", *by_group).flatten().double().cpu()
    if layer.inputs == layer.outputs:
        return held
    return (held.sum() / layer.inputs).expand(layer.inputs)


def _handed(
    edges: list[Edge], amount: Tensor, scales: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """By source: its channels, and what each is handed of what the inputs of a layer have."""
    by_call: dict[int, list[tuple[Edge, Tensor]]] = defaultdict(list)
    for edge in edges:
        weight = (
            scales[edge.source][edge.pairs[:, 0]] if edge.source in scales else torch.ones(len(edge.pairs))
        )
        by_call[edge.call].append((edge, weight.double() + torch.finfo(torch.float64).tiny))
    for call in by_call.values():
        totals = {normed: torch.zeros_like(amount) for normed in (True, False)}
        for edge, weight in call:
            totals[edge.source in scales].index_add_(0, edge.pairs[:, 1], weight)
        kinds = (totals[True] > 0).double() + (totals[False] > 0)
        for edge, weight in call:
            at = edge.pairs[:, 1]
            part = weight / totals[edge.source in scales][at] / kinds[at] / len(by_call)
            yield edge.source, edge.pairs[:, 0], part * amount[at]
