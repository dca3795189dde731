"""Models of other libraries, straight from their constructors and by default, and what such models brought to light."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

pytest.importorskip("timm", reason="an optional extra: pip install 'ss-pruning[timm]'")

from benchmarks.coverage import fresh as coverage_fresh
from ss_pruning import prune_
from ss_pruning.errors import SSPruningError
from ss_pruning.graph import trace
from ss_pruning.graph.layers import channel_axis, kind_of
from ss_pruning.surgery.equivalence.decisions import Holding, Recording
from tests.support import oracle

QUICK = ("ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn")
TRUE_REASONS = (
    "reaches the model's output",
    "no layer that ran reads it",
    "feeds several channels at once (a gate, a softmax or attention)",
    "the forward pass relies on its width",
)
# In which attention is excluded: of one block for queries, keys and values, or of heads whose size is one number. SSD's
# forward normalises each place by the length of what is there, over all channels.
MIXING = ("yolov10n", "yolo11n", "yolo12n", "segformer", "ssd300_vgg16")

# Those begin with low scores, or see noise for what it is: nothing that they return can be compared.
DETECTS_NOTHING = (
    *(
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "keypointrcnn_resnet50_fpn",
    ),
)


def small_one_of_each() -> Iterator[tuple[str, str, bool]]:
    """Library, name and whether it is slow: the first of each channel set."""
    torchvision_names = {
        fresh.family: fresh.name for fresh in reversed([*coverage_fresh.torchvision_detectors()])
    }
    yield from (("torchvision", name, name not in QUICK) for name in torchvision_names.values())
    yolos = ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n")
    tasks = [f"{name}-{task}" for name in ("yolov8n", "yolo11n") for task in ("seg", "pose", "cls", "obb")]
    yield from (("ultralytics", name, True) for name in (*yolos, *tasks))
    yield from (("transformers", name, True) for name in ("resnet", "convnextv2", "segformer"))


CASES = [
    pytest.param(library, name, id=name, marks=[pytest.mark.slow] * slow)
    for library, name, slow in small_one_of_each()
]


@pytest.mark.filterwarnings("default")  # those libraries' own
@pytest.mark.parametrize(("library", "name"), CASES)
def test_pruned_by_default_and_used(library: str, name: str) -> None:
    """Run at two sizes, copied, written and read, trained, compared: all from outside, see `benchmarks`."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    fresh = next(fresh for fresh in coverage_fresh.FRESH[library]() if fresh.name == name)
    line = coverage_fresh.examine(fresh, "default", timeout=300)
    assert (line["status"], line["error"]) == ("ok", "")
    assert 0.6 < line["macs_kept"] <= 0.7
    assert line["max_error"] < 1e-10
    reasons = [left["reason"] for left in line["excluded"]]
    allowed = TRUE_REASONS if name.partition("-")[0] in MIXING else TRUE_REASONS[:2]
    assert [reason for reason in reasons if not reason.startswith(allowed)] == []
    # Whether a fresh one detects something depends on the processor's rounding.
    assert name in DETECTS_NOTHING or not line["by_decisions"]


class Pooled(nn.Module):
    """Features at more places than there were, flattened: one place feeds several channels of the linear layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.features, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).relu()
        if self.how == "regions":
            boxes = torch.tensor([[0.0, 1.0, 1.0, 9.0, 8.0], [0.0, 2.0, 3.0, 8.0, 9.0]]).to(y)
            y = torchvision.ops.roi_align(y, boxes, (7, 7), sampling_ratio=2)
        elif self.how == "enlarged":
            y = F.interpolate(y[..., :4, :4], size=(7, 7), mode="bilinear")
        else:
            y = F.adaptive_avg_pool2d(y, 7)
        if self.how == "channels last":
            y = y.permute(0, 2, 3, 1)
        return self.head(y.flatten(1))


@pytest.mark.parametrize("how", ["pooled", "regions", "enlarged", "channels last"])
def test_what_is_pooled_to_more_places_and_flattened_is_cut(how: str) -> None:
    torch.manual_seed(0)
    dense, model, x = Pooled(how).eval(), Pooled(how).eval(), torch.randn(1, 3, 10, 10)
    model.load_state_dict(dense.state_dict())
    report = prune_(model, x, ratio=0.5, allocation="local")
    assert (model.features.out_channels, model.head.in_features) == (4, 4 * 49)
    assert [left.paths for left in report.excluded] == [("head",)]
    removed = {c.path: set(c.removed) for c in model.ss_pruning_plan.cuts if c.side == "in"}
    with torch.no_grad():
        expected = oracle.masked(dense, removed)(x.double())
        assert torch.allclose(model.double()(x.double()), expected, rtol=0, atol=1e-12)


class Everything(nn.Module):
    """Channels that meet behind the flatten: no block of the linear layer is one channel's own."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).relu()
        return self.head(F.adaptive_avg_pool2d(y * y.mean(1, keepdim=True), 2).flatten(1))


def test_a_gate_before_the_flatten_keeps_its_channels() -> None:
    model = Everything().eval()
    with pytest.raises(SSPruningError, match="feeds several channels at once"):
        prune_(model, torch.randn(1, 3, 8, 8), ratio=0.5)
    assert model.features.out_channels == 8


