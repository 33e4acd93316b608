"""Corpora: named documents, kept apart, with a content hash. A source goes in, a ``Corpus`` comes
out.

The default corpus is the Python source of the running interpreter's standard library: real text
that is on every machine. It differs between interpreter versions, so every corpus records the hash
of what it holds. Nothing here touches the network.
"""

import codecs
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TypeAlias

from moe_lab.errors import CorpusError, expected, require
from moe_lab.files import content_hash, open_regular
from moe_lab.sandbox import read_parquet

STDLIB = "stdlib"
PACKAGES = "packages"

# What the corpus "packages" reads beside the standard library: the required packages of moe_lab
# that have much Python source, and what these require. Generated sources (plotly's) are left out.
SOURCE_PACKAGES = (
    "jinja2",
    "mpmath",
    "networkx",
    "numpy",
    "polars",
    "rich",
    "scipy",
    "sympy",
    "torch",
)

# Folders of the standard library that hold no ordinary source: test suites, generated tables,
# demonstrations, pages of help.
STDLIB_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "encodings",
        "turtledemo",
        "pydoc_data",
        "site-packages",
        "dist-packages",
    }
)

OWN_TEXT = "a folder of your own text, a .txt, a .jsonl or a .parquet file"


Text: TypeAlias = "tuple[Document, Callable[[], str]]"
"""A document and how to read its text again."""


class Split(StrEnum):
    """The three parts of a corpus.

    ``reference`` gives frequencies and n-gram counts; no model trains on it.
    """

    TRAIN = "train"
    VALIDATION = "validation"
    REFERENCE = "reference"


VALIDATION_SHARE = 0.2
REFERENCE_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Document:
    """One text.

    ``name`` is its path in the corpus (``json/decoder.py``) or its row (``data.jsonl:7``); ``hash``
    is of the text. Documents of one name and text are equal.
    """

    name: str
    text: str

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Document) and (self.name, self.hash) == (other.name, other.hash)

    def __hash__(self) -> int:
        return hash((self.name, self.hash))


