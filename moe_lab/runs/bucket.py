"""A folder of an object store (an fsspec URL such as ``s3://bucket/sweep``; extra ``store``).

Every error of the store's client becomes a ``RunError`` of one line, within a bounded time.

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
CALL_SECONDS, SLOWEST = 600.0, 50_000.0
"""A call of the store's client, its repetitions included, takes so many seconds at most and a
second more for so many bytes: its own limits hold for the silence between two bytes.
"""
READ_AT_ONCE = 256
"""Objects of one call."""
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
_FULL = "try another store or free some space"
_ADVICE = (
    (("quotaexceeded", "storagefull"), _FULL),
    (("requesttime",), "set the clock of this machine"),
    (
        # botocore follows a redirection to the same server until Python's recursion ends
        ("theregion", "redirect", "specifiedendpoint", "recursion"),
        "try the bucket's own region (AWS_DEFAULT_REGION) or endpoint (AWS_ENDPOINT_URL)",
    ),
    (("certificate",), "try the certificate of its authority (AWS_CA_BUNDLE)"),
    (
        ("profilenotfound", "invalidregion", "configparse"),
        "try other settings of the client (AWS_PROFILE, AWS_DEFAULT_REGION, AWS_CONFIG_FILE)",
    ),
    (
        # badrequest: of Amazon, for an expired token, where the answer has no body
        (
            *("permission", "credential", "forbidden", "denied", "unauthorized", "accesskey"),
            *("signature", "expired", "invalidtoken", "badrequest"),
        ),
        "try other credentials (these may be wrong or have expired), or ask for the right to "
        "list, read and write there",
    ),
    (
        ("connect", "brokenpipe", "timeout", "timedout", "resolve", "unreachable", "endpoint"),
        "check the network and the endpoint, then run the same command again",
    ),
)
"""What is advised for words in what the client said, without blanks: the first that fits."""


class Bucket:
    """A folder of an object store. Its methods raise ``RunError`` for an unknown protocol, a
    missing package, wrong credentials, an unreachable or full store.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if {".", ".."} & set(self.url.split("/")):  # clients send another name than they list
            raise RunError(expected("a URL without the names . and ..", url), field="store")
        self._files, self._root = _open(self.url)
        self._clock: tuple[float, float] | None = None  # this process's clock, the store's

    def read(self, name: str, size: int = 0) -> bytes | None:
        """The bytes of an object, about ``size``; None if there is no such object."""
        with suppress(FileNotFoundError), self._one_line("read"):
            return self._call("cat_file", self._path(name), size=size)
        return None

    def ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of an object from the first to before the second number of each span, read in
        parallel as far as the store's client can; fewer where the object is shorter.

        Raises ``FileNotFoundError`` if there is no such object.
        """
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        paths, size = [self._path(name)] * len(spans), sum(ends) - sum(starts)
        found = []
        with self._one_line("read"):
            for part in self._call("cat_ranges", paths, starts, ends, size=size):
                if isinstance(part, OSError) and part.errno == errno.EINVAL:
                    part = b""  # InvalidRange: it begins behind the end of the object
                if isinstance(part, Exception):
                    raise part
                found.append(part)
        return found

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if there is no such object."""
        with suppress(FileNotFoundError), self._one_line("read"):
            self._files.invalidate_cache()
            return int(self._call("info", self._path(name))["size"])
        return None

    def read_many(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of the objects that exist, read in parallel as far as the store's client
        can.
        """
        names, found = list(names), {}
        with self._one_line("read"):
            for first in range(0, len(names), READ_AT_ONCE):
                some = names[first : first + READ_AT_ONCE]
                paths = [self._path(name) for name in some]
                contents = self._call("cat_ranges", paths, None, None)
                for name, content in zip(some, contents, strict=True):
                    if isinstance(content, bytes):
                        found[name] = content
                    elif not isinstance(content, FileNotFoundError):
                        raise content
        return found

    def write(self, name: str, content: bytes) -> None:
        with self._one_line("write"):
            self._call("pipe_file", self._path(name), content, size=len(content))

    def upload(self, source: Path, name: str) -> None:
        """Copy the file ``source`` into the store. Raises ``FileNotFoundError`` if it is gone."""
        if not source.exists():
            raise FileNotFoundError(source)
        with self._one_line("write"):
            size = source.stat().st_size
            self._call("put_file", str(source), self._path(name), size=size)

    def download(self, name: str, target: Path) -> None:
        """Copy an object to the file ``target``, again where it was replaced meanwhile, or came
        short: clients read long objects, and those whose connection was cut, in several pieces.

        Raises ``FileNotFoundError`` if there is no such object.
        """
        check_name(name, self.url)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._one_line("read"):
            path = self._path(name)
            before = self._call("info", path)
            for _ in range(DOWNLOADS):
                self._call("get_file", path, str(target), size=before["size"] or 0)
                after = self._call("info", path)
                if after == before and after["size"] in (None, target.stat().st_size):
                    return
                before = after
        raise StorageError(
            f"cannot read {self.url}: {name} was replaced or cut short {DOWNLOADS} times while it "
            f"was read; {_AGAIN}"
        )

    def names(self, folder: str) -> list[str]:
        """All objects below ``folder``, at any depth.

        Raises ``RunError`` for a name that could lead out of a folder it is copied to.
        """
        with self._one_line("list"):
            return list(self._described(folder))

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
        """All objects below ``folder``, with what the client says of them. A name that ends in a
        slash is the mark of a folder, which consoles and other tools leave.
        """
        self._files.invalidate_cache()
        found = self._call("find", self._path(folder), detail=True)
        return {self._name(path): info for path, info in found.items() if path[-1:] != "/"}

    def _name(self, path: str) -> str:
        """The checked name of an object."""
        return check_name(str(path).removeprefix(self._root).removeprefix("/"), self.url)

    def rename(self, name: str, new: str) -> None:
        """Rename an object within the store. Renaming a missing object is not an error."""
        with suppress(FileNotFoundError), self._one_line("rename in"):
            self._call("cp_file", self._path(name), self._path(new))
            self._call("rm_file", self._path(name))

    def delete(self, names: Iterable[str]) -> None:
        """Deleting a missing object is not an error."""
        for name in names:
            with suppress(FileNotFoundError), self._one_line("remove from"):
                self._call("rm_file", self._path(name))

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

    def _call(self, method: str, *args: Any, size: int = 0, **options: Any) -> Any:
        """What a method of the store's client gives, for at most ``size`` bytes. None of them takes
        a path for a pattern. Where the client waits, its waiting is ended.
        """
        waiting = getattr(self._files, f"_{method}", None) if self._files.async_impl else None
        if waiting is None:
            return getattr(self._files, method)(*args, **options)
        from fsspec.asyn import sync

        limit = CALL_SECONDS + size / SLOWEST
        try:
            return sync(self._files.loop, waiting, *args, timeout=limit, **options)
        except TimeoutError as error:
            raise TimeoutError(f"no end of the answer within {limit:.0f} s") from error

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
    if text.endswith("None"):  # an answer without a sentence, as Ceph's
        text = _code(error)
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    line = line.removesuffix(".")
    return line if len(line.split()) > 2 else f"{type(error).__name__}{line and ': '}{line}"


def _code(error: BaseException) -> str:
    """What the store calls the error, as botocore keeps it; empty where it is not known."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code") or "")


def _advice(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _FULL
    said = f"{type(error).__name__} {error} {_code(error)}".lower().replace(" ", "")
    return next(
        (advice for words, advice in _ADVICE if any(word in said for word in words)), _AGAIN
    )
