"""Strength, shares, entropy and statistics against slow twins, and the invariances of the definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ss_pruning import SynapticImportance, prune_, synaptic_strength
from ss_pruning.errors import InputError, ModelError
from ss_pruning.graph.tracing import trace
from ss_pruning.importance.strength import at_synapses, by_input_channel, inner_paths
from tests.support import oracle
from tests.support.snapshot import Bomb, snapshot
from tests.support.zoo import BY_NAME, ZOO, Net

every_net = pytest.mark.parametrize("net", ZOO, ids=lambda net: net.name)

# Its channels come from four norm channels in turn, pixel by pixel: their variances do not simply add.
UNDEFINED = {("pixel_shuffle", "conv1")}


def synaptic_paths(net: Net, model: nn.Module) -> list[str]:
    """Layers that mix channels: not depthwise, not along the channels."""
    modules = {path: model.get_submodule(path) for path in net.sources}
    return [
        path
        for path, m in modules.items()
        if oracle.widths(m)[1] == 1 or oracle.groups_of(m) < oracle.widths(m)[1]
    ]


def expected_strength(net: Net, model: nn.Module, path: str) -> Tensor:
    scales = oracle.variances(model, net.calls.get(path, [net.sources[path]]))
    return torch.tensor(oracle.strength(model.get_submodule(path), scales), dtype=torch.float64)


@every_net
def test_strength_equals_the_oracle(net: Net) -> None:
    model = net.make()
    strengths = synaptic_strength(model, net.example)
    paths = [
        p
        for p in synaptic_paths(net, model)
        if not isinstance(model.get_submodule(p), nn.Conv1d) or net.name != "channel_attention"
    ]
    assert set(paths) <= set(strengths) <= set(net.sources)
    for path in paths:
        if (net.name, path) not in UNDEFINED:
            expected = expected_strength(net, model, path)
            assert strengths[path].shape == expected.shape, path
            torch.testing.assert_close(strengths[path].double(), expected, rtol=1e-5, atol=1e-9, msg=path)


@every_net
def test_shares_and_entropy_equal_the_oracle(net: Net) -> None:
    strengths = synaptic_strength(net.make(), net.example)
    shares, entropy = strengths.shares(), strengths.entropy()
    assert set(shares) == set(entropy) == set(strengths)
    for path, s in strengths.items():
        table = s.double().tolist()
        torch.testing.assert_close(
            shares[path].double(),
            torch.tensor(oracle.shares(table), dtype=torch.float64),
            rtol=1e-5,
            atol=1e-9,
        )
        torch.testing.assert_close(
            entropy[path].double(),
            torch.tensor(oracle.entropy(table), dtype=torch.float64),
            rtol=1e-5,
            atol=1e-5,
        )


@every_net
def test_unscaled_marks_channels_without_a_norm(net: Net) -> None:
    model = net.make()
    unscaled = synaptic_strength(model, net.example).unscaled
    for path in synaptic_paths(net, model):
        if path not in unscaled:
            continue
        truth = [
            not any(isinstance(module_of(model, p), oracle.NORMS) for p, _ in channel)
            for channel in net.sources[path]
        ]
        assert unscaled[path].dtype == torch.bool
        assert unscaled[path].tolist() == truth, path


def module_of(model: nn.Module, path: str) -> nn.Module | None:
    return None if path == oracle.INPUT else model.get_submodule(path)


@pytest.mark.parametrize("statistics", ["batchnorm", "gaussian", "data"])
@pytest.mark.parametrize(
    "name", ["plain", "shared", "layer_scale", "blur_pool", "flattened", "instance_norm", "prelu"]
)
def test_a_call_leaves_the_model_alone(name: str, statistics: str) -> None:
    net = BY_NAME[name]
    model = net.make().train()
    sum(x.sum() for x in oracle.tensors(model(*net.inputs))).backward()
    before = snapshot(model)
    synaptic_strength(model, net.example, statistics=[net.example] if statistics == "data" else statistics)
    assert snapshot(model) == before


@pytest.mark.parametrize("statistics", ["batchnorm", "gaussian", "data"])
def test_a_call_leaves_the_model_alone_when_forward_raises(statistics: str) -> None:
    net = BY_NAME["residual"]
    model = Bomb(net.make()).train()
    before = snapshot(model)
    with pytest.raises(ModelError, match="boom"):
        synaptic_strength(
            model, net.example, statistics=[net.example] if statistics == "data" else statistics
        )
    assert snapshot(model) == before


def test_shares_sum_to_one_for_every_output() -> None:
    for net in ZOO:
        for path, share in synaptic_strength(net.make(), net.example).shares().items():
            sums = share.double().sum(1)
            assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all(), (net.name, path)


def test_an_output_that_receives_nothing_has_no_shares_and_no_entropy() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    with torch.no_grad():
        model.conv2.weight[3] = 0
    strengths = synaptic_strength(model, net.example)
    assert strengths.shares()["conv2"][3].eq(0).all()
    assert strengths.entropy()["conv2"][3].eq(-math.inf).all()
    assert strengths.entropy()["conv2"][2].isfinite().all()


def test_entropy_of_a_known_synapse() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 3.0)
    entropy = synaptic_strength(model, torch.zeros(2, 1)).entropy()["0"]
    assert entropy.item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 9), rel=1e-6)


@pytest.mark.parametrize("statistics", ["batchnorm", "gaussian", "data"])
def test_permuting_channels_permutes_strengths(statistics: str) -> None:
    net = BY_NAME["plain_bias"]
    model, twin = net.make(), net.make()
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    with torch.no_grad():
        for tensor in (
            twin.conv1.weight,
            twin.conv1.bias,
            *twin.bn1.parameters(),
            twin.bn1.running_mean,
            twin.bn1.running_var,
        ):
            tensor.copy_(tensor[order])
        twin.conv2.weight.copy_(twin.conv2.weight[:, order])
    torch.testing.assert_close(twin(net.example), model(net.example))
    chosen = [net.example] if statistics == "data" else statistics
    a, b = synaptic_strength(model, net.example, chosen), synaptic_strength(twin, net.example, chosen)
    tolerance = (
        {"rtol": 0.1, "atol": 0.0} if statistics == "gaussian" else {"rtol": 1e-4, "atol": 1e-7}
    )  # other noise
    torch.testing.assert_close(b["conv1"], a["conv1"][order], **tolerance)
    torch.testing.assert_close(b["conv2"], a["conv2"][:, order], **tolerance)
    torch.testing.assert_close(b["conv3"], a["conv3"], **tolerance)


@pytest.mark.parametrize(
    "name", ["plain", "residual_chain", "dense", "grouped", "separable", "transposed_grouped"]
)
def test_rescaling_weights_before_a_norm_changes_no_share(name: str) -> None:
    """The same function in other weights: every output of every layer before a norm is rescaled."""
    net = BY_NAME[name]
    model, twin = net.make(), net.make()
    norms = dict(twin.named_modules())
    followed = {p: n for channel_set in net.channel_sets for p, n in pairs_before_norms(model, channel_set)}
    assert followed
    with torch.no_grad():
        for path, norm in followed.items():
            layer = norms[path]
            factor = torch.rand(oracle.widths(layer)[0], generator=torch.Generator().manual_seed(1)) * 5 + 0.1
            rescale(layer, factor)
            norms[norm].running_mean.mul_(factor)
            norms[norm].running_var.add_(norms[norm].eps).mul_(factor**2).sub_(norms[norm].eps)
    for x, y in zip(oracle.tensors(model(*net.inputs)), oracle.tensors(twin(*net.inputs)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    a, b = synaptic_strength(model, net.example), synaptic_strength(twin, net.example)
    for path, share in a.shares().items():
        torch.testing.assert_close(b.shares()[path], share, rtol=1e-4, atol=1e-7)
    assert any(not torch.allclose(b[path], a[path]) for path in followed)


def pairs_before_norms(
    model: nn.Module, channel_set: frozenset[tuple[str, str, int]]
) -> list[tuple[str, str]]:
    """`(layer, norm)` where a channel set holds a channel of each, by name: conv1 with bn1, dw with bn1.0."""
    table = {"conv0": "bn0", "conv1": "bn1", "conv2": "bn2", "pw": "bn2", "dw": "bn1.0", "up": "bn2"}
    layers = {path for path, side, _ in channel_set if side == "out"}
    found = []
    for path in layers:
        head, _, last = path.rpartition(".")
        norm = f"{head}.{table.get(last, '')}".lstrip(".")
        if norm in layers and isinstance(model.get_submodule(norm), nn.BatchNorm2d):
            found.append((path, norm))
    return found


def rescale(layer: nn.Module, factor: Tensor) -> None:
    """Multiplies every output of a bias-free convolution."""
    if isinstance(layer, oracle.TRANSPOSED):
        rows = layer.in_channels // layer.groups
        for g, part in enumerate(factor.chunk(layer.groups)):
            layer.weight[g * rows : (g + 1) * rows].mul_(part[None, :, None, None])
    else:
        layer.weight.mul_(factor[:, None, None, None])


@pytest.mark.parametrize("act", ["plain", "leaky", "silu", "hardswish", "relu6", "negative_and_zero_gammas"])
def test_gaussian_statistics_equal_a_long_simulation(act: str) -> None:
    """Each norm's output is `gamma z + beta`; then the activation, and a 2x2 maximum before conv3."""
    net = BY_NAME[act]
    model = net.make()
    strengths = synaptic_strength(model, net.example, statistics="gaussian")
    noise = torch.Generator().manual_seed(11)
    for norm, path, places in ((model.bn1, "conv2", 1), (model.bn2, "conv3", 4)):
        scales = []
        for gamma, beta in zip(norm.weight.tolist(), norm.bias.tolist(), strict=True):
            z = torch.randn(200_000, places, generator=noise, dtype=torch.float64)
            scales.append(float(model.act(gamma * z + beta).amax(1).var()))
        expected = torch.tensor(oracle.strength(model.get_submodule(path), scales), dtype=torch.float64)
        torch.testing.assert_close(strengths[path].double(), expected, rtol=0.05, atol=1e-6)


