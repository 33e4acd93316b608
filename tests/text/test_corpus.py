import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import CorpusError
from moe_lab.text import Corpus, Document, Split, load_corpus


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def corpus_of(count: int) -> Corpus:
    return Corpus(
        documents=tuple(
            Document(name=f"{index:03}.txt", text=f"text {index}") for index in range(count)
        ),
        source="made",
    )


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus()


def test_stdlib_corpus_holds_the_running_interpreters_sources(stdlib):
    texts = {document.name: document.text for document in stdlib.documents}
    assert texts["json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")
    assert len(texts) > 300
    assert sum(map(len, texts.values())) > 5e6


def test_stdlib_corpus_leaves_out_tests_tables_and_installed_packages(stdlib):
    folders = {part for document in stdlib.documents for part in Path(document.name).parts[:-1]}
    assert folders.isdisjoint(
        {"test", "tests", "idle_test", "encodings", "site-packages", "turtledemo", "__pycache__"}
    )
    assert not any(document.name.startswith("_sysconfigdata") for document in stdlib.documents)
    assert all(document.name.endswith(".py") for document in stdlib.documents)


def test_stdlib_corpus_is_the_same_twice(stdlib):
    assert load_corpus().hash == stdlib.hash
    assert [document.name for document in load_corpus().documents] == sorted(
        document.name for document in stdlib.documents
    )


def test_interpreter_without_sources_is_told(tmp_path, monkeypatch):
    write(tmp_path / "json" / "decoder.pyc", b"\0\1")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with refused("corpus", CorpusError):
        load_corpus("stdlib")


