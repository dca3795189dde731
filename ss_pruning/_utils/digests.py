"""One number for all that a file, or what is kept, depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(tensors: Iterable[tuple[str, Tensor]], *said: object) -> str:
    """SHA-256 of tensors, their names, types, shapes and values, and of what JSON can say."""
    whole = hashlib.sha256(json.dumps(said).encode())
    for name, tensor in tensors:
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
