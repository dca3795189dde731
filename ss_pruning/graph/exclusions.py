"""Which channels must stay, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from ss_pruning._utils.arrays import Ints
from ss_pruning.graph.attention import PrunableAttention, refusals
from ss_pruning.graph.connectivity import INPUT, Connectivity, Slots
from ss_pruning.graph.layers import kind_of, width

OUTPUT_REASON = "reaches the model's output"
BROADCAST_REASON = "feeds several channels at once (a gate, a softmax or attention)"
UNCALLED_REASON = (
    "did not run on the example inputs: it is as it was, and what it would read may be narrower now (give inputs that "
    "run it, or name in ignore what it reads)"
)
UNREAD_REASON = (
    "no layer that ran reads it (at most decisions do, such as top-k or suppression, or code that lets no gradient "
    "through, such as NumPy's or under torch.inference_mode, for which no_grad can stand)"
)
NO_PRODUCER_REASON = "is fed by the model's input, a constant or a channel mix, so nothing would shrink it"
WHOLE_REASON = "all channels of a layer hang together here, so none can go alone"
UNEVEN_REASON = (
    "some groups of a grouped layer have channels that must stay, so the groups could not stay equal"
)
IGNORED_REASON = "ignored on request"


@dataclass(frozen=True)
class Excluded:
    """Layers some of whose channels stay, and why.

    Attributes:
        paths: The layers whose outputs stay.
        channels: How many output channels of them.
        reason: Why.
    """

    paths: tuple[str, ...]
    channels: int
    reason: str


def frozen_slots(
    connectivity: Connectivity, slots: Slots, modules: Mapping[str, nn.Module], ignore: Mapping[str, str]
) -> list[tuple[Ints, str]]:
    """Slots that must stay, each with the reason; the first reason that reaches a channel set is the one reported."""
    frozen: list[tuple[Ints, str]] = []
    for origin, channels in connectivity.reaches_output.items():
        if origin in slots.out_key:
            frozen.append((channels.numpy() + slots.start[slots.out_key[origin]], OUTPUT_REASON))
    for path, reason in ignore.items():
        if path in slots.out_key:
            frozen.append((slots.numbers[slots.out_key[path]], reason))
    for path, reason in _untouchable(modules, connectivity).items():
        frozen += [(slots.numbers[key], reason) for key in slots.keys if key[0] == path]
    return frozen + _unconnected(connectivity, slots, broadcast_reason(modules))


def _unconnected(connectivity: Connectivity, slots: Slots, mixed: str) -> list[tuple[Ints, str]]:
    """Slots that nothing shrinks, that nothing reads, or that feed several channels at once."""
    frozen: list[tuple[Ints, str]] = []
    fed, read = np.zeros(slots.total, dtype=bool), np.zeros(slots.total, dtype=bool)
    for path, edges in connectivity.edges.items():
        into = slots.start[slots.in_key[path]]
        for edge in edges:
            pairs, broadcast = edge.pairs.numpy(), edge.broadcast.numpy()
            if edge.source == INPUT:
                frozen.append((pairs[:, 1] + into, NO_PRODUCER_REASON))
                continue
            source = slots.start[slots.out_key[edge.source]]
            fed[pairs[:, 1] + into] |= edge.source not in connectivity.loose
            read[pairs[:, 0] + source] = True
            read[broadcast + source] = True
            if edge.heads is not None and edge.heads.several:
                heads = edge.heads.pairs.numpy()
                broadcast = np.setdiff1d(broadcast, heads[:, 0])
                fed[edge.heads.channels.numpy()[heads[:, 1]] + into] |= edge.source not in connectivity.loose
            frozen.append((broadcast + source, mixed))
    for path in connectivity.layers:
        reads, out = slots.numbers[slots.in_key[path]], slots.numbers[slots.out_key[path]]
        frozen.append((reads[~fed[reads]], NO_PRODUCER_REASON))
        frozen.append((out[~read[out]], UNREAD_REASON))
    return frozen


def broadcast_reason(modules: Mapping[str, nn.Module]) -> str:
    """Why channels stay that feed several at once; modules of torch that mix all they read are named."""
    mixing = {
        path: module
        for path, module in modules.items()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention))
        and not isinstance(module, PrunableAttention)
    }
    if not mixing:
        return BROADCAST_REASON
    refused = refusals(modules[""])
    mixers = [
        f"'{path}' ({type(module).__name__}{f', which {refused[path]}' if path in refused else ''})"
        for path, module in mixing.items()
    ]
    more = f" and {len(mixers) - 3} others" if len(mixers) > 3 else ""
    named = f"{', '.join(mixers[:3])}{more}"
    return f"feeds several channels at once (a gate, a softmax, or a module that mixes all it reads: {named})"


def left_uncalled(connectivity: Connectivity, modules: Mapping[str, nn.Module]) -> tuple[Excluded, ...]:
    """The layers that did not run, if any, and their channels."""
    paths = [path for path in connectivity.uncalled if kind_of(modules[path]) in ("synaptic", "depthwise")]
    channels = sum(width(modules[path], "out") for path in paths)
    return (Excluded(tuple(paths), channels, UNCALLED_REASON),) if paths else ()


def _untouchable(modules: Mapping[str, nn.Module], connectivity: Connectivity) -> dict[str, str]:
    """Layers whose tensors cannot be replaced: parametrised ones, and ones that share a tensor with another layer."""
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    for path in connectivity.layers:
        module = modules[path]
        if hasattr(module, "parametrizations"):
            reasons[path] = "its weight is parametrised; remove the parametrisation first"
        if hasattr(module, "weight_g") or hasattr(module, "weight_orig") or hasattr(module, "weight_u"):
            reasons[path] = (
                "its weight is recomputed by an old-style hook (weight norm, spectral norm, mask); remove it first"
            )
        for tensor in module.parameters(recurse=False):  # layers that it holds have their own
            other = owners.setdefault(id(tensor), path)
            if other != path:
                reasons[path] = reasons[other] = f"shares a weight tensor ('{other}' and '{path}')"
    return reasons


def channel_set_reasons(
    slots: Slots, channel_set: Ints, frozen: list[tuple[Ints, str]]
) -> tuple[Ints, list[str]]:
    """`[total]`, by channel set label: 0 for a channel set that may go, else the number of its reason; and reasons."""
    texts = list(dict.fromkeys(["", *(text for _, text in reversed(frozen)), WHOLE_REASON]))
    reason = np.zeros(slots.total, dtype=np.int64)
    for numbers, text in reversed(frozen):
        reason[channel_set[numbers]] = texts.index(text)
    pairs, count = np.unique(channel_set * len(slots.keys) + slots.side_of, return_counts=True)
    widths = np.array([slots.widths[key] for key in slots.keys])
    whole = (pairs // len(slots.keys))[count >= widths[pairs % len(slots.keys)]]
    reason[whole[reason[whole] == 0]] = texts.index(WHOLE_REASON)
    return reason, texts


def excluded_by_reason(
    connectivity: Connectivity, slots: Slots, channel_set: Ints, reasons: Ints, texts: list[str]
) -> tuple[Excluded, ...]:
    """One entry a reason: the synaptic layers of whose outputs some stay for it."""
    paths: dict[int, list[str]] = defaultdict(list)
    channels: dict[int, int] = defaultdict(int)
    for path, layer in connectivity.layers.items():
        if layer.kind != "synaptic":
            continue
        numbers, counts = np.unique(reasons[channel_set[slots.numbers[(path, "out")]]], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number:
                paths[number].append(path)
                channels[number] += count
    return tuple(Excluded(tuple(paths[n]), channels[n], texts[n]) for n in sorted(paths))
