"""One run: ``RunConfig`` in, a run directory out."""

from moe_lab.document_pass import Excerpt, excerpts_of
from moe_lab.training.config import RATIO_MEANING, Dtype, OptimizerConfig, RunConfig
from moe_lab.training.devices import check_device, keep_freed_memory
from moe_lab.training.evaluate import Evaluation, evaluate
from moe_lab.training.finished_run import LoadedRun, load_run
from moe_lab.training.monitoring import monitor
from moe_lab.training.ranks import Parallel, RankError
from moe_lab.training.run import RunResult, check_text, train
from moe_lab.training.tracking import Logger

__all__ = [
    "RATIO_MEANING",
    "Dtype",
    "Evaluation",
    "Excerpt",
    "LoadedRun",
    "Logger",
    "OptimizerConfig",
    "Parallel",
    "RankError",
    "RunConfig",
    "RunResult",
    "check_device",
    "check_text",
    "evaluate",
    "excerpts_of",
    "keep_freed_memory",
    "load_run",
    "monitor",
    "train",
]
