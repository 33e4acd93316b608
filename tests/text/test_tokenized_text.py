import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from moe_lab.errors import CorpusError, RunError
from moe_lab.text import (
    Split,
    TextConfig,
    TokenizerKind,
    load_corpus,
    load_tokens,
    tokenized_text,
    train_tokenizer,
)


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(20):
        word = "".join(chr(ord("a") + (index * 7 + letter * letter) % 26) for letter in range(8))
        (folder / f"{index:02}.py").write_text(
            f"def {word}(value):\n    return {word}.value + {index}  # naïve 日本 👍\n" * 5
        )
    return folder


@pytest.fixture
def config(corpus) -> TextConfig:
    return TextConfig(corpus=str(corpus), vocab_size=300)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", TokenizerKind)
def test_documents_come_back_with_text_and_spans(config, cache, kind):
    text = load_tokens(config.replace(tokenizer=kind), cache)
    parts = load_corpus(config.corpus).split()
    for split in Split:
        documents = text.documents(split)
        assert [(d.name, d.text) for d in documents] == [(d.name, d.text) for d in parts[split]]
        for document in documents:
            ids = text.tokenizer.encode(document.text)
            starts, ends = text.tokenizer.spans(document.text, ids)
            assert document.ids.tolist() == [text.tokenizer.eos_id, *ids]
            assert document.starts.tolist() == [0, *starts]
            assert document.ends.tolist() == [0, *ends]


def test_train_stream_is_the_train_documents_each_opened_by_the_end_id(config, cache):
    text = load_tokens(config, cache)
    assert text.train.dtype == text.ids.dtype == np.uint16
    assert text.train.tolist() == [
        token for document in text.documents("train") for token in document.ids
    ]
    assert (text.train == text.tokenizer.eos_id).sum() == len(text.documents("train"))


def test_document_index_is_the_place_in_the_corpus(config, cache):
    text = load_tokens(config, cache)
    names = [document.name for document in load_corpus(config.corpus).documents]
    found = {document.index: document.name for split in Split for document in text.documents(split)}
    assert found == dict(enumerate(names))


def test_counts_are_of_the_reference_split(config, cache):
    text = load_tokens(config, cache)
    ids = [token for document in text.documents(Split.REFERENCE) for token in document.ids.tolist()]
    assert text.counts().tolist() == [
        ids.count(token) for token in range(text.tokenizer.vocab_size)
    ]
    assert text.counts("train").sum() == len(text.train)


def test_tokenizer_has_seen_the_train_split_alone(config, cache):
    corpus = load_corpus(config.corpus)
    found = load_tokens(config, cache).tokenizer.hash
    assert found == train_tokenizer(corpus.split()[Split.TRAIN], 300).hash
    assert found != train_tokenizer(corpus.documents, 300).hash


def test_warm_cache_gives_the_same_tokens_without_tokenizing(config, cache, monkeypatch):
    built = load_tokens(config, cache)
    monkeypatch.setattr(tokenized_text, "_build", lambda *_: pytest.fail("built again"))
    loaded = load_tokens(config, cache)
    assert loaded.train.tolist() == built.train.tolist()
    assert loaded.tokenizer.hash == built.tokenizer.hash
    assert loaded.config == built.config == config.resolve()


def test_warm_cache_with_a_corpus_hash_does_not_read_the_corpus(config, cache, corpus):
    resolved = config.resolve()
    built = load_tokens(resolved, cache)
    for path in corpus.iterdir():
        path.unlink()
    loaded = load_tokens(resolved, cache)
    assert [d.text for d in loaded.documents("validation")] == [
        d.text for d in built.documents("validation")
    ]
    with refused("documents", CorpusError):
        load_tokens(config, cache)


def test_changed_corpus_is_told_where_the_hash_is_set_and_built_anew_where_not(
    config, cache, corpus, tmp_path
):
    resolved = config.resolve()
    old = load_tokens(config, cache)
    (corpus / "00.py").write_text("changed = True\n")
    assert load_tokens(config, cache).config.corpus_hash != old.config.corpus_hash
    with refused("corpus_hash", CorpusError):
        load_tokens(resolved, tmp_path / "other cache")
    with refused("corpus_hash", CorpusError):
        resolved.resolve()


