"""Arguments and models that cannot be used as they are: each error says what to do, and doing it helps."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as masks

from ss_pruning import Allocation, SynapticImportance, prune_
from ss_pruning.errors import BudgetError, InputError, ModelError, NothingToPruneError
from ss_pruning.graph import trace
from ss_pruning.graph.exclusions import UNCALLED_REASON
from ss_pruning.surgery.plan import plan_of
from tests.support.snapshot import snapshot

X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SHAPE = r"\[batch, channels, height, width\]"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.extra, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).relu()
        if x.shape[-1] > 32:
            y = y + self.extra(y)
        answer: Tensor = self.head(self.conv2(y).relu().mean((2, 3)))
        return answer


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def refused(model: nn.Module, message: str, example: Any = X, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        prune_(model, example, **{"ratio": 0.3, **options})
    assert snapshot(model) == before


def test_an_array_is_not_told_in_many_lines() -> None:
    refused(net(), f"<ndarray> holds no tensor; .*{SHAPE}", X.numpy())


def test_a_list_of_several_arguments_is_told_from_a_tuple() -> None:
    class Two(Net):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + other)

    with pytest.raises(ModelError, match=r"missing 1 required .*'other'.*give several in a tuple"):
        prune_(Two(), [X, X], ratio=0.3)


@pytest.mark.parametrize("example", [None, "image.jpg", (), {}, [], 3, (1, "a"), {"x": None}])
def test_examples_without_a_tensor_are_refused(example: Any) -> None:
    refused(net(), f"holds no tensor; .*{SHAPE}", example)
    with pytest.raises(InputError, match="holds no tensor"):
        trace(net(), example)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.tensor(1.0), f"single number, no batch.*{SHAPE}"),
        (X.to("meta"), r"shape \[1, 3, 12, 12\] lies on the meta device"),
        (X[:0], r"shape \[0, 3, 12, 12\] is empty"),
    ],
)
def test_examples_without_values_are_refused(example: Any, message: str) -> None:
    refused(net(), message, example)


@pytest.mark.parametrize("example", [(X,), {"x": X}, UserDict(x=X)], ids=["tuple", "dict", "mapping"])
def test_the_plan_does_not_depend_on_how_an_input_is_given(example: Any) -> None:
    first, second = net(), net()
    prune_(first, X, ratio=0.3)
    prune_(second, example, ratio=0.3)
    assert plan_of(first) == plan_of(second)


def test_a_boolean_is_no_budget() -> None:
    refused(net(), "ratio=True", ratio=True)


def test_ignore_takes_one_path_or_module() -> None:
    model = net()
    prune_(model, X, ratio=0.3, ignore="conv1")
    assert model.conv1.out_channels == 16 > model.conv2.out_channels
    model = net()
    prune_(model, X, ratio=0.3, ignore=model.conv2)
    assert model.conv2.out_channels == 16 > model.conv1.out_channels
    refused(net(), "ignore='conv' names no layer", ignore="conv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore": 5}, "ignore=5 is neither a module of the model nor the path of one"),
        ({"ignore": nn.Conv2d}, "ignore=<class .*Conv2d'> is neither"),
        ({"ignore": ["conv1", None]}, "ignore=None is neither"),
        ({"progress": True}, r"progress=True cannot be called; give a function of \(stage, done, total\)"),
        ({"calibration": X.to_sparse()}, r"calibration batch 0 is a sparse tensor of shape \[1, 3, 12, 12\]"),
        ({"importance": SynapticImportance}, "importance is the class SynapticImportance"),
        (
            {"allocation": Allocation(round_to="measured", latency_inputs="x")},
            "latency_inputs='x' holds no tensor",
        ),
    ],
)
def test_arguments_of_another_kind_are_named(options: dict[str, Any], message: str) -> None:
    refused(net(), message, **options)


def test_inputs_to_time_on_must_run() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"does not run on the example inputs \(RuntimeError: .* 1 channels"):
        prune_(model, X, ratio=0.3, allocation=Allocation(round_to="measured", latency_inputs=X[:, :1]))
    assert snapshot(model) == before


def test_complex_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 2))
    model[0].weight = nn.Parameter(torch.randn(8, 12, dtype=torch.complex64))
    with pytest.raises(ModelError, match=r"'0.weight' is complex"):
        prune_(model, torch.randn(2, 12, dtype=torch.complex64), ratio=0.3)


def test_where_nothing_is_known_the_message_says_so() -> None:
    """Weights reach a function, not a layer that has run: nothing is there to be named."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) @ self.weight.T

    with pytest.raises((ModelError, NothingToPruneError)) as raised:
        prune_(Bare(), X, ratio=0.3)
    assert not str(raised.value).rstrip().endswith(":")


def test_where_little_is_left_to_go_the_rest_is_named() -> None:
    """A running sum along the channels leaves its last one, which nothing else hears: too few to lose one."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).cumsum(1))
            return y

    with pytest.raises(NothingToPruneError, match=r"no layer is wide enough.*Excluded: .*a \(feeds several"):
        prune_(Summed().eval(), X, ratio=0.3)


@pytest.mark.parametrize("of", ["mask", "bn"])
def test_masks_may_hold_infinities_and_statistics_may_not(of: str) -> None:
    """A causal mask that is added to scores is a buffer of minus infinities."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 2)
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.embed(x)).flatten(2).mT[:, :4]
            y: Tensor = self.head((self.q(x) @ x.mT + self.mask).softmax(-1) @ self.v(x))
            return y

    torch.manual_seed(0)
    model = Causal().eval()
    if of == "bn":
        model.bn.running_var[2] = torch.inf
        with pytest.raises(ModelError, match=r"'bn.running_var' holds NaN or Inf"):
            prune_(model, X, ratio=0.3)
        return
    for compensation in ("none", "mean", "linear"):
        pruned = copy.deepcopy(model)
        report = prune_(pruned, X, ratio=0.3, compensation=compensation, calibration=X.repeat(24, 1, 1, 1))
        assert report.max_error < 1e-10
        assert report.params_after < report.params_before
        assert torch.equal(pruned.mask, model.mask)  # type: ignore[arg-type]
        assert pruned(X).isfinite().all()


