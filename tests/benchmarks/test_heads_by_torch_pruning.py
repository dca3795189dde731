"""What Torch-Pruning's cuts of attention are called: right, wrong or failed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_pruning", reason="needs torch-pruning")

from benchmarks.coverage.heads_by_torch_pruning import attempt
from tests.support.attention import EXAMPLE, Block, Fixed, Fused


class Last(Fused):
    """Runs with any number of heads, and takes the last ones of those that there were for keys."""

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = super().split(x)
        return q, k.flip(1) * (1 + self.num_heads), v


@pytest.mark.parametrize(("kind", "outcome"), [(Fused, "right"), (Last, "wrong"), (Fixed, "failed")])
@pytest.mark.filterwarnings("ignore")
def test_outcomes(kind: type[Fused], outcome: str) -> None:
    torch.manual_seed(0)
    found = attempt(Block(kind()).eval(), EXAMPLE)
    assert found["outcome"] == outcome
    assert ("removed" in found) == (outcome != "failed")
