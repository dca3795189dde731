"""The CIFAR-10 nets of the benchmarks, and where their weights are.

* ResNets of He et al. (2016), section 4.2: 6n+2 layers, parameter-free shortcuts ("option A"). The module names are
  those of the checkpoints that go around for these nets, so that those load as they are.
* VGG-16 with batch norm (Simonyan and Zisserman 2015; one linear layer, as is usual on CIFAR-10) and DenseNet-BC, k=12
  (Huang et al. 2017), both narrow or shallow enough for one CPU core: `benchmarks.data.train_cifar` trains them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock as TorchvisionBlock

from benchmarks.data.small_nets import SMALL_NETS

BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: halve the image
VGG19 = (64, 64, 0, 128, 128, 0, *(256,) * 4, 0, *(512,) * 4, 0, *(512,) * 4, 0)
VGG_WIDTH = RESNET18_WIDTH = 0.25
DENSENET_DEPTH, GROWTH = 28, 12


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the width changes, option A: zero channels before and after.

    How many zero channels is kept as plain integers and read in `forward`. A cut of the stream leaves fewer
    of them; numbers that are stored can follow the cut, numbers that are computed from a width in `forward`,
    or hidden in a lambda, could not.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shrinks = stride == 2
        self.pad_before = (outputs - inputs) // 2
        self.pad_after = outputs - inputs - self.pad_before

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shrinks:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad_before, self.pad_after))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """Three stages of `blocks` basic blocks, of widths 16, 32 and 64."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def cifar_resnet(name: str) -> CifarResNet:
    """Build `resnet20`, `resnet32`, `resnet44`, `resnet56` or `resnet110`, untrained."""
    return CifarResNet(BLOCKS[name])


def load_checkpoint(name: str, folder: str | os.PathLike[str]) -> CifarResNet:
    """Build a net and load its published weights; it comes in evaluation mode.

    Args:
        name: `resnet20` or `resnet56`.
        folder: Where the checkpoints lie.

    Raises:
        FileNotFoundError: The checkpoint is not there; the message says where it is from.
    """
    path = Path(folder) / CHECKPOINTS[name]
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint '{path}'. It is '{CHECKPOINTS[name]}' of the GitHub repository "
            "akamaster/pytorch_resnet_cifar10: put it there, or say with --data where it is (looked for "
            "in DATA/pretrained)."
        )
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = cifar_resnet(name)
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def stream_layers(model: CifarResNet) -> list[str]:
    """Paths of the layers that write the residual stream: the stem and the last layer of every block."""
    stages = {"layer1": model.layer1, "layer2": model.layer2, "layer3": model.layer3}
    return ["conv1", *(f"{stage}.{i}.conv2" for stage, blocks in stages.items() for i in range(len(blocks)))]


def vgg16bn(width: float = VGG_WIDTH, classes: int = 10) -> nn.Sequential:
    """VGG-16-BN with all widths multiplied by `width`."""
    return _vgg(VGG16, width, classes)


def _vgg(widths: tuple[int, ...], width: float, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for full in widths:
        if not full:
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = int(full * width)
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, classes))


def vgg19bn(width: float = VGG_WIDTH, classes: int = 10) -> nn.Sequential:
    """VGG-19-BN with all widths multiplied by `width`."""
    return _vgg(VGG19, width, classes)


def resnet18(width: float = RESNET18_WIDTH, classes: int = 10) -> nn.Sequential:
    """ResNet-18 as is usual on small images: a 3x3 stem, four stages of two blocks, 1x1 shortcuts."""
    inputs = int(64 * width)
    layers: list[nn.Module] = [
        nn.Conv2d(3, inputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
    ]
    for stage, stride in enumerate((1, 2, 2, 2)):
        outputs = int(64 * width) << stage
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        layers += [
            TorchvisionBlock(inputs, outputs, stride, shortcut if stride > 1 else None),
            TorchvisionBlock(outputs, outputs),
        ]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Bottleneck(nn.Module):
    """BN, ReLU, 1x1 to `4k` channels, BN, ReLU, 3x3 to `k` channels, which are appended to the input."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


def densenet(depth: int = DENSENET_DEPTH, classes: int = 10) -> nn.Sequential:
    """DenseNet-BC with three blocks of `(depth - 4) / 6` bottlenecks; transitions halve channels and image."""
    channels = 2 * GROWTH
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            layers.append(Bottleneck(channels))
            channels += GROWTH
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < 2:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


TRAINED_HERE: dict[str, Callable[[], nn.Module]] = {"vgg16bn": vgg16bn, "densenet": densenet}
NETS = (*CHECKPOINTS, *TRAINED_HERE)


def load_net(name: str, data: Path, weights: Path) -> nn.Module:
    """One of `NETS` or `SMALL_NETS` in evaluation mode: weights from `data`/pretrained, or our own from `weights`.

    Raises:
        FileNotFoundError: The weights are not there; the message says how to get them.
    """
    if name in CHECKPOINTS:
        return load_checkpoint(name, data / "pretrained")
    path = weights / f"{name}.safetensors"
    if not path.is_file():
        script = f"small_nets --nets {name}" if name in SMALL_NETS else f"train_cifar {name}"
        raise FileNotFoundError(
            f"no '{path}'; train it with: python -m benchmarks.data.{script} --out {weights}"
        )
    model = (TRAINED_HERE | SMALL_NETS)[name]()
    model.load_state_dict(load_file(path))
    return model.eval()
