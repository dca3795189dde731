"""Arguments, files and models that people give by mistake: refused in a sentence, and nothing is hung on or lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from typer.testing import CliRunner

import ss_pruning
from ss_pruning.cli import console as _console
from ss_pruning.cli.app import app
from ss_pruning.errors import FileFormatError, InputError, ModelError, SSPruningError
from ss_pruning.io.checkpoint import open_report
from ss_pruning.sources.image_files import open_rgb
from ss_pruning.sparsity.penalty import StrengthPenalty

X = torch.randn(2, 3, 8, 8)
FILE = """
import os
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())

def moves():
    os.chdir("/")
    return build()

def half():
    return build().half()
"""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result: Any) -> str:
    """The message without its frame."""
    assert result.exit_code == 2, (result.output, result.exception)
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("out", [["--out", ""], ["--out="]])
def test_a_variable_that_is_not_set_is_not_the_current_folder(
    out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nothing is given after '--out" in refused(command("prune", "demo:digits", "--macs", 0.5, *out))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


NO_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (lambda: nn.Conv2d, "the class Conv2d"),
    "state": (lambda: net().state_dict(), "a OrderedDict"),
    "function": (lambda: net, "a function"),
    "script": (lambda: torch.jit.trace(net(), X), "TorchScript"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 4, 3)), "run the model once"),
    "meta": (lambda: net().to("meta"), "load weights first"),
}
CALLS: dict[str, Callable[[Any, Path], object]] = {
    "trace": lambda model, _: ss_pruning.graph.trace(model, X),
    "strength": lambda model, _: ss_pruning.synaptic_strength(model, X),
    "prune_": lambda model, _: ss_pruning.prune_(model, X, macs=0.6),
    "compact_": lambda model, _: ss_pruning.compact_(model, X),
    "penalty": lambda model, _: StrengthPenalty(model, X),
    "save": lambda model, folder: ss_pruning.save(model, folder / "m.safetensors"),
    "export": lambda model, folder: ss_pruning.export(model, folder / "m.pt2", X),
}


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*torch.jit")
@pytest.mark.parametrize("kind", NO_MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model_with_weights_is_refused(kind: str, call: str, tmp_path: Path) -> None:
    make, said = NO_MODELS[kind]
    with pytest.raises(SSPruningError, match=said):
        CALLS[call](make(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_wrapped_model_is_not_saved_without_its_plan(tmp_path: Path) -> None:
    model = net()
    ss_pruning.prune_(model, X, macs=0.6)
    with pytest.raises(InputError, match=r"save model\.module"):
        ss_pruning.save(nn.DataParallel(model), tmp_path / "m.safetensors")


class Packed(nn.Linear):
    """Keeps something else than tensors in its state, as quantised layers do."""

    def get_extra_state(self) -> object:
        return torch.float16

    def set_extra_state(self, state: object) -> None: ...


def test_a_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\._extra_state"):
        ss_pruning.save(nn.Sequential(Packed(3, 4)), tmp_path / "m.safetensors")


@pytest.mark.parametrize("inputs", [X.double(), X.half()], ids=["double", "half"])
@pytest.mark.parametrize("call", [lambda m, x: ss_pruning.prune_(m, x, macs=0.6), ss_pruning.compact_])
def test_inputs_of_another_number_type_are_refused(
    inputs: Tensor, call: Callable[[Any, Any], object]
) -> None:
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        call(net(), inputs)


def test_graph_pruner_names_masks() -> None:
    tp = pytest.importorskip("torch_pruning")
    from torch.nn.utils import prune

    from ss_pruning.integrations.torch_pruning.pruner import GraphPruner

    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(InputError, match=r"prune\.remove"):
        GraphPruner(model, X, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5)


def test_what_would_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("fifo.png", "zero.png"):
        with pytest.raises(InputError, match="no regular file"):
            open_rgb(str(tmp_path / name))
        with pytest.raises(FileFormatError, match="no regular file"):
            open_report(tmp_path / name)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 16).reshape(4, 4)
    Image.fromarray(values.astype("uint16")).save(tmp_path / "deep.png")
    seen = np.asarray(open_rgb(str(tmp_path / "deep.png")))
    assert np.abs(seen - values[..., None] / 257).max() <= 0.51
    Image.fromarray(values.astype("float32")).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match="no known range"):
        open_rgb(str(tmp_path / "float.tiff"))


def test_a_file_that_changes_the_folder_costs_nothing(place: Path) -> None:
    result = command("prune", "net.py:moves", "--macs", 0.6, "--input-size", "3x8x8", "--out", "run")
    assert result.exit_code == 0, result.output
    assert (place / "run" / "model.safetensors").is_file()
    assert Path.cwd() == place


def test_nothing_is_written_over_what_is_read(place: Path) -> None:
    model = net()
    folder = place / "run"
    folder.mkdir()
    weights = folder / "model.safetensors"
    ss_pruning.save(model, weights)
    before = weights.read_bytes()
    flags = ("--input-size", "3x8x8", "--weights", weights)
    assert "read from" in refused(command("prune", "net.py:build", "--macs", 0.6, *flags, "--out", folder))
    assert "read from" in refused(
        command("score", "net.py:build", *flags, "--out", "run/../run/model.safetensors")
    )
    assert "read from" in refused(command("export", weights, "--format", "pt2", "--out", weights))
    assert weights.read_bytes() == before
    report = folder / "report.json"
    ss_pruning.prune_(model, X, macs=0.6).save_json(report)
    before = report.read_bytes()
    assert "read from" in refused(command("compare", report, report, "--html", report))
    assert report.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--mean", "0,0"), "one number per channel (3)"),
        (("--mean", "nan,0,0"), "one number per channel (3)"),
        (("--std", "1,0,1"), "positive"),
        (("--batch", 10**11), "fit into memory"),
        (("--input-size", "3x999999x999999"), "fit into memory"),
        (("--seed", 10**30), "--seed"),
        (("--out", "a" * 300), "File name too long"),
    ],
)
def test_absurd_numbers_are_refused(place: Path, flags: tuple[object, ...], said: str) -> None:
    words = ["prune", "net.py:build", "--macs", 0.6, "--input-size", "3x8x8", *flags]
    assert said in refused(command(*words))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "r18.pth",
            "Weights alone do not say what is to be computed: give them beside a name, with --weights r18.pth",
        ),
        ("run/model.safetensors", "is read by recover, finetune, export and bench"),
        ("resnet18", "Did you mean torchvision:resnet18"),
        ("photos", "or demo:digits."),
        ("torchvision:resnet18,num_classes=ten", "Arguments given: num_classes='ten'"),
    ],
)
def test_what_was_meant_for_a_model_is_said(place: Path, model: str, said: str) -> None:
    (place / "photos").mkdir()
    found = refused(command("prune", model, "--macs", 0.6))
    assert said in found
    assert "torchvision:photos" not in found


def test_weights_that_cannot_be_fetched_may_be_given(place: Path) -> None:
    (place / "fetches.py").write_text(
        "def build(pretrained):\n    raise ConnectionError('no route')\n"  # an OSError, as those of downloads are
    )
    found = refused(command("prune", "fetches.py:build,pretrained=True", "--macs", 0.6))
    assert "leave out pretrained=, and give a file with --weights" in found


def test_shares_may_be_percentages(place: Path) -> None:
    result = command("prune", "net.py:build", "--macs", "60%", "--input-size", "3x8x8", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["macs_after"] <= 0.6 * json.loads(result.stdout)["macs_before"]
    found = refused(command("prune", "net.py:build", "--macs", "half", "--input-size", "3x8x8"))
    assert "a share is a number between 0 and 1, such as 0.5, or 50%, not 'half'" in found


def test_files_in_the_place_of_folders_and_images_are_named(place: Path) -> None:
    (place / "photos").mkdir()
    (place / "photos" / "a.jpg").write_text("no image")
    words = ("prune", "net.py:build", "--macs", 0.6, "--input-size", "3x8x8", "--calibration")
    assert "'net.py' is a file" in refused(command(*words, "net.py"))
    assert "Take it out of the folder" in refused(command(*words, "photos"))


def test_a_folder_in_the_place_of_a_file_is_said_to_be_one(place: Path) -> None:
    (place / "run").mkdir()
    assert "'run' is a folder: name the file in it" in refused(command("bench", "run"))
    model = net()
    ss_pruning.prune_(model, X, macs=0.6)
    ss_pruning.save(model, place / "run" / "model.safetensors")
    for words in (["export", "run", "--format", "pt2"], ["recover", "run", "--calibration", "synthetic"]):
        assert "such as 'run/model.safetensors'" in refused(command(*words))
    assert "Did you mean 'run/model.safetensors'" in refused(command("bench", "run/mode.safetensors"))


def test_a_file_is_not_named_as_one_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    with pytest.raises(
        InputError, match=r"format='onnx', but .*small\.pt2' ends as a file of pt2 does: name it"
    ):
        ss_pruning.export(net(), path, X, "onnx")
    with pytest.raises(InputError, match=r"ends as a file of pt2 does"):
        ss_pruning.export_int8(net(), path, torch.randn(16, 3, 8, 8), "onnx")
    assert not path.exists()


def test_modules_that_are_not_there_have_neighbours(place: Path) -> None:
    words = ("prune", "torchvision:resnet18", "--macs", 0.6, "--input-size", "3x32x32", "--ignore", "layer9")
    assert "The closest names are layer4" in refused(command(*words))


def test_a_model_of_another_number_type_is_refused_on_the_command_line(place: Path) -> None:
    found = refused(command("prune", "net.py:half", "--macs", 0.6, "--input-size", "3x8x8"))
    assert "does not run on the example inputs" in found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_swallowed_interrupt_is_raised_at_the_next_step(number: signal.Signals, place: Path) -> None:
    (place / "deaf.py").write_text(
        f"{FILE}\ntry:\n    os.kill(os.getpid(), {int(number)})\n    while True: pass\nexcept BaseException: pass\n"
    )
    handler = signal.getsignal(number)
    # As it is without a mend, SIGTERM would end the tests.
    signal.signal(number, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        result = command("prune", "deaf.py:build", "--macs", 0.6, "--input-size", "3x8x8", "--out", "run")
    finally:
        signal.signal(number, handler)
    assert result.exit_code == 128 + number
    assert not (place / "run").exists()
    _console.not_interrupted()  # forgotten with the command
