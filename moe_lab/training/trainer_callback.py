"""``RoutingCallback``: ``monitor`` for the ``Trainer`` of transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_lab.training.monitoring import Monitor, monitor

if TYPE_CHECKING:
    from transformers import TrainerCallback as _Base
else:
    try:
        from transformers import TrainerCallback as _Base
    except ImportError:
        _Base = object


class RoutingCallback(_Base):
    """A ``TrainerCallback`` that observes each step that the trainer logs, and adds the scalars of
    ``monitor`` to what is logged.

    Callbacks that send the logs to a tracker must come after it:
    ``trainer.callback_handler.callbacks.insert(0, callback)``.

    Args:
        folder: where the tables go. A training that goes on from a checkpoint continues them.
        options: those of ``monitor``: ``every`` (by default the steps between two logs),
            ``on_alarm``, ``readers``, ``overwrite`` and the others.
    """

    def __init__(self, folder: Path | str, **options: Any) -> None:
        self.folder, self.options = folder, options
        self.monitor: Monitor | None = None
        self._scalars: dict[str, float] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Find the routers of the model. Raises as ``monitor``."""
        assert model is not None
        steps = str(args.logging_strategy) in ("steps", "IntervalStrategy.STEPS")
        every = max(int(state.logging_steps), 1) if steps else 1
        options: dict[str, Any] = {"every": every} | self.options
        before = {"step": state.global_step, "alarms": {}} if state.global_step else None
        self.monitor = monitor(model, self.folder, state=before, **options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step's scalars. Raises ``AlarmError`` with ``on_alarm="stop"``."""
        assert self.monitor is not None
        self._scalars = self.monitor.step() or self._scalars

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the scalars of the last observed step, once."""
        if logs is not None:
            logs.update(self._scalars)
        if state.log_history:  # a copy of the logs, made before the callbacks
            state.log_history[-1].update(self._scalars)
        self._scalars = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off, and write the Parquet files."""
        if self.monitor is not None:
            self.monitor.close()
