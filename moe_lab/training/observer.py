"""``Observer``: what becomes of the readings of a step: lines of the run's tables, alarms, and the
end of the run where an alarm is to end it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moe_lab.errors import AlarmError
from moe_lab.progress import say
from moe_lab.training.alarms import Alarm, Alarms
from moe_lab.training.config import OnAlarm
from moe_lab.training.metrics import layers_line, loads_line
from moe_lab.training.readings import LayerReading
from moe_lab.training.run_log import RunLog


class Observer:
    """Takes the readings of each observed step. All ranks of a run observe the same readings, so
    that an alarm ends all of them; one of them writes.

    Args:
        log: receives the lines of the tables ``layers``, ``loads`` and ``alarms``.
        on_alarm: whether an alarm ends the run.
        tell: whether to print the alarms, on the error stream.
        alarms: those to raise; all with their default thresholds by default.

    Attributes:
        raised: all alarms so far of this process.
    """

    def __init__(
        self, log: RunLog, on_alarm: OnAlarm, tell: bool, alarms: Alarms | None = None
    ) -> None:
        self.log, self.on_alarm, self.tell = log, on_alarm, tell
        self.alarms = Alarms() if alarms is None else alarms
        self.raised: list[Alarm] = []

    def observe(self, readings: Sequence[LayerReading]) -> list[Alarm]:
        """Record the readings of one step, and say the alarms that they raise. The caller writes
        what belongs to them, and then calls ``stop``.
        """
        if not readings:
            return []
        self.log.add("layers", layers_line(readings))
        self.log.add("loads", loads_line(readings))
        alarms = self.alarms.observe(readings)
        self.raised += alarms
        for alarm in alarms:
            self.log.add("alarms", asdict(alarm))
            if self.tell:
                say(f"{alarm.sentence} {alarm.advice}")
        return alarms

    def stop(self, alarms: Sequence[Alarm]) -> None:
        """Raise ``AlarmError`` for alarms that are to end the run; they are then on disk."""
        if alarms and self.on_alarm is OnAlarm.STOP:
            self.log.flush(lasting=True)
            kinds = ", ".join(dict.fromkeys(alarm.kind for alarm in alarms))
            sentence = alarms[0].sentence.removesuffix(".")
            hint = "try another configuration, or on_alarm='record' (--on-alarm record)"
            raise AlarmError(f"stopped by an alarm ({kinds}): {sentence}; {hint}", kinds)

    def state_dict(self) -> dict[str, Any]:
        """The state of the alarms, JSON values only, for a run that resumes."""
        return self.alarms.state_dict()
