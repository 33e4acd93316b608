"""The verdicts on an association, and the rule that chooses one.

Three answers by two one-sided tests (Schuirmann 1987) on the correlation within token ids: its 90 %
interval lies beyond the band of immaterial values, within it, or across its edge. What a raw
correlation shows beyond that is the work of identity, and of frequency where frequency explains
most of what identity does.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import polars as pl

from moe_lab.analysis.difficulty.intervals import MISSING, Interval

MARGIN = 0.02
MIN_DOCUMENTS = 200
FALSE_DISCOVERIES = 0.05
MOST_LEFT = 0.25
"""Identity accounts for a raw association where at most this share of it can be left within token
ids.
"""
FREQUENCY_SHARE = 0.5


ALIGN_WORDS = {"input": "the token that goes in", "target": "the token to be predicted"}


GATES = {
    "previous token": "the token before it",
    "position": "its position",
    "copied suffix": "the length of the copied suffix",
    "place in the line": "its place in the line",
    "place in the word": "its place in the word",
    "other token": "the difficulty of the token of the other alignment",
}
"""What is held fixed beside the token id before a layer is called aligned or inverted."""
BEND_MARGIN = 0.05
MIN_EFFECTIVE = 30
LEAST_RELIABLE = 0.1


class DifficultyVerdict(StrEnum):
    FREQUENCY = "frequency-driven"
    IDENTITY = "identity-driven"
    ALIGNED = "difficulty-aligned"
    INVERTED = "inverted"
    TASK = "task-level only"
    NONE = "no material association"
    INCONCLUSIVE = "inconclusive"
    STATIC = "static layer"
    CONTEXT = "context-driven"
    OTHER = "follows the other token"
    BENT = "not monotone"


@dataclass(frozen=True)
class Evidence:
    """The statistics of one layer and alignment that the rule reads.

    Attributes:
        raw, token, document: rank correlations of compute with difficulty: as it is, within token
            ids, within token ids and documents.
        lexer: within token id and lexer class; None where the frame has no such column.
        frequency_share: of the variance of compute that token ids explain, what a smooth function
            of their frequency explains.
        compute_by_id, difficulty_by_id: whether the one or the other is the same for every token of
            an id.
        documents: in all, short ones included.
        effective: documents of equal length that would weigh as much, repeated ones counted once.
        bend: correlation of compute with the squared rank of difficulty, within token ids.
        gates: by name in ``GATES``, what is left of ``token`` with that held fixed too.
        static: the one value that compute has, or None where it varies.
        pairs: tokens with both compute and a difficulty.
        tokens: of these, the ones that share their id with another, on which the correlation rests.
    """

    documents: int
    pairs: int
    tokens: int
    static: float | None = None
    effective: float = float("inf")
    bend: Interval = MISSING
    gates: Mapping[str, Interval] = field(default_factory=dict)
    raw: Interval = MISSING
    token: Interval = MISSING
    document: Interval = MISSING
    lexer: Interval | None = None
    frequency_share: float = float("nan")
    compute_by_id: bool = False
    difficulty_by_id: bool = False


def judge(
    evidence: Evidence, q: float, margin: float = MARGIN, min_documents: int = MIN_DOCUMENTS
) -> tuple[DifficultyVerdict, str]:
    """The verdict on one layer and alignment, and its reason in a sentence.

    Args:
        q: of ``evidence.token``, after the false discovery rate over all layers and alignments.
    """
    obstacle = _obstacle(evidence, min_documents)
    if obstacle is not None:
        return obstacle
    if evidence.effective < min_documents:
        evidence = _strict(evidence)
    token, direction = evidence.token, evidence.token.beyond(margin)
    if direction and q < FALSE_DISCOVERIES:
        return _material(evidence, direction, margin)
    if token.inside(max(margin, BEND_MARGIN)) and (ends := evidence.bend.beyond(BEND_MARGIN)):
        side = "most" if ends > 0 else "least"
        return (
            DifficultyVerdict.BENT,
            f"within token ids the easiest and the hardest tokens get {side}: no slope, but a bend "
            f"(correlation with the squared rank {evidence.bend.value:+z.2f})",
        )
    left = max(margin, MOST_LEFT * abs(evidence.raw.value))
    if evidence.raw.beyond(margin) and token.inside(left):
        return _by_identity(evidence)
    if token.inside(margin):
        return DifficultyVerdict.NONE, f"the correlation within token ids lies within ±{margin:g}"
    return (
        DifficultyVerdict.INCONCLUSIVE,
        f"the interval within token ids crosses ±{margin:g}: more tokens or documents would decide",
    )


def attenuation(value: float, reliability: float) -> str:
    """By how much errors of the difficulty lower the correlation, as the end of a note; "" where
    the reliability is unknown.

    Independent errors multiply a correlation by the square root of the reliability.
    """
    if not (math.isfinite(value) and math.isfinite(reliability)):
        return ""
    if reliability < LEAST_RELIABLE:
        return (
            f"; the difficulty is hardly measured (reliability within ids {reliability:.2f}), so "
            "nothing follows for the true one"
        )
    return (
        f"; the difficulty has a reliability of {reliability:.2f} within ids: measured without "
        f"error the correlation would be about {value / math.sqrt(reliability):+z.3f}"
    )


def _obstacle(evidence: Evidence, min_documents: int) -> tuple[DifficultyVerdict, str] | None:
    """What keeps the question from being asked at all."""
    inconclusive = DifficultyVerdict.INCONCLUSIVE
    if not evidence.pairs:
        return inconclusive, "no token has both compute and a difficulty"
    if evidence.static is not None:
        return (
            DifficultyVerdict.STATIC,
            f"every token has a compute of {evidence.static:g}, as with a fixed k",
        )
    if not evidence.tokens:
        return (
            inconclusive,
            "no token id occurs twice, so no token can be compared with one of its own id",
        )
    least = min(min_documents, MIN_EFFECTIVE)
    if min(evidence.documents, evidence.effective) < least:
        number = min(evidence.documents, round(evidence.effective))
        return (
            inconclusive,
            f"{number} effective documents of {evidence.documents}; at least {least} are needed to "
            "resample",
        )
    if evidence.difficulty_by_id:
        return (
            inconclusive,
            "difficulty is a function of the token id here, so within an id there is nothing to "
            "follow",
        )
    if evidence.compute_by_id:
        return _by_identity(evidence)
    return None


def _strict(evidence: Evidence) -> Evidence:
    """The same with the 95 % interval (or ``level``) where the rule reads the 90 % one."""

    def wider(one: Interval) -> Interval:
        return replace(one, lo90=one.lo, hi90=one.hi)

    return replace(
        evidence,
        raw=wider(evidence.raw),
        token=wider(evidence.token),
        document=wider(evidence.document),
        bend=wider(evidence.bend),
        lexer=evidence.lexer and wider(evidence.lexer),
        gates={name: wider(one) for name, one in evidence.gates.items()},
    )


def _by_identity(evidence: Evidence) -> tuple[DifficultyVerdict, str]:
    share = evidence.frequency_share
    how = (
        f"{100 * min(share, 1):.0f} % of what token ids explain of compute follows their frequency"
    )
    if evidence.compute_by_id:
        how = f"compute is a function of the token id; {how}"
    return (
        DifficultyVerdict.FREQUENCY if share >= FREQUENCY_SHARE else DifficultyVerdict.IDENTITY
    ), how


def _material(evidence: Evidence, direction: int, margin: float) -> tuple[DifficultyVerdict, str]:
    document, lexer = evidence.document, evidence.lexer
    upper = document.hi90 if direction > 0 else -document.lo90
    if upper < margin:
        return (
            DifficultyVerdict.TASK,
            "compute follows the difficulty of documents, but within a document it does not",
        )
    if lexer is not None and lexer.inside(margin):
        return (
            DifficultyVerdict.IDENTITY,
            "once the lexer class of the token is held fixed beside its id, nothing material is "
            "left",
        )
    if lexer is not None and lexer.beyond(margin) != direction:
        return (
            DifficultyVerdict.INCONCLUSIVE,
            "once the lexer class of the token is held fixed too, nothing certain is left",
        )
    for name, what in GATES.items():
        gate = evidence.gates.get(name)
        if gate is None:
            continue
        if gate.inside(margin):
            other = name == "other token"
            return (
                DifficultyVerdict.OTHER if other else DifficultyVerdict.CONTEXT,
                f"once {what} is held fixed beside the token id, nothing material is left",
            )
        if gate.beyond(0) != direction or gate.value * direction < margin:
            return (
                DifficultyVerdict.INCONCLUSIVE,
                f"once {what} is held fixed beside the token id, nothing certain is left",
            )
    if direction > 0:
        return (
            DifficultyVerdict.ALIGNED,
            "harder tokens get more, compared with tokens of the same id",
        )
    return DifficultyVerdict.INVERTED, "harder tokens get less, compared with tokens of the same id"


def study_verdict(association: pl.DataFrame) -> tuple[str, str]:
    """(verdict, sentence) over all layers and alignments of ``difficulty_association``.

    The verdict is the one that all rows share, static layers aside; else "mixed". The sentence
    gives the strongest correlation within token ids with its interval, and what the raw one would
    have said.
    """
    static = DifficultyVerdict.STATIC.value
    moving = association.filter(pl.col("verdict") != static)
    if not moving.height:
        return (
            static,
            "Every token of every layer runs the same number of real experts, so compute cannot "
            "follow difficulty. Which experts a token runs, and how even their load is, can be "
            "asked of such a router (moe-lab report), not how much compute it gets.",
        )
    found = Counter(moving["verdict"].to_list())
    verdict = next(iter(found)) if len(found) == 1 else "mixed"
    measured = moving.filter(pl.col("rho_token").is_not_null())
    if not measured.height:
        return verdict, f"Verdict: {verdict}; {moving['note'][0]}."
    row = measured.sort(pl.col("rho_token").abs(), descending=True).row(0, named=True)
    counts = " and ".join(f"{name} in {number}" for name, number in found.most_common())
    where = f"layer {row['layer']}, {ALIGN_WORDS[row['align']]}"
    ends = (
        ""
        if row["rho_token_lo"] is None
        else f" (95 % interval {row['rho_token_lo']:+z.3f} to {row['rho_token_hi']:+z.3f})"
    )
    return verdict, (
        f"Of {moving.height} pairs of layer and alignment: {counts}. The strongest rank "
        "correlation of ffn_count with difficulty within "
        f"token ids is {row['rho_token']:+z.3f}{ends}, at {where}, where the raw one is "
        f"{'not defined' if row['rho_raw'] is None else format(row['rho_raw'], '+z.3f')}; "
        f"within ±{MARGIN:g} is "
        f"immaterial. {_percent_words(row)}{row['n_tokens']:,} tokens of {row['n_docs']} "
        f"documents; {row['note']}."
    )


def _percent_words(row: dict[str, object]) -> str:
    """The correlation in compute, where the table has it."""
    percent = row.get("compute_percent")
    if not isinstance(percent, float):
        return ""
    return f"The hardest tenth within ids gets {percent:+z.1f} % of the compute of the easiest. "
