"""Copies in which a wrong cut shows: run in float64, with noise in the place of constants.

Nothing but what is run is copied: parameters become float64 only while a layer reads them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ss_pruning._utils.copying import read_as, retyped

#: Largest relative difference between cut and masked outputs, in float64 and in the model's own precision.
TOLERANCE, COARSE_TOLERANCE = 1e-10, 1e-3
#: The same in words, as reports tell them.
DOUBLE, OWN = "float64", "the model's own"


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64, copy=True) if tensor.is_floating_point() else tensor.clone()


#: How a copy is run, how its inputs are changed, and the tolerance. Where code gets at parameters other than by reading
#: attributes, all are made float64 at once; where a model does not run in float64, it is taken as it is.
PRECISIONS: tuple[tuple[Callable[[nn.Module], nn.Module], Callable[[Tensor], Tensor], float], ...] = (
    (lambda model: read_as(model, _double), _double, TOLERANCE),
    (lambda model: retyped(model, _double), _double, TOLERANCE),
    (lambda model: read_as(model, Tensor.clone), Tensor.clone, COARSE_TOLERANCE),
)


def stirred(model: nn.Module) -> nn.Module:
    """A copy in which constant tensors hold noise; the others are shared."""
    generator = torch.Generator().manual_seed(0)

    def stir(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        if not tensor.is_floating_point() or not len(flat) or flat[0] != flat[-1] or (flat != flat[0]).any():
            return tensor
        return tensor + 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor)

    return retyped(model, stir)
