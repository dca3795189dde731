"""Each architecture of segmentation-models-pytorch: cut, saved, loaded and trained on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ss_pruning
from tests.support.zoo import randomise

smp = pytest.importorskip("segmentation_models_pytorch", reason="an optional package")
NAMES = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
    "Segformer",
)


def build(name: str) -> nn.Module:
    model: nn.Module = getattr(smp, name)("resnet18", encoder_weights=None, classes=3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_cut_right_saved_loaded_and_trains(name: str, tmp_path: Path) -> None:
    model: Any = randomise(build(name), 0).eval()
    images = torch.randn(2, 3, 128, 128)
    dense = copy.deepcopy(model)
    report = ss_pruning.prune_(model, images[:1], macs=0.6)
    assert report.macs_after <= 0.6 * report.macs_before
    assert report.max_error < 1e-10
    assert model(images).shape == dense(images).shape
    assert [entry.reason for entry in report.excluded if "output" in entry.reason]

    ss_pruning.save(model, tmp_path / "m.safetensors")
    same = ss_pruning.load(tmp_path / "m.safetensors", lambda: build(name))
    assert torch.equal(same(images), model(images))
    before = model.segmentation_head[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()(images).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.segmentation_head[0].weight, before)
