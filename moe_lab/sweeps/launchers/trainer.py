"""The trainer that a worker calls for each run, named as an importable ``module:function``."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lab.errors import RunError, expected
from moe_lab.runs.layout import DONE

Trainer = Callable[[dict[str, Any], Path], object]
"""``(config values, run folder)``; leaves a run folder with ``done``, or raises."""
TRAIN = f"{__name__}:train_run"
"""The default trainer."""
NOT_DONE = expected(f"a run that ends with the file {DONE!r}", "none", "looking into log.txt")


def load_trainer(name: str) -> Trainer:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RunError(
            expected("a trainer as an importable module:function", f"{name!r}: {error}")
        ) from error


def train_run(values: dict[str, Any], folder: Path) -> None:
    """Train, or resume, the run that ``values`` describe, on one thread: the same numbers however
    many workers there are.
    """
    import torch

    from moe_lab.training import RunConfig, keep_freed_memory, train

    torch.set_num_threads(1)
    keep_freed_memory()
    train(RunConfig.from_dict(values), folder)
