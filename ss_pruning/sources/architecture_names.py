"""The architecture that a file names: a name, a few plain options, no weights, and nothing else.

Builders of timm and torchvision fetch and open what they are told to: urls, checkpoints, caches, configurations. What a
user types may tell them so; what a file says may not, since it was written by somebody else.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ss_pruning._utils.arrays import tensors_among
from ss_pruning.errors import FileFormatError
from ss_pruning.sources.models import BUILDERS

_SPEC = re.compile(
    r"(?P<kind>timm|torchvision|yolo|demo):(?P<name>[A-Za-z0-9_-]{1,80}(\.[A-Za-z0-9_]{1,80})?)"
    r"(?P<options>(, ?[a-z_]{1,32}=[A-Za-z0-9_.+-]{1,32}){0,16})"
)
_NUMBER = re.compile(r"-?\d{1,9}(\.\d{1,18})?(e-?\d{1,2})?")


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _between(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _flag(value: Any) -> bool:
    return type(value) is bool


def _word(value: Any) -> bool:
    return type(value) is str and len(value) <= 24


_CLASSES, _SIDE, _RATE = _whole(0, 100_000), _whole(1, 1024), _between(0, 1)
#: What is passed on, and the values that it may have. Nothing here names a place, a file or code.
OPTIONS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "timm": {
        "num_classes": _CLASSES,
        "in_chans": _SIDE,
        "img_size": _SIDE,
        "output_stride": _whole(1, 32),
        "global_pool": _word,
        "drop_rate": _RATE,
        "drop_path_rate": _RATE,
        "drop_block_rate": _RATE,
        "attn_drop_rate": _RATE,
        "proj_drop_rate": _RATE,
        "pos_drop_rate": _RATE,
    },
    "torchvision": {
        "num_classes": _CLASSES,
        "num_keypoints": _CLASSES,
        "image_size": _SIDE,
        "width_mult": _between(0.01, 8),
        "dropout": _RATE,
        "attention_dropout": _RATE,
        "stochastic_depth_prob": _RATE,
        "aux_logits": _flag,
        "aux_loss": _flag,
        "init_weights": _flag,
        "transform_input": _flag,
    },
    "yolo": {"nc": _whole(1, 100_000), "ch": _SIDE, "keypoints": _SIDE, "dims": _whole(2, 3)},
    "demo": {},
}
#: Where the dense weights came from does not matter: the file holds its own. Of yaml files, only Ultralytics' own.
_WITHOUT_WEIGHTS: dict[str, dict[str, Any]] = {
    "timm": {"pretrained": False},
    "torchvision": {"weights": None, "weights_backbone": None},
    "yolo": {"stock": True},
    "demo": {},
}
# What torchvision changes of a model, besides its weights, when it is asked for weights.
_BESIDES = {
    "googlenet": {"transform_input": True, "aux_logits": False},
    "inception_v3": {"transform_input": True},
}

# Bytes that building may take: of any file, and so many times its size (pruning left a part of each width).
_LEAST, _TIMES = 2**31, 100


def build_named(spec: str, path: str | os.PathLike[str]) -> nn.Module:
    """Build the dense architecture that a file names, with random weights; nothing is fetched and nothing opened.

    Args:
        spec: What the file says; `timm:`, `torchvision:`, `yolo:` or `demo:`, a name, and options of `OPTIONS`.
        path: The file, for messages, and because its size bounds what building may take.

    Raises:
        FileFormatError: It says anything else, or the model is far larger than the file; nothing was built.
        InputError: There is no such model, or it does not take these options.
    """
    kind, name, options = _read(spec, path)
    allowed = max(_LEAST, _TIMES * Path(path).stat().st_size)
    with _Allowance(allowed, f"'{path}' names {_quoted(spec)}"):
        return BUILDERS[kind](name, options)


def without_weights(spec: str, path: str | os.PathLike[str]) -> str:
    """The architecture that a file names, as a name for `build_model` that asks for no weights.

    Raises:
        FileFormatError: See `build_named`.
    """
    kind, name, options = _read(spec, path)
    return ",".join([f"{kind}:{name}", *(f"{key}={value}" for key, value in options.items())])


def _read(spec: str, path: str | os.PathLike[str]) -> tuple[str, str, dict[str, Any]]:
    """Kind, name and options, all of them checked."""
    found = _SPEC.fullmatch(spec) if spec.isascii() and len(spec) <= 1000 else None
    if found is None:
        raise _refused(
            spec, path, "that is not timm:, torchvision:, yolo: or demo:, a name, and plain options"
        )
    kind, given = found["kind"], dict(_item(item) for item in filter(None, found["options"].split(",")))
    weights = {key: given.pop(key, None) for key in _WITHOUT_WEIGHTS[kind]}
    for key, value in given.items():
        fits = OPTIONS[kind].get(key)
        if fits is None:
            raise _refused(spec, path, f"the option {key!r} is not passed on from a file")
        if not fits(value):
            raise _refused(spec, path, f"{key}={value!r} is not passed on from a file")
    besides: Mapping[str, Any] = {}
    if kind == "torchvision" and weights["weights"] is not None:
        besides = _BESIDES.get(found["name"], {})
    return kind, found["name"], {**besides, **given, **_WITHOUT_WEIGHTS[kind]}


def _item(text: str) -> tuple[str, Any]:
    key, _, value = text.strip().partition("=")
    plain = {"True": True, "False": False, "None": None}
    if value in plain:
        return key, plain[value]
    if _NUMBER.fullmatch(value):
        return key, int(value) if value.lstrip("-").isdigit() else float(value)
    return key, value


def _refused(spec: str, path: str | os.PathLike[str], reason: str) -> FileFormatError:
    return FileFormatError(
        f"'{path}' says that it was made from {_quoted(spec)}: {reason}. If you trust it, name the architecture "
        "yourself: load(path, architecture), or --model"
    )


def _quoted(spec: str) -> str:
    return repr(spec if len(spec) <= 120 else f"{spec[:117]}...")


class _Allowance(TorchDispatchMode):
    """Adds up the sizes of the tensors that are made from nothing, and raises before there are too many."""

    def __init__(self, allowed: int, who: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.who = allowed, who

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args and isinstance(args[0], list | tuple) else ()
        if size and all(isinstance(side, int) for side in size):
            self._take(4 * math.prod(size))
        elif not tensors_among((args, kwargs)):
            made = func(*args, **(kwargs or {}))
            self._take(sum(t.nbytes for t in tensors_among(made)))
            return made
        return func(*args, **(kwargs or {}))

    def _take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise FileFormatError(
                f"{self.who}, which is too large for a file of that size to come from; if you trust it, name the "
                "architecture yourself: load(path, architecture), or --model"
            )
