"""Draw docs/synapse.svg: one output channel, its three synapses, and what each of them transports.

python scripts/synapse_figure.py

The strengths and shares in the picture are computed by the package from the scales and kernels that are drawn.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ss_pruning import synaptic_strength

PICTURE = Path(__file__).parents[1] / "docs" / "synapse.svg"
SCALES = (1.6, 0.4, 0.9)
NORMS = (0.5, 1.2, 0.7)
GAMMA = "\N{GREEK SMALL LETTER GAMMA}"
INK, MUTED, BLUE, PALE, ORANGE = "#1b1f24", "#59636e", "#0b6bcb", "#d6e6f8", "#c2410c"
ROWS, OUTPUT = (105, 205, 305), (545, 205)


def network() -> nn.Sequential:
    """A norm with three scales, and a convolution with one output."""
    generator = torch.Generator().manual_seed(3)
    norm, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 1, 3)
    kernels = torch.randn(3, 9, generator=generator)
    kernels = kernels / kernels.norm(dim=1, keepdim=True) * torch.tensor(NORMS)[:, None]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(SCALES))
        conv.weight.copy_(kernels.reshape(1, 3, 3, 3))
    return nn.Sequential(norm, conv)


def words(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {style}>{text}</text>'


def bell(y: float, scale: float) -> str:
    """The density of a channel of that deviation, 150 wide, its width to scale."""
    points = [
        f"{45 + 75 + 24 * z:.1f},{y + 24 - 44 * math.exp(-((z / scale) ** 2) / 2) * min(1.0, 0.55 / scale):.1f}"
        for z in (step / 10 for step in range(-31, 32))
    ]
    return (
        f'<polygon points="{points[0]} {" ".join(points)}" fill="{PALE}" stroke="{BLUE}" stroke-width="1.5"/>'
    )


def kernel(y: float, weights: Tensor) -> str:
    """A 3x3 kernel as squares: blue for positive weights, orange for negative ones."""
    cells = []
    for place, weight in enumerate(weights.flatten().tolist()):
        row, column = divmod(place, 3)
        colour, strength = (BLUE if weight > 0 else ORANGE), min(1.0, abs(weight) / 0.6)
        cells.append(
            f'<rect x="{232 + 18 * column}" y="{y - 27 + 18 * row:g}" width="17" height="17" '
            f'fill="{colour}" fill-opacity="{strength:.2f}" stroke="#d5dae0"/>'
        )
    return "".join(cells)


def synapse(number: int, weights: Tensor, strength: float, share: float) -> str:
    y, (x_out, y_out) = ROWS[number], OUTPUT
    small = f'font-size="13" fill="{MUTED}"'
    return "".join(
        [
            bell(y, SCALES[number]),
            words(
                120,
                y + 42,
                f"|{GAMMA}<tspan font-size='9' dy='3'>{number + 1}</tspan><tspan dy='-3'>| = {SCALES[number]}</tspan>",
                small,
            ),
            kernel(y, weights),
            words(259, y + 42, f"‖W‖ = {NORMS[number]}", small),
            f'<line x1="300" y1="{y}" x2="{x_out}" y2="{y_out}" stroke="{BLUE}" '
            f'stroke-width="{18 * strength:.1f}" stroke-linecap="round"/>',
            f'<rect x="322" y="{y - 12}" width="68" height="24" rx="12" fill="#fff" stroke="{BLUE}"/>',
            words(356, y + 5, f"s = {strength:.2f}", f'font-size="13" font-weight="600" fill="{INK}"'),
            f'<rect x="620" y="{y - 9}" width="{130 * share:.1f}" height="18" fill="{BLUE}"/>',
            words(626 + 130 * share, y + 5, f"{share:.0%}", f'font-size="14" fill="{INK}"', "start"),
        ]
    )


def picture() -> str:
    """The whole figure as SVG."""
    net = network()
    found = synaptic_strength(net, torch.zeros(1, 3, 8, 8))
    strengths, shares = found["1"][0].tolist(), found.shares()["1"][0].tolist()
    kernels = net[1].weight[0].detach()
    title = f'font-size="13" font-weight="600" fill="{INK}"'
    best, worst = max(range(3), key=NORMS.__getitem__), min(range(3), key=strengths.__getitem__)
    assert best == worst, "the picture's point: the largest kernel is the weakest synapse"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 392" '
        'font-family="system-ui, Segoe UI, Roboto, DejaVu Sans, sans-serif" role="img">',
        "<title>Three synapses of one output channel: scale times kernel norm is strength, its square the share"
        "</title>",
        '<rect width="780" height="392" rx="8" fill="#fff"/>',
        words(120, 30, "input channel", title),
        words(120, 48, f"{GAMMA} z + β, z standard", f'font-size="12" fill="{MUTED}"'),
        words(259, 30, "kernel", title),
        words(356, 30, "strength", title),
        words(356, 48, f"s = |{GAMMA}| ‖W‖", f'font-size="12" fill="{MUTED}"'),
        words(545, 30, "output channel", title),
        words(680, 30, "share", title),
        words(680, 48, "s² of the sum of s²", f'font-size="12" fill="{MUTED}"'),
        *(synapse(n, kernels[n], strengths[n], shares[n]) for n in range(3)),
        f'<circle cx="{OUTPUT[0]}" cy="{OUTPUT[1]}" r="22" fill="#fff" stroke="{INK}" stroke-width="2"/>',
        words(OUTPUT[0], OUTPUT[1] + 6, "Σ", f'font-size="18" fill="{INK}"'),
        words(
            390,
            380,
            f"Channel {best + 1} has the largest kernel and the weakest synapse: little arrives there.",
            f'font-size="13" fill="{MUTED}"',
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"written: {PICTURE.relative_to(Path.cwd())}")
