"""Cues beside the token id that a router may follow: gates that an aligned verdict must pass.

A router that sees only the previous token, the position or the length of a copied suffix spends
unevenly within ids too, and where difficulty depends on the same things its compute correlates with
difficulty. Each gate holds one of them fixed beside the id and asks what is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_lab.analysis.difficulty.alignment import Align, Aligned, LayerTokens
from moe_lab.analysis.difficulty.rank_statistics import Order, stable_order, standard_ranks
from moe_lab.analysis.difficulty.within_groups import Ints, Within, joint_code
from moe_lab.analysis.document_bootstrap import Floats

POSITION_BINS = 64
LONGEST_SUFFIX = 3
BYTE_IDS = 512
"""With fewer ids than this, tokens are bytes and the last two of them are the context."""
STEPS = 4


@dataclass(frozen=True, eq=False)
class Cues:
    """What stands before each token of a layer, for all its alignments."""

    tokens: LayerTokens

    @cached_property
    def previous(self) -> Ints:
        """[T] the token before (of bytes: the two before), 0 at the beginning of a document."""
        ids = self.tokens.token_id
        last = self._before(ids + 1)
        return last if ids.max(initial=0) >= BYTE_IDS else joint_code([last, self._before(last)])

    @cached_property
    def copied(self) -> Ints:
        """``copied_suffix``."""
        return copied_suffix(self.tokens.token_id, self.tokens.doc)

    def _before(self, codes: Ints) -> Ints:
        doc = self.tokens.doc
        return np.append(0, np.where(doc[1:] == doc[:-1], codes[:-1], 0))


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of one pairing; ``left`` holds the ranks of difficulty behind each of them."""

    cues: Cues
    aligned: Aligned
    by_token: Within
    ranks: Floats
    x_token: Floats

    @property
    def tokens(self) -> LayerTokens:
        return self.cues.tokens

    @cached_property
    def behind(self) -> dict[str, Callable[[Floats, Floats], Floats]]:
        """Name -> function of (a row of ranks, its residual within token ids) -> what is left."""
        tokens, rows, judged = self.tokens, self.aligned.rows, self.aligned.judged
        places = (rows,) if self.aligned.align is Align.INPUT else (rows, judged)
        pairs = Within(
            (
                joint_code([tokens.token_id[rows], self.cues.previous[rows]]),
                *self.by_token.codes[1:],
            )
        )
        position = Order.of(tokens.pos[rows]).quantile_bins(POSITION_BINS)
        copied = self.cues.copied
        beside = {
            "position": position,
            "copied suffix": joint_code([copied[rows], copied[judged]]),
        } | {
            name: joint_code([Order.of(place[at]).quantile_bins(POSITION_BINS) for at in places])
            for name, place in tokens.places.items()
        }
        gates: dict[str, Callable[[Floats, Floats], Floats]] = {
            "previous token": lambda ranks, _: pairs.residual(ranks)
        }
        for name, code in beside.items():
            behind = self.by_token.beside(code)
            gates[name] = lambda _, left, behind=behind: behind.residual(left, STEPS)
        other = self._other
        return gates | {"other token": lambda _, left: left - other * (other @ left)}

    @cached_property
    def left(self) -> dict[str, Floats]:
        """Name -> [n] ranks of difficulty behind the gate."""
        return {name: gate(self.ranks, self.x_token) for name, gate in self.behind.items()}

    @cached_property
    def clusters(self) -> NDArray[np.int64] | None:
        """[D] documents of the same token ids share a cluster; None where all differ."""
        ids, starts = self.tokens.token_id[self.aligned.rows], self.aligned.starts
        place = np.arange(len(ids)) - np.repeat(starts, np.diff(np.append(starts, len(ids))))
        mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= (place.astype(np.uint64) + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        key = np.add.reduceat(mixed ^ (mixed >> np.uint64(32)), starts)
        codes = np.unique(key, return_inverse=True)[1].astype(np.int64)
        return codes if codes.max(initial=-1) + 1 < len(starts) else None

    @cached_property
    def _other(self) -> Floats:
        """[n] ranks within ids of the difficulty of the token of the other alignment, of length 1;
        0 where it has none.
        """
        tokens, rows = self.tokens, self.aligned.rows
        difficulty = tokens.difficulty
        if self.aligned.align is Align.INPUT:
            next_one = np.append(
                np.where(tokens.doc[1:] == tokens.doc[:-1], difficulty[1:], np.nan), np.nan
            )
            values = next_one[rows]
        else:
            values = difficulty[rows]
        known = np.isfinite(values)
        ranks = np.zeros(len(values))
        ranks[known] = standard_ranks(Order.of(values[known]))
        left = self.by_token.residual(ranks)
        length = float(np.sqrt(left @ left))
        return left / length if length > 0 else left


def copied_suffix(ids: Ints, doc: Ints) -> Ints:
    """[T] the longest suffix of 1 to 3 tokens before each token whose last earlier occurrence in
    the document was followed by this token; 0: no such suffix.
    """
    longest = np.zeros(len(ids), dtype=np.int64)
    suffix = doc
    for length in range(1, LONGEST_SUFFIX + 1):
        if len(ids) <= length:
            break
        before = np.append(np.zeros(length, np.int64), ids[:-length] + 1)
        before[np.append(np.zeros(length, bool), doc[length:] == doc[:-length]) == 0] = 0
        suffix = joint_code([suffix, before])
        order = stable_order(suffix)
        earlier = np.full(len(ids), -1)
        same = suffix[order[1:]] == suffix[order[:-1]]
        earlier[order[1:][same]] = order[:-1][same]
        hit = (earlier >= 0) & (before > 0) & (ids[earlier] == ids)
        longest[hit] = length
    return longest
