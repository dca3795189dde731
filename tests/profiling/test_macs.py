"""Multiply-accumulates against the formulas written out, by layer, however layers are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from ss_pruning.errors import ModelError
from ss_pruning.profiling.macs import count_macs, macs_between_layers


def conv_macs(conv: nn.Conv2d, height: int, width: int) -> int:
    down, across = conv.kernel_size
    return conv.out_channels * height * width * conv.in_channels // conv.groups * down * across


class Net(nn.Module):
    """Layers that run once, twice and not at all, some called past their parents; and a product without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.idle = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.stem.forward(x)))
        x = x.mean((2, 3))
        return self.head(x @ x.T @ x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_counts_are_those_of_the_formulas(mode: Callable[[], object]) -> None:
    net, batch = Net(), 2
    with mode():  # type: ignore[attr-defined]
        total, by_layer = count_macs(net, torch.zeros(batch, 3, 6, 5))
    wanted = {
        "stem.0": batch * conv_macs(net.stem[0], 6, 5),  # type: ignore[arg-type]
        "twice": 2 * batch * conv_macs(net.twice, 6, 5),
        "head": batch * 8 * 5,
    }
    assert by_layer == wanted
    assert total == sum(wanted.values()) + 2 * batch * batch * 8  # the products between layers


def test_nothing_stays_of_a_count_that_failed() -> None:
    net = Net()
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        count_macs(net, torch.zeros(1, 4, 6, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert net.training


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "vit_b_16"])
def test_counts_are_torchs_own(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    side = 224 if name.startswith("vit") else 64
    model, x = models.get_model(name, weights=None).eval(), torch.zeros(1, 3, side, side)
    # Of the kernels of attention that run on a CPU torch has formulas for the plain products alone, and of none that
    # gradients need not be taken through.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    total, by_layer = count_macs(model, x)
    assert total == counter.get_total_flops() // 2
    theirs = counter.get_flop_counts()
    for path, macs in by_layer.items():
        assert macs == sum(theirs[f"{type(model).__name__}.{path}"].values()) // 2


class Attention(nn.Module):
    """Three heads of four channels, by torch's fused attention or by plain products."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.projection = nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT / 2).softmax(-1) @ v
        return self.projection(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_before_its_projection(fused: bool) -> None:
    batch, tokens, heads, width = 2, 5, 3, 4
    net, x = Attention(fused), torch.zeros(batch, tokens, 6)
    products = 2 * batch * heads * tokens * tokens * width
    assert macs_between_layers(net, x) == {"projection": products}
    assert count_macs(net, x)[0] == products + batch * tokens * (6 * 36 + 12 * 6)


class Recurrent(nn.Module):
    """Recurrent layers over sequences of which the second is shorter, if they are packed."""

    def __init__(self, kind: str, packed: bool, **options: object) -> None:
        super().__init__()
        self.layers, self.packed = getattr(nn, kind)(6, 5, **options), packed

    def forward(self, x: Tensor) -> Tensor:
        read = nn.utils.rnn.pack_padded_sequence(x, [7, 4]) if self.packed else x
        return self.layers(read)[1][0]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_layers_use_each_weight_once_a_step(
    kind: str, packed: bool, options: dict[str, int]
) -> None:
    model = Recurrent(kind, packed, **options)
    weights = sum(p.numel() for name, p in model.named_parameters() if "weight" in name)
    x = torch.randn(7, 2, 6)
    assert count_macs(model, x)[0] == (11 if packed else 14) * weights
    assert count_macs(model.double(), x.double())[0] == (11 if packed else 14) * weights


@pytest.mark.parametrize("fast", [True, False])
def test_attention_that_torch_runs_in_one_go_is_counted(fast: bool) -> None:
    """Per token: queries, keys, values and what is made of them, products with 7 others, the two linear layers."""
    x, tokens = torch.randn(2, 7, 16), 14
    attention = 4 * 16 * 16 + 2 * 7 * 16
    alone = nn.MultiheadAttention(16, 4, batch_first=True)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        assert count_macs(alone, (x, x, x))[0] == tokens * attention
        assert count_macs(layer, x)[0] == tokens * (attention + 2 * 16 * 32)
        with pytest.raises(ModelError):
            count_macs(layer, x[..., :3])
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Called(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


class Counted:
    """A number that counts how often numbers are multiplied and added to a sum: the definition, run."""

    products = 0

    def __mul__(self, other: Counted) -> Counted:
        Counted.products += 1
        return self


def times(left: list[list[Counted]], right: list[list[Counted]]) -> int:
    """Multiply-accumulates of a product of two matrices, by its three loops."""
    Counted.products = 0
    for row in left:
        for column in zip(*right, strict=True):
            for a, b in zip(row, column, strict=True):
                a * b
    return Counted.products


def matrix(rows: int, columns: int) -> list[list[Counted]]:
    return [[Counted() for _ in range(columns)] for _ in range(rows)]


T = torch.zeros


@pytest.mark.parametrize(
    ("function", "inputs", "left", "right"),
    [
        (torch.mv, (T(3, 5), T(5)), (3, 5), (5, 1)),
        (torch.matmul, (T(2, 3, 5), T(5)), (6, 5), (5, 1)),
        (torch.matmul, (T(5), T(5, 4)), (1, 5), (5, 4)),
        (torch.dot, (T(5), T(5)), (1, 5), (5, 1)),
        (torch.vdot, (T(5), T(5)), (1, 5), (5, 1)),
        (torch.addmv, (T(3), T(3, 5), T(5)), (3, 5), (5, 1)),
        (torch.addbmm, (T(3, 4), T(2, 3, 5), T(2, 5, 4)), (3, 10), (10, 4)),
        (torch.baddbmm, (T(2, 3, 4), T(2, 3, 5), T(2, 5, 4)), (6, 5), (5, 4)),
        (lambda a, b, c: c.clone().addmm_(a, b), (T(3, 5), T(5, 4), T(3, 4)), (3, 5), (5, 4)),
        (lambda a, b, c: c.clone().addmv_(a, b), (T(3, 5), T(5), T(3)), (3, 5), (5, 1)),
        (lambda a, b: torch.einsum("ij,j->i", a, b), (T(3, 5), T(5)), (3, 5), (5, 1)),
        (lambda a, b: torch.einsum("nchw,c->nhw", a, b), (T(2, 3, 4, 4), T(3)), (32, 3), (3, 1)),
        (lambda a, b: torch.tensordot(a, b, 2), (T(3, 4, 5), T(4, 5, 6)), (3, 20), (20, 6)),
        # A kernel of 3 over 6 steps gives 4; each of its outputs is a sum over 3 x 3 numbers.
        (lambda x, w: torch.conv_tbc(x, w, T(4)), (T(6, 2, 3), T(3, 3, 4)), (8, 9), (9, 4)),
        (nn.Bilinear(5, 6, 7), (T(3, 5), T(3, 6)), (21, 30), (30, 1)),
        (nn.Bilinear(5, 6, 7, bias=False), (T(2, 3, 5), T(2, 3, 6)), (42, 30), (30, 1)),
    ],
)
def test_products_of_all_kinds_are_counted(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], left: tuple[int, int], right: tuple[int, int]
) -> None:
    assert count_macs(Called(function), inputs)[0] == times(matrix(*left), matrix(*right))


def test_deformable_convolutions_cost_what_plain_ones_cost() -> None:
    ops = pytest.importorskip("torchvision.ops")
    layer = ops.DeformConv2d(4, 6, 3, groups=2)
    assert count_macs(layer, (T(2, 4, 6, 7), T(2, 18, 4, 5)))[0] == 2 * conv_macs(layer, 4, 5)
