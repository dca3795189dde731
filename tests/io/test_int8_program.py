"""Programs in INT8 compute what the model does, up to the steps of eight bits, also in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import InputError, ModelError
from ss_pruning.io.export import export
from ss_pruning.io.int8 import export_int8
from tests.support.eight_bits import IMAGES, STEP, Detector, bound, vectors
from tests.support.snapshot import snapshot
from tests.support.zoo import Branches, randomise

pytest.importorskip("torchao", reason="needs the extra: pip install 'ss-pruning[torchao]'")


class Residual(nn.Module):
    """Calls its activation twice, as ResNets do."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.body, self.act, self.head = nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        y: Tensor = self.head(self.act(x + self.body(x)).amax((2, 3)))
        return y


class NamedDetector(Detector):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"out": super().forward(x)}


def loaded(path: Path) -> nn.Module:
    return torch.export.load(path).module()


def operators(path: Path) -> list[str]:
    return [str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"]


def test_the_error_is_that_of_eight_bits(tmp_path: Path) -> None:
    """Bounded by the steps of inputs and weights, as computed from their ranges."""
    layer, x = nn.Linear(6, 3, bias=False), vectors()
    written = export_int8(layer, tmp_path / "a.pt2", x)
    right, found = x @ layer.weight.detach().T, loaded(written.path)(x)
    off = (found - right).abs()
    assert bool((off <= bound(layer, x)).all())
    assert off.max() > STEP / 50  # and it was quantised


def test_norms_are_folded_weights_are_bytes_and_the_model_is_left_alone(tmp_path: Path) -> None:
    model = randomise(Residual(128), 0)
    before = snapshot(model)
    in_float = export(model, tmp_path / "float.pt2", IMAGES[:1])
    written = export_int8(model, tmp_path / "int8.pt2", IMAGES)
    assert snapshot(model) == before
    assert sorted(os.listdir(tmp_path)) == ["float.pt2", "int8.pt2"]
    kinds = operators(written.path)
    assert sum("dequantize_per_channel" in kind for kind in kinds) == 3
    assert not any("batch_norm" in kind for kind in kinds)
    matrices = [t.dtype for t in torch.export.load(written.path).state_dict.values() if t.dim() > 1]
    assert matrices == [torch.int8] * 3
    assert written.bytes == written.path.stat().st_size < 0.5 * in_float.bytes
    assert (written.images, written.fidelity.inputs) == (32, 8)


def test_fidelity_is_that_of_the_images_held_out_and_of_any_batch(tmp_path: Path) -> None:
    model = randomise(Residual(), 0).eval()
    written = export_int8(model, tmp_path / "a.pt2", [(part, None) for part in IMAGES.split(16)])
    others, program = IMAGES[4::5], loaded(written.path)
    right, found = model(others).detach(), program(others)
    error = ((found - right) ** 2).mean() / ((right - right.mean(0)) ** 2).mean()
    assert written.fidelity.error == pytest.approx(float(error), rel=1e-3)
    assert written.fidelity.agreement == float((found.argmax(1) == right.argmax(1)).float().mean())
    assert 0 < written.fidelity.error < 0.05
    for one, expected in zip(others, found, strict=True):
        torch.testing.assert_close(program(one[None])[0], expected)


def test_pruned_models_are_smaller_still_and_run_in_another_process(tmp_path: Path) -> None:
    model = randomise(Residual(64), 0).eval()
    dense = export_int8(model, tmp_path / "dense.pt2", IMAGES)
    ss_pruning.prune_(model, IMAGES[:1], macs=0.5)
    pruned = export_int8(model, tmp_path / "pruned.pt2", IMAGES)
    assert pruned.bytes < dense.bytes
    torch.save(IMAGES, tmp_path / "in.pt")
    code = (
        "import torch, torchao.quantization.pt2e; "
        "program = torch.export.load('pruned.pt2').module(); "
        "torch.save(program(torch.load('in.pt')).detach(), 'out.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), loaded(pruned.path)(IMAGES))


def test_decoding_stays_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NamedDetector().eval()
    written = export_int8(model, tmp_path / "a.pt2", IMAGES)
    right, found = model(IMAGES)["out"].detach(), loaded(written.path)(IMAGES)["out"]
    # A common scale would have steps of 1, which is all of a probability.
    assert (right[:, 0].max() - right[:, 0].min()) > 50
    assert (found[:, 1] - right[:, 1]).abs().max() < 0.03
    types = {t.dtype for t in torch.export.load(written.path).state_dict.values() if t.shape == (1, 4, 1, 1)}
    assert types == {torch.float32}


def test_bad_requests_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.pt2"
    with pytest.raises(InputError, match=r"made of a model, not of the file 'a\.onnx'"):
        export_int8("a.onnx", target, IMAGES)
    with pytest.raises(ModelError, match="no layer with weights"):
        export_int8(nn.Sequential(nn.ReLU(), nn.Flatten()), target, IMAGES)
    with pytest.raises(ModelError, match="cannot follow the model"):
        export_int8(Branches(), target, IMAGES)
    with pytest.raises(
        InputError, match="format='xml' is unknown for INT8; use 'onnx', which OpenVINO reads"
    ):
        export_int8(Residual(), target, IMAGES, "xml")  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
