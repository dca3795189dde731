"""Three small nets with attention, of timm's blocks, for CIFAR-10: a plain ViT, and two hybrids.

The third had no say in any choice. Only who makes one needs timm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIDE, CLASSES = 32, 10


def vit(width: int = 72, heads: int = 6, depth: int = 6) -> nn.Module:
    """A ViT on patches of 4x4 pixels; the mean of all tokens is classified."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        SIDE,
        4,
        num_classes=CLASSES,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        class_token=False,
        global_pool="avg",
    )


class ConvSwin(nn.Module):
    """A convolutional stem, two stages of Swin blocks (windows of 4x4 tokens, every other shifted), a classifier."""

    def __init__(self, width: int = 48, heads: int = 4, depths: tuple[int, int] = (2, 2)) -> None:
        from timm.models.swin_transformer import SwinTransformerStage

        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        side = SIDE // 2
        self.stage1 = SwinTransformerStage(
            width, width, (side, side), depths[0], downsample=False, num_heads=heads, window_size=4
        )
        self.stage2 = SwinTransformerStage(
            width, 2 * width, (side, side), depths[1], num_heads=2 * heads, window_size=4
        )
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = self.norm(self.stage2(self.stage1(x)))
        return self.head(x.mean((1, 2)))


class ConvTokens(nn.Module):
    """A convolutional stem that makes 8x8 tokens, blocks of a ViT with scaled branches, a class token that is read."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 4) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width // 2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (SIDE // 4) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=2, qkv_bias=True, init_values=0.1) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


ATTENTION_NETS: dict[str, Callable[[], nn.Module]] = {
    "vit6": vit,
    "conv_swin4": ConvSwin,
    "conv_tokens4": ConvTokens,
}
