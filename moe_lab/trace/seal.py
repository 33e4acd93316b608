"""The seal of a trace: proof that this user's moe_lab wrote every byte of it.

``seal.json`` holds the digest of ``meta.json`` under a code that only this user can make: BLAKE2b
keyed with a secret in the cache folder. ``meta.json`` has the digest of the manifest, which has
those of the data; in traces of schema 1 and 2 the seal lists the data itself. Files under a seal
that holds are read directly; everything else is a trace from outside (``moe_lab.trace.foreign``). A
trace that moves to another machine or user, and one whose key was deleted, is from outside there.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.errors import MoELabError
from moe_lab.files import default_cache_dir, open_regular, read_regular, write_json
from moe_lab.trace.schema import META_FILE

SEAL_FILE = "seal.json"
KEY_FILE = "trace.key"
KEY_BYTES = 32
MAX_SEAL_BYTES = 2**24


def user_key() -> bytes | None:
    """This user's secret, made on first use; None where the cache folder takes no file.

    A key that others may read or write, or that belongs to another user, is not used.
    """
    path = default_cache_dir() / KEY_FILE
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{KEY_FILE}-{secrets.token_hex(8)}")
        if not path.exists():
            with open(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # the first of several processes wins
            temporary.unlink()
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            private = not hasattr(os, "getuid") or (
                found.st_uid == os.getuid() and not found.st_mode & 0o077
            )
            key = file.read(KEY_BYTES + 1)
        return key if private and len(key) == KEY_BYTES else None
    return None


def new_digest() -> Any:
    """The hash of a file's bytes."""
    return hashlib.blake2b(digest_size=32)


def digest(path: Path) -> str:
    """The digest of a file, in hexadecimal digits. Raises ``OSError``."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def write_seal(folder: Path) -> None:
    """Seal ``meta.json`` of ``folder``, and with it the files that it and the manifest list."""
    if not seal(folder / SEAL_FILE, {META_FILE: digest(folder / META_FILE)}):
        (folder / SEAL_FILE).unlink(missing_ok=True)


def sealed_files(folder: Path) -> dict[str, str] | None:
    """Digest by relative path of each file under the seal of ``folder``; None where there is no
    seal of this user's, or ``meta.json`` is not the sealed one.
    """
    files = unsealed(folder / SEAL_FILE)
    try:
        return files if files and digest(folder / META_FILE) == files[META_FILE] else None
    except (OSError, KeyError):
        return None


def seal(path: Path, files: Mapping[str, str]) -> bool:
    """Write names and digests to ``path`` under a code that only this user can make; False, and
    nothing is written, where this user has no key.
    """
    key = user_key()
    if key is not None:
        write_json(path, {"files": dict(files), "code": _code(key, files)})
    return key is not None


def unsealed(path: Path) -> dict[str, str] | None:
    """What ``seal`` wrote to ``path``; None where that is missing, or not by this user."""
    key = user_key()
    try:
        text = read_regular(path, MAX_SEAL_BYTES + 1)
        values: Any = json.loads(text) if len(text) <= MAX_SEAL_BYTES else None
        files, code = values["files"], values["code"]
        return files if key is not None and hmac.compare_digest(_code(key, files), code) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, MoELabError):
        return None


def _code(key: bytes, files: Mapping[str, str]) -> str:
    text = json.dumps(dict(files), sort_keys=True).encode()
    return hashlib.blake2b(text, key=key, digest_size=32).hexdigest()