def test_same_text_in_another_folder_shares_the_cache(config, cache, corpus, tmp_path, monkeypatch):
    first = load_tokens(config, cache)
    corpus.rename(tmp_path / "moved")
    monkeypatch.setattr(tokenized_text, "_build", lambda *_: pytest.fail("built again"))
    moved = load_tokens(config.replace(corpus=str(tmp_path / "moved")), cache)
    assert moved.tokenizer.hash == first.tokenizer.hash


def test_every_setting_that_changes_tokens_changes_the_file(config, cache):
    for changed in (
        config,
        config.replace(seed=1),
        config.replace(vocab_size=301),
        config.replace(tokenizer="byte"),
    ):
        load_tokens(changed, cache)
    assert len(list((cache / "tokens").iterdir())) == 4


def test_flipped_byte_anywhere_in_the_cache_never_gives_other_tokens(config, cache):
    built = load_tokens(config, cache)
    [path] = (cache / "tokens").glob("*.npz")
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        loaded = load_tokens(config, cache)
        assert loaded.ids.tolist() == built.ids.tolist()
        assert loaded.names == built.names
        assert loaded.split_codes.tolist() == built.split_codes.tolist()
        assert loaded.tokenizer.hash == built.tokenizer.hash


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "folder", "pickle", "misfit"])
def test_damaged_cache_file_is_built_again(config, cache, damage):
    built = load_tokens(config, cache)
    [path] = (cache / "tokens").glob("*.npz")
    whole = path.read_bytes()
    if damage == "pickle":
        np.savez(path, merges=np.array([{}], dtype=object))
    elif damage == "misfit":
        with np.load(path) as arrays:
            np.savez(path, **{**arrays, "ids": arrays["ids"][:-1]})
    elif damage == "folder":
        path.unlink()
        path.mkdir()
        with pytest.raises(RunError, match=r"cannot write .*\.npz: Is a directory"):
            load_tokens(config, cache)
        path.rmdir()
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-100], "text": b"hello"}[damage])
    assert load_tokens(config, cache).train.tolist() == built.train.tolist()
    assert path.read_bytes() == whole


def test_two_processes_building_at_once_agree(config, cache, corpus):
    code = (
        "import sys; from moe_lab.text import TextConfig, load_tokens;"
        "text = load_tokens(TextConfig(corpus=sys.argv[1], vocab_size=300), sys.argv[2]);"
        "print(text.tokenizer.hash, text.train.sum(), len(text.names))"
    )
    commands = [[sys.executable, "-c", code, str(corpus), str(cache)]] * 3
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands
    ]
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    text = load_tokens(config, cache)
    assert outputs == {f"{text.tokenizer.hash} {text.train.sum()} {len(text.names)}\n"}
    assert [path.suffix for path in cache.rglob("*") if path.is_file()].count(".npz") == 1
    assert not list(cache.rglob(".tmp-*"))


def test_cache_follows_the_environment(config, cache, monkeypatch):
    monkeypatch.setenv("MOE_LAB_CACHE", str(cache))
    load_tokens(config)
    assert list((cache / "tokens").glob("*.npz"))


def test_unwritable_cache_is_told(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*; try another folder or free some space"):
        load_tokens(config, tmp_path / "file")


def test_one_document_is_told_that_it_cannot_be_split(tmp_path, cache):
    (tmp_path / "one.txt").write_text("alpha " * 100)
    with refused("documents", CorpusError):
        load_tokens(TextConfig(corpus=str(tmp_path / "one.txt")), cache)


def test_config_round_trips_and_equal_settings_have_equal_hashes(config):
    assert TextConfig.from_dict(config.resolve().to_dict()) == config.resolve()
    assert (
        TextConfig.from_dict({"tokenizer": "byte", "vocab_size": 5000}).hash()
        == TextConfig(tokenizer=TokenizerKind.BYTE).hash()
    )
    assert TextConfig(seed=1).hash() != TextConfig().hash()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokenizer": "words"}, "tokenizer"),
        ({"vocab_size": 256}, "vocab_size"),
        ({"corpus": ""}, "corpus"),
    ],
)
def test_impossible_config_is_told(changes, field):
    with refused(field):
        TextConfig(**changes)