class _StoredDocument(Document):
    """A text that stays where it lies and is read at each use: a corpus may be larger than memory.

    Raises ``CorpusError`` where it was changed since.
    """

    def __init__(self, document: Document, read: Callable[[], str]) -> None:
        self.__dict__.update(name=document.name, hash=document.hash, _read=read)

    @property
    def text(self) -> str:  # type: ignore[override]
        found = Document(self.name, self.__dict__["_read"]())
        if found.hash != self.hash:
            what = f"the text of {self.name} that the corpus was loaded with"
            raise CorpusError(expected(what, "another", "starting again"))
        return found.text


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, no text twice; ``num_repeated`` texts of the source were left out
    because they repeat another, ``num_blank`` because they hold white space alone.

    ``hash`` changes with any name or text, not with where the corpus lies.
    """

    documents: tuple[Document, ...]
    source: str
    num_repeated: int = field(default=0, compare=False)
    num_blank: int = field(default=0, compare=False)

    @cached_property
    def hash(self) -> str:
        return content_hash([[document.name, document.hash] for document in self.documents])

    def split(self, seed: int = 0) -> dict[Split, tuple[Document, ...]]:
        """Train, validation and reference documents, 70/20/10 by count, each in corpus order and
        never empty.

        The part a document falls into depends on its own hash and ``seed``, not on its name or
        place. Raises ``CorpusError`` for fewer than three documents.
        """
        total = len(self.documents)
        require(
            total >= len(Split),
            "at least 3 documents to split into train, validation and reference",
            f"{total} in {self.source}",
            "a folder of several files, or a .jsonl with one text a line",
            error=CorpusError,
            field="documents",
        )
        num_validation, num_reference = (
            max(1, round(VALIDATION_SHARE * total)),
            max(1, round(REFERENCE_SHARE * total)),
        )
        ranked = sorted(
            range(total),
            key=lambda index: hashlib.sha256(
                f"{seed}:{self.documents[index].hash}".encode()
            ).digest(),
        )
        part = dict.fromkeys(ranked[:num_validation], Split.VALIDATION)
        part |= dict.fromkeys(
            ranked[num_validation : num_validation + num_reference], Split.REFERENCE
        )
        return {
            split: tuple(
                document
                for index, document in enumerate(self.documents)
                if part.get(index, Split.TRAIN) is split
            )
            for split in Split
        }


def load_corpus(source: str | os.PathLike[str] = STDLIB, text_column: str = "text") -> Corpus:
    """Read a corpus.

    Args:
        source: ``"stdlib"``, the Python sources of the standard library; ``"packages"``, these and
            the sources of ``SOURCE_PACKAGES`` (write ``"./stdlib"`` for a folder of that name); a
            folder, each of its files one document, recursively, leaving out names that begin with
            a dot, ``__pycache__`` and links to folders; a ``.txt`` file, one document; a
            ``.jsonl`` file, one object a line; a ``.parquet`` file, one text a row.
        text_column: the field or column that holds the text of a ``.jsonl`` or ``.parquet`` file.

    Documents come sorted by name (rows in file order); blank ones are left out, and of equal texts
    the first is kept. Raises ``CorpusError`` where the source is missing, unreadable, binary,
    malformed or holds no text.
    """
    source = os.fspath(source)
    if source == STDLIB:
        return _corpus(_read_folder(_stdlib_files()), source)
    if source == PACKAGES:
        files = [file for name in SOURCE_PACKAGES for file in _package_files(name)]
        return _corpus(_read_folder(sorted([*_stdlib_files(), *files])), source)
    path = Path(source)
    if path.is_dir():
        files = _folder_files(path)
        _refuse_links_out(path, files)
        return _corpus(_read_folder(files), source)
    require(
        path.exists(),
        '"stdlib", "packages" or the path of a text',
        f"{source}, which does not exist",
        OWN_TEXT,
        error=CorpusError,
        field="corpus",
    )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise CorpusError(
            expected(
                f"a folder or a file ending in {', '.join(READERS)}",
                source,
                "a folder that holds the file",
            )
        )
    return _corpus(reader(path, text_column), source)


def _corpus(texts: Iterator[Text], source: str) -> Corpus:
    kept: dict[str, Document] = {}
    repeated = blank = 0
    for document, read in texts:
        if not document.text.strip():
            blank += 1
            continue
        stored = _StoredDocument(document, read)
        repeated += kept.setdefault(document.hash, stored) is not stored
    require(kept, "text", f"none in {source}", OWN_TEXT, error=CorpusError, field="documents")
    return Corpus(tuple(kept.values()), source, repeated, blank)


def _stdlib_files() -> list[tuple[str, str]]:
    """(name, path) of the Python sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # The interpreter's own list of its modules leaves out its test suite, build configuration and
    # installed packages.
    files = [
        (name, path)
        for name, path in _folder_files(root, skipped=STDLIB_SKIPPED)
        if name.endswith(".py")
        and name.partition("/")[0].removesuffix(".py") in sys.stdlib_module_names
    ]
    require(
        files,
        f"the standard library's Python sources in {root}",
        "none",
        OWN_TEXT,
        error=CorpusError,
        field="corpus",
    )
    return files


def _package_files(package: str) -> list[tuple[str, str]]:
    """(name, path) of the Python sources of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CorpusError(
            expected(f'the installed package {package} for the corpus "packages"', "none", OWN_TEXT)
        )
    root = Path(spec.submodule_search_locations[0])
    files = _folder_files(root, skipped=STDLIB_SKIPPED)
    return [(f"{package}/{name}", path) for name, path in files if name.endswith(".py")]


def _folder_files(root: Path, skipped: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    """(name, path) of the regular files under ``root``, by name.

    Links to folders are not followed, so loops cannot occur.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(
            expected("a readable folder", f"{error.filename}: {error.strerror}")
        ) from error

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=False):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and name not in skipped
        ]
        paths = (os.path.join(folder, name) for name in names if not name.startswith("."))
        found += [
            (_name(os.path.relpath(path, root)), path) for path in paths if os.path.isfile(path)
        ]
    return sorted(found)