def test_gaussian_statistics_of_a_rectifier_in_closed_form() -> None:
    net = BY_NAME["inplace"]
    model = net.make()
    scales = []
    for gamma, beta in zip(model.bn1.weight.tolist(), model.bn1.bias.tolist(), strict=True):
        t = beta / abs(gamma)
        density, below = math.exp(-t * t / 2) / math.sqrt(2 * math.pi), (1 + math.erf(t / math.sqrt(2))) / 2
        mean = abs(gamma) * (t * below + density)
        scales.append(gamma**2 * ((1 + t * t) * below + t * density) - mean**2)
    expected = torch.tensor(oracle.strength(model.conv2, scales), dtype=torch.float64)
    found = synaptic_strength(model, net.example, statistics="gaussian")["conv2"].double()
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_gaussian_statistics_look_at_the_shape_of_the_example_only() -> None:
    """Neither the values of the example nor its batch size (a head sees one vector an image) may matter."""
    net = BY_NAME["plain"]
    model = net.make()
    a = synaptic_strength(model, net.example, statistics="gaussian")
    b = synaptic_strength(model, torch.zeros_like(net.example), statistics="gaussian")
    c = synaptic_strength(model, torch.zeros_like(net.example[:1]), statistics="gaussian")
    for path, s in a.items():
        torch.testing.assert_close(b[path], s, rtol=0, atol=0)
        torch.testing.assert_close(c[path], s, rtol=0.2, atol=0)
    assert all(s.gt(0).all() for s in a.values())


