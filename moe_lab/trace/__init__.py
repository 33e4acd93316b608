"""Traces: every routing decision of a model on a text, as Parquet.

``capture`` and ``import_trace`` write a trace, ``open_trace`` reads one.
"""

from typing import TYPE_CHECKING

from moe_lab.lazy import on_first_use
from moe_lab.trace.merge import merge_traces
from moe_lab.trace.opened_trace import Trace
from moe_lab.trace.reader import open_trace
from moe_lab.trace.schema import SCHEMA_VERSION, LayerMeta, TraceMeta
from moe_lab.trace.writer import TraceWriter

if TYPE_CHECKING:
    from moe_lab.trace.capturing.recorder import Capture, capture
    from moe_lab.trace.capturing.router_output import Reading
    from moe_lab.trace.importing import ImportKind, import_trace

__getattr__ = on_first_use(
    __name__,
    {
        "capturing.router_output": ("Reading",),  # torch
        "capturing.recorder": ("Capture", "capture"),
        "importing": ("ImportKind", "import_trace"),
    },
)

__all__ = [
    "SCHEMA_VERSION",
    "Capture",
    "ImportKind",
    "LayerMeta",
    "Reading",
    "Trace",
    "TraceMeta",
    "TraceWriter",
    "capture",
    "import_trace",
    "merge_traces",
    "open_trace",
]
