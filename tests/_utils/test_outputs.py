"""Whatever a model returns is looked into, compared for what it is, or refused by name."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning._utils.outputs import tensors_in, values_in
from ss_pruning.errors import ModelError, VerificationError
from ss_pruning.graph import trace
from ss_pruning.surgery.equivalence.agreement import compare
from ss_pruning.surgery.equivalence.decisions import Holding, Recording

Pair = namedtuple("Pair", "logits features")


@dataclasses.dataclass
class Record:
    logits: Tensor
    features: Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: Tensor
    features: Tensor


class Plain:
    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.nested = logits, {"features": [features]}


class Holder:
    def __init__(self, features: Tensor) -> None:
        self.features = features

    def get(self) -> Tensor:
        return self.features


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "named tuple": Pair,
    "dataclass": Record,
    "slots": Slotted,
    "object": Plain,
    "namespace": lambda a, b: types.SimpleNamespace(a=a, b=b),
    "mapping": lambda a, b: types.MappingProxyType({"a": a, "b": b}),
    "ordered": lambda a, b: OrderedDict(a=a, b=b),
    "deque": lambda a, b: deque([a, b]),
    "set": lambda a, b: {a, b},
    "distribution": lambda a, b: (a, torch.distributions.Normal(b, 1.0)),
    "independent": lambda a, b: (a, torch.distributions.Independent(torch.distributions.Normal(b, 1.0), 1)),
    "closure": lambda a, b: lambda: (a, b),
    "method": lambda a, b: (a, Holder(b).get),
    "complex": lambda a, b: (a, torch.complex(b, b.tanh())),
    "spectrum": lambda a, b: (a, torch.fft.fft(b)),
    "sparse": lambda a, b: (a, b.to_sparse()),
}


class Net(nn.Module):
    """Two convolutions and a head; what it returns is wrapped."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu()).relu()
        return self.wrap(self.c(features.mean((2, 3))), features)


def net(wrap: Callable[[Tensor, Tensor], Any]) -> Net:
    torch.manual_seed(0)
    return Net(wrap).eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", WRAPS)
def test_features_are_protected_in_whatever_they_are_wrapped(name: str) -> None:
    model = net(WRAPS[name])
    assert len(trace(model, X).reaches_output["b"]) == 12
    report = prune_(model, X, ratio=0.5)
    assert model.b.out_channels == 12
    assert model.a.out_channels < 8
    assert report.max_error < 1e-10
    assert "Cut equals masked" in report.verification()


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda a, b: (a, (t for t in [b])), "output[1]"),
        (lambda a, b: {"kept": iter([b])}, "output['kept']"),
        (lambda a, b: (a, nn.Identity()), "output[1]"),
        (lambda a, b: (a, np.array([object()])), "output[1]"),
    ],
)
def test_what_cannot_be_looked_into_is_refused_by_name(wrap: Any, name: str) -> None:
    model = net(wrap)
    widths = model.a.out_channels
    with pytest.raises(ModelError, match="cannot be looked into") as refused:
        prune_(model, X, ratio=0.5)
    assert name in str(refused.value)
    assert model.a.out_channels == widths


def test_values_have_names_and_are_found_once() -> None:
    t = torch.ones(2)
    found = values_in({"a": [t, 3], "b": Plain(t, t), "c": None, "d": "text", "e": np.float32(2)})
    assert list(found) == [
        *("output['a'][0]", "output['a'][1]", "output['b'].logits", "output['b'].nested['features'][0]"),
        *("output['d']", "output['e']"),
    ]
    circle: list[Any] = [t]
    circle.append(circle)
    assert list(tensors_in(circle)) == ["output[0]"]


def test_whole_numbers_are_compared_exactly_and_complex_ones_by_magnitude() -> None:
    a = torch.tensor([3.0 + 4.0j, 0.0])
    assert compare(a, a + 0.5j, 0.2).error == pytest.approx(0.1)
    with pytest.raises(VerificationError, match="whole numbers in 'output"):
        compare((a, torch.tensor([1, 2])), (a, torch.tensor([1, 3])), 1.0)
    with pytest.raises(VerificationError, match="whole numbers in 'output"):
        compare((a, True), (a, False), 1.0)
    with pytest.raises(VerificationError, match="shape"):
        compare(torch.tensor([1, 2]), torch.tensor([1]), 1.0)


@pytest.mark.parametrize(
    "value",
    [None, 3, 2.5, "text", torch.zeros(3), torch.tensor([1, 2]), torch.zeros(0), torch.tensor([True])],
)
def test_what_says_nothing_certifies_nothing(value: Any) -> None:
    assert compare(value, value, 0.0).numbers == 0


