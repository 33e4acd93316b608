"""A trace from outside, checked in a child process with limits (``moe_lab.sandbox``), which trusts
nothing.

``clean_listing`` checks ``meta.json`` and the manifest when the trace is opened, ``clean_file`` one
data file when it is first read: its size, checksum, schema, every row, and the counts that are
listed. What they write has our own layout, compression and statistics (``clean_copies``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.files import write_json
from moe_lab.sandbox import check_text_bytes, output_limit
from moe_lab.trace.checks import check_rows, check_tokens, read_meta, versions_text
from moe_lab.trace.conservation import counts_error
from moe_lab.trace.manifest import (
    MANIFEST,
    REWRITE,
    check_bytes,
    clean_parts,
    guarded,
    of_file_name,
    read_manifest,
    whole_digest,
)
from moe_lab.trace.part_files import write_part
from moe_lab.trace.schema import (
    FIRST_WITH_MANIFEST,
    MAX_ROWS_PER_PART,
    META_FILE,
    READABLE_VERSIONS,
    ROUTED,
    TOKEN_COLUMNS,
    VERSION_KEY,
    LayerMeta,
    ManifestMeta,
    TraceMeta,
)
from moe_lab.trace.seal import digest


def clean_listing(source: str, target: str) -> None:
    """Check ``meta.json`` and the manifest in ``source`` and write them again in ``target``, a
    folder that does not exist.

    Raises:
        TraceError: whatever is wrong with them, in one line.
    """
    folder, copy = Path(source), Path(target)
    header = read_meta(folder / META_FILE)
    values = {**header.meta.to_dict(), "complete": header.complete}
    if isinstance(header.listed, ManifestMeta):
        manifest = read_manifest(folder, header.listed, header.complete)
        manifest.check(header.meta, header.complete)
        digests = []
        for name, frame in clean_parts(manifest, header.meta):
            write_part(copy / name, frame)
            digests.append(digest(copy / name))
        mark = ManifestMeta(manifest.entries.height, len(digests), whole_digest(digests))
        values[MANIFEST] = mark.to_dict()
    else:
        values["parts"] = {name: part.to_dict() for name, part in header.listed.items()}
        values["schema_version"] = FIRST_WITH_MANIFEST - 1
    write_json(copy / META_FILE, values)


def clean_file(
    source: str,
    target: str,
    name: str,
    listed: dict[str, Any],
    meta: dict[str, Any],
    first: str | None,
) -> None:
    """Check the data file at ``source`` and write a copy at ``target``.

    Args:
        name: its relative path in the trace.
        listed: what the manifest lists of it, with the digest in hexadecimal digits.
        meta: of the trace, as JSON values.
        first: of a token file, the clean copy of another one, whose columns it must have.

    Raises:
        TraceError: whatever is wrong with it, in one line that names the file or layer.
    """
    described = TraceMeta.from_dict(meta)
    entry = {**listed, "digest": listed["digest"] and bytes.fromhex(listed["digest"])}
    number = of_file_name(name)[0]
    layer = None if number is None else described.layer(number)
    frame = _decoded(Path(source), name, entry, described, layer)
    if layer is not None:
        _check_counts(name, layer, frame, described, listed)
    else:
        check_tokens(frame, described)
        if first is not None and pl.read_parquet_schema(first) != frame.schema:
            raise TraceError(f"{name}: expected the columns of the first token file, got others")
    write_part(Path(target), frame)


def _check_counts(
    name: str, layer: LayerMeta, frame: pl.DataFrame, meta: TraceMeta, listed: Mapping[str, Any]
) -> None:
    """Every row, and the slots that are listed: of each expert, or all (schema 1 and 2)."""
    counts = check_rows(layer, frame, meta).tolist()
    if listed["counts"] is None:
        if listed.get("slots") != sum(counts):
            raise counts_error(name, None, listed.get("slots"), sum(counts))
    elif differing := [at for at, count in enumerate(counts) if count != listed["counts"][at]]:
        at = differing[0]
        raise counts_error(name, at, listed["counts"][at], counts[at])


def _decoded(
    path: Path, name: str, entry: dict[str, Any], meta: TraceMeta, layer: LayerMeta | None
) -> pl.DataFrame:
    """The rows of one file, as listed and of the documented columns."""
    check_bytes(path, name, entry)

    def read() -> tuple[str | None, pl.Schema, pl.DataFrame]:
        frame = pl.read_parquet(path, hive_partitioning=False, use_statistics=False, glob=False)
        check_text_bytes(frame, output_limit(entry["bytes"]))
        version = pl.read_parquet_metadata(path).get(VERSION_KEY)
        schema = pl.scan_parquet(path, glob=False, hive_partitioning=False).collect_schema()
        return version, schema, frame

    version, schema, frame = guarded(name, read)
    require(
        frame.height == entry["rows"] and frame.height <= MAX_ROWS_PER_PART,
        f"{entry['rows']} rows as recorded",
        frame.height,
        REWRITE,
        error=TraceError,
        where=name,
    )
    wanted = TOKEN_COLUMNS if layer is None else meta.routing_schema()
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
