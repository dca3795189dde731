"""Files of any exporter: what cannot be run, timed or compared is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnx", reason="needs the extra: pip install 'ss-pruning[onnx]'")
pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'ss-pruning[onnx]'")
pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

import onnx

from ss_pruning.cli.bench import _preprocess
from ss_pruning.cli.request import Compared
from ss_pruning.errors import FileFormatError, InputError
from ss_pruning.profiling.onnx_model import OnnxModel
from ss_pruning.profiling.openvino_model import OpenVinoModel

X = torch.randn(4, 3)


def written(path: Path, operator: str, takes: list[Any], kind: str = "FLOAT", inputs: int = 1) -> OnnxModel:
    """A file of one node."""
    make, number = onnx.helper, getattr(onnx.TensorProto, kind)
    names = [f"x{i}" for i in range(inputs)]
    node = make.make_node(operator, names, ["y"])
    if operator == "SplitToSequence":
        out = make.make_tensor_sequence_value_info("y", number, None)
    else:
        out = make.make_tensor_value_info("y", number, None)
    given = [make.make_tensor_value_info(name, number, takes) for name in names]
    graph = make.make_graph([node], "one", given, [out])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    return OnnxModel(path)


def test_numbers_of_another_type_are_refused(tmp_path: Path) -> None:
    model = written(tmp_path / "half.onnx", "Relu", ["B", 3], "FLOAT16")
    assert torch.equal(model(X.half()), X.half().relu())
    with pytest.raises(InputError, match=r"half.onnx does not run on these inputs: .*float16"):
        model(X)


def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    model = written(tmp_path / "list.onnx", "SplitToSequence", ["B", 3])
    with pytest.raises(InputError, match=r"list.onnx puts out a list"):
        model(X)


def test_batches_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="batches of no inputs"):
        written(tmp_path / "none.onnx", "Relu", [0, 3])


def test_a_fixed_batch_is_named(tmp_path: Path) -> None:
    model = written(tmp_path / "two.onnx", "Relu", [2, 3])
    assert torch.equal(model(X), X.relu())
    with pytest.raises(
        InputError, match=r"takes 2 inputs at a time, and 1 are no multiple of that; .*batch of 2"
    ):
        model(X[:1])


def test_files_of_several_inputs_are_no_files_of_images(tmp_path: Path) -> None:
    model = written(tmp_path / "sum.onnx", "Add", ["B", 3, 8, 8], inputs=2)
    with pytest.raises(InputError, match=r"sum.onnx takes 2 inputs, and files of one are compared"):
        _preprocess(Compared(files=[tmp_path / "sum.onnx"]), model)


@pytest.fixture
def in_openvino(tmp_path: Path) -> OpenVinoModel:
    """A file that takes two inputs at a time; written by OpenVINO itself."""
    openvino = pytest.importorskip("openvino", reason="needs the extra: pip install 'ss-pruning[openvino]'")
    source = written(tmp_path / "two.onnx", "Relu", [2, 3]).path
    openvino.save_model(openvino.Core().read_model(source), tmp_path / "two.xml")
    return OpenVinoModel(tmp_path / "two.xml")


def test_openvino_runs_batches_that_a_file_takes(in_openvino: OpenVinoModel) -> None:
    assert torch.equal(in_openvino(X), X.relu())
    assert (in_openvino.inputs, in_openvino.batch, in_openvino.size) == (1, 2, (3,))
    sizes = [in_openvino.path.with_suffix(ending).stat().st_size for ending in (".xml", ".bin")]
    assert in_openvino.bytes == sum(sizes)
    with pytest.raises(InputError, match=r"takes inputs of shape \[2, 3\], not \[4, 2\]"):
        in_openvino(X[:, :2])


def test_files_that_openvino_cannot_open_are_named(in_openvino: OpenVinoModel) -> None:
    in_openvino.path.write_text("<net")
    with pytest.raises(FileFormatError, match=r"OpenVINO cannot open .*two\.xml"):
        OpenVinoModel(in_openvino.path)
    in_openvino.path.with_suffix(".bin").unlink()
    with pytest.raises(InputError, match=r"there is no file .*two\.bin"):
        OpenVinoModel(in_openvino.path)
