"""Many runs: a sweep's configuration, its plan, the driver, and the launchers that run it."""

from moe_lab.free_memory import free_memory
from moe_lab.runs import RunState, RunStore, open_store, readable
from moe_lab.sweeps.config import SweepConfig
from moe_lab.sweeps.launchers import LAUNCHERS, Ending, Job, Launcher, Result
from moe_lab.sweeps.memory import run_memory, too_large
from moe_lab.sweeps.planning import (
    PLAN_COLUMNS,
    POWER_COLUMNS,
    cheapest_text,
    describe,
    design_of,
    flops_per_second,
    plan,
    plan_rows,
    plan_totals,
    power_rows,
    power_text,
    wall_minutes,
)
from moe_lab.sweeps.recipe import load_recipe
from moe_lab.sweeps.running import FailedRun, SweepOutcome, run
from moe_lab.sweeps.status_table import status, status_lines, status_rows

__all__ = [
    "LAUNCHERS",
    "PLAN_COLUMNS",
    "POWER_COLUMNS",
    "Ending",
    "FailedRun",
    "Job",
    "Launcher",
    "Result",
    "RunState",
    "RunStore",
    "SweepConfig",
    "SweepOutcome",
    "cheapest_text",
    "describe",
    "design_of",
    "flops_per_second",
    "free_memory",
    "load_recipe",
    "open_store",
    "plan",
    "plan_rows",
    "plan_totals",
    "power_rows",
    "power_text",
    "readable",
    "run",
    "run_memory",
    "status",
    "status_lines",
    "status_rows",
    "too_large",
    "wall_minutes",
]
