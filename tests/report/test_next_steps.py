"""The commands that a report hands on do what they say."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from typer.testing import CliRunner

import ss_pruning
from ss_pruning.cli.app import app
from ss_pruning.report.next_steps import next_steps
from ss_pruning.sources.demo import digits_resnet

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def ran(steps: dict[str, str], names: dict[str, Any]) -> nn.Module:
    """What the Python among the steps leaves as the model."""
    names = {"loader": [(IMAGES, torch.arange(4))], **names}
    for what in ("Save", "Load", "Fine-tune"):
        exec(steps.get(what, ""), names)
    model: nn.Module = names["model"]
    return model


def arguments(command: str) -> list[str]:
    program, *rest = shlex.split(command)
    assert program == "ss-prune"
    return rest


def test_a_file_of_the_command_line_is_loaded_tuned_and_exported(tmp_path: Path) -> None:
    out = tmp_path / "it's here"
    done = CliRunner().invoke(app, ["prune", "demo:digits", "--macs", "0.6", "--out", str(out)])
    assert done.exit_code == 0, done.output
    report = ss_pruning.Report.load_json(out / "report.json")
    assert report.file == str(out / "model.safetensors")
    steps = dict(next_steps(report))
    assert list(steps) == [
        "Load",
        "Recover without labels",
        "Fine-tune on a folder",
        "Fine-tune",
        "Export",
        "In eight bits",
        "Measure",
    ]
    for command in steps.values():
        # Whole, not broken into lines; what takes more than one is in the report.
        assert (command in done.stdout) == ("\n" not in command)
    model = ran(steps, {})
    again = ss_pruning.load(out / "finetuned.safetensors")
    assert torch.equal(model(IMAGES), again(IMAGES))
    assert not torch.equal(model(IMAGES), ss_pruning.load(report.file)(IMAGES))
    for what in ("Recover without labels", "Fine-tune on a folder", "Export", "In eight bits", "Measure"):
        _check(arguments(steps[what]))


def test_from_python_it_is_saved_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = digits_resnet().eval()
    report = ss_pruning.prune_(model, IMAGES[:1], macs=0.6)
    steps = dict(next_steps(report))
    tuned = ran(steps, {"model": model, "build_model": digits_resnet})
    assert tuned is not model
    again = ss_pruning.load("finetuned.safetensors", digits_resnet)
    assert torch.equal(tuned(IMAGES), again(IMAGES))
    _check(arguments(steps["Export"]))


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({}, ["--calibration", "PHOTOS"]),
        ({"calibration": "my photos", "data": "digits"}, ["--calibration", "my photos"]),
        ({"calibration": "synthetic"}, ["--calibration", "synthetic"]),
        ({"data": "digits"}, ["--data", "digits"]),
    ],
)
def test_recovery_takes_the_images_that_were_pruned_with(settings: dict[str, str], option: list[str]) -> None:
    report = ss_pruning.Report("timm:a", 2, 1, 2, 1, [], [], 0.0, settings=settings, file="m.safetensors")
    steps = dict(next_steps(report))
    assert arguments(steps["Recover without labels"])[2:4] == option
    _check(arguments(steps["Recover without labels"]))
    photos = option[1] if option[0] == "--calibration" else "PHOTOS"
    assert arguments(steps["In eight bits"])[2:] == ["--int8", "--calibration", photos]


def test_a_yolo_is_opened_as_one() -> None:
    report = ss_pruning.Report("yolo:yolo11n.yaml", 2, 1, 2, 1, [], [], 0.0, file="m.safetensors")
    assert "PrunedYOLO('m.safetensors')" in dict(next_steps(report))["Open as a YOLO"]


def test_what_the_file_does_not_name_is_told() -> None:
    report = ss_pruning.Report(
        "my net.py:build", 2, 1, 2, 1, [], [], 0.0, settings={"input size": "1x8x8"}, file="m.safetensors"
    )
    command = dict(next_steps(report))["Export"]
    assert arguments(command)[:6] == [
        "export",
        "m.safetensors",
        "--model",
        "my net.py:build",
        "--input-size",
        "1x8x8",
    ]
    _check(arguments(command))


def test_names_cannot_leave_their_quotes() -> None:
    evil = """m"; rm -rf '$(x)'.safetensors"""
    report = ss_pruning.Report(f"timm:{evil}", 2, 1, 2, 1, [], [], 0.0, file=evil)
    steps = dict(next_steps(report))
    assert arguments(steps["Export"])[:2] == ["export", evil]
    calls = [node for node in ast.walk(ast.parse(steps["Load"])) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls] == [evil]
    assert f"timm:{evil}" in [
        getattr(node, "value", None) for node in ast.walk(ast.parse(steps["Fine-tune"]))
    ]


def _check(command: list[str]) -> None:
    """Parse the options as the program does, without running it."""
    import click
    from typer.main import get_command

    program = get_command(app)
    with click.Context(program) as context:
        _, found, rest = program.resolve_command(context, command)
        assert found is not None
        found.make_context(command[0], rest, parent=context)
