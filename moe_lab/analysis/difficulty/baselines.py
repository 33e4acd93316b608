"""Routers that look at nothing, at the token id alone, or at the position alone, with the marginals
of the router that is judged.

Each token takes the compute of a token drawn from the other half of the documents: any (random),
one of the same id (lookup), or one at a similar position. What the analysis says of these is what
it says of a router that knows nothing of difficulty.
"""

from enum import StrEnum

import numpy as np
import polars as pl

from moe_lab.analysis.difficulty.alignment import layers_of
from moe_lab.analysis.difficulty.association import difficulty_association
from moe_lab.analysis.difficulty.within_groups import Ints, joint_code
from moe_lab.analysis.document_bootstrap import Floats


class Baseline(StrEnum):
    RANDOM = "random"
    LOOKUP = "token lookup"
    POSITION = "position only"


def baseline_router(
    frame: pl.DataFrame | pl.LazyFrame,
    kind: Baseline | str,
    *,
    compute: str = "ffn_count",
    seed: int = 0,
) -> pl.DataFrame:
    """[layer, doc, pos, <compute>]: what the baseline spends on each token; a layer's tokens all
    come from the same draw.
    """
    blank = frame.lazy().with_columns(pl.lit(0.0).alias("__no_difficulty"))
    parts = []
    for number, tokens in enumerate(layers_of(blank, "__no_difficulty", compute, None, 0)):
        key = {
            Baseline.RANDOM: np.zeros(len(tokens.doc), dtype=np.int64),
            Baseline.LOOKUP: tokens.token_id,
            Baseline.POSITION: np.frexp(tokens.pos.astype(np.float64))[1].astype(np.int64),
        }[Baseline(kind)]
        spent = drawn_from_other_half(tokens.compute, tokens.doc, key, seed + number)
        keys = {
            "layer": np.full(len(spent), tokens.layer),
            "doc": tokens.doc,
            "pos": tokens.pos,
            "token_id": tokens.token_id,
        }
        parts.append(pl.DataFrame(keys | {compute: spent}))
    return pl.concat(parts)


def baseline_association(
    frame: pl.DataFrame | pl.LazyFrame,
    difficulty: str,
    seed: int = 0,
    *,
    compute: str = "ffn_count",
    resamples: int = 1000,
) -> pl.DataFrame:
    """``difficulty_association`` of the three baselines: [router, ...its columns].

    ``frame`` as there, with integer ``doc`` and ``token_id``.
    """
    lazy = frame.lazy()
    if "layer" not in lazy.collect_schema():
        lazy = lazy.with_columns(layer=pl.lit(0))
    hard = lazy.select("layer", "doc", "pos", pl.col(difficulty).alias("__difficulty")).collect()
    keys = ["layer", "doc", "pos"]
    tables = []
    for kind in Baseline:
        routed = baseline_router(lazy, kind, compute=compute, seed=seed)
        joined = routed.join(hard.cast(dict.fromkeys(keys, pl.Int64)), on=keys)
        table = difficulty_association(
            joined, "__difficulty", seed, compute=compute, resamples=resamples
        )
        tables.append(table.select(pl.lit(kind.value).alias("router"), pl.all()))
    return pl.concat(tables)


def drawn_from_other_half(values: Floats, doc: Ints, key: Ints, seed: int) -> Floats:
    """[n] value of a random token with the same key in the other half of the documents; of any
    token there where the key is not.
    """
    generator = np.random.default_rng(seed)
    documents = joint_code([doc])
    half = (generator.permutation(int(documents.max(initial=0)) + 1) % 2)[documents]
    drawn = np.empty(len(values))
    for side in (0, 1):
        own, other = np.flatnonzero(half == side), np.flatnonzero(half != side)
        if not len(other):
            other = own
        by_key = other[np.argsort(key[other], kind="stable")]
        ordered = key[by_key]
        first, last = (np.searchsorted(ordered, key[own], edge) for edge in ("left", "right"))
        unknown = first == last
        first[unknown], last[unknown] = 0, len(by_key)
        drawn[own] = values[
            by_key[first + (generator.random(len(own)) * (last - first)).astype(np.int64)]
        ]
    return drawn
