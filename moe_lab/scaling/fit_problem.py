"""A law and its data as a function of a parameter vector: residuals of log loss, their gradient,
and good places to start.

The unknowns theta are the logarithms of the amplitudes, the exponents, and the logarithms of the
two shape coefficients (Estart, Emax). In them every law of `LAWS` with terms is ``ln L =
logsumexp(features @ theta)``, so residuals and their Jacobian are exact and one pass serves every
start and every bootstrap draw together.
"""

from dataclasses import dataclass

import numpy as np

from moe_lab.scaling.law import LN10, LOG_AMPLITUDE, Base, Law, Values, product

CLIP = 60.0  # bound on the logarithm of a shape coefficient: exp(60) experts is "no saturation"


@dataclass(frozen=True)
class Problem:
    """The data and the law of a fit. ``target`` (ln loss, or the loss itself where ``log`` is
    False) and ``weights``: one row [1, n] shared by all draws or one row per draw [B, n]; ``delta``
    of Huber's loss (inf: squares); ``names`` of the unknowns in order.
    """

    law: Law
    point: Values
    target: np.ndarray
    weights: np.ndarray
    delta: float
    names: tuple[str, ...]
    log: bool = True

    def rows(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows of a per-draw array [B, n], or the one row all draws share."""
        return array[rows] if len(array) > 1 else array

    def objective(self, theta: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of weighted Huber losses [b] and its gradient [b, p].

        Points with an impossible shape are worth inf.
        """
        value, gradient, _ = self._evaluate(theta, rows, curvature=False)
        return value, gradient

    def curved(
        self, theta: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value [b], gradient [b, p] and Gauss-Newton Hessian [b, p, p], residuals beyond ``delta``
        weighted down as Huber's loss does.
        """
        return self._evaluate(theta, rows, curvature=True)

    def _evaluate(
        self, theta: np.ndarray, rows: np.ndarray, *, curvature: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            predicted, jacobian = self.response(theta)
            residual = predicted - self.rows(self.target, rows)
            weights = self.rows(self.weights, rows)
            size = np.abs(residual)
            loss = np.where(
                size <= self.delta,
                0.5 * residual**2,
                self.delta * (size - 0.5 * min(self.delta, 1e300)),
            )
            value = (weights * loss).sum(1)
            gradient = ((weights * np.clip(residual, -self.delta, self.delta))[:, None] @ jacobian)[
                :, 0
            ]
            hessian = np.zeros(0)
            if curvature:
                relative = weights * np.minimum(1, self.delta / np.maximum(size, 1e-300))
                hessian = (jacobian * relative[:, :, None]).transpose(0, 2, 1) @ jacobian
                hessian = np.where(np.isfinite(hessian), hessian, 0.0)
        bad = ~np.isfinite(value) | ~np.isfinite(gradient).all(1)
        value[bad], gradient[bad] = np.inf, 0.0
        return value, gradient, hessian

    def response(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values that ``target`` is compared with, [b, n], and their Jacobian [b, n, p]."""
        predicted, jacobian = self.model(theta)
        if self.log:
            return predicted, jacobian
        loss = np.exp(predicted)
        return loss, jacobian * loss[:, :, None]

    def model(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predicted ln loss [b, n] and its Jacobian [b, n, p]."""
        logs, shape_slopes = self._logs(theta)
        count, size = len(theta), self.target.shape[-1]
        exponent = np.zeros((len(self.law.terms), count, size))
        slopes: list[dict[str, np.ndarray]] = []
        bend = np.zeros_like(exponent)  # d exponent / d e
        for index, term in enumerate(self.law.terms):
            slope: dict[str, np.ndarray] = {}
            if term.base is not Base.ONE:
                exponent[index] += theta[:, [self.names.index(term.amplitude)]]
                slope[term.amplitude] = np.ones((1, 1))
            for name, (letters, scale) in term.exponents.items():
                column = theta[:, [self.names.index(name)]]
                slope[name] = scale * product(logs, letters)
                exponent[index] += column * slope[name]
                if "e" in letters:
                    bend[index] += column * scale * product(logs, letters.replace("e", "", 1))
            slopes.append(slope)
        peak = exponent.max(0)
        share = np.exp(exponent - peak)
        total = share.sum(0)
        share /= total
        jacobian = np.zeros((count, size, len(self.names)))
        for index, slope in enumerate(slopes):
            for name, value in slope.items():
                jacobian[:, :, self.names.index(name)] += share[index] * value
        for name, value in shape_slopes.items():
            jacobian[:, :, self.names.index(name)] = (share * bend).sum(0) * value
        return peak + np.log(total), jacobian

    def _logs(self, theta: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Letters [1 or b, n], and for each shape coefficient d e / d ln shape [b, n] by a complex
        step.
        """
        if not self.law.shape or self.law.effective is None:
            return {letter: value[None] for letter, value in self.law.logs(self.point).items()}, {}
        shape = {
            name: np.exp(np.clip(theta[:, [self.names.index(name)]], -CLIP, CLIP))
            for name in self.law.shape
        }
        point = {name: np.asarray(value)[None] for name, value in self.point.items()}
        logs = self.law.logs(point, *shape.values())
        step = 1e-30
        slopes = {}
        for name in self.law.shape:
            moved = [
                value * np.exp(1j * step) if other == name else value
                for other, value in shape.items()
            ]
            slopes[name] = self.law.effective(point, *moved).imag / step
        return logs, slopes


def unknowns(law: Law) -> tuple[str, ...]:
    """Names of theta: amplitudes, exponents, shape coefficients, each once."""
    amplitudes = [term.amplitude for term in law.terms if term.base is not Base.ONE]
    exponents = [name for term in law.terms for name in term.exponents]
    return tuple(dict.fromkeys([*amplitudes, *exponents, *law.shape]))


def to_theta(law: Law, coefficients: Values) -> np.ndarray:
    """[p], the inverse of `to_coefficients`."""
    bases = {term.amplitude: term.base for term in law.terms if term.base is not Base.ONE}
    bases |= dict.fromkeys(law.shape, Base.VALUE)
    return np.array(
        [LOG_AMPLITUDE[bases.get(name, Base.LN)](coefficients[name]) for name in unknowns(law)],
        dtype=float,
    )


_FROM_THETA = {
    Base.VALUE: lambda t: np.exp(np.clip(t, -700, 700)),
    Base.LN: lambda t: t,
    Base.LOG10: lambda t: t / LN10,
}


def to_coefficients(law: Law, theta: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficient -> [...], from theta [..., p].

    A shape coefficient that ran off to infinity is reported as exp(60).
    """
    bases = {term.amplitude: term.base for term in law.terms if term.base is not Base.ONE}
    coefficients = {
        name: _FROM_THETA[bases.get(name, Base.LN)](theta[..., i])
        for i, name in enumerate(unknowns(law))
    }
    return coefficients | {
        name: np.exp(np.clip(coefficients[name], -CLIP, CLIP)) for name in law.shape
    }
