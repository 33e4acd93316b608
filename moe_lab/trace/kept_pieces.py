"""What one command has fetched of traces on an object store, kept in a private temporary folder
until the command ends, so that figures that read the same columns fetch them once.

A kept piece is named by its digest and compared with it again when it is read: the folder is not
trusted. Equal columns of several files, such as the positions of every layer, are one piece.
Workers share the folder, and wait for each other where they read one file (``alone``). When
``most`` bytes are kept, no more are: readers go through the files in one order, so what was fetched
first is what is asked for first.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.trace.pieces import Piece

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows: two readers may fetch one piece
    fcntl = None  # type: ignore[assignment]

KEPT_BYTES = 4 * 2**30
"""At most, and half of what is free in the temporary folder."""
SHARE = 16
"""A process keeps this part of what is left before it looks at the folder again: so many processes
keep no more than ``most`` together.
"""


@dataclass(frozen=True)
class KeptPieces:
    """A folder of pieces that were fetched and compared.

    Attributes:
        folder: of this user alone.
        most: bytes of them, about.
        left: bytes that this process keeps before it looks at the folder again.
    """

    folder: Path
    most: int
    left: list[int] = field(default_factory=lambda: [0], repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptPieces, (self.folder, self.most)

    def read(self, piece: Piece) -> bytes | None:
        """The bytes of a piece; None: not kept, or not as it was."""
        with suppress(OSError):
            content = (self.folder / piece.digest.hex()).read_bytes()
            return content if piece.fits(content) else None
        return None

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Threads and processes that fetch from the file ``name`` wait until this ends, and then
        find kept what was fetched. A killed process keeps no other waiting.
        """
        with ExitStack() as stack:
            with suppress(OSError):  # workers on other machines have no such folder
                key = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
                file = stack.enter_context(open(self.folder / f"lock-{key}", "ab"))
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def keep(self, piece: Piece, content: bytes) -> None:
        """Keep the bytes of a piece, which were compared, while the limit allows it."""
        temporary = self.folder / f"new-{uuid.uuid4().hex}"
        with suppress(OSError):  # a full disk costs fetching again
            if self.left[0] < len(content):
                sizes = (entry.stat().st_size for entry in os.scandir(self.folder))
                self.left[0] = (self.most - sum(sizes)) // SHARE
            if self.left[0] >= len(content):
                self.left[0] -= len(content)
                temporary.write_bytes(content)
                temporary.replace(self.folder / piece.digest.hex())
                return
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
