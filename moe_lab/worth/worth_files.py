"""The folder of a finished measurement of ``moe-lab ablate``, read without torch."""

from pathlib import Path
from typing import Any

from moe_lab.errors import AnalysisError, require
from moe_lab.files import parse_json, read_regular

META, LOSSES = "meta.json", "losses.parquet"
UNFINISHED = ".unfinished"
"""Folder of what the other tables are made from, until the measurement is finished."""
SHORT = "of fewer than two tokens"
"""Documents that cannot be measured."""
WORTH_FOLDER = "worth"
"""In a run's folder: the measurement of its experts."""
FREE_SHARE = 0.001
"""Share of the loss below which an expert costs nothing."""


def refuse_taken(folder: Path) -> None:
    """Raise ``AnalysisError`` for a folder of a finished measurement, or of other things: the
    tables would be written among them.
    """
    for taken, what in (
        ((folder / META).exists(), "a folder without a finished measurement"),
        (
            folder.exists()
            and not (folder / LOSSES).exists()
            and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())),
            "a new folder, an empty one, or one with an unfinished measurement",
        ),
    ):
        require(
            not taken,
            what,
            folder,
            "another folder, or removing this one",
            error=AnalysisError,
            field="out",
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of ``meta.json`` of a finished measurement.

    Raises:
        AnalysisError: no such file, or another's.
    """
    path = folder / META
    meta = parse_json(read_regular(path)) if path.is_file() else None
    require(
        isinstance(meta, dict)
        and {"sentences", "notes", "loss"} <= set(meta)
        and isinstance(meta["sentences"], list)
        and isinstance(meta["notes"], list)
        and isinstance(meta["loss"], float),
        f"a finished measurement of moe-lab ablate in {folder}",
        f"no {META} of one",
        error=AnalysisError,
        field="worth",
    )
    assert meta is not None
    return meta
