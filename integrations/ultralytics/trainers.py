"""Trainers that train the network they are given; Ultralytics' own build it anew from its yaml, as wide as before."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from ultralytics.models.yolo import classify, detect, obb, pose, segment

from ss_pruning.errors import InputError
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE

#: Stands in place of a module's name in the yaml of a pruned network: whoever builds that anew gets no dense one
#: in silence, but an error with this text.
NOTE = "this model was pruned: train it with ss_pruning.integrations.ultralytics.PrunedYOLO(FILE).train(...)"


def is_pruned(settings: Any) -> bool:
    """Whether a network's yaml says that it was pruned."""
    return isinstance(settings, Mapping) and [entry[2] for entry in settings["backbone"]] == [NOTE]


class _KeepsStructure:
    """Goes before a trainer's class."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """A copy of the pruned network, to be trained; of others, what Ultralytics makes."""
        if hasattr(weights, PLAN_ATTRIBUTE):
            return _trainable(weights, self)
        if is_pruned(cfg):
            raise InputError(
                "a pruned network is trained on from its own weights: leave pretrained= away, or prune the network of "
                "that file"
            )
        return super().get_model(cfg=cfg, weights=weights, verbose=verbose)  # type: ignore[misc]


def _trainable(weights: Any, trainer: Any) -> Any:
    for what, kept, asked in (
        ("classes", weights.yaml["nc"], trainer.data["nc"]),
        ("key points", getattr(weights, "kpt_shape", None), trainer.data.get("kpt_shape")),
    ):
        if asked is not None and kept is not None and kept != asked:
            raise InputError(
                f"the pruned network has {kept} {what}, the data {asked}: fit the dense one to the data, then prune it"
            )
    with torch.inference_mode(False):
        network = copy.deepcopy(weights)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for module in network.modules():
        if trainer.args.task == "classify" and trainer.args.dropout and isinstance(module, nn.Dropout):
            module.p = trainer.args.dropout
    return network


class DetectionTrainer(_KeepsStructure, detect.DetectionTrainer):  # type: ignore[misc]
    """Trains a pruned detector."""


class SegmentationTrainer(_KeepsStructure, segment.SegmentationTrainer):  # type: ignore[misc]
    """Trains a pruned network for masks."""


class PoseTrainer(_KeepsStructure, pose.PoseTrainer):  # type: ignore[misc]
    """Trains a pruned network for key points."""


class OBBTrainer(_KeepsStructure, obb.OBBTrainer):  # type: ignore[misc]
    """Trains a pruned detector of turned boxes."""


class ClassificationTrainer(_KeepsStructure, classify.ClassificationTrainer):  # type: ignore[misc]
    """Trains a pruned classifier."""


#: By task; classes of a module, so that other processes find them.
TRAINERS: Mapping[str, type] = {
    "detect": DetectionTrainer,
    "segment": SegmentationTrainer,
    "pose": PoseTrainer,
    "obb": OBBTrainer,
    "classify": ClassificationTrainer,
}
