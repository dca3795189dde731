"""`recover_yolo_`: `recover_` for a YOLO, on images without labels."""

from __future__ import annotations

import os
from typing import Any

from ultralytics import YOLO

from ss_pruning.config import SYNTHETIC
from ss_pruning.errors import InputError
from ss_pruning.integrations.ultralytics.images import calibration_images
from ss_pruning.integrations.ultralytics.networks import opened, side_of, thawed
from ss_pruning.integrations.ultralytics.raw_outputs import raw_outputs
from ss_pruning.recovery.recover import recover_
from ss_pruning.recovery.report import RecoveryReport

# Unlabelled images to draw from files.
_IMAGES = 256


def recover_yolo_(
    yolo: YOLO, dense: str | os.PathLike[str] | YOLO, images: Any, *, imgsz: int | None = None, **options: Any
) -> RecoveryReport:
    """Train a pruned YOLO in place to have the dense one's feature maps, without labels; see `ss_pruning.recover_`.

    Args:
        yolo: What `prune_yolo` returned.
        dense: The one that was pruned, or its file (a pickle, **which runs the code in it**); not changed.
        images: A data.yaml or a folder, of which 256 images are drawn and letterboxed, or what `recover_` takes.
        imgsz: Height and width of images from files; by default as for `prune_yolo`.
        options: What else `recover_` takes: `steps`, `minutes`, `checkpoint`, `progress`, and `settings`, such as
            `Recovery(flip=False)` where left and right matter.

    Raises:
        InputError: An argument is wrong, or `dense` is another network.
        ModelError: A network holds NaN or Inf weights.
    """
    student, teacher = opened(yolo).model, opened(dense).model
    if student is teacher:
        raise InputError("dense is the pruned YOLO itself; give the one that was pruned, as it was before")
    if isinstance(images, (str, os.PathLike)) and images != SYNTHETIC:
        images = calibration_images(images, side_of(yolo, imgsz), task=yolo.task, count=_IMAGES)
    with raw_outputs(student), raw_outputs(teacher), thawed(student):
        return recover_(student, teacher, images, **options)
