"""The paper's form of a net, strengths as parameters: equal outputs there and back, and refusals that say why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ss_pruning import synaptic_strength
from ss_pruning.errors import InputError, ModelError
from ss_pruning.sparsity.masks import mask_
from ss_pruning.sparsity.penalty import StrengthPenalty
from ss_pruning.sparsity.reparametrization import ExplicitStrengths, explicit_strength
from tests.support.snapshot import snapshot
from tests.support.zoo import BY_NAME


def stirred(model: nn.Module) -> nn.Module:
    """With norms as training leaves them, scales positive."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(generator=generator)
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def conv_bn(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation or nn.ReLU()),
        *(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)),
    )


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


NETS = [
    "plain",
    "leaky",
    "residual",
    "projection",
    "pre_activation",
    "dense",
    "grouped",
    "separable",
    "shared",
    "silu",
]


@pytest.mark.parametrize("name", NETS)
def test_there_and_back_computes_the_same(name: str) -> None:
    net = BY_NAME[name]
    model, example = stirred(net.make()).double(), net.example.double()
    expected, names = model(example), [n for n, _ in model.named_parameters()]
    keep = ["bn1", "bn2"] if name == "silu" else []
    explicit = ExplicitStrengths(model, example, keep=keep)
    assert set(keep) <= set(explicit.kept)
    assert torch.allclose(model(example), expected, atol=1e-10)
    explicit.merge_()
    assert torch.allclose(model(example), expected, atol=1e-10)
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16_bn", "densenet121"))],
)
def test_real_nets_go_there_and_back(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    model = stirred(torchvision.models.get_model(name, weights=None)).double()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        explicit = ExplicitStrengths(model, image)
        there = model(image)
        explicit.merge_()
        back = model(image)
    scale = expected.abs().max()
    assert float((there - expected).abs().max() / scale) <= 1e-10
    assert float((back - expected).abs().max() / scale) <= 1e-10
    if (
        name != "vgg16_bn"
    ):  # whose last map is so small here that its pool spreads one value over several inputs
        assert bool(explicit.kept) == (name == "resnet18")  # several sources meet in its stream


def test_the_parameters_are_the_strengths() -> None:
    model = stirred(conv_bn())
    strengths = synaptic_strength(model, IMAGE)
    explicit = ExplicitStrengths(model, IMAGE)
    assert explicit.paths == ("3",)
    assert explicit.moved == ("1", "4")[:1]
    strength = explicit_strength(model[3])
    assert strength is not None
    assert torch.allclose(strength, strengths["3"])
    assert model[1].weight.tolist() == [1.0] * 4
    assert not model[1].weight.requires_grad
    assert torch.allclose(StrengthPenalty(model, IMAGE)(), strength.sum())


def test_kept_scales_are_part_of_the_strength() -> None:
    model = stirred(conv_bn(nn.SiLU()))
    expected, strengths = model(IMAGE), synaptic_strength(model, IMAGE)
    explicit = ExplicitStrengths(model, IMAGE, keep=["1"])
    assert explicit.kept == ("1",)
    strength = explicit_strength(model[3])
    assert strength is not None
    assert torch.allclose(strength, strengths["3"])
    assert torch.allclose(model(IMAGE), expected, atol=1e-6)


def test_training_moves_strengths_and_the_plain_net_follows() -> None:
    model = stirred(conv_bn())
    explicit = ExplicitStrengths(model, IMAGE)
    penalty = StrengthPenalty(model, IMAGE)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(3):
        sgd.zero_grad()
        (model(IMAGE).square().sum() + 0.1 * penalty()).backward()
        sgd.step()
    strength = explicit_strength(model[3])
    assert strength is not None
    penalty.shrink_(strength.detach().abs().median().item())
    zero = strength.detach() == 0
    assert zero.any()
    trained = model(IMAGE)
    explicit.merge_()
    assert torch.allclose(model(IMAGE), trained, atol=1e-6)
    assert not model[3].weight.detach()[zero].any()
    assert model[1].weight.requires_grad


@pytest.mark.parametrize(
    ("activation", "scale", "match"),
    [
        (nn.SiLU(), None, "'1' into the kernels .* not positively homogeneous"),
        (nn.ReLU6(), None, "not positively homogeneous"),
        (nn.ReLU(), -0.5, r"scale of '1' is not positive in channels \[2\].*keep=\['1'\]"),
        (nn.ReLU(), 0.0, "not positive"),
    ],
)
def test_what_cannot_be_moved_is_refused_and_the_model_is_as_it_was(
    activation: nn.Module, scale: float | None, match: str
) -> None:
    model = stirred(conv_bn(activation))
    with torch.no_grad():
        model[1].weight.mul_(4)  # beyond the knee of ReLU6
        if scale is not None:
            model[1].weight[2] = scale
    before = snapshot(model)
    with pytest.raises(ModelError, match=match):
        ExplicitStrengths(model, IMAGE)
    assert snapshot(model) == before


def test_leaky_and_parametric_rectifiers_are_homogeneous() -> None:
    for activation in (nn.LeakyReLU(0.1), nn.PReLU(), nn.Identity()):
        model = stirred(conv_bn(activation))
        expected = model(IMAGE)
        assert ExplicitStrengths(model, IMAGE).moved == ("1",)
        assert torch.allclose(model(IMAGE), expected, atol=1e-6)


def test_bad_arguments() -> None:
    model = stirred(conv_bn())
    with pytest.raises(InputError, match=r"no such layers: \['nope'\]"):
        ExplicitStrengths(model, IMAGE, keep=["nope"])
    with pytest.raises(InputError, match="no layer is left"):
        ExplicitStrengths(model, IMAGE, ignore=["3"])
    ExplicitStrengths(model, IMAGE)
    with pytest.raises(ModelError, match="'3' has a parametrisation already"):
        ExplicitStrengths(model, IMAGE)


def test_a_copy_is_independent() -> None:
    model = stirred(conv_bn())
    ExplicitStrengths(model, IMAGE)
    twin = copy.deepcopy(model)
    before: Tensor = twin(IMAGE)
    with torch.no_grad():
        model[3].parametrizations.weight.original0.zero_()
    assert torch.equal(twin(IMAGE), before)
    assert not torch.equal(model(IMAGE), before)


class Fork(nn.Module):
    """One norm that two convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y: Tensor = self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))
        return y


def test_a_masked_reader_of_a_scale_that_would_be_moved_is_refused() -> None:
    model = stirred(Fork())
    expected = model(IMAGE)
    assert ExplicitStrengths(twin := copy.deepcopy(model), IMAGE, ignore=["right"]).moved == ("norm",)
    assert torch.allclose(twin(IMAGE), expected, atol=1e-6)
    mask_(model, {"right": torch.ones(5, 4, dtype=torch.bool)})
    before = snapshot(model)
    with pytest.raises(ModelError, match="'right' has a parametrisation already"):
        ExplicitStrengths(model, IMAGE, ignore=["right"])
    assert snapshot(model) == before


def test_in_half_precision_weights_stay_what_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    model.append(nn.Linear(8 * 16, 4)).eval().half()
    x = torch.randn(2, 3, 8, 8).half()
    with torch.no_grad():
        model[3].weight.mul_(1e-3)  # squares that vanish in half precision
        dense = model(x)
        explicit = ExplicitStrengths(model, x)
        assert model[3].weight.dtype == torch.float16
        torch.testing.assert_close(model(x), dense, rtol=1e-2, atol=1e-3)
        assert explicit.merge_()[3].weight.count_nonzero() == model[3].weight.numel()
