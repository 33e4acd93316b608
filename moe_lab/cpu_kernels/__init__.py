"""The package's C++ for layers on a CPU (``experts.cpp``): products in tiles of the processor's
vectors, the top k of rows, and the experts of a layer, in float32 and float64.

The source is compiled once per machine and user, in seconds (``moe_lab.compiled``). Where that
cannot be had ``available`` is False and ``problem`` says why; ``MOE_LAB_NATIVE=0`` switches it off.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from moe_lab import compiled

DTYPES = {torch.float32: "f32", torch.float64: "f64"}
SOURCE = Path(__file__).with_name("experts.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)

_ready: bool | None = None
"""What ``available`` found; a plain global, because ``torch.compile`` reads those and cannot look
into the search itself.
"""


def available() -> bool:
    """Whether the library is there; the first call in a process loads it, the first on a machine
    compiles it. While ``torch.compile`` traces, one that was not looked for is not there.
    """
    global _ready
    if _ready is None and not torch.compiler.is_compiling():
        _ready = isinstance(_search(), ctypes.CDLL)
    return bool(_ready)


def problem() -> str | None:
    """Why there is no library, in one line; None if there is one."""
    found = _search()
    return None if isinstance(found, ctypes.CDLL) else found


def library() -> ctypes.CDLL:
    """The library, where it is ``available``."""
    found = _search()
    assert isinstance(found, ctypes.CDLL)
    return found


@functools.cache
def _search() -> ctypes.CDLL | str:
    """The compiled source, or the reason why it cannot be had."""
    loaded = compiled.load(SOURCE, FLAGS, "the experts")
    if isinstance(loaded, str):
        return loaded
    loaded.moe_plan.restype = None
    for name in DTYPES.values():
        for function in ("forward", "backward", "product", "top_k", "entropy_and_spread"):
            getattr(loaded, f"moe_{function}_{name}").restype = None
    return loaded


def integers(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
