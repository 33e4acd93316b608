"""Copies of a run's metrics in experiment trackers: TensorBoard, Weights & Biases, Trackio.

The run's own record is ``metrics.jsonl`` and ``metrics.parquet`` in its folder, whatever is tracked
beside it. A logger receives the same scalars; one that fails is left out with a warning, and the
run goes on. A logger of one's own::

    class Print:
        def log(self, step, scalars):
            print(step, scalars["loss"])

        def close(self):
            pass

    train(config, folder, loggers=[Print()])
"""

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_lab.errors import ConfigError, expected, require
from moe_lab.runs.record import group_name
from moe_lab.training.config import RunConfig

_UNSAFE = re.compile(r"[^A-Za-z0-9._=-]+")
"""What a label has and the name of a folder should not."""
TRACK_VARIABLE = "MOE_LAB_TRACK"
"""Names of trackers, separated by commas, for runs that are given none: those of a sweep."""


class Logger(Protocol):
    """What receives a copy of a run's metrics."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the scalars of a logged step (1-based): ``loss``, ``lr``, ``load_cv``, ...; and
        ``validation/loss`` of each validation and, at the end, of the evaluation.
        """

    def close(self) -> None:
        """Write what is pending: the run is over, finished or not."""


class TensorBoard:
    """Event files in the run's folder, under ``tensorboard/<label>``; ``tensorboard --logdir`` on a
    sweep's folder shows all its runs.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted attempt wrote of the steps that come now is hidden.
        self.writer = SummaryWriter(
            str(folder / "tensorboard" / _UNSAFE.sub("-", label_of(config))),
            purge_step=step + 1 if step else None,
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A Weights & Biases run in the project of ``WANDB_PROJECT``, or of the name of the folder that
    holds the run's. ``WANDB_MODE=offline`` keeps it on this machine (``wandb sync`` sends it
    later).
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _project(folder),
            id=config.hash(),
            name=label_of(config),
            group=group_name(config.arm, config.ratio),
            config=config.to_dict(),
            dir=str(folder),
            resume="allow",
        )
        # A step of our own: W&B drops what an attempt that was resumed logs again.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"step": step, **scalars})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A trackio run, kept on this machine (``TRACKIO_DIR``), in a project named after the folder
    that holds the run's.
    """

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.run = trackio.init(
            project=_project(folder),
            # A run's name is its identity here, and two runs may have one label.
            name=f"{label_of(config)} ({config.hash()})",
            group=group_name(config.arm, config.ratio),
            config=config.to_dict(),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[RunConfig, Path, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""Name -> logger, which is also the name of the package that it needs."""


def label_of(config: RunConfig) -> str:
    """Arm, ratio and seed of a run, the name that a report gives it too: "topk 32:1, seed 0"."""
    return f"{group_name(config.arm, config.ratio)}, seed {config.seed}"


def _project(folder: Path) -> str:
    return folder.absolute().parent.name or "moe_lab"


class Tracking:
    """The loggers of one run. An error in one of them does not end the run."""

    def __init__(
        self, loggers: Sequence[Logger | str], config: RunConfig, folder: Path, step: int
    ) -> None:
        self.loggers: list[Logger] = []
        for logger in loggers:
            if isinstance(logger, str):
                self._guarded(
                    logger,
                    lambda name=logger: self.loggers.append(TRACKERS[name](config, folder, step)),
                )
            else:
                self.loggers.append(logger)

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        for logger in list(self.loggers):
            if not self._guarded(
                type(logger).__name__, lambda logger=logger: logger.log(step, scalars)
            ):
                self.loggers.remove(logger)

    def close(self) -> None:
        while self.loggers:
            logger = self.loggers.pop()
            self._guarded(type(logger).__name__, logger.close)

    def _guarded(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"moe-lab: tracking by {name} stopped ({reason[:300]}); the run goes on",
                file=sys.stderr,
                flush=True,
            )
            return False
        return True


def chosen(loggers: Sequence[Logger | str]) -> list[Logger | str]:
    """The given loggers, or those that ``MOE_LAB_TRACK`` names.

    Raises ``ConfigError`` for an unknown name or an absent package.
    """
    wanted = list(loggers) or [
        name.strip() for name in os.environ.get(TRACK_VARIABLE, "").split(",") if name.strip()
    ]
    for name in wanted:
        if isinstance(name, str):
            require(
                name in TRACKERS,
                f"a tracker among {', '.join(TRACKERS)}",
                repr(name),
                field="tracker",
            )
            if importlib.util.find_spec(name) is None:
                raise ConfigError(
                    expected(
                        f"the package {name} for tracking", "none", "pip install 'moe-lab[track]'"
                    ),
                    field=name,
                )
    return wanted