def test_gaussian_statistics_are_reproducible() -> None:
    net = BY_NAME["residual_chain"]
    model = net.make()
    a = synaptic_strength(model, net.example, statistics="gaussian")
    torch.manual_seed(99)
    b = synaptic_strength(model, net.example, statistics="gaussian")
    assert all(torch.equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize(
    "name",
    ["plain", "residual_chain", "dense", "squeeze_excite_conv", "padded_shortcut", "grouped", "layer_norm"],
)
def test_data_statistics_equal_what_is_measured(name: str) -> None:
    net = BY_NAME[name]
    model = net.make()
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(n, *net.shapes[0][1:], generator=generator) * 2 + 0.5 for n in (40, 24, 40)]
    strengths = synaptic_strength(model, net.example, statistics=iter(batches))
    for path in synaptic_paths(net, model):
        scales = measured_variances(model, path, batches)
        expected = torch.tensor(oracle.strength(model.get_submodule(path), scales), dtype=torch.float64)
        torch.testing.assert_close(strengths[path].double(), expected, rtol=1e-3, atol=1e-7, msg=path)


def measured_variances(model: nn.Module, path: str, batches: list[Tensor]) -> list[float]:
    """The population variance of every input channel over all images and places, in float64."""
    seen: list[Tensor] = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    axis = oracle.channel_axis(layer, seen[0])
    everything = torch.cat([x.movedim(axis, 0).flatten(1) for x in seen], dim=1)
    return [float(((row - row.mean()) ** 2).mean()) for row in everything]


