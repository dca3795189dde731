"""YOLOs of Ultralytics: pruned fresh from yaml, then used with its own tools; bad input; files."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("ultralytics", reason="Ultralytics is an extra")

from ultralytics import YOLO

import ss_pruning
from ss_pruning._utils.outputs import tensors_in
from ss_pruning.errors import BudgetError, FileFormatError, InputError
from ss_pruning.integrations.ultralytics import PrunedYOLO, calibration_images, prune_yolo, recover_yolo_
from ss_pruning.integrations.ultralytics.networks import build, name_of, stock_file, thawed
from ss_pruning.integrations.ultralytics.trainers import NOTE
from ss_pruning.profiling.onnx_model import OnnxModel
from ss_pruning.profiling.openvino_model import OpenVinoModel
from ss_pruning.report.records import Report
from ss_pruning.sources.models import build_model
from ss_pruning.surgery.plan import plan_of
from tests.support.snapshot import snapshot

pytestmark = pytest.mark.filterwarnings("default")  # Ultralytics' own

SIDE = 64
SLOW = (
    *("yolov5n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"),
    *(
        "yolov8n-seg",
        "yolov8n-pose",
        "yolov8n-obb",
        "yolov8n-cls",
        "yolo11n-seg",
        "yolo11n-pose",
        "yolo11n-obb",
    ),
    *("yolo26n-seg", "yolo26n-pose"),
)
NAMES = ["yolov8n", "yolo11n-cls", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def made(name: str = "yolov8n") -> YOLO:
    """A YOLO with random weights, whose norms have seen images, so that something reaches its outputs."""
    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml")
    yolo.overrides["imgsz"] = SIDE
    norms = [module for module in yolo.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.momentum = None
    with torch.no_grad():
        yolo.model.train()(image(4))
    for norm in norms:
        norm.momentum = 0.03
    return yolo


@cache
def cut(name: str) -> tuple[YOLO, PrunedYOLO, Report]:
    """A network, pruned, and the report; for tests that do not change them."""
    dense = made(name)
    before = snapshot(dense.model)
    found = prune_yolo(dense, macs=0.6)
    assert snapshot(dense.model) == before
    return dense, *found


@pytest.fixture(autouse=True)
def _global_settings() -> Iterator[None]:
    """Ultralytics' trainers change settings of the whole process, and leave them so."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@pytest.fixture(scope="module")
def pruned() -> PrunedYOLO:
    return cut("yolov8n")[1]


