"""Where models are compared: ends of stages, and there the channels that both have, told by their values."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from ss_pruning import prune_
from ss_pruning.errors import InputError, SSPruningError
from ss_pruning.graph.tracing import trace, trace_outputs
from ss_pruning.recovery.places import find_places
from ss_pruning.sources.demo import digits_resnet
from ss_pruning.surgery.equivalence.masked_model import masked
from ss_pruning.surgery.plan import PLAN_ATTRIBUTE
from tests.support.snapshot import snapshot
from tests.support.zoo import ZOO, Net


def outputs(model: nn.Module, inputs: tuple[Tensor, ...], paths: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            found[path] = output.clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("net", [net for net in ZOO if net.exact], ids=lambda net: net.name)
def test_kept_channels_have_the_values_of_the_masked_model(net: Net) -> None:
    """A plain cut equals the masked model in every kept channel: one that is taken for another would show."""
    dense = net.make().double()
    inputs = tuple(x.double() for x in net.inputs)
    model = copy.deepcopy(dense)
    try:
        prune_(model, inputs, ratio=0.3)
    except SSPruningError:
        pytest.skip("nothing to prune")
    plan = getattr(model, PLAN_ATTRIBUTE)
    try:
        places = find_places(model, dense, inputs)
    except InputError:
        pytest.skip("no tensor in common")
    paths = [place.path for place in places]
    found = outputs(model, inputs, paths)
    with masked(dense, {(cut.path, cut.side): cut.kept for cut in plan.cuts}, trace(dense, inputs)):
        wanted = outputs(dense, inputs, paths)
    for place in places:
        expected = place.of_dense(wanted[place.path])
        assert found[place.path].shape == expected.shape, place.path
        torch.testing.assert_close(found[place.path], expected, rtol=0, atol=1e-9)


def test_most_of_the_zoo_is_compared_at_feature_maps() -> None:
    """Else the test above would compare outputs alone."""
    maps = cut = 0
    for net in ZOO[::3]:
        model = net.make()
        dense = copy.deepcopy(model)
        try:
            prune_(model, net.inputs, ratio=0.3)
            places = find_places(model, dense, net.inputs)
        except SSPruningError:
            continue
        maps += any(place.path for place in places)
        cut += any(place.kept is not None for place in places)
    assert maps > len(ZOO[::3]) / 2
    assert cut >= 3


def test_ends_of_stages() -> None:
    model = digits_resnet().eval()
    dense = copy.deepcopy(model)
    prune_(model, torch.zeros(1, 1, 8, 8), macs=0.5)
    assert [place.path for place in find_places(model, dense, torch.zeros(1, 1, 8, 8))] == [
        "layer1",
        "layer2",
        "layer3",
    ]


def test_blocks_within_a_stage_count_where_the_stream_is_whole() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    dense, x = copy.deepcopy(model), torch.randn(1, 3, 32, 32)
    stream = [path for path, m in model.named_modules() if path.endswith(("conv2", "downsample.0"))]
    prune_(model, x, ratio=0.3, ignore=["conv1", *stream])
    # The last map has one position, and a stage returns what its last block does.
    assert [place.path for place in find_places(model, dense, x)] == [
        *("layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3")
    ]


class Encoder(nn.Module):
    """Down, and up again: the size of the first stage comes back."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            layers = (nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1))
            return nn.Sequential(*layers, nn.ReLU())

        self.down, self.middle, self.up = block(3, 6), block(6, 6), block(12, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        y = self.middle(nn.functional.max_pool2d(x, 2))
        y = nn.functional.interpolate(y, scale_factor=2)
        return self.head(self.up(torch.cat([x, y], 1)))


def test_both_sides_of_a_segmentation_net() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    dense, x = copy.deepcopy(model), torch.randn(1, 3, 8, 8)
    prune_(model, x, ratio=0.4, allocation="local")
    places = {place.path: place.kept for place in find_places(model, dense, x)}
    assert list(places) == ["down", "middle", ""]
    kept = {(cut.path, cut.side): cut.kept for cut in getattr(model, PLAN_ATTRIBUTE).cuts}
    assert places["down"] == kept.get(("down.2", "out"))
    assert places["middle"] == kept.get(("middle.2", "out"))
    assert any(places.values())


def test_a_perceptron_is_compared_at_its_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    dense, x = copy.deepcopy(model), torch.randn(4, 6)
    prune_(model, x, ratio=0.5)
    assert [place.path for place in find_places(model, dense, x)] == [""]


def test_models_stay_as_they_were() -> None:
    model = digits_resnet().train()
    dense = copy.deepcopy(model)
    prune_(model, torch.zeros(1, 1, 8, 8), macs=0.5)
    before = snapshot(model), snapshot(dense)
    find_places(model, dense, torch.zeros(1, 1, 8, 8))
    assert (snapshot(model), snapshot(dense)) == before


def test_images_that_do_not_fit_are_named() -> None:
    model = digits_resnet().eval()
    with pytest.raises(InputError, match="the pruned model does not run on these images"):
        find_places(model, model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("name", ["residual", "concat", "plain"])
def test_sources_of_outputs_are_those_of_the_consumer(name: str) -> None:
    """What a module hands to the one layer behind it is made from what that layer reads."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    model = {"residual": Sum, "concat": Joined, "plain": lambda b: nn.Sequential(b, nn.Conv2d(4, 2, 1))}[
        name
    ](body)
    path, consumer = ("0", "1") if name == "plain" else ("body", "head")
    found = trace_outputs(model.eval(), torch.randn(1, 3, 8, 8), {path: 1})[path]
    assert found == [frozenset({(f"{path}.0", channel)}) for channel in range(4)]
    read = trace(model, torch.randn(1, 3, 8, 8)).sources(consumer)
    assert all(set(sources) <= set(map(tuple, read[c])) for c, sources in enumerate(found))


class Sum(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 1), body, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) + self.body(x))


class Joined(Sum):
    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.body(x), self.stem(x)], 1))
