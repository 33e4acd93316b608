"""The shapes a frontier loss(ratio) can have, fitted to many draws at once.

Each form is linear in its coefficients once one or two shape parameters are fixed, so a fit is a
search over a fixed grid of shapes with the coefficients solved in closed form (variable
projection). The designs depend on the ratios alone: one matrix product fits every draw of a
simulation.

    line        c - s x                       x = log2 ratio
    power       c + a r^-b                    saturating power law
    saturation  c - s log2 Ehat(r; Emax)      1/Ehat = 1/(r - 1 + (1/Estart - 1/Emax)^-1) + 1/Emax,
    Estart 2 (2202.01169 eq. 5)
    hinge       c - s x - u max(0, x - t)     another slope beyond a break t
    plateau     c - s min(x, t)               nothing beyond a break t
    fade        c - s x - u w ln(1 + e^((x - t)/w)), w >= .75: a hinge that bends over doublings
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Estart of every published fit but one lies at 1.7-2.1 (Clark S-BASE and RL-R, Ludziejewski): one
# size's ratios cannot find it
START = 2.0
BEYOND_GRID = (
    12.0  # doublings past the last ratio searched for Emax: further is a straight line on the grid
)


def effective_ratio(ratio: np.ndarray, start: np.ndarray, maximum: np.ndarray) -> np.ndarray:
    """Clark's saturated number of experts Ehat (2202.01169 eq. 5): ``start`` at ratio 1,
    ``maximum`` at infinity.
    """
    return 1 / (1 / (ratio - 1 + 1 / (1 / start - 1 / maximum)) + 1 / maximum)


@dataclass(frozen=True)
class Form:
    """One shape that the frontier can have. ``shapes(x [R]) -> [P, q]`` candidate shapes;
    ``columns(x [R], shapes [P, q]) -> [P, p, R]`` falls or rises with x.

    ``parameters`` counts coefficients and shapes. ``breaks(shapes) -> [P]`` is log2 of the ratio
    where the form bends, None if nowhere.
    """

    name: str
    parameters: int
    shapes: Callable[[np.ndarray], np.ndarray]
    columns: Callable[[np.ndarray, np.ndarray], np.ndarray]
    breaks: Callable[[np.ndarray], np.ndarray] | None = None


def _no_shape(x: np.ndarray) -> np.ndarray:
    return np.zeros((1, 0))


def _exponents(x: np.ndarray) -> np.ndarray:
    return np.geomspace(0.01, 8, 320)[:, None]


def _maxima(x: np.ndarray) -> np.ndarray:
    return np.linspace(np.log2(START) + 1, x[-1] + BEYOND_GRID, 400)[:, None]


def _inner_breaks(x: np.ndarray) -> np.ndarray:
    """Breaks with two ratios on either side, else one of the two slopes is a single difference."""
    return np.linspace(x[1], x[-2], 256)[:, None]


def _plateau_breaks(x: np.ndarray) -> np.ndarray:
    return np.linspace(x[0], x[-1], 257)[1:-1, None]


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("line", 2, _no_shape, lambda x, s: np.broadcast_to(x, (len(s), 1, len(x)))),
        Form("power", 3, _exponents, lambda x, s: (-(2.0 ** (-s * x)))[:, None]),
        Form(
            "saturation",
            3,
            _maxima,
            lambda x, s: np.log2(effective_ratio(2.0**x, np.array(START), 2.0**s))[:, None],
            lambda s: s[:, 0],
        ),
        Form(
            "hinge",
            4,
            _inner_breaks,
            lambda x, s: np.stack([np.broadcast_to(x, (len(s), len(x))), np.maximum(0, x - s)], 1),
            lambda s: s[:, 0],
        ),
        Form(
            "plateau", 3, _plateau_breaks, lambda x, s: np.minimum(x, s)[:, None], lambda s: s[:, 0]
        ),
    )
}
SMOOTH = ("line", "power")  # M0 and M1: what a wall has to beat
FADE_WIDTHS = np.array(
    [0.75, 1.0, 1.5, 2.5]
)  # doublings: the gain goes from 88 % to 12 % of itself over four of these


def _fades(x: np.ndarray) -> np.ndarray:
    at = np.linspace(x[0] - 2, x[-1] + 4, 129)
    return np.stack([grid.ravel() for grid in np.meshgrid(at, FADE_WIDTHS, indexing="ij")], 1)


def _fade_columns(x: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    at, width = shapes[:, :1], shapes[:, 1:]
    return np.stack(
        [np.broadcast_to(x, (len(shapes), len(x))), width * np.logaddexp(0, (x - at) / width)], 1
    )


FADE = Form("fade", 5, _fades, _fade_columns)
"""A hinge whose bend takes three doublings or more: diminishing returns (Clark's saturation,
Ludziejewski's law at few tokens). No candidate form, but what a break has to beat to be a break.
"""


@dataclass(frozen=True)
class FormFit:
    """One form fitted to B draws of R means: ``rss`` [B] (weighted, nats^2), ``shape`` [B, q],
    ``coefficients`` [B, p] of the columns, ``fitted`` [B, R], and for forms with a break its
    profile: ``breaks`` [G] (log2 ratio) and ``profile`` [B, G] (best rss there).
    """

    form: Form
    rss: np.ndarray
    shape: np.ndarray
    coefficients: np.ndarray
    fitted: np.ndarray
    breaks: np.ndarray | None = None
    profile: np.ndarray | None = None


def fit_form(
    form: Form,
    x: np.ndarray,
    means: np.ndarray,
    counts: np.ndarray,
    shapes: np.ndarray | None = None,
) -> FormFit:
    """Weighted least squares of ``means`` [B, R] at ``x`` [R] (log2 ratio, ascending) with
    ``counts`` [R] runs behind each mean; ``shapes`` [P, q] in place of the form's own at ``x``.
    """
    shapes = form.shapes(x) if shapes is None else shapes
    columns = form.columns(x, shapes)
    weights, root = counts / counts.sum(), np.sqrt(counts)
    design = (columns - (columns @ weights)[..., None]) * root
    level = means @ weights
    target = (means - level[:, None]) * root
    basis = _orthonormal(design)
    explained = (
        (target @ basis.reshape(-1, len(x)).T).reshape(len(means), *basis.shape[:2]) ** 2
    ).sum(-1)
    rss = np.maximum((target**2).sum(-1)[:, None] - explained, 0)
    best = rss.argmin(1)
    chosen = design[best]
    coefficients = np.einsum("brp,br->bp", np.linalg.pinv(chosen), target)
    fitted = level[:, None] + np.einsum("bp,bpr->br", coefficients, chosen) / root
    breaks, profile = (None, None) if form.breaks is None else _profile(form.breaks(shapes), rss)
    return FormFit(
        form, rss[np.arange(len(rss)), best], shapes[best], coefficients, fitted, breaks, profile
    )


def curve(
    fit: FormFit, x: np.ndarray, means: np.ndarray, counts: np.ndarray, at: np.ndarray
) -> np.ndarray:
    """[B, A]: a form fitted to ``means`` [B, R] at ``x``, drawn at other log2 ratios ``at`` [A]."""
    weights = counts / counts.sum()
    inside = fit.form.columns(x, fit.shape) @ weights
    return (means @ weights)[:, None] + np.einsum(
        "bp,bpr->br", fit.coefficients, fit.form.columns(at, fit.shape) - inside[..., None]
    )


def _orthonormal(design: np.ndarray) -> np.ndarray:
    """Orthonormal rows spanning ``design`` [P, p, R] with p of 1 or 2; a column without variation
    counts for nothing.
    """
    basis = np.zeros_like(design)
    for column in range(design.shape[1]):
        rest = design[:, column]
        for earlier in range(column):
            rest = rest - (rest * basis[:, earlier]).sum(-1, keepdims=True) * basis[:, earlier]
        norm = np.linalg.norm(rest, axis=-1, keepdims=True)
        scale = np.linalg.norm(design[:, column], axis=-1, keepdims=True)
        basis[:, column] = np.where(norm > 1e-9 * (1 + scale), rest / np.maximum(norm, 1e-300), 0)
    return basis


def _profile(breaks: np.ndarray, rss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best rss [B, G] at each distinct break [G]."""
    order = np.argsort(breaks, kind="stable")
    values, first = np.unique(breaks[order], return_index=True)
    return values, np.minimum.reduceat(rss[:, order], first, axis=1)
