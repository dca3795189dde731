"""What is written for other runtimes puts out what the model does, whatever the batch; anything else is not kept."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import InputError, ModelError, VerificationError
from ss_pruning.io.export import export
from ss_pruning.io.writers import WRITERS, attention
from tests.support.snapshot import snapshot
from tests.support.zoo import Branches, randomise

onnx = pytest.importorskip("onnx", reason="needs the extra: pip install 'ss-pruning[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'ss-pruning[onnx]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'ss-pruning[onnx]'")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y: Tensor = self.head((x + self.body(x)).mean((2, 3)))
        return y


class TwoWays(nn.Module):
    """Two inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        both = torch.relu(self.left(a)) + torch.relu(self.right(b))
        out = self.head(both)
        return {"map": out, "mean": out.mean((2, 3))}


X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pruned(make: Callable[[], nn.Module], x: Any, macs: float = 0.6) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(make(), 0).eval()
    ss_pruning.prune_(model, x, macs=macs)
    return model


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    """By onnxruntime itself, not by the code under test."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    edge = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, edge)]


def run_pt2(path: Path, *inputs: Tensor) -> list[Tensor]:
    found = torch.export.load(path).module()(*inputs)
    return list(found.values()) if isinstance(found, dict) else [found]


def run_openvino(path: Path, *inputs: Tensor) -> list[Tensor]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [torch.from_numpy(value) for value in compiled([x.numpy() for x in inputs]).values()]


RUNNERS = {"onnx": run_onnx, "openvino": run_openvino, "pt2": run_pt2}
OPENVINO = pytest.mark.skipif(
    find_spec("openvino") is None, reason="needs the extra: pip install 'ss-pruning[openvino]'"
)
KINDS = ["onnx", pytest.param("openvino", marks=OPENVINO), "pt2"]
ENDINGS = {"onnx": ["onnx"], "openvino": ["bin", "xml"], "pt2": ["pt2"]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_net_runs_elsewhere_with_any_batch(kind: str, tmp_path: Path) -> None:
    model = pruned(Tiny, X)
    before = snapshot(model)
    written = export(model, tmp_path / f"net.{ENDINGS[kind][-1]}", X)
    assert snapshot(model) == before
    assert written.format == kind
    assert written.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written.max_error < 1e-5
    assert sorted(os.listdir(tmp_path)) == [f"net.{ending}" for ending in ENDINGS[kind]]
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 16, 16)
        (found,) = RUNNERS[kind](written.path, images)
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)


def test_the_free_axis_of_an_onnx_file_is_called_batch(tmp_path: Path) -> None:
    file = onnx.load(export(pruned(Tiny, X), tmp_path / "net.onnx", X).path)
    values = [*file.graph.input, *file.graph.output, *file.graph.value_info]
    assert {axis.dim_param for value in values for axis in value.type.tensor_type.shape.dim} == {"", "batch"}
    onnx.checker.check_model(file, full_check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_several_inputs_and_outputs(kind: str, tmp_path: Path) -> None:
    a, b = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    model = pruned(TwoWays, (a, b))
    path = tmp_path / ("net.xml" if kind == "openvino" else "net")
    export(model, path, (a, b), kind)  # type: ignore[arg-type]
    images = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    for found, right in zip(RUNNERS[kind](path, *images), model(*images).values(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    export(model, path, {"a": a, "b": b}, kind)  # type: ignore[arg-type]


def test_a_training_model_is_exported_as_it_will_be_used(tmp_path: Path) -> None:
    model = pruned(Tiny, X).train()
    export(model, tmp_path / "net.pt2", X)
    assert model.training
    images = torch.randn(3, 3, 16, 16)
    (found,) = run_pt2(tmp_path / "net.pt2", images)
    torch.testing.assert_close(found, model.eval()(images))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_computes_something_else_is_not_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"net.{ending}" for ending in ENDINGS[kind]]
    for file in files:
        file.write_bytes(b"an older file")
    writer = WRITERS[kind]  # type: ignore[index]

    def wrong(program: Any, *temporary: Path) -> Any:
        run = writer.write(program, *temporary)
        return lambda inputs: [tensor * 1.001 for tensor in run(inputs)]

    monkeypatch.setitem(WRITERS, kind, writer._replace(write=wrong))  # type: ignore[arg-type]
    with pytest.raises(
        VerificationError, match=r"differ from the model's by 1\.0e-03 of the largest; it was not kept"
    ):
        export(pruned(Tiny, X), files[-1], X)
    assert sorted(tmp_path.iterdir()) == files
    assert [file.read_bytes() for file in files] == [b"an older file"] * len(files)


class OneImage(nn.Module):
    """Knows its batch size by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).reshape(2, -1)
        return y


@pytest.mark.parametrize("make", [Branches, OneImage])
def test_models_that_cannot_be_followed_say_so(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot follow the model with a free batch size"):
        export(make(), tmp_path / "net.pt2", X)
    assert os.listdir(tmp_path) == []


def test_the_exporters_first_error_is_told_and_not_how_to_mend_the_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise AssertionError("only 4D query")
        except AssertionError as error:
            raise RuntimeError("Next steps: submit a PR to PyTorch") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"cannot be written as ONNX \(AssertionError: only 4D query\)"):
        export(Tiny(), tmp_path / "net.onnx", X)
    assert os.listdir(tmp_path) == []


