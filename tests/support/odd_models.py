"""Small random models with habits that people's models have: they cache, count, build on the first pass, wrap outputs.

`odd_model(seed)` draws one; `state_of` describes all that a call could have changed about it, looked into by hand.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

GRIDS: dict[Any, Tensor] = {}  # a cache at the level of the module


class Trip:
    """Raises in the forward pass number `at`, counted over a model and its copies; nothing that is taken back."""

    def __init__(self) -> None:
        self.arm(0)

    def arm(self, at: int, error: type[BaseException] = RuntimeError) -> None:
        self.at, self.error, self.passes = at, error, 0

    def __call__(self) -> None:
        self.passes += 1
        if self.passes == self.at:
            raise self.error("tripped")


TRIP = Trip()


class Helper:
    """Hangs on a module without being one."""

    def __init__(self) -> None:
        self.calls, self.last, self.log = 0, None, collections.deque(maxlen=3)

    def note(self, x: Tensor) -> None:
        self.calls += 1
        self.last = x.detach().mean()
        self.log.append(tuple(x.shape))


class Slotted:
    __slots__ = ("grid", "size")

    def __init__(self) -> None:
        self.grid, self.size = None, 0


@dataclasses.dataclass
class Result:
    logits: Tensor
    features: Tensor


class Plain:
    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.features = logits, features


class Habit(nn.Module):
    """Passes on what it gets; subclasses do something on the side."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class GuardedGrid(Habit):
    shape, grid = None, torch.empty(0)  # on the class, as some detectors have it

    def forward(self, x: Tensor) -> Tensor:
        if self.shape != x.shape[-2:]:
            self.shape, self.grid = x.shape[-2:], torch.arange(x.shape[-1], dtype=x.dtype)
        return x + 0.01 * self.grid


class GuardedByNumber(Habit):
    def __init__(self) -> None:
        super().__init__()
        self.size, self.grid = 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[-1]:
            self.size, self.grid = x.shape[-1], torch.arange(x.shape[-1], dtype=x.dtype)
        return x * (1 + 0.01 * self.grid)


class GrowingTable(Habit):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.numel() < x.shape[-1]:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype)
        return x + 0.01 * self.table[: x.shape[-1]]


class Counter(Habit):
    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.count, self.sizes, self.helper = 0, [], Helper()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        type(self).total += 1
        self.sizes.append(x.shape[-1])
        self.helper.note(x)
        self.steps += 1
        self.average.mul_(0.9).add_(0.1 * float(x.detach().mean()))
        return x


class FirstPass(Habit):
    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in self._modules:
            self.scale = nn.Identity()
            self.offset = torch.zeros(1, dtype=x.dtype)
        return self.scale(x) + self.offset


class SharedGrid(Habit):
    def forward(self, x: Tensor) -> Tensor:
        key = (x.shape[-1], x.device)
        if key not in GRIDS:
            GRIDS[key] = torch.arange(x.shape[-1], dtype=x.dtype)
        return x + 0.01 * GRIDS[key]


class Slots(Habit):
    def __init__(self) -> None:
        super().__init__()
        self.state = Slotted()

    def forward(self, x: Tensor) -> Tensor:
        if self.state.size != x.shape[-1]:
            self.state.size, self.state.grid = x.shape[-1], torch.ones(x.shape[-1], dtype=x.dtype)
        return x * self.state.grid


class Draws(Habit):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.python = torch.Generator().manual_seed(1), random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1, generator=self.generator), torch.rand(1), self.python.random(), random.random()
        return x


