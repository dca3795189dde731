"""What a network with zeros in it weighs: dense, and counted over its living kernels. Nothing here is a time."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ss_pruning._utils.files import write_text
from ss_pruning.graph.exclusions import Excluded
from ss_pruning.graph.layers import weight_of
from ss_pruning.graph.traced import TracedModel
from ss_pruning.profiling.macs import count_macs
from ss_pruning.report.formatting import aligned, count, jsonable, percent, rich_table
from ss_pruning.report.records import LayerReport
from ss_pruning.sparsity.dead_channels import living_kernels

if TYPE_CHECKING:
    from rich.table import Table

_INDEX_BYTES = 4


@dataclass(frozen=True)
class Size:
    """One model in numbers.

    Attributes:
        params: Parameters, zeros included.
        synapses: Connections (2-D kernels, single weights of linear layers).
        living_synapses: Those that are not zero.
        macs: Multiply-accumulates of one forward pass on the example inputs, as dense hardware does them.
        living_macs: The same counted over living synapses: what is left for something that skips zero kernels.
        bytes: All tensors as they are.
        sparse_bytes: The same with every convolution and linear weight stored as its living kernels and a 4-byte index
            for each, where that is less.
    """

    params: int
    synapses: int
    living_synapses: int
    macs: int
    living_macs: int
    bytes: int
    sparse_bytes: int


_COUNTED = {
    "parameters": "params",
    "synapses": "synapses",
    "living synapses": "living_synapses",
    "multiply-accumulates": "macs",
    "  over living synapses": "living_macs",
    "bytes": "bytes",
    "  stored sparse": "sparse_bytes",
}


@dataclass(frozen=True, repr=False)
class Compaction:
    """What a compaction did.

    Attributes:
        model: Class of the model.
        before: The masked model's size.
        after: The compacted one's.
        layers: In the order in which they run; `synapses_after` counts living ones.
        excluded: Dead channels that stay, and why.
        max_error: Largest difference between the outputs of the compacted and the masked model, relative to the
            largest output, in `precision`.
        precision: In which the two were compared.
        seconds: How long it took.
    """

    model: str
    before: Size
    after: Size
    layers: list[LayerReport]
    excluded: list[Excluded]
    max_error: float
    precision: str
    seconds: float

    @property
    def channels_removed(self) -> int:
        """Output channels of convolutions and linear layers that are gone."""
        return sum(layer.outputs_before - layer.outputs_after for layer in self.layers)

    def __repr__(self) -> str:
        """One line: the model, and what is left of it."""
        kept = ", ".join(f"{name.strip()} {kept}" for name, _, _, kept in self.headline())
        return f"Compaction({self.model!r}: {kept})"

    def __str__(self) -> str:
        """The sizes before and after as a table of plain text."""
        rows = [("", "masked", "compacted", "kept"), *self.headline()]
        return "\n".join([f"{self.model}, compacted", *aligned(rows)])

    def table(self) -> Table:
        """The sizes before and after as a `rich` table."""
        columns = ("", "masked", "compacted", "kept")
        return rich_table(f"{self.model}, compacted", columns, self.headline())

    def headline(self) -> list[tuple[str, str, str, str]]:
        """The rows (name, masked, compacted, kept) of the table."""
        rows = []
        for name, attribute in _COUNTED.items():
            old, new = getattr(self.before, attribute), getattr(self.after, attribute)
            rows.append((name, count(old), count(new), percent(new / old) if old else "-"))
        return rows

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(jsonable(self), indent=2, allow_nan=False) + "\n"

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all.

        Raises:
            InputError: The folder is missing or cannot be written to.
        """
        write_text(path, self.to_json())


def size_of(traced: TracedModel) -> Size:
    """Count a model, of which the connectivity may be that of the model before a cut."""
    model = traced.model
    macs, by_path = count_macs(model, traced.example_inputs)
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    synapses = living = living_macs = saved = 0
    for path in traced.connectivity.weighted:
        module = traced.modules[path]
        weight, alive = weight_of(module), living_kernels(module)
        here = int(alive.sum())
        synapses, living = synapses + alive.numel(), living + here
        living_macs -= by_path.get(path, 0) * (alive.numel() - here) // alive.numel()
        sparse = here * (weight.nbytes // alive.numel() + _INDEX_BYTES)
        saved += max(0, weight.nbytes - sparse)
    params = sum(p.numel() for p in model.parameters())
    return Size(params, synapses, living, macs, macs + living_macs, total, total - saved)
