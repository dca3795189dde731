"""Provenance against the zoo's hand-written truth, and against autograd on real nets."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ss_pruning import prune_
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.connectivity import INPUT
from ss_pruning.graph.tracing import trace
from tests.support import oracle
from tests.support.snapshot import Bomb, snapshot
from tests.support.zoo import BY_NAME, ZOO, Net

every_net = pytest.mark.parametrize("net", ZOO, ids=lambda net: net.name)


def check_against_truth(net: Net, model: nn.Module, example: object) -> None:
    connectivity = trace(model, example)
    for path, truth in net.sources.items():
        found = connectivity.sources(path)
        assert len(found) == len(truth), path
        for channel, expected in enumerate(truth):
            assert len(found[channel]) == len(set(found[channel])), (path, channel)
            assert set(found[channel]) in (expected, expected - net.broadcast), (path, channel)


@every_net
def test_sources_equal_the_truth(net: Net) -> None:
    check_against_truth(net, net.make(), net.example)


@every_net
def test_sources_do_not_depend_on_dtype_mode_or_weights(net: Net) -> None:
    model = net.make(seed=5).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1000)
    example = tuple(x.double() for x in net.inputs)
    check_against_truth(net, model, example if len(example) > 1 else example[0])


@every_net
def test_a_call_leaves_the_model_alone(net: Net) -> None:
    model = net.make()
    sum(x.sum() for x in oracle.tensors(model.train()(*net.inputs))).backward()
    before = snapshot(model)
    trace(model, net.example)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["plain", "residual_chain", "shared", "layer_scale", "blur_pool_wide"])
def test_a_call_leaves_the_model_alone_when_forward_raises(name: str) -> None:
    net = BY_NAME[name]
    model = Bomb(net.make()).train()
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"does not run on the example inputs.*boom"):
        trace(model, net.example)
    assert snapshot(model) == before


def test_example_inputs_are_left_alone() -> None:
    net = BY_NAME["two_inputs"]
    example = net.inputs
    for x in example:
        x.requires_grad_()
    copies = [x.detach().clone() for x in example]
    trace(net.make(), example)
    assert all(
        torch.equal(x, y) and x.grad is None and x.requires_grad for x, y in zip(example, copies, strict=True)
    )


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_works_inside_no_grad_and_inference_mode(guard: type[torch.no_grad]) -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    with guard():
        check_against_truth(net, model, net.example)


def test_frozen_parameters_and_inputs_by_keyword() -> None:
    net = BY_NAME["two_inputs"]
    model = net.make().requires_grad_(False)
    x, y = net.inputs
    check_against_truth(net, model, {"y": y, "x": x})


@every_net
def test_a_batch_of_one_is_enough(net: Net) -> None:
    example = tuple(x[:1] for x in net.inputs)
    check_against_truth(net, net.make(), example if len(example) > 1 else example[0])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        trace(nn.Sequential(nn.ReLU()), torch.zeros(1, 3))


def test_wrong_input_shape_names_the_layer_and_the_remedy() -> None:
    with pytest.raises(ModelError, match=r"'conv1'.*check their shape"):
        trace(BY_NAME["plain"].make(), torch.zeros(1, 4, 16, 16))


def test_an_unknown_path_is_refused() -> None:
    net = BY_NAME["plain"]
    with pytest.raises(InputError, match="no layer 'conv9'"):
        trace(net.make(), net.example).sources("conv9")


def test_a_layer_that_never_runs_is_listed() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(x))

    assert trace(Idle(), torch.randn(2, 4)).uncalled == ("idle",)


def test_layers_that_run_in_training_only_are_found() -> None:
    net = BY_NAME["unused_head"]
    connectivity = trace(net.make(), net.example)
    assert [set(found) for found in connectivity.sources("aux")] == net.sources["fc"]


def test_layers_come_in_the_order_in_which_they_run() -> None:
    net = BY_NAME["projection"]
    order = [path for path in trace(net.make(), net.example).layers if path in net.sources]
    assert order == ["conv0", "conv1", "conv2", "down.0", "fc"]


REAL = [
    ("torchvision", "resnet18"),
    ("torchvision", "mobilenet_v3_small"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "squeezenet1_1"),
    ("timm", "test_resnet"),
    ("timm", "test_efficientnet"),
    ("timm", "test_convnext"),
    ("timm", "test_nfnet"),
    ("timm", "resnetv2_18"),
    ("timm", "regnety_002"),
]


@pytest.mark.parametrize(("library", "name"), REAL, ids=lambda value: value)
def test_sources_agree_with_autograd_on_real_nets(library: str, name: str) -> None:
    model, size = build(library, name), 64
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    connectivity = trace(model, x)
    draw = random.Random(1)
    arrivals = oracle.arrivals(model, (x,))
    once = [a for a in arrivals if sum(b.path == a.path for b in arrivals) == 1]
    for arrival in draw.sample(once, min(25, len(once))):
        for channel in draw.sample(range(arrival.width), min(3, arrival.width)):
            truth = oracle.feeders(arrival, channel)
            assert set(connectivity.sources(arrival.path)[channel]) == truth, (arrival.path, channel)


def build(library: str, name: str) -> nn.Module:
    """A real net with random weights and random norms."""
    from tests.support.zoo import randomise

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if library == "timm":
            timm = pytest.importorskip("timm")
            return randomise(timm.create_model(name)).eval()
        torchvision = pytest.importorskip("torchvision")
        return randomise(torchvision.models.get_model(name, weights=None)).eval()


def test_deep_copies_agree() -> None:
    net = BY_NAME["dense"]
    model = net.make()
    twin = copy.deepcopy(model)
    assert all(
        trace(model, net.example).sources(path) == trace(twin, net.example).sources(path)
        for path in net.sources
    )


class Keyword(nn.Module):
    """Calls its layers by keyword, with something else in front, and returns more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = F.relu(self.bn1(input=self.conv1(input=x)))
        return {"classes": self.conv2(input=y), "features": y, "mask": y > 0, "scale": 2}


