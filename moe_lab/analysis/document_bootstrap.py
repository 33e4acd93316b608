"""The document bootstrap: every interval of an analysis resamples documents, never tokens.

Tokens of one document are not independent, so the document is the unit that is drawn. A statistic
is a function of per-document sums: one sample is a row of integer weights (how often each document
was drawn) times the table of sums, and no token is touched twice. Percentile intervals of few
documents are too narrow, so the tails are widened as Student's t is wider than the normal
("expanded percentile", Hesterberg 2015, arXiv 1411.5279, section 4.3): at five documents the
coverage of a nominal 95 % interval rises from .83 to .91. Below ``MIN_DOCUMENTS`` documents there
is no interval.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

from moe_lab.config import require

Floats = NDArray[np.float64]
MIN_DOCUMENTS = 5
RESAMPLES = 400
BLOCK_CELLS = 2**23


@dataclass(frozen=True)
class Resampling:
    """The settings of an interval: ``resamples`` draws of documents and an interval of ``level``.

    The same ``seed`` gives the same draws.
    """

    resamples: int = RESAMPLES
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        require(0 < self.level < 1, "a level between 0 and 1", self.level, field="level")
        require(self.resamples >= 1, "at least 1 resample", self.resamples)

    def interval(
        self,
        statistic: Callable[[Floats], Floats],
        documents: int,
        contributing: ArrayLike | None = None,
    ) -> tuple[Floats, Floats]:
        """Lower and upper ends [...] of the interval of a statistic.

        Args:
            statistic: weights [B, documents] -> values [B, ...], NaN where a sample does not define
                one (left out of the percentiles).
            documents: how many documents are drawn from.
            contributing: [...] documents that each value rests on, where those are fewer.

        Both ends are NaN where a value rests on fewer than ``MIN_DOCUMENTS`` documents.
        """
        if documents < MIN_DOCUMENTS:
            missing = np.full(statistic(np.ones((1, documents))).shape[1:], np.nan)
            return missing, missing
        samples = np.concatenate([statistic(weights) for weights in self.blocks(documents)])
        return expanded_interval(
            samples, self.level, documents if contributing is None else contributing
        )

    def blocks(self, documents: int) -> Iterable[Floats]:
        """``document_weights``; one block is drawn once for all layers."""
        if self.is_one_block(documents):
            return [_only_block(documents, self.resamples, self.seed)]
        return document_weights(documents, self.resamples, self.seed)

    def is_one_block(self, documents: int) -> bool:
        """Whether the weights of all draws are held at once."""
        return documents * self.resamples <= BLOCK_CELLS


def document_weights(documents: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks [B, documents] of draw counts, ``resamples`` rows in all; the same for the same
    arguments.
    """
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_CELLS // max(documents, 1))
    for start in range(0, resamples, block):
        yield generator.multinomial(
            documents, np.full(documents, 1 / documents), size=min(block, resamples - start)
        ).astype(np.float64)


@functools.lru_cache(maxsize=1)
def _only_block(documents: int, resamples: int, seed: int) -> Floats:
    """The one block of ``document_weights``, drawn once for all layers."""
    (weights,) = document_weights(documents, resamples, seed)
    weights.flags.writeable = False
    return weights


def expanded_interval(samples: Floats, level: float, documents: ArrayLike) -> tuple[Floats, Floats]:
    """``expanded_quantiles``, NaN where a value rests on fewer than ``MIN_DOCUMENTS`` documents."""
    few = np.asarray(documents) < MIN_DOCUMENTS
    low, high = expanded_quantiles(samples, level, np.maximum(documents, 2))
    return np.where(few, np.nan, low), np.where(few, np.nan, high)


def expanded_quantiles(
    samples: Floats, level: float, documents: ArrayLike
) -> tuple[Floats, Floats]:
    """Both ends [...] of the percentile interval of samples [B, ...] at the tails of Student's t.

    Args:
        samples: NaN where a sample defines no value; those are left out.
        documents: [...] (or one number) documents n, above 1; t has n - 1 degrees of freedom.
    """
    number = np.asarray(documents, dtype=np.float64)
    tail = ndtr(-stdtrit(number - 1, (1 + level) / 2) * np.sqrt(number / (number - 1)))
    ordered = np.sort(samples, axis=0)  # NaN comes last
    last = np.maximum((~np.isnan(ordered)).sum(axis=0) - 1, 0)

    def at(place: Floats) -> Floats:
        below = np.floor(place).astype(np.int64)
        first, second = (
            np.take_along_axis(ordered, row[None], axis=0)[0]
            for row in (below, np.minimum(below + 1, last))
        )
        return first + (place - below) * (second - first)

    return at(tail * last), at((1 - tail) * last)
