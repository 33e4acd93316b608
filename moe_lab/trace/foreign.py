"""A trace from outside: read once by a child process with limits, checked, and copied.

``clean_copy`` runs in the child (``moe_lab.sandbox``). It trusts nothing: names, sizes, checksums,
schemas, every row and conservation are checked, and what it writes has our own layout, compression
and statistics. ``reader.open_trace`` then reads the copy.
"""

from pathlib import Path

import polars as pl

from moe_lab.errors import TraceError, expected, require
from moe_lab.sandbox import check_text_bytes, output_limit
from moe_lab.trace.checks import read_meta
from moe_lab.trace.part_files import file_checksums, part_of, write_meta, write_part
from moe_lab.trace.reader import Trace, files_on_disk
from moe_lab.trace.schema import (
    MAX_ROWS_PER_PART,
    META_FILE,
    PART_PATH,
    READABLE_VERSIONS,
    ROUTED,
    TOKEN_COLUMNS,
    VERSION_KEY,
    PartMeta,
    TraceMeta,
)

REWRITE = "writing the trace again"


def clean_copy(source: str, target: str) -> None:
    """Check the trace at ``source`` and write a copy at ``target``, a folder that does not exist.

    Raises:
        TraceError: whatever is wrong with it, in one line that names the file or layer.
    """
    folder, copy = Path(source), Path(target)
    meta, parts, complete = read_meta(folder / META_FILE)
    on_disk = files_on_disk(folder)
    if missing := sorted(set(parts) - on_disk):
        got = f"{len(missing)} missing, first {missing[0]}"
        raise TraceError(expected(f"{len(parts)} files", got, REWRITE))
    # A killed writer leaves a file that it had no time to list.
    if complete and (unlisted := sorted(on_disk - set(parts))):
        got = f"also {unlisted[0][:80]!r}"
        raise TraceError(expected("only the files listed in meta.json", got, "removing it"))
    token_schema: pl.Schema | None = None
    copied: dict[str, PartMeta] = {}
    for name, part in sorted(parts.items()):
        frame = _decoded(folder / name, name, part, meta)
        if name.startswith("tokens/"):
            token_schema = token_schema or frame.schema
            if frame.schema != token_schema:
                raise TraceError(
                    f"{name}: expected the columns of the first token file, got others"
                )
        write_part(copy / name, frame)
        copied[name] = part_of(copy / name, frame, part.slots)
    write_meta(copy, meta, copied, complete)
    Trace(copy, meta, copied, complete).check()


def _decoded(path: Path, name: str, part: PartMeta, meta: TraceMeta) -> pl.DataFrame:
    """The rows of one file, as listed and of the documented columns."""
    try:
        size, crc32, _ = file_checksums(path)
    except OSError as error:
        raise TraceError(f"{name}: {error.strerror or error}") from error
    if size != part.bytes or crc32 != part.crc32:
        got = f"{size} bytes" if size != part.bytes else "another checksum"
        raise TraceError(
            f"{name}: " + expected(f"{part.bytes} bytes as written", f"{got} (damaged)", REWRITE)
        )
    tokens = name.startswith("tokens/")
    try:
        version = pl.read_parquet_metadata(path).get(VERSION_KEY)
        schema = pl.read_parquet_schema(path)
        frame = pl.read_parquet(path, hive_partitioning=False, use_statistics=False, glob=False)
        check_text_bytes(frame, output_limit(size))
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise TraceError(f"{name}: " + expected("readable Parquet", first, REWRITE)) from error
    match = PART_PATH.fullmatch(name)
    layer = meta.layer(int(match[1])) if match and match[1] else None
    require(
        frame.height == part.rows and frame.height <= MAX_ROWS_PER_PART,
        f"{part.rows} rows as recorded",
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
        f"trace schema version {' or '.join(map(str, READABLE_VERSIONS))}",
        repr(version)[:40],
        "another version of moe_lab",
        error=TraceError,
        where=name,
    )
    return frame
