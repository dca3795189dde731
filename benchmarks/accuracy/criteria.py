"""The criteria that are compared: Torch-Pruning's, each with its own defaults, and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.data.cifar import Images, as_input
from ss_pruning import SynapticImportance
from ss_pruning.importance.calibration import BATCH

OURS = "SynapticImportance"
#: So many images without labels to calibrate on.
CALIBRATION = 512
_NO_LABELS: dict[str, Callable[[], Any]] = {
    "Random": tp.importance.RandomImportance,
    "Magnitude L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "Magnitude L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "BNScale": tp.importance.BNScaleImportance,
    "LAMP": tp.importance.LAMPImportance,
    "FPGM": tp.importance.FPGMImportance,
    OURS: lambda: None,  # the default: measured on calibration images if the run has some, else on noise
}
#: These two read gradients of the loss on labelled training images.
_LABELS: dict[str, Callable[[], Any]] = {
    "Taylor": tp.importance.GroupTaylorImportance,
    "Hessian": tp.importance.GroupHessianImportance,
}
CRITERIA = (*_NO_LABELS, *_LABELS)
#: Chance plays a part in these: another seed gives other scores, or draws other labelled images.
BY_CHANCE = ("Random", *_LABELS)

Gradients = dict[str, Tensor]


def is_known(name: str) -> bool:
    """True for one of `CRITERIA`, with a scope or not, and for ours with options (`SynapticImportance:reduce=max`)."""
    criterion = name.partition(":")[0]
    return criterion in CRITERIA and (criterion == OURS or named_options(name).keys() <= {"scope"})


def named_options(name: str) -> dict[str, str]:
    """What stands behind the colon of a criterion's name."""
    return dict(part.split("=", 1) for part in name.partition(":")[2].split(",") if part)


class Criteria:
    """Makes importances; gradients are computed once for each net and draw of labelled images."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, int], Gradients] = {}

    def __call__(
        self, name: str, model: nn.Module, net: str, seed: int, labelled: Images, calibration: Tensor | None
    ) -> Any:
        """An importance for `model`, which is given the gradients that it reads; None for the default.

        Ours with options takes its statistics from the calibration images if there are any, as the default does.
        """
        name, given = name.partition(":")[0], named_options(name)
        for option in ("scope", "cost_exponent"):  # not the importance's business
            given.pop(option, None)
        if name in _LABELS:
            key = (name, net, seed)
            if key not in self._known:
                self._known[key] = (
                    _mean_gradients(model, labelled) if name == "Taylor" else _squares(model, labelled)
                )
            for path, parameter in model.named_parameters():
                parameter.grad = self._known[key][path].clone()
            return _LABELS[name]()
        if given:
            options: dict[str, Any] = dict(given)
            if calibration is not None:
                options.setdefault("statistics", calibration.split(BATCH))
            if "conditional" in options:
                options["conditional"] = float(options["conditional"])
            return SynapticImportance(**options)
        return _NO_LABELS[name]()


def _mean_gradients(model: nn.Module, labelled: Images, batch: int = 128) -> Gradients:
    """Of the mean loss; the model is in evaluation mode, as it will be judged."""
    model.zero_grad(set_to_none=True)
    for pixels, labels in zip(*(part.split(batch) for part in labelled), strict=True):
        loss = F.cross_entropy(model(as_input(pixels)), labels, reduction="sum") / len(labelled[1])
        loss.backward()
    return _taken(model)


def _squares(model: nn.Module, labelled: Images) -> Gradients:
    """Mean over images of the squared gradient of each one's loss, the diagonal of the empirical Fisher matrix.

    Summed here: `accumulate_grad` of Torch-Pruning 1.6.1 looks for names among parameters, never finds one, and keeps
    the last image alone. Handed over as gradients, which its importance reads if it has accumulated nothing.
    """
    sums: Gradients = {}
    for pixels, label in zip(as_input(labelled[0]), labelled[1], strict=True):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(pixels[None]), label[None]).backward()
        for path, gradient in _taken(model).items():
            sums[path] = sums.get(path, torch.zeros_like(gradient)).addcmul_(gradient, gradient)
    return {path: total / len(labelled[1]) for path, total in sums.items()}


def _taken(model: nn.Module) -> Gradients:
    """The gradients, which the model gives away."""
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
