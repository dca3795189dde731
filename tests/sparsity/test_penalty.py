"""The penalty on strengths, against plain loops and finite differences."""

from __future__ import annotations

import math
import os
import socket
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import prune_, synaptic_strength
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph import trace
from ss_pruning.graph.layers import groups_of
from ss_pruning.importance.strength import kernel_powers
from ss_pruning.sparsity.masks import mask_, masks_of
from ss_pruning.sparsity.penalty import StrengthPenalty, concentration, strength_penalty, warm_up
from tests.support import oracle
from tests.support.zoo import BY_NAME


@pytest.mark.parametrize(
    "name",
    ["plain", "residual", "dense", "grouped", "separable", "transposed_grouped", "shared", "flattened"],
)
def test_penalty_matches_plain_loops(name: str) -> None:
    net = BY_NAME[name]
    model = net.make()
    expected = 0.0
    for path, sources in net.sources.items():
        layer = model.get_submodule(path)
        scales = oracle.variances(model, net.calls.get(path, [sources]))
        expected += sum(s for row in oracle.strength(layer, scales) for s in row)
    assert strength_penalty(model, trace(model, net.example)).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_right() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2)).double()
    connectivity = trace(model, torch.zeros(1, 1, 4, 4))
    names = ["0.weight", "1.weight", "3.weight"]

    def penalty(*tensors: torch.Tensor) -> torch.Tensor:
        twin = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2)).double()
        for name, tensor in zip(names, tensors, strict=True):
            module, _, attribute = name.rpartition(".")
            del twin.get_submodule(module)._parameters[attribute]
            setattr(twin.get_submodule(module), attribute, tensor)
        return strength_penalty(twin, connectivity)

    generator = torch.Generator().manual_seed(0)
    start = dict(model.named_parameters())
    values = [torch.randn(start[n].shape, generator=generator).double().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(penalty, values)


def test_dead_synapses_get_no_gradient() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight[0] = 0
        model[0].weight[2] = 0
    strength_penalty(model, trace(model, torch.zeros(2, 3))).backward()
    assert model[1].weight.grad[0].tolist() == [0, 0, 0]
    assert model[1].weight.grad.isfinite().all()
    assert model[0].weight.grad.isfinite().all()


def test_only_the_layers_asked_for_count() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    connectivity = trace(model, net.example)
    parts = [strength_penalty(model, connectivity, [path]).item() for path in net.sources]
    assert strength_penalty(model, connectivity).item() == pytest.approx(sum(parts), rel=1e-6)
    assert strength_penalty(model, connectivity, []).item() == 0


def conv_bn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, bias=False),
            nn.BatchNorm2d(5),
        ),
        *(nn.ReLU(), nn.Conv2d(5, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )


IMAGE = torch.zeros(2, 3, 9, 9)


def test_first_layers_and_classifiers_do_not_count_by_default() -> None:
    model = conv_bn()
    assert StrengthPenalty(model, IMAGE).paths == ("3", "6")
    assert StrengthPenalty(model, IMAGE, ignore=["6"]).paths == ("3",)
    assert StrengthPenalty(model, IMAGE, whole=True).paths == ("0", "3", "6", "9")
    expected = strength_penalty(model, trace(model, IMAGE), ["3", "6"])
    assert torch.equal(StrengthPenalty(model, IMAGE)(), expected)


def test_the_share_form_matches_plain_loops_and_knows_no_scale() -> None:
    model = conv_bn().double()
    nn.init.uniform_(model[1].weight, 0.5, 2.0)
    strengths = synaptic_strength(model, IMAGE.double())
    expected = 0.0
    for path in ("3", "6"):
        for row in strengths[path].tolist():
            whole = math.sqrt(sum(s * s for s in row))
            expected += sum(s / whole for s in row)
    penalty = StrengthPenalty(model, IMAGE.double(), form="share")
    assert penalty().item() == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        model[3].weight[2] *= 7
    assert penalty().item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(concentration, torch.rand(3, 4, dtype=torch.float64).requires_grad_())


def test_the_share_form_of_a_dead_output_is_zero_with_zero_gradient() -> None:
    strengths = torch.zeros(2, 3, requires_grad=True)
    value = concentration(strengths)
    value.backward()
    assert value == 0
    assert strengths.grad is not None
    assert strengths.grad.isfinite().all()


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "separable", "transposed_grouped"])
def test_the_proximal_step_minimises_what_it_says(name: str) -> None:
    """Of each kernel: `1/2 ||W' - W||^2 + amount * sqrt(v_c) * ||W'||` is least at the result, and zeros are exact."""
    net = BY_NAME[name]
    model = net.make().double()
    connectivity = trace(model, net.example.double())
    before = {path: model.get_submodule(path).weight.detach().clone() for path in connectivity.layers}
    penalty = StrengthPenalty(model, net.example.double(), whole=True, connectivity=connectivity)
    amount = 0.05
    penalty.shrink_(amount)
    generator = torch.Generator().manual_seed(0)
    zeros = 0
    for path in penalty.paths:
        layer, old = model.get_submodule(path), before[path]
        deviation = torch.tensor(oracle.variances(model, net.calls.get(path, [net.sources[path]]))).sqrt()

        def cost(
            new: Tensor, layer: nn.Module = layer, old: Tensor = old, deviation: Tensor = deviation
        ) -> Tensor:
            by_input = deviation.reshape(groups_of(layer), -1)
            norms = kernel_powers(layer, new).sqrt()
            outputs = len(norms) // groups_of(layer)
            return (
                0.5 * (new - old).square().sum()
                + amount * (norms * by_input.repeat_interleave(outputs, 0)).sum()
            )

        new = layer.weight.detach()
        zeros += int((kernel_powers(layer) == 0).sum())
        for size in (1e-1, 1e-3):
            for _ in range(20):
                other = new + size * torch.randn(new.shape, generator=generator, dtype=torch.float64)
                assert cost(new) <= cost(other) + 1e-12
    assert zeros or name != "plain"


