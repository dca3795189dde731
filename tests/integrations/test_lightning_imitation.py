"""The imitation loss in Lightning: a term of the loss like any other, before and after the network is pruned."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's own imports warn of Python's
    pl = pytest.importorskip(
        "pytorch_lightning", reason="an optional extra: pip install 'ss-pruning[lightning]'"
    )

from pytorch_lightning.strategies import FSDPStrategy

import ss_pruning
from ss_pruning.errors import InputError
from ss_pruning.integrations.lightning.callback import StrengthPruning
from ss_pruning.integrations.lightning.imitation import Imitation
from ss_pruning.surgery.plan import plan_of
from tests.integrations.test_lightning import EXAMPLE, Classifier, trainer
from tests.support.snapshot import snapshot


def teacher() -> nn.Module:
    """Weights that the networks of the tests do not have."""
    net: nn.Module = Classifier().model
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
            )
    return net


def pruned(kind: type[Classifier] = Classifier) -> Classifier:
    module = kind()
    ss_pruning.prune_(module.model, EXAMPLE, ratio=0.25)
    return module


def relative(x: Tensor, y: Tensor) -> Tensor:
    return ((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()


class Dict(Classifier):
    """Returns more than a number."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
        return {"loss": super().training_step(batch, index), "more": 1}


@pytest.mark.parametrize("kind", [Classifier, Dict])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_is_a_term_of_the_loss(
    accumulated: int, kind: type[Classifier], images: DataLoader[Any], tmp_path: Path
) -> None:
    """Against a loop by hand, on the maps ahead of the pooling."""
    dense, module, other = teacher().train(), pruned(kind), pruned()
    before = {**snapshot(dense), "rng": None}  # Lightning draws a number
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulated}
    callback = Imitation(dense, EXAMPLE, weight=0.5)
    run = trainer(tmp_path, callback, **options)
    run.fit(module, images)
    assert {**snapshot(dense), "rng": None} == before
    assert run.logged_metrics["imitation"] > 0
    assert "training_step" not in vars(module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())

    sgd, guide = other.configure_optimizers(), copy.deepcopy(dense).eval()
    kept = next(cut.kept for cut in plan_of(other.model).cuts if (cut.path, cut.side) == ("3", "out"))
    other.train()
    for _ in range(2):
        for number, (x, labels) in enumerate(images):
            maps = other.model[:6](x)
            task = nn.functional.cross_entropy(other.model[6:](maps), labels)
            with torch.no_grad():
                wanted = guide[:6](x)[:, list(kept)]
            ((task + 0.5 * relative(maps, wanted)) / accumulated).backward()
            if (number + 1) % accumulated == 0:
                sgd.step()
                sgd.zero_grad()
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_it_goes_on_when_the_network_is_pruned(images: DataLoader[Any], tmp_path: Path) -> None:
    """In whichever order both callbacks are given."""
    found = []
    for turn in (1, -1):
        prune, seen = StrengthPruning(EXAMPLE, epoch=1, macs=0.6), Seen()
        both = [Imitation(teacher(), EXAMPLE), prune][::turn]
        module = Classifier()
        trainer(tmp_path, *both, seen, max_epochs=2).fit(module, images)
        assert prune.plan.cuts
        assert seen.distances[1] != seen.distances[0]
        found.append(module.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_under_mixed_precision(images: DataLoader[Any], tmp_path: Path) -> None:
    """Nearly what single precision gives; relative errors are computed in that in any case."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module, seen = pruned(), Seen()
        both = Imitation(teacher(), EXAMPLE), seen
        trainer(tmp_path, *both, max_epochs=1, precision=precision).fit(module, images)
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        found += seen.distances
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.05)


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.distances: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.distances.append(float(trainer.logged_metrics["imitation"]))


def test_a_step_without_a_loss_is_skipped_as_ever(images: DataLoader[Any], tmp_path: Path) -> None:
    class Skipping(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
            return super().training_step(batch, index) if index else None

    module = pruned(Skipping)
    trainer(tmp_path, Imitation(teacher(), EXAMPLE), max_epochs=1).fit(module, images)
    assert len(module.losses) == 1


def test_what_it_refuses(images: DataLoader[Any], tmp_path: Path) -> None:
    def fit(module: Any, **options: Any) -> None:
        trainer(tmp_path, Imitation(teacher(), EXAMPLE, **options)).fit(module, images)

    class ByHand(Classifier):
        automatic_optimization = False

    class Elsewhere(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return self.model[0].weight.square().sum()

    with pytest.raises(InputError, match="ByHand optimises by hand"):
        fit(ByHand())
    with pytest.raises(InputError, match="network='net' is no module of Classifier"):
        fit(Classifier(), network="net")
    module = Elsewhere()
    with pytest.raises(InputError, match="knows no feature maps"):
        fit(module)

    class Sharded:
        strategy = FSDPStrategy()

    with pytest.raises(InputError, match="under FSDPStrategy cannot be compared"):
        Imitation(teacher(), EXAMPLE).setup(Sharded(), Classifier(), "fit")  # type: ignore[arg-type]
