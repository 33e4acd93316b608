"""``TracedRouter``: one router of a model, how its calls are read, whether a reading fits it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import nn

from moe_lab.errors import TraceError, expected, require
from moe_lab.routing.config import ScoreFunc
from moe_lab.trace.capturing.router_output import (
    Reader,
    Reading,
    are_probabilities,
    as_reading,
    describe,
    joined,
)
from moe_lab.trace.score_spread import infer_score_func

T = TypeVar("T")


@dataclass
class TracedRouter:
    """One router of a model.

    Attributes:
        name: of the hooked module.
        module: the module whose calls are read.
        read: makes a reading of what the hooks saw.
        layer: number in the model, by its name, or by the order of the routers.
        visits: numbers in the trace, one for each time that a token goes through the layer.
        taps: label -> module whose inputs and outputs are seen too.
        num_experts, top_k: from the configuration; None where it has none, so that the first call
            decides.
        score_func: from logits to scores; None where it must be inferred from the weights.
    """

    name: str
    module: nn.Module
    read: Reader
    layer: int
    taps: Mapping[str, nn.Module]
    num_experts: int | None = None
    top_k: int | None = None
    num_zero_experts: int = 0
    zero_kinds: tuple[str, ...] = ()
    score_func: ScoreFunc | None = None
    visits: tuple[int, ...] = ()

    @property
    def num_choices(self) -> int | None:
        """Real and zero-compute experts together."""
        return None if self.num_experts is None else self.num_experts + self.num_zero_experts

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    def readings(self, calls: list[dict[str, Any]], tokens: int) -> list[Reading]:
        """The readings of one forward pass over ``tokens`` tokens: one for each of ``visits``, each
        of an equal share of the calls.

        Raises:
            TraceError: naming the module, where its outputs do not fit.
        """
        return self._named(
            calls, lambda: [self._reading(part, tokens) for part in self.shares(calls)]
        )

    def readings_of_calls(self, calls: list[dict[str, Any]]) -> list[Reading]:
        """One reading for each call, of however many tokens. Raises as ``readings``."""

        def read(call: dict[str, Any]) -> Reading:
            reading = self.read_call(call)
            self._settle(reading)
            return reading

        return self._named(calls, lambda: [read(call) for call in calls])

    def _named(self, calls: list[dict[str, Any]], read: Callable[[], T]) -> T:
        """The result of ``read``; an error in it becomes one that names the module."""
        try:
            return read()
        except TraceError as error:
            raise TraceError(f"{self}: {error}") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            seen = describe(calls[0].get("output"))
            raise TraceError(
                f"{self}: its output {seen} does not fit: {type(error).__name__}: {error}; "
                f"try readers={{'{self.name}': reader}}"
            ) from error

    def shares(self, calls: list[T]) -> list[list[T]]:
        """Equal parts of what the calls of one forward pass gave, one for each visit."""
        size, rest = divmod(len(calls), len(self.visits))
        if rest:
            what = f"{len(self.visits)} runs of the layer, as configured"
            raise TraceError(expected(what, f"{len(calls)} calls"))
        return [calls[first : first + size] for first in range(0, len(calls), size)]

    def _reading(self, calls: Sequence[Mapping[str, Any]], tokens: int) -> Reading:
        """What the calls of one visit say."""
        reading = joined([self.read_call(call) for call in calls])
        if len(reading.indices) != tokens:
            hint = "text inputs alone, or documents of one stack"
            if len(calls) > 1:
                hint = "a reader that takes one of its calls"
            got = f"{len(reading.indices)} in {len(calls)} calls"
            raise TraceError(expected(f"one decision for each of {tokens} tokens", got, hint))
        self._settle(reading)
        return reading

    def read_call(self, call: Mapping[str, Any]) -> Reading:
        """The ``Reading`` of one call."""
        return as_reading(self.read(call["module"], call), self.num_choices, self.top_k)

    def _settle(self, reading: Reading) -> None:
        """Compare a reading with the configured sizes; take what the configuration did not have."""
        width, slots = reading.num_choices, reading.indices.shape[1]
        if self.num_experts is None:
            if width is None:
                what = "the number of experts from the configuration or from logits"
                raise TraceError(expected(what, "neither"))
            self.num_experts = width - self.num_zero_experts
        require(
            width in (None, self.num_choices),
            f"logits of {self.num_choices} experts as configured",
            width,
            error=TraceError,
        )
        require(
            slots <= (self.top_k or slots),
            f"at most top_k = {self.top_k} slots as configured",
            slots,
            error=TraceError,
        )
        self._infer_score_func(reading)

    def _infer_score_func(self, reading: Reading) -> None:
        if self.score_func is not None or reading.scores is not None:
            return
        if reading.logits is None or reading.weights is None:
            return
        logits = reading.logits.float()
        if not are_probabilities(logits) and int(reading.indices.max()) < logits.shape[1]:
            fitting = infer_score_func(logits, reading.weights.float(), reading.indices)
            self.score_func = fitting or ScoreFunc.SOFTMAX


Visit: TypeAlias = tuple[TracedRouter, int, int]
"""One run of a layer: its router, which of its runs it is (from 0), its number in the trace."""