def _refuse_links_out(root: Path, files: list[tuple[str, str]]) -> None:
    """A folder from elsewhere must not put another file of this machine into a model or a page."""
    inside = root.resolve()
    for name, path in files:
        if os.path.islink(path) and not Path(path).resolve().is_relative_to(inside):
            got = f"{name}, a link out of {root}"
            raise CorpusError(expected("files of the folder itself", got, "a copy of that file"))


def _name(path: str) -> str:
    """A relative path as text anyone can store: with slashes, and U+FFFD for what is not UTF-8."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", errors="replace")


def _read_folder(files: list[tuple[str, str]]) -> Iterator[Text]:
    for name, path in files:
        read = partial(_read_text, Path(path))
        yield Document(name, read()), read


def _read_text(path: Path) -> str:
    with _opened(path) as file:
        data = file.read()
    return _decoded(data.removeprefix(codecs.BOM_UTF8), path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise CorpusError(expected("a readable file", f"{path}: {error.strerror}")) from error


def _decoded(data: bytes, path: Path, start: int = 0) -> str:
    """Text of a part of a file that begins at byte ``start``."""
    hint = "converting it to UTF-8 or moving it out of the corpus"
    require(b"\0" not in data, "text", f"a binary file: {path}", hint, error=CorpusError)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        got = f"{path}, which is not at byte {start + error.start}"
        raise CorpusError(expected("UTF-8 text", got, hint)) from error


def _read_txt(path: Path, text_column: str) -> Iterator[Text]:
    return _read_folder([(path.name, str(path))])


def _read_jsonl(path: Path, text_column: str) -> Iterator[Text]:
    # Split at line feeds alone: JSON strings may hold the other line separators of Unicode.
    with _opened(path) as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if line.strip():
                document = _of_line(path, number, _decoded(line, path, start), text_column)
                yield document, partial(_read_line, path, number, start, len(line), text_column)
            start += len(line)


def _read_line(path: Path, number: int, start: int, length: int, text_column: str) -> str:
    with _opened(path) as file:
        file.seek(start)
        line = file.read(length)
    return _of_line(path, number, _decoded(line, path, start), text_column).text


def _of_line(path: Path, number: int, line: str, text_column: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        got = f"{path}:{number}, which does not parse: {error}"
        raise CorpusError(expected("one JSON object a line", got)) from error
    if not isinstance(row, dict) or text_column not in row:
        found = (
            f"with the fields {', '.join(row) or '(none)'}"
            if isinstance(row, dict)
            else f"of type {type(row).__name__}"
        )
        what, hint = f'an object with the field "{text_column}"', "another text_column"
        raise CorpusError(expected(what, f"{path}:{number} {found}", hint))
    return _row(path, number, row[text_column])


def _read_parquet(path: Path, text_column: str) -> Iterator[Text]:
    frame = read_parquet(path, CorpusError)
    require(
        text_column in frame.columns,
        f'a column "{text_column}"',
        f"{path} with the columns {', '.join(frame.columns) or '(none)'}",
        "another text_column",
        error=CorpusError,
        field="text_column",
    )
    if (dtype := str(frame.schema[text_column])) != "String":
        raise CorpusError(
            expected(
                f'text in column "{text_column}"', f"{path} with {dtype}", "another text_column"
            ),
            field="text_column",
        )
    column = frame[text_column]  # compact, and made into Python's text row by row
    for place, value in enumerate(column):
        yield _row(path, place + 1, value), partial(column.item, place)


def _row(path: Path, number: int, value: object) -> Document:
    name = f"{path.name}:{number}"
    if value is None:
        return Document(name=name, text="")
    if not isinstance(value, str):
        raise CorpusError(
            expected("text", f"{path}:{number} with {type(value).__name__}", "another text_column")
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            expected(
                "UTF-8 text", f"{path}:{number} with a lone surrogate at character {error.start}"
            )
        ) from error
    require("\0" not in value, "text", f"{path}:{number} with a NUL character", error=CorpusError)
    return Document(name=name, text=value)


READERS: dict[str, Callable[[Path, str], Iterator[Text]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
