"""Fine-tuning in one process and in two: the same losses and the same cut, kills and disagreements survived.

Equality of one process and two needs a model whose images do not meet in a batch norm: one with layer norms, or with
frozen batch norms. Otherwise the statistics are those of each process's own images.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ss_pruning
import ss_pruning.sources.models
from ss_pruning.errors import InputError
from ss_pruning.importance.strength import kernel_powers
from ss_pruning.io.distributed import broadcast_plan, check_agreement, fingerprint
from ss_pruning.sparsity.masks import masks_of

pytest.importorskip("accelerate", reason="an optional extra: pip install 'ss-pruning[train]'")
pytest.importorskip("tensorboard", reason="an optional extra: pip install 'ss-pruning[train]'")
pytest.importorskip("timm", reason="an optional extra: pip install 'ss-pruning[train]'")
pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[train]'")

from accelerate.state import AcceleratorState

from examples import finetune_timm
from ss_pruning.integrations.finetuning import run as finetuning
from tests.support.killing import forks
from tests.support.labelled_images import write_labelled_images

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--size", "32", "--batch", "16", "--workers", "0", "--cpu", "--rate", "0.005")
PRUNED = ("--epochs", "3", "--prune-epoch", "1", "--macs", "0.6", "--sparsity", "0.3", "--penalty", "1e-4",
          "--distill", "0.5")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def here(data: Path, out: Path, *options: str) -> int:
    """The example in this process."""
    AcceleratorState._reset_state(True)
    return finetune_timm.main([*SHORT, *options, "--data", str(data), "--out", str(out)])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What errors said, without the panel around it."""
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def log_of(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "log.json").read_text()) if (out / "log.json").exists() else []


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.pt", weights_only=True)


# ---------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert here(data, out, "test_resnet", *PRUNED) == 0
    return out


def test_it_prunes_masks_and_goes_on(whole: Path) -> None:
    log, saved = log_of(whole), checkpoint(whole)
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    assert log[0]["penalty"] > 0 == log[1]["penalty"]
    assert saved["sparsified"]
    assert saved["masks"]
    small = ss_pruning.load(whole / "final.safetensors")
    assert ss_pruning.Plan.from_json(saved["plan"]) == small.ss_pruning_plan
    dense = ss_pruning.load(whole / "dense.safetensors")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    for path, mask in saved["masks"].items():  # two epochs later, what was masked is 0
        assert torch.equal(kernel_powers(small.get_submodule(path)).detach() > 0, mask), path
        assert not mask.all()
    assert list((whole / "tensorboard").glob("events*"))