def test_masks_are_refused_until_they_are_removed() -> None:
    model = net()
    masks.l1_unstructured(model.conv1, "weight", 0.3)
    masks.l1_unstructured(model.conv2, "bias", 0.3)
    with pytest.raises(InputError, match=r"'conv1' is masked .*prune\.remove\(module, 'weight'\)"):
        prune_(model, X, ratio=0.3)
    masks.remove(model.get_submodule("conv1"), "weight")
    with pytest.raises(InputError, match=r"'conv2' is masked .*prune\.remove\(module, 'bias'\)"):
        prune_(model, X, ratio=0.3)
    masks.remove(model.get_submodule("conv2"), "bias")
    prune_(model, X, ratio=0.3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_is_refused_until_it_is_removed() -> None:
    model = net()
    nn.utils.weight_norm(model.conv1)
    with pytest.raises(InputError, match=r"'conv1' has the old weight norm: .*remove_weight_norm"):
        prune_(model, X, ratio=0.3)
    nn.utils.remove_weight_norm(model.get_submodule("conv1"), "weight")
    prune_(model, X, ratio=0.3)


def test_wrappers_name_what_they_wrap() -> None:
    wrapped = nn.DataParallel(net())
    refused(wrapped, r"model is a DataParallel: prune model\.module")
    prune_(wrapped.module, X, ratio=0.3)
    refused(nn.Sequential(nn.DataParallel(net())), r"model\.0 is a DataParallel: prune model\.0\.module")


def test_compiled_models_name_what_was_compiled() -> None:
    compiled = torch.compile(net(), backend="eager")
    refused(compiled, r"model is compiled: prune model\._orig_mod")
    prune_(compiled._orig_mod, X, ratio=0.3)
    model = net()
    model.compile(backend="eager")
    with pytest.raises(InputError, match="compiled in place"):
        prune_(model, X, ratio=0.3)


def test_what_is_pruned_in_inference_mode_trains() -> None:
    model = net()
    with torch.inference_mode():
        prune_(model, X.clone(), ratio=0.3, compensation="reconstruct", calibration=torch.randn(8, 3, 12, 12))
        assert torch.is_inference_mode_enabled()
    model(X).sum().backward()
    assert model.conv1.weight.grad is not None
    assert model.conv1.out_channels + model.conv2.out_channels < 32


def test_what_was_made_in_inference_mode_says_how_to_make_it_trainable() -> None:
    with torch.inference_mode():
        model = net()
    with pytest.raises(InputError, match=r"'conv1\.weight' was made under .* take copy\.deepcopy\(model\)"):
        prune_(model, X, ratio=0.3)
    model = copy.deepcopy(model)
    prune_(model, X, ratio=0.3)
    model(X).sum().backward()


def test_layers_that_did_not_run_are_named() -> None:
    report = prune_(net(), X, ratio=0.3)
    (left,) = [left for left in report.excluded if left.reason == UNCALLED_REASON]
    assert (left.paths, left.channels) == (("extra",), 16)
    assert all(
        left.reason != UNCALLED_REASON
        for left in prune_(net(), torch.randn(1, 3, 40, 40), ratio=0.3).excluded
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn, self.head = (
            nn.Conv2d(3, 16, 3),
            nn.LSTM(16, 8, batch_first=True),
            nn.Linear(8, 4),
        )
        self.other, self.last = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.rnn(self.conv(x).flatten(2).transpose(1, 2))
        answer: Tensor = self.head(steps.mean(1)) + self.last(self.other(x).mean((2, 3)))
        return answer


def test_a_recurrent_reader_is_named() -> None:
    left = prune_(Recurrent().eval(), X, ratio=0.3).excluded
    (reason,) = [entry.reason for entry in left if "conv" in entry.paths]
    assert "'rnn' (LSTM)" in reason


def test_a_budget_out_of_reach_names_what_holds_the_rest() -> None:
    model = net()
    with pytest.raises(BudgetError, match=r"smallest is params=") as caught:
        prune_(model, X, params=0.01, ignore="conv2")
    total = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in model.conv2.parameters()) / total
    assert f"{share:.1%} in 'conv2' (ignored on request)" in str(caught.value)
    assert "'extra' (did not run" in str(caught.value)


def test_a_report_prints_as_a_few_lines() -> None:
    report = prune_(net(), X, macs=0.6)
    text = str(report)
    assert len(repr(report).splitlines()) == 1
    assert len(text) < 700
    assert len(text.splitlines()) < 9
    for _, before, after, kept in report.headline():
        assert any(before in line and after in line and kept in line for line in text.splitlines())
    assert report.verification() in text


def test_scores_of_a_model_in_a_wrapper_are_refused_likewise() -> None:
    with pytest.raises(InputError, match=r"prune model\.module"):
        prune_(nn.DataParallel(net()), X, ratio=0.3, importance=SynapticImportance("batchnorm"))
