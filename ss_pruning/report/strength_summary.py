"""The strengths of a model in figures for a consumer: one row per layer, and the weakest synapses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ss_pruning._utils.files import check_writable, write_bytes, write_text
from ss_pruning.errors import InputError
from ss_pruning.report.formatting import jsonable, plain, rich_table

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from ss_pruning.importance.strength import Strengths

SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class LayerScore:
    """One layer's strengths in figures.

    Attributes:
        inputs: input channels that each output reads.
        effective_inputs: median over the outputs of `1 / sum(share ** 2)`: how many equal inputs would spread
            the variance as thinly.
        unscaled: input channels with no normalisation behind them.
    """

    path: str
    kind: str
    outputs: int
    inputs: int
    median: float
    weakest: float
    strongest: float
    effective_inputs: float
    unscaled: int


@dataclass(frozen=True)
class Synapse:
    """One connection: from input `input` of its group to output `output` of the layer `path`."""

    path: str
    output: int
    input: int
    strength: float
    share: float


@dataclass(frozen=True)
class Summary:
    """All layers in the order in which they run, and the synapses with the smallest shares of the model."""

    layers: list[LayerScore]
    weakest: list[Synapse]


def summarise(strengths: Strengths, model: nn.Module, weakest: int) -> Summary:
    """Reduce strengths to figures, and list the `weakest` synapses: those with the smallest shares of their outputs."""
    shares = strengths.shares()
    layers = [
        _layer(path, type(model.get_submodule(path)).__name__, values, shares[path], strengths.unscaled[path])
        for path, values in strengths.items()
    ]
    found = [
        synapse for path in strengths for synapse in _weakest(path, strengths[path], shares[path], weakest)
    ]
    return Summary(layers, sorted(found, key=lambda synapse: synapse.share)[:weakest])


def check_target(path: Path) -> None:
    """Raise unless `path` has a known suffix and can be written; call it before the work."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--out takes a file that ends in {' or '.join(SUFFIXES)}, not {str(path)!r}.")
    check_writable(path)


def write(path: Path, strengths: Strengths, summary: Summary, facts: Mapping[str, str]) -> None:
    """Write every strength as safetensors, or the summary as JSON, as the suffix says.

    The safetensors file holds `strength/<module path>` `[out, in // groups]` and `unscaled/<module path>`
    `[in]`.
    """
    if path.suffix == ".json":
        write_text(path, as_json(summary, facts))
        return
    from safetensors.torch import save

    tensors = {f"strength/{name}": value.detach().cpu().contiguous() for name, value in strengths.items()}
    tensors |= {f"unscaled/{name}": value.cpu().contiguous() for name, value in strengths.unscaled.items()}
    write_bytes(path, save(tensors, dict(facts)))


_LEGEND = (
    "eff. in: how many inputs of equal share would spread the variance as thinly\n"
    "no norm: inputs that no normalisation scales"
)


def tables(summary: Summary, model: str) -> list[Table]:
    """The layers, and the weakest synapses if any are listed, for the terminal."""
    from rich.box import SIMPLE_HEAD

    style: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    columns = ("layer", "in", "out", "median", "min", "max", "eff. in", "no norm")
    rows = [
        (
            *(plain(layer.path), str(layer.inputs), str(layer.outputs)),
            *(f"{value:.2g}" for value in (layer.median, layer.weakest, layer.strongest)),
            *(f"{layer.effective_inputs:.1f}", str(layer.unscaled or "")),
        )
        for layer in summary.layers
    ]
    layers = rich_table(f"Synaptic strength of {plain(model)}", columns, rows, _LEGEND, **style)
    # Module paths are unreadable when they break at every few letters.
    layers.columns[0].min_width = min(26, max((len(layer.path) for layer in summary.layers), default=0))
    if not summary.weakest:
        return [layers]
    figures = ("layer", "input", "output", "strength", "share")
    weakest = [
        (plain(s.path), str(s.input), str(s.output), f"{s.strength:.2g}", f"{s.share:.2g}")
        for s in summary.weakest
    ]
    return [layers, rich_table("Weakest synapses, by share of their output", figures, weakest, **style)]


def _layer(path: str, kind: str, values: Tensor, shares: Tensor, unscaled: Tensor) -> LayerScore:
    spread = shares.double().square().sum(1)
    alive = spread > 0  # an output whose inputs are all zero has no shares
    effective = (1 / spread[alive]).median() if bool(alive.any()) else torch.zeros(())
    return LayerScore(
        path=path,
        kind=kind,
        outputs=values.shape[0],
        inputs=values.shape[1],
        median=float(values.median()),
        weakest=float(values.min()),
        strongest=float(values.max()),
        effective_inputs=float(effective),
        unscaled=int(unscaled.sum()),
    )


def _weakest(path: str, values: Tensor, shares: Tensor, most: int) -> list[Synapse]:
    flat = shares.flatten()
    places = flat.topk(min(most, flat.numel()), largest=False).indices.tolist()
    width = shares.shape[1]
    return [
        Synapse(path, place // width, place % width, float(values.flatten()[place]), float(flat[place]))
        for place in places
    ]


def as_json(summary: Summary, facts: Mapping[str, str]) -> str:
    """The summary as JSON text."""
    return json.dumps({"format": "ss-pruning scores 1", **facts, **jsonable(summary)}, indent=2) + "\n"
