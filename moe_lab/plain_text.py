"""Text from files on its way to a terminal or a page: nothing in it may move the cursor, set the
clipboard, turn the direction of writing or stay invisible.
"""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONGEST_MESSAGE = 2000
LONGEST_ON_PAGE = 20_000
"""Characters of one name, message or cell on a page."""
_SUSPECT = re.compile(
    r"(\x1b\[[0-9;]{0,30}m)"  # a colour
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"  # control
    r"|[\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"  # format, bidi
    r"|[\ud800-\udfff\U000e0000-\U000e0fff]"  # unpaired, tags
)


def plain(text: str) -> str:
    """``text`` with control, format and unpaired characters written as escapes such as ``\\x1b``.

    Line ends, tabs, carriage returns and colours (``ESC [ numbers m``) stay.
    """
    return _SUSPECT.sub(_escaped, text)


def one_line(text: str, most: int = LONGEST_MESSAGE) -> str:
    """A message of one line and at most ``most`` characters, blanks joined."""
    return on_page(" ".join(text.split()), most)


def on_page(text: str, most: int = LONGEST_ON_PAGE) -> str:
    """``text`` as a page shows it: as ``plain`` writes it, colours as escapes too, at most ``most``
    characters.
    """
    shown = plain(text[: most + 1].replace("\x1b", "\\x1b"))
    return shown if len(shown) <= most else f"{shown[: most - 4]} ..."


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[1] is not None else ascii(match[0])[1:-1]


class PlainStream:
    """A text stream that writes ``plain`` text to another, ``raw``; other attributes are those of
    that stream.

    What moves the cursor itself (live bars) writes to ``raw``, and text from files ``on_page``.
    """

    def __init__(self, stream: Any) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        self.raw.write(plain(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def plain_output() -> Iterator[None]:
    """Standard output and standard error write plain text; what their encoding lacks is written as
    escapes.
    """
    streams = sys.stdout, sys.stderr
    texts = [stream for stream in streams if isinstance(stream, io.TextIOWrapper)]
    errors = [stream.errors for stream in texts]
    for stream in texts:
        stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = map(PlainStream, streams)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream, before in zip(texts, errors, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=before)