def test_data_statistics_take_images_with_labels() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    images = torch.randn(32, *net.shapes[0][1:])
    labelled = [(images[:16], torch.zeros(16)), (images[16:], torch.zeros(16))]
    a = synaptic_strength(model, net.example, statistics=labelled)
    b = synaptic_strength(model, net.example, statistics=[images[:16], images[16:]])
    assert all(torch.equal(a[path], b[path]) for path in a)


def test_strengths_need_no_batch_norm_statistics_of_the_example() -> None:
    net = BY_NAME["plain"]
    model = net.make()
    a, b = synaptic_strength(model, net.example), synaptic_strength(model, net.example * 100 + 3)
    assert all(torch.equal(a[path], b[path]) for path in a)


def test_a_subclass_that_remakes_its_weight_still_has_strengths_of_the_right_shape() -> None:
    net = BY_NAME["standardised"]
    assert {path: tuple(s.shape) for path, s in synaptic_strength(net.make(), net.example).items()} == {
        "conv1": (8, 3),
        "conv2": (6, 8),
        "fc": (5, 6),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    net = BY_NAME["plain"]
    model = net.make()
    with torch.no_grad():
        model.conv2.weight[1, 2, 0, 0] = value
    with pytest.raises(ModelError, match=r"conv2.*(NaN|Inf|finite)"):
        synaptic_strength(model, net.example)


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.float16, "'2' reads .*float16.*model.float()"), (torch.float32, "'2' reads")]
)
def test_activations_that_overflow_are_named_with_the_layer(dtype: torch.dtype, said: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.rand(8, 3, 4, 4).to(dtype)
    with torch.no_grad():
        model.to(dtype)[0].weight.fill_(3e4 if dtype == torch.float16 else 3e38)
    with pytest.raises(ModelError, match=said):
        synaptic_strength(model, x, statistics=[x])


def test_unknown_statistics_are_refused_by_name() -> None:
    net = BY_NAME["plain"]
    with pytest.raises(InputError, match=r"batchnorm.*gaussian"):
        synaptic_strength(net.make(), net.example, statistics="gausian")


def test_no_batches_are_refused() -> None:
    net = BY_NAME["plain"]
    with pytest.raises(InputError, match="batch"):
        synaptic_strength(net.make(), net.example, statistics=[])


def test_functional_twin_of_the_example_in_the_definition() -> None:
    """`s^2` is the variance that a synapse delivers: it adds up to the variance of the output."""
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(6, generator=generator) + 0.5)
    delivered = synaptic_strength(model, torch.zeros(2, 6))["1"].double().square().sum(1)
    z = torch.randn(400_000, 6, generator=generator)
    measured = F.linear(model[0].weight.detach() * z, model[1].weight.detach()).double().var(0)
    torch.testing.assert_close(delivered, measured, rtol=0.02, atol=0)