def test_layers_may_be_called_by_keyword() -> None:
    connectivity = trace(Keyword(), torch.randn(2, 3, 4, 4))
    assert connectivity.sources("conv2") == [[("bn1", channel)] for channel in range(4)]


def test_channels_that_reach_the_output_are_known() -> None:
    connectivity = trace(Keyword(), torch.randn(2, 3, 4, 4))
    reached = {path: sorted(channels.tolist()) for path, channels in connectivity.reaches_output.items()}
    assert reached == {"conv2": [0, 1], "bn1": [0, 1, 2, 3]}


def test_calls_of_a_shared_layer_are_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.shared = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.bn2(self.shared(self.bn1(x))))

    edges = trace(Twice(), torch.randn(2, 4, 3, 3)).edges["shared"]
    assert {(edge.call, edge.source) for edge in edges} == {(0, "bn1"), (1, "bn2")}


def test_tensors_outside_layers_are_loose_if_they_hold_numbers_by_channel() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
            self.scale = nn.Parameter(torch.ones(4, 1, 1))
            self.register_buffer("shift", torch.zeros(4, 1, 1))
            self.register_buffer("temperature", torch.ones(()))
            self.register_buffer("order", torch.arange(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)[:, self.order] * self.scale + self.shift
            return self.fc(F.relu(x).mean((2, 3)) * self.temperature)

    connectivity = trace(Loose(), torch.randn(2, 3, 4, 4))
    assert {name: tensor.axis for name, tensor in connectivity.loose.items()} == {"scale": 0, "shift": 0}


def test_a_training_pass_is_given_two_images_where_one_would_not_do() -> None:
    class Auxiliary(nn.Module):
        """The head that runs in training normalises single values: one image is not enough."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.bn, self.fc2, self.out = (
                nn.Linear(3, 4),
                nn.BatchNorm1d(4),
                nn.Linear(4, 2),
                nn.Linear(4, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc1(x)
            return self.out(x) + self.fc2(self.bn(x)) if self.training else self.out(x)

    model = Auxiliary()
    statistics = model.bn.running_mean.clone()
    connectivity = trace(model, torch.randn(1, 3))
    assert connectivity.uncalled == ()
    assert connectivity.sources("fc2") == [[("bn", channel)] for channel in range(4)]
    assert torch.equal(model.bn.running_mean, statistics)


class Statistics(nn.Module):
    """A norm in functional form, whose tensors have names of their own."""

    def __init__(self, form: str, affine: bool) -> None:
        super().__init__()
        self.form, width = form, 12
        self.conv, self.fc = nn.Conv2d(3, width, 3, bias=False), nn.Linear(width, 2)
        self.register_buffer("centre", torch.randn(width))
        self.register_buffer("spread", torch.rand(width) + 0.5)
        self.gain, self.shift = (nn.Parameter(torch.rand(width)) if affine else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, scale = self.conv(x), (self.gain, self.shift)
        if self.form == "batch":
            x = F.batch_norm(x, self.centre, self.spread, self.gain, bias=self.shift, training=self.training)
        elif self.form == "instance":
            x = F.instance_norm(x, self.centre, self.spread, *scale, use_input_stats=self.training)
        else:
            x = torch.batch_norm(x, *scale, self.centre, self.spread, self.training, 0.1, 1e-5, False)
        return self.fc(F.relu(x).mean((2, 3)))


@pytest.mark.parametrize("form", ["batch", "instance", "torch"])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_that_code_normalises_by_lie_along_channels(form: str, affine: bool) -> None:
    model, x = Statistics(form, affine).train(), torch.randn(2, 3, 8, 8)
    before = snapshot(model)
    connectivity = trace(model, x)
    assert snapshot(model) == before
    assert connectivity.sources("fc") == [[("conv", channel)] for channel in range(12)]
    names = {"centre", "spread"} | ({"gain", "shift"} if affine else set())
    assert {name: tensor.axis for name, tensor in connectivity.loose.items()} == dict.fromkeys(names, 0)


def test_statistics_that_code_normalises_by_are_cut_with_their_channels() -> None:
    model, x = Statistics("batch", True).eval(), torch.randn(2, 3, 8, 8)
    dense = copy.deepcopy(model).double()
    report = prune_(model, x[:1], ratio=0.5, allocation="local")
    (cut,) = (cut for cut in model.ss_pruning_plan.cuts if cut.path == "fc")
    dense.fc.weight.data[:, list(cut.removed)] = 0
    assert len(model.centre) == len(model.spread) == len(model.gain) == model.conv.out_channels == 6
    assert report.max_error < 1e-10
    assert (dense(x.double()) - model.double()(x.double())).abs().max() < 1e-10


def test_layers_that_run_in_vmap_are_named() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.vmap(self.conv)(x).mean((2, 3)))

    with pytest.raises(ModelError, match=r"'conv' runs inside torch\.vmap.*without vmap"):
        trace(Mapped(), torch.randn(2, 3, 8, 8))


class Frozen(nn.Module):
    """Does not train its first layers, in one of the ways in which people say so."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc = how, nn.Linear(5, 2)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.register_buffer("seen", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                x = self.features(x)
                self.seen.add_(x.mean())
        elif self.how == "detach":
            x = self.features(x).detach()
        elif self.how == "data":
            x = self.features(x).data
        elif self.how == "numpy":
            x = torch.from_numpy(self.features(x).detach().numpy())
        else:
            x = torch.no_grad()(self.features)(x)
        return self.fc(x)


@pytest.mark.parametrize("how", ["no_grad", "decorator", "detach", "data"])
def test_labels_pass_where_gradients_are_switched_off(how: str) -> None:
    model, x = Frozen(how).eval(), torch.randn(2, 3, 8, 8)
    before = snapshot(model)
    connectivity = trace(model, x)
    after = snapshot(model)
    for seen in (before, after):
        del seen["seen: tensor"]  # written to and taken back
    assert after == before
    assert model.seen == 0
    assert not model.seen.requires_grad
    assert torch.is_grad_enabled()
    assert connectivity.sources("body.3") == [[("body.1", channel)] for channel in range(6)]
    assert connectivity.sources("fc") == [[("body.3", channel)] for channel in range(5)]


def test_what_is_frozen_is_cut_and_where_labels_cannot_pass_it_stays() -> None:
    model, x = Frozen("no_grad").eval(), torch.randn(2, 3, 8, 8)
    dense = copy.deepcopy(model).double()
    prune_(model, x[:1], ratio=0.4, allocation="local")
    for cut in model.ss_pruning_plan.cuts:
        if cut.side == "in":
            dense.get_submodule(cut.path).weight.data[:, list(cut.removed)] = 0
    assert model.body[0].out_channels < 6
    assert model.fc.in_features < 5
    assert (dense(x.double()) - model.double()(x.double())).abs().max() < 1e-10
    other = Frozen("numpy").eval()
    report = prune_(other, x[:1], ratio=0.4, allocation="local")
    assert other.body[0].out_channels < 6
    assert other.fc.in_features == 5
    assert any(entry.paths == ("body.3",) and "no gradient" in entry.reason for entry in report.excluded)


class Shuffled(nn.Module):
    """Between its two layers a permutation by a matrix that is neither parameter nor buffer, in single precision."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, len(order)), nn.Linear(len(order), 2)
        self.matrix = torch.eye(len(order))[order]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)) @ self.matrix.T)


def test_code_that_insists_on_single_precision_is_traced_in_it() -> None:
    order = [3, 1, 4, 0, 2]
    connectivity = trace(Shuffled(order), torch.randn(2, 3))
    assert connectivity.sources("fc2") == [[("fc1", channel)] for channel in order]


def test_slopes_are_seen_though_a_rectifier_follows() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.ReLU(), nn.Linear(4, 2))
    connectivity = trace(net, torch.randn(2, 3))
    assert {name: tensor.axis for name, tensor in connectivity.loose.items()} == {"1.weight": 0}
    assert connectivity.sources("3") == [[("0", channel)] for channel in range(4)]


class Precise(nn.Linear):
    """Insists on the precision that it was written for."""

    def forward(self, x: Tensor) -> Tensor:
        assert {x.dtype, self.weight.dtype} == {torch.bfloat16}
        return super().forward(x)


def test_layers_run_in_their_own_precision() -> None:
    net = nn.Sequential(nn.Linear(3, 4), Precise(4, 4), nn.Linear(4, 2)).bfloat16()
    nn.utils.parametrize.register_parametrization(net[1], "weight", nn.Identity())
    assert trace(net, torch.randn(2, 3, dtype=torch.bfloat16)).sources("2")[0] == [("1", 0)]


def test_a_number_that_steers_the_model_is_left_alone() -> None:
    class Steered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 2), nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("shift", torch.zeros(2))
            self.register_buffer("ready", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.ready != 1:
                raise RuntimeError("not initialised")
            return self.fc2(F.relu(self.fc1(x) * self.scale + self.shift))

    assert set(trace(Steered(), torch.randn(2, 3)).loose) == {"scale", "shift"}


class Views(nn.Module):
    """Takes images one by one, of any size, and a number for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, images: list[Tensor], weights: Tensor) -> Tensor:
        means = torch.stack([F.relu(self.conv(image[None])).mean((0, 2, 3)) for image in images])
        return self.fc(means * weights[:, None])


