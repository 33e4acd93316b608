"""Scaling laws: a formula with published coefficients, the range it was fitted on, derivatives, and
the worth of a change in compute.

A law is a sum of terms, each an amplitude times the exponential of a linear combination of products
of log variables; that table is all a law is, and `fit` reads the same table. Letters in a table are
natural logarithms:

    n active_params N    t total_params    d tokens D    x ratio E/k    g granularity G    c
    training compute C (FLOPs)
    e the effective (saturated) number of experts or activation, made from the ratio and the law's
    two shape coefficients

Losses are nats per token. Formulas are analytic, so a complex step gives derivatives to machine
precision.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from scipy.optimize import brentq

from moe_lab.errors import AnalysisError, expected, require
from moe_lab.scaling.frontier_forms import effective_ratio

Values = Mapping[str, Any]
LETTERS = {
    "n": "active_params",
    "t": "total_params",
    "d": "tokens",
    "x": "ratio",
    "g": "granularity",
    "c": "compute",
}
LN2, LN10 = math.log(2), math.log(10)


class Base(StrEnum):
    """The form in which an amplitude's coefficient is written: as itself, as its logarithm, or as
    1.
    """

    VALUE = "value"
    LN = "ln"
    LOG10 = "log10"
    ONE = "one"


LOG_AMPLITUDE: dict[Base, Callable[[Any], Any]] = {
    Base.VALUE: np.log,
    Base.LN: lambda value: value,
    Base.LOG10: lambda value: value * LN10,
    Base.ONE: lambda value: 0.0,
}


@dataclass(frozen=True)
class Term:
    """``amplitude * exp(sum of exponent * scale * product of letters)``: ``exponents`` maps a
    coefficient to (letters, scale).
    """

    amplitude: str
    exponents: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    base: Base = Base.VALUE


def clark_experts(variables: Values, start: Any, maximum: Any) -> Any:
    """ln Ehat (2202.01169 eq. 5)."""
    return np.log(effective_ratio(variables["ratio"], start, maximum))


def ling_activation(variables: Values, start: Any, maximum: Any) -> Any:
    """ln Ahat (2507.17702 eq. 8) of the activation ratio A = 1/ratio."""
    return np.log(1 / (1 / (1 / variables["ratio"] + 1 / (1 / start - 1 / maximum)) + 1 / maximum))


@dataclass(frozen=True)
class Law:
    """A scaling law. ``published`` maps a name (router, arm) to coefficients, the first being the
    default; ``limits`` maps a variable to the range of the runs behind them; ``shape`` names the
    two coefficients of ``effective``; ``output`` is "loss" or "leverage" (a compute multiplier);
    ``formula`` replaces ``terms`` where a law is no sum of terms.
    """

    name: str
    title: str
    source: str
    terms: tuple[Term, ...] = ()
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    shape: tuple[str, ...] = ()
    effective: Callable[[Values, Any, Any], Any] | None = None
    output: str = "loss"
    formula: Callable[[Values, Values], Any] | None = None
    caution: str = ""

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables it needs."""
        letters = {
            letter
            for term in self.terms
            for product, _ in term.exponents.values()
            for letter in product
        }
        return tuple(
            LETTERS[letter]
            for letter in LETTERS
            if letter in letters or (letter == "x" and ("e" in letters or self.formula))
        )

    def coefficients(self, which: Values | str | None = None) -> Values:
        """A mapping as it is, a published set by name, or the first published set."""
        if which is None or isinstance(which, str):
            names = list(self.published)
            if not names or (which is not None and which not in names):
                raise AnalysisError(
                    expected(
                        f"published coefficients of {self.name} ({', '.join(names) or 'none'})",
                        which,
                        "your own fit",
                    ),
                    field="name",
                )
            return self.published[which or names[0]]
        return which

    def predict(self, point: Values, coefficients: Values | str | None = None) -> Any:
        """Loss in nats/token (or a compute multiplier) at ``point``: variable -> number or array;
        they broadcast.
        """
        chosen = self.coefficients(coefficients)
        if self.formula is not None:
            return self.formula(chosen, point)
        logs = self.logs(point, *(chosen[name] for name in self.shape))
        total: Any = 0.0
        for term in self.terms:
            power = LOG_AMPLITUDE[term.base](chosen.get(term.amplitude))
            for name, (letters, scale) in term.exponents.items():
                power = power + chosen[name] * scale * product(logs, letters)
            total = total + np.exp(power)
        return total

    def logs(self, point: Values, *shape: Any) -> dict[str, Any]:
        """Letter -> natural logarithm of its variable."""
        needed = self.variables
        missing = [name for name in needed if name not in point]
        require(
            not missing,
            f"{', '.join(needed)} for the law {self.name}",
            f"no {', '.join(missing)}",
            error=AnalysisError,
            field=missing[0] if missing else "",
        )
        logs = {letter: np.log(point[name]) for letter, name in LETTERS.items() if name in needed}
        if self.effective is not None:
            logs["e"] = self.effective(point, *shape)
        return logs

    def derivative(
        self, variable: str, point: Values, coefficients: Values | str | None = None
    ) -> Any:
        """d output / d ln ``variable``, by a complex step."""
        step = 1e-30
        moved = {**point, variable: np.asarray(point[variable]) * np.exp(1j * step)}
        return self.predict(moved, coefficients).imag / step

    def compute_equivalent(
        self, start: Values, end: Values, coefficients: Values | str | None = None
    ) -> float:
        """The compute multiplier that takes ``start`` to the loss of ``end`` at the ratio of
        ``start`` (inf where none does).

        Active parameters and tokens grow as C^1/2 each where the law has both, else the one it has
        takes all of C (for Clark's fixed-token law the answer is therefore a multiplier of
        parameters). A leverage law answers with a quotient.
        """
        if self.output == "leverage":
            return float(self.predict(end, coefficients) / self.predict(start, coefficients))
        grows = [
            name for name in ("active_params", "total_params", "tokens") if name in self.variables
        ]
        require(
            grows,
            "a law of parameters or tokens",
            f"{self.name}, a law of the ratio alone",
            error=AnalysisError,
            field="law",
        )
        target = float(self.predict(end, coefficients))

        def gap(log_multiplier: float) -> float:
            factor = math.exp(log_multiplier / len(grows))
            return (
                float(
                    self.predict(
                        {**start, **{name: start[name] * factor for name in grows}}, coefficients
                    )
                )
                - target
            )

        low, high = -40.0, 40.0
        if gap(low) * gap(high) > 0:
            return math.inf if gap(high) > 0 else 0.0
        return math.exp(float(brentq(gap, low, high, xtol=1e-12)))  # type: ignore[arg-type]

    def outside(self, point: Values) -> list[str]:
        """One phrase for each variable of ``point`` that leaves the range the law was fitted on."""
        phrases = []
        for variable, (low, high) in self.limits.items():
            value = np.asarray(point.get(variable, low), dtype=float)
            if value.min() < low * (1 - 1e-9) or value.max() > high * (1 + 1e-9):
                phrases.append(f"{variable} {low:.3g} to {high:.3g}")
        return phrases


def product(logs: Values, letters: str) -> Any:
    value: Any = 1.0
    for letter in letters:
        value = value * logs[letter]
    return value
