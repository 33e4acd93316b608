"""Run folders: the names in them, the state and the record of a run, and the stores that hold the
runs of a sweep.

    runs/<sweep>/sweep.json             the plan: sweeps, and the runs by hash (`plan`)
    runs/<sweep>/<config hash>/         one run; its file names stand in `layout`
    runs/<sweep>/trunks/                states that shorter token budgets branch off from

Training writes these folders; sweeps, reports and scaling read them through this package, which
imports no torch, and polars only in `tables`, which reads what a run logs.
"""

from moe_lab.runs.folder_store import RunStore
from moe_lab.runs.layout import RunState
from moe_lab.runs.record import Progress, RunRecord, read_run, read_runs
from moe_lab.runs.store import Store, open_store, readable

__all__ = [
    "Progress",
    "RunRecord",
    "RunState",
    "RunStore",
    "Store",
    "open_store",
    "read_run",
    "read_runs",
    "readable",
]