def image(count: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def outputs(network: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return tensors_in(copy.deepcopy(network).eval()(image()))


def raw(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits, of boxes and classes."""
    with torch.no_grad():
        found = copy.deepcopy(network).eval()(images)[1]
    return [found] if isinstance(found, Tensor) else [found["boxes"], found["scores"]]


def photos(folder: Path, count: int = 3, size: tuple[int, int] = (80, 50)) -> Path:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


CORNERS = "0.2 0.2 0.8 0.2 0.8 0.8 0.2 0.8"
#: What follows the class in a line of labels.
LABELS = {
    "yolov8n": "0.5 0.5 0.4 0.6",
    "yolov8n-seg": CORNERS,
    "yolo11n-obb": CORNERS,
    "yolo11n-pose": "0.5 0.5 0.4 0.6" + " 0.5 0.4 2" * 17,
}


def dataset(root: Path, classes: int = 80, name: str = "yolov8n") -> Path:
    """Four images for training and validation, each with a thing in its middle."""
    for split in ("train", "val"):
        photos(root / "images" / split, 4, (SIDE, SIDE))
        (root / "labels" / split).mkdir(parents=True)
        for i in range(4):
            (root / "labels" / split / f"{i}.txt").write_text(f"{i % classes} {LABELS[name]}\n")
    names = "".join(f"  {i}: thing{i}\n" for i in range(classes))
    points = "kpt_shape: [17, 3]\n" if "pose" in name else ""
    text = f"path: {root}\ntrain: images/train\nval: images/val\n{points}names:\n{names}"
    (root / "data.yaml").write_text(text)
    return root / "data.yaml"


# ---------------------------------------------------------------- every task and family


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_network_is_pruned_and_runs_and_trains(name: str) -> None:
    dense, small, report = cut(name)
    assert report.max_error < 1e-10
    assert 0.5 < report.macs_after / report.macs_before <= 0.6
    assert type(small.model) is type(dense.model)
    assert [m.training for m in small.model.modules()] == [m.training for m in dense.model.modules()]
    shapes = {key: value.shape for key, value in outputs(small.model).items() if "feats" not in key}
    assert shapes == {key: value.shape for key, value in outputs(dense.model).items() if "feats" not in key}
    network = copy.deepcopy(small.model).train()
    loss = sum(value.square().mean() for value in tensors_in(network(image(2))).values())
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_both_kinds_of_files_give_the_same_network_back(name: str, tmp_path: Path) -> None:
    small = cut(name)[1]
    small.save(tmp_path / "small.safetensors")
    small.save(tmp_path / "small.pt")
    known = outputs(small.model)
    exact = outputs(ss_pruning.load(tmp_path / "small.safetensors"))
    assert known.keys() == exact.keys()
    assert all(torch.equal(exact[key], known[key]) for key in known)
    halved = {key: value.half().float() for key, value in small.model.state_dict().items()}
    for opened in (YOLO(tmp_path / "small.pt"), PrunedYOLO(tmp_path / "small.pt")):
        assert all(
            torch.equal(value.float(), halved[key]) for key, value in opened.model.state_dict().items()
        )


@pytest.mark.parametrize("name", NAMES)
def test_exported_it_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    small = cut(name)[1]
    small.save(tmp_path / "small.pt")
    file = small.export(format="onnx", imgsz=SIDE, simplify=False)
    assert Path(file) == tmp_path / "small.onnx"
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": image().numpy()})[0]
    with torch.no_grad():
        expected = copy.deepcopy(small.model).eval()(image())[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = expected.numpy()
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "name",
    ["yolov8n", *(pytest.param(n, marks=pytest.mark.slow) for n in ("yolo11n-seg", "yolo12n", "yolo26n"))],
)
def test_openvino_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra: pip install 'ss-pruning[openvino]'")
    small = cut(name)[1]
    small.save(tmp_path / "small.pt")
    folder = Path(small.export(format="openvino", imgsz=SIDE))
    assert folder == tmp_path / "small_openvino_model"
    found = OpenVinoModel(folder / "small.xml")(image())
    found = found[0] if isinstance(found, tuple) else found
    with torch.no_grad():
        expected = copy.deepcopy(small.model).eval()(image())[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (found - expected).norm() < 1e-3 * expected.norm()
    assert YOLO(folder, task=small.task).predict(np.zeros((SIDE, SIDE, 3), np.uint8), imgsz=SIDE)


# ---------------------------------------------------------------- what counts


def test_what_the_head_reads_is_pruned_too() -> None:
    """It returns its features, but for their shapes alone."""
    _, small, report = cut("yolov8n")
    ends = [f"model.{i}.cv2.conv" for i in (15, 18, 21)]
    widths = {layer.path: (layer.outputs_before, layer.outputs_after) for layer in report.layers}
    assert any(after < before for before, after in (widths[end] for end in ends))
    head = small.model.model[-1]
    assert (head.reg_max, head.nc, head.dfl.conv.weight.shape) == (16, 80, (1, 16, 1, 1))
    boxes = [branch[-1].out_channels for branch in head.cv2]
    classes = [branch[-1].out_channels for branch in head.cv3]
    assert (boxes, classes) == ([64] * 3, [80] * 3)


def test_calibration_images_are_letterboxed(tmp_path: Path) -> None:
    """80 x 50 in a square of 64: 64 x 40 in the middle of rows, gray above and below."""
    folder = photos(tmp_path / "photos")
    found = calibration_images(folder, SIDE)
    assert found.shape == (3, 3, SIDE, SIDE)
    gray = torch.tensor(114 / 255)
    assert torch.equal(found[:, :, :12], gray.expand(3, 3, 12, SIDE))
    assert torch.equal(found[:, :, 52:], gray.expand(3, 3, 12, SIDE))
    expected = torch.from_numpy(np.array(Image.open(folder / "0.png"))).permute(2, 0, 1).float() / 255
    assert (found[0, :, 12:52].mean((1, 2)) - expected.mean((1, 2))).abs().max() < 0.01


def test_calibration_images_of_a_data_yaml_are_those_trained_on(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    for file in (tmp_path / "images" / "val").iterdir():
        file.unlink()
    assert len(calibration_images(data, SIDE)) == 4
    assert len(calibration_images(data, SIDE, count=2)) == 2
    (tmp_path / "list.txt").write_text("./images/train/0.png\nimages/train/1.png\n")
    assert len(calibration_images(tmp_path / "list.txt", SIDE)) == 2


@pytest.mark.parametrize("name", ["yolov8n-cls", pytest.param("yolov8n", marks=pytest.mark.slow)])
def test_reconstruction_comes_nearer_on_a_folder_of_images(name: str, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 16, (SIDE, SIDE))
    dense = made(name)
    seen = calibration_images(folder, SIDE, task=dense.task)
    truth = raw(dense.model, seen)
    errors = {}
    for method in ("none", "reconstruct"):
        small, report = prune_yolo(
            dense, macs=0.7, calibration=folder, compensation=method, allocation="local"
        )
        assert report.settings["compensation"] == method
        errors[method] = sum(
            float((one - other).square().sum())
            for one, other in zip(raw(small.model, seen), truth, strict=True)
        )
    assert errors["reconstruct"] < 0.3 * errors["none"]


def test_files_of_ultralytics_are_thawed_but_for_what_decodes() -> None:
    network = made().model.requires_grad_(False)
    with thawed(network):
        frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
        assert frozen == [f"model.{len(network.model) - 1}.dfl.conv.weight"]
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.slow
def test_in_int8_scores_are_not_lost_beside_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale for both would have steps of a quarter."""
    pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'ss-pruning[onnx]'")
    monkeypatch.chdir(tmp_path)
    small, _ = prune_yolo(made(), macs=0.7, allocation="local")
    small.save(tmp_path / "small.pt")
    file = Path(YOLO(tmp_path / "small.pt").export(format="onnx", imgsz=SIDE, simplify=False))
    pictures = torch.rand(20, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    written = ss_pruning.export_int8(file, tmp_path / "small.int8.onnx", pictures)
    assert written.bytes < 0.5 * file.stat().st_size
    right, found = OnnxModel(file)(pictures), OnnxModel(written.path)(pictures)
    logits = torch.stack([scores[:, 4:].flatten().logit(1e-9) for scores in (right, found)])
    assert torch.corrcoef(logits)[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([boxes[:, :4].flatten() for boxes in (right, found)]))[0, 1] > 0.9
    assert YOLO(written.path, task="detect").predict(np.zeros((SIDE, SIDE, 3), np.uint8), imgsz=SIDE)


@pytest.mark.slow
def test_the_decoding_of_distances_stays_as_it_is() -> None:
    """Also where everything is frozen, as in a file of Ultralytics'."""
    dense = made()
    dense.model.requires_grad_(False)
    pictures = torch.rand(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    small, report = prune_yolo(
        dense, macs=0.7, calibration=pictures, compensation="reconstruct", allocation="local"
    )
    decoding: Any = small.model.model[-1].dfl.conv
    assert decoding.weight.flatten().tolist() == list(range(16))
    assert decoding.bias is None
    assert f"model.{len(small.model.model) - 1}.dfl.conv" in report.not_compensated
    flags = {name: weight.requires_grad for name, weight in dense.model.named_parameters()}
    assert not any(flags.values())
    assert not any(w.requires_grad for name, w in small.model.named_parameters() if name in flags)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_the_decoding_stays_also_without_the_adapter(frozen: bool) -> None:
    """Ultralytics' own examples thaw every parameter; its files have none thawed."""
    network = made().model.requires_grad_(not frozen)
    pictures = torch.rand(12, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    options: Any = {"compensation": "reconstruct", "allocation": "local"}
    report = ss_pruning.prune_(network, pictures[:1], macs=0.8, calibration=pictures, **options)
    decoding: Any = network.model[-1].dfl.conv
    assert decoding.weight.flatten().tolist() == list(range(16))
    assert decoding.bias is None
    assert "counts" in report.not_compensated[f"model.{len(network.model) - 1}.dfl.conv"]


def test_recovery_without_labels_comes_nearer(tmp_path: Path) -> None:
    """By the features of a network that was read from a file, where Ultralytics has its weights frozen."""
    folder = photos(tmp_path / "photos", 20, (SIDE, SIDE))
    dense = made()
    small, _ = prune_yolo(dense, macs=0.7, allocation="local")
    small.model.requires_grad_(False)
    classes = type(small.model), type(dense.model)
    before = snapshot(dense.model)
    report = recover_yolo_(small, dense, folder, steps=3, settings=ss_pruning.Recovery(batch=8, rate=1e-4))
    assert report.after.error < report.before.error
    assert snapshot(dense.model) == before
    assert (type(small.model), type(dense.model)) == classes
    assert not any(weight.requires_grad for weight in small.model.parameters())
    with pytest.raises(InputError, match="not the model that was pruned"):
        recover_yolo_(small, made("yolo11n"), folder, steps=3)


def test_it_can_be_pruned_again(pruned: PrunedYOLO, tmp_path: Path) -> None:
    again, report = prune_yolo(pruned, macs=0.8)
    assert again.model.pt_path.endswith("-pruned.pt")
    assert report.max_error < 1e-10
    again.save(tmp_path / "again.safetensors")
    loaded = outputs(PrunedYOLO(tmp_path / "again.safetensors").model)
    assert all(torch.equal(value, loaded[key]) for key, value in outputs(again.model).items())


# ---------------------------------------------------------------- Ultralytics' own tools


def test_it_trains_on_and_keeps_its_structure(pruned: PrunedYOLO, tmp_path: Path) -> None:
    data = dataset(tmp_path)
    pruned.save(tmp_path / "small.pt")
    yolo = PrunedYOLO(tmp_path / "small.pt")
    widths = {name: value.shape for name, value in yolo.model.state_dict().items()}
    before = yolo.model.model[0].conv.weight.clone()
    plan = plan_of(yolo.model)
    settings = {"data": str(data), "imgsz": SIDE, "batch": 2, "workers": 0, "plots": False, "device": "cpu"}
    yolo.train(epochs=1, project=str(tmp_path / "runs"), warmup_epochs=0, **settings)
    assert {name: value.shape for name, value in yolo.model.state_dict().items()} == widths
    assert not torch.equal(yolo.model.model[0].conv.weight, before)
    assert plan_of(yolo.model) == plan != type(plan)()
    assert yolo.names[3] == "thing3"
    assert 0 <= yolo.val(project=str(tmp_path / "runs"), **settings).box.map <= 1
    assert len(yolo.predict(image(), imgsz=SIDE, verbose=False)) == 1
    best = YOLO(yolo.overrides["model"])
    assert {name: value.shape for name, value in best.model.state_dict().items()} == widths
    again = prune_yolo(yolo, macs=0.9)[0]
    assert (again.trainer, again.metrics, yolo.trainer is None) == (None, None, False)
    yolo.save(tmp_path / "tuned.safetensors")
    assert ss_pruning.load(tmp_path / "tuned.safetensors").model[0].conv.weight.shape == before.shape


def trained(yolo: PrunedYOLO, data: Path, folder: Path) -> None:
    """One epoch, which may change any weight and no shape."""
    shapes = {name: value.shape for name, value in yolo.model.state_dict().items()}
    before = yolo.model.model[0].conv.weight.clone()
    yolo.train(
        data=str(data),
        epochs=1,
        imgsz=SIDE,
        batch=2,
        workers=0,
        plots=False,
        device="cpu",
        project=str(folder),
    )
    assert {name: value.shape for name, value in yolo.model.state_dict().items()} == shapes
    assert not torch.equal(yolo.model.model[0].conv.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n-seg", "yolo11n-obb", "yolo11n-pose"])
def test_each_task_trains_on(name: str, tmp_path: Path) -> None:
    yolo = prune_yolo(cut(name)[1], macs=0.9)[0]
    trained(yolo, dataset(tmp_path, yolo.model.yaml["nc"], name), tmp_path / "runs")


@pytest.mark.slow
def test_a_classifier_trains_on(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in "ab":
            photos(tmp_path / "data" / split / label, 2, (SIDE, SIDE))
    dense = made("yolo11n-cls")
    dense.model = build("yolo11n-cls.yaml", {"nc": 2})
    trained(prune_yolo(dense, macs=0.7)[0], tmp_path / "data", tmp_path / "runs")


def test_plain_ultralytics_does_not_train_the_dense_network_in_silence(
    pruned: PrunedYOLO, tmp_path: Path
) -> None:
    data = dataset(tmp_path)
    pruned.save(tmp_path / "small.pt")
    with pytest.raises(KeyError, match=r"this model was pruned: train it with .*PrunedYOLO"):
        YOLO(tmp_path / "small.pt").train(
            data=str(data), imgsz=SIDE, epochs=1, workers=0, project=str(tmp_path / "runs"), device="cpu"
        )


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (7, {}, r"has 80 classes, the data 7: fit the dense one to the data, then prune"),
        (80, {"pretrained": False}, r"trained on from its own weights: leave pretrained= away"),
    ],
)
def test_training_that_would_lose_the_structure_is_refused(
    pruned: PrunedYOLO, tmp_path: Path, classes: int, options: dict[str, Any], message: str
) -> None:
    data = dataset(tmp_path, classes)
    with pytest.raises(InputError, match=message):
        pruned.train(
            data=str(data), imgsz=SIDE, epochs=1, project=str(tmp_path / "runs"), device="cpu", **options
        )


@pytest.mark.slow
def test_a_fresh_process_predicts_the_same_boxes(pruned: PrunedYOLO, tmp_path: Path) -> None:
    """In one that does not have this package, from the `.pt` file."""
    folder = photos(tmp_path / "photos", 1, (SIDE, SIDE))
    pruned.save(tmp_path / "small.pt")
    code = (
        f"import sys; sys.modules['ss_pruning'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from ultralytics import YOLO\n"
        f"found = YOLO({str(tmp_path / 'small.pt')!r}).predict({str(folder / '0.png')!r}, imgsz={SIDE}, "
        "conf=1e-9, max_det=20, verbose=False)[0]\n"
        f"torch.save(found.boxes.data, {str(tmp_path / 'boxes.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    here = PrunedYOLO(tmp_path / "small.pt")
    found = here.predict(folder / "0.png", imgsz=SIDE, conf=1e-9, max_det=20, verbose=False)[0].boxes.data
    assert len(found) == 20
    assert torch.equal(torch.load(tmp_path / "boxes.pt"), found)


# ---------------------------------------------------------------- names


def test_a_network_is_named_so_that_load_builds_it() -> None:
    network = build_model("yolo:yolov8n-pose.yaml,nc=2,keypoints=5,dims=2")
    assert name_of(network) == "yolo:yolov8n-pose.yaml,nc=2,ch=3,keypoints=5,dims=2"
    assert network.model[-1].kpt_shape == (5, 2)
    network.model[0].conv = nn.Conv2d(3, 7, 3)
    assert name_of(network) is None


@pytest.mark.parametrize("name", ["../yolov8n.yaml", "/etc/yolov8n.yaml", "absent.yaml", "yolov8q.yaml"])
def test_only_files_of_ultralytics_are_stock(name: str) -> None:
    with pytest.raises(InputError, match=r"has no model .* of its own"):
        stock_file(name)


@pytest.mark.parametrize("name", ["evil.pt", "local.yaml"])
def test_a_file_cannot_name_code_or_a_place(
    pruned: PrunedYOLO, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for there in ("evil.pt", "local.yaml"):
        (tmp_path / there).write_text("nothing to open")
    ss_pruning.save(pruned.model, tmp_path / "file.safetensors", f"yolo:{name}")
    with pytest.raises((InputError, FileFormatError), match=r"no \.yaml file|no model|could not be built"):
        ss_pruning.load(tmp_path / "file.safetensors")


@pytest.mark.parametrize("kind", ["yaml", "pt"])
def test_the_command_line_prunes_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing", reason="the command line is an extra")
    from ss_pruning.cli.app import app

    monkeypatch.chdir(tmp_path)
    if kind == "pt":
        made("yolov8n-cls").save("yolov8n-cls.pt")
    words = ["prune", f"yolo:yolov8n-cls.{kind}", "--input-size", f"3x{SIDE}x{SIDE}", "--macs", "0.6"]
    done = testing.CliRunner().invoke(app, [*words, "--out", "run"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stderr.replace("│", " ").split())
    assert ("Name the trained file: yolo:best.pt" in said) == (kind == "yaml")
    yolo = PrunedYOLO("run/model.safetensors")
    assert plan_of(yolo.model).cuts
    assert len(yolo.predict(image(), imgsz=SIDE, verbose=False)) == 1


# ---------------------------------------------------------------- bad input


def test_an_error_leaves_the_yolo_as_it_was() -> None:
    yolo = made()
    before = snapshot(yolo.model)
    with pytest.raises(BudgetError):
        prune_yolo(yolo, macs=1e-6)
    with pytest.raises(KeyboardInterrupt):
        prune_yolo(yolo, macs=0.6, progress=interrupt)
    assert snapshot(yolo.model) == before


def interrupt(stage: str, done: int, total: int) -> None:
    if stage == "cut":
        raise KeyboardInterrupt


def test_a_fused_network_is_pruned_with_a_warning() -> None:
    yolo = made().fuse(verbose=False)
    with pytest.warns(UserWarning, match=r"is fused: its batch norms are gone.* prune before fuse\(\)"):
        small, report = prune_yolo(yolo, macs=0.6)
    assert report.max_error < 1e-10
    assert outputs(small.model)["output[0]"].shape == outputs(yolo.model)["output[0]"].shape


def test_files_that_are_none(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint")
    nn_module = tmp_path / "plain.pt"
    torch.save({"model": nn.Linear(2, 2)}, nn_module)
    for file, message in (
        ("other.pt", "Ultralytics cannot open"),
        ("noise.pt", "Ultralytics cannot open"),
        ("plain.pt", "Ultralytics cannot open|the YOLO holds Linear"),
        ("absent.pt", "there is no file"),
        ("absent.yaml", "Ultralytics cannot open"),
        ("model.onnx", "neither a .pt nor a .yaml file"),
    ):
        with pytest.raises(InputError, match=message):
            prune_yolo(tmp_path / file, macs=0.6)


def test_other_networks_are_refused() -> None:
    with pytest.raises(InputError, match=r"holds SemanticSegmentationModel; those of detect, segment"):
        prune_yolo("yolo26n-sem.yaml", macs=0.6)
    with pytest.raises(InputError, match=r"the model is a Linear; give a YOLO"):
        prune_yolo(nn.Linear(2, 2), macs=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imgsz": 100}, r"imgsz=100 must be a multiple of 32"),
        ({"imgsz": 0}, r"imgsz=0 must be a multiple of 32"),
        ({"calibration": "absent.txt"}, r"'absent.txt' is no list of images"),
        ({"calibration": "absent"}, r"there is no folder 'absent'"),
        ({"calibration": "absent.yaml"}, r"'absent.yaml' describes no data that is here"),
        ({"compensation": "reconstruct"}, r"needs calibration="),
        ({"macs": None}, r"give exactly one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune_yolo(made(), **{"macs": 0.6, **options})


def test_a_list_of_something_else_and_numbers_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xc0")
    with pytest.raises(InputError, match=r"binary.txt' is no list of images"):
        calibration_images(tmp_path / "binary.txt", SIDE)
    folder = photos(tmp_path / "photos")
    for wrong in ({"count": 0}, {"count": "3"}, {"imgsz": -SIDE}):
        options: dict[str, Any] = {"imgsz": SIDE, **wrong}
        with pytest.raises(InputError, match="must be positive whole numbers"):
            calibration_images(folder, **options)


def test_a_yolo_is_not_recovered_by_itself(pruned: PrunedYOLO) -> None:
    kind = type(pruned.model)
    with pytest.raises(InputError, match="dense is the pruned YOLO itself"):
        recover_yolo_(pruned, pruned, torch.rand(4, 3, SIDE, SIDE))
    assert type(pruned.model) is kind


def test_safetensors_need_a_yaml_of_ultralytics(pruned: PrunedYOLO, tmp_path: Path) -> None:
    other = PrunedYOLO.around(prune_yolo(made(), macs=0.7)[0].model, made())
    other.model.yaml["yaml_file"] = "mine.yaml"
    with pytest.raises(InputError, match=r"no yaml file of Ultralytics' builds the dense network"):
        other.save(tmp_path / "mine.safetensors")
    assert not (tmp_path / "mine.safetensors").exists()
    ss_pruning.save(nn.Linear(2, 2), tmp_path / "linear.safetensors")
    with pytest.raises(InputError, match=r"holds no network of Ultralytics'"):
        PrunedYOLO(tmp_path / "linear.safetensors")
    assert pruned.model.yaml["backbone"][0][2] == NOTE
