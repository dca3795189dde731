"""Dimensions within heads go, and what stays computes what it computed with them silenced."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ss_pruning import Allocation, SynapticImportance, prune_
from ss_pruning.graph.groups import PruningGroup
from ss_pruning.graph.traced import TracedModel
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.activation_stats import measure
from ss_pruning.importance.batched_ablation import BatchedAblation, output_key
from ss_pruning.importance.scoring import SubgroupGraph, subgroup_scores
from ss_pruning.planning.narrow_heads import with_narrow_heads
from ss_pruning.report.records import Report
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE, Plan
from tests.support.attention import EXAMPLE, Apart, Block, Fused, Rotary, Turned, block
from tests.support.snapshot import snapshot

OTHERS = ("embed", "fc1", "fc2")
SLOW = pytest.mark.slow
#: Forms whose heads become narrower, and forms whose heads cannot.
NARROW = [
    "biased",
    "interleaved",
    *(pytest.param(n, marks=SLOW) for n in ("fused", "ofmaps", "positioned", "blocked")),
]
WHOLE = ["grouped", *(pytest.param(name, marks=SLOW) for name in ("crossed", "multiquery", "aggregated"))]
LOCAL = Allocation("local", heads="narrow")


def of(attention: type[nn.Module]) -> Block:
    torch.manual_seed(0)
    return Block(attention()).eval()


def groups_in(model: nn.Module) -> list[PruningGroup]:
    """Those of attention."""
    groups = with_narrow_heads(TracedModel.of(model, EXAMPLE)).coupling.groups
    return [group for group in groups if group.name.startswith("attn")]


def pruned(model: Block) -> tuple[Block, Report, Plan]:
    """Half of attention alone goes."""
    report = prune_(model, EXAMPLE.double(), ratio=0.5, allocation=LOCAL, ignore=OTHERS)
    return model, report, getattr(model, PLAN_ATTRIBUTE)


def silence_(dense: Block, plan: Plan) -> None:
    """By hand: the weights that make removed queries, keys and values, and those that read values, are zero."""
    with torch.no_grad():
        for cut in plan.cuts:
            if cut.side == "tensor":
                dense.get_parameter(cut.path)[cut.removed] = 0
                continue
            layer = dense.get_submodule(cut.path)
            if cut.side == "out":
                layer.weight[cut.removed] = 0  # type: ignore[index,operator]
                if layer.bias is not None:
                    layer.bias[cut.removed] = 0  # type: ignore[index,operator]
            if cut.side == "in":
                layer.weight[:, cut.removed] = 0  # type: ignore[index,operator]


@pytest.mark.parametrize("name", NARROW)
def test_dimensions_that_go_are_as_if_silenced(name: str) -> None:
    model = block(name).double()
    dense, heads = copy.deepcopy(model), model.attn.__dict__.get("num_heads")
    model, report, plan = pruned(model)
    (cut,) = (cut for cut in plan.cuts if cut.path == "attn.qkv" and cut.side == "out")
    assert 0 < len(cut.kept) < cut.width
    assert model.attn.__dict__.get("num_heads") == heads  # all of them stay
    assert report.max_error < 1e-10
    silence_(dense, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(EXAMPLE.double()), dense(EXAMPLE.double()), rtol=1e-10, atol=1e-10)


def test_every_head_loses_as_many_each_its_own() -> None:
    _, _, plan = pruned(block("fused").double())
    (cut,) = (cut for cut in plan.cuts if cut.side == "out")
    kept = (
        torch.zeros(60).index_fill(0, torch.tensor(cut.kept), 1).view(3, 4, 5)
    )  # queries, keys and values, heads
    assert (kept.sum(-1) == 3).all()
    assert torch.equal(kept[0], kept[1])  # of queries and keys the same
    assert len(set(map(tuple, kept[0].tolist()))) > 1
    assert not torch.equal(kept[0], kept[2])


def test_biases_that_code_adds_go_with_their_dimensions() -> None:
    model, report, plan = pruned(block("read").double())
    assert report.max_error < 1e-10
    assert {cut.path for cut in plan.cuts if cut.side == "tensor"} == {f"attn.{part}_bias" for part in "qkv"}
    assert model.attn.q_bias.shape == model.attn.k_bias.shape == (12,)  # type: ignore[union-attr]


def test_queries_and_keys_go_without_values_where_each_has_a_number() -> None:
    products, values = groups_in(of(Apart))
    assert (products.name, values.name, products.steps, values.steps) == ("attn.q", "attn.v", 4, 6)
    assert not products.by_width  # the scale is a number
    model, report, _ = pruned(of(Apart).double())
    assert report.max_error < 1e-10
    assert (model.attn.heads, model.attn.key_width, model.attn.value_width) == (3, 2, 3)


@pytest.mark.parametrize("attention", [Fused, Apart])
def test_a_single_head_becomes_narrower(attention: type[nn.Module]) -> None:
    """Its queries and keys stay otherwise; its values are channels like others."""
    torch.manual_seed(0)
    model = Block(attention(heads=1)).eval().double()
    report = prune_(model, EXAMPLE.double(), ratio=0.5, allocation=LOCAL)
    assert report.max_error < 1e-10
    assert [left.paths for left in report.excluded] == [("head",)]
    made = model.attn.qkv if attention is Fused else model.attn.q  # type: ignore[union-attr]
    assert made.out_features == (9 if attention is Fused else 2)  # type: ignore[union-attr]


def test_ignored_layers_keep_their_width() -> None:
    torch.manual_seed(0)
    for model in (Block(Apart()).eval(), Block(Apart(heads=1)).eval()):
        report = prune_(model, EXAMPLE, ratio=0.3, allocation=LOCAL, ignore=("attn.k",))
        assert model.attn.key_width == 4
        assert report.max_error < 1e-10


def test_what_divides_by_the_root_of_the_width_is_made_up_for() -> None:
    (fused,), (biased,) = groups_in(block("fused")), groups_in(block("biased"))
    assert (fused.by_width, biased.by_width) == ({("attn.qkv", "out")}, set())
    dense = block("fused").double()
    model, _, plan = pruned(copy.deepcopy(dense))
    (cut,) = (cut for cut in plan.cuts if cut.side == "out")
    stays = torch.tensor(cut.kept)
    gain = torch.where(stays < 40, (3 / 5) ** 0.25, 1.0).double()  # queries and keys; then values
    expected = dense.attn.qkv.weight[stays] * gain[:, None]  # type: ignore[index,union-attr]
    torch.testing.assert_close(model.attn.qkv.weight, expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("attention", [Turned, pytest.param(Rotary, marks=SLOW)])
def test_what_does_not_verify_stays_a_head(attention: type[nn.Module]) -> None:
    (group,) = groups_in(of(attention))
    assert [subgroup.of_heads for subgroup in group.subgroups] == [True]
    model, report, _ = pruned(of(attention).double())
    assert report.max_error < 1e-10
    assert model.attn.num_heads == 2


@pytest.mark.parametrize("name", WHOLE)
def test_forms_that_keep_their_width(name: str) -> None:
    (group,) = groups_in(block(name))
    assert group.subgroups[0].of_heads


@pytest.mark.slow
def test_pruned_twice_is_one_plan() -> None:
    dense = block("fused").double()
    model = copy.deepcopy(dense)
    for _ in range(2):
        prune_(model, EXAMPLE.double(), ratio=0.3, allocation=LOCAL)
    plan: Plan = getattr(model, PLAN_ATTRIBUTE)
    assert model.attn.head_dim == 3
    fresh = Plan.from_json(plan.to_json()).apply_(dense)
    torch.testing.assert_close(fresh(EXAMPLE.double()), model(EXAMPLE.double()))


@pytest.mark.parametrize(
    "compensation", [pytest.param("mean", marks=SLOW), pytest.param("linear", marks=SLOW), "reconstruct"]
)
def test_compensated(compensation: str) -> None:
    """What stays is solved for queries and keys as they are multiplied, so that logits are about what they were."""
    images = torch.randn(64, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    dense = block("fused")
    options = {"ratio": 0.3, "allocation": LOCAL, "calibration": images, "ignore": OTHERS}
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_(plain, EXAMPLE, **options)
    prune_(model, EXAMPLE, **options, compensation=compensation)
    assert model.attn.head_dim == plain.attn.head_dim == 4
    assert _lost(model, dense, images) < _lost(plain, dense, images)


def _lost(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((model(images) - dense(images)).square().mean())


@torch.no_grad()
def test_what_is_lost_with_queries_and_keys_is_measured() -> None:
    """As the definition has it: the share of the output's variance that is lost with them."""
    model, images = of(Apart), torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    connectivity, dense, gone = trace(model, EXAMPLE), model(images), np.array([1, 2, 5])
    statistics = measure(model, connectivity, [images], None, connectivity.weighted, covariance=True)
    ablation = BatchedAblation(model, connectivity, images, statistics, "none")
    (found,) = ablation.sensitivity([dict.fromkeys(map(output_key, ("attn.q", "attn.k")), gone)])
    silent = copy.deepcopy(model)
    for layer in (silent.attn.q, silent.attn.k):  # type: ignore[union-attr]
        layer.weight[gone], layer.bias[gone] = 0, 0  # type: ignore[index,operator]
    wanted = (silent(images) - dense).square().mean() / (dense - dense.mean(0)).square().mean()
    assert found == pytest.approx(float(wanted), rel=1e-4)
    assert wanted > 1e-4


