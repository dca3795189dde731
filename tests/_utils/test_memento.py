"""Whatever a call does, and wherever it fails, what it does not mean to change about a model is as it was."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import ss_pruning
from ss_pruning._utils.outputs import tensors_in
from ss_pruning.errors import BudgetError, NothingToPruneError, SSPruningError
from ss_pruning.integrations.torch_pruning.pruner import GraphPruner
from ss_pruning.io.export import export
from ss_pruning.profiling.latency import measure_latency, peak_memory
from ss_pruning.profiling.macs import count_macs
from ss_pruning.sparsity.compaction import compact_
from ss_pruning.sparsity.penalty import StrengthPenalty
from tests.support.odd_models import TRIP, odd_model, state_of

MODELS = 100
Call = Callable[[nn.Module, Tensor], Any]


def images(x: Tensor) -> Tensor:
    return torch.randn(10, *x.shape[1:], generator=torch.Generator().manual_seed(1))


def saved(model: nn.Module, x: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ss_pruning.save(model, Path(folder) / "model.safetensors")


def exported(model: nn.Module, x: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "model.pt2", x)


#: Calls that change nothing.
LOOKS: dict[str, Call] = {
    "trace": ss_pruning.graph.trace,
    "strength": ss_pruning.synaptic_strength,
    "strength on noise": lambda model, x: ss_pruning.synaptic_strength(model, x, "gaussian"),
    "macs": count_macs,
    "latency": lambda model, x: measure_latency([model], x, rounds=(1, 1)),
    "memory": peak_memory,
    "penalty": lambda model, x: StrengthPenalty(model, x)(),
    "graph": lambda model, x: GraphPruner(model, x, ss_pruning.SynapticImportance(example_inputs=x)),
    "save": saved,
}
#: Calls that cut.
CUTS: dict[str, Call] = {
    "prune": lambda model, x: ss_pruning.prune_(model, x, ratio=0.4),
    "mean": lambda model, x: ss_pruning.prune_(model, x, ratio=0.4, compensation="mean"),
    "linear": lambda model, x: ss_pruning.prune_(
        model, x, ratio=0.3, compensation="linear", calibration=images(x), allocation="global"
    ),
    "reconstruct": lambda model, x: ss_pruning.prune_(
        model, x, ratio=0.3, compensation="reconstruct", calibration=images(x)
    ),
    "compact": compact_,
    "step": lambda model, x: GraphPruner(model, x, ss_pruning.SynapticImportance(example_inputs=x)).step(),
}


def attempt(call: Call, model: nn.Module, x: Tensor, error: type[BaseException]) -> bool:
    """Whether it came to its end; what it may raise is our own error, or the one that was planted."""
    try:
        call(model, x)
    except (SSPruningError, error):
        return False
    finally:
        TRIP.arm(0)
    return True


@pytest.mark.parametrize("seed", range(MODELS))
def test_what_only_looks_changes_nothing(seed: int) -> None:
    model, x = odd_model(seed)
    before = state_of(model)
    for name, call in random.Random(seed).sample(sorted(LOOKS.items()), 3):
        attempt(call, model, x, SSPruningError)
        assert state_of(model) == before, name


class Averaged(nn.Module):
    """Two nets: in training one runs and the other, which runs otherwise, moves towards it."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = (
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.teacher(x)
        for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            ours.data.lerp_(theirs.data, 0.5)
        return self.student(x)


@pytest.mark.parametrize("training", [False, True])
def test_weights_that_move_in_training_alone_are_put_back(training: bool) -> None:
    model, x = Averaged().train(training), torch.randn(2, 3, 8, 8)
    before = state_of(model)
    for name in sorted(LOOKS):
        attempt(LOOKS[name], model, x, SSPruningError)
        assert state_of(model) == before, name


