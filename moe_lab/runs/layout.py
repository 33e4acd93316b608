"""The names in a run's folder and in a sweep's folder, and the states of a run."""

from enum import StrEnum

CONFIG = "config.json"
"""The run's configuration (``RunConfig.to_dict``), written first."""
STATUS = "status.json"
"""How far the run came (``record.Progress``), replaced twice a second while it trains."""
METRICS = "metrics.parquet"
"""The logged steps of a finished run: one of its tables."""
TABLE_NAMES = ("metrics", "layers", "loads", "validation", "alarms")
"""A table is ``<name>.jsonl`` while the run trains and ``<name>.parquet`` when it is done
(``tables``).
"""
CHECKPOINT = "checkpoint.safetensors"
"""What the run resumes from; removed when it is done."""
DAMAGED_CHECKPOINT = "checkpoint.damaged"
"""A checkpoint that could not be read, set aside by ``--retry-failed``; removed with the other."""
RESUMED_FROM = (CHECKPOINT, DAMAGED_CHECKPOINT)
"""What a finished run has no more use for."""
MODEL = "model.safetensors"
TOKENIZER = "tokenizer.json"
TRACE = "trace"
"""Folder of the validation trace (docs/trace.md)."""
TRACE_META = "meta.json"
"""In the trace's folder, written last."""
RESULT = "result.json"
"""What a finished run says of itself."""
ERROR = "error.txt"
"""Why the run failed: one line of reason, then the traceback."""
FAILURE = "error.json"
"""What kind of failure it was (``failures.FailureKind``), written before ``error.txt``."""
LOG = "log.txt"
"""What the run printed."""
STUDY_FOLDER, STUDY_VERDICT = "difficulty", "verdict.json"
"""Folder of the tables of ``moe-lab difficulty``, and what is written last in it."""
DONE = "done"
"""Written last: the only proof of a finished run."""

PLAN = "sweep.json"
"""In a sweep's folder: its sweeps and their runs (``plan``)."""
WAITS = "waits.json"
"""In a sweep's folder or store: runs that wait for what may never come (``waits``)."""
TRUNKS = "trunks"
"""In a sweep's folder: states that shorter token budgets begin from (``training.branching``)."""

TUNING = "lr"
"""In a plan: the arm of a sweep's runs at other learning rates."""


class RunState(StrEnum):
    """PENDING: never begun. RUNNING: a living process trains it. FINISHED: ``done`` is there.
    FAILED: ``error.txt`` is there. INTERRUPTED: begun, and neither; it can be resumed.
    """

    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
