"""Models made to fool the check, and habits made to be forgotten: what is certified was compared, all is as it was."""

from __future__ import annotations

import enum
import random
import warnings
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning._utils import memento as _memento
from ss_pruning._utils.outputs import values_in
from ss_pruning.errors import ModelError, SSPruningError, VerificationError
from ss_pruning.graph import trace
from ss_pruning.surgery.equivalence.agreement import compare, difference
from ss_pruning.surgery.equivalence.decisions import Holding, Recording
from tests.support.odd_models import first_difference, odd_model, state_of

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions and a head of 4; `result` makes what is returned from input, logits and 12 features."""

    def __init__(self, result: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu()).relu()
        return self.result(x, self.c(features.mean((2, 3))), features)


def net(result: Callable[[Tensor, Tensor, Tensor], Any]) -> Net:
    torch.manual_seed(0)
    return Net(result).eval()


class Label(enum.Enum):
    WIDE = 12
    NARROW = 0


class Own(list[Any]):
    """A list with attributes."""


class Table(dict[str, Any]):
    """A dict with attributes."""


class Private:
    __slots__ = ("__features", "logits")

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.__features = logits, features


class Key:
    def __repr__(self) -> str:
        return "key"


def beside(container: Any, features: Tensor) -> Any:
    container.features = features
    return container


def keyword_only(features: Tensor) -> Any:
    def get(*, kept: Tensor = features) -> Tensor:
        return kept

    return get


# Each depends on the width of `b`, which must not be cut then.
DEPENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "top-k as many as channels": lambda x, y, f: y.topk(f.shape[1] // 4, 1).indices,
    "k-th value": lambda x, y, f: y.kthvalue(f.shape[1] // 4, 1).values,
    "threshold": lambda x, y, f: y > f.shape[1] / 100 - 0.1,
    "whole threshold": lambda x, y, f: torch.where(100 * y > torch.tensor(f.shape[1]), y, -y),
    "decimals": lambda x, y, f: y.round(decimals=f.shape[1] // 4),
    "division": lambda x, y, f: torch.div(100 * y, f.shape[1], rounding_mode="floor"),
    "remainder": lambda x, y, f: torch.fmod(100 * y, f.shape[1]),
    "axis": lambda x, y, f: y.argmax(f.shape[1] // 12),
    "direction": lambda x, y, f: y.sort(1, descending=f.shape[1] == 12).values,
    "fill": lambda x, y, f: torch.cat(
        [y * f.shape[1], torch.full((2, 1), torch.finfo(torch.float32).min)], 1
    ),
    "text": lambda x, y, f: (y, str(f.shape[1])),
    "bytes": lambda x, y, f: (y, str(f.shape[1]).encode()),
    "range": lambda x, y, f: (y, range(f.shape[1])),
    "enum": lambda x, y, f: (y, Label.WIDE if f.shape[1] == 12 else Label.NARROW),
    "dtype": lambda x, y, f: (y, torch.int8 if f.shape[1] == 12 else torch.int16),
    "list with attributes": lambda x, y, f: beside(Own([y]), f),
    "dict with attributes": lambda x, y, f: beside(Table(y=y), f),
    "tensor with attributes": lambda x, y, f: beside(y, f),
    "private slots": lambda x, y, f: Private(y, f),
    "keys that look alike": lambda x, y, f: {Key(): f, Key(): y},
    "set": lambda x, y, f: {f, y},
    "default": lambda x, y, f: (y, lambda kept=f: kept),
    "keyword default": lambda x, y, f: (y, keyword_only(f)),
}


@pytest.mark.parametrize("name", DEPENDS)
def test_no_width_that_what_is_returned_depends_on_is_cut(name: str) -> None:
    model = net(DEPENDS[name])
    prune_(model, X, ratio=0.4, allocation="local")
    assert model.b.out_channels == 12
    assert model.a.out_channels < 8


@pytest.mark.parametrize(
    "result",
    [
        lambda x, y, f: (x, []),
        lambda x, y, f: None if x.isnan().any() else [],
        lambda x, y, f: (torch.arange(1.0, 5.0), (y * f.shape[1])[:0]),
        lambda x, y, f: (x, y[:, :1].softmax(1)),
    ],
)
def test_what_does_not_come_from_layers_certifies_nothing(result: Callable[..., Any]) -> None:
    model = net(result)
    with pytest.raises(ModelError, match="come from its layers"):
        prune_(model, X, ratio=0.4, allocation="local")
    assert model.b.out_channels == 12


def test_beside_the_input_features_are_compared_and_decisions_speak_where_nothing_else_does() -> None:
    model = net(lambda x, y, f: (x, y))
    assert prune_(model, X, ratio=0.4, allocation="local").max_error < 1e-10
    assert model.b.out_channels < 12
    model = net(lambda x, y, f: (x, y.argmax(1)))
    assert prune_(model, X, ratio=0.4, allocation="local").by_decisions


def test_numbers_that_fill_masks_hide_no_difference() -> None:
    a = torch.tensor([1.0, 2.0, -1e9, -1e9], dtype=torch.float64)
    assert difference(a, a + 0.02) == pytest.approx(0.01)
    assert difference(torch.tensor([3e6, 1.0]), torch.tensor([3e6, 1.5])) == pytest.approx(0.5)
    # No gap: one kind of numbers.
    b = 10.0 ** torch.arange(9, dtype=torch.float64)
    assert difference(b, b + 1e-6) == pytest.approx(1e-14)


def test_not_a_number_is_no_zero_and_nothing_in_half_precision_is_the_same() -> None:
    assert np.isnan(difference(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 0.0])))
    assert difference(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])) == 0
    assert np.isnan(difference(torch.tensor([torch.inf]), torch.tensor([torch.finfo().max])))
    assert difference(torch.zeros(2).half(), torch.zeros(2).half()) == 0


def test_words_are_compared_and_sets_of_a_kind_are_refused() -> None:
    t = torch.ones(2)
    with pytest.raises(VerificationError, match=r"'output.1.' is 'b' in the cut model, not 'a'"):
        compare((t, "a"), (t, "b"), 0.0)
    assert list(values_in({3, 1, 2}).values()) == [1, 2, 3]
    with pytest.raises(ModelError, match="cannot be looked into"):
        values_in({t, t + 1})


def test_a_decision_on_other_terms_is_not_taken_over() -> None:
    t = torch.linspace(0, 1, 5)
    with Recording() as recording:
        t.topk(4)
    holding = Holding(recording.decisions, 1e-6)
    with holding:
        assert len(t.topk(2).values) == 2
    assert holding.differs
    assert not holding.compared


def test_writing_into_what_gradients_need_is_named() -> None:
    class Writes(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).sigmoid()
            y.mul_(2)
            found: Tensor = self.b(y)
            return found

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="no gradient goes back"):
        trace(Writes(lambda *_: None).eval(), X)


def test_scripted_parts_are_run_around() -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1)]
    with warnings.catch_warnings(action="ignore"):  # that scripting will be gone one day
        parts[1], parts[3] = torch.jit.script(parts[1]), torch.jit.script(parts[3])
    model = nn.Sequential(*parts).eval()
    report = prune_(model, X, ratio=0.4, allocation="local")
    assert report.max_error < 1e-10
    assert model[0].out_channels < 8
    assert model[2].out_channels == 12


def test_models_without_values_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"a\.weight.* meta device"):
        prune_(net(lambda x, y, f: y).to("meta"), X, ratio=0.4)
    model = net(lambda x, y, f: y)
    with warnings.catch_warnings(action="ignore"):  # that lazy modules are new
        model.a = nn.LazyConv2d(8, 3)
    with pytest.raises(ModelError, match=r"a\.weight.* no shape yet"):
        prune_(model, X, ratio=0.4)


class Habit(Net):
    def __init__(self, kept: Any, habit: Callable[[Any], Any]) -> None:
        super().__init__(lambda x, y, f: y)
        self.kept, self.habit = kept, habit

    def forward(self, x: Tensor) -> Any:
        self.habit(self.kept)
        return super().forward(x)


class Recent(OrderedDict[str, int]):
    def use(self, key: str) -> None:
        self.move_to_end(key)


class Guarded(list[int]):
    def __setitem__(self, *_: Any) -> None:
        raise TypeError("append only")


class Counts:
    __slots__ = ("__count",)

    def __init__(self) -> None:
        self.__count = 0

    def __call__(self) -> int:
        self.__count += 1
        return self.__count


def counter() -> Callable[[], int]:
    count = 0

    def up() -> int:
        nonlocal count
        count += 1
        return count

    return up


def objects() -> Any:
    held = np.empty(1, dtype=object)
    held[0] = []
    return held


def write(own: Own) -> None:
    own.passes = getattr(own, "passes", 0) + 1


# What hangs on a model, what a pass does to it, and how it looks.
HABITS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "legacy random numbers": (
        lambda: np.random.RandomState(0),
        lambda k: k.rand(),
        lambda k: k.get_state()[2],
    ),
    "bits": (lambda: np.random.PCG64(0), lambda k: k.random_raw(), lambda k: str(k.state)),
    "order of use": (lambda: Recent(a=1, b=2, c=3), lambda k: k.use("a"), list),
    "guarded list": (lambda: Guarded([1]), lambda k: k.append(2), list),
    "keys that are tensors": (
        lambda: defaultdict(int, {torch.zeros(2): 3}),
        lambda k: k[torch.zeros(2)],
        len,
    ),
    "array": (lambda: array("i", [0]), lambda k: k.append(1), list),
    "array of lists": (objects, lambda k: k[0].append(1), lambda k: len(k[0])),
    "private slots": (Counts, lambda k: k(), lambda k: k._Counts__count),
    "variable of a closure": (counter, lambda k: k(), lambda k: k.__closure__[0].cell_contents),
    "attributes of a list": (lambda: Own([1]), write, lambda k: getattr(k, "passes", 0)),
}


@pytest.mark.parametrize("name", HABITS)
def test_whatever_a_pass_changes_is_taken_back(name: str) -> None:
    make, habit, look = HABITS[name]
    torch.manual_seed(0)
    model = Habit(make(), habit)
    before = look(model.kept)
    trace(model, X)
    assert look(model.kept) == before
    prune_(model, X, ratio=0.4, allocation="local")
    assert look(model.kept) == before


class Shared(Net):
    helper = Counts()

    def forward(self, x: Tensor) -> Any:
        self.helper()
        return super().forward(x)


def test_helpers_on_the_class_that_can_be_called_are_taken_back() -> None:
    trace(Shared(lambda x, y, f: y), X)
    assert Shared.helper._Counts__count == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(6))
def test_an_interrupt_while_things_are_taken_back_leaves_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    model, x = odd_model(seed)
    before = state_of(model)
    calls, at = 0, draw.randrange(1, 60)
    theirs = _memento._restore_mapping

    def interrupted(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        theirs(*args)

    monkeypatch.setattr(_memento, "_restore_mapping", interrupted)
    with pytest.raises((KeyboardInterrupt, SSPruningError)):
        prune_(model, x, ratio=0.4, allocation="local")
    assert state_of(model) == before, first_difference(before, state_of(model))
