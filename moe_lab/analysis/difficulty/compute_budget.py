"""How compute is spread, before any question of difficulty: one row per layer, and how much of its
variance each description explains.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from moe_lab.analysis.difficulty.alignment import (
    Align,
    LayerTokens,
    align,
    frequency_bands,
    layers_of,
)
from moe_lab.analysis.difficulty.association import standard_level_ranks
from moe_lab.analysis.difficulty.rank_statistics import Order, standard_ranks
from moe_lab.analysis.difficulty.within_groups import Ints, Within, joint_code
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.errors import AnalysisError, require


def compute_budget(
    frame: pl.DataFrame | pl.LazyFrame,
    *,
    compute: str = "ffn_count",
    slots: int | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """One row a layer: how compute is spread, before any question of difficulty.

    Args:
        frame: [layer, doc, pos, token_id, <compute>]. Position 0 is left out of everything but
            ``first_mean``.
        slots: K, the most a token can have; by default the most that any token of the layer has.

    Returns:
        [layer, n_tokens, n_docs, mean, sd, min, q10, median, q90, max, zero_ratio, polarisation,
        binomial_polarisation, between_documents, identity_r2, lag1, first_mean]:

        * ``zero_ratio``: tokens without any; ``polarisation``: tokens at 0 or at K, beside that of
            a binomial of the same mean.
        * ``between_documents``: share of the variance between documents (omega squared).
        * ``identity_r2``: share of variance that the mean over the same id in the other half of the
            documents predicts.
        * ``lag1``: correlation with the next token of the document.

        A static layer has its one value everywhere and null where variance is divided by.
    """
    blank = frame.lazy().with_columns(pl.lit(0.0).alias(_BLANK))
    rows = []
    for tokens in layers_of(blank, _BLANK, compute, None, 0):
        first = tokens.compute[tokens.pos == 0]
        keep = tokens.pos > 0
        spent = tokens.compute[keep]
        doc, ids, pos = (values[keep] for values in (tokens.doc, tokens.token_id, tokens.pos))
        row: dict[str, object] = {
            "layer": tokens.layer,
            "n_tokens": len(spent),
            "n_docs": len(np.unique(doc)),
        }
        row["first_mean"] = float(first.mean()) if len(first) else None
        rows.append(
            row
            | (_spread(spent, slots) | _structure(spent, doc, ids, pos, seed) if len(spent) else {})
        )
    return pl.DataFrame(rows, schema=_BUDGET).with_columns(pl.col(pl.Float64).fill_nan(None))


_BLANK = "__no_difficulty"


def _spread(spent: Floats, slots: int | None) -> dict[str, float]:
    top = float(spent.max()) if slots is None else float(slots)
    q10, median, q90 = np.quantile(spent, [0.1, 0.5, 0.9])
    share = spent.mean() / top if top > 0 else 0.0
    count = round(top)
    ends = (1 - share) ** count + share**count if count and 0 <= share <= 1 else float("nan")
    return {
        "mean": float(spent.mean()),
        "sd": float(spent.std()),
        "min": float(spent.min()),
        "q10": float(q10),
        "median": float(median),
        "q90": float(q90),
        "max": float(spent.max()),
        "zero_ratio": float((spent == 0).mean()),
        "polarisation": float(((spent == 0) | (spent == top)).mean()),
        "binomial_polarisation": ends,
    }


def _structure(spent: Floats, doc: Ints, ids: Ints, pos: Ints, seed: int) -> dict[str, float]:
    if spent.min() == spent.max():
        return {}
    neighbours = np.flatnonzero((doc[1:] == doc[:-1]) & (pos[1:] == pos[:-1] + 1))
    lag1 = float("nan")
    if len(neighbours) > 1 and spent[neighbours].std() > 0 and spent[neighbours + 1].std() > 0:
        lag1 = float(np.corrcoef(spent[neighbours], spent[neighbours + 1])[0, 1])
    fit = 1 - float(((spent - held_out_mean(spent, doc, ids, seed)) ** 2).mean()) / float(
        spent.var()
    )
    return {"between_documents": omega_squared(spent, doc), "identity_r2": fit, "lag1": lag1}


def held_out_mean(values: Floats, doc: Ints, key: Ints, seed: int) -> Floats:
    """[n] mean of the values with the same key in the other half of the documents; the mean of all
    where the key is not there.
    """
    documents = joint_code([doc])
    half = (np.random.default_rng(seed).permutation(int(documents.max()) + 1) % 2)[documents]
    predicted = np.full(len(values), values.mean())
    for side in (0, 1):
        own, other = half == side, half != side
        count, total = (
            np.bincount(key[other], weights=w, minlength=int(key.max()) + 1)
            for w in (None, values[other])
        )
        known = own & (count[key] > 0)
        predicted[known] = (total / np.maximum(count, 1))[key[known]]
    return predicted


def omega_squared(values: Floats, groups: Ints) -> float:
    """Share of variance between groups, less what chance gives (Hays 1963): ``(SSB - (G - 1) MSW) /
    (SST + MSW)``. NaN for a constant.
    """
    code = joint_code([groups])
    centred = values - values.mean()
    total = float(centred @ centred)
    count, sums = (np.bincount(code, weights=w) for w in (None, centred))
    between = float((sums**2 / count).sum())
    noise = (total - between) / max(len(values) - len(count), 1)
    return (between - (len(count) - 1) * noise) / (total + noise) if total > 0 else float("nan")


def compute_variance(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    *,
    compute: str = "ffn_count",
    taxonomies: Sequence[str] = (),
) -> pl.DataFrame:
    """The share of the variance of compute ranks that each description of the token explains, alone
    and one after another.

    Args:
        taxonomies: class columns of the frame to judge alone, beside token id and document.

    Returns:
        [layer, kind, name, explained]: ``kind`` "alone": omega squared of ``name``. ``kind``
            "nested": adjusted R squared of an additive
        model in which ``name`` joins those before it: position, frequency, token id, class within
            id (where the frame has ``lexer``),
        difficulty within id and class. Static layers have no rows.

    Raises:
        AnalysisError: the frame has no such column.
    """
    lazy = frame.lazy()
    schema = lazy.collect_schema()
    unknown = [name for name in taxonomies if name not in schema]
    require(
        not unknown,
        f"taxonomies among {', '.join(schema.names())}",
        ", ".join(unknown),
        error=AnalysisError,
        field="taxonomies",
    )
    rows: list[dict[str, object]] = []
    for tokens in layers_of(lazy, difficulty, compute, None, 0):
        pairs = align(tokens, Align.INPUT)
        spent = tokens.compute[pairs.rows]
        if not len(spent) or spent.min() == spent.max():
            continue
        y = standard_level_ranks(Order.of(spent).group)
        keys = [pl.col("doc"), pl.col("pos")]
        classes = (
            lazy.filter(pl.col("layer") == tokens.layer)
            .select("doc", "pos", *taxonomies)
            .sort(keys)
            .collect()
        )
        classes = classes.filter(pl.col("pos") > 0)
        alone: dict[str, tuple[Floats, Ints]] = {
            "token_id": (y, pairs.token_ids[0]),
            "document": (y, pairs.doc),
        }
        for name in taxonomies:
            kept = _matching(classes, tokens, pairs.rows, name)
            alone[name] = y, kept
        rows += [
            {"layer": tokens.layer, "kind": "alone", "name": name, "explained": omega_squared(*of)}
            for name, of in alone.items()
        ]
        nested = _nested(y, tokens, pairs.rows, pairs.difficulty)
        rows += [
            {"layer": tokens.layer, "kind": "nested", "name": name, "explained": value}
            for name, value in nested
        ]
    return pl.DataFrame(
        rows,
        schema={"layer": pl.Int64, "kind": pl.String, "name": pl.String, "explained": pl.Float64},
    )


def _matching(classes: pl.DataFrame, tokens: LayerTokens, rows: Ints, name: str) -> Ints:
    """Codes of a class column at the tokens that are judged."""
    column = classes[name].cast(pl.String).fill_null("").rank("dense").cast(pl.Int64).to_numpy()
    if len(column) == len(rows):
        return column
    key = (
        classes["doc"].rank("dense").cast(pl.Int64).to_numpy() * 2**32
        + classes["pos"].cast(pl.Int64).to_numpy()
    )
    wanted = (joint_code([tokens.doc]) + 1)[rows] * 2**32 + tokens.pos[rows]
    return column[np.searchsorted(key, wanted)]


def _nested(
    y: Floats, tokens: LayerTokens, rows: Ints, difficulty: Floats
) -> list[tuple[str, float]]:
    ids, position = (
        tokens.token_id[rows],
        np.frexp(tokens.pos[rows].astype(np.float64))[1].astype(np.int64),
    )
    steps: list[tuple[str, tuple[Ints, ...]]] = [
        ("position", (position,)),
        ("frequency", (frequency_bands(ids), position)),
        ("token_id", (ids, position)),
    ]
    if tokens.lexer is not None:
        steps.append(("class", (joint_code([ids, tokens.lexer[rows]]), position)))
    found: list[tuple[str, float]] = []
    total = float(y @ y) / (len(y) - 1)
    left, freedom = y, len(y)
    for name, codes in steps:
        within = Within(codes)
        left = within.residual(y)
        freedom = len(y) - sum(int((count > 0).sum()) for count in within.counts) + len(codes) - 1
        found.append((name, 1 - float(left @ left) / max(freedom, 1) / total))
    hard = Within(steps[-1][1]).residual(standard_ranks(Order.of(difficulty)))
    gained = float(left @ hard) ** 2 / max(float(hard @ hard), 1e-300)
    return [*found, ("difficulty", 1 - (float(left @ left) - gained) / max(freedom - 1, 1) / total)]


_BUDGET: dict[str, Any] = {
    "layer": pl.Int64(),
    "n_tokens": pl.Int64(),
    "n_docs": pl.Int64(),
} | dict.fromkeys(
    (
        "mean",
        "sd",
        "min",
        "q10",
        "median",
        "q90",
        "max",
        "zero_ratio",
        "polarisation",
        "binomial_polarisation",
        "between_documents",
    ),
    pl.Float64(),
)
_BUDGET |= dict.fromkeys(("identity_r2", "lag1", "first_mean"), pl.Float64())
