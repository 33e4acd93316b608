"""``refuse_finished``: a finished trace is replaced only on request."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.errors import TraceError, TraceExistsError
from moe_lab.trace.checks import read_meta
from moe_lab.trace.schema import META_FILE

COMPARED = {"corpus_hash": "text", "model": "model", "model_hash": "model", "max_tokens": "cut"}
"""Fields of the metadata that a refusal compares -> what it calls them. An empty text is unknown.
"""


def refuse_finished(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise ``TraceExistsError`` where a trace lies at ``folder``.

    Args:
        folder: where a new trace shall appear.
        values: fields of ``TraceMeta`` of the new trace, as far as they are known; the message
            names which of text, model and cut differ.
    """
    if not (folder / META_FILE).is_file():
        return
    try:
        older = read_meta(folder / META_FILE).meta.to_dict()
    except TraceError:
        older = {}
    differing = dict.fromkeys(
        f"another {name}"
        for field, name in COMPARED.items()
        if older
        and field in values
        and "" not in (old := older.get(field), values[field])
        and old != values[field]
    )
    described = f" of {' and '.join(differing)}" if differing else ""
    raise TraceExistsError(f"a finished trace{described} at {folder}")
