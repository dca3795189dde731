"""The dense model of a file: rebuilt where it can be, known by its weights, refused where they are others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import InputError
from ss_pruning.io.checkpoint import checksum_of, checksum_of_weights, dense_checksum_of
from ss_pruning.sources.demo import digits_data, digits_resnet, digits_weights


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A pruned model that tells its dense weights."""
    model = net()
    ss_pruning.prune_(model, torch.zeros(1, 1, 8, 8), ratio=0.25)
    ss_pruning.save(model, tmp_path / "pruned.safetensors", dense=net())
    return tmp_path / "pruned.safetensors"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_it_is_rebuilt_by_whoever_has_the_weights(file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "dense.safetensors"
    save_file(net().state_dict(), weights)
    assert same(ss_pruning.load_dense(file, net), net())
    assert same(ss_pruning.load_dense(file, lambda: net(1), weights), net())


def test_a_model_that_was_not_pruned_to_this_one_is_not_noted(tmp_path: Path) -> None:
    model = net()
    ss_pruning.prune_(model, torch.zeros(1, 1, 8, 8), ratio=0.25)
    for dense in (model, nn.Sequential(nn.Conv2d(1, 8, 3)), nn.Conv2d, 5):
        with pytest.raises(
            InputError, match=r"dense is not the model that was pruned|give a torch.nn.Module"
        ):
            ss_pruning.save(model, tmp_path / "pruned.safetensors", dense=dense)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_other_weights_are_refused(file: Path, tmp_path: Path) -> None:
    """Another seed, one number of one buffer, another number type: none of them was pruned."""
    moved, half = net(), net().half()
    moved[1].running_mean[3] += 1e-3
    save_file(moved.state_dict(), tmp_path / "moved.safetensors")
    for build, weights in (
        (lambda: net(1), None),
        (net, tmp_path / "moved.safetensors"),
        (lambda: half, None),
    ):
        with pytest.raises(InputError, match=r"not the dense weights that .* was pruned from"):
            ss_pruning.load_dense(file, build, weights)


def test_a_file_that_tells_nothing_takes_the_word_of_who_does(tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    ss_pruning.save(net(), file, "torchvision:resnet18")
    assert dense_checksum_of(file) is None
    assert same(ss_pruning.load_dense(file, net), net())
    with pytest.raises(InputError, match="does not tell its dense weights"):
        ss_pruning.load_dense(file)
    with pytest.raises(InputError, match="does not tell its dense weights"):
        ss_pruning.load_dense(file, "torchvision:resnet18")  # random, as nobody asked for others


def test_the_checksum_is_not_the_model_s(file: Path, tmp_path: Path) -> None:
    """The same model has the same checksum whether its dense weights are told or not, and loads alike."""
    model = ss_pruning.load(file, net)
    ss_pruning.save(model, tmp_path / "silent.safetensors")
    assert checksum_of(file) == checksum_of(tmp_path / "silent.safetensors")
    assert dense_checksum_of(file) == checksum_of_weights(net()) != checksum_of_weights(net(1))


def test_what_comes_with_its_weights_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    images: Tensor = digits_data("calibration").tensors[0]
    dense = digits_resnet().eval()
    dense.load_state_dict(load_file(digits_weights()))
    model, file = copy.deepcopy(dense), tmp_path / "digits.safetensors"
    ss_pruning.prune_(model, images[:1], macs=0.3)
    ss_pruning.save(model, file, "demo:digits", dense=dense)
    assert same(ss_pruning.load_dense(file), dense)
    report = ss_pruning.recover_(ss_pruning.load(file), ss_pruning.load_dense(file), images, steps=2)
    assert report.steps == 2
