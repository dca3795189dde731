"""Files in INT8 compute what the model does, up to the steps of eight bits; what cannot be kept is said."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import FileFormatError, InputError, ModelError, VerificationError
from ss_pruning.io import int8
from ss_pruning.io.export import export
from ss_pruning.io.int8 import export_int8
from ss_pruning.profiling.onnx_model import OnnxModel
from tests.support.eight_bits import IMAGES, STEP, Detector, bound, vectors
from tests.support.snapshot import snapshot
from tests.support.zoo import randomise

onnx = pytest.importorskip("onnx", reason="needs the extra: pip install 'ss-pruning[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'ss-pruning[onnx]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'ss-pruning[onnx]'")


class Classifier(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.norm(self.conv(x))).amax((2, 3)))
        return y


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_error_is_that_of_eight_bits(tmp_path: Path) -> None:
    """Bounded by the steps of inputs, weights and outputs, as computed from their ranges."""
    layer, x = nn.Linear(6, 3, bias=False), vectors()
    written = export_int8(layer, tmp_path / "a.onnx", x)
    right, found = x @ layer.weight.detach().T, OnnxModel(written.path)(x)
    step = (right.max() - right.min()) / 255
    off = (found - right).abs()
    assert bool((off <= bound(layer, x) + step).all())
    assert off.max() > STEP / 50  # and it was quantised


def test_norms_are_folded_weights_are_bytes_and_the_model_is_left_alone(tmp_path: Path) -> None:
    model = randomise(Classifier(256), 0)
    before = snapshot(model)
    in_float = export(model, tmp_path / "float.onnx", IMAGES[:1])
    written = export_int8(model, tmp_path / "int8.onnx", IMAGES)
    assert snapshot(model) == before
    assert sorted(os.listdir(tmp_path)) == ["float.onnx", "int8.onnx"]
    kinds = ops(written.path)
    assert "QuantizeLinear" in kinds
    assert "BatchNormalization" not in kinds
    types = {t.name: t.data_type for t in onnx.load(written.path).graph.initializer if len(t.dims) in (2, 4)}
    assert set(types.values()) == {onnx.TensorProto.INT8}
    assert written.bytes == written.path.stat().st_size
    assert written.bytes < 0.9 * in_float.bytes
    assert (written.images, written.fidelity.inputs) == (32, 8)
    assert "INT8, ranges from 32 images; on 8 others the output error is" in str(written)


def test_fidelity_is_that_of_the_images_held_out(tmp_path: Path) -> None:
    model = randomise(Classifier(), 0).eval()
    written = export_int8(model, tmp_path / "a.onnx", [(part, None) for part in IMAGES.split(16)])
    others = IMAGES[4::5]
    right, found = model(others).detach(), OnnxModel(written.path)(others)
    error = ((found - right) ** 2).mean() / ((right - right.mean(0)) ** 2).mean()
    assert written.fidelity.error == pytest.approx(float(error), rel=1e-3)
    assert written.fidelity.agreement == float((found.argmax(1) == right.argmax(1)).float().mean())
    assert 0 < written.fidelity.error < 0.05


def test_pruned_models_are_smaller_still(tmp_path: Path) -> None:
    model = randomise(Classifier(256), 0).eval()
    dense = export_int8(model, tmp_path / "dense.onnx", IMAGES)
    ss_pruning.prune_(model, IMAGES[:1], macs=0.5)
    pruned = export_int8(model, tmp_path / "pruned.onnx", IMAGES)
    assert pruned.bytes < dense.bytes
    assert OnnxModel(pruned.path)(IMAGES[:7]).shape == (7, 4)


def test_decoding_stays_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    written = export_int8(model, tmp_path / "a.onnx", IMAGES)
    right, found = model(IMAGES).detach(), OnnxModel(written.path)(IMAGES)
    # A common scale would have steps of 1, which is all of a probability.
    assert (right[:, 0].max() - right[:, 0].min()) > 50
    assert (found[:, 1] - right[:, 1]).abs().max() < 0.03
    weights = [t.data_type for t in onnx.load(written.path).graph.initializer if list(t.dims) == [1, 4, 1, 1]]
    assert weights == [onnx.TensorProto.FLOAT]


def fixed(path: Path, batch: int) -> Path:
    """As other exporters write: with one batch size, and notes."""
    model = randomise(Classifier(), 0).eval()
    program = torch.onnx.export(model, (IMAGES[:batch],), dynamo=True, verbose=False)
    assert program is not None
    program.save(path)
    network = onnx.load(path)
    onnx.helper.set_model_props(network, {"names": "cat, dog"})
    onnx.save(network, path)
    return path


@pytest.mark.filterwarnings("ignore")
def test_files_of_others_with_a_fixed_batch(tmp_path: Path) -> None:
    source = fixed(tmp_path / "source.onnx", 2)
    before = source.read_bytes()
    written = export_int8(source, tmp_path / "int8.onnx", IMAGES)
    assert source.read_bytes() == before
    notes = {entry.key: entry.value for entry in onnx.load(written.path).metadata_props}
    assert notes["names"] == "cat, dog"
    in_float, quantised = OnnxModel(source), OnnxModel(written.path)
    assert (in_float.batch, quantised.batch) == (2, 2)
    assert (in_float(IMAGES) - quantised(IMAGES)).abs().max() < 0.2
    with pytest.raises(InputError, match="3 are no multiple of that; export it with a free batch size"):
        quantised(IMAGES[:3])
    with pytest.raises(
        ModelError, match=r"source.onnx takes inputs of shape \[2, 3, 12, 12\], not \[2, 3, 6, 6\]"
    ):
        export_int8(source, tmp_path / "other.onnx", IMAGES[:, :, :6, :6])
    with pytest.raises(InputError, match="would be written over"):
        export_int8(source, source, IMAGES)
    assert source.read_bytes() == before


def test_bad_requests_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = Classifier().eval(), tmp_path / "a.onnx"
    with pytest.raises(InputError, match=r"9 calibration images say too little .* give 10 or more"):
        export_int8(model, target, IMAGES[:9])
    with pytest.raises(InputError, match="'openvino' is unknown for INT8; use 'onnx', which OpenVINO reads"):
        export_int8(model, tmp_path / "a.xml", IMAGES)
    with pytest.raises(InputError, match="calibration inputs are empty"):
        export_int8(model, target, [])
    with pytest.raises(InputError, match="there is no file"):
        export_int8(tmp_path / "absent.onnx", target, IMAGES)
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(FileFormatError, match="onnxruntime cannot open"):
        export_int8(tmp_path / "text.onnx", target, IMAGES)
    with pytest.raises(ModelError, match="no layer with weights"):
        export_int8(nn.Sequential(nn.ReLU(), nn.Flatten()), target, IMAGES)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'ss-pruning\[onnx\]'"):
        export_int8(model, target, IMAGES)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r"torch\.export needs .*pip install 'ss-pruning\[torchao\]'"):
        export_int8(model, tmp_path / "a.pt2", IMAGES)
    assert os.listdir(tmp_path) == ["text.onnx"]


def test_a_file_that_says_nothing_of_the_model_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise = int8.quantise_file

    def wrong(source: Path, path: Path, images: Any) -> None:
        quantise(source, path, images.mapped(lambda x: x * 1e-3))

    monkeypatch.setattr(int8, "quantise_file", wrong)
    with pytest.warns(UserWarning, match="no better than a constant's: the model is untrained"):
        export_int8(randomise(Classifier(), 0).eval(), tmp_path / "a.onnx", IMAGES)


def test_a_file_that_puts_out_nan_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.onnx"
    target.write_bytes(b"an older file")
    fidelity = int8.Reference.fidelity

    def broken(self: Any, small: nn.Module) -> Any:
        return replace(fidelity(self, small), error=float("nan"))

    monkeypatch.setattr(int8.Reference, "fidelity", broken)
    with pytest.raises(VerificationError, match="puts out NaN or Inf; it was not kept"):
        export_int8(randomise(Classifier(), 0).eval(), target, IMAGES)
    assert target.read_bytes() == b"an older file"
    assert os.listdir(tmp_path) == ["a.onnx"]