class Returns(Net):
    """Returns nothing of what it computes but `result`."""

    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__(lambda logits, features: result(logits * features.shape[1]))


@pytest.mark.parametrize("result", [lambda s: None, lambda s: 3, lambda s: s[:0], lambda s: torch.zeros(2)])
def test_a_model_that_returns_nothing_to_compare_is_refused(result: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = Returns(result).eval()
    with pytest.raises(
        ModelError, match="nothing that the model returns on the example inputs can be compared"
    ):
        prune_(model, X, ratio=0.4, allocation="local")
    assert model.a.out_channels == 8


@pytest.mark.parametrize(
    "result",
    [
        lambda s: [{"scores": row[row > 1e9]} for row in s],
        lambda s: s.argmax(1),
        lambda s: (s > 0.1).sum(),
        lambda s: s.topk(2, 1).indices,
        lambda s: float(s.sum()),
    ],
)
def test_where_nothing_is_returned_the_numbers_that_it_decides_by_are_compared(
    result: Callable[[Tensor], Any],
) -> None:
    """The scores depend on the width of `b`: a cut of it gives other ones, and none of them is returned."""
    torch.manual_seed(0)
    model = Returns(result).eval()
    report = prune_(model, X, ratio=0.4, allocation="local")
    assert model.b.out_channels == 12
    assert model.a.out_channels < 8
    assert report.by_decisions
    assert "no real number to compare" in report.verification()
    assert "Cut equals masked" not in report.verification()
    assert 'class="mark"' not in report.to_html()


class Detects(Net):
    """Returns logits, and what it has found by scores that depend on a width: nothing."""

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu()).relu()
        logits = self.c(features.mean((2, 3)))
        scores = logits * features.shape[1]
        return {"logits": logits, "found": scores[scores > 1e9]}


def test_what_is_returned_beside_an_empty_output_does_not_speak_for_it() -> None:
    torch.manual_seed(0)
    model = Detects(lambda logits, features: None).eval()
    report = prune_(model, X, ratio=0.4, allocation="local")
    assert model.b.out_channels == 12
    assert model.a.out_channels < 8
    assert not report.by_decisions


class Tied(nn.Module):
    """Two channels say the same: which one comes first is a matter of the last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.c(self.b(self.a(x).relu()).relu())
        order = scores.mean((2, 3)).sort(1, descending=True).indices
        return torch.stack([scores[i, row] for i, row in enumerate(order)])


def test_order_that_turns_by_rounding_is_not_a_widths_fault() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    with torch.no_grad():
        # The same weights in another order of inputs: sums that are equal but for rounding.
        model.b.weight[4:] = model.b.weight[:4].flip(0)
        model.c.weight[3:] = model.c.weight[:3]
        model.c.bias[3:] = model.c.bias[:3]
    report = prune_(model, X, ratio=0.4, allocation="local")
    assert model.a.out_channels < 8
    assert not [left for left in report.excluded if "relies on" in left.reason]


def test_a_model_is_held_to_decisions_about_the_same_numbers_alone() -> None:
    scores, nearly = (
        torch.tensor(values, dtype=torch.float64) for values in ([1, 2, 2 + 1e-12], [1, 2 + 2e-12, 2])
    )
    with Recording() as recording:
        first = scores.argmax()
    holding = Holding(recording.decisions, 1e-10)
    with holding:
        second = nearly.argmax()
    assert (first, second, nearly.argmax()) == (2, 2, 1)
    assert holding.compared == 3
    strict = Holding(recording.decisions, 0.0)
    with strict:
        assert nearly.argmax() == 1
    assert strict.differs


def decisions() -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    yield "topk", lambda t: t.topk(2)
    yield "max", lambda t: t.max(0)
    yield "compare", lambda t: t > 0.3
    yield "floor", torch.floor
    yield "in place", lambda t: t.clone().round_()
    yield "cast", lambda t: (3 * t).long()
    yield "item", lambda t: t.sum().item() > 0
    yield "division", lambda t: torch.div(t, 0.3, rounding_mode="floor")
    yield "nonzero", lambda t: (t > 0.2).nonzero()


@pytest.mark.parametrize(("name", "decide"), list(decisions()))
def test_every_jump_is_held(name: str, decide: Callable[[Tensor], Any]) -> None:
    t = torch.linspace(-1, 1, 7).double()
    with Recording() as recording:
        expected = decide(t.clone())
    assert recording.decisions
    with Holding(recording.decisions, float("inf")):  # whatever it looks at
        held = decide(-t)
    assert str(held) == str(expected)
    assert str(decide(-t)) != str(expected) or name == "item"
