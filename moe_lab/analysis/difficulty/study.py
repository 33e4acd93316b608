"""``difficulty_study``: every table of the analysis for one frame, and what they say together in
one sentence.
"""

from collections import Counter
from collections.abc import Sequence

import polars as pl

from moe_lab.analysis.difficulty.alignment import STRATA
from moe_lab.analysis.difficulty.association import difficulty_association
from moe_lab.analysis.difficulty.baselines import baseline_association
from moe_lab.analysis.difficulty.compute_budget import compute_budget, compute_variance
from moe_lab.analysis.difficulty.curves import difficulty_curves, difficulty_information
from moe_lab.analysis.difficulty.difficulty_verdict import MARGIN, MIN_DOCUMENTS, DifficultyVerdict
from moe_lab.analysis.difficulty.nulls import difficulty_nulls

ALIGN_WORDS = {"input": "the token that goes in", "target": "the token to be predicted"}


def difficulty_study(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    resamples: int = 2000,
    min_documents: int = MIN_DOCUMENTS,
    baselines: bool = True,
) -> dict[str, pl.DataFrame]:
    """The tables ``budget``, ``association``, ``variance``, ``curves``, ``information``, ``nulls``
    and, on request, ``baselines``.

    Args:
        frame: as ``difficulty_association``; its class columns are judged as taxonomies.
    """
    schema = frame.lazy().collect_schema()
    taxonomies: Sequence[str] = [name for name in STRATA if name in schema]
    tables = {
        "budget": compute_budget(frame, seed=seed),
        "association": difficulty_association(
            frame, difficulty, seed, resamples=resamples, min_documents=min_documents, details=True
        ),
        "variance": compute_variance(frame, difficulty, taxonomies=taxonomies),
        "curves": difficulty_curves(frame, difficulty, seed, resamples=resamples),
        "information": difficulty_information(frame, difficulty, seed),
        "nulls": difficulty_nulls(frame, difficulty, seed),
    }
    if baselines:
        tables["baselines"] = baseline_association(
            frame, difficulty, seed, resamples=min(resamples, 1000)
        )
    return tables


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
            "Every token of every layer runs the same number of real experts, so nothing can follow difficulty.",
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
        else f" (95 % interval {row['rho_token_lo']:+.3f} to {row['rho_token_hi']:+.3f})"
    )
    return verdict, (
        f"Of {moving.height} pairs of layer and alignment: {counts}. The strongest rank correlation of ffn_count with difficulty within "
        f"token ids is {row['rho_token']:+.3f}{ends}, at {where}, where the raw one is {row['rho_raw']:+.3f}; within ±{MARGIN:g} is "
        f"immaterial. {row['n_tokens']:,} tokens of {row['n_docs']} documents; {row['note']}."
    )
