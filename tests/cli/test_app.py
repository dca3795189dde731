"""The command line: what it writes, prints, refuses, and leaves behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from rich.console import Console
from typer.testing import CliRunner

import ss_pruning
from ss_pruning import synaptic_strength
from ss_pruning.cli import console as _console
from ss_pruning.cli import jobs as _job
from ss_pruning.cli.app import app
from ss_pruning.cli.options import _seconds
from ss_pruning.compensation import apply as cutting
from ss_pruning.config import Reconstruct, Synaptic
from ss_pruning.errors import InputError
from ss_pruning.report.records import Report
from ss_pruning.sources.models import build_model

SMALL = """
from torch import nn

def build(width=16):
    print("hello from the factory")
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4),
    )
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(SMALL)
    return f"{path}:build"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label in range(4):
        folder = tmp_path / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        pixels = np.full((20, 24, 3), 60 * label, np.uint8)
        Image.fromarray(pixels).save(folder / "0.png")
    return tmp_path / "photos"


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    """Run a command that must fail with one red panel; return its words."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("─ Error ─") == 1
    return " ".join(result.stderr.replace("│", " ").split())


SIZE = ("--input-size", "3x16x16")


# ---------------------------------------------------------------- prune


def test_prune_writes_a_model_and_two_reports_that_agree(net: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "net"
    result = run("prune", net, "--macs", 0.5, *SIZE, "--data", photos, "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(out)) == ["model.safetensors", "report.html", "report.json"]
    report = Report.load_json(out / "report.json")
    assert report.macs_after <= 0.5 * report.macs_before
    assert report.images == 2  # of four: there is no train/, so two are held out
    assert report.accuracy_before is not None
    assert report.accuracy_after is not None
    assert 0 <= report.max_error < 1e-6
    assert report.params_after == sum(
        value.numel()
        for key, value in load_file(out / "model.safetensors").items()
        if "running" not in key and "num_batches" not in key
    )
    assert report.settings["macs"] == 0.5
    assert report.settings["input size"] == "3x16x16"
    assert report.settings["score"] == "relevance"
    assert net in (out / "report.html").read_text().replace("<wbr>", "")
    for words in ("top-1 (2 images)", "multiply-accumulates", "Cut equals masked", "excluded:", "written:"):
        assert words in result.stdout


def test_recorded_command_makes_the_same_model_again(net: str, tmp_path: Path) -> None:
    out = tmp_path / "it's here"
    run(
        "prune",
        net,
        *SIZE,
        "--ratio",
        0.25,
        "--ignore",
        3,
        "--scope",
        "local",
        "--out",
        out,
        "--weights-by-order",
    )
    command = Report.load_json(out / "report.json").command
    assert command is not None
    words = shlex.split(command)
    assert words[:3] == ["ss-prune", "prune", net]
    assert "--weights-by-order" in words
    assert "--seed" not in words
    before = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    assert run(*words[1:]).exit_code == 0
    assert (out / "model.safetensors").read_bytes() == before


def test_saved_demo_reloads_by_name(tmp_path: Path) -> None:
    assert run("prune", "demo:digits", "--macs", 0.7, "--out", tmp_path).exit_code == 0
    model = ss_pruning.load(tmp_path / "model.safetensors")
    report = Report.load_json(tmp_path / "report.json")
    assert sum(parameter.numel() for parameter in model.parameters()) == report.params_after


def test_files_of_the_user_are_not_named_in_the_model(net: str, tmp_path: Path) -> None:
    run("prune", net, *SIZE, "--macs", 0.5, "--out", tmp_path / "out")
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        assert "net.py" not in json.dumps(file.metadata())


def test_json_is_the_only_thing_on_stdout(net: str) -> None:
    result = run("prune", net, *SIZE, "--params", 0.6, "--json")
    assert result.exit_code == 0
    report = Report.from_dict(json.loads(result.stdout))
    assert report.params_after <= 0.6 * report.params_before
    assert "hello from the factory" in result.stderr
    assert not report.random_weights
    assert "Weights of the function" in result.stderr


def test_random_weights_are_said_to_be_random() -> None:
    result = run("prune", "torchvision:resnet18", "--macs", 0.9, "--input-size", "3x32x32", "--json")
    assert Report.from_dict(json.loads(result.stdout)).random_weights
    assert "Give the trained ones: --weights FILE" in " ".join(result.stderr.replace("│", " ").split())


def test_digits_lose_little_at_half_the_work() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    result = run("prune", "demo:digits", "--macs", 0.5, "--data", "digits", "--json")
    report = Report.from_dict(json.loads(result.stdout))
    assert report.images == 500
    assert report.accuracy_before is not None
    assert report.accuracy_before > 0.97
    assert report.accuracy_after is not None
    assert report.accuracy_after > 0.9


def test_images_limits_what_accuracy_is_measured_on() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    result = run("prune", "demo:digits", "--macs", 0.9, "--data", "digits", "--images", 30, "--json")
    assert json.loads(result.stdout)["images"] == 30


@pytest.mark.parametrize("importance", ["magnitude", "magnitude-l1", "bn-scale", "lamp", "fpgm", "random"])
def test_other_criteria_prune_too(net: str, importance: str) -> None:
    result = run("prune", net, *SIZE, "--macs", 0.6, "--importance", importance, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["settings"]["importance"] == importance
    assert values["macs_after"] <= 0.6 * values["macs_before"]


@pytest.mark.parametrize(
    "options",
    [
        ("--statistics", "gaussian"),
        ("--statistics", "data", "--data"),
        ("--score", "entropy"),
        ("--round-to", 8),
        ("--max-ratio", 0.5),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_options_reach_the_core(net: str, photos: Path, options: tuple[Any, ...]) -> None:
    given = (*options, photos) if options[-1] == "--data" else options
    result = run("prune", net, *SIZE, "--macs", 0.7, *given, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    name = options[0].removeprefix("--").replace("-", "_")
    assert values["settings"][name] == options[1]
    if name == "round_to":
        assert all(entry["outputs_after"] % 8 == 0 for entry in values["layers"][:-1])
    if name == "max_ratio":
        assert all(2 * entry["outputs_after"] >= entry["outputs_before"] for entry in values["layers"])


def test_data_statistics_read_the_calibration_images(
    net: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = _job.run
    monkeypatch.setattr(_job, "run", lambda *args: seen.append(args[1]["calibration"]) or real(*args))
    result = run("prune", net, *SIZE, "--macs", 0.7, "--statistics", "data", "--data", photos, "--json")
    assert result.exit_code == 0
    assert [tuple(batch.shape) for batch in seen[0]] == [(2, 3, 16, 16)]
    assert json.loads(result.stdout)["settings"]["statistics"] == "data"


@pytest.mark.parametrize("source", ["data", "synthetic"])
def test_compensation_calibrates_on_what_was_asked_for(
    net: str, photos: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    given = ("--compensation", "reconstruct", "--calibration", source, "--data", photos)
    result = run("prune", net, *SIZE, "--macs", 0.7, *given, "--json")
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert (settings["compensation"], settings["calibration"]) == ("reconstruct", source)
    assert settings["conditional"] == Synaptic().resolve(settings["scope"], Reconstruct(), 8).conditional > 0
    kept = list((tmp_path / "cache").glob("*"))
    assert len(kept) == (source == "synthetic")


@pytest.mark.parametrize("scope", [(), ("--scope", "sensitivity")])
def test_output_error_is_measured_on_images_without_compensation_too(
    scope: tuple[str, ...], net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    result = run("prune", net, *SIZE, "--macs", 0.7, *scope, "--calibration", "synthetic", "--json")
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert (settings["scope"], settings["compensation"], settings["score"]) == (
        "sensitivity",
        "none",
        "relevance",
    )


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """Photos without classes, some in folders of their own."""
    chance = np.random.default_rng(0)
    for index in range(9):
        folder = tmp_path / "flat" / ("below" if index > 5 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "flat"


@pytest.mark.parametrize(
    ("options", "used"), [((), 9), (("--calibration-images", 4), 4), (("--statistics", "data"), 9)]
)
def test_photos_without_labels_are_calibrated_on(
    net: str, unlabelled: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...], used: int
) -> None:
    seen: list[int] = []
    real = _job.run
    monkeypatch.setattr(
        _job, "run", lambda *args: seen.append(sum(map(len, args[1]["calibration"]))) or real(*args)
    )
    given = ("--compensation", "linear", "--calibration", unlabelled, *options)
    result = run("prune", net, *SIZE, "--macs", 0.7, *given, "--json")
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert seen == [used]
    assert settings["calibration"] == str(unlabelled)
    assert settings["calibration images"] == f"{used} of 9 images below {unlabelled}"
    assert settings["statistics"] == "data"


def test_images_that_are_evaluated_on_are_never_calibrated_on(
    net: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held out of a folder without train/, and left out of a folder of photos that holds them, too; both are said."""
    jobs: list[Any] = []
    real = _job.run
    monkeypatch.setattr(_job, "run", lambda *args: jobs.append(args) or real(*args))
    result = run("prune", net, *SIZE, "--macs", 0.7, "--data", photos, "--json")
    said = f"2 images of {photos}, held out: it has no split into train/ and val/, and accuracy is measured on the"
    assert json.loads(result.stdout)["settings"]["calibration images"].startswith(said)
    assert said in " ".join(result.stderr.split())
    evaluated = torch.cat([images for images, _ in jobs[0][0].data.evaluation])
    assert not {x.numpy().tobytes() for x in evaluated} & {
        x.numpy().tobytes() for x in torch.cat(jobs[0][1]["calibration"])
    }

    options = ("--data", photos, "--calibration", photos, "--images", 1)
    result = run("prune", net, *SIZE, "--macs", 0.7, *options, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["images"] == 1
    said = f"3 of 3 images below {photos}; 1 more are evaluated on, and not calibrated on"
    assert values["settings"]["calibration images"] == said
    assert "all images below" in refused("prune", net, *SIZE, "--macs", 0.7, *options[:4]).replace("  ", " ")


def test_made_images_are_as_many_as_asked_for(
    net: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then none of the labelled ones are held out."""
    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []
    real = _job.run
    monkeypatch.setattr(_job, "run", lambda *args: seen.append(len(args[1]["calibration"])) or real(*args))
    options = ("--calibration", "synthetic", "--calibration-images", 10, "--data", photos)
    result = run("prune", net, *SIZE, "--macs", 0.7, *options, "--json")
    assert result.exit_code == 0, result.output
    assert seen == [10]
    assert json.loads(result.stdout)["images"] == 4


OTHER_DIMENSIONS = """
from torch import nn

def build(d=1):
    conv, norm = getattr(nn, f"Conv{d}d"), getattr(nn, f"BatchNorm{d}d")
    return nn.Sequential(
        conv(2, 16, 3, padding=1), norm(16), nn.ReLU(), conv(16, 16, 3, padding=1), norm(16), nn.ReLU(),
        getattr(nn, f"AdaptiveAvgPool{d}d")(1), nn.Flatten(), nn.Linear(16, 4),
    )
"""


@pytest.mark.parametrize(("dimensions", "size"), [(1, "2x24"), (3, "2x4x6x5")])
def test_nets_of_other_dimensions(tmp_path: Path, dimensions: int, size: str) -> None:
    (tmp_path / "net.py").write_text(OTHER_DIMENSIONS)
    spec, out = f"{tmp_path / 'net.py'}:build,d={dimensions}", tmp_path / "out"
    result = run("prune", spec, "--macs", 0.5, "--input-size", size, "--out", out)
    assert result.exit_code == 0, result.output
    report = Report.load_json(out / "report.json")
    assert report.macs_after <= 0.5 * report.macs_before
    assert report.settings["input size"] == size
    options = ("--model", spec, "--input-size", size)
    assert run("bench", out / "model.safetensors", *options, "--device", "cpu").exit_code == 0
    assert run("export", out / "model.safetensors", *options, "--out", out / "net.pt2").exit_code == 0
    assert run("score", spec, "--input-size", size).exit_code == 0
    message = refused("bench", out / "model.safetensors", *options, "--layout", "channels_last")
    assert "channels_last is a layout of images" in message
    for command in (("prune", spec, "--macs", 0.5), ("score", spec)):
        assert "say so: --input-size 3x224x224 (channels x height x width)" in refused(*command)


def test_norms_are_re_estimated_on_the_images(
    net: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = cutting.recalibrate_
    monkeypatch.setattr(
        cutting, "recalibrate_", lambda *args: seen.append(tuple(args[3].inputs.shape)) or real(*args)
    )
    command = ("prune", net, *SIZE, "--macs", 0.7, "--data", photos)
    result = run(*command, "--recalibrate", "--statistics", "data", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["recalibrate"] is True
    assert seen == [(2, 3, 16, 16)]
    told = " ".join(run(*command).output.split())  # of so few, where noise will do
    assert "2 calibration inputs were given and not used" in told


def test_ignored_modules_stay_whole(net: str) -> None:
    values = json.loads(run("prune", net, *SIZE, "--macs", 0.6, "--ignore", "0", "--json").stdout)
    widths = {entry["path"]: (entry["outputs_before"], entry["outputs_after"]) for entry in values["layers"]}
    assert widths["0"] == (16, 16)
    assert widths["3"][1] < 16


def test_same_seed_same_result(net: str) -> None:
    def widths(seed: int) -> Any:
        result = run("prune", net, *SIZE, "--macs", 0.5, "--importance", "random", "--seed", seed, "--json")
        return [entry["strength"] for entry in json.loads(result.stdout)["layers"]]

    assert widths(1) == widths(1)
    assert widths(1) != widths(2)


def test_too_few_classes_are_remarked_on(photos: Path, net: str) -> None:
    result = run("prune", f"{net},width=8", *SIZE, "--macs", 0.8, "--data", photos)
    assert "accuracy only means" not in result.stderr
    for index in (2, 3):
        (photos / f"class{index}" / "0.png").unlink()
        (photos / f"class{index}").rmdir()
    result = run("prune", f"{net},width=8", *SIZE, "--macs", 0.8, "--data", photos)
    assert "The model has 4 outputs, the data 2 classes" in " ".join(result.stderr.split())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give exactly one of --macs, --params, --latency and --ratio; none was given"),
        (("--macs", 0.5, "--ratio", 0.5), "--macs and --ratio were given"),
        (("--macs", 7), "7"),
        (
            ("--macs", 0.5, "--importance", "random", "--score", "share"),
            "--score belongs to --importance synaptic",
        ),
        (
            ("--macs", 0.5, "--importance", "lamp", "--statistics", "batchnorm"),
            "--statistics belongs to --importance",
        ),
        (("--macs", 0.5, "--statistics", "data"), "say where they are with --data"),
        (
            ("--macs", 0.5, "--input-size", "224"),
            "channels x height x width, as in 3x224x224 (or channels x length",
        ),
        (("--macs", 0.5, "--mean", "a,b"), "one number per channel"),
        (("--macs", 0.5, "--device", "abacus"), "Use --device cpu"),
        (("--macs", 0.5, "--data", "absent"), "no data at 'absent'"),
        (("--macs", 0.5, "--weights", "absent.pth"), "no weights file at 'absent.pth'"),
        (("--macs", 0.5, "--ignore", "nowhere"), "nowhere"),
        (
            ("--macs", 0.5, "--compensation", "linear"),
            "or --calibration DIR, or make some with --calibration synth",
        ),
        (
            ("--macs", 0.5, "--calibration", "absent"),
            "--calibration is data, synthetic, or a folder of images; there is no folder 'absent'",
        ),
        (("--macs", 0.5, "--input-size", "3x0x4"), "as in 3x224x224 (or channels x length, as in 1x64"),
        (
            ("--macs", 0.5, "--compensation", "mean", "--calibration", "data"),
            "say where they are with --data",
        ),
        (("--macs", 0.000001), "smallest"),
        (("--macs", 0.5, "--input-size", "5x16x16"), "does not run"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_bad_options_say_what_to_do(net: str, options: tuple[Any, ...], message: str) -> None:
    size = () if "--input-size" in options else SIZE
    assert message in refused("prune", net, *size, *options).replace("hello from the factory ", "")


def test_unknown_model_and_its_closest_names() -> None:
    assert "The closest names are resnet18" in refused("prune", "torchvision:resnet1", "--macs", 0.5)


def test_unknown_option_value_names_the_choices(net: str) -> None:
    result = run("prune", net, "--macs", 0.5, "--importance", "best")
    assert result.exit_code == 2
    assert "bn-scale" in result.stderr


def test_a_model_file_may_register_an_importance(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from ss_pruning import register_importance\n\n\n"
        "@register_importance('last')\n"
        "class Last:\n"
        "    def scorer(self, model, connectivity, inputs):\n"
        "        return lambda subgroup: torch.from_numpy(subgroup.root.index[:, 0]).float()\n\n\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))\n"
    )
    spec = f"{tmp_path / 'net.py'}:build"
    result = run("prune", spec, *SIZE, "--ratio", 0.5, "--importance", "last", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["settings"]["importance"] == "last"
    assert values["layers"][0]["outputs_after"] == 4


def test_nan_weights_are_refused(net: str, tmp_path: Path) -> None:
    model = build_model(net)
    nn.init.constant_(model.get_parameter("3.weight"), float("nan"))
    torch.save(model.state_dict(), tmp_path / "nan.pth")
    assert "NaN or Inf" in refused("prune", net, *SIZE, "--macs", 0.5, "--weights", tmp_path / "nan.pth")


def test_unwritable_folder_is_found_before_the_work(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_job, "prepare", lambda *_: pytest.fail("worked before looking"))
    (tmp_path / "file").touch()
    for command in ("prune", "score"):
        budget = ("--macs", 0.5) if command == "prune" else ()
        message = refused(command, net, *budget, "--out", tmp_path / "file" / "x.json")
        assert "is a file, not a folder; choose another place" in message


def test_failure_leaves_no_new_folder_and_no_old_file_changed(net: str, tmp_path: Path) -> None:
    refused("prune", net, *SIZE, "--macs", 0.5, "--data", "absent", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text("old")
    refused("prune", net, *SIZE, "--macs", 0.5, "--data", "absent", "--out", old)
    assert os.listdir(old) == ["report.json"]
    assert (old / "report.json").read_text() == "old"


@pytest.mark.parametrize("stage", ["prepare", "run", "write"])
def test_ctrl_c_leaves_nothing_half_written(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_job, stage, interrupt)
    result = run("prune", net, *SIZE, "--macs", 0.5, "--out", tmp_path / "new")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_ctrl_c_while_writing_leaves_all_files_as_they_were(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in _job.WRITTEN:
        (out / name).write_text("old")
    real = Path.write_bytes

    def interrupt(self: Path, content: bytes) -> int:
        if "report.html" in self.name:
            raise KeyboardInterrupt
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    assert run("prune", net, *SIZE, "--macs", 0.5, "--out", out).exit_code == 130
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(_job.WRITTEN, "old")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_disk_that_fills_up_does_not_cost_the_result(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    options = ["--json"] * as_json
    result = run("prune", net, *SIZE, "--macs", 0.5, "--out", tmp_path / "new", *options)
    assert result.exit_code == 2
    assert "the disk is full; free some space" in " ".join(result.stderr.replace("│", " ").split())
    assert "written:" not in result.stdout
    if as_json:
        assert Report.from_dict(json.loads(result.stdout)).macs_after > 0
    else:
        assert "Cut equals masked" in result.stdout
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_costs_no_summary_and_no_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("prune", "demo:digits", "--macs", 0.7, "--out", tmp_path / "a").exit_code == 0

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for command, shown in (
        (("score", "demo:digits", "--out", tmp_path / "s.json"), "Weakest synapses"),
        (
            ("compare", tmp_path / "a", tmp_path / "a", "--html", tmp_path / "c.html"),
            "layers differ in width",
        ),
    ):
        result = run(*command)
        assert result.exit_code == 2
        assert shown in result.stdout
        assert "written" not in result.stdout
        assert "the disk is full" in " ".join(result.stderr.replace("│", " ").split())
    assert os.listdir(tmp_path) == ["a"]


def test_a_closed_pipe_does_not_cost_the_files(net: str, tmp_path: Path) -> None:
    """`ss-prune prune ... | true`: nobody reads the table."""
    read, write = os.pipe()
    os.close(read)
    words = ["prune", net, *SIZE, "--macs", "0.5", "--out", str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, "-m", "ss_pruning.cli", *words],
        stdout=write,
        stderr=subprocess.DEVNULL,
        timeout=240,
        check=False,
    )
    os.close(write)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(_job.WRITTEN)


@pytest.mark.parametrize("name", ["model.safetensors", "report.html"])
def test_what_is_no_regular_file_is_found_before_the_work(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(_job, "prepare", lambda *_: pytest.fail("worked before looking"))
    os.mkfifo(tmp_path / name)
    assert "it is a FIFO, not a regular file" in refused("prune", net, "--macs", 0.5, "--out", tmp_path)
    assert os.listdir(tmp_path) == ["net.py", name] or sorted(os.listdir(tmp_path)) == sorted(
        ["net.py", name]
    )


def test_an_old_report_does_not_stand_beside_a_new_model(tmp_path: Path) -> None:
    for name, macs in (("a", 0.7), ("b", 0.6)):
        assert run("prune", "demo:digits", "--macs", macs, "--out", tmp_path / name).exit_code == 0
    first, second = tmp_path / "a", tmp_path / "b"
    report = Report.load_json(first / "report.json")
    with safe_open(str(first / "model.safetensors"), framework="pt") as file:
        assert json.loads(file.metadata()["ss_pruning"])["sha256"] == report.model_sha256
    assert report.model_sha256 in (first / "report.html").read_text().replace("<wbr>", "")
    assert run("compare", first, second).exit_code == 0
    (second / "model.safetensors").replace(first / "model.safetensors")
    assert run("compare", second, second).exit_code == 0  # a report alone may be compared
    for place in (first, first / "report.json"):
        message = refused("compare", place, second)
        assert "tells of another model than" in message
        assert "Prune again, or move the report away" in message


def test_bugs_keep_their_traceback(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(_job, "run", stumble)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("prune", net, *SIZE, "--macs", 0.5)


# ---------------------------------------------------------------- score


def test_score_lists_layers_in_the_order_in_which_they_run(net: str) -> None:
    result = run("score", net, *SIZE)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    layers = [row[0] for row in rows if len(row) >= 7 and row[0].isdigit()]
    assert layers == ["0", "3", "8"]
    assert "Weakest synapses" in result.stdout


def test_score_figures_are_those_of_the_strengths() -> None:
    result = run("score", "demo:digits", "--json", "--weakest", 3)
    values = json.loads(result.stdout)
    model = build_model("demo:digits")
    strengths = synaptic_strength(model, torch.zeros(1, 1, 8, 8))
    assert [entry["path"] for entry in values["layers"]] == list(strengths)
    for entry in values["layers"]:
        found = strengths[entry["path"]].double()
        assert (entry["outputs"], entry["inputs"]) == tuple(found.shape)
        ranks = found.flatten().sort().values
        assert entry["median"] == pytest.approx(float(ranks[(len(ranks) - 1) // 2]))
        assert entry["weakest"] == pytest.approx(float(ranks[0]))
        assert entry["strongest"] == pytest.approx(float(ranks[-1]))
        power = found.square()
        effective = power.sum(1).square() / power.square().sum(1)
        assert entry["effective_inputs"] == pytest.approx(float(effective.median()), rel=1e-4)
        assert entry["unscaled"] == int(strengths.unscaled[entry["path"]].sum())
    weakest = min(float(shares.min()) for shares in strengths.shares().values())
    shares = [entry["share"] for entry in values["weakest"]]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(weakest)
    assert len(shares) == 3
    for entry in values["weakest"]:
        place = strengths[entry["path"]][entry["output"], entry["input"]]
        assert entry["strength"] == pytest.approx(float(place))


def test_score_writes_every_strength(tmp_path: Path) -> None:
    out = tmp_path / "scores.safetensors"
    assert run("score", "demo:digits", "--out", out).exit_code == 0
    written = load_file(out)
    strengths = synaptic_strength(build_model("demo:digits"), torch.zeros(1, 1, 8, 8))
    for path, strength in strengths.items():
        assert torch.equal(written[f"strength/{path}"], strength)
        assert torch.equal(written[f"unscaled/{path}"], strengths.unscaled[path])
    assert os.listdir(tmp_path) == ["scores.safetensors"]


def test_score_writes_its_summary(tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    result = run("score", "demo:digits", "--out", out, "--json")
    assert json.loads(out.read_text()) == json.loads(result.stdout)


def test_score_refuses_other_files(net: str, tmp_path: Path) -> None:
    assert "ends in .safetensors or .json" in refused("score", net, "--out", tmp_path / "scores.csv")
    assert "does not exist; create it first" in refused("score", net, "--out", tmp_path / "absent" / "a.json")
    assert "say where they are with --data" in refused("score", net, "--statistics", "data")


def test_outputs_without_any_input_have_no_effective_inputs(tmp_path: Path) -> None:
    path = tmp_path / "dead.py"
    path.write_text(
        "from torch import nn\n"
        "def build():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))\n"
        "    nn.init.zeros_(net[1].weight)\n"
        "    return net\n"
    )
    values = json.loads(run("score", f"{path}:build", *SIZE, "--json").stdout)
    assert values["layers"][1]["effective_inputs"] == 0.0
    assert values["layers"][1]["strongest"] == 0.0


# ---------------------------------------------------------------- progress


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    monkeypatch.setattr(_console, "Console", lambda stderr: console)
    with _console.progress_bars() as progress:
        for done in range(3):
            progress(f"pruning: stage[{done}]", 60_000 * done, 120_000)
        progress("accuracy", 1, 8)
    return file.getvalue()


def test_progress_is_one_bar_a_job_labelled_with_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    assert "pruning: stage[2]" in text
    assert "100%" in text
    assert "12%" in text
    assert "left" in text
    assert "pruning: stage[0]" not in text.rpartition("accuracy")[0].rpartition("pruning: stage[2]")[2]


def test_progress_is_silent_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False).strip() == ""


# ---------------------------------------------------------------- the program


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ss_pruning.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=240,
        check=False,
    )


def test_program_is_quiet_when_piped(tmp_path: Path) -> None:
    done = program("prune", "demo:digits", "--macs", "0.6", "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert Report.from_dict(json.loads(done.stdout)) == Report.load_json(tmp_path / "report.json")


def test_program_fails_with_a_panel_and_code_2() -> None:
    done = program("prune", "torchvision:resnet1", "--macs", "0.6")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "The closest names are" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["export", "bench", "recover"])
def test_help_of_the_later_commands_teaches(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    assert f"ss-prune {command} runs/digits/model.safetensors" in text
    assert "A .py file is executed" in text
    assert ("Images to train on" in text) == (command == "recover")


@pytest.mark.parametrize("command", ["prune", "score"])
def test_help_teaches(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    assert "Examples" in text
    assert f"ss-prune {command} demo:digits" in text
    assert "executes that file" in text
    assert "no code is run from it" in text


def test_help_names_every_choice_and_every_example_parses() -> None:
    text = CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "200"}).stdout
    for name in (
        "synaptic",
        "magnitude-l1",
        "bn-scale",
        "lamp",
        "fpgm",
        "random",
        "gaussian",
        "entropy",
        "local",
    ):
        assert name in text
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("ss-prune ")]
    assert len(examples) == 7
    known = {option for line in text.splitlines() for option in line.split() if option.startswith("--")}
    assert {word for example in examples for word in example.split() if word.startswith("--")} <= known


# ---------------------------------------------------------------- export and bench


@pytest.fixture
def saved(net: str, tmp_path: Path) -> Path:
    """A file that does not name its architecture."""
    assert run("prune", net, *SIZE, "--macs", 0.5, "--out", tmp_path / "saved").exit_code == 0
    return tmp_path / "saved" / "model.safetensors"


def test_export_writes_a_file_that_was_tried(saved: Path, net: str, tmp_path: Path) -> None:
    result = run("export", saved, "--model", net, "--out", tmp_path / "net.pt2")
    assert result.exit_code == 0, result.output
    assert "Input size: 3x16x16, as the report beside the file says" in " ".join(result.output.split())
    assert "its outputs differ from the model's by at most" in result.stdout
    images = torch.randn(3, 3, 16, 16)
    right = ss_pruning.load(saved, lambda: build_model(net))(images)
    torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(images), right)


def test_export_takes_named_architectures_and_writes_beside_the_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'ss-pruning[onnx]'")
    pytest.importorskip("onnxscript", reason="needs the extra: pip install 'ss-pruning[onnx]'")
    assert run("prune", "demo:digits", "--macs", 0.7, "--out", tmp_path).exit_code == 0
    result = run("export", tmp_path / "model.safetensors", "--format", "onnx")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model.onnx").is_file()


def test_bench_compares_dense_with_pruned(saved: Path, net: str) -> None:
    options = ("--batch", "1,2", "--dtype", "float32,bf16", "--device", "cpu")
    shown = run("bench", saved, "--model", net, *SIZE, *options)
    assert shown.exit_code == 0, shown.output
    for words in ("batch 2, bf16", "median", "middle half", "peak memory", "images", "file"):
        assert words in " ".join(shown.stdout.split())
    found = json.loads(run("bench", saved, "--model", net, *SIZE, *options, "--json").stdout)
    assert len(found["comparisons"]) == 4
    assert found["file_bytes"]["pruned"] < found["file_bytes"]["dense"]
    assert found["machine"]["device"] == "cpu"


@pytest.fixture
def pruned_digits(tmp_path: Path) -> Path:
    """As ours and as ONNX, in one folder."""
    for name in ("onnxruntime", "onnxscript", "sklearn"):
        pytest.importorskip(name, reason="needs the extras onnx and demo")
    assert run("prune", "demo:digits", "--macs", 0.5, "--out", tmp_path).exit_code == 0
    assert run("export", tmp_path / "model.safetensors", "--format", "onnx").exit_code == 0
    return tmp_path


@pytest.mark.slow
def test_dense_and_pruned_in_float_and_int8_in_one_table(pruned_digits: Path) -> None:
    int8 = "--int8", "--calibration", "synthetic", "--calibration-images", 100
    for options in (
        (pruned_digits / "model.safetensors", *int8),
        ("demo:digits", "--out", pruned_digits / "dense.onnx"),
        ("demo:digits", *int8, "--out", pruned_digits / "dense.int8.onnx"),
    ):
        result = run("export", *options)
        assert result.exit_code == 0, result.output
    assert "INT8, ranges from 80 images; on 20 others the output error is" in " ".join(result.stdout.split())
    names = ["dense.onnx", "model.onnx", "dense.int8.onnx", "model.int8.onnx"]
    files = [pruned_digits / name for name in names]
    shown = run("bench", *files, "--model", "demo:digits", "--data", "digits")
    assert shown.exit_code == 0, shown.output
    for words in ("dense.onnx against", "of first", "same class", "accuracy", "file"):
        assert words in " ".join(shown.stdout.split())
    found = json.loads(run("bench", *files, "--model", "demo:digits", "--data", "digits", "--json").stdout)
    assert found["file_bytes"] == {file.name: file.stat().st_size for file in files}
    assert list(found["comparisons"][0]["ratios"]) == names
    outputs = found["outputs"]
    assert outputs["accuracy"]["dense.int8.onnx"] > 0.9
    assert list(outputs["fidelity"]) == names[1:]
    assert 0 < max(found["error"] for found in outputs["fidelity"].values()) < 0.01
    assert (outputs["reference"], outputs["on"]) == ("dense.onnx", "images of digits")


def test_bench_compares_files_with_the_model_that_has_weights(pruned_digits: Path) -> None:
    """Without weights the dense model's outputs mean nothing."""
    file, exported = pruned_digits / "model.safetensors", pruned_digits / "model.onnx"
    shown = run("bench", file, exported, "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert (found["outputs"]["reference"], found["outputs"]["on"]) == ("pruned", "64 inputs of noise")
    assert found["outputs"]["fidelity"]["model.onnx"]["error"] < 1e-8
    assert list(found["comparisons"][0]["speeds"]) == ["dense", "pruned", "model.onnx"]
    assert found["comparisons"][0]["speeds"]["model.onnx"]["peak_bytes"] is None
    found = json.loads(run("bench", file, "--data", "digits", "--images", 50, "--json").stdout)
    assert found["outputs"]["accuracy"]["pruned"] > 0.9
    assert found["outputs"]["fidelity"] == {}
    message = refused("bench", file, exported, "--dtype", "bf16")
    assert "exported files run as they are, on the CPU, not with batch 1, bf16" in message
    assert "one at a time is measured, not 2" in refused("bench", file, file)
    assert "name the model as for ss-prune prune" in refused("bench", exported, "--data", "digits")


def test_bench_runs_openvinos_files_beside_others(pruned_digits: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra: pip install 'ss-pruning[openvino]'")
    assert run("export", pruned_digits / "model.safetensors", "--format", "openvino").exit_code == 0
    files = [pruned_digits / "model.onnx", pruned_digits / "model.xml"]
    found = json.loads(run("bench", *files, "--json").stdout)
    assert found["file_bytes"]["model.xml"] > (pruned_digits / "model.bin").stat().st_size
    assert list(found["comparisons"][0]["ratios"]) == ["model.onnx", "model.xml"]
    assert found["outputs"]["fidelity"]["model.xml"]["error"] < 1e-8


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("export", "FILE", "--int8"), "say where they are with --calibration DIR, or make some"),
        (("export", "FILE", "--int8", "--calibration", "absent"), "there is no folder 'absent'"),
        (
            ("export", "FILE", "--int8", "--calibration", "synthetic", "--format", "openvino"),
            "say one of these",
        ),
        (("export", "FILE", "--format", "onnx", "--calibration", "synthetic"), "belongs to --int8"),
        (("export", "FILE", "--format", "onnx", "--weights", "a.pth"), "holds its own weights"),
        (("export", "NET", "--format", "onnx"), "say where to write: --out FILE"),
        (("export", "model.onnx", "--int8", "--calibration", "synthetic"), "is exported already"),
        (("bench", "absent.onnx"), "there is no file 'absent.onnx'"),
        (("bench", "absent.xml"), "there is no file 'absent.xml'"),
        (("export", "FILE"), "say what to write: --format onnx, --format openvino, --format pt2"),
        (
            ("export", "FILE", "--format", "pt2"),
            "does not name its architecture: say what was pruned, as in --model",
        ),
        (("export", "FILE", "--format", "pt2", "--model", "demo:digits"), "the plan expects"),
        (("bench", "FILE", "--batch", "one"), "--batch is one or several whole numbers"),
        (("bench", "FILE", "--dtype", "int4"), "'int4' is unknown; use float32, bf16, float16"),
        (("bench", "absent.safetensors"), "there is no file 'absent.safetensors'"),
        (
            ("prune", "NET", "--macs", "0.5", "--round-to", "even"),
            "--round-to is a whole number, such as 8, or measured",
        ),
        (("prune", "NET", "--macs", "0.5", "--latency", "0.5"), "--macs and --latency were given"),
    ],
)
def test_bad_requests_to_export_and_bench_say_what_to_do(
    saved: Path, net: str, command: tuple[str, ...], message: str
) -> None:
    words = {"FILE": str(saved), "NET": net}
    assert message in refused(*(words.get(word, word) for word in command))


@pytest.mark.parametrize(
    ("pruned", "said"),
    [
        ((0.1, 0.1, 0.1), ""),
        ((0.18, 0.36, 0.27), "--latency prunes to a time"),
        (
            (0.3, 0.3, 0.3),
            "too noisy to tell: in half of the turns the pruned model took 87.5 % to 125.0 %",
        ),
    ],
)
def test_the_time_of_both_models_is_reported(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruned: tuple[float, ...], said: str
) -> None:
    """Whatever the budget; timed are the dense model and the pruned one, on as many images as were asked for."""
    from ss_pruning.cli import jobs as _job
    from ss_pruning.profiling.latency import Timing

    timed: list[tuple[int, int]] = []

    def stand_in(models: list[nn.Module], inputs: torch.Tensor, **options: Any) -> list[Timing]:
        timed.extend((sum(p.numel() for p in model.parameters()), len(inputs)) for model in models)
        return [Timing((0.2, 0.4, 0.3)), Timing(pruned)]

    monkeypatch.setattr(_job, "measure_latency", stand_in)
    result = run("prune", net, *SIZE, "--macs", 0.5, "--batch", 3, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = Report.load_json(tmp_path / "out" / "report.json")
    assert timed == [(report.params_before, 3), (report.params_after, 3)]
    assert report.latency_before == 0.3
    ratios = sorted(a / b for a, b in zip(pruned, (0.2, 0.4, 0.3), strict=True))
    assert report.latency_ratio == pytest.approx(ratios[1])
    assert report.latency_after == pytest.approx(report.latency_ratio * report.latency_before)
    assert report.settings["batch"] == 3
    assert "threads: " in report.settings["timed on"]
    assert "latency (batch 3)" in result.stdout
    words = " ".join(result.stdout.split())
    for sentence in ("--latency prunes to a time", "too noisy to tell: in half"):
        assert (sentence in words) is said.startswith(sentence)
    assert said in words
    (row,) = (line for line in result.stdout.splitlines() if "latency (batch 3)" in line)
    assert ("too noisy to tell" in row) is said.startswith("too noisy")


def test_a_latency_target_is_recorded(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ss_pruning.planning import latency_target as hastening
    from ss_pruning.profiling.latency import Timing

    sizes: list[int] = []

    def stopwatch(model: nn.Module, inputs: torch.Tensor) -> hastening.Measure:
        sizes.append(len(inputs))
        dense = sum(p.numel() for p in model.parameters())

        def measure(plan: Any) -> tuple[Timing, Timing]:
            small = sum(p.numel() for p in plan.apply_(build_model(net)).parameters())
            return Timing((dense / 1e6,)), Timing((small / 1e6,))

        return measure

    monkeypatch.setenv("SS_PRUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ss_pruning.pruning.stopwatch", stopwatch)
    result = run("prune", net, *SIZE, "--latency", 0.6, "--batch", 5, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = Report.load_json(tmp_path / "out" / "report.json")
    assert sizes == [5]
    # How near it comes hangs on times of tiny layers that are measured here: see the tests of the search for that.
    assert 0 < report.latency_ratio <= 0.6 * 1.05 + 1e-9
    assert (report.settings["latency"], report.settings["batch"]) == (0.6, 5)
    assert "latency" in result.stdout


# ---------------------------------------------------------------- time


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_times_are_read_with_their_units(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize("text", ["5 m", "m", "-5m", "1e3", "5d"])
def test_other_times_are_refused_with_examples(text: str) -> None:
    with pytest.raises(InputError, match="5m"):
        _seconds(text)


def test_what_was_traded_for_time_is_said(net: str) -> None:
    result = run("prune", net, *SIZE, "--macs", 0.7, "--budget-time", "0.000001s")
    assert result.exit_code == 0, result.output
    assert "To save time: no more could be given up" in " ".join(result.stdout.split())


def test_how_long_it_takes_is_said_once_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(_job, "note", said.append)
    told = list[int]()
    for done, total in ((0, 1), (0, 240_000), (120_000, 240_000)):
        _job._stage(lambda *_: None, told, "score", done, total)
    _job._stage(lambda *_: None, [], "score", 0, 5000)
    assert said == ["Pruning takes about 4 minutes."]
