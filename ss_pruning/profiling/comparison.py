"""Models side by side in one setting of batch size, number type, memory layout and compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ss_pruning._utils.arrays import random_inputs
from ss_pruning._utils.copying import copied
from ss_pruning.errors import InputError, ModelError
from ss_pruning.profiling.exported_model import ExportedModel
from ss_pruning.profiling.latency import Timing, measure_latency, peak_memory

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
    """One model in one setting; of all but the first one `levelled` to that: what is shown of both fits their ratio.

    Attributes:
        seconds: Of a forward pass, the median.
        low: Their lower quartile.
        high: Their upper quartile.
        images_per_second: At the median.
        peak_bytes: Most that tensors hold at once, see `ss_pruning.profiling.latency.peak_memory`; None if not asked
            for, and of exported files.
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
class SpeedComparison:
    """Models in one setting: by name their speeds, and median and quartiles of their shares of the first one's time."""

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


def compare_speeds(
    models: dict[str, nn.Module],
    size: Sequence[int],
    setting: Setting,
    device: torch.device,
    seconds: float = 60.0,
) -> SpeedComparison:
    """Time models in turns in one setting."""
    x = random_inputs(setting.batch, size)
    if setting.layout == "channels_last" and x.dim() != 4:
        raise InputError(f"channels_last is a layout of images; inputs of size {tuple(size)} have none")
    if any(isinstance(model, ExportedModel) for model in models.values()):
        _check_exported(setting, device)
    x = x.to(device, DTYPES[setting.dtype], memory_format=LAYOUTS[setting.layout])
    ready = {name: _prepared(model, setting, device) for name, model in models.items()}
    try:
        peaks = {
            name: None if isinstance(model, ExportedModel) else peak_memory(model, x)
            for name, model in ready.items()
        }
        runs = [torch.compile(model) if setting.compiled else model for model in ready.values()]
        timings = measure_latency(runs, x, seconds=seconds)  # type: ignore[arg-type]
    except (RuntimeError, NotImplementedError) as error:
        said = str(error).strip().split("\n")[0]
        raise ModelError(f"the model does not run with {setting} on {device.type}: {said}") from error
    first, by_name = timings[0], dict(zip(ready, timings, strict=True))
    speeds = {
        name: Speed.of(timing if timing is first else timing.levelled(first), setting.batch, peaks[name])
        for name, timing in by_name.items()
    }
    ratios = {name: timing.over(first) for name, timing in by_name.items()}
    spreads = {name: timing.spread_over(first) for name, timing in by_name.items()}
    return SpeedComparison(setting, len(first.seconds), speeds, ratios, spreads)


def _check_exported(setting: Setting, device: torch.device) -> None:
    if setting != Setting(setting.batch) or device.type != "cpu":
        raise InputError(
            f"exported files run as they are, on the CPU, not with {setting} on {device.type}: leave out --dtype, "
            "--layout, --compiled and --device"
        )


def _prepared(model: nn.Module, setting: Setting, device: torch.device) -> nn.Module:
    if isinstance(model, ExportedModel):
        return model
    model = copied(model).eval().requires_grad_(False).to(device, DTYPES[setting.dtype])
    return model.to(memory_format=LAYOUTS[setting.layout])