def test_bad_requests_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format='tflite' is unknown; use 'onnx', 'openvino' or 'pt2'"):
        export(Tiny(), tmp_path / "net.tflite", X)
    with pytest.raises(InputError, match="does not exist; create it first"):
        export(Tiny(), tmp_path / "absent" / "net.pt2", X)
    with pytest.raises(InputError, match="every input needs a batch axis"):
        export(Tiny(), tmp_path / "net.pt2", torch.tensor(1.0))
    with pytest.raises(InputError, match=r"export model\.float\(\), with float inputs"):
        export(Tiny().bfloat16(), tmp_path / "net.onnx", X.bfloat16())
    with pytest.raises(InputError, match=r"OpenVINO reads \*\.xml, .*net\.onnx' ends otherwise"):
        export(Tiny(), tmp_path / "net.onnx", X, "openvino")


@pytest.mark.parametrize(
    ("missing", "ending", "extra"), [("onnxruntime", "onnx", "onnx"), ("openvino", "xml", "openvino")]
)
def test_what_is_missing_names_the_extra(
    missing: str, ending: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"pip install 'ss-pruning\[{extra}\]'"):
        export(Tiny(), tmp_path / f"net.{ending}", X)


# ---------------------------------------------------------------- real architectures


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        timm = pytest.importorskip("timm", reason="needs timm")
        model: nn.Module = timm.create_model(name)
        return model

    return make


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **options)


ARCHITECTURES = {
    "ResNet": _torchvision("resnet18"),
    "DenseNet": _torchvision("densenet121"),
    "MobileNetV3": _torchvision("mobilenet_v3_small"),
    "EfficientNet": _timm("efficientnet_b0"),
    "ConvNeXt": _timm("convnext_atto"),
    "segmentation": _torchvision("lraspp_mobilenet_v3_large", weights_backbone=None),
}
LARGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_export(name: str, kind: str, tmp_path: Path) -> None:
    model = pruned(ARCHITECTURES[name], LARGE)
    written = export(model, tmp_path / f"net.{ENDINGS[kind][-1]}", LARGE)
    assert written.max_error <= 1e-4
    images = torch.randn(3, 3, 64, 64)
    right = model(images)
    right = list(right.values()) if isinstance(right, dict) else [right]
    for found, wanted in zip(RUNNERS[kind](written.path, images), right, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="torch.compile needs a C++ compiler on a CPU",
)


def check_compiled(model: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        right, found = model(x), torch.compile(model)(x)
    right, found = (list(y.values()) if isinstance(y, dict) else [y] for y in (right, found))
    for a, b in zip(right, found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


@COMPILER
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pruned_net_compiles() -> None:
    check_compiled(pruned(Tiny, X), torch.randn(2, 3, 16, 16))


#: Fewer layers of the same kinds, where there are such: compiling takes seconds a layer.
SHALLOW = {
    "ResNet": _timm("test_resnet"),
    "DenseNet": lambda: torchvision.models.DenseNet(8, (2, 2), 16),
    "EfficientNet": _timm("test_efficientnet"),
    "ConvNeXt": _timm("test_convnext"),
}


@COMPILER
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_compile(name: str) -> None:
    check_compiled(pruned(SHALLOW.get(name, ARCHITECTURES[name]), LARGE), torch.randn(2, 3, 64, 64))


class InWindows(nn.Module):
    """Attention whose windows have an axis of their own, as Twins and NesT have: 5-D, which torch does not write."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 24)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(2, (4, -1)).flatten(3).permute(0, 2, 3, 1)  # [N, windows, positions, channels]
        q, k, v = self.qkv(tokens).unflatten(3, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
        y: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.7)
        return y


def test_attention_with_more_axes_than_four_is_written(tmp_path: Path) -> None:
    assert export(InWindows().eval(), tmp_path / "net.onnx", X).max_error < 1e-5  # of two batch sizes


@pytest.mark.parametrize("options", [
    {}, {"is_causal": True, "scale": 0.7}, {"enable_gqa": True}, {"attn_mask": torch.linspace(-2, 2, 6)},
    {"attn_mask": torch.eye(6).bool() | (torch.arange(6) < 2)},
])  # fmt: skip
def test_attention_is_written_as_torch_computes_it(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    kept = 1 if "enable_gqa" in options else 4
    q, k, v = torch.randn(2, 3, 4, 6, 8), torch.randn(2, 3, kept, 6, 8), torch.randn(2, 3, kept, 6, 8)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, **options)
    names = {"is_causal": "causal", "attn_mask": "mask"}
    found = attention(q, k, v, **{names.get(name, name): value for name, value in options.items()})
    torch.testing.assert_close(found, wanted)


def test_a_full_disk_is_not_the_models_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", full)
    with pytest.raises(InputError, match="the disk is full"):
        export(nn.Conv2d(3, 4, 1), tmp_path / "a.onnx", torch.zeros(1, 3, 4, 4))
    assert os.listdir(tmp_path) == []