def test_folder_gives_one_document_a_file_named_by_relative_path_and_sorted(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.md", "first")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / ".hidden", "hidden")
    write(tmp_path / "__pycache__" / "x.pyc", b"\0")
    corpus = load_corpus(tmp_path)
    assert [(document.name, document.text) for document in corpus.documents] == [
        ("a/z.md", "first"),
        ("b.txt", "second"),
    ]
    assert corpus.source == str(tmp_path)


def test_content_hash_ignores_the_place_and_follows_names_and_texts(tmp_path):
    for folder in ("one", "two", "renamed", "edited"):
        write(tmp_path / folder / "a.txt", "alpha")
        write(tmp_path / folder / "b.txt", "beta")
    (tmp_path / "renamed" / "b.txt").rename(tmp_path / "renamed" / "c.txt")
    write(tmp_path / "edited" / "b.txt", "beta!")
    hashes = [load_corpus(tmp_path / folder).hash for folder in ("one", "two", "renamed", "edited")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_equal_texts_are_kept_once_and_blank_ones_left_out(tmp_path):
    for name, text in {
        "a.txt": "same",
        "b.txt": "same",
        "c.txt": " \n",
        "d.txt": "",
        "e.txt": "other",
    }.items():
        write(tmp_path / name, text)
    assert [document.name for document in load_corpus(tmp_path).documents] == ["a.txt", "e.txt"]


def test_links_that_loop_are_not_followed(tmp_path):
    write(tmp_path / "a.txt", "alpha")
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink(tmp_path / "self", tmp_path / "self")
    os.symlink(tmp_path / "gone", tmp_path / "dangling")
    os.mkfifo(tmp_path / "pipe")
    assert [document.name for document in load_corpus(tmp_path).documents] == ["a.txt"]


def test_file_names_that_are_not_utf8_are_named_all_the_same(tmp_path):
    with open(os.fsencode(tmp_path) + b"/a\xff.txt", "w") as file:
        file.write("alpha")
    assert [document.name for document in load_corpus(tmp_path).documents] == ["a\ufffd.txt"]


def test_byte_order_mark_is_not_text(tmp_path):
    assert load_corpus(write(tmp_path / "a.txt", b"\xef\xbb\xbfalpha")).documents == (
        Document(name="a.txt", text="alpha"),
    )


def test_line_endings_are_kept(tmp_path):
    assert (
        load_corpus(write(tmp_path / "a.txt", "one\r\ntwo\r")).documents[0].text == "one\r\ntwo\r"
    )


def test_jsonl_gives_one_document_a_line(tmp_path):
    separator = "\u2028"
    rows = [
        '{"text": "alpha"}',
        "",
        json.dumps({"text": f"be{separator}ta", "n": 1}, ensure_ascii=False),
        '{"text": null}',
    ]
    documents = load_corpus(write(tmp_path / "rows.jsonl", "\n".join(rows))).documents
    assert [(document.name, document.text) for document in documents] == [
        ("rows.jsonl:1", "alpha"),
        ("rows.jsonl:3", "be\u2028ta"),
    ]


def test_parquet_gives_one_document_a_row(tmp_path):
    path = tmp_path / "rows.parquet"
    pl.DataFrame({"body": ["alpha", None, "beta"], "n": [1, 2, 3]}).write_parquet(path)
    documents = load_corpus(path, text_column="body").documents
    assert [(document.name, document.text) for document in documents] == [
        ("rows.parquet:1", "alpha"),
        ("rows.parquet:3", "beta"),
    ]


BAD_FILES = {
    "nul.txt": (
        b"ab\0c",
        "expected text, got a binary file: {path}; try converting it to UTF-8 or moving it out "
        "of the corpus",
    ),
    "latin.txt": (
        "é".encode("latin-1"),
        "expected UTF-8 text, got {path}, which is not at byte 0; try",
    ),
    "blank.txt": (b" \n", "expected text, got none in {path}; try a folder of your own text"),
    "empty.jsonl": (b"", "expected text, got none in {path}"),
    "torn.jsonl": (
        b'{"text": "a"}\n{"text": ',
        "expected one JSON object a line, got {path}:2, which does not parse: ",
    ),
    "deep.jsonl": (
        b"[" * 200_000,
        "expected one JSON object a line, got {path}:1, which does not parse: ",
    ),
    "field.jsonl": (
        b'{"body": "a"}',
        'expected an object with the field "text", got {path}:1 with the fields body; try another',
    ),
    "list.jsonl": (
        b"[1]",
        'expected an object with the field "text", '
        "got {path}:1 of type list; try another text_column",
    ),
    "type.jsonl": (b'{"text": 3}', "expected text, got {path}:1 with int; try another text_column"),
    "half.jsonl": (
        b'{"text": "a\\ud800"}',
        "expected UTF-8 text, got {path}:1 with a lone surrogate at character 1",
    ),
    "nul.jsonl": (b'{"text": "a\\u0000"}', "expected text, got {path}:1 with a NUL character"),
    "torn.parquet": (b"PAR1 no", "{path}: expected a readable file, got "),
    "picture.png": (
        b"png",
        "expected a folder or a file ending in .txt, .jsonl, .parquet, "
        "got {path}; try a folder that holds the file",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_in_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(CorpusError, match=re.escape(message.format(path=path))) as raised:
        load_corpus(path)
    assert "\n" not in str(raised.value)


def test_binary_file_in_a_folder_is_named(tmp_path):
    write(tmp_path / "a.txt", "alpha")
    bad = write(tmp_path / "deep" / "b.bin", b"\x00\x01")
    with pytest.raises(CorpusError, match=re.escape(f"got a binary file: {bad}; try")):
        load_corpus(tmp_path)


def test_parquet_without_the_text_column_lists_what_it_has(tmp_path):
    path = tmp_path / "rows.parquet"
    pl.DataFrame({"body": ["alpha"], "n": [1]}).write_parquet(path)
    with refused("text_column", CorpusError):
        load_corpus(path)
    with refused("text_column", CorpusError):
        load_corpus(path, text_column="n")


def test_missing_path_is_told(tmp_path):
    with refused("corpus", CorpusError):
        load_corpus(tmp_path / "nowhere")


def test_empty_folder_is_told(tmp_path):
    with refused("documents", CorpusError):
        load_corpus(tmp_path)


def test_unreadable_file_and_folder_are_told(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "alpha")

    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr("moe_lab.text.corpus.open_regular", refuse)
        with pytest.raises(
            CorpusError, match=re.escape(f"expected a readable file, got {path}: Permission denied")
        ):
            load_corpus(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        CorpusError,
        match=re.escape(f"expected a readable folder, got {tmp_path}: Permission denied"),
    ):
        load_corpus(tmp_path)


def test_split_is_70_20_10_disjoint_and_whole():
    corpus = corpus_of(200)
    parts = corpus.split()
    assert {split: len(documents) for split, documents in parts.items()} == {
        Split.TRAIN: 140,
        Split.VALIDATION: 40,
        Split.REFERENCE: 20,
    }
    assert sorted(document.name for documents in parts.values() for document in documents) == [
        d.name for d in corpus.documents
    ]
    assert all(
        [d.name for d in documents] == sorted(d.name for d in documents)
        for documents in parts.values()
    )


def test_split_follows_the_seed_and_the_text_but_not_the_name():
    corpus = corpus_of(200)
    renamed = Corpus(
        documents=tuple(Document(f"new-{d.name}", d.text) for d in reversed(corpus.documents)),
        source="made",
    )
    texts = {d.text for d in corpus.split(seed=1)[Split.VALIDATION]}
    assert texts == {d.text for d in renamed.split(seed=1)[Split.VALIDATION]}
    assert texts != {d.text for d in corpus.split(seed=2)[Split.VALIDATION]}


@pytest.mark.parametrize("count", [3, 4, 5, 11])
def test_small_corpus_fills_every_split(count):
    parts = corpus_of(count).split()
    assert all(parts[split] for split in Split)
    assert sum(map(len, parts.values())) == count


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_documents_cannot_be_split(count):
    with refused("documents", CorpusError):
        corpus_of(count).split()


def test_text_room_imports_neither_torch_nor_polars():
    heavy = ("torch", "polars", "scipy", "tokenizers")
    code = f"import sys, moe_lab.text; print([name for name in {heavy} if name in sys.modules])"
    assert os.popen(f'"{sys.executable}" -c "{code}"').read().strip() == "[]"


def test_the_corpus_packages_holds_the_sources_of_what_is_required_and_imports_none_of_it():
    code = (
        "import sys; from moe_lab.text.corpus import load_corpus; names = {document.name for "
        "document in load_corpus('packages').documents}; print(len(names), 'json/decoder.py' in "
        "names, 'torch/nn/modules/linear.py' in names, any('/tests/' in name for name in names), "
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *facts = done.stdout.split()
    assert int(count) > 3000
    assert facts == ["True", "True", "False", "False"]


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_read(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "a.txt", "alpha")
    (folder / "b.txt").symlink_to(folder / "a.txt")
    assert load_corpus(folder).num_repeated == 1
    write(tmp_path / "secret.txt", "secret")
    (folder / "c.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(
        CorpusError, match=r"expected files of the folder itself, got c\.txt, a link"
    ):
        load_corpus(folder)


def test_a_text_that_was_changed_since_is_told(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": "alpha"}\n{"text": "beta"}\n')
    first, second = load_corpus(path).documents
    assert (first.text, second.text) == ("alpha", "beta")
    write(path, '{"text": "alpha"}\n{"text": "BETA"}\n')
    assert first.text == "alpha"
    with pytest.raises(
        CorpusError, match=r"expected the text of rows\.jsonl:2 that the corpus was"
    ):
        _ = second.text


def test_a_number_of_thousands_of_digits_is_told(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"text": ' + "9" * 5000 + "}\n")
    with pytest.raises(CorpusError, match=r"rows\.jsonl:1, which does not parse"):
        load_corpus(path)