class Gated(nn.Module):
    """Two gates, of one half of the channels each."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.gates, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x).sigmoid().repeat_interleave(4, 1)
        return self.head(self.features(x) * gates)


def test_gates_of_blocks_tie_no_channels() -> None:
    edges = {edge.source: edge for edge in trace(Gated().eval(), torch.randn(1, 3, 8, 8)).edges["head"]}
    assert edges["features"].pairs.tolist() == [[i, i] for i in range(8)]
    assert (edges["gates"].pairs.tolist(), edges["gates"].broadcast.tolist()) == ([], [0, 1])


class Affine(nn.Module):
    """A norm over channels, or a global response, whose tensors have axes of size 1."""

    def __init__(self, kind: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.kind, self.axis = kind, max(range(4), key=lambda axis: shape[axis])
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)
        self.bias = nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "norm":
            y = (x - x.mean(self.axis, keepdim=True)) / (x.var(self.axis, keepdim=True) + 1e-5).sqrt()
            return self.weight * y + self.bias
        size = x.norm(dim=(1, 2) if self.axis == 3 else (2, 3), keepdim=True)
        return x + self.weight * x * size / (size.mean(self.axis, keepdim=True) + 1e-6) + self.bias


@pytest.mark.parametrize("kind", ["norm", "response"])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 1, 8)], ids=["first", "last"])
def test_tensors_with_axes_of_size_one_are_cut(kind: str, shape: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), Affine(kind, shape), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            if shape[3] == 8:
                return self.two(self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            return self.two(self.norm(y))

    torch.manual_seed(0)
    net = Net().eval()
    assert kind_of(net.norm) == kind
    # Square images of 8 pixels: the sizes of the axes do not tell which holds the channels.
    assert channel_axis(net.norm, torch.rand(1, 8, 8, 8)) == shape.index(8)
    report = prune_(net, torch.randn(1, 3, 10, 10), ratio=0.5, allocation="local")
    half = tuple(4 if size == 8 else 1 for size in shape)
    assert (net.one.out_channels, net.norm.weight.shape, net.norm.bias.shape) == (4, half, half)
    assert report.max_error < 1e-10


class Small(nn.Module):
    """As the heads of detectors: a group norm that sees one position at the coarsest level."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 32, 1), nn.GroupNorm(4, 32), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [x, F.adaptive_avg_pool2d(x, 1)]
        return torch.cat([self.two(self.norm(self.one(level))).flatten(2) for level in levels], 2)


@pytest.mark.parametrize(("images", "channels"), [(1, 8), (2, 4)])
def test_groups_of_a_norm_that_sees_one_position_keep_two_channels(images: int, channels: int) -> None:
    """Of one channel a group has no variance there, and torch refuses; with two images it does not look."""
    torch.manual_seed(0)
    model = Small().eval()
    prune_(model, torch.randn(images, 3, 8, 8), ratio=0.875, allocation="local")
    assert (model.one.out_channels, model.norm.num_channels) == (channels, channels)


class Finds(nn.Module):
    """Returns the scores above a limit: none of a fresh net's."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.two(self.one(x).relu()).sigmoid().flatten()
        return scores[scores > 0.99]


def test_the_difference_is_that_of_what_is_decided_on() -> None:
    scores = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    recording = Recording()
    with recording:
        assert not (scores > 2).any()
    holding = Holding(recording.decisions, 1e-10)
    with holding:
        assert not (scores + 3e-12 > 2).any()
    assert (holding.compared, holding.differs) == (9, "")
    assert abs(holding.error - 3e-12) < 1e-15


def test_a_report_says_how_near_the_numbers_are_that_were_decided_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ss_pruning.surgery.equivalence.decisions.difference", lambda a, b: 4e-13)
    torch.manual_seed(0)
    report = prune_(Finds().eval(), torch.randn(1, 3, 12, 12), ratio=0.5)
    assert (report.by_decisions, report.max_error) == (True, 4e-13)
    assert "to within 4.0e-13" in report.verification()


def test_what_only_a_decision_reads_is_named_so() -> None:
    """As of a region proposal network, whose logits choose boxes and are not returned."""

    class Proposes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.logits = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1)
            self.boxes = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.features(x).relu()
            best = self.logits(y).flatten(1).topk(5).indices
            return self.boxes(y).flatten(2)[..., best[0]]

    torch.manual_seed(0)
    report = prune_(Proposes().eval(), torch.randn(1, 3, 10, 10), ratio=0.5)
    reasons = {path: left.reason for left in report.excluded for path in left.paths}
    assert "top-k" in reasons["logits"]
    assert reasons["boxes"] == "reaches the model's output"


def test_the_catalogue_is_of_installed_names() -> None:
    """A renamed constructor of torchvision's would be found here, not in a slow run."""
    detection = importlib.import_module("torchvision.models.detection")
    names = [fresh.name for fresh in coverage_fresh.torchvision_detectors()]
    assert len(names) == len(set(names))
    assert all(callable(getattr(detection, name)) for name in names)
