"""Relevance against plain loops, what it keeps, and where it is the default."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch_pruning as tp
from torch import nn

from ss_pruning import SynapticImportance, prune_
from ss_pruning.graph.connectivity import INPUT, Connectivity, Edge
from ss_pruning.graph.layers import groups_of
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.relevance import relevance
from tests.integrations.test_torch_pruning import pruner_of, runs, widths
from tests.support.zoo import BY_NAME, ZOO, Net

#: A module that runs several times hands back the same each time: the loops know of one call only.
ONCE = [net for net in ZOO if net.name not in ("shared", "shared_head")]


def variances_of(connectivity: Connectivity) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        path: torch.rand(layer.inputs, generator=generator) + 0.1
        for path, layer in connectivity.layers.items()
        if layer.kind in ("synaptic", "depthwise")
    }


def by_loops(
    model: nn.Module, connectivity: Connectivity, variances: dict[str, torch.Tensor]
) -> dict[str, dict[int, float]]:
    """From the definition, one synapse at a time."""
    modules = dict(model.named_modules())
    held: dict[tuple[str, int], float] = defaultdict(float)
    ends = [
        (path, c)
        for path, channels in connectivity.reaches_output.items()
        if path in connectivity.layers
        for c in channels.tolist()
    ]
    for end in ends:
        held[end] += 1 / len(ends)
    found: dict[str, dict[int, float]] = {}
    for path, layer in reversed(list(connectivity.layers.items())):
        here: dict[int, float] = defaultdict(float)
        module = modules[path]
        if path in variances:
            kernels = module.weight.detach().double()
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                g = module.groups
                kernels = (
                    kernels.reshape(g, -1, *kernels.shape[1:]).transpose(1, 2).flatten(0, 1)
                )  # by output channel, as others
            per_group = layer.inputs // groups_of(module)
            for k in range(layer.outputs):
                first = k // (layer.outputs // groups_of(module)) * per_group
                power = [
                    float(kernels[k, i].square().sum() * variances[path][first + i]) for i in range(per_group)
                ]
                for i in range(per_group):
                    here[first + i] += held[path, k] * power[i] / sum(power)
        else:
            for c in range(layer.inputs):
                even = sum(held[path, k] for k in range(layer.outputs)) / layer.inputs
                here[c] = held[path, c] if layer.inputs == layer.outputs else even
        found[path] = here
        for c, sources in enumerate(connectivity.sources(path)):
            known = [(source, channel) for source, channel in sources if source != INPUT]
            norms = [s for s in known if connectivity.layers[s[0]].kind == "norm"]
            others = [s for s in known if s not in norms]
            for group in (norms, others):
                weights = [
                    float(modules[s].weight.detach()[channel].double() ** 2)
                    if group is norms and getattr(modules[s], "weight", None) is not None
                    else 1.0
                    for s, channel in group
                ]
                for (source, channel), weight in zip(group, weights, strict=True):
                    portion = weight / sum(weights) if sum(weights) else 1 / len(weights)
                    held[source, channel] += here[c] * portion / (bool(norms) + bool(others))
    return found


@pytest.mark.parametrize("net", ONCE, ids=lambda net: net.name)
def test_relevance_is_what_loops_find(net: Net) -> None:
    model = net.make()
    connectivity = trace(model, net.example)
    variances = variances_of(connectivity)
    found = relevance(model, connectivity, variances)
    wanted = by_loops(model, connectivity, variances)
    assert found.keys() == wanted.keys()
    for path, values in found.items():
        expected = torch.tensor([wanted[path][c] for c in range(len(values))], dtype=torch.float64)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-9)


def test_every_layer_of_a_chain_has_all_of_it() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    connectivity = trace(model, net.example)
    for path, values in relevance(model, connectivity, variances_of(connectivity)).items():
        assert float(values.sum()) == pytest.approx(1), path


def test_nothing_is_lost_on_the_way_through_residual_blocks() -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    connectivity = trace(model, net.example)
    found = relevance(model, connectivity, variances_of(connectivity))
    assert float(found["conv0"].sum()) == pytest.approx(1)


def test_a_branch_that_adds_nothing_has_none() -> None:
    net = BY_NAME["residual"]
    model = net.make()
    last = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    path = next(name for name, m in model.named_modules() if m is last)
    connectivity = trace(model, net.example)
    before = relevance(model, connectivity, variances_of(connectivity))
    nn.init.zeros_(last.weight)
    after = relevance(model, connectivity, variances_of(connectivity))
    assert float(before[path].sum()) > 0.01
    assert float(after[path].sum()) == pytest.approx(0, abs=1e-12)


def test_it_is_what_layers_compete_by_where_nothing_is_solved() -> None:
    net = BY_NAME["residual_chain"]
    x = net.inputs[0]
    images = torch.randn(16, *net.shapes[0][1:], generator=torch.Generator().manual_seed(0))
    exponents = {}
    for name, options in {
        "plain": {},
        "mean": {"compensation": "mean"},
        "mean, global": {"compensation": "mean", "allocation": "global"},
        "solved": {"compensation": "reconstruct", "calibration": images},
        "solved, global": {"compensation": "reconstruct", "calibration": images, "allocation": "global"},
        "magnitude": {"importance": tp.importance.GroupMagnitudeImportance(p=2)},
        "magnitude, mean": {
            "importance": tp.importance.GroupMagnitudeImportance(p=2),
            "compensation": "mean",
        },
        "share": {"importance": SynapticImportance()},
    }.items():
        report = prune_(net.make(), x, macs=0.7, **options)
        exponents[name] = report.settings["cost_exponent"]
    assert exponents == {
        "plain": 0.75,
        "mean": 0.75,
        "mean, global": 0.75,
        "magnitude, mean": 0.5,
        "solved": 1.0,
        "solved, global": 0.5,
        "magnitude": 0.5,
        "share": 0.5,
    }
    scores = [SynapticImportance(score="relevance"), None]
    kept = []
    for importance in scores:
        model = net.make()
        prune_(model, x, macs=0.6, importance=importance)
        kept.append(widths(model))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["plain", "residual", "dense", "squeeze_excite_conv"])
def test_torch_pruning_takes_it(name: str) -> None:
    net = BY_NAME[name]
    model = net.make()
    before = widths(model)
    pruner_of(model, net.example, importance=SynapticImportance(score="relevance")).step()
    assert sum(widths(model).values()) < sum(before.values())
    runs(model, net.example)


class Detector(nn.Module):
    """Two heads, of which only the places above a threshold are put out: on noise there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
        self.scores, self.boxes = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.body(x)
        scores, boxes = (head(y).flatten(2).movedim(1, -1) for head in (self.scores, self.boxes))
        chosen = scores.amax(-1) > 1e9
        return {"scores": scores[chosen], "boxes": boxes[chosen]}


