"""Synapse masks: which stay, and weights that keep to it through everything that people do to models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ss_pruning import compact_, synaptic_strength
from ss_pruning.errors import InputError, ModelError
from ss_pruning.importance.strength import by_kernel, kernel_powers
from ss_pruning.sparsity.masks import (
    check_unmasked,
    mask_,
    masks_of,
    merge_masks_,
    remove_masks_,
    synapse_masks,
)
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME

NETS = ["plain", "residual", "dense", "grouped", "separable", "transposed_grouped", "flattened"]


def masked_net(name: str = "residual", fraction: float = 0.6) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    net = BY_NAME[name]
    model = net.make().eval()
    masks = synapse_masks(synaptic_strength(model, net.example), fraction=fraction, allow_dead=True)
    return model, masks, net.example


@pytest.mark.parametrize("name", NETS)
def test_a_mask_zeroes_exactly_the_kernels_it_names(name: str) -> None:
    model, masks, example = masked_net(name)
    twin = copy.deepcopy(model)
    for path, mask in masks.items():  # kernel by kernel, from the definition of out, in and group
        layer = twin.get_submodule(path)
        groups = getattr(layer, "groups", 1)
        transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        outputs, inputs = mask.shape
        for k in range(outputs):
            for c in range(inputs):
                if mask[k, c]:
                    continue
                group = k // (outputs // groups)
                at = (group * inputs + c, k % (outputs // groups)) if transposed else (k, c)
                layer.weight.data[at] = 0
    mask_(model, masks)
    assert torch.equal(model(example), twin(example))
    assert {path: mask.tolist() for path, mask in masks_of(model).items()} == {
        path: mask.tolist() for path, mask in masks.items()
    }


def test_what_is_masked_stays_zero_through_fine_tuning_and_optimisers_go_on() -> None:
    model, masks, example = masked_net()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(example).square().sum().backward()
    sgd.step()  # momentum that knows nothing of the masks
    mask_(model, masks)
    before = {path: model.get_submodule(path).weight.detach().clone() for path in masks}
    for _ in range(3):
        sgd.zero_grad()
        model.train()(example).square().sum().backward()
        sgd.step()
    for path, mask in masks.items():
        module = model.get_submodule(path)
        assert torch.equal(kernel_powers(module) > 0, mask)
        assert not torch.equal(module.weight, before[path])  # the optimiser of before still trains it
        gradient = module.parametrizations.weight.original.grad
        assert not gradient[~by_kernel(module, gradient, mask).expand_as(gradient)].any()


def test_masks_survive_state_dicts_copies_and_pickles() -> None:
    model, masks, example = masked_net()
    mask_(model, masks)
    expected = model(example)
    fresh = mask_(BY_NAME["residual"].make().eval(), {p: torch.ones_like(m) for p, m in masks.items()})
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(example), expected)
        assert all(torch.equal(masks_of(twin)[path], mask) for path, mask in masks.items())


def test_a_copy_without_its_masks_leaves_the_original_masked() -> None:
    model, masks, example = masked_net()
    mask_(model, masks)
    expected = model(example)
    twin = copy.deepcopy(copy.deepcopy(model))
    merge_masks_(twin)
    assert not masks_of(twin)
    assert torch.equal(twin(example), expected)
    assert torch.equal(model(example), expected)
    assert masks_of(model)


def test_copies_of_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    mask_(model, {"0": torch.eye(3, dtype=torch.bool)})
    twin = copy.deepcopy(model)
    assert twin[0].parametrizations.weight.original is twin[1].weight


def test_merged_and_removed_masks_leave_an_ordinary_model() -> None:
    model, masks, example = masked_net()
    before = snapshot(model)
    dense = model(example)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    remove_masks_(mask_(model, masks))
    assert torch.equal(model(example), dense)
    assert {n: v for n, v in snapshot(model).items() if "tensor" not in n} == {
        n: v for n, v in before.items() if "tensor" not in n
    }
    masked = mask_(model, masks)(example)
    merge_masks_(model)
    assert torch.equal(model(example), masked)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert type(model.get_submodule(next(iter(masks)))) in (nn.Conv2d, nn.Linear)


def test_a_second_mask_replaces_the_first() -> None:
    model, masks, example = masked_net()
    dense = model(example)
    mask_(model, masks)
    assert not torch.equal(model(example), dense)
    mask_(model, {path: torch.ones_like(mask) for path, mask in masks.items()})
    assert torch.equal(model(example), dense)


@pytest.mark.parametrize("name", ["residual", "grouped", "separable"])
def test_masked_merged_and_compacted_nets_compute_the_same(name: str) -> None:
    model, masks, example = masked_net(name, fraction=0.9)
    model, example = model.double(), example.double()
    mask_(model, masks)
    expected = model(example)
    with pytest.raises(InputError, match=r"merge_masks_\(model\) first"):
        compact_(model, example)
    assert torch.equal(model(example), expected)
    compact_(merge_masks_(model), example)
    assert torch.allclose(model(example), expected, atol=1e-10, rtol=0)
    check_unmasked(model)


SCORES = {"a": torch.tensor([[4.0, 1.0], [3.0, 2.0]]), "b": torch.tensor([[0.5, 6.0, 5.0]])}


def test_rules_by_hand() -> None:
    def kept(**rule: object) -> list[list[list[int]]]:
        return [m.int().tolist() for m in synapse_masks(SCORES, **rule).values()]  # type: ignore[arg-type]

    assert kept(fraction=3 / 7) == [[[1, 0], [1, 0]], [[0, 1, 1]]]
    assert kept(fraction=0.5, scope="layer") == [[[1, 0], [1, 0]], [[0, 1, 1]]]
    assert kept(fraction=0.0) == [[[1, 1], [1, 1]], [[1, 1, 1]]]
    assert kept(threshold=2.0) == [[[1, 0], [1, 1]], [[0, 1, 1]]]
    # shares by output: 16/17 and 1/17; 9/13 and 4/13; 0.25, 36 and 25 of 61.25
    assert kept(kept_variance=0.9) == [[[1, 0], [1, 1]], [[0, 1, 1]]]
    assert kept(kept_variance=0.5) == [[[1, 0], [1, 0]], [[0, 1, 0]]]
    assert kept(kept_variance=1.0) == [[[1, 1], [1, 1]], [[1, 1, 1]]]


@given(st.integers(0, 2**31 - 1), st.floats(0, 0.99))
@settings(max_examples=50)
def test_the_fraction_is_exact_and_takes_the_weakest(seed: int, fraction: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {"a": torch.rand(4, 5, generator=generator), "b": torch.rand(7, 3, generator=generator)}
    masks = synapse_masks(scores, fraction=fraction, allow_dead=True)
    stays = torch.cat([m.flatten() for m in masks.values()])
    flat = torch.cat([s.flatten() for s in scores.values()])
    assert int((~stays).sum()) == int(41 * fraction + 1e-9)
    if (~stays).any():
        assert flat[~stays].max() <= flat[stays].min()


@pytest.mark.parametrize("count", range(1, 11))
def test_equal_synapses_stay_in_the_number_that_the_variance_asks_for(count: int) -> None:
    masks = synapse_masks({"a": torch.ones(1, 10)}, kept_variance=count / 10)
    assert int(masks["a"].sum()) == count


def test_a_variance_of_zero_keeps_nothing_of_a_dead_output() -> None:
    masks = synapse_masks({"a": torch.tensor([[0.0, 0.0], [1.0, 0.0]])}, kept_variance=1.0)
    assert masks["a"].tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({}, "exactly one"),
        ({"fraction": 0.5, "threshold": 1.0}, "exactly one"),
        ({"fraction": 0.5, "scope": "net"}, "scope"),
        ({"fraction": 1.5}, "fraction=1.5 is out of range"),
        ({"fraction": float("nan")}, "out of range"),
        ({"threshold": 5.5}, "threshold=5.5 would leave no synapse in: a. Take less"),
        ({"fraction": 1.0}, "no synapse in: a, b"),
    ],
)
def test_bad_rules(rule: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        synapse_masks(SCORES, **rule)  # type: ignore[arg-type]


def test_nan_scores_are_refused() -> None:
    with pytest.raises(InputError, match="'b' hold NaN"):
        synapse_masks({**SCORES, "b": torch.tensor([[float("nan")]])}, fraction=0.1)


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"none": torch.ones(1, 1, dtype=torch.bool)}, "no module of this model"),
        ({"1": torch.ones(1, 1, dtype=torch.bool)}, "without a weight"),
        ({"0": torch.ones(3, 4, dtype=torch.bool)}, r"synapses \(4, 3\)"),
        ({"0": torch.ones(4, 3)}, "torch.float32"),
    ],
)
def test_masks_of_another_model_are_refused_and_nothing_is_masked(
    masks: dict[str, Tensor], match: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = snapshot(model)
    with pytest.raises(InputError, match=match):
        mask_(model, {"2": torch.ones(2, 4, dtype=torch.bool), **masks})
    assert snapshot(model) == before


def test_a_foreign_parametrisation_is_refused() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ModelError, match="parametrisation of its own"):
        mask_(model, {"0": torch.ones(4, 3, dtype=torch.bool)})
