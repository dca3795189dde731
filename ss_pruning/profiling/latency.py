"""How long models take: measured in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ss_pruning._utils.arrays import tensors_among
from ss_pruning._utils.modules import device_of
from ss_pruning._utils.running import call, preserved, quiet_hooks
from ss_pruning.errors import InputError, ModelError

_LEAST_SECONDS = 2e-3  # what lasts less is run several times: clocks and launches are coarse
_WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """How long one forward pass took, several times.

    Attributes:
        seconds: In the order of the rounds; entries of timings that were taken together belong together.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the passes were faster."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles: half of the passes lie between."""
        return _quartiles(self.seconds)

    def over(self, other: Timing) -> float:
        """The median, over the rounds, of this time as a share of the other's in the same round."""
        return statistics.median(_ratios(self.seconds, other.seconds))

    def spread_over(self, other: Timing) -> tuple[float, float]:
        """The quartiles of what `over` is the median of."""
        return _quartiles(_ratios(self.seconds, other.seconds))

    def levelled(self, other: Timing) -> Timing:
        """These times as they would be had the other's been its median in every round.

        What slows a round down slows both: their ratio stays. So the median of these, the other's and `over`
        fit each other, as three medians of their own would not.
        """
        middle = other.median
        return Timing(tuple(middle * ratio for ratio in _ratios(self.seconds, other.seconds)))


def as_reported(dense: Timing, pruned: Timing) -> dict[str, Any]:
    """What a report says of times that were taken in turns: its fields `latency_...`, which fit each other."""
    return {
        "latency_before": dense.median,
        "latency_after": pruned.levelled(dense).median,
        "latency_ratio": pruned.over(dense),
        "latency_spread": pruned.spread_over(dense),
    }


def measure_latency(
    models: Sequence[nn.Module],
    example_inputs: Any,
    *,
    precision: float = 0.005,
    rounds: tuple[int, int] = (7, 50),
    seconds: float = 60.0,
) -> list[Timing]:
    """Time the forward passes of models in turns, in eval mode, on the inputs as they are (batch size, type, device).

    Args:
        models: All on the device of the inputs; a compiled model compiles before the first round.
        example_inputs: What `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        precision: Rounds go on until the standard error of each median, relative to the first model's, is below this.
        rounds: But at least, and at most, so many.
        seconds: And no longer than this after the least number of rounds.

    Returns:
        One timing a model, all with the same number of rounds.

    Raises:
        InputError: No models are given, or one that stands in no list.
        ModelError: A model does not run on the inputs.

    Example:
        >>> small, large = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 256, 3)
        >>> a, b = measure_latency([small, large], torch.zeros(1, 3, 64, 64))
        >>> a.over(b) < 1
        True
    """
    alone = isinstance(models, nn.Module)  # layers of a Sequential would be timed one by one
    if alone or not models or not all(isinstance(model, nn.Module) for model in models):
        raise InputError(
            "give the models to measure as a list, one at least: measure_latency([model], inputs)"
        )

    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(quiet_hooks(model, example_inputs))
            stack.enter_context(preserved(model, training=False))
        stack.enter_context(torch.inference_mode())
        try:
            runs = [partial(call, model, example_inputs) for model in models]
            return race(runs, device_of(example_inputs), precision, rounds, seconds)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"a model does not run on the inputs ({type(error).__name__}: {error}); give inputs of the shape, type "
                "and device that it takes"
            ) from error


def race(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    precision: float = 0.005,
    rounds: tuple[int, int] = (7, 50),
    seconds: float = 60.0,
) -> list[Timing]:
    """Time what `runs` do, in turns, first forwards and then backwards; see `measure_latency`."""
    numbers = [_repeats(run, device) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    begin = time.perf_counter()
    for done in range(1, rounds[1] + 1):
        for i in order:
            times[i].append(timed(runs[i], device, numbers[i]))
        order.reverse()  # nobody always runs on the caches that the same other one left
        late = time.perf_counter() - begin > seconds
        if done >= rounds[0] and (late or _uncertainty(times) < precision):
            break
    return [Timing(tuple(values)) for values in times]


def _repeats(run: Callable[[], object], device: torch.device) -> int:
    """Warm up, and find how many runs last long enough to be timed together."""
    for _ in range(_WARM_UP):
        last = timed(run, device)
    return max(1, round(_LEAST_SECONDS / max(last, 1e-7)))


def timed(run: Callable[[], object], device: torch.device, number: int = 1) -> float:
    """Seconds of one run, the mean of `number`; on CUDA by the device's own clock."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            start.record()
            for _ in range(number):
                run()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / number
    # A CPU has done what it was told when the call returns.
    wait: Callable[[], None] = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(number):
        run()
    wait()
    return (time.perf_counter() - begin) / number


def _ratios(times: Iterable[float], base: Iterable[float]) -> list[float]:
    return [a / b for a, b in zip(times, base, strict=True)]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _uncertainty(times: Sequence[Sequence[float]]) -> float:
    """Standard error of the least certain median, relative, as it is for normal noise (1.25 s / sqrt(n))."""
    compared = [_ratios(values, times[0]) for values in times[1:]] or [list(times[0])]

    def error(values: Sequence[float]) -> float:
        low, high = _quartiles(values)
        return float(1.25 * (high - low) / 1.35 / len(values) ** 0.5 / statistics.median(values))

    return max(map(error, compared))


def peak_memory(model: nn.Module, example_inputs: Any) -> int:
    """Most bytes that tensors hold at once during a forward pass in eval mode: weights, inputs and activations.

    On CUDA as its allocator counts them; elsewhere by following every tensor, which leaves out what kernels need for
    themselves.
    """
    device = device_of(example_inputs)
    storages = [tensor.untyped_storage() for tensor in model.state_dict().values()]
    own: dict[int, int] = {storage.data_ptr(): storage.nbytes() for storage in storages}
    with quiet_hooks(model, example_inputs), preserved(model, training=False), torch.inference_mode():
        if device.type == "cuda":
            call(model, example_inputs)
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = int(torch.cuda.memory_allocated(device))
            call(model, example_inputs)
            torch.cuda.synchronize(device)
            return int(torch.cuda.max_memory_allocated(device)) - before + sum(own.values())
        alive = _Alive()
        with alive:
            call(model, example_inputs)
    inputs = tensors_among(example_inputs)
    given: int = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
    return alive.most + sum(own.values()) + given


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that an operation made and that a tensor still looks at."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.views: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = tensors_among((args, kwargs))
        known, old = set(map(id, given)), {tensor.untyped_storage().data_ptr() for tensor in given}
        for tensor in tensors_among(result):
            if id(tensor) not in known:
                self._note(tensor, old)
        return result

    def _note(self, tensor: Tensor, old: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in old and not self.views[place]:
            return  # a view of a weight or an input
        if not self.views[place]:
            self.now += size
            self.most = max(self.most, self.now)
        self.views[place] += 1
        weakref.finalize(tensor, self._pruned, place, size)

    def _pruned(self, place: int, size: int) -> None:
        self.views[place] -= 1
        if not self.views[place]:
            self.now -= size


def machine(device: torch.device) -> dict[str, str]:
    """What a time depends on besides the model: processor, threads and torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = str(torch.get_num_threads()) if device.type == "cpu" else "-"
    return {"device": device.type, "name": name, "threads": threads, "torch": torch.__version__}


def _processor() -> str:
    """The processor's own name where the system tells it, and the instructions that torch uses."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
