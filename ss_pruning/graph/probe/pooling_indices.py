"""Max-unpooling puts a map's values where another map had its maxima: the channels of both belong together.

Whole numbers carry no gradient, so that the label probe cannot see it. While it runs, what was pooled is therefore
added to what is unpooled by its indices: a tie like that of a residual sum.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_POOLS = frozenset(
    getattr(F, f"{kind}max_pool{n}d_with_indices")
    for kind in ("", "adaptive_", "fractional_")
    for n in (1, 2, 3)
    if hasattr(F, f"{kind}max_pool{n}d_with_indices")
)
_UNPOOLS = frozenset((F.max_unpool1d, F.max_unpool2d, F.max_unpool3d))


class TiedIndices(TorchFunctionMode):
    """While it is entered, unpooled maps hold a share of the maps whose indices they use."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by the `id` of the indices, which are kept with it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _POOLS:
            self.pooled[id(result[1])] = result
        elif func in _UNPOOLS:
            named = [kwargs.pop(name) for name in ("input", "indices") if name in kwargs]
            given: list[Any] = [*args, *named]
            x, indices, *rest = given
            if id(indices) in self.pooled:
                values = self.pooled[id(indices)][0].to(x)
                result = result + func(values, indices, *rest, **kwargs)
        return result
