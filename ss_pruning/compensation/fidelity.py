"""What a small model keeps of the dense one, on inputs that nothing was fitted on; labels are not needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ss_pruning._utils.outputs import tensors_in
from ss_pruning._utils.running import call, preserved
from ss_pruning.errors import ModelError
from ss_pruning.importance.calibration import Batch
from ss_pruning.report.records import Fidelity

#: One of so many inputs is not fitted on.
HELD_OUT = 5


class Reference:
    """The outputs of the dense model on held-out inputs, to compare small models with.

    Raises:
        ModelError: The outputs hold no numbers that go by inputs, or do not vary.
    """

    def __init__(self, dense: nn.Module, held_out: Batch, synthetic: bool = False) -> None:
        self.parts = held_out.parts()
        self.count, self.synthetic = len(held_out), synthetic
        try:
            self.outputs = _outputs(dense, self.parts)
        except Exception as error:
            raise ModelError(
                f"the model does not run on the inputs ({type(error).__name__}: {error})"
            ) from error
        self.variances = _variances(self.outputs)
        if not self.variances:
            raise ModelError(
                "no output of the model varies from input to input, so that nothing can be compared"
            )

    def fidelity(self, small: nn.Module) -> Fidelity:
        """How near a smaller model is."""
        pairs = list(zip(self.outputs, _outputs(small, self.parts), strict=True))
        each = torch.cat([self._errors(dense, found) for dense, found in pairs])
        spread = float(each.std() / len(each) ** 0.5) if len(each) > 1 else float("nan")
        same = agreement([same_class(dense, found) for dense, found in pairs])
        return Fidelity(self.count, float(each.mean()), spread, same, self.synthetic)

    def _errors(self, dense: dict[str, Tensor], small: dict[str, Tensor]) -> Tensor:
        """`[inputs]`: mean over the outputs that both have in one shape; those that lack count as lost."""
        parts = []
        for name, variance in self.variances.items():
            expected, got = dense[name], small.get(name)
            if got is None or got.shape != expected.shape:
                parts.append(torch.ones(len(expected), dtype=torch.float64))
                continue
            off = (got.double() - expected.double()).flatten(1).square().mean(1).cpu() / variance
            parts.append(off.nan_to_num(nan=float("inf")))
        return torch.stack(parts).mean(0)


def held_out(batch: Batch) -> tuple[Batch, Batch]:
    """Each fifth of the inputs (`HELD_OUT`), and the others; whole units of both."""
    units = torch.arange(len(batch) // batch.unit)
    chosen = units % HELD_OUT == HELD_OUT - 1
    return batch.of_units(units[chosen]), batch.of_units(units[~chosen])


def _outputs(model: nn.Module, parts: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """Part by part, see `_by_input`."""
    with torch.no_grad(), preserved(model, training=False):
        return [_by_input(call(model, part.inputs), len(part)) for part in parts]


def _by_input(output: Any, count: int) -> dict[str, Tensor]:
    """The numbers among the outputs that go by inputs, `[inputs, ...]`."""
    found = {}
    for name, tensor in tensors_in(output).items():
        numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if numbers.is_floating_point() and numbers.dim() > 0 and len(numbers) == count:
            found[name] = numbers
    return found


def _variances(outputs: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """By output, its variance over the inputs, mean over its numbers; of those that every part has in one shape."""
    found = {}
    for name, first in outputs[0].items():
        if all(name in part and part[name].shape[1:] == first.shape[1:] for part in outputs):
            variance = _variance([part[name] for part in outputs])
            if 0 < variance < float("inf"):
                found[name] = variance
    return found


def _variance(parts: Sequence[Tensor]) -> float:
    """Of `[inputs, ...]` in parts, over the inputs; mean over all else."""
    count = sum(map(len, parts))
    total = sum(part.double().sum(0) for part in parts)
    mean = torch.as_tensor(total) / count
    squares = sum(float((part.double() - mean).square().sum()) for part in parts)
    return squares / max(count * mean.numel(), 1)


def same_class(dense: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> Tensor | None:
    """`[inputs]`: whether both outputs put the same class first; nowhere, if the small model's has another shape.

    None where the dense model's output is not one score a class.
    """
    if len(dense) != 1:
        return None
    ((name, wanted),) = dense.items()
    if wanted.dim() != 2 or wanted.shape[1] < 2:
        return None
    if small.keys() != dense.keys() or small[name].shape != wanted.shape:
        return torch.zeros(len(wanted), dtype=torch.bool)
    return (small[name].argmax(1) == wanted.argmax(1)).cpu()


def agreement(same: Sequence[Tensor | None]) -> float | None:
    """The share of the inputs on which both are the same, from `same_class` of every part; None where one has none."""
    known = [part for part in same if part is not None]
    return float(torch.cat(known).double().mean()) if len(known) == len(same) else None
