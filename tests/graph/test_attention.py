"""Prunable attention computes what torch's computes, however it is called, and takes over what it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning.graph.attention import PrunableAttention, make_prunable_, refusals

LENGTH, SOURCE, BATCH, DIM, HEADS = 5, 7, 3, 12, 4


def torchs(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(DIM, HEADS, **options).double().eval()
    for parameter in made.parameters():  # biases are zero at first
        nn.init.normal_(parameter)
    return made


def prunable(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    made = copy.deepcopy(attention)
    make_prunable_(made)
    assert type(made) is PrunableAttention
    return made


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def hidden(*shape: int) -> Tensor:
    """A mask that hides some places, but never the first."""
    mask = tensor(*shape) > 0.3
    mask[..., 0] = False
    return mask


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "no weights": lambda: {"need_weights": False},
    "weights by head": lambda: {"average_attn_weights": False},
    "hidden": lambda: {"attn_mask": hidden(LENGTH, SOURCE)},
    "biased": lambda: {"attn_mask": tensor(LENGTH, SOURCE), "need_weights": False},
    "by head": lambda: {"attn_mask": tensor(BATCH * HEADS, LENGTH, SOURCE)},
    "padded": lambda: {"key_padding_mask": hidden(BATCH, SOURCE), "need_weights": False},
    "both": lambda: {"key_padding_mask": hidden(BATCH, SOURCE), "attn_mask": hidden(LENGTH, SOURCE)},
}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 8}, {"batch_first": True}])
@pytest.mark.parametrize("call", CALLS)
def test_the_same_as_torchs(call: str, options: dict[str, Any]) -> None:
    attention = torchs(**options)
    inputs = [
        tensor(length, BATCH, width)
        for length, width in ((LENGTH, DIM), (SOURCE, attention.kdim), (SOURCE, attention.vdim))
    ]
    if attention.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    expected = attention(*inputs, **CALLS[call]())
    found = prunable(attention)(*inputs, **CALLS[call]())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first: bool) -> None:
    attention = torchs(batch_first=batch_first)
    x, padding = tensor(LENGTH, DIM), hidden(LENGTH)
    expected = attention(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(prunable(attention)(x, x, x, key_padding_mask=padding), expected)


def test_it_drops_weights_when_it_trains() -> None:
    attention = prunable(torchs(dropout=0.5)).train()
    x = tensor(LENGTH, BATCH, DIM)
    for options in ({}, {"need_weights": False}):
        assert not torch.equal(attention(x, x, x, **options)[0], attention(x, x, x, **options)[0])


def test_values_gradients_and_flags_are_taken_over() -> None:
    attention = torchs()
    x = tensor(LENGTH, BATCH, DIM)
    attention(x, x, x)[0].square().sum().backward()
    attention.in_proj_bias.requires_grad_(False)
    weight = attention.in_proj_weight
    make_prunable_(attention)
    parts = [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat([part.weight for part in parts]), weight)  # type: ignore[misc]
    assert torch.equal(torch.cat([part.weight.grad for part in parts]), weight.grad)  # type: ignore[misc,union-attr,arg-type]
    assert [part.bias.requires_grad for part in parts] == [False] * 3  # type: ignore[union-attr]
    assert not any(part.training for part in parts)
    assert not any(name.startswith("in_proj") for name in attention.state_dict())


class Shared(nn.Module):
    """Two modules of attention with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torchs(), torchs()
        self.b.in_proj_weight = self.a.in_proj_weight


class Own(nn.MultiheadAttention):
    """Whatever it may do."""


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 8, batch_first=True), 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Shared(), "shares its weights"),
        (Own(DIM, HEADS), "of a class of its own"),
        (torchs(add_bias_kv=True), "adds a key"),
        (torchs(add_zero_attn=True), "adds a key"),
        (encoder(), "use_nested_tensor = False"),
    ],
)
def test_what_stays_torchs_and_why(model: nn.Module, reason: str) -> None:
    before = {path: type(module) for path, module in model.named_modules()}
    assert all(reason in text for text in refusals(model).values())
    assert refusals(model)
    make_prunable_(model)
    assert {path: type(module) for path, module in model.named_modules()} == before


def test_only_what_is_chosen() -> None:
    model = nn.ModuleDict({"a": torchs(), "b": torchs()})
    make_prunable_(model, lambda path: path == "b")
    assert type(model["a"]) is nn.MultiheadAttention
    assert type(model["b"]) is PrunableAttention
