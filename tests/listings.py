"""Traces whose listing is changed after they were written, as damage or a forger would."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from moe_lab.trace.manifest import COLUMNS, MANIFEST, NAME, part_name, whole_digest
from moe_lab.trace.seal import SEAL_FILE, _code, digest, user_key


def edit_meta(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write ``meta.json`` again as ``change`` leaves or returns it."""
    values = json.loads((folder / "meta.json").read_text())
    values = change(values) or values
    (folder / "meta.json").write_text(json.dumps(values))


def edit_manifest(folder: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Write the manifest (of one part) again, and let ``meta.json`` agree with it."""
    path = folder / part_name(0)
    frame = change(pl.read_parquet(path))
    frame.write_parquet(path)
    found = {"files": frame.height, "digest": whole_digest([digest(path)])}
    edit_meta(folder, lambda values: values["manifest"].update(found))


def relist(folder: Path, name: str, **values: Any) -> None:
    """Let the manifest list a data file as it is on disk now, with further ``values``."""
    data = (folder / name).read_bytes()
    checksum = hashlib.blake2b(data, digest_size=32).digest()
    values |= {"bytes": len(data), "digest": checksum}

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        return frame.with_columns(
            pl.when(name == NAME)
            .then(pl.lit(pl.Series([value], dtype=COLUMNS[column])).first())
            .otherwise(column)
            .alias(column)
            for column, value in values.items()
        )

    edit_manifest(folder, change)


def as_older_version(folder: Path, version: int, sealed: bool) -> None:
    """Turn a trace into one of schema 1 or 2, whose files are listed in ``meta.json``."""
    parts, digests = {}, {}
    for row in pl.read_parquet(folder / part_name(0)).with_columns(NAME.alias("name")).to_dicts():
        data = (folder / row["name"]).read_bytes()
        slots = sum(row["counts"] or [])
        part = {"rows": row["rows"], "slots": slots, "bytes": len(data), "crc32": zlib.crc32(data)}
        parts[row["name"]] = part
        digests[row["name"]] = digest(folder / row["name"])
    shutil.rmtree(folder / MANIFEST)
    meta = {"schema_version": version, "parts": parts}
    edit_meta(
        folder, lambda values: {name: values[name] for name in values if name != MANIFEST} | meta
    )
    key = user_key()
    (folder / SEAL_FILE).unlink()
    if sealed and key is not None:
        files = {**digests, "meta.json": digest(folder / "meta.json")}
        seal_text = json.dumps({"files": files, "code": _code(key, files)})
        (folder / SEAL_FILE).write_text(seal_text)
