"""`SynapticImportance` on the dependency groups themselves, against plain loops; and importances beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ss_pruning
from ss_pruning.errors import InputError
from ss_pruning.graph.groups import Subgroup, couple
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.scoring import SubgroupGraph, subgroup_scores
from ss_pruning.importance.synaptic import SynapticImportance
from tests.support import oracle
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME, ZOO, Net


def subgroups_of(model: nn.Module, example: Any) -> tuple[list[Subgroup], SubgroupGraph]:
    connectivity = trace(model, example)
    groups = couple(connectivity, model).groups
    return [s for group in groups for s in group.subgroups], SubgroupGraph(model, example, connectivity)


def expected(net: Net, model: nn.Module, subgroup: Subgroup, score: str) -> list[float]:
    """For every channel set, the scores of all synapses that start at one of its input channels, added up."""
    total, read = [0.0] * subgroup.size, False
    for member in subgroup.members:
        if member.side != "in" or member.path not in net.sources:
            continue
        module = model.get_submodule(member.path)
        if oracle.groups_of(module) == oracle.widths(module)[1] > 1:  # depthwise: it hands channels on
            continue
        read = True
        scales = oracle.variances(model, net.calls.get(member.path, [net.sources[member.path]]))
        table = oracle.strength(module, scales)
        table = oracle.shares(table) if score == "share" else table
        for i, channels in enumerate(member.index.tolist()):
            for k, row in enumerate(table):
                total[i] += sum(x for j, x in enumerate(row) if oracle.input_of(module, k, j) in channels)
    return total if read else [float("inf")] * subgroup.size


@pytest.mark.parametrize("score", ["share", "strength"])
@pytest.mark.parametrize("net", [n for n in ZOO if n.channel_sets is not None], ids=lambda net: net.name)
def test_scores_of_subgroups_equal_the_oracle(net: Net, score: str) -> None:
    model = net.make()
    subgroups, graph = subgroups_of(model, net.example)
    before = snapshot(model)
    for subgroup, found in zip(
        subgroups, subgroup_scores(SynapticImportance("batchnorm", score), subgroups, graph), strict=True
    ):
        truth = torch.tensor(expected(net, model, subgroup, score), dtype=torch.float64)
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-9)
    assert snapshot(model) == before


@pytest.mark.parametrize("normalizer", ["mean", "max", "sum"])
def test_the_groups_of_a_convolution_are_normalised_as_one_layer(normalizer: str) -> None:
    net = BY_NAME["grouped"]
    subgroups, graph = subgroups_of(net.make(), net.example)
    plain = subgroup_scores(SynapticImportance("batchnorm"), subgroups, graph)
    found = subgroup_scores(SynapticImportance("batchnorm", normalizer=normalizer), subgroups, graph)
    for path in {s.root.path for s in subgroups}:
        ours = [i for i, s in enumerate(subgroups) if s.root.path == path]
        scores, before = torch.cat([found[i] for i in ours]), torch.cat([plain[i] for i in ours])
        assert getattr(scores, normalizer)().item() == pytest.approx(1.0, rel=1e-5)
        torch.testing.assert_close(scores / scores.sum(), before / before.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("statistics", ["batchnorm", "gaussian", "batches"])
def test_scores_follow_weights_and_norms_that_change(statistics: str) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    subgroups, graph = subgroups_of(model, net.example)

    def fresh() -> SynapticImportance:
        return SynapticImportance([net.example] if statistics == "batches" else statistics)

    importance = fresh()
    before = subgroup_scores(importance, subgroups, graph)
    for kind in (nn.BatchNorm2d, nn.Conv2d):
        for module in (m for m in model.modules() if isinstance(m, kind)):
            steps = torch.linspace(0.2, 3, module.weight.shape[-1 if kind is nn.Conv2d else 0])
            module.weight.data.mul_(steps)
        found = subgroup_scores(importance, subgroups, graph)
        assert not torch.equal(torch.cat(found), torch.cat(before))
        assert torch.equal(torch.cat(found), torch.cat(subgroup_scores(fresh(), subgroups, graph)))
        before = found


def test_batches_are_read_once_while_nothing_changes() -> None:
    reads: list[int] = []

    class Batches(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            reads.append(1)
            return super().__iter__()

    net = BY_NAME["plain"]
    subgroups, graph = subgroups_of(net.make(), net.example)
    importance = SynapticImportance(Batches([net.example]))
    subgroup_scores(importance, subgroups, graph)
    assert reads
    reads.clear()
    subgroup_scores(importance, subgroups, graph)
    assert not reads


class Widest:
    """An importance that knows subgroups: later channels count more, and of some it knows nothing."""

    def __init__(self, wrong: float | None = None) -> None:
        self.wrong = wrong

    def scorer(self, model: nn.Module, connectivity: Any, inputs: Any) -> Callable[[Subgroup], Tensor | None]:
        def score(subgroup: Subgroup) -> Tensor | None:
            if self.wrong is not None:
                return torch.full((subgroup.size,), self.wrong)
            return torch.from_numpy(subgroup.root.index[:, 0]).float()

        return score


def test_an_importance_may_score_subgroups() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    ss_pruning.prune_(model, net.example, ratio=0.5, importance=Widest(), allocation="local")
    cuts = [cut for cut in model.ss_pruning_plan.cuts if cut.side == "out"]
    assert cuts
    for cut in cuts:
        assert cut.kept == tuple(range(cut.width - len(cut.kept), cut.width))


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_wrong_scores_are_refused_by_name(wrong: float) -> None:
    net = BY_NAME["plain"]
    model = net.make()
    before = snapshot(model)
    with pytest.raises(InputError, match="Widest gave"):
        ss_pruning.prune_(model, net.example, ratio=0.5, importance=Widest(wrong))
    assert snapshot(model) == before


def test_the_public_class_is_a_torch_pruning_importance() -> None:
    tp = pytest.importorskip("torch_pruning")
    assert isinstance(ss_pruning.SynapticImportance(), tp.importance.Importance)
    assert isinstance(ss_pruning.SynapticImportance(), SynapticImportance)


@pytest.mark.parametrize("net", ZOO[:2], ids=lambda net: net.name)
def test_what_a_subclass_says_of_torch_prunings_groups_counts(net: Net) -> None:
    """Of `scorer` and `__call__` the one of the most derived class is what a user means."""

    class Doubled(ss_pruning.SynapticImportance):
        def __call__(self, group: Any) -> Tensor | None:
            scores = super().__call__(group)
            return None if scores is None else 2 * scores

    class Own(ss_pruning.SynapticImportance):
        def scorer(self, *args: Any) -> Any:
            return lambda subgroup: torch.ones(subgroup.size)

    subgroups, graph = subgroups_of(net.make(), net.example)
    plain = subgroup_scores(ss_pruning.SynapticImportance(), subgroups, graph)
    doubled = subgroup_scores(Doubled(), subgroups, graph)
    for one, two in zip(plain, doubled, strict=True):
        torch.testing.assert_close(two, 2 * one)
    assert all(bool((scores == 1).all()) for scores in subgroup_scores(Own(), subgroups, graph))
