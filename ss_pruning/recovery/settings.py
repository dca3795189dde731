"""How `recover_` trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ss_pruning.config import as_pythons_own, check_seed, is_count, is_number
from ss_pruning.errors import InputError


@dataclass(frozen=True)
class Recovery:
    """How `recover_` trains a pruned model to imitate the dense one.

    Attributes:
        rate: Learning rate of Adam, as a share of each tensor's root mean square. It grows over the first twentieth of
            the training, then falls to 0 as half a cosine. Below 400 steps it is smaller in proportion.
        batch: Images a step; by default 64, and fewer where time is short: so that 200 steps fit in, but 8 at least.
        weight_decay: Share of each weight that is taken off it, times the rate, in each step.
        shift: Images are shifted by up to this share of their sides, in both directions, and mirrored at the edge; 0
            leaves them in place. Has no effect on inputs that are no images of one or three channels.
        flip: Mirror every other image; likewise for images only.
        held_out: Share of the images that is not trained on, and that the model is judged by. They are shifted and
            mirrored, too, as compensation may have fitted the images themselves.
        until: Training ends early once the error on held-out images is no larger than this.
        seed: Of all random choices: which images are held out, batches, shifts.
        dtype: "bfloat16" computes in mixed precision; None in that of the model.

    Raises:
        InputError: A value is out of range.
    """

    rate: float = 0.05
    batch: int | None = None
    weight_decay: float = 1e-4
    shift: float = 0.125
    flip: bool = True
    held_out: float = 0.2
    until: float = 1e-6
    seed: int = 0
    dtype: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        ranges = {
            "rate": (0, 1e3),
            "weight_decay": (0, 1),
            "shift": (0, 0.5),
            "held_out": (0, 0.9),
            "until": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise InputError(f"{name}={value!r} must be a number in [{low}, {high}]")
        if not self.rate or not self.held_out:
            raise InputError("rate and held_out must be larger than 0")
        if not (self.batch is None or is_count(self.batch)):
            raise InputError(f"batch={self.batch!r} must be a positive whole number, or None")
        if not isinstance(self.flip, bool):
            raise InputError(f"flip={self.flip!r} is neither True nor False")
        check_seed(self.seed)
        if self.dtype not in (None, "bfloat16"):
            raise InputError(f"dtype={self.dtype!r} is unknown; use 'bfloat16' or None (float16 overflows)")
        as_pythons_own(self)
