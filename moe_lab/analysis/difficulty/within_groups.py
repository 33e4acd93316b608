"""``Within``: what is left of a row of numbers when the mean of each token id (or of any group) is
taken out.

With one grouping that is one subtraction. With two, such as the id that goes in and the id that is
to come out, the additive model ``y = a[first] + b[second] + residual`` is fitted by least squares:
conjugate gradients on the groups, not on the tokens. A router that looks up either id, whatever the
table, leaves a residual without any trace of the ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_array

from moe_lab.analysis.aligned_rows import chunks
from moe_lab.analysis.document_bootstrap import Floats

Ints = NDArray[np.int64]
TOLERANCE = 1e-10
MAX_STEPS = 2000
MIN_FREEDOM = 0.25
LARGEST_TABLE = 2**22


@dataclass(frozen=True, eq=False)
class Within:
    """One or two groupings of the same n tokens, as codes from 0."""

    codes: tuple[Ints, ...]

    @cached_property
    def counts(self) -> tuple[Floats, ...]:
        """Tokens of each group, for each grouping."""
        return tuple(np.bincount(code).astype(np.float64) for code in self.codes)

    @cached_property
    def alone(self) -> NDArray[np.bool_]:
        """[n] tokens that are the only one of their group in some grouping: they have nothing to be
        compared with.
        """
        alone = np.zeros(len(self.codes[0]), dtype=bool)
        for code, count in zip(self.codes, self.counts, strict=True):
            alone |= count[code] <= 1
        return alone

    @cached_property
    def inflation(self) -> Floats:
        """[n] ``1 / sqrt(1 - leverage)``: what a product of two residuals is scaled by where its
        spread over documents is judged.

        A residual is pulled towards 0 by its own share in the mean, and residuals of one group are
        tied to each other: in a group of n tokens from n documents the sum of products has a
        variance n / (n - 1) times that of n independent terms (the HC2 argument of MacKinnon and
        White 1985). Leverages of two groupings are added, and capped.
        """
        leverage = np.zeros(len(self.codes[0]))
        for code, count in zip(self.codes, self.counts, strict=True):
            leverage += (1 / np.maximum(count, 1))[code]
        return 1 / np.sqrt(np.maximum(1 - leverage, MIN_FREEDOM))

    def residual(self, values: Floats) -> Floats:
        """[n] values less what the groups explain; 0 where a token is alone in its group."""
        sums = [_sums(*of, values) for of in zip(self.codes, self.counts, strict=True)]
        return self._less(values, self.effects(sums))

    def effects(self, sums: Sequence[Floats]) -> list[Floats]:
        """Effects of the groups of each grouping on values of which ``sums`` are the sums over each
        group.
        """
        count = np.maximum(self.counts[0], 1)
        if len(self.codes) == 1:
            return [sums[0] / count]
        second = self._second_effects(*sums)
        return [(sums[0] - self._pairs @ second) / count, second]

    def beside(self, code: Ints) -> "Beside":
        """What is left where ``code`` [n] explains too."""
        count = np.bincount(code).astype(np.float64)
        return Beside(self, code, count, [crosstab(code, own) for own in self.codes])

    def sums_of(self, effects: Sequence[Floats]) -> list[Floats]:
        """Sums over each group of [n] values that are the effects of their groups alone."""
        sums = [count * own for count, own in zip(self.counts, effects, strict=True)]
        if len(effects) == 2:
            sums[0] += self._pairs @ effects[1]
            sums[1] += self._pairs_transposed @ effects[0]
        return sums

    def _less(self, values: Floats, effects: Sequence[Floats]) -> Floats:
        left = values
        for own, code in zip(effects, self.codes, strict=True):
            left = less(left, own, code, out=None if left is values else left)
        left[self.alone] = 0
        return left

    @cached_property
    def _pairs(self) -> csr_array:
        """[first groups, second groups] how many tokens are in both."""
        return crosstab(*self.codes)

    @cached_property
    def _pairs_transposed(self) -> csr_array:
        return self._pairs.T.tocsr()

    def _second_effects(self, first: Floats, second: Floats) -> Floats:
        """Effects of the second grouping, from the sums s1 and s2 over groups: ``(D2 - N' D1^-1 N)
        b = s2 - N' D1^-1 s1`` by conjugate gradients, preconditioned by D2.
        """
        inverse = 1 / np.maximum(self.counts[0], 1)
        weight = np.maximum(self.counts[1], 1)
        pairs, transposed = self._pairs, self._pairs_transposed

        def apply(effects: Floats) -> Floats:
            return self.counts[1] * effects - transposed @ (inverse * (pairs @ effects))

        rest = second - transposed @ (inverse * first)
        effects, step = np.zeros_like(rest), rest / weight
        power = rest @ step
        enough = TOLERANCE**2 * max(float(second @ (second / weight)), np.finfo(float).tiny)
        for _ in range(MAX_STEPS):
            if power <= enough:
                break
            pushed = apply(step)
            curvature = step @ pushed
            if curvature <= 0:
                break
            length = power / curvature
            effects += length * step
            rest -= length * pushed
            scaled = rest / weight
            power, last = rest @ scaled, power
            step = scaled + (power / last) * step
        return effects


@dataclass(frozen=True, eq=False)
class Beside:
    """Groupings of tokens and one more beside them. Each step works on the sums over groups: they
    and the numbers of tokens in two groups at once say all that the next step needs, so tokens are
    passed over twice, whatever the steps.

    Attributes:
        within, code, count: the groupings; the other one [n] and tokens of each of its groups.
        pairs: for each grouping, tokens by group of ``code`` and of the grouping.
    """

    within: Within
    code: Ints
    count: Floats
    pairs: list[csr_array]

    @cached_property
    def _transposed(self) -> list[csr_array]:
        return [pairs.T.tocsr() for pairs in self.pairs]

    def residual(self, values: Floats, steps: int) -> Floats:
        """[n] values less what both explain together, by alternating projections: first on
        ``code``, last on the groupings.
        """
        within, count = self.within, np.maximum(self.count, 1)
        total, *totals = (np.zeros_like(one) for one in (self.count, *within.counts))
        left = _sums(self.code, self.count, values)
        lefts = [_sums(*of, values) for of in zip(within.codes, within.counts, strict=True)]
        for _ in range(steps):
            effect = left / count
            total += effect
            left -= self.count * effect
            for sums, pairs in zip(lefts, self._transposed, strict=True):
                sums -= pairs @ effect
            effects = within.effects(lefts)
            for place, more in enumerate(within.sums_of(effects)):
                totals[place] += effects[place]
                lefts[place] -= more
                left -= self.pairs[place] @ effects[place]
        return within._less(less(values, total, self.code), totals)


def less(values: Floats, effects: Floats, code: Ints, out: Floats | None = None) -> Floats:
    """[n] ``values - effects[code]``, in chunks that stay in the processor's cache."""
    out = np.empty(len(values)) if out is None else out
    for rows in chunks(len(values)):
        np.subtract(values[rows], effects[code[rows]], out=out[rows])
    return out


def crosstab(first: Ints, second: Ints) -> csr_array:
    """[first groups, second groups] how many tokens are in both."""
    shape = int(first.max(initial=-1)) + 1, int(second.max(initial=-1)) + 1
    if np.prod(shape) <= LARGEST_TABLE:
        table = np.bincount(first * shape[1] + second, minlength=np.prod(shape)).reshape(shape)
        return csr_array(table.astype(np.float64))
    pairs = csr_array((np.ones(len(first)), (first, second)))
    pairs.sum_duplicates()
    return pairs


def _sums(code: Ints, count: Floats, values: Floats) -> Floats:
    return np.bincount(code, weights=values, minlength=len(count)).astype(np.float64, copy=False)


def joint_code(columns: list[NDArray]) -> Ints:
    """[n] one code from 0, without gaps, for each combination of [n] integer columns (0 or more)
    that occurs.
    """
    code = _compact(columns[0])[0]
    for column in columns[1:]:
        other, number = _compact(column)
        code = _compact(code * number + other)[0]
    return code


def _compact(values: NDArray) -> tuple[Ints, int]:
    """[n] codes without gaps in the order of the values, and how many there are; without a sort
    where the values are small. (polars sorts several times faster than numpy.)
    """
    top = int(values.max(initial=0))
    if top < max(LARGEST_TABLE, 2 * len(values)):
        seen = np.bincount(values, minlength=1) > 0
        return (np.cumsum(seen) - 1)[values], int(seen.sum())
    code = pl.Series(values).rank("dense").to_numpy().astype(np.int64) - 1
    return code, int(code.max()) + 1
