"""Labels pass where functions are flat: who feeds whom in nets of rectifiers, limits and maxima, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning.graph.probe.flat_slopes import FlatSlopes
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import measure
from ss_pruning.importance.relevance import relevance
from tests.support.oracle import masked_output

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Between = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions, and between them a function of what the first makes and of one slope a channel."""

    def __init__(self, between: Between, read: int, slopes: tuple[int, ...] = (12,)) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(read, 8, 1)
        self.slopes = nn.Parameter(torch.rand(slopes) + 0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.between(self.first(x), self.slopes))).mean((2, 3)))


def wavelet(x: Tensor, _: Tensor) -> Tensor:
    """Haar: the mean of 2x2 and three differences, of which each sums up to 0."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    kernels = signs.to(x).reshape(4, 1, 2, 2).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(x, kernels, stride=2, groups=x.shape[1])


def edges(x: Tensor, _: Tensor) -> Tensor:
    """The map and its edges, one after the other."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(x).expand(x.shape[1], 1, 3, 3)
    return torch.cat([x, F.conv2d(x, kernel, groups=x.shape[1], padding=1)], 1)


def both(c: int) -> list[int]:
    return [c, c + 12]


#: By name: the function, how many channels the second layer reads, and which of them each of the first's feeds.
CASES: dict[str, tuple[Between, int, Callable[[int], Iterable[int]]]] = {
    "concatenated twice": (lambda x, _: torch.cat([x, x], 1), 24, both),
    "crelu": (lambda x, _: F.relu(torch.cat([x, -x], 1)), 24, both),
    "halves": (lambda x, _: torch.cat([x.clamp(min=0), (-x).clamp(min=0)], 1), 24, both),
    "in place": (lambda x, _: torch.cat([x, -x], 1).relu_(), 24, both),
    "shrunk": (lambda x, _: F.softshrink(x, 2.0), 12, lambda c: [c]),
    "threshold": (lambda x, _: x.masked_fill(x < 2, 0), 12, lambda c: [c]),
    "maxout": (lambda x, _: x.unflatten(1, (-1, 2)).amax(2), 6, lambda c: [c // 2]),
    "largest of three": (lambda x, _: x.unflatten(1, (-1, 3)).max(2)[0], 4, lambda c: [c // 3]),
    "larger half": (lambda x, _: torch.max(*x.chunk(2, 1)), 6, lambda c: [c % 6]),
    "every other": (lambda x, _: torch.minimum(x[:, ::2], x[:, 1::2]), 6, lambda c: [c // 2]),
    "wavelet": (wavelet, 48, lambda c: range(4 * c, 4 * c + 4)),
    "edges": (edges, 24, both),
}


@pytest.mark.parametrize("name", CASES)
def test_who_feeds_whom(name: str) -> None:
    between, read, fed = CASES[name]
    (edge,) = (e for e in trace(Net(between, read), X).edges["second"] if e.source == "first")
    assert not len(edge.broadcast)
    assert sorted(map(tuple, edge.pairs.tolist())) == [(c, d) for c in range(12) for d in fed(c)]


@pytest.mark.parametrize("name", ["crelu", "maxout", "larger half", "wavelet"])
def test_what_is_cut_is_what_is_masked(name: str) -> None:
    between, read, _ = CASES[name]
    dense = Net(between, read).double()
    small = Net(between, read).double()
    small.load_state_dict(dense.state_dict())
    report = prune_(small, X.double(), ratio=0.4, allocation="local")
    assert [left.paths for left in report.excluded] == [("head",)]
    cuts = small.ss_pruning_plan.cuts
    removed = {cut.path: set(cut.removed) for cut in cuts if cut.side == "in"}
    assert len(removed["second"]) > 1
    (wanted,) = masked_output(dense, (X,), removed)
    assert torch.allclose(small(X.double()), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("between", "shape"),
    [
        (lambda x, slopes: torch.where(x > 0, x, slopes[:, None, None] * x), (12,)),
        (lambda x, slopes: torch.max(x, slopes - 2), (1, 12, 1, 1)),  # a threshold of each channel's own
    ],
    ids=["slopes", "thresholds"],
)
def test_tensors_of_code_that_a_flat_branch_hides_are_cut(between: Between, shape: tuple[int, ...]) -> None:
    model = Net(between, 12, shape)
    report = prune_(model, X, ratio=0.4, allocation="local")
    assert [left.paths for left in report.excluded] == [("head",)]
    assert model.slopes.numel() == model.first.out_channels < 12


def test_copies_of_a_channel_keep_what_it_is_worth() -> None:
    """Of a chain each layer hands back all of the output's relevance, which is 1."""
    model = Net(CASES["crelu"][0], 24)
    known = trace(model, X)
    seen = measure(model, known, "gaussian", X, known.weighted)
    found = relevance(model, known, {path: statistics.variance for path, statistics in seen.items()})
    assert float(found["second"].sum()) == pytest.approx(1)
    assert float(found["first"].sum()) == pytest.approx(1)


def test_values_are_as_they_are() -> None:
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    infinite = x.masked_fill(x > 1, -torch.inf)
    functions: list[Callable[[Tensor], Tensor]] = [
        F.relu,
        lambda x: F.hardtanh(x, inplace=True),
        lambda x: x.clamp_(-0.5, 0.5),
        lambda x: x.amax((2, 3), keepdim=True),
        lambda x: x.max(3).values,
        lambda x: x.max(3).indices,
        lambda x: torch.min(x, x.flip(1)),
        lambda x: x.max(),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.where(x > 0, infinite),
        lambda x: torch.vmap(F.relu)(x),
    ]
    for function in functions:
        wanted = function(x.clone())
        with FlatSlopes():
            found = function(x.clone().requires_grad_() * 1)
        assert torch.equal(found.detach(), wanted)
