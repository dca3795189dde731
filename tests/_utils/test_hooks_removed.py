"""No hook outlives a call, not even where one could not be registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_, synaptic_strength
from ss_pruning.compensation.batchnorm import recalibrate_
from ss_pruning.compensation.folding import norms_behind
from ss_pruning.compensation.residual_sums import find_sums
from ss_pruning.graph import trace
from ss_pruning.graph.traced import TracedModel
from ss_pruning.importance.activation_stats import measure
from ss_pruning.profiling.macs import count_macs
from ss_pruning.surgery.plan import Plan


class Closed(nn.Conv2d):
    """Takes no hooks any more once it is told to; before that, so many."""

    left = 10**9

    def _counted(self) -> None:
        if Closed.left <= 0:
            raise TypeError("takes no hooks")
        Closed.left -= 1

    def register_forward_pre_hook(self, *args: Any, **options: Any) -> Any:
        self._counted()
        return super().register_forward_pre_hook(*args, **options)

    def register_forward_hook(self, *args: Any, **options: Any) -> Any:
        self._counted()
        return super().register_forward_hook(*args, **options)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Closed(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "trace": trace,
    "macs": count_macs,
    "strength": synaptic_strength,
    "statistics": lambda model, x: measure(model, trace(model, x), [x], None, ["0", "3", "6"]),
    "norms": lambda model, x: recalibrate_(model, TracedModel.of(model, x), Plan(), x),
    "sums": lambda model, x: find_sums(model, x, norms_behind(trace(model, x))),
    "prune": lambda model, x: prune_(model, x[:1], macs=0.7, calibration=x),
    "reconstruct": lambda model, x: prune_(
        model, x[:1], macs=0.7, allocation="global", compensation="reconstruct", calibration=x
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_hook_is_left_where_one_cannot_be_registered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Closed, "left", 10**9)
    CALLS[name](net(), x)
    registered = 10**9 - Closed.left
    for after in range(min(registered, 12)):
        model = net()
        monkeypatch.setattr(Closed, "left", after)
        with pytest.raises(Exception, match="takes no hooks"):
            CALLS[name](model, x)
        monkeypatch.setattr(Closed, "left", 10**9)
        assert hooks_of(model) == 0