def test_dimensions_that_are_not_missed_go_first() -> None:
    model, images = of(Apart), torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # so that all is attended to alike
        model.attn.q.weight.zero_(), model.attn.q.bias.zero_()  # type: ignore[union-attr,operator]
    allocation = Allocation("sensitivity", heads="narrow")
    prune_(model, EXAMPLE, params=0.95, allocation=allocation, calibration=images)
    assert (model.attn.key_width, model.attn.value_width) == (3, 6)


@torch.no_grad()
def test_queries_and_keys_count_by_their_share_of_the_logits() -> None:
    """Of what their head delivers: the score of its values, all together."""
    model = of(Apart)
    traced = with_narrow_heads(TracedModel.of(model, EXAMPLE))
    products, values = (g.subgroups for g in traced.coupling.groups if g.name in ("attn.q", "attn.v"))
    graph = SubgroupGraph(model, EXAMPLE, traced.connectivity)
    importance = SynapticImportance("batchnorm")
    found = subgroup_scores(importance, products, graph)
    delivered = subgroup_scores(importance, values, graph)
    scale = model.norm1.weight  # what arrives varies by as much
    for head, scores in enumerate(found):
        powers = [
            float((model.attn.q.weight[c] * scale).square().sum())  # type: ignore[index,operator,union-attr]
            * float((model.attn.k.weight[c] * scale).square().sum())  # type: ignore[index,operator,union-attr]
            for c in range(4 * head, 4 * head + 4)
        ]
        expected = torch.tensor(powers) / sum(powers) * delivered[head].sum()
        torch.testing.assert_close(scores, expected.double(), rtol=1e-5, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = block("fused")
    before = snapshot(model)
    with_narrow_heads(TracedModel.of(model, EXAMPLE))
    assert snapshot(model) == before


class Aligned(nn.Module):
    """Points, or maps, of the input are turned by a matrix that layers make of them, as in PointNet."""

    def __init__(self, *, of_layers: bool) -> None:
        super().__init__()
        self.seen, self.turn = nn.Linear(4, 12), nn.Linear(12, 16)
        self.a, self.b, self.of_layers = nn.Linear(4, 12), nn.Linear(12, 5), of_layers

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(self.seen(x).relu().amax(1)).unflatten(1, (4, 4))
        other = turn.transpose(1, 2) if self.of_layers else x.transpose(1, 2) @ x
        return self.b(self.a(x @ (turn @ other)).relu().mean(1))


@pytest.mark.parametrize("of_layers", [True, False])
def test_products_with_the_input_are_no_heads(of_layers: bool) -> None:
    torch.manual_seed(0)
    model, x = Aligned(of_layers=of_layers).eval().double(), torch.randn(16, 6, 4).double()
    dense = copy.deepcopy(model)
    prune_(model, x[:1], ratio=0.3, calibration=x)
    plan: Plan = getattr(model, PLAN_ATTRIBUTE)
    assert {cut.path for cut in plan.cuts} >= {"a", "b"}
    silence_(dense, plan)
    with torch.no_grad():
        assert (dense(x) - model(x)).abs().max() <= 1e-10 * dense(x).abs().max()