def test_a_head_with_one_output_is_no_inner_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
    )
    assert inner_paths(trace(net.eval(), torch.zeros(1, 3, 8, 8))) == ["2"]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_synapses_are_found_from_their_inputs_and_back(groups: int) -> None:
    """By plain loops: output `k` reads the inputs of its group, in order."""
    layer, outputs, inputs = nn.Conv2d(6, 12, 1, groups=groups), 12, 6
    scores, channels = torch.rand(outputs, inputs // groups), torch.rand(inputs)
    found, placed = by_input_channel(layer, scores), at_synapses(layer, channels, outputs)
    assert found.shape == (inputs, outputs // groups)
    assert placed.shape == scores.shape
    for k in range(outputs):
        group, row = divmod(k, outputs // groups)
        for position in range(inputs // groups):
            c = group * (inputs // groups) + position
            assert found[c, row] == scores[k, position]
            assert placed[k, position] == channels[c]


def test_a_model_that_can_never_train_is_refused_though_its_connectivity_is_known() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()

    x = torch.zeros(1, 3, 4, 4)
    known = trace(net(), x)
    with torch.inference_mode():
        frozen = net()
    with pytest.raises(InputError, match=r"torch\.inference_mode"):
        synaptic_strength(frozen, x, connectivity=known)


def small_weights() -> nn.Sequential:
    """One layer's weights are so small that their squares are 0 in half precision; its norm makes up for that."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    )
    model.extend([nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)])
    with torch.no_grad():
        model[3].weight.mul_(1e-3)
        model[1].weight.uniform_(1e-4, 1.0)
        model[4].running_var.fill_(1e-3)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_strengths_of_its_weights(dtype: torch.dtype) -> None:
    model = small_weights().to(dtype)
    strengths = synaptic_strength(model, torch.zeros(1, 3, 12, 12, dtype=dtype))
    weight, scale = (model[i].weight.detach().double() for i in (3, 1))
    for k in range(8):
        for c in range(8):
            expected = float(scale[c].abs()) * math.sqrt(sum(float(w) ** 2 for w in weight[k, c].flatten()))
            assert math.isclose(strengths["3"][k, c], expected, rel_tol=1e-5)


@pytest.mark.parametrize("statistics", ["batchnorm", "gaussian"])
@pytest.mark.parametrize("score", ["share", "relevance"])
def test_scores_that_are_relative_do_not_know_how_large_weights_are(statistics: str, score: str) -> None:
    """Squares of 2^90 overflow in float32, those of 2^-90 vanish; weights by powers of two are exact."""
    found = []
    for factor in (1.0, 2.0**90, 2.0**-90):
        model, x = small_weights(), torch.zeros(1, 3, 12, 12)
        model[8].weight.data.mul_(factor)
        scores = SynapticImportance(statistics, score).scorer(model, trace(model, x), x)  # type: ignore[arg-type]
        found.append(torch.cat([scores.of("3"), scores.of("8")]))
    assert found[0].count_nonzero() == len(found[0])
    assert all(torch.equal(scores, found[0]) for scores in found[1:])


def test_a_model_in_half_precision_is_cut_like_the_same_in_single() -> None:
    widths = []
    for dtype in (torch.float16, torch.float32):
        model = small_weights().half().to(dtype)
        report = prune_(model, torch.zeros(1, 3, 12, 12, dtype=dtype), ratio=0.4)
        widths.append([layer.outputs_after for layer in report.layers])
    assert widths[0] == widths[1]
    assert min(widths[0][:2]) > 1
