"""What happened: every routing decision as Parquet. ``capture`` and ``import_trace`` write a trace, ``open_trace`` reads one."""

from moe_lab.trace.capturing.reading import Reading
from moe_lab.trace.capturing.recorder import Capture, capture
from moe_lab.trace.importing import ImportKind, import_trace
from moe_lab.trace.merge import merge_traces
from moe_lab.trace.reader import Trace, open_trace
from moe_lab.trace.schema import SCHEMA_VERSION, LayerMeta, TraceMeta
from moe_lab.trace.writer import TraceWriter

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
