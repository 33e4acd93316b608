"""Alarms: sentences about a layer whose routing goes wrong, from the readings of a run.

``Alarms`` takes the readings of each observed step and returns the alarms that they raise, each
once per layer and episode. What each kind of alarm measures stands in ``alarm_rules``; how often
they are right, in docs/alarms.md. Another kind is a subclass of ``AlarmRule`` under
``@ALARMS.register("name")``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moe_lab.errors import CheckpointError, ConfigError, expected, require
from moe_lab.registry import Registry
from moe_lab.training.readings import LayerReading

_RULES = "moe_lab.training.alarm_rules"

ALARMS: Registry = Registry(
    "an alarm",
    dict.fromkeys(
        (
            "router_collapse",
            "dead_experts",
            "load_drift",
            "entropy_low",
            "entropy_high",
            "bias_direction",
            "bias_runaway",
            "budget_drift",
            "zero_share",
            "balance_dominates",
            "router_frozen",
            "router_speed",
        ),
        _RULES,
    ),
)
"""Name -> class of the alarm, imported on first use."""


@dataclass(frozen=True)
class Alarm:
    """One alarm that was raised.

    Attributes:
        step, layer: of the reading that raised it.
        kind: name in ``ALARMS``.
        value, threshold: of the measure; the value is the mildest of the readings that were past
            the threshold.
        sentence: what was seen, with layer, step and numbers.
        advice: what to look at, and what is done about it.
    """

    step: int
    kind: str
    layer: int
    value: float
    threshold: float
    sentence: str
    advice: str


class AlarmRule:
    """What one kind of alarm measures in the readings of one layer; a subclass defines ``measure``,
    ``seen`` and the class attributes.

    An alarm is raised when ``patience`` successive values are past the threshold, and its episode
    ends when as many are within it.

    Attributes:
        threshold: the default.
        below: whether values below the threshold raise the alarm, not values above.
        patience: successive values.
        advice: what to look at, and what is done about it.
        memory: what the measure remembers of earlier readings; JSON values only, so that a resumed
            run continues with it (None in place of NaN and infinity).

    Example:
        >>> @ALARMS.register("long_queue")
        ... class LongQueue(AlarmRule):
        ...     threshold = 4.0
        ...     advice = "Look at the capacity factor."
        ...     def measure(self, reading):
        ...         return reading.counts.max().item() / reading.counts.double().mean().item()
        ...     def seen(self, reading, value):
        ...         return f"the busiest expert has {value:.1f} times the mean load"
    """

    threshold: ClassVar[float]
    below: ClassVar[bool] = False
    patience: ClassVar[int] = 1
    advice: ClassVar[str]

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}
        self.past: list[float] = []
        self.active = False

    def measure(self, reading: LayerReading) -> float | None:
        """The value of a reading; None where the layer or the reading has no such value. One that
        is not finite counts as None.
        """
        raise TypeError(f"{type(self).__name__} does not define measure()")

    def seen(self, reading: LayerReading, value: float) -> str:
        """What was seen, as a clause with the numbers; step and layer are put before it."""
        raise TypeError(f"{type(self).__name__} does not define seen()")

    def held(self, reading: LayerReading) -> float | None:
        """The mildest of the last ``patience`` values, this reading's among them; None while there
        are fewer, or if this reading has none.
        """
        value = self.measure(reading)
        if value is None or not math.isfinite(value):
            return None
        self.past = [*self.past, value][-self.patience :]
        if len(self.past) < self.patience:
            return None
        return max(self.past) if self.below else min(self.past)

    def raised(self, reading: LayerReading, threshold: float) -> float | None:
        """The value with which this reading begins an episode; None if it begins none."""
        value = self.held(reading)
        if value is None:
            return None
        past = [item < threshold if self.below else item > threshold for item in self.past]
        if self.active:
            self.active = any(past)
            return None
        self.active = all(past)
        return value if self.active else None


class Alarms:
    """The alarms of a run.

    Args:
        names: of ``ALARMS``; all of them if None.
        thresholds: name -> threshold, where it is not to be the default.

    Raises:
        ConfigError: a name is unknown, or a threshold is no number, or is of an alarm that is not
            observed.

    Example:
        >>> alarms = Alarms(thresholds={"balance_dominates": 0.1})
        >>> for alarm in alarms.observe(readings):
        ...     print(alarm.sentence, alarm.advice)
    """

    def __init__(
        self, names: Iterable[str] | None = None, thresholds: Mapping[str, float] | None = None
    ) -> None:
        chosen = {name: ALARMS.find(name) for name in (ALARMS if names is None else names)}
        self.thresholds = {name: float(rule.threshold) for name, rule in chosen.items()}
        for name, threshold in (thresholds or {}).items():
            ALARMS.find(name)
            require(
                name in chosen,
                f"thresholds for {', '.join(chosen)}",
                repr(name),
                f"{name!r} among the names",
                field="thresholds",
            )
            require(
                isinstance(threshold, int | float) and not math.isnan(threshold),
                f"a number as the threshold of {name}",
                repr(threshold),
                field="thresholds",
            )
            self.thresholds[name] = float(threshold)
        self._kinds = chosen
        self._rules: dict[tuple[str, int], AlarmRule] = {}
        self._experts: dict[int, int] = {}

    def observe(self, readings: Sequence[LayerReading]) -> list[Alarm]:
        """The alarms that the readings of one step raise.

        Raises ``ConfigError`` for counts that are no [E] of a layer, or of another number of
        experts than this layer had before.
        """
        alarms = []
        for reading in readings:
            counts = reading.counts
            experts = self._experts.setdefault(reading.layer, counts.numel())
            if not (counts.shape == (experts,) and bool((counts >= 0).all())):
                what = f"counts of at least 0 of the {experts} experts of layer {reading.layer}"
                hint = "a layer number of its own for each MoE layer"
                raise ConfigError(expected(what, counts.tolist(), hint), field="counts")
            for kind, threshold in self.thresholds.items():
                rule = self._rule(kind, reading.layer)
                if (value := rule.raised(reading, threshold)) is not None:
                    alarms.append(
                        Alarm(
                            step=reading.step,
                            kind=kind,
                            layer=reading.layer,
                            value=value,
                            threshold=threshold,
                            sentence=f"Step {reading.step}, layer {reading.layer}: "
                            f"{rule.seen(reading, value)}.",
                            advice=rule.advice,
                        )
                    )
        return alarms

    @property
    def active(self) -> list[tuple[str, int]]:
        """Kind and layer of each alarm whose episode has not ended."""
        return [place for place, rule in self._rules.items() if rule.active]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in order to forget and repeat no alarm; JSON values only."""
        return {
            f"{kind}/{layer}": {"active": rule.active, "past": rule.past, "memory": rule.memory}
            for (kind, layer), rule in self._rules.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()`` of the same step. Alarms that are not observed here are
        left out.

        Raises ``CheckpointError`` for anything else.
        """
        self._rules = {}
        try:
            for place, saved in state.items():
                kind, layer = place.rsplit("/", 1)
                if kind in self._kinds:
                    rule = self._rule(kind, int(layer))
                    rule.active = bool(saved["active"])
                    rule.past = [float(value) for value in saved["past"]]
                    rule.memory = dict(saved["memory"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                expected("the state of alarms", repr(error), "the run's own checkpoint"), "alarms"
            ) from error

    def _rule(self, kind: str, layer: int) -> AlarmRule:
        if (kind, layer) not in self._rules:
            self._rules[kind, layer] = self._kinds[kind]()
        return self._rules[kind, layer]