def test_looking_at_weights_does_not_move_a_spectral_norm_that_trains() -> None:
    """In training each look is a step of its power iteration."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
    )
    spectral_norm(model[2])
    x = torch.randn(2, 3, 8, 8)
    before = state_of(model)
    for name in sorted(LOOKS.keys() - {"penalty"}):  # whose gradient is that of the weight as it trains
        attempt(LOOKS[name], model, x, SSPruningError)
        assert state_of(model) == before, name
    held = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ss_pruning.prune_(model, x, ratio=0.4)
    assert all(torch.equal(held[name], buffer) for name, buffer in model.named_buffers())


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("training", [False, True])
def test_scripted_parts_keep_their_train_flag(training: bool) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(8), nn.Hardswish()))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1), scripted), nn.Conv2d(8, 4, 1))
    model.train(training)
    count_macs(model, torch.randn(2, 3, 8, 8))
    assert all(module.training == training for module in scripted.modules())


@pytest.mark.parametrize("seed", range(MODELS))
def test_a_call_that_fails_anywhere_changes_nothing(seed: int) -> None:
    draw = random.Random(seed)
    name, call = draw.choice(sorted((LOOKS | CUTS).items()))
    model, x = odd_model(seed)
    attempt(call, model, x, SSPruningError)
    passes = max(TRIP.passes, 1)
    for at in {1, passes, draw.randint(1, passes), draw.randint(1, passes)}:
        for error in (RuntimeError, KeyboardInterrupt):
            model, x = odd_model(seed)
            before = state_of(model)
            TRIP.arm(at, error)
            if not attempt(call, model, x, error):
                assert state_of(model) == before, (name, at, error)


def stages_of(seed: int, at: int) -> int:
    """Stages that a cut, drawn by the seed, goes through; interrupted at the one of that number, it changes nothing."""
    options: dict[str, Any] = random.Random(seed).choice(
        [{}, {"compensation": "mean"}, {"compensation": "reconstruct", "calibration": 1}]
    )
    stages: list[str] = []

    def interrupted(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        if len(stages) == at:
            raise KeyboardInterrupt

    model, x = odd_model(seed)
    before = state_of(model)
    given = options | ({"calibration": images(x)} if "calibration" in options else {})
    try:
        ss_pruning.prune_(model, x, ratio=0.4, progress=interrupted, **given)
        assert at not in range(1, len(stages) + 1), "the interrupt was swallowed"
    except (NothingToPruneError, BudgetError, KeyboardInterrupt):
        assert state_of(model) == before, stages
    return len(stages)


@pytest.mark.parametrize("seed", range(0, MODELS, 2))
def test_a_cut_interrupted_at_some_stages_changes_nothing(seed: int) -> None:
    stages = stages_of(seed, at=0)
    for at in {1, stages, *random.Random(seed).sample(range(1, stages + 1), 4)}:
        assert stages_of(seed, at) >= at


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, MODELS, 2))
def test_a_cut_interrupted_at_any_stage_changes_nothing(seed: int) -> None:
    for at in range(1, stages_of(seed, at=0) + 1):
        assert stages_of(seed, at) >= at


@pytest.mark.parametrize("seed", range(MODELS))
def test_a_cut_model_works_and_keeps_its_habits(seed: int) -> None:
    """It runs, on other sizes and in training too, in its own precision; nothing of our passes is left in it."""
    model, x = odd_model(seed)
    draw = random.Random(seed)
    classes = (model.num_classes, model.kind, model.training, model.first.weight.requires_grad)
    tables = {path: (set(vars(m)), set(m._buffers)) for path, m in model.named_modules()}
    try:
        draw.choice(sorted(CUTS.items()))[1](model, x)
    except (NothingToPruneError, BudgetError):
        return
    assert classes == (model.num_classes, model.kind, model.training, model.first.weight.requires_grad)
    vars(model).pop("ss_pruning_plan", None)
    assert tables == {path: (set(vars(m)), set(m._buffers)) for path, m in model.named_modules()}
    assert all(t.dtype in (torch.float32, torch.long) for t in (*model.parameters(), *model.buffers()))
    for side in (10, 14):
        for output in tensors_in(model(torch.randn(2, 3, side, side))).values():
            assert output.dtype in (torch.float32, torch.complex64, torch.long)
            assert output.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LOOKS | CUTS))
@pytest.mark.parametrize("seed", range(12))
def test_failing_at_each_pass_changes_nothing(seed: int, name: str) -> None:
    call = (LOOKS | CUTS)[name]
    at, ended = 0, False
    while not ended and at < 200:
        at += 1
        model, x = odd_model(seed)
        before = state_of(model)
        TRIP.arm(at)
        ended = attempt(call, model, x, RuntimeError)
        if not ended:
            assert state_of(model) == before, at


@pytest.mark.parametrize("seed", range(0, MODELS, 10))
def test_exporting_changes_nothing(seed: int) -> None:
    model, x = odd_model(seed)
    before = state_of(model)
    attempt(exported, model, x, SSPruningError)
    assert state_of(model) == before


@pytest.mark.parametrize("seed", range(0, MODELS, 5))
def test_nnis_pruner_leaves_nothing_behind(seed: int) -> None:
    """Scores are taken by running the model; wrappers are NNI's business, and it takes them off again."""
    nni = pytest.importorskip("ss_pruning.integrations.nni.pruner", reason="needs nni")
    model, x = odd_model(seed)
    habits = [(vars(m).copy(), dict(m._buffers)) for m in (model.before, model.after)]
    random_numbers = torch.get_rng_state().tolist()
    try:
        pruner = nni.SynapticStrengthPruner(
            model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], x, statistics="gaussian"
        )
        pruner.compress()
        pruner.unwrap_model()
    except SSPruningError:
        pass
    assert torch.get_rng_state().tolist() == random_numbers
    for module, (attributes, buffers) in zip((model.before, model.after), habits, strict=True):
        assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == {
            k: v for k, v in attributes.items() if not k.startswith("_")
        }
        assert module._buffers.keys() == buffers.keys()
        assert all(module._buffers[name] is buffer for name, buffer in buffers.items())
