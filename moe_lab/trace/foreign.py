"""A trace from outside: read once by a child process with limits, checked, and copied.

``clean_copy`` runs in the child (``moe_lab.sandbox``). It trusts nothing: names, sizes, checksums,
schemas, every row and conservation are checked, and what it writes has our own layout, compression
and statistics. ``reader.open_trace`` then reads the copy.
"""

from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.sandbox import check_text_bytes, output_limit
from moe_lab.trace.checks import read_meta, versions_text
from moe_lab.trace.manifest import REWRITE, check_bytes, file_name, guarded, of_parts, read_manifest
from moe_lab.trace.part_files import Listing, count_slots, write_part
from moe_lab.trace.reader import Trace, check_counts, check_files
from moe_lab.trace.schema import (
    MAX_ROWS_PER_PART,
    META_FILE,
    PART_PATH,
    READABLE_VERSIONS,
    ROUTED,
    TOKEN_COLUMNS,
    VERSION_KEY,
    ManifestMeta,
    TraceMeta,
)


def clean_copy(source: str, target: str) -> None:
    """Check the trace at ``source`` and write a copy at ``target``, a folder that does not exist.

    Raises:
        TraceError: whatever is wrong with it, in one line that names the file or layer.
    """
    folder, copy = Path(source), Path(target)
    header = read_meta(folder / META_FILE)
    meta, complete, listed = header.meta, header.complete, header.listed
    if isinstance(listed, ManifestMeta):
        manifest = read_manifest(folder, listed, complete)
        manifest.check(meta, complete)
    else:
        manifest = of_parts(listed, None)
    check_files(folder, manifest, complete)
    copied, token_schema = Listing(copy), None
    for number in (None, *(layer.layer for layer in meta.layers)):
        layer = None if number is None else meta.layer(number)
        for entry in manifest.of_layer(number).iter_rows(named=True):
            name = file_name(number, entry["part"])
            frame = _decoded(folder / name, name, entry, meta)
            if number is None:
                token_schema = token_schema or frame.schema
                if frame.schema != token_schema:
                    raise TraceError(
                        f"{name}: expected the columns of the first token file, got others"
                    )
            write_part(copy / name, frame)
            width = 0 if layer is None else layer.num_choices
            counts = count_slots(frame, width)[:width] if width else None
            copied.add(number, entry["part"], frame.height, counts)
    checked = read_manifest(copy, copied.write(meta, complete), strict=True)
    Trace(copy, meta, checked, complete).check()
    for layer in meta.layers:  # the copy's counts are those of its rows, which were checked
        check_counts(layer, manifest, checked.file_counts(layer))


def _decoded(path: Path, name: str, entry: dict[str, Any], meta: TraceMeta) -> pl.DataFrame:
    """The rows of one file, as listed and of the documented columns."""
    check_bytes(path, name, entry)
    tokens = name.startswith("tokens/")

    def read() -> tuple[str | None, pl.Schema, pl.DataFrame]:
        frame = pl.read_parquet(path, hive_partitioning=False, use_statistics=False, glob=False)
        check_text_bytes(frame, output_limit(entry["bytes"]))
        version = pl.read_parquet_metadata(path).get(VERSION_KEY)
        schema = pl.scan_parquet(path, glob=False, hive_partitioning=False).collect_schema()
        return version, schema, frame

    version, schema, frame = guarded(name, read)
    match = PART_PATH.fullmatch(name)
    layer = meta.layer(int(match[1])) if match and match[1] else None
    require(
        frame.height == entry["rows"] and frame.height <= MAX_ROWS_PER_PART,
        f"{entry['rows']} rows as recorded",
        frame.height,
        REWRITE,
        error=TraceError,
        where=name,
    )
    wanted = TOKEN_COLUMNS if tokens else meta.routing_schema()
    if (
        {column: schema.get(column) for column in wanted} != wanted
        or (layer is not None and len(schema) != len(wanted))
        or schema.get(ROUTED, pl.Boolean) != pl.Boolean
        or any(dtype.is_nested() for column, dtype in schema.items() if column not in wanted)
    ):
        columns = f"columns {', '.join(wanted)} of the documented types"
        raise TraceError(f"{name}: " + expected(columns, ", ".join(schema)[:200]))
    require(
        version in [str(number) for number in READABLE_VERSIONS],
        f"trace schema version {versions_text()}",
        repr(version)[:40],
        "another version of moe_lab",
        error=TraceError,
        where=name,
    )
    return frame
