"""The file ``done`` of a finished run: a digest of each of its files, so that a run that was edited
is noticed when it is loaded, judged, drawn or continued.

``done`` of an older version is empty, or lacks some of the files; what it lacks is taken as it is.
The study of ``moe-lab difficulty`` lists the digests of all its tables, under ``digests``.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from moe_lab.errors import RunError, require
from moe_lab.files import digest_of, read_regular
from moe_lab.runs.layout import CONFIG, DONE, RESULT, TABLE_NAMES, TRACE, TRACE_META

ALWAYS_CHECKED = (CONFIG, RESULT)
TRACE_META_NAME = f"{TRACE}/{TRACE_META}"
SEALED = (*ALWAYS_CHECKED, *(f"{name}.parquet" for name in TABLE_NAMES), TRACE_META_NAME)
"""``meta.json`` of the trace has the digest of its manifest, which has those of its files."""


def seal(folder: Path) -> str:
    """The content of ``done`` for the files that lie in ``folder`` now."""
    return json.dumps(digests_of(folder, (name for name in SEALED if (folder / name).exists())))


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digest of each file by its name."""
    return {name: digest_of(folder / name) for name in names}


def check_seal(
    folder: Path, names: Iterable[str] = ALWAYS_CHECKED, record: Path | None = None
) -> None:
    """Raise ``RunError`` if one of the sealed files ``names`` in ``folder`` was changed since.

    Args:
        record: the file with the digests; ``done`` in ``folder`` by default.
    """
    record = folder / DONE if record is None else record
    try:
        digests = json.loads(read_regular(record) or b"{}")
        of_study = "digests" in digests
        digests = digests["digests"] if of_study else digests
        sealed = [name for name in names if of_study or name in digests]
        changed = next(
            (name for name in sealed if digests.get(name) != digest_of(folder / name)), None
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise RunError(f"cannot read {record.name} in {folder}: {why}") from error
    require(
        not changed,
        f"the {changed} that the run ended with",
        f"another in {folder}",
        "restoring it, or removing the folder and running it again",
        error=RunError,
        field=changed or "",
    )