def test_shrinking_enough_leaves_nothing_and_a_masked_layer_keeps_its_mask() -> None:
    model = conv_bn()
    mask_(model, {"3": torch.tensor([[True, False, True, False]] * 5)})
    penalty = StrengthPenalty(model, IMAGE)
    hidden = model[3].parametrizations.weight.original
    before = hidden.detach().clone()
    penalty.shrink_(1e-3)
    assert not torch.equal(hidden, before)
    penalty.shrink_(1e6)
    assert not hidden.any()
    assert masks_of(model)


def test_what_is_masked_gets_no_gradient_from_the_penalty() -> None:
    model = conv_bn()
    mask = torch.tensor([[True, False, True, False]] * 5)
    mask_(model, {"3": mask})
    StrengthPenalty(model, IMAGE)().backward()
    gradient = model[3].parametrizations.weight.original.grad
    assert torch.equal(gradient.flatten(2).any(2), mask)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"form": "norm"}, "form='norm' is unknown"),
        ({"ignore": ["3", "nope"]}, "no layer that ran: nope"),
        ({"ignore": ["3", "6"]}, "no layer is left"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        StrengthPenalty(conv_bn(), IMAGE, **options)  # type: ignore[arg-type]


def test_bad_steps() -> None:
    with pytest.raises(InputError, match="amount=-1"):
        StrengthPenalty(conv_bn(), IMAGE).shrink_(-1)
    with pytest.raises(InputError, match="amount=nan"):
        StrengthPenalty(conv_bn(), IMAGE).shrink_(float("nan"))
    with pytest.raises(InputError, match="form='share'"):
        StrengthPenalty(conv_bn(), IMAGE, form="share").shrink_(1)
    model = conv_bn()
    torch.nn.utils.parametrizations.weight_norm(model[3])
    with pytest.raises(ModelError, match="several parameters"):
        StrengthPenalty(model, IMAGE).shrink_(0.1)


def test_a_net_without_norms_is_told_once_and_counts_with_scale_one() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="no norm stands behind"):
        penalty = StrengthPenalty(model, torch.zeros(1, 3))
    assert penalty().item() == pytest.approx(
        model[2].weight.abs().sum().item(), rel=1e-6
    )  # says nothing more


def test_warm_up_rises_and_stays() -> None:
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(0, 0) == 1.0


def test_training_with_the_penalty_under_autocast_empties_synapses() -> None:
    model = conv_bn()
    penalty = StrengthPenalty(model, IMAGE)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    start = penalty().item()
    images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        sgd.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).square().mean()
            value = penalty()
        assert value.dtype == torch.float32
        (loss + 1e-2 * value).backward()
        sgd.step()
        penalty.shrink_(1e-3)
    assert penalty().item() < start
    assert all(p.dtype == torch.float32 for p in model.parameters())


def _gradients(rank: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    model, images = conv_bn(), torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # statistics of half a batch would not be those of the whole
    runs: nn.Module = model
    if port:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        runs, images = nn.parallel.DistributedDataParallel(model), images.split(4)[rank]
    penalty = StrengthPenalty(model, IMAGE)
    (runs(images).square().mean() + 0.1 * penalty()).backward()
    results[rank if port else "one"] = {n: p.grad.tolist() for n, p in model.named_parameters()}
    if port:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_get_the_gradient_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        _gradients(0, 0, results)
        ranks = [context.Process(target=_gradients, args=(rank, port, results)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0, 0]
        for rank in (0, 1):
            for name, gradient in results["one"].items():
                assert torch.allclose(torch.tensor(results[rank][name]), torch.tensor(gradient), atol=1e-6), (
                    name
                )


def test_the_pruner_adds_the_gradient_of_the_penalty_and_follows_its_own_cuts() -> None:
    from ss_pruning import SynapticImportance
    from ss_pruning.integrations.torch_pruning.regularizer import StrengthPruner

    model = conv_bn().eval()
    pruner = StrengthPruner(model, IMAGE, SynapticImportance(), reg=0.5, pruning_ratio=0.5, iterative_steps=2)
    for _ in range(2):
        model.zero_grad()
        (0.5 * StrengthPenalty(model, IMAGE)()).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(torch.ones_like(IMAGE)).sum().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        pruner.regularize()
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, before[name] + expected.get(name, 0.0), atol=1e-6), name
        pruner.step()  # the second round meets a smaller model
    assert model[3].weight.shape == (2, 2, 3, 3)
    pruner.regularize(model, reg=0.0)


@pytest.mark.parametrize("form", ["strength", "share"])
def test_a_penalty_from_before_a_cut_is_refused(form: Any) -> None:
    net = BY_NAME["plain"]
    model = net.make()
    penalty = StrengthPenalty(model, net.example, form=form, whole=True)
    prune_(model, net.example, ratio=0.5)
    with pytest.raises(ModelError, match=r"'conv1' has other widths.* after a cut make it anew"):
        penalty()
    if form == "strength":
        with pytest.raises(ModelError, match="after a cut"):
            penalty.shrink_(0.1)
