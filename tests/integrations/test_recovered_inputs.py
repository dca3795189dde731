"""`SynapticImportance()` in a plain Torch-Pruning pruner finds the example input, wherever the model begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ss_pruning import SynapticImportance
from ss_pruning.errors import InputError


class Net(nn.Module):
    """Begins as told, then convolutions and a head."""

    def __init__(self, begin: str) -> None:
        super().__init__()
        self.begin = begin
        self.fold = nn.Linear(12, 16)
        self.a = nn.Conv2d(6 if begin == "concat" else 4, 16, 3)
        self.b, self.c, self.d = nn.Conv2d(16, 16, 3), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.begin == "linear":
            return self.d(self.c(self.fold(x).relu()).relu())  # type: ignore[no-any-return]
        if self.begin == "reshape":
            x = x.reshape(len(x), 4, 12, 12)
        elif self.begin == "concat":
            x = torch.cat([x, x], 1)
        answer: Tensor = self.d(self.c(self.b(self.a(x).relu()).relu().mean((2, 3))).relu())
        return answer


class Joined(Net):
    """Two inputs, concatenated before the first layer reads them."""

    def __init__(self) -> None:
        super().__init__("concat")
        self.begin = "joined"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, y], 1))


class Branches(nn.Module):
    """Two inputs, each read by a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(1, 16, 3), nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        answer: Tensor = self.c(torch.cat([self.a(x).relu().mean((2, 3)), self.b(y).relu().mean((2, 3))], 1))
        return answer


NETS: list[tuple[Any, Any]] = [
    (lambda: Net("plain"), torch.randn(2, 4, 12, 12)),
    (lambda: Net("linear"), torch.randn(2, 12)),
    (lambda: Net("linear"), torch.randn(2, 5, 12)),
    (lambda: Net("reshape"), torch.randn(2, 576)),
    (lambda: Net("concat"), torch.randn(2, 3, 12, 12)),
    (Joined, (torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12))),
    (Branches, (torch.randn(1, 3, 9, 9), torch.randn(1, 1, 9, 9))),
]


@pytest.mark.parametrize(("make", "example"), NETS)
def test_scores_are_those_of_the_given_input(make: Any, example: Any) -> None:
    def widths(importance: SynapticImportance) -> list[Any]:
        torch.manual_seed(0)
        model = make().eval()
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.MagnitudePruner(
            model, example, importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[last]
        )
        for _ in range(2):
            pruner.step()
        assert any(0 < len(p) < 16 for p in model.parameters())
        return [p.detach() for p in model.parameters()]

    given, recovered = widths(SynapticImportance(example_inputs=example)), widths(SynapticImportance())
    assert all(torch.equal(a, b) for a, b in zip(given, recovered, strict=True))


class Powers(Net):
    """What the first layer reads does not tell the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs().expand(-1, 4, -1, -1).sqrt())


def test_an_input_that_no_layer_reads_is_asked_for() -> None:
    model = Powers("plain").eval()
    pruner = tp.pruner.MagnitudePruner(
        model, torch.randn(1, 1, 12, 12), SynapticImportance(), pruning_ratio=0.5, ignored_layers=[model.d]
    )
    with pytest.raises(InputError, match=r"cannot be recovered .* give the input yourself"):
        pruner.step()
