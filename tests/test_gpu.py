"""On a GPU: the same cut as on a CPU, in place, and nothing of the user's is moved. Skipped where there is no GPU.

`python -m pytest tests/test_gpu.py` on a machine with one.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

pytest.importorskip("typer", reason="an optional extra: pip install 'ss-pruning[cli]'")

from typer.testing import CliRunner

import ss_pruning
from ss_pruning import SyntheticImages, prune_
from ss_pruning.cli.app import app
from ss_pruning.compensation.synthetic_data import synthesize
from ss_pruning.config import METHODS, Allocation
from ss_pruning.errors import BudgetError, NothingToPruneError
from tests.integrations.test_torch_pruning import pruner_of
from tests.support import oracle
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, ZOO, Net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = torch.device("cuda")


def copies(net: Net, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """The same model on the CPU and on the GPU, and inputs on the CPU."""
    model = net.make().to(dtype)
    return model, copy.deepcopy(model).to(GPU), tuple(x.to(dtype) for x in net.inputs)


def on_gpu(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(GPU) for x in inputs)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def assert_alike(there: nn.Module, here: nn.Module, inputs: tuple[Tensor, ...], within: float) -> None:
    """The same widths, all of it on the GPU, the same outputs."""
    assert shapes(there) == shapes(here)
    assert {t.device.type for t in there.state_dict().values()} <= {"cuda"}
    with torch.no_grad():
        pairs = zip(oracle.tensors(there(*on_gpu(inputs))), oracle.tensors(here(*inputs)), strict=True)
        for found, wanted in pairs:
            torch.testing.assert_close(found.cpu(), wanted, atol=within, rtol=within)


@pytest.mark.parametrize("net", ZOO, ids=lambda net: net.name)
def test_the_cut_is_that_of_a_cpu(net: Net) -> None:
    here, there, inputs = copies(net)
    try:
        prune_(here, inputs, ratio=0.4, importance=tp.importance.GroupMagnitudeImportance(p=2))
    except NothingToPruneError:
        pytest.skip("nothing to prune")
    prune_(there, on_gpu(inputs), ratio=0.4, importance=tp.importance.GroupMagnitudeImportance(p=2))
    assert_alike(there, here, inputs, 1e-7)  # CUDA's hard swish multiplies by a sixth in single precision


def loss(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    """Share of the variance of the dense net's output that is lost."""
    with torch.no_grad():
        wanted = dense(images)
        return float((model(images) - wanted).square().mean() / wanted.var(0).mean())


@pytest.mark.parametrize(
    "name", ["residual_chain", "dense", "shuffle_unit", "separable", "squeeze_excite_conv"]
)
@pytest.mark.parametrize("method", METHODS)
def test_compensation_is_as_good_as_on_a_cpu(name: str, method: Any) -> None:
    """Not the same: output error is measured and regressions are solved in single precision, and widths follow them."""
    net = BY_NAME[name]
    here, there, inputs = copies(net)
    dense = net.make().double()
    images = torch.randn(
        64, *net.shapes[0][1:], dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    options: dict[str, Any] = {"macs": 0.6, "compensation": method}
    prune_(here, inputs, calibration=images, **options)
    prune_(there, on_gpu(inputs), calibration=images.to(GPU), **options)
    assert {t.device.type for t in there.state_dict().values()} == {"cuda"}
    assert loss(there.cpu(), dense, images) == pytest.approx(loss(here, dense, images), rel=0.1)


def test_bfloat16_and_channels_last_stay() -> None:
    net = BY_NAME["residual_chain"]
    model, reference = (net.make().to(GPU) for _ in range(2))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(32, *net.shapes[0][1:], generator=torch.Generator().manual_seed(3)).to(GPU)
    prune_(model, images[:2].bfloat16(), macs=0.6, compensation="reconstruct", calibration=images.bfloat16())
    prune_(reference, images[:2], macs=0.6, compensation="reconstruct", calibration=images)
    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    with torch.no_grad():
        found, wanted = model(images.bfloat16()).float(), reference(images)
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_nothing_else_changes(method: Any) -> None:
    """Neither the random numbers of the GPU, nor its memory, nor, after a failure, the model."""
    net = BY_NAME["residual_chain"]
    x = net.inputs[0].to(GPU)
    images = torch.randn(32, *net.shapes[0][1:]).to(GPU)
    prune_(net.make().to(GPU), x, macs=0.6, compensation=method, calibration=images)  # loads what CUDA keeps
    gc.collect()
    model = net.make().to(GPU)
    random, before, held = torch.cuda.get_rng_state(), snapshot(model), torch.cuda.memory_allocated()
    with pytest.raises(BudgetError):
        prune_(model, x, macs=1e-6, compensation=method, calibration=images)
    assert snapshot(model) == before
    gc.collect()  # the error knew where it came from
    assert torch.cuda.memory_allocated() == held
    prune_(model, x, macs=0.6, compensation=method, calibration=images)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    gc.collect()
    assert torch.cuda.memory_allocated() <= held


def test_synthetic_images_are_made_there() -> None:
    net = BY_NAME["residual_chain"]
    few = SyntheticImages(16, 5)
    found = synthesize(net.make().to(GPU), net.inputs[0].to(GPU), few)
    assert found.device.type == "cuda"
    assert bool(found.isfinite().all())
    here = synthesize(net.make(), net.inputs[0], few)
    torch.testing.assert_close(found.cpu(), here, atol=1e-2, rtol=1e-2)


def test_a_latency_target_is_measured_there() -> None:
    """A wide net and a large batch: time goes into arithmetic, not into starting kernels."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval().to(GPU)
    x = torch.randn(64, 3, 224, 224, device=GPU)
    report = prune_(model, x[:1], latency=0.7, allocation=Allocation(latency_inputs=x))
    assert report.latency_ratio is not None
    assert report.latency_ratio <= 0.7 * 1.05


def test_torch_pruning_takes_our_importance_there() -> None:
    net = BY_NAME["residual_chain"]
    here, there, inputs = copies(net, torch.float32)
    pruner_of(here, inputs[0]).step()
    pruner_of(there, inputs[0].to(GPU)).step()
    assert shapes(there) == shapes(here)


def test_a_file_is_read_and_written(tmp_path: Path) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make().to(GPU)
    x = net.inputs[0].to(GPU)
    prune_(model, x, macs=0.6)
    ss_pruning.save(model, tmp_path / "small.safetensors")
    again = ss_pruning.load(tmp_path / "small.safetensors", net.make).to(GPU).eval()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_the_command_line_takes_the_gpu_by_itself(tmp_path: Path) -> None:
    words = ["prune", "demo:digits", "--data", "digits", "--macs", "0.6", "--json"]
    result = CliRunner().invoke(
        app, [*words, "--compensation", "reconstruct", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "cuda" in (tmp_path / "out" / "report.json").read_text()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_recovery_on_the_gpu(dtype: Any) -> None:
    from ss_pruning.sources.demo import digits_resnet

    torch.manual_seed(0)
    dense = digits_resnet().eval().to(GPU)
    model, images = copy.deepcopy(dense), torch.randn(128, 1, 8, 8)
    prune_(model, images[:1].to(GPU), macs=0.4)
    report = ss_pruning.recover_(model, dense, images, steps=40, settings=ss_pruning.Recovery(dtype=dtype))
    assert report.after.error <= report.before.error
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
