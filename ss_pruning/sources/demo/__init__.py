"""The embedded demo: a small residual CNN trained on scikit-learn's real 8x8 digits.

It exists so that a fresh clone prunes a real trained network without downloading anything. On the
command line it is the model `demo:digits` and the data `digits`; in Python:

>>> from ss_pruning.sources.demo import digits_resnet, digits_weights
>>> from safetensors.torch import load_file
>>> model = digits_resnet()
>>> model.load_state_dict(load_file(digits_weights()))
<All keys matched successfully>

The weights come from `examples/sparse_training/digits.py` in the repository.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ss_pruning.errors import InputError

__all__ = ["SPLITS", "digits_data", "digits_resnet", "digits_weights"]

SPLITS = {"train": 1097, "calibration": 200, "test": 500}
"""Number of images in each split; together they are all 1,797 digits."""

# Mean and standard deviation of all pixels scaled to [0, 1].
_MEAN, _STD = 0.3053, 0.3760
_SPLIT_SEED = 1811


class _Block(nn.Module):
    """Basic residual block: two 3x3 convolutions, and a 1x1 one on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, inputs, h, w]` to `[batch, outputs, h / stride, w / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class _DigitsResNet(nn.Module):
    """ResNet of three stages (8x8, 4x4, 2x2) of two basic blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(_Block(16, 16, 1), _Block(16, 16, 1))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), _Block(32, 32, 1))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[batch, 1, 8, 8]` to logits `[batch, 10]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def digits_resnet() -> nn.Module:
    """Build the demo network with random weights; images are `[batch, 1, 8, 8]`, logits `[batch, 10]`."""
    return _DigitsResNet()


def digits_weights() -> Path:
    """Return the path of the trained weights that ship with the package."""
    return Path(__file__).with_name("digits_resnet.safetensors")


def digits_data(split: str) -> TensorDataset:
    """Load scikit-learn's handwritten digits: real 8x8 scans, part of the scikit-learn package.

    The split is the same on every machine: it is drawn with a fixed seed.

    Args:
        split: `"train"`, `"calibration"` or `"test"`.

    Returns:
        Pairs of a normalised image `[1, 8, 8]` (float32) and its label (int64, 0 to 9).

    Raises:
        InputError: The split is unknown, or scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r} of the digits; choose one of {', '.join(SPLITS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "the digits come with scikit-learn, which is not installed; "
            "install it with: pip install 'ss-pruning[demo]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    chosen = torch.split(order, list(SPLITS.values()))[list(SPLITS).index(split)]
    return TensorDataset((images[chosen] - _MEAN) / _STD, labels[chosen])