def test_without_a_detection_all_channels_that_no_layer_reads_count_as_outputs() -> None:
    torch.manual_seed(0)
    model, x = Detector().eval(), torch.randn(1, 3, 9, 9)
    connectivity = trace(model, x)
    assert not any(len(channels) for channels in connectivity.reaches_output.values())
    found = relevance(model, connectivity, variances_of(connectivity))
    assert float(found["scores"].sum()) == pytest.approx(3 / 7)
    assert float(found["boxes"].sum()) == pytest.approx(4 / 7)
    for path in ("body.0", "body.2"):
        assert float(found[path].sum()) == pytest.approx(1)
        assert bool((found[path] > 0).all())


def test_where_every_layer_is_read_the_last_one_counts() -> None:
    model = BY_NAME["plain"].make()
    connectivity = trace(model, BY_NAME["plain"].example)
    connectivity.reaches_output.clear()
    last = list(connectivity.layers)[-1]
    connectivity.edges[next(iter(connectivity.layers))].append(
        Edge(last, 0, torch.zeros(1, 2, dtype=torch.long), False)
    )
    found = relevance(model, connectivity, variances_of(connectivity))
    assert float(found[last].sum()) == pytest.approx(1)
    assert all(bool(scores.isfinite().all()) for scores in found.values())
