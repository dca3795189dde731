"""How much memory may be held for what could be computed again, and giving back what is free."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch
from torch import nn

from ss_pruning._utils.modules import device_of
from ss_pruning.errors import InputError

#: Names the variable that sets it, in bytes.
VARIABLE = "SS_PRUNING_MEMORY"
# By default at most so many bytes, and no more than such a share of what is free.
_MOST, _SHARE = 5 * 2**28, 0.25
# Free bytes that the C library may keep: what is taken from it again need not be cleared by the system.
_KEPT = 2**29


def memory_bound(model: nn.Module) -> int:
    """Bytes that may be held where the model is: `$SS_PRUNING_MEMORY`, or else 1.25 GiB, less where little is free."""
    told = os.environ.get(VARIABLE)
    if told is None:
        return min(_MOST, int(_SHARE * _free(device_of(model))))
    if not told.isdecimal():
        raise InputError(f"{VARIABLE}={told!r} is no whole number of bytes, such as {_MOST}")
    return int(told)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        found = None
    return 1024 * int(found[1]) if found else int(_MOST / _SHARE)


class _Heap(ctypes.Structure):
    """What `mallinfo2` of glibc tells: ten numbers, the ninth of them the bytes that are free."""

    _fields_ = (("before", 8 * ctypes.c_size_t), ("free", ctypes.c_size_t), ("top", ctypes.c_size_t))


def give_back() -> None:
    """Give memory that is free back to the system, if it is much: the C library keeps it in case it is needed again."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc can
        library = ctypes.CDLL("libc.so.6")
        library.mallinfo2.restype = _Heap
        if library.mallinfo2().free > _KEPT:
            library.malloc_trim(0)
