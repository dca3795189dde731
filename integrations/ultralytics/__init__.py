"""Ultralytics YOLO: prune one, and train, validate and export it with its own tools as before.

Needs the extra `ultralytics`. That package is licensed under the AGPL-3.0, or commercially; this adapter imports it and
holds none of its code. Whoever distributes a program that uses both has its terms to keep.

A `.pt` file of Ultralytics is a pickle: **opening one runs what code it holds**. Open those that you trust; for others
there is safetensors.
"""

from __future__ import annotations

from ss_pruning.integrations.ultralytics.images import calibration_images
from ss_pruning.integrations.ultralytics.model import PrunedYOLO
from ss_pruning.integrations.ultralytics.pruning import prune_yolo
from ss_pruning.integrations.ultralytics.recovery import recover_yolo_

__all__ = ["PrunedYOLO", "calibration_images", "prune_yolo", "recover_yolo_"]
