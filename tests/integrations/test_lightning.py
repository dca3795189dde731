"""The Lightning callback: penalty, cut, masks, and checkpoints from before and after the cut."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's own imports warn of Python's
    pl = pytest.importorskip(
        "pytorch_lightning", reason="an optional extra: pip install 'ss-pruning[lightning]'"
    )

from pytorch_lightning.strategies import FSDPStrategy

from ss_pruning.errors import InputError
from ss_pruning.importance.strength import kernel_powers
from ss_pruning.integrations.lightning.callback import StrengthPruning
from ss_pruning.sparsity.masks import masks_of
from ss_pruning.sparsity.penalty import StrengthPenalty

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    given = {"max_epochs": 2, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), **given,
    )  # fmt: skip


def test_it_prunes_masks_and_trains_on(images: DataLoader[Any], tmp_path: Path) -> None:
    module = Classifier()
    prune = StrengthPruning(EXAMPLE, weight=1e-3, epoch=1, macs=0.7, sparsity=0.3)
    run = trainer(tmp_path, prune)
    run.fit(module, images)
    assert prune.pruned
    assert prune.plan.cuts
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in Classifier().parameters())
    masks = masks_of(module.model)
    assert masks
    for path, mask in masks.items():
        assert torch.equal(kernel_powers(module.model.get_submodule(path)) > 0, mask)
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}
    assert len(run.optimizers[0].state) == len(trained)  # new momenta, of the new parameters
    assert "on_load_checkpoint" not in vars(module)


def test_the_fast_run_of_lightning_works(images: DataLoader[Any], tmp_path: Path) -> None:
    prune = StrengthPruning(EXAMPLE, weight=1e-3, epoch=0, macs=0.7)
    trainer(tmp_path, prune, fast_dev_run=True).fit(Classifier(), images)
    assert prune.pruned


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_penalty_is_a_term_of_the_loss(accumulated: int, images: DataLoader[Any], tmp_path: Path) -> None:
    """Against a loop by hand; with gradients of two batches accumulated it still counts once."""
    module, other, weight = Classifier(), Classifier(), 1e-2
    trainer(
        tmp_path,
        StrengthPruning(EXAMPLE, weight=weight, warm_up_steps=4),
        max_epochs=3,
        accumulate_grad_batches=accumulated,
    ).fit(module, images)
    sgd, penalty = other.configure_optimizers(), StrengthPenalty(other.model, EXAMPLE)
    other.train()
    step = 0
    for _ in range(3):
        for number, batch in enumerate(images):
            (other.training_step(batch, 0) / accumulated).backward()
            if (number + 1) % accumulated == 0:
                (weight * min(1, (step + 1) / 4) * penalty()).backward()
                sgd.step()
                sgd.zero_grad()
                step += 1
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.filterwarnings("ignore:epoch=1 is never reached")  # in the first part
@pytest.mark.parametrize("after", [1, 2])
def test_a_checkpoint_goes_on(after: int, images: DataLoader[Any], tmp_path: Path) -> None:
    """Saved before the cut, or after it; the end is that of a run in one go."""

    def prune() -> StrengthPruning:
        return StrengthPruning(EXAMPLE, weight=1e-3, epoch=1, macs=0.7, sparsity=0.3)

    whole = Classifier()
    trainer(tmp_path, prune(), max_epochs=4).fit(whole, images)
    first = trainer(tmp_path, prune(), max_epochs=after, enable_checkpointing=True)
    first.fit(Classifier(), images)
    first.save_checkpoint(tmp_path / "part.ckpt")
    module, callback = Classifier(), prune()
    trainer(tmp_path, callback, max_epochs=4).fit(module, images, ckpt_path=tmp_path / "part.ckpt")
    assert callback.pruned
    expected, found = whole.state_dict(), module.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert whole.losses[-2:] == module.losses[-2:]


def test_it_says_what_is_missing(images: DataLoader[Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give an epoch and what to prune then"):
        StrengthPruning(EXAMPLE, epoch=1)
    with pytest.raises(InputError, match="network='net' is no module of Classifier"):
        trainer(tmp_path, StrengthPruning(EXAMPLE, network="net", weight=1.0)).fit(Classifier(), images)
    short = trainer(tmp_path)
    with pytest.warns(UserWarning, match="epoch=2 is never reached in max_epochs=2: nothing is pruned"):
        StrengthPruning(EXAMPLE, epoch=2, macs=0.7).setup(short, Classifier(), "fit")


def test_sharded_models_are_refused() -> None:
    class Sharded:
        strategy = FSDPStrategy()

    with pytest.raises(InputError, match="under FSDPStrategy cannot be pruned while it trains"):
        StrengthPruning(EXAMPLE, weight=1.0).setup(Sharded(), Classifier(), "fit")  # type: ignore[arg-type]


# ---------------------------------------------------------------- two processes

ROOT = Path(__file__).resolve().parents[2]
#: Frozen batch norms: images do not meet in them, so that two processes do what one does.
DISTRIBUTED = """
import os
import sys
import warnings

