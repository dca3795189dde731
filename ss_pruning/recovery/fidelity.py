"""How close two models' outputs are on held-out inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import call
from ss_pruning.compensation.fidelity import agreement, same_class
from ss_pruning.importance.calibration import Batch
from ss_pruning.recovery.imitation import ImitationLoss, scale
from ss_pruning.recovery.report import HeldOutResult

_Outputs = Mapping[str, Tensor]
# Bytes of the dense model's outputs that are kept at most: those of a segmentation net are large.
_ROOM = 2**28


class HeldOut:
    """Held-out inputs on which a pruned model is compared with the dense one.

    The loss between both, with its hooks in place, counts where outputs cannot be compared.
    """

    def __init__(self, imitation: ImitationLoss, inputs: Batch, batch: int) -> None:
        self.imitation, self.parts = imitation, inputs.split(batch)
        self.kept: dict[int, _Outputs] = {}
        self.by_outputs = math.isfinite(self._of_outputs().error)

    def measure(self) -> HeldOutResult:
        """The fidelity of the pruned model as it is now."""
        return self._of_outputs() if self.by_outputs else self._of_features()

    def _of_outputs(self) -> HeldOutResult:
        """Infinite where outputs have no common shape, or are not finite."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
        same: list[Tensor | None] = []
        for number, part in enumerate(self.parts):
            ours, theirs = _outputs(self.imitation.model, part), self._wanted(number, part)
            if not theirs or _shapes(ours) != _shapes(theirs):
                return HeldOutResult(math.inf)
            for name, wanted in theirs.items():
                sums[name] += _sums(ours[name].double(), wanted.double())
            same.append(same_class(theirs, ours))
        self.imitation.forget()
        error = sum(map(_relative, sums.values())) / len(sums)
        return HeldOutResult(error if math.isfinite(error) else math.inf, agreement(same))

    def _wanted(self, number: int, part: Batch) -> _Outputs:
        """What the dense model puts out, which is always the same, and kept if there is room."""
        if number in self.kept:
            return self.kept[number]
        found = _outputs(self.imitation.dense, part)
        if sum(tensor.nbytes for each in (found, *self.kept.values()) for tensor in each.values()) <= _ROOM:
            self.kept[number] = found
        return found

    @torch.no_grad()
    def _of_features(self) -> HeldOutResult:
        errors = []
        for part in self.parts:
            call(self.imitation.model, part.inputs)
            errors.append(len(part) * float(self.imitation()))
        error = sum(errors) / sum(map(len, self.parts))
        return HeldOutResult(error if math.isfinite(error) else math.inf)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Batch) -> _Outputs:
    found = tensors_in(call(model, inputs.inputs))
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point() and tensor.numel()}


def _shapes(outputs: _Outputs) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in outputs.items()}


def _sums(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared errors, numbers, their sum and that of their squares, of what is wanted."""
    count = torch.full_like(wanted.sum(), wanted.numel())
    return torch.stack([(found - wanted).square().sum(), count, wanted.sum(), wanted.square().sum()]).cpu()


def _relative(sums: Tensor) -> float:
    """The relative error that `relative_error` is of all at once."""
    error, mean, square = sums[0] / sums[1], sums[2] / sums[1], sums[3] / sums[1]
    return float(error / scale(mean, (square - mean.square()).clamp_min(0)))
