"""Dense against pruned on one machine: latency, throughput, memory and file size, in the settings people deploy in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ss_pruning._utils.copying import copied
from ss_pruning.errors import InputError, ModelError
from ss_pruning.io.checkpoint import packed
from ss_pruning.profiling.latency import Timing, machine, measure_latency, peak_memory
from ss_pruning.report.formatting import count, percent
from ss_pruning.report.records import TOO_NOISY, crosses_one
from ss_pruning.sources.preprocessing import random_inputs

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        batch: Images at a time.
        dtype: A name in `DTYPES`.
        layout: A name in `LAYOUTS`: how images lie in memory.
        compiled: Whether by `torch.compile`.
    """

    batch: int = 1
    dtype: str = "float32"
    layout: str = "contiguous"
    compiled: bool = False

    def __str__(self) -> str:
        layout = "" if self.layout == "contiguous" else f", {self.layout}"
        return f"batch {self.batch}, {self.dtype}{layout}{', compiled' * self.compiled}"


@dataclass(frozen=True)
class Speed:
    """One model in one setting; of all but the dense one `levelled` to that: what is shown of both fits their ratio.

    Attributes:
        seconds: Of a forward pass, the median.
        low: Their lower quartile.
        high: Their upper quartile.
        images_per_second: At the median.
        peak_bytes: Most that tensors hold at once, see `ss_pruning.profiling.latency.peak_memory`; None if not asked
            for.
    """

    seconds: float
    low: float
    high: float
    images_per_second: float
    peak_bytes: int | None

    @staticmethod
    def of(timing: Timing, batch: int, peak: int | None) -> Speed:
        """From the timing of a batch."""
        return Speed(timing.median, *timing.spread, batch / timing.median, peak)


@dataclass(frozen=True)
class Comparison:
    """Models in one setting; the first is the dense one.

    Attributes:
        setting: How they ran.
        rounds: How often each was timed.
        speeds: By name.
        ratios: By name, the median over the rounds of its time as a share of the first's in the same round.
        spreads: By name, the quartiles of that.
    """

    setting: Setting
    rounds: int
    speeds: dict[str, Speed]
    ratios: dict[str, float]
    spreads: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def settings(
    batches: Iterable[int],
    dtypes: Iterable[str] = ("float32",),
    layouts: Iterable[str] = ("contiguous",),
    compiled: Iterable[bool] = (False,),
) -> list[Setting]:
    """All combinations.

    Raises:
        InputError: A batch is empty, or a name is unknown.
    """
    found = [Setting(*parts) for parts in itertools.product(batches, dtypes, layouts, compiled)]
    for setting in found:
        if setting.batch < 1:
            raise InputError(f"batch {setting.batch} is empty; use 1 or more")
        for name, known in ((setting.dtype, DTYPES), (setting.layout, LAYOUTS)):
            if name not in known:
                raise InputError(f"{name!r} is unknown; use {', '.join(known)}")
    return found


def compare(
    models: dict[str, nn.Module],
    size: Sequence[int],
    setting: Setting,
    device: torch.device,
    *,
    precision: float = 0.005,
    seconds: float = 60.0,
    memory: bool = True,
) -> Comparison:
    """Time models in turns in one setting.

    Args:
        models: By name, the dense one first; copies of them are run.
        size: Of one image.
        setting: How to run them.
        device: Where.
        precision: See `measure_latency`.
        seconds: See `measure_latency`.
        memory: Whether to find the peak memory, too.

    Raises:
        InputError: The layout is one of images, and the inputs are none.
        ModelError: A model does not run in this setting.
    """
    x = random_inputs(setting.batch, size)
    if setting.layout == "channels_last" and x.dim() != 4:
        raise InputError(f"channels_last is a layout of images; inputs of size {tuple(size)} have none")
    x = x.to(device, DTYPES[setting.dtype], memory_format=LAYOUTS[setting.layout])
    ready = {name: _prepared(model, setting, device) for name, model in models.items()}
    try:
        peaks = {name: peak_memory(model, x) if memory else None for name, model in ready.items()}
        runs = [torch.compile(model) if setting.compiled else model for model in ready.values()]
        timings = measure_latency(runs, x, precision=precision, seconds=seconds)  # type: ignore[arg-type]
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0]
        raise ModelError(f"the model does not run with {setting} on {device.type}: {first}") from error
    dense, by_name = timings[0], dict(zip(ready, timings, strict=True))
    speeds = {
        name: Speed.of(timing if timing is dense else timing.levelled(dense), setting.batch, peaks[name])
        for name, timing in by_name.items()
    }
    ratios = {name: timing.over(dense) for name, timing in by_name.items()}
    spreads = {name: timing.spread_over(dense) for name, timing in by_name.items()}
    return Comparison(setting, len(dense.seconds), speeds, ratios, spreads)


def _prepared(model: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    model = copied(model).eval().requires_grad_(False).to(device, DTYPES[setting.dtype])
    return model.to(memory_format=LAYOUTS[setting.layout])


def file_bytes(model: nn.Module) -> int:
    """Size of the file that `save` writes."""
    return len(packed(model)[0])


def table(comparisons: Sequence[Comparison], sizes: dict[str, int], device: torch.device) -> Table:
    """What was measured, for the terminal; the two models are "dense" and "pruned"."""
    from rich.table import Table

    where = ", ".join(f"{key} {value}" for key, value in machine(device).items())
    table = Table(title="dense against pruned", caption=where, title_justify="left", caption_justify="left")
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for comparison in comparisons:
        dense, pruned = comparison.speeds["dense"], comparison.speeds["pruned"]
        table.add_section()
        table.add_row(f"{comparison.setting} ({comparison.rounds} rounds)")
        noisy = crosses_one(comparison.spreads["pruned"])
        ratio, rate = (
            TOO_NOISY if noisy else percent(share)
            for share in (comparison.ratios["pruned"], pruned.images_per_second / dense.images_per_second)
        )
        table.add_row("  latency, median", _milli(dense.seconds), _milli(pruned.seconds), ratio)
        spread = (f"{_milli(s.low)} to {_milli(s.high)}" for s in (dense, pruned))
        table.add_row("  middle half", *spread)
        rates = (f"{s.images_per_second:,.1f} /s" for s in (dense, pruned))
        table.add_row("  images", *rates, rate)
        if dense.peak_bytes and pruned.peak_bytes:
            peaks = (count(s.peak_bytes or 0, "B") for s in (dense, pruned))
            table.add_row("  peak memory", *peaks, percent(pruned.peak_bytes / dense.peak_bytes))
    table.add_section()
    files = (count(sizes[name], "B") for name in ("dense", "pruned"))
    table.add_row("file", *files, percent(sizes["pruned"] / sizes["dense"]))
    return table


def _milli(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
