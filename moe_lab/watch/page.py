"""The page that is watched, as a browser gets it: empty and asking for its parts, or one file with
all of them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from moe_lab.files import write_text
from moe_lab.number_format import short_path
from moe_lab.report.document import document, script_json
from moe_lab.watch.board import Board

POLL_SECONDS = 2.0
SECTIONS = (
    ("alarms", "Alarms", "Alarms"),
    ("curves", "Training", "Training"),
    ("run", "One run", "One run, by layer"),
    ("frontier", "Frontier", "The frontier so far"),
    ("runs", "Runs", "Runs"),
    ("failures", "Failures", "Failures, with their last lines"),
)
"""Anchor, name in the navigation, heading."""


def live_page(place: str) -> tuple[bytes, str]:
    """The page that asks the server that it came from for what changed, and the content security
    policy to send with it.
    """
    text = _page(place, POLL_SECONDS, {})
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    return text.encode(errors="replace"), f"{policy[1]}; frame-ancestors 'none'"


def write_page(board: Board, path: Path | str) -> Path:
    """Write the page as one file, as the place is now. Raises ``StorageError`` where it cannot be
    written.

    Returns:
        ``path``.
    """
    board.refresh(None)
    write_text(path, _page(board.place.name, 0.0, board.held()))
    return Path(path)


def _page(place: str, seconds: float, held: Mapping[str, Mapping[str, str]]) -> str:
    """``held``: the JSON texts that the page carries, by name; of a page that asks for nothing
    (``seconds`` 0) all of them.
    """
    groups = (
        f"{script_json(group)}:{_object(held.get(group, {}))}" for group in ("parts", "views")
    )
    return document(
        "watch.html.j2",
        ("theme.js", "watch.js"),
        package="moe_lab.watch",
        title=f"moe_lab watch: {place if '://' in place else short_path(place)}",
        connect=Markup("'self'" if seconds else "'none'"),
        sections=SECTIONS,
        initial=Markup(f'{{"seconds":{seconds},{",".join(groups)}}}'),
    )


def _object(texts: Mapping[str, str]) -> str:
    """The JSON object of JSON texts."""
    return f"{{{','.join(f'{script_json(name)}:{text}' for name, text in texts.items())}}}"
