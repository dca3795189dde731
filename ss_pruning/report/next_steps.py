"""What can be done with a pruned model, as commands to copy."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ss_pruning.report.records import Report

_NAMED = ("timm:", "torchvision:", "yolo:", "demo:")
"""Architectures that a file may name, so that `load` builds them by itself."""

_FINE_TUNE = """import torch

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
model.train()
for images, labels in loader:  # your training data
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
ss_pruning.save(model, {file!r}{architecture})"""


_YOLO = """from ss_pruning.integrations.ultralytics import PrunedYOLO

yolo = PrunedYOLO({file!r})  # trains on, validates, predicts and exports"""


def next_steps(report: Report) -> list[tuple[str, str]]:
    """Return (what for, commands): load, recover, fine-tune and export the file that was written, or save one first."""
    named = report.file is not None and report.model.startswith(_NAMED)
    file = report.file or "pruned.safetensors"
    tuned = str(Path(file).with_name("finetuned.safetensors"))
    build, hint = ("", "") if named else (", build_model", "  # build_model() makes the dense model")
    options = "" if named else _model_options(report)
    recover = f"ss-prune recover {shlex.quote(file)}{options} {_images(report)} --minutes 5"
    tune = _FINE_TUNE.format(file=tuned, architecture=f", {report.model!r}" if named else "")
    out = shlex.quote(str(Path(file).with_name("finetuned")))
    tune_folder = f"ss-prune finetune {shlex.quote(file)} --data FOLDER --out {out}"
    save = [] if report.file else [("Save", f"import ss_pruning\n\nss_pruning.save(model, {file!r})")]
    return [
        *save,
        ("Load", f"import ss_pruning\n\nmodel = ss_pruning.load({file!r}{build}){hint}"),
        *(
            [("Open as a YOLO", _YOLO.format(file=file))]
            if named and report.model.startswith("yolo:")
            else []
        ),
        *([("Recover without labels", recover)] if report.file and not report.random_weights else []),
        *([("Fine-tune on a folder", tune_folder)] if named and not report.model.startswith("yolo:") else []),
        *(
            [] if report.model.startswith("yolo:") else [("Fine-tune", tune)]
        ),  # detectors have losses of their own
        ("Export", f"ss-prune export {shlex.quote(file)}{options} --format onnx"),
        (
            "In eight bits",
            f"ss-prune export {shlex.quote(file)}{options} --int8 --calibration {_photos(report)}",
        ),
        ("Measure", f"ss-prune bench {shlex.quote(file)}{options} --batch 1,32"),
    ]


def _images(report: Report) -> str:
    """The option that names the images it was pruned with, if a command line gave some."""
    photos, data = _photos(report), report.settings.get("data")
    return f"--data {shlex.quote(str(data))}" if data and photos == "PHOTOS" else f"--calibration {photos}"


def _photos(report: Report) -> str:
    """The folder without labels, or "synthetic"; a word that stands for one where there was none."""
    given = report.settings.get("calibration", "data")
    return "PHOTOS" if given == "data" else shlex.quote(str(given))


def _model_options(report: Report) -> str:
    """What the command line must be told where the file does not name its architecture."""
    model = report.model if report.file else "FILE.py:build_model"
    size = report.settings.get("input size")
    return f" --model {shlex.quote(model)}" + (f" --input-size {shlex.quote(str(size))}" if size else "")
