"""A folder of an object store (an fsspec URL such as ``s3://bucket/sweep``; extra ``store``).

Every error of the store's client becomes a ``RunError`` of one line.

Objects appear whole or not at all, so nothing is renamed into place. Names are relative to the URL.
"""

import errno
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from moe_lab.errors import MoELabError, RunError, StorageError, expected
from moe_lab.files import check_name

CLOCK_SECONDS = 60.0
"""How long a reading of the store's clock is carried on by this process's own."""
DOWNLOADS = 3
"""How often an object is read that is replaced while it is read."""
_CREDENTIALS = (
    "permission",
    "credential",
    "forbidden",
    "denied",
    "unauthorized",
    "accesskey",
    "signature",
    "token",
    "badrequest",  # of Amazon, for an expired token, where the answer has no body
)
_AGAIN = "run the same command again to continue"
_SIGNATURE = (
    "size",
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
"""What clients call the size, the digest and the date of an object."""
_NETWORK = ("connect", "timeout", "timed out", "resolve", "unreachable", "endpoint")


class Bucket:
    """A folder of an object store. Its methods raise ``RunError`` for an unknown protocol, a
    missing package, wrong credentials, an unreachable or full store.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._files, self._root = _open(self.url)
        self._clock: tuple[float, float] | None = None  # this process's clock, the store's

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None if there is no such object."""
        with suppress(FileNotFoundError), self._one_line("read"):
            return self._files.cat_file(self._path(name))
        return None

    def ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of an object from the first to before the second number of each span, read in
        parallel as far as the store's client can; fewer where the object is shorter.

        Raises ``FileNotFoundError`` if there is no such object.
        """
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        with self._one_line("read"):
            found = self._files.cat_ranges([self._path(name)] * len(spans), starts, ends)
            for part in found:
                if isinstance(part, Exception):
                    raise part
        return found

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is no such object."""
        with suppress(FileNotFoundError), self._one_line("read"):
            self._files.invalidate_cache()
            return int(self._files.info(self._path(name))["size"])
        return None

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of the objects that exist, read in parallel as far as the store's client
        can.
        """
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        found = {}
        with self._one_line("read"):
            for path, content in self._files.cat(list(paths), on_error="return").items():
                if isinstance(content, bytes):
                    found[paths[path]] = content
                elif not isinstance(content, FileNotFoundError):
                    raise content
        return found

    def write(self, name: str, content: bytes) -> None:
        with self._one_line("write"):
            self._files.pipe_file(self._path(name), content)

    def upload(self, source: Path, name: str) -> None:
        """Copy the file ``source`` into the store. Raises ``FileNotFoundError`` if it is gone."""
        if not source.exists():
            raise FileNotFoundError(source)
        with self._one_line("write"):
            self._files.put_file(str(source), self._path(name))

    def download(self, name: str, target: Path) -> None:
        """Copy an object to the file ``target``, again where it was replaced meanwhile: clients
        read long objects, and those whose connection was cut, in several pieces.

        Raises ``FileNotFoundError`` if there is no such object.
        """
        check_name(name, self.url)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._one_line("read"):
            before = self._files.info(self._path(name))
            for _ in range(DOWNLOADS):
                self._files.get_file(self._path(name), str(target))
                after = self._files.info(self._path(name))
                if after == before:
                    return
                before = after
        raise StorageError(
            f"cannot read {self.url}: {name} was replaced {DOWNLOADS} times while it was read; "
            f"{_AGAIN}"
        )

    def names(self, folder: str) -> list[str]:
        """All objects below ``folder``, at any depth.

        Raises ``RunError`` for a name that could lead out of a folder it is copied to.
        """
        with self._one_line("list"):
            self._files.invalidate_cache()
            paths = self._files.find(self._path(folder))
        return [self._name(path) for path in paths]

    def sizes(self, folder: str) -> dict[str, int]:
        """All objects below ``folder``, with their bytes. Raises ``RunError`` as ``names``."""
        with self._one_line("list"):
            found = self._described(folder)
        return {name: int(info["size"]) for name, info in found.items()}

    def signatures(self, folder: str) -> dict[str, tuple[str, ...]]:
        """All objects below ``folder``, with what is another when one was written again.

        Raises ``RunError`` as ``names``.
        """
        with self._one_line("read"):
            found = self._described(folder)
        return {
            name: tuple(str(info.get(key)) for key in _SIGNATURE) for name, info in found.items()
        }

    def _described(self, folder: str) -> dict[str, dict[str, Any]]:
        """All objects below ``folder``, with what the client says of them."""
        self._files.invalidate_cache()
        found = self._files.find(self._path(folder), detail=True)
        return {self._name(path): info for path, info in found.items()}

    def _name(self, path: str) -> str:
        """The checked name of an object."""
        return check_name(str(path).removeprefix(self._root).removeprefix("/"), self.url)

    def rename(self, name: str, new: str) -> None:
        """Rename an object within the store. Renaming a missing object is not an error."""
        with suppress(FileNotFoundError), self._one_line("rename in"):
            self._files.mv(self._path(name), self._path(new))

    def delete(self, names: Iterable[str]) -> None:
        """Deleting a missing object is not an error."""
        for name in names:
            with suppress(FileNotFoundError), self._one_line("remove from"):
                self._files.rm_file(self._path(name))

    def age(self, name: str) -> float | None:
        """Seconds since an object was written, by the store's own clock; None: no such object."""
        with suppress(FileNotFoundError), self._one_line("read"):
            self._files.invalidate_cache()
            return self._now() - self._files.modified(self._path(name)).timestamp()
        return None

    def _now(self) -> float:
        """The store's time: that of an object written just now, carried on by this process's clock.

        No two machines are compared.
        """
        if self._clock is None or time.monotonic() - self._clock[0] > CLOCK_SECONDS:
            name = f"clock/{uuid.uuid4().hex}"
            self.write(name, b"")
            with self._one_line("read"):
                self._clock = time.monotonic(), self._files.modified(self._path(name)).timestamp()
            self.delete([name])
        began, store = self._clock
        return store + time.monotonic() - began

    def check_writable(self) -> None:
        """Raise ``RunError`` if an object of 64 KiB cannot be written."""
        name = f"clock/{uuid.uuid4().hex}"
        self.write(name, b" " * 65536)
        self.delete([name])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _one_line(self, action: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if action in ("write", "list"):
                why = f"no such bucket or folder ({_cause(error)}); try another URL"
                raise StorageError(f"cannot {action} {self.url}: {why}") from error
            raise
        except MoELabError:
            raise
        except Exception as error:  # every client has exceptions of its own
            raise StorageError(
                f"cannot {action} {self.url}: {_cause(error)}; {_advice(error)}"
            ) from error


def folder_of(place: Path | str) -> Path | None:
    """The folder that a path or a ``file://`` URL names; None: a URL of an object store."""
    protocol, mark, path = str(place).partition("://")
    if not mark:
        return Path(place)
    return Path(unquote(path)) if protocol in ("file", "local") else None


def _open(url: str) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise RunError(
            expected("the package fsspec", "none", "pip install 'moe_lab[store]'"), field="fsspec"
        ) from error
    try:
        files, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise RunError(
            expected(
                f"the package that opens {protocol}://",
                _cause(error),
                f"pip install it beside fsspec for {url}",
            ),
            field="store",
        ) from error
    except ValueError as error:
        known = ", ".join(
            name
            for name in ("s3", "gs", "az", "hf", "sftp")
            if name in fsspec.available_protocols()
        )
        raise RunError(
            expected(
                f"a folder or a URL that fsspec knows ({known}, ...)", f"{url} ({_cause(error)})"
            ),
            field="store",
        ) from error
    except Exception as error:
        raise RunError(f"cannot open {url}: {_cause(error)}; {_advice(error)}") from error
    return files, str(root).rstrip("/")


def _cause(error: BaseException) -> str:
    """One line: what the store said last, with the kind of error where that alone would say
    nothing.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    line = line.removesuffix(".")
    return line if len(line.split()) > 2 else f"{type(error).__name__}{line and ': '}{line}"


def _advice(error: BaseException) -> str:
    said = f"{type(error).__name__} {error}".lower().replace(" ", "")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "try another store or free some space"
    if isinstance(error, PermissionError) or any(word in said for word in _CREDENTIALS):
        return (
            "try other credentials (these may be wrong or have expired), or ask for the right to "
            "list, read and write there"
        )
    if isinstance(error, ConnectionError | TimeoutError) or any(
        word.replace(" ", "") in said for word in _NETWORK
    ):
        return "check the network and the endpoint, then run the same command again"
    return _AGAIN