def test_a_list_of_images_and_a_number_for_each() -> None:
    images = [torch.randn(3, 4, 4), torch.randn(3, 6, 5)]
    connectivity = trace(Views(), (images, torch.ones(2)))
    assert connectivity.sources("conv") == [[(INPUT, channel)] for channel in range(3)]
    assert [set(found) >= {("conv", c)} for c, found in enumerate(connectivity.sources("fc"))] == [True] * 4


def test_channels_of_a_signal_are_on_the_axis_behind_the_batch() -> None:
    connectivity = trace(
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)), torch.randn(2, 3, 8)
    )
    assert connectivity.sources("0") == [[(INPUT, channel)] for channel in range(3)]


class TwoWays(nn.Module):
    """In training its channels run backwards, and a head is there that may refuse its input."""

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.fc1, self.fc2, self.aux, self.head = (
            nn.Linear(n, m) for n, m in ((3, 4), (4, 2), (4, 5), (5, 2))
        )
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        if not self.training:
            return self.fc2(x)
        seen = F.relu(self.aux(x))
        if len(x) < self.least:
            raise ValueError("too small")
        return self.fc2(x.flip(1)) + self.head(seen)


def test_where_training_is_wired_otherwise_evaluation_counts() -> None:
    connectivity = trace(TwoWays().train(), torch.randn(3, 3))
    assert connectivity.sources("fc2") == [[("fc1", channel)] for channel in range(4)]
    assert connectivity.sources("head") == [[("aux", channel)] for channel in range(5)]
    assert {edge.call for edges in connectivity.edges.values() for edge in edges} == {0}