@pytest.mark.parametrize("epoch", [2, 3])
def test_interrupted_it_ends_with_the_same_weights(
    epoch: int, whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the epoch that begins with the cut, and in the one after it."""
    plain = finetuning.Run.step

    def stops(self: Any, images: Any, labels: Any, step: int) -> Any:
        if step == self.steps * (epoch - 1) + 1:
            raise KeyboardInterrupt
        return plain(self, images, labels, step)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning.Run, "step", stops)
        assert here(data, tmp_path, "test_resnet", *PRUNED) == 130
    assert len(log_of(tmp_path)) == epoch - 1
    assert here(data, tmp_path, "test_resnet", *PRUNED) == 0
    first, second = checkpoint(whole), checkpoint(tmp_path)
    assert first["plan"] == second["plan"]
    assert first["log"] == second["log"]
    for part in ("masks", "model", "ema"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_loses_nothing_that_was_saved(
    kills: int, data: Path, tmp_path: Path
) -> None:
    """Each kill is followed by the same command; a run that gets to its end has the weights of an undisturbed one."""

    def command(out: Path) -> list[str]:
        return ["test_resnet", *SHORT, *PRUNED, "--data", str(data), "--out", str(out)]

    chance, out, number, ends = random.Random(0), tmp_path / "0", 0, 0
    with forks("examples.finetune_timm") as run:
        begin = time.monotonic()
        assert run(None, "examples.finetune_timm:main", command(tmp_path / "whole")) == 0
        seconds, whole = time.monotonic() - begin, checkpoint(tmp_path / "whole")
        while number < kills or not ends:
            saved = len(checkpoint(out)["log"]) if (out / "last.pt").is_file() else 0
            moment, begin = chance.uniform(0, 0.7 * seconds), time.monotonic()
            code = run(moment if number < kills else None, "examples.finetune_timm:main", command(out))
            assert code in (0, -signal.SIGKILL)
            if code == 0 and not saved:  # the first run of all took longer: it loaded what is loaded late
                seconds = min(seconds, time.monotonic() - begin)
            number += code != 0
            assert whole["log"][: len(log_of(out))] == log_of(out)
            if (out / "last.pt").is_file():
                state = checkpoint(out)
                assert len(state["log"]) >= saved
                assert state["log"] == whole["log"][: len(state["log"])]
                if state["sparsified"]:
                    assert state["plan"] == whole["plan"]
                    ss_pruning.load(out / "dense.safetensors")
            else:
                assert not saved
            if code == 0:
                first, second = (load_file(path / "final.safetensors") for path in (tmp_path / "whole", out))
                assert all(torch.equal(value, second[name]) for name, value in first.items())
                ends, out = ends + 1, tmp_path / str(ends + 1)


def test_a_pruned_file_goes_on_with_its_zeros(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ss_pruning.sources.models.build_model("timm:test_resnet,num_classes=3")
    ss_pruning.prune_(model, torch.zeros(1, 3, 32, 32), macs=0.7)
    with torch.no_grad():
        model.layer2[0].conv1.weight[:, 0] = 0
    ss_pruning.save(model, tmp_path / "pruned.safetensors", "timm:test_resnet,num_classes=3")
    options = (
        "test_resnet",
        "--epochs",
        "1",
        "--keep-zeros",
        "--weights",
        str(tmp_path / "pruned.safetensors"),
    )
    assert here(data, tmp_path, *options) == 0
    tuned = ss_pruning.load(tmp_path / "final.safetensors")
    assert tuned.ss_pruning_plan == model.ss_pruning_plan
    assert not torch.equal(tuned.layer2[0].conv1.weight, model.layer2[0].conv1.weight)
    assert not tuned.layer2[0].conv1.weight[:, 0].any()
    assert not masks_of(tuned)


def test_from_a_pruned_file_to_onnx(data: Path, tmp_path: Path) -> None:
    """What ss-prune prune wrote is named as the model; the dense weights teach; the result runs elsewhere."""
    runtime = pytest.importorskip("onnxruntime", reason="an optional extra: pip install 'ss-pruning[onnx]'")
    pytest.importorskip("onnxscript", reason="an optional extra: pip install 'ss-pruning[onnx]'")
    spec, dense, file = (
        "timm:test_resnet,num_classes=3",
        tmp_path / "dense.safetensors",
        tmp_path / "p.safetensors",
    )
    torch.manual_seed(0)
    model = ss_pruning.sources.models.build_model(spec)
    save_file(model.state_dict(), dense)
    ss_pruning.prune_(model, torch.zeros(1, 3, 32, 32), macs=0.6)
    ss_pruning.save(model, file, spec)
    options = ("--epochs", "1", "--teacher", str(dense), "--distill", "0.5", "--export", "onnx")
    assert here(data, tmp_path / "out", str(file), *options) == 0
    final = ss_pruning.load(tmp_path / "out" / "final.safetensors")
    assert final.ss_pruning_plan == model.ss_pruning_plan
    x = torch.randn(2, 3, 32, 32)
    session = runtime.InferenceSession(tmp_path / "out" / "final.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), final(x).detach(), rtol=1e-3, atol=1e-4)


def test_another_recipe_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here(data, tmp_path, "test_resnet", "--epochs", "1") == 0
    assert here(data, tmp_path, "test_resnet", "--epochs", "2") == 2
    assert "of a run with other options" in said(capsys)


def test_a_loss_that_is_not_finite_stops_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(data, tmp_path, "test_resnet", "--epochs", "1", "--rate", "1e30") == 2
    assert "the loss is nan in epoch 1: lower --rate" in said(capsys)
    assert not (tmp_path / "last.pt").exists()


def test_missing_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here(tmp_path, tmp_path / "out", "test_resnet") == 2
    assert "needs the folders train and val" in said(capsys)


def test_the_options_that_exclude_each_other_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--distill", "0.5"], ["--prune-epoch", "3"]):
        assert finetune_timm.main(["test_resnet", "--data", "nowhere", *options]) == 2
    text = said(capsys)
    assert "--prune-epoch needs --macs" in text
    assert "--distill needs a dense model" in text


# ---------------------------------------------------------------- plans in several processes


def cut(kept: tuple[int, ...]) -> ss_pruning.Plan:
    text = f'{{"format":1,"cuts":[{{"path":"0","side":"out","width":4,"kept":{list(kept)},"axis":0}}],'
    return ss_pruning.Plan.from_json(text + '"attributes":[],"biases":[]}')


def test_one_process_agrees_with_itself() -> None:
    plan, net = cut((0, 2)), nn.Sequential(nn.Conv2d(1, 4, 1))
    assert broadcast_plan(plan) == broadcast_plan(lambda: plan) == plan
    check_agreement(net)
    with pytest.raises(InputError, match="has to give a plan"):
        broadcast_plan(None)


def test_the_fingerprint_tells_plans_and_shapes_apart() -> None:
    nets = [nn.Sequential(nn.Conv2d(1, 4, 1)) for _ in range(4)]
    cut((0, 2)).apply_(nets[1])
    cut((0, 3)).apply_(nets[2])
    cut((0, 3)).apply_(nets[3])
    prints = [fingerprint(net) for net in nets]
    assert len(set(prints)) == 3
    assert prints[2] == prints[3]
    assert fingerprint(nets[0].double()) != prints[0]


DISAGREEING = """
import sys, time
import torch.distributed as dist
from torch import nn
from ss_pruning import Plan
from ss_pruning.io.distributed import broadcast_plan, check_agreement
from ss_pruning.errors import BudgetError, PlanError

def cut(*kept):
    text = '{"format":1,"cuts":[{"path":"0","side":"out","width":4,"kept":%s,"axis":0}],' % list(kept)
    return Plan.from_json(text + '"attributes":[],"biases":[]}')

def attempt(what, run):
    dist.barrier()
    begin = time.monotonic()
    try:
        found = run()
    except (BudgetError, PlanError) as error:
        found = f"{type(error).__name__}: {error}"
    print(f"{what}|{dist.get_rank()}|{found}|{time.monotonic() - begin:.1f}", file=sys.stderr, flush=True)

def fails():
    raise BudgetError("out of reach")

dist.init_process_group("gloo")
first = dist.get_rank() == 0
net = lambda: nn.Sequential(nn.Conv2d(1, 4, 1))
attempt("same", lambda: check_agreement(cut(0, 1).apply_(net())))
attempt("plan", lambda: check_agreement(cut(0, 1 if first else 2).apply_(net())))
attempt("shape", lambda: check_agreement(net() if first else cut(0, 1).apply_(net())))
attempt("sent", lambda: broadcast_plan(cut(0, 3) if first else None).cuts[0].kept)
attempt("failed", lambda: broadcast_plan(fails))
dist.destroy_process_group()
"""


def torchrun(*arguments: str, processes: int = 2, restarts: int = 0) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
    return [*launcher, "--nproc-per-node", str(processes), "--max-restarts", str(restarts), *arguments]


def environment() -> dict[str, str]:
    # Not shared: restarted workers might find addresses of dead ones in the launcher's store (docs/distributed.md).
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return {**os.environ, **store, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_process_with_another_plan_is_an_error_in_all(tmp_path: Path) -> None:
    script = tmp_path / "disagreeing.py"
    script.write_text(DISAGREEING)
    done = subprocess.run(
        torchrun(str(script)), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = {}
    for line in done.stderr.splitlines():
        if line.count("|") == 3:
            what, rank, found, seconds = line.split("|")
            said[what, int(rank)] = found
            assert what == "same" or float(seconds) < 5  # the first one loads what cuts layers
    assert said["same", 0] == said["same", 1] == "None"
    assert said["sent", 0] == said["sent", 1] == "(0, 3)"
    for what in ("plan", "shape"):
        for rank in (0, 1):
            assert said[what, rank].startswith("PlanError: the model of process 1 is not that of process 0")
    assert said["failed", 0] == "BudgetError: out of reach"
    assert said["failed", 1] == "PlanError: process 0 could not make a plan: BudgetError: out of reach"


# ---------------------------------------------------------------- training in two processes


def accelerate_launch(*arguments: str) -> list[str]:
    """Two processes on CPU: the script is told so; `accelerate launch --cpu` would start one without MPI."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    settings = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    return [*launcher, *settings, "--main_process_port", "0", *arguments]


def launch(
    data: Path, out: Path, *options: str, restarts: int = 0, accelerate: bool = False
) -> subprocess.Popen[str]:
    script = ("-m", "examples.finetune_timm", *SHORT, *options, "--data", str(data), "--out", str(out))
    return subprocess.Popen(
        accelerate_launch(*script) if accelerate else torchrun(*script, restarts=restarts),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("accelerate", "model"),
    [(False, ("test_convnext",)), (True, ("test_resnet", "--freeze-norms"))],
    ids=["torchrun, layer norms", "accelerate launch, frozen batch norms"],
)
def test_two_processes_do_what_one_does(
    accelerate: bool, model: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    two = launch(data, tmp_path / "two", *model, *PRUNED, accelerate=accelerate)
    said, _ = two.communicate()
    assert two.returncode == 0, said
    assert "2 process(es)" in said
    cuts = re.findall(r"process (\d) was cut to (\w+)", said)
    assert sorted(rank for rank, _ in cuts) == ["0", "1"]
    assert len({digest for _, digest in cuts}) == 1
    assert here(data, tmp_path / "one", *model, *PRUNED) == 0
    first, second = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert first["plan"] == second["plan"]
    assert all(torch.equal(mask, second["masks"][path]) for path, mask in first["masks"].items())
    for one, both in zip(first["log"], second["log"], strict=True):
        assert both == pytest.approx(one, rel=1e-5)
    for name, value in first["ema"].items():
        torch.testing.assert_close(second["ema"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_rank_is_restarted_and_ends_with_the_same_metrics(data: Path, tmp_path: Path) -> None:
    """Killed once before the cut and once after it."""
    psutil = pytest.importorskip("psutil", reason="comes with accelerate")
    whole = launch(data, tmp_path / "whole", "test_resnet", *PRUNED)
    said, _ = whole.communicate()
    assert whole.returncode == 0, said
    out = tmp_path / "killed"
    run = launch(data, out, "test_resnet", *PRUNED, restarts=2)
    for epoch in (1, 2):
        while len(log_of(out)) < epoch and run.poll() is None:
            time.sleep(0.02)
        children = psutil.Process(run.pid).children()
        (victim,) = (child for child in children if child.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
    said, _ = run.communicate()
    assert run.returncode == 0, said
    assert said.count("going on after epoch") == 2
    assert log_of(out) == log_of(tmp_path / "whole")
    first, second = checkpoint(tmp_path / "whole"), checkpoint(out)
    assert first["plan"] == second["plan"]
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
