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
    yolo = report.model.startswith("yolo:")  # detectors have losses of their own
    file = report.file or "pruned.safetensors"
    quoted = shlex.quote(file) + ("" if named else _model_options(report))
    build, hint = ("", "") if named else (", build_model", "  # build_model() makes the dense model")
    tuned = str(Path(file).with_name("finetuned.safetensors"))
    tune = _FINE_TUNE.format(file=tuned, architecture=f", {report.model!r}" if named else "")
    out = shlex.quote(str(Path(file).with_name("finetuned")))
    steps = [
        (not report.file, "Save", f"import ss_pruning\n\nss_pruning.save(model, {file!r})"),
        (True, "Load", f"import ss_pruning\n\nmodel = ss_pruning.load({file!r}{build}){hint}"),
        (named and yolo, "Open as a YOLO", _YOLO.format(file=file)),
        (
            report.file and not report.random_weights,
            "Recover without labels",
            f"ss-prune recover {quoted} {_images(report)} --minutes 5",
        ),
        (
            named and not yolo,
            "Fine-tune on a folder",
            f"ss-prune finetune {shlex.quote(file)} --data FOLDER --out {out}",
        ),
        (not yolo, "Fine-tune", tune),
        (True, "Export", f"ss-prune export {quoted} --format onnx"),
        (True, "In eight bits", f"ss-prune export {quoted} --int8 --calibration {_photos(report)}"),
        (True, "Measure", f"ss-prune bench {quoted} --batch 1,32"),
    ]
    return [(what, command) for possible, what, command in steps if possible]


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