class OwnBranch(nn.Module):
    """Has a branch that runs in training only, beside the other, whose channels run backwards then."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.drilled, self.used = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.drilled(x) * self.scale + self.used(x).flip(1) if self.training else self.used(x)
        return self.fc(F.relu(x).mean((2, 3)))


def test_what_a_layer_reads_in_training_only_feeds_it_too() -> None:
    connectivity = trace(OwnBranch(), torch.randn(1, 3, 8, 8))
    both = [{("used", channel), ("drilled", channel)} for channel in range(4)]
    assert [set(sources) for sources in connectivity.sources("fc")] == both
    assert connectivity.loose["scale"].axis == 0


def test_a_model_with_a_branch_for_training_trains_after_a_cut() -> None:
    model = OwnBranch()
    prune_(model, torch.randn(1, 3, 8, 8), ratio=0.5, allocation="local")
    assert model.used.out_channels == model.drilled.out_channels == len(model.scale) == 2
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()


def test_a_head_that_refuses_its_input_is_uncalled_as_a_whole() -> None:
    connectivity = trace(TwoWays(least=9), torch.randn(3, 3))
    assert connectivity.uncalled == ("aux", "head")
    assert set(connectivity.layers) == set(connectivity.edges) == {"fc1", "fc2"}


def test_a_model_that_nni_has_wrapped_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[1].add_module("_nni_wrapper", nn.Identity())
    with pytest.raises(InputError, match="'1' is wrapped by NNI"):
        trace(net, torch.randn(2, 3))


class Caching(nn.Module):
    """Keeps what it has computed for its next pass in evaluation mode, in the ways in which people do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.randn(8))
        self.by_device: dict[str, Tensor] = {}
        self.listed: list[Tensor] = []
        self.grid: Tensor | None = None
        self.passes = [0]

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_device:
            self.by_device["cpu"] = 2 * self.bias
            self.listed.append(self.bias + 1)
            self.grid = self.bias.sin()
            self.late = self.bias.cos()
        self.passes[0] += 1
        scale = self.by_device["cpu"] + self.listed[0] + self.grid + self.late
        return self.head((torch.relu(self.body(x)) * scale[:, None, None]).mean((2, 3)))


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_model_caches_is_as_before(warm: bool) -> None:
    torch.manual_seed(0)
    model, x = Caching().eval(), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    if warm:
        model(x)
    before = (dict(model.by_device), list(model.listed), model.grid, vars(model).get("late"))
    trace(model, x)
    after = (dict(model.by_device), list(model.listed), model.grid, vars(model).get("late"))
    assert all(a is b for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True))
    assert hasattr(model, "late") == warm
    assert model.passes[0] == int(warm)
    assert torch.equal(model(x), twin(x))
