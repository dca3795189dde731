"""The embedded demo: the weights that ship fit the network and read the digits."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ss_pruning.errors import InputError
from ss_pruning.sources.demo import SPLITS, digits_data, digits_resnet, digits_weights


@pytest.fixture
def trained() -> nn.Module:
    model = digits_resnet()
    model.load_state_dict(load_file(digits_weights()))
    return model.eval()


@pytest.fixture
def digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def accuracy(model: nn.Module, split: str) -> float:
    images, labels = digits_data(split).tensors
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def test_shipped_weights_are_small_and_finite(trained: nn.Module) -> None:
    assert digits_weights().stat().st_size < 1_000_000
    assert all(tensor.isfinite().all() for tensor in trained.state_dict().values())


def test_network_has_what_pruning_must_cope_with(trained: nn.Module) -> None:
    convolutions = [module for module in trained.modules() if isinstance(module, nn.Conv2d)]
    assert {module.stride for module in convolutions} == {(1, 1), (2, 2)}
    assert {module.kernel_size for module in convolutions} == {(1, 1), (3, 3)}
    assert 60_000 <= sum(parameter.numel() for parameter in trained.parameters()) <= 200_000
    assert trained(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.usefixtures("digits")
def test_shipped_weights_read_the_test_digits(trained: nn.Module) -> None:
    assert accuracy(trained, "test") > 0.975


@pytest.mark.usefixtures("digits")
def test_accuracy_test_can_fail() -> None:
    torch.manual_seed(0)
    assert accuracy(digits_resnet().eval(), "test") < 0.5


@pytest.mark.usefixtures("digits")
def test_splits_share_out_all_digits() -> None:
    splits = {name: digits_data(name).tensors for name in SPLITS}
    assert {name: len(labels) for name, (_, labels) in splits.items()} == SPLITS
    images = torch.cat([images for images, _ in splits.values()])
    assert images.shape == (1797, 1, 8, 8)
    # No digit appears twice in the source, so none may be in two splits.
    assert len(images.unique(dim=0)) == 1797
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize("split", SPLITS)
def test_splits_repeat_and_hold_every_class(split: str) -> None:
    images, labels = digits_data(split).tensors
    again = digits_data(split).tensors
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert labels.unique().tolist() == list(range(10))


def test_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown split 'valid'.*train, calibration, test"):
        digits_data("valid")


def test_missing_scikit_learn_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_sklearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(InputError, match=r"pip install 'ss-pruning\[demo\]'"):
        digits_data("test")
