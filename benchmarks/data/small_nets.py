"""Ten small nets of different kinds: five to choose defaults on, five that have no say and confirm them.

    python -m benchmarks.data.small_nets            # trains those that are missing, minutes each on one core
    python -m benchmarks.data.small_nets --nets vit6 conv_swin4 conv_tokens4   # half an hour each

The last three are `benchmarks.data.attention_nets`, trained by another recipe: AdamW, in bfloat16.

All take CIFAR-10 images. Widths are small, so that one core will do: what is confirmed is that a default holds on kinds
of nets, not what accuracy they reach. `benchmarks.data.training` says how they are trained; a run that was stopped goes
on. Weights go to `--out`; recipe, log and accuracy to benchmarks/results/small_nets.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleUnit
from torchvision.ops import SqueezeExcitation

from benchmarks.common import DATA, RESULTS, write
from benchmarks.data.attention_nets import ATTENTION_NETS
from benchmarks.data.cifar import load, top1
from benchmarks.data.training import Recipe, train

RECIPE = Recipe(epochs=4, rate=0.1, batch=128)
WITH_ATTENTION = Recipe(
    epochs=12, rate=2e-3, batch=128, weight_decay=0.05, warm_up=0.2, bf16=True, optimiser="adamw"
)
#: Nets that take another recipe than the others.
RECIPES = {
    "vit6": WITH_ATTENTION,
    "conv_swin4": replace(WITH_ATTENTION, epochs=6),
    "conv_tokens4": replace(WITH_ATTENTION, epochs=8),
}
WEIGHTS = Path("runs")
Norm = Callable[[int], nn.Module]


def conv(inputs: int, outputs: int, stride: int = 1, size: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions, optionally a gate, and a shortcut."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: Norm = nn.BatchNorm2d, gate: bool = False
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, stride), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs), norm(outputs)
        self.gate = SqueezeExcitation(outputs, max(outputs // 4, 4)) if gate else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, stride, 1), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.gate(y) + self.shortcut(x))


class ClosureBlock(nn.Module):
    """As in CIFAR ResNets that pad their shortcut by a function, in which the numbers of channels are hidden."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = lambda x: x
        if stride > 1:
            side = (outputs - inputs) // 2
            self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, side, side))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class PreActivation(nn.Module):
    """Norm and ReLU before each convolution; the stream itself is never rectified."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = conv(inputs, outputs, stride, 1) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + kept


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, four times as wide outside as inside."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inside = outputs // 4
        self.body = nn.Sequential(
            conv(inputs, inside, size=1), nn.BatchNorm2d(inside), nn.ReLU(),
            conv(inside, inside, stride), nn.BatchNorm2d(inside), nn.ReLU(),
            conv(inside, outputs, size=1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class RepBlock(nn.Module):
    """RepVGG in training: a 3x3, a 1x1 and a norm alone, summed before the ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.large = nn.Sequential(conv(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        self.small = nn.Sequential(conv(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(inputs) if stride == 1 and inputs == outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


class Unnormed(nn.Module):
    """A residual block without any norm: the branch begins at nothing (Zhang et al. 2019, "Fixup")."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.normal_(self.conv1.weight, std=(2 / (9 * outputs)) ** 0.5 / 3)
        nn.init.zeros_(self.conv2.weight)
        self.shortcut = conv(inputs, outputs, stride, 1) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) * self.scale + self.shortcut(x))


def staged(
    block: Callable[[int, int, int], nn.Module],
    widths: tuple[int, ...],
    blocks: int,
    stem: Norm = nn.BatchNorm2d,
    end: Callable[[int], list[nn.Module]] = lambda width: [],
) -> nn.Sequential:
    """A 3x3 stem, stages of `blocks` blocks that halve the image from the second on, and a classifier."""
    inputs = widths[0]
    layers: list[nn.Module] = [conv(3, inputs), stem(inputs), nn.ReLU()]
    for stage, outputs in enumerate(widths):
        for number in range(blocks):
            layers.append(block(inputs, outputs, 2 if stage and not number else 1))
            inputs = outputs
    return nn.Sequential(*layers, *end(inputs), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def plain(widths: tuple[int, ...], each: int) -> nn.Sequential:
    """No shortcut at all."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU())

    return staged(block, widths, each)


def inverted(widths: tuple[int, ...], blocks: int) -> nn.Sequential:
    return staged(lambda i, o, s: InvertedResidual(i, o, s, expand_ratio=4), widths, blocks)


def shuffled(widths: tuple[int, ...], blocks: int) -> nn.Sequential:
    return staged(ShuffleUnit, widths, blocks)


def activated(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU()]


#: Defaults are chosen on these.
CHOOSING: dict[str, Callable[[], nn.Module]] = {
    "plain14": partial(plain, (16, 32, 64), 4),
    "preact20": partial(staged, PreActivation, (12, 24, 48), 3, end=activated),
    "inverted29": partial(inverted, (12, 24, 48), 3),
    "repvgg16": partial(staged, RepBlock, (12, 24, 48), 5),
    "unnormed14": partial(staged, Unnormed, (12, 24, 48), 2, nn.Identity),
}
#: And confirmed on these.
CONFIRMING: dict[str, Callable[[], nn.Module]] = {
    "closure44": partial(staged, ClosureBlock, (8, 16, 32), 7),
    "shuffle29": partial(shuffled, (32, 64, 128), 3),
    "gated20": partial(staged, partial(Block, gate=True), (12, 24, 48), 3),
    "bottleneck68": partial(staged, Bottleneck, (32, 64, 96), 7),
    "groupnorm20": partial(
        staged, partial(Block, norm=partial(nn.GroupNorm, 4)), (12, 24, 48), 3, partial(nn.GroupNorm, 4)
    ),
}
SMALL_NETS = CHOOSING | CONFIRMING | ATTENTION_NETS


def recipe_of(name: str) -> Recipe:
    return RECIPES.get(name, RECIPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=sorted(SMALL_NETS), default=list(CHOOSING | CONFIRMING))
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for weights and checkpoints")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10-png.tar (or CIFAR-10)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images, tested = load(options.data, "train"), load(options.data, "test")
    for name in options.nets:
        path = options.out / f"{name}.safetensors"
        if path.is_file():
            continue
        recipe = recipe_of(name)
        torch.manual_seed(recipe.seed)
        model = SMALL_NETS[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        checkpoint = options.out / f"{name}.checkpoint.pt"
        with sdpa_kernel(SDPBackend.MATH):  # trains faster in bfloat16 on a CPU than the fused one
            log = train(
                model, images, recipe, checkpoint, lambda text, name=name: print(name, text, flush=True)
            )
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        _note(name, model, log, top1(model.eval(), tested))
        checkpoint.unlink(missing_ok=True)


def _note(name: str, model: nn.Module, log: list[dict[str, float]], accuracy: float) -> None:
    """Add one net to the results."""
    path = RESULTS / "small_nets.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[name] = {
        "recipe": asdict(recipe_of(name)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": [round(epoch["loss"], 4) for epoch in log],
        "cpu_seconds": round(sum(epoch["cpu_seconds"] for epoch in log)),
        "top1": accuracy,
    }
    write(path.stem, known)
    print(f"{name}: top-1 {accuracy:.2f} %", flush=True)


if __name__ == "__main__":
    main()
