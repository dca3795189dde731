"""`prune_yolo`: from a YOLO to a smaller one."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics import YOLO

from ss_pruning._utils.copying import copied
from ss_pruning.config import SYNTHETIC
from ss_pruning.integrations.ultralytics.images import calibration_images
from ss_pruning.integrations.ultralytics.model import PrunedYOLO
from ss_pruning.integrations.ultralytics.networks import opened, side_of, thawed
from ss_pruning.integrations.ultralytics.raw_outputs import raw_outputs
from ss_pruning.pruning import prune_
from ss_pruning.report.records import Report


def prune_yolo(
    model: str | os.PathLike[str] | YOLO,
    *,
    calibration: Any = None,
    imgsz: int | None = None,
    **options: Any,
) -> tuple[PrunedYOLO, Report]:
    """Prune a YOLO's network on a copy: detection, segmentation, pose, turned boxes, classification.

    What counts, to scores, reconstruction and the check, is what the head's last convolutions put out.

    Args:
        model: A `YOLO`, a path to a `.pt` file (a pickle, **which runs the code in it**), or the name of a `.yaml`
            file. Not changed.
        calibration: Unlabelled images: a data.yaml, a folder (64 are drawn and letterboxed; for others see
            `calibration_images`), or what `prune_` takes.
        imgsz: Height and width of the images that the network will see; by default those that it was trained with,
            or 640 (224 for classification).
        options: What else `prune_` takes: one of `macs`, `params`, `ratio`, `latency`; `compensation`, `allocation`,
            `importance`, `ignore` (by paths as in `yolo.model`), `progress`.

    Returns:
        The smaller YOLO, and what was done.

    Raises:
        InputError: An argument is wrong, or the model none that can be pruned here.
        SSPruningError: As `prune_` raises: the budget is out of reach, or the network cannot be used as it is.
    """
    yolo = opened(model)
    side = side_of(yolo, imgsz)
    if isinstance(calibration, (str, os.PathLike)) and calibration != SYNTHETIC:
        calibration = calibration_images(calibration, side, task=yolo.task)
    network: Any = copied(yolo.model)
    if network.is_fused():
        warnings.warn(
            "the network is fused: its batch norms are gone, scores are of weights alone, and it will not train well; "
            "prune before fuse()",
            stacklevel=2,
        )
    training = [module.training for module in network.modules()]
    with raw_outputs(network.eval()), thawed(network):
        report = prune_(network, _example(network, side), calibration=calibration, **options)
    for module, flag in zip(network.modules(), training, strict=True):
        module.training = flag
    name = Path(getattr(network, "pt_path", None) or network.yaml.get("yaml_file", "yolo"))
    network.pt_path = f"{name.stem.removesuffix('-pruned')}-pruned.pt"  # exports are named after it
    return PrunedYOLO.around(network, yolo), replace(report, model=name.stem)


def _example(network: Any, side: int) -> Tensor:
    """One image of noise."""
    image = torch.rand(
        1, network.yaml.get("channels", 3), side, side, generator=torch.Generator().manual_seed(0)
    )
    return image.to(next(network.parameters()))