class Clamps(Habit):
    """Writes into a parameter on each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.gain.data.clamp_(max=1.5)
        return x * self.gain


class Keeps(Habit):
    def forward(self, x: Tensor) -> Tensor:
        self.features = x
        return x


HABITS = [
    *(GuardedGrid, GuardedByNumber, GrowingTable, Counter, FirstPass, SharedGrid, Slots, Draws, Clamps, Keeps)
]
OUTPUTS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda logits, features: logits,
    lambda logits, features: (logits, [features]),
    lambda logits, features: {"logits": logits, "features": features},
    Result,
    Plain,
    lambda logits, features: types.SimpleNamespace(logits=logits, features=features),
    lambda logits, features: types.MappingProxyType({"logits": logits}),
    lambda logits, features: torch.distributions.Normal(logits, 1.0),
    lambda logits, features: (logits, logits.argmax(1), features.shape[1], None),
    lambda logits, features: torch.complex(logits, logits.tanh()),
    lambda logits, features: (logits, logits.topk(2, 1), float(logits.sum())),
    lambda logits, features: lambda: logits,
]


class Odd(nn.Module):
    """A small net in one of several shapes, with one or two habits, keyword calls or checkpoints, and some output."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        width = draw.choice((6, 8, 12))
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.last, self.head = nn.Conv2d(width, 2 * width, 3), nn.Linear(2 * width, 5)
        self.before, self.after = draw.choice(HABITS)(), draw.choice(HABITS)()
        self.kind = draw.choice(("chain", "residual", "keyword", "checkpoint", "both"))
        self.num_classes, self.width = 5, width
        self.wrap = draw.choice(OUTPUTS)

    def forward(self, x: Tensor) -> Any:
        TRIP()
        if self.kind == "keyword":
            x = F.relu(self.norm(input=self.first(input=x)))
        else:
            x = F.relu(self.norm(self.first(x)))
        x = self.before(x)
        if self.kind in ("checkpoint", "both"):
            y = checkpoint(self.body, x, use_reentrant=self.kind == "both")
        else:
            y = self.body(x)
        x = F.relu(x + y) if self.kind in ("residual", "both") else F.relu(y)
        features = self.after(F.relu(self.last(x)))
        pooled = features.mean((2, 3))
        logits = self.head(input=pooled) if self.kind == "keyword" else self.head(pooled)
        return self.wrap(logits, features)


def odd_model(seed: int) -> tuple[Odd, Tensor]:
    """A model, some of which have run or been trained before, and an input for it."""
    draw = random.Random(seed)
    GRIDS.clear()
    TRIP.arm(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, x = Odd(draw), torch.randn(draw.choice((1, 2)), 3, 10, 10)
        if draw.random() < 0.5:
            with (
                torch.no_grad(),
                warnings.catch_warnings(action="ignore"),
            ):  # of checkpoints without gradients
                model.eval()(x)
        model.train(draw.random() < 0.5)
        model.first.weight.requires_grad_(draw.random() < 0.8)
    return model, x


def state_of(model: nn.Module) -> Any:
    """All that hangs on a model, its classes and this module's cache, and the random numbers to come."""
    seen: dict[int, int] = {}

    def told(thing: Any) -> Any:
        if isinstance(thing, (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype)):
            return repr(thing)
        if id(thing) in seen:
            return ("again", seen[id(thing)])
        seen[id(thing)] = len(seen)
        if isinstance(thing, Tensor):
            grad = None if not thing.is_leaf or thing.grad is None else thing.grad.tolist()
            return (id(thing), thing.dtype, thing.requires_grad, grad, thing.detach().tolist())
        if isinstance(thing, dict):
            return [(told(key), told(value)) for key, value in thing.items()]
        if isinstance(thing, (list, tuple, collections.deque)):
            return [type(thing).__name__, *map(told, thing)]
        if isinstance(thing, (set, frozenset)):
            return sorted(map(repr, thing))
        if isinstance(thing, torch.Generator):
            return thing.get_state().tolist()
        if isinstance(thing, random.Random):
            return thing.getstate()
        if isinstance(thing, Slotted):
            return [told(getattr(thing, name)) for name in Slotted.__slots__]
        if hasattr(thing, "__dict__") and not isinstance(thing, (type, types.FunctionType)):
            return (type(thing).__name__, id(thing), told(vars(thing)))
        return id(thing)

    classes = [GuardedGrid.shape, GuardedGrid.grid.tolist(), Counter.total]
    return (
        told(model),
        told(GRIDS),
        classes,
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.is_grad_enabled(),
        checkpointing.CheckpointFunction,
    )


def first_difference(a: Any, b: Any, path: str = "") -> str:
    """Where two states differ, for people."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                name = a[0] if isinstance(a, tuple) and isinstance(a[0], str) and number == 1 else number
                return first_difference(x, y, f"{path}/{name}")
    return f"{path}: {str(a)[:200]} | {str(b)[:200]}"
