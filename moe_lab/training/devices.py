"""The device that a run trains on, and how its process keeps memory."""

import ctypes
import os

import torch
from torch import Tensor

from moe_lab.errors import ConfigError, expected, require

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1
"""Of glibc's mallopt (malloc.h)."""


def check_device(name: str) -> None:
    """Raise ``ConfigError`` if torch has no device ``name``; makes no CUDA context."""
    if not name.startswith("cuda"):
        device_of(name)
        return
    devices = torch.cuda.device_count()
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    require(
        index.isdecimal() and int(index) < devices,
        "a device that torch can use",
        f"{name!r}, {devices} CUDA devices",
        "cpu",
        field="device",
    )


def device_of(name: str) -> torch.device:
    """Raise ``ConfigError`` if torch has no device ``name``."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        got = f"{name!r} ({str(error).splitlines()[0]})"
        raise ConfigError(
            expected("a device that torch can use", got, "cpu"), field="device"
        ) from error
    return device


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the CPU on ``device``.

    CUDA copies from pinned memory: the host does not wait until the device has done what it was
    given before.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep freed memory in the process, and torch to ask Linux for large
    pages for tensors from 2 MB on. For processes that only train.

    A step frees and takes again the same large tensors; giving them back to the system between
    costs a page fault for every 4 kB, 15 to 20 % of the CPU time of a 76M-parameter step (0.8M
    active, E = 256). Large pages shorten AdamW's pass over parameters in memory by a third; a
    process whose first tensor was made before this call does without them. Returns False if the
    allocator is another one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