warnings.simplefilter("ignore")
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ss_pruning.integrations.lightning.callback import StrengthPruning
from ss_pruning.integrations.lightning.imitation import Imitation
from tests.integrations.test_lightning import EXAMPLE, Classifier, trainer
from tests.integrations.test_lightning_imitation import teacher


class Frozen(Classifier):
    def on_train_batch_start(self, batch, index):
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()


torch.set_num_threads(1)
out, devices = sys.argv[1], int(sys.argv[2])
pixels = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
dataset = TensorDataset(pixels, torch.arange(32) % 3)
# Lightning's own sampler would shuffle. Its first process is started by hand, without a LOCAL_RANK.
part = DistributedSampler(dataset, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
images = DataLoader(dataset, batch_size=16 // devices, sampler=part)


def fit(epochs, ckpt_path=None):
    module, callback = Frozen(), StrengthPruning(EXAMPLE, weight=1e-2, epoch=1, macs=0.7, sparsity=0.3)
    strategy = {"strategy": "ddp" if devices > 1 else "auto", "use_distributed_sampler": False}
    both = callback, Imitation(teacher(), EXAMPLE, weight=0.5)
    run = trainer(out, *both, max_epochs=epochs, devices=devices, **strategy)
    run.fit(module, images, ckpt_path=ckpt_path)
    return run, module, callback


first, _, _ = fit(2)
first.save_checkpoint(f"{out}/part.ckpt")
again, continued, _ = fit(3, f"{out}/part.ckpt")
run, module, callback = fit(3)
trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
assert trained == {id(p) for p in module.parameters()}
state = {
    "strategy": type(run.strategy).__name__,
    "plan": callback.plan.to_json(),
    "model": module.state_dict(),
    "continued": continued.state_dict(),
}
torch.save(state, f"{out}/rank{run.global_rank}of{run.world_size}.pt")
"""


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_prune_alike_and_do_what_one_does(tmp_path: Path) -> None:
    """Penalty, imitation, masks, cut and a checkpoint from after it, under DistributedDataParallel on CPU."""
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        command = [sys.executable, str(script), str(tmp_path), str(devices)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    alone, first, second = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in ("0of1", "0of2", "1of2")
    )
    assert first["strategy"] == second["strategy"] == "DDPStrategy"
    assert first["plan"] == second["plan"] == alone["plan"]
    assert '"kept"' in first["plan"]
    for run in ("model", "continued"):
        assert equal(first[run], second[run])
    assert equal(first["model"], first["continued"])
    assert any(name.endswith("mask") for name in first["model"])
    assert first["model"].keys() == alone["model"].keys()
    for name, value in alone["model"].items():
        torch.testing.assert_close(first["model"][name], value)
