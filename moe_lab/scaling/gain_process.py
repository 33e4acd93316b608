"""The probability that the last doubling pays: the gain per doubling as a Gaussian process.

    loss(x) = c - s0 x - integral of g,   g ~ Matern-3/2 over x = log2 ratio, flat c and s0

with the process's size (multiples of the margin) and length (doublings) averaged over a grid and
the noise over a lattice weighted by the residual sum of squares. Everything is closed form
(universal kriging). Unlike an average over line, hinge and plateau it does not say that returns are
gone where they resume after a plateau; unlike the last difference alone it uses the ratios before.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import logsumexp, ndtr

from moe_lab.scaling.two_way import Estimate

SIZES = (0.1, 0.3, 1.0, 2.0, 4.0)
"""Standard deviations of the gain per doubling, in margins."""
LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Doublings."""
LATTICE = 1.3
NOISE_RANGE = (0.45, 2.4)
"""Factor between noises of the lattice, and how far it reaches around the estimates."""
STEP = 1 / 16


@dataclass(frozen=True)
class Posterior:
    """The posterior of one contrast of the noiseless losses, [B] each: ``mean`` and
    ``sd`` (nats), and the probability ``above`` a threshold. NaN, and 0, where the noise is
    unknown.
    """

    mean: np.ndarray
    sd: np.ndarray
    above: np.ndarray


def posterior(
    x: np.ndarray,
    found: Estimate,
    contrast: np.ndarray,
    threshold: float,
    margin: float,
    threshold_error: float = 0.0,
) -> Posterior:
    """The posterior of ``contrast`` [R] given the losses at ``x`` [R], such as the gain of the last
    doubling.

    ``threshold`` (nats) has a standard error of its own; ``margin`` scales the process.
    """
    sd = found.sd
    result = np.stack([np.full(len(sd), np.nan), np.full(len(sd), np.nan), np.zeros(len(sd))])
    usable = np.isfinite(sd) & (sd > 0)
    for number in np.unique(found.group[usable]).tolist():
        rows = usable & (found.group == number)
        result[:, rows] = _posterior(
            x,
            found.rows(rows),
            found.spread[number],
            contrast,
            threshold,
            margin,
            threshold_error,
        )
    return Posterior(*result)


def _posterior(
    x: np.ndarray,
    found: Estimate,
    spread: np.ndarray,
    contrast: np.ndarray,
    threshold: float,
    margin: float,
    threshold_error: float,
) -> np.ndarray:
    """[3, B]: mean, standard deviation, probability above the threshold.

    In ``basis`` the noise is the unit matrix and the process of one length diagonal, ``power``: one
    decomposition per length serves every size and noise.
    """
    noises = _noises(found)
    sizes = (margin * np.array(SIZES)) ** 2
    size, noise = (index.ravel() for index in np.indices((len(sizes), len(noises))))
    flat = np.stack([np.ones(len(x)), x], 1)
    centred = found.means - found.means.mean(1, keepdims=True)
    root = np.linalg.cholesky(spread)
    parts = []
    for length in LENGTHS:
        half = np.linalg.solve(root, _integrated(tuple(x.tolist()), length))
        power, axes = np.linalg.eigh(np.linalg.solve(root, half.T))
        basis = np.linalg.solve(root.T, axes)
        signal = sizes[size, None] * np.maximum(power, 0)  # [H, R], as are ``inverse``, ``cross``
        inverse = 1 / (signal + noises[noise, None] ** 2)
        rotated, flat_there, means = axes.T @ (root.T @ contrast), basis.T @ flat, centred @ basis
        cross = signal * rotated
        weighted = inverse[..., None] * flat_there
        fixed = weighted.transpose(0, 2, 1) @ flat_there
        rest = flat.T @ contrast - np.einsum("hrk,hr->hk", weighted, cross)
        solved = np.linalg.solve(fixed, rest[..., None])[..., 0]
        kriging = inverse * cross + np.einsum("hrk,hk->hr", weighted, solved)
        variance = cross @ rotated - (inverse * cross**2).sum(1) + (rest * solved).sum(1)
        level = means @ weighted  # [H, B, 2]
        lost = (level @ np.linalg.inv(fixed) * level).sum(-1)
        fit = inverse @ (means**2).T - lost
        logdet = np.log(inverse).sum(1) - np.linalg.slogdet(fixed)[1]
        logs = _noise_likelihood(found, noises)[noise] + 0.5 * logdet[:, None] - 0.5 * fit
        parts.append((kriging @ means.T, np.maximum(variance, 1e-300)[:, None], logs))
    gain, variance, logs = (np.concatenate(part) for part in zip(*parts, strict=True))
    weights = np.exp(logs - logsumexp(logs, axis=0))
    mean = (weights * gain).sum(0)
    spread_out = (weights * (variance + (gain - mean) ** 2)).sum(0)
    above = ndtr((gain - threshold) / np.sqrt(variance + threshold_error**2))
    return np.stack([mean, np.sqrt(spread_out), (weights * above).sum(0)])


def _noises(found: Estimate) -> np.ndarray:
    """The lattice of noises (nats) that covers the estimates of all draws; one if it is known."""
    if found.known is not None:
        return np.array([found.known])
    low, high = found.sd.min() * NOISE_RANGE[0], found.sd.max() * NOISE_RANGE[1]
    step = np.log(LATTICE)
    return np.exp(step * np.arange(np.floor(np.log(low) / step), np.ceil(np.log(high) / step) + 1))


def _noise_likelihood(found: Estimate, noises: np.ndarray) -> np.ndarray:
    """[N, B] log likelihood of the residual sums of squares, under a prior flat in ln(noise)."""
    if found.known is not None:
        return np.zeros((1, len(found.within)))
    column = noises[:, None]
    return -found.df * np.log(column) - found.within / (2 * column**2)


@lru_cache(maxsize=512)
def _integrated(x: tuple[float, ...], length: float) -> np.ndarray:
    """[R, R] covariance of the integral of a unit Matern-3/2 process from the first ratio on."""
    points = np.array(x)
    fine = np.linspace(x[0], x[-1], max(2, round((x[-1] - x[0]) / STEP)) + 1)
    middle, width = (fine[1:] + fine[:-1]) / 2, np.diff(fine)
    # the share of each small interval that lies before a ratio
    share = np.clip((points[:, None] - fine[:-1]) / width, 0, 1) * width
    apart = np.sqrt(3) * np.abs(middle[:, None] - middle) / length
    return share @ ((1 + apart) * np.exp(-apart)) @ share.T
