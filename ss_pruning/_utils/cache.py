"""Tensors kept on disk between runs: a damaged or unwritable cache costs time, never the result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ss_pruning._utils.arrays import digest
from ss_pruning._utils.files import make_writable_folder, write_bytes
from ss_pruning.errors import InputError


def folder() -> Path:
    """Return the folder of the cache: `$SS_PRUNING_CACHE`, else `ss_pruning` in the user's; it need not exist."""
    own, general = os.environ.get("SS_PRUNING_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    try:
        return (Path(general) if general else Path.home() / ".cache") / "ss_pruning"
    except RuntimeError:  # a user without a home, as in containers: nothing is kept
        return Path(os.devnull) / "ss_pruning"


def read(name: str) -> dict[str, Tensor] | None:
    """Return the tensors kept under `name`, or None where there is nothing or it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = folder() / f"{name}.safetensors"
    try:
        if not path.is_file():  # a FIFO would be waited for
            return None
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            checksum = (file.metadata() or {}).get("checksum")
        # Bits turn over on disks, and a number that is another looks sound.
        return tensors if checksum == digest(sorted(tensors.items())) else None
    except (SafetensorError, OSError, MemoryError):
        return None


def write(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors under `name`, over what is there; where that cannot be done, do without."""
    from safetensors.torch import save

    with contextlib.suppress(InputError, OSError, MemoryError):
        path = make_writable_folder(folder()) / f"{name}.safetensors"
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        write_bytes(path, save(whole, {"checksum": digest(sorted(whole.items()))}))
