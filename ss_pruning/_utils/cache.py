"""Tensors kept on disk between runs: a damaged or unwritable cache costs time, never the result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ss_pruning._utils.files import make_writable_folder, write_bytes
from ss_pruning.errors import InputError


def folder() -> Path:
    """Return the folder of the cache: `$SS_PRUNING_CACHE`, else `ss_pruning` in the user's; it need not exist."""
    own, general = os.environ.get("SS_PRUNING_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    return (Path(general) if general else Path.home() / ".cache") / "ss_pruning"


def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return tensors and texts kept under `name`, or None where there is nothing or it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder() / f"{name}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def write(name: str, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Keep tensors and texts under `name`, over what is there; where that cannot be done, do without."""
    from safetensors.torch import save

    with contextlib.suppress(InputError):
        path = make_writable_folder(folder()) / f"{name}.safetensors"
        write_bytes(path, save({key: tensor.contiguous() for key, tensor in tensors.items()}, dict(texts)))
