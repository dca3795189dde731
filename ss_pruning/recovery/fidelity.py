"""How close two models' outputs are on held-out inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import call
from ss_pruning.importance.calibration import Batch
from ss_pruning.recovery.imitation import ImitationLoss, relative_error
from ss_pruning.recovery.report import Fidelity

_Outputs = Mapping[str, Tensor]


class HeldOut:
    """Held-out inputs, and what the dense model makes of them.

    Args:
        imitation: The loss between both models, with its hooks in place; it counts where outputs cannot be compared.
        inputs: What is held out.
        batch: Inputs in one pass.
    """

    def __init__(self, imitation: ImitationLoss, inputs: Batch, batch: int) -> None:
        self.imitation, self.parts = imitation, inputs.split(batch)
        self.wanted = [_outputs(imitation.dense, part) for part in self.parts]
        self.by_outputs = math.isfinite(self._of_outputs().error)

    def measure(self) -> Fidelity:
        """The fidelity of the pruned model as it is now."""
        return self._of_outputs() if self.by_outputs else self._of_features()

    def _of_outputs(self) -> Fidelity:
        found = [_outputs(self.imitation.model, part) for part in self.parts]
        for ours, theirs in zip(found, self.wanted, strict=True):
            if not theirs or {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
                return Fidelity(math.inf)
        errors = []
        for name in self.wanted[0]:
            x, y = (torch.cat([out[name].flatten() for out in outs]) for outs in (found, self.wanted))
            errors.append(float(relative_error(x, y)))
        error = sum(errors) / len(errors)
        return Fidelity(error if math.isfinite(error) else math.inf, _agreement(found, self.wanted))

    @torch.no_grad()
    def _of_features(self) -> Fidelity:
        errors = []
        for part in self.parts:
            call(self.imitation.model, part.inputs)
            errors.append(len(part) * float(self.imitation(part.inputs)))
        error = sum(errors) / sum(map(len, self.parts))
        return Fidelity(error if math.isfinite(error) else math.inf)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Batch) -> _Outputs:
    found = tensors_in(call(model, inputs.inputs))
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point() and tensor.numel()}


def _agreement(found: list[_Outputs], wanted: list[_Outputs]) -> float | None:
    """Share of rows whose largest number stands in the same column; None where there are none."""
    if len(wanted[0]) != 1 or any(t.dim() != 2 or t.shape[1] < 2 for out in wanted for t in out.values()):
        return None
    ours, theirs = (
        torch.cat([tensor.argmax(1) for out in outs for tensor in out.values()]) for outs in (found, wanted)
    )
    return float((ours == theirs).float().mean())
