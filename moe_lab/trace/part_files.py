"""The files of a trace: writes, measures and lists Parquet parts and ``meta.json``."""

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from moe_lab.files import atomic_path, open_regular, write_json
from moe_lab.trace.schema import META_FILE, SCHEMA_VERSION, VERSION_KEY, PartMeta, TraceMeta
from moe_lab.trace.seal import new_digest, write_seal


def write_part(path: Path, frame: pl.DataFrame) -> None:
    """Write one Parquet file of one row group; it takes its name only when it is complete."""
    with atomic_path(path) as temporary:
        frame.write_parquet(
            temporary,
            compression="zstd",
            row_group_size=max(frame.height, 1),
            metadata={VERSION_KEY: str(SCHEMA_VERSION)},
        )


def file_checksums(path: Path) -> tuple[int, int, str]:
    """Size in bytes, CRC-32 and BLAKE2b of a file, read in blocks."""
    size, crc, digest = 0, 0, new_digest()
    with open_regular(path) as file:
        while block := file.read(2**20):
            size, crc = size + len(block), zlib.crc32(block, crc)
            digest.update(block)
    return size, crc, digest.hexdigest()


def part_of(path: Path, frame: pl.DataFrame, slots: int) -> PartMeta:
    """The entry of one written file in ``meta.json``."""
    return PartMeta(frame.height, slots, *file_checksums(path))


def write_meta(
    folder: Path, meta: TraceMeta, parts: Mapping[str, PartMeta], complete: bool
) -> None:
    """Write ``meta.json`` and its seal: provenance, completeness and one entry per file."""
    entries = {name: part.to_dict() for name, part in parts.items()}
    write_json(folder / META_FILE, {**meta.to_dict(), "complete": complete, "parts": entries})
    write_seal(folder, {name: part.digest for name, part in parts.items()})


def count_slots(frame: pl.DataFrame, width: int) -> np.ndarray:
    """[width] used slots of each expert in a routing table."""
    return np.bincount(frame["experts"].explode().drop_nulls().to_numpy(), minlength=width)
