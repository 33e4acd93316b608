"""The files of a trace: writes, measures and lists Parquet parts and ``meta.json``."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from moe_lab.errors import TraceError, expected
from moe_lab.files import atomic_path, write_json
from moe_lab.trace.schema import META_FILE, SCHEMA_VERSION, VERSION_KEY, PartMeta, TraceMeta


def write_part(path: Path, frame: pl.DataFrame) -> None:
    """One Parquet file of one row group, under its name only when it is whole."""
    with atomic_path(path) as temporary:
        frame.write_parquet(
            temporary,
            compression="zstd",
            row_group_size=max(frame.height, 1),
            metadata={VERSION_KEY: str(SCHEMA_VERSION)},
        )


def file_checksum(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file, read in blocks."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def part_of(path: Path, frame: pl.DataFrame, slots: int) -> PartMeta:
    """The entry of one written file in ``meta.json``."""
    size, crc32 = file_checksum(path)
    return PartMeta(rows=frame.height, slots=slots, bytes=size, crc32=crc32)


def write_meta(
    folder: Path, meta: TraceMeta, parts: Mapping[str, PartMeta], complete: bool
) -> None:
    """Write ``meta.json``: provenance, whether the trace is whole, and one entry per file."""
    write_json(
        folder / META_FILE,
        {
            **meta.to_dict(),
            "complete": complete,
            "parts": {name: part.to_dict() for name, part in parts.items()},
        },
    )


def count_slots(frame: pl.DataFrame, width: int) -> np.ndarray:
    """[width] used slots of each expert in a routing table."""
    return np.bincount(frame["experts"].explode().drop_nulls().to_numpy(), minlength=width)


def check_tokens(frame: pl.DataFrame, meta: TraceMeta) -> None:
    """Raise ``TraceError`` for null keys, token ids outside the vocabulary, or losses that are NaN
    or infinite.
    """
    if frame.select(pl.sum_horizontal(pl.col("doc", "pos", "token_id").null_count())).item():
        raise TraceError("expected doc, pos and token_id without nulls, got nulls")
    highest = frame["token_id"].max()
    if meta.vocab_size is not None and isinstance(highest, int) and highest >= meta.vocab_size:
        raise TraceError(expected(f"token ids below vocab_size {meta.vocab_size}", highest))
    if not frame["loss"].is_finite().all():
        raise TraceError(
            "expected finite losses, got NaN or infinity; try null where a token has no loss"
        )
