"""C++ of the package as a shared library: compiled once per machine and user, kept in a folder
of this user alone in the cache folder.

The compiler is ``$CXX``, ``c++``, ``g++`` or ``clang++``. A library is named by its source and the
headers beside it, flags, compiler and processor, so that machines that share a home folder do not
share code that only one of them can run.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moe_lab.errors import RunError
from moe_lab.files import atomic_path, default_cache_dir, private_folder

SWITCH = "MOE_LAB_NATIVE"
"""Environment variable that switches all of it off when it is 0."""


class NoCompilerError(Exception):
    """There is no C++ compiler on this machine."""


def load(source: Path, flags: Sequence[str], what: str) -> ctypes.CDLL | str:
    """The library of ``source``, or the reason why it cannot be had: that ``what`` could not be
    compiled, or ``SWITCH``. A file of the cache that cannot be loaded is compiled again.
    """
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        path = shared_library(source, flags)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut off by a full disk, for example
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(shared_library(source, flags)))
    except (OSError, RunError, subprocess.SubprocessError, NoCompilerError) as error:
        return f"{what} could not be compiled: {_reason(error)}"


def shared_library(source: Path, flags: Sequence[str]) -> Path:
    """The shared library of ``source``, compiled if it is not in the cache.

    Raises:
        NoCompilerError, OSError, RunError, subprocess.SubprocessError: it cannot be had.
    """
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))),
        None,
    )
    if compiler is None:
        raise NoCompilerError("no C++ compiler found (set CXX, or install g++)")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    texts = [
        path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))
    ]
    parts = (*texts, " ".join(flags), compiler, version, processor())
    name = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]
    cache = default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    folder = private_folder(cache / f"native-{user}")  # a library runs as who loads it
    path = folder / f"{source.stem}-{name}.so"
    if not path.exists():
        with atomic_path(path) as temporary:
            command = [compiler, *flags, str(source), "-o", str(temporary)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return path


def _reason(error: Exception) -> str:
    """Why ``shared_library`` raised, in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        return " ".join((error.stderr or "").strip().splitlines()[:1])
    return str(error)


def processor() -> str:
    """The properties of the processor that ``-march=native`` depends on: different machines may
    share a home folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = {
        line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))
    }
    return "\n".join([platform.machine(), platform.processor(), *sorted(named)])
