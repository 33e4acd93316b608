"""What ``done`` says of the files that a finished run left: a digest of each, so that an edited run
is noticed when it is loaded, judged or continued.

``done`` of an older version is empty; its run is taken as it is.
"""

import hashlib
import json
from pathlib import Path

from moe_lab.errors import RunError, expected
from moe_lab.runs.layout import CONFIG, DONE, RESULT

SEALED = (CONFIG, RESULT)


def seal(folder: Path) -> str:
    """The content of ``done`` for the files that lie in ``folder`` now."""
    return json.dumps({name: _digest(folder / name) for name in SEALED}) + "\n"


def check_seal(folder: Path) -> None:
    """Raise ``RunError`` if a sealed file of the finished run in ``folder`` was changed."""
    try:
        digests = json.loads((folder / DONE).read_bytes() or b"{}")
        sealed = [name for name in SEALED if name in digests]
        changed = next((name for name in sealed if digests[name] != _digest(folder / name)), None)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"cannot read {DONE} in {folder}: {str(error).splitlines()[0]}") from error
    if changed:
        got = f"another in {folder}"
        hint = "restoring it, or removing the folder and running it again"
        raise RunError(expected(f"the {changed} that the run ended with", got, hint))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
