"""Checks of a trace that is not trusted: the form of ``meta.json``, and rules for every row."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import ConfigError, TraceError, expected, require
from moe_lab.files import read_regular
from moe_lab.trace.manifest import MANIFEST, check_layers
from moe_lab.trace.rows import EMPTY_SLOT, expert_slots
from moe_lab.trace.schema import (
    FIRST_WITH_MANIFEST,
    META_FILE,
    OUTPUT_RATIO,
    PART_PATH,
    READABLE_VERSIONS,
    SCHEMA_VERSION,
    LayerMeta,
    ManifestMeta,
    PartMeta,
    TraceMeta,
)

MAX_META_BYTES = 2**26
TOLERANCE = 1e-3
"""Of entropies and margins, which are rounded to f32."""


@dataclass(frozen=True)
class Header:
    """What ``meta.json`` says.

    Attributes:
        meta: provenance and layers.
        complete: whether the trace is whole.
        listed: of the manifest; in traces of schema 1 and 2, the files themselves by relative path.
    """

    meta: TraceMeta
    complete: bool
    listed: ManifestMeta | dict[str, PartMeta]


def read_meta(path: Path) -> Header:
    """The content of ``meta.json``, which is not trusted.

    Raises ``TraceError`` where it is no JSON of the documented shape, names impossible files, or is
    of a version that this one cannot read.
    """
    try:
        require(
            path.stat().st_size <= MAX_META_BYTES,
            f"{META_FILE} of at most {MAX_META_BYTES} bytes",
            path.stat().st_size,
            error=TraceError,
        )
        values: Any = json.loads(read_regular(path))
        json.dumps(
            values, ensure_ascii=False
        ).encode()  # half a character (a lone surrogate) raises
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(
            f"expected {path} to be JSON, got {type(error).__name__}; try writing the trace again"
        ) from error
    if not isinstance(values, dict):
        raise TraceError(f"expected {path} to hold an object, got {type(values).__name__}")
    version = values.get("schema_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        newer = type(version) is int and version > SCHEMA_VERSION
        got = short(version) + (", which a newer moe_lab wrote" if newer else "")
        hint = f"{'a newer' if newer else 'another'} version of moe_lab"
        raise TraceError(
            expected(f"trace schema version {versions_text()}", got, hint), field="schema_version"
        )
    name = "parts" if version < FIRST_WITH_MANIFEST else MANIFEST
    complete, listed = values.pop("complete", None), values.pop(name, None)
    layers = values.get("layers")
    if not (
        isinstance(complete, bool)
        and isinstance(listed, dict)
        and isinstance(layers, list)
        and all(isinstance(item, dict) for item in layers)
        and (name == MANIFEST or all(isinstance(item, dict) for item in listed.values()))
    ):
        raise TraceError(f"expected {path} to hold complete, {name} and layers, got others")
    try:
        meta = TraceMeta.from_dict({**values, "schema_version": SCHEMA_VERSION})
        if name == MANIFEST:
            return Header(meta, complete, ManifestMeta.from_dict(listed))
        files = {name: PartMeta.from_dict(part) for name, part in listed.items()}
    except ConfigError as error:
        raise TraceError(f"{META_FILE}: {error}") from error
    matches = {name: PART_PATH.fullmatch(name) for name in files}
    if wrong := [name for name, match in matches.items() if match is None]:
        wanted = "part names such as tokens/part-00000.parquet"
        raise TraceError(f"{META_FILE}: " + expected(wanted, repr(wrong[0][:60])))
    traced = {int(match[1]) for match in matches.values() if match and match[1]}
    check_layers(meta, traced, complete, META_FILE)
    return Header(meta, complete, files)


def versions_text() -> str:
    """The schema versions that can be read."""
    return f"{', '.join(map(str, READABLE_VERSIONS[:-1]))} or {READABLE_VERSIONS[-1]}"


def check_tokens(frame: pl.DataFrame, meta: TraceMeta) -> None:
    """Raise ``TraceError`` for null keys, token ids outside the vocabulary (or any, where
    ``meta.has_token_ids`` says there are none), or losses that are NaN or infinite.
    """
    ids_missing = frame["token_id"].null_count()
    require(
        not frame.select(pl.sum_horizontal(pl.col("doc", "pos").null_count())).item()
        and ids_missing == (0 if meta.has_token_ids else frame.height),
        "doc, pos and token_id without nulls" if meta.has_token_ids else "no token ids",
        "nulls" if meta.has_token_ids else "some",
        error=TraceError,
    )
    highest = frame["token_id"].max()
    if meta.vocab_size is not None and isinstance(highest, int) and highest >= meta.vocab_size:
        raise TraceError(expected(f"token ids below vocab_size {meta.vocab_size}", highest))
    require(
        frame["loss"].is_finite().all(),
        "finite losses",
        "NaN or infinity",
        "null where a token has no loss",
        error=TraceError,
    )


def check_rows(layer: LayerMeta, batch: pl.DataFrame, meta: TraceMeta) -> np.ndarray:
    """Check one batch of a layer's rows; returns its used slots of each expert, [E] int64."""
    where = f"layer {layer.layer}"
    absent = meta.not_recorded()
    known = pl.exclude("margin", *absent)
    require(
        not batch.select(pl.sum_horizontal(known.null_count())).item(),
        "no nulls",
        "nulls",
        error=TraceError,
        where=where,
        field="routing",
    )
    require(
        all(batch[name].is_null().all() for name in absent),
        f"only nulls in {', '.join(absent)} as {META_FILE} says",
        "values",
        error=TraceError,
        where=where,
        field="routing",
    )
    ids_TK = expert_slots(layer, batch["experts"])
    used_TK = ids_TK != EMPTY_SLOT
    used_T = used_TK.sum(axis=1)
    weights = batch["weights"].explode().drop_nulls()
    require(
        not meta.has_weights
        or (
            np.array_equal(batch["weights"].list.len().to_numpy(), used_T)
            and len(weights) == used_T.sum()
        ),
        "one weight for each expert id",
        "other numbers",
        error=TraceError,
        where=where,
        field="weights",
    )
    ranges = [
        ("entropy", 0.0, math.log(layer.num_choices)),
        ("margin", 0.0, math.inf),
        ("dropped", 0, layer.top_k - used_T),
    ]
    for name, low, high in ranges:
        column = batch[name].fill_null(0).to_numpy()
        if ((column < low - TOLERANCE) | (column > high + TOLERANCE)).any():
            top = layer.top_k if name == "dropped" else f"{high:.4g}"
            raise TraceError(
                f"{where}: " + expected(f"{name} from 0 to {top}", "others"), field=name
            )
    floats = [
        batch[name].drop_nulls()
        for name in ("entropy", "gate_mass_ffn", OUTPUT_RATIO)
        if name in batch.columns
    ]
    require(
        weights.is_finite().all() and all(column.is_finite().all() for column in floats),
        "finite gate weights and entropies",
        "NaN or infinity",
        error=TraceError,
        where=where,
        field="weights",
    )
    ordered = np.sort(ids_TK, axis=1)
    require(
        not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY_SLOT)).any(),
        "each token to name an expert at most once",
        "a repeated id",
        error=TraceError,
        where=where,
        field="experts",
    )
    ffn_count = (ids_TK < layer.num_experts).sum(axis=1)
    require(
        np.array_equal(ffn_count, batch["ffn_count"].to_numpy()),
        "ffn_count to be the number of real expert ids",
        "others",
        error=TraceError,
        where=where,
        field="ffn_count",
    )
    require(
        np.array_equal(used_T - ffn_count, batch["zero_count"].to_numpy()),
        "zero_count to be the number of zero-compute expert ids",
        "others",
        error=TraceError,
        where=where,
        field="zero_count",
    )
    return np.bincount(ids_TK[used_TK], minlength=layer.num_choices)
