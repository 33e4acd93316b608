import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from moe_lab.errors import CorpusError
from moe_lab.text import Document, Tokenizer, TokenizerKind, train_tokenizer

SAMPLE = [
    Document(
        "a.py", "def encode(text):\n    return text.encode()  # naïve café, 日本語, 👍\n" * 20
    ),
    Document("b.txt", "The cat sat on the mat; the dog did not. Don't encode the café!\n" * 20),
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(SAMPLE, vocab_size=320)


@pytest.fixture(scope="module", params=TokenizerKind)
def tokenizer(request, bpe) -> Tokenizer:
    return (
        bpe if request.param is TokenizerKind.BPE else train_tokenizer(SAMPLE, kind=request.param)
    )


texts = st.one_of(
    st.text(),
    st.text(alphabet="de f\n\t'.é日👍\u0301\ufeff\r\0_"),
    st.lists(
        st.sampled_from(
            ["the cat", " café", "日本", "👍", "\r\n", "    return", "<|endoftext|>", "don't"]
        )
    ).map("".join),
)


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_decode_undoes_encode_for_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_spans_are_the_characters_that_hold_each_tokens_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    starts, ends = tokenizer.spans(text, ids)
    owner = [
        index for index, character in enumerate(text) for _ in character.encode()
    ]  # the oracle: which character owns each byte
    byte = 0
    for token_id, start, end in zip(ids, starts, ends, strict=True):
        owners = owner[byte : byte + len(tokenizer.token_bytes(token_id))]
        assert (start, end) == (owners[0], owners[-1] + 1)
        byte += len(owners)
    assert byte == len(text.encode())


def test_tokens_that_cut_a_character_share_its_span(bpe):
    ids = bpe.encode("x🦊y")
    starts, ends = bpe.spans("x🦊y", ids)
    cut = [index for index, token_id in enumerate(ids) if bpe.token_bytes(token_id)[0] >= 0x80]
    assert len(cut) > 1
    assert {(int(starts[index]), int(ends[index])) for index in cut} == {(1, 2)}
    assert bpe.decode(ids[: cut[1]]) == "x\ufffd"


def test_arrays_are_int32_and_empty_text_has_no_tokens(tokenizer):
    for text in ("abc", ""):
        ids = tokenizer.encode(text)
        for array in (ids, *tokenizer.spans(text, ids)):
            assert array.dtype == np.int32
    assert len(tokenizer.encode("")) == 0


def test_byte_tokenizer_is_the_utf8_bytes_and_one_end():
    tokenizer = train_tokenizer([], kind="byte", vocab_size=9999)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]


def test_bpe_joins_frequent_bytes_and_keeps_to_its_vocabulary(bpe):
    assert bpe.vocab_size == 320
    assert b" the" in bpe.tokens
    assert len(bpe.encode("the cat")) < len(b"the cat")
    assert len(set(bpe.tokens)) == bpe.vocab_size


def test_bpe_agrees_with_merging_by_hand(bpe):
    """Oracle: within each piece of GPT-2's pattern, merge the earliest-learnt adjacent pair until
    none is left.
    """
    rank = {pair: index for index, pair in reversed(list(enumerate(bpe.merges)))}
    id_of = {token: index for index, token in enumerate(bpe.tokens)}
    for piece in ("The", " encode", " café", " 日本語", " mat", "qzx"):
        ids = list(piece.encode())
        while pairs := [
            (rank[pair], index)
            for index, pair in enumerate(itertools.pairwise(ids))
            if pair in rank
        ]:
            index = min(pairs)[1]
            ids[index : index + 2] = [id_of[bpe.tokens[ids[index]] + bpe.tokens[ids[index + 1]]]]
        assert bpe.encode(piece).tolist() == ids


def test_no_text_spells_the_end_of_document(bpe):
    for text in ("<|endoftext|>", "<eos>", "\0"):
        assert bpe.eos_id not in bpe.encode(text)
    assert bpe.token_bytes(bpe.eos_id) == b""
    assert bpe.decode([bpe.eos_id, *bpe.encode("ab"), bpe.eos_id]) == "ab"


@pytest.mark.parametrize("bad", [-1, 320, 10**9])
def test_ids_out_of_range_are_refused(bpe, bad):
    with refused("ids", CorpusError):
        bpe.decode([65, bad])
    with refused("ids", CorpusError):
        bpe.token_bytes(bad)


def test_lone_surrogate_is_told(tokenizer):
    with refused("text", CorpusError):
        tokenizer.encode("ab\ud800")


def test_spans_refuse_ids_of_another_text(bpe):
    with refused("ids", CorpusError):
        bpe.spans("abcd", bpe.encode("abc"))


def test_vocabulary_beyond_the_text_is_told():
    with refused("vocab_size", CorpusError):
        train_tokenizer([Document("a", "abcd abcd")], vocab_size=400)


def test_vocabulary_below_the_bytes_is_told():
    with refused("vocab_size", CorpusError):
        train_tokenizer(SAMPLE, vocab_size=256)


def test_bpe_of_the_smallest_vocabulary_is_the_bytes():
    assert train_tokenizer(SAMPLE, vocab_size=257).hash == train_tokenizer(SAMPLE, kind="byte").hash


def test_training_twice_gives_the_same_tokenizer_and_other_text_another(bpe):
    assert train_tokenizer(SAMPLE, vocab_size=320).hash == bpe.hash
    assert train_tokenizer(SAMPLE, vocab_size=319).hash != bpe.hash
    assert (
        train_tokenizer(SAMPLE[:1], vocab_size=290).hash
        != train_tokenizer(SAMPLE[1:], vocab_size=290).hash
    )


def test_saved_tokenizer_comes_back(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert (loaded.hash, loaded.tokens) == (tokenizer.hash, tokenizer.tokens)
    assert loaded.encode("the café 👍").tolist() == tokenizer.encode("the café 👍").tolist()


def change(**values):
    return lambda text: json.dumps({**json.loads(text), **values})


DAMAGE = {
    "cut": (lambda text: text[: len(text) // 2], "which is damaged; try training it again"),
    "empty": (lambda text: "", "which is damaged"),
    "nested deep": (lambda text: "[" * 5000, "which is damaged"),
    "a list": (lambda text: "[]", "which is damaged"),
    "no merges": (lambda text: "{}", "which is damaged"),
    "a merge of unmade ids": (change(merges=[[0, 5000]]), "which is damaged"),
    "a lost merge": (
        change(merges=[[104, 101]]),
        "whose hash or format differs; try training it again",
    ),
    "another format": (change(format="other"), "whose hash or format differs"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_tokenizer_file_is_told_and_a_damaged_cache_is_mended(tmp_path, how):
    damage, message = DAMAGE[how]
    tokenizer = train_tokenizer(SAMPLE, vocab_size=270, cache_dir=tmp_path)
    [path] = tmp_path.rglob("*.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(CorpusError, match=re.escape(message)):
        Tokenizer.load(path)
    assert train_tokenizer(SAMPLE, vocab_size=270, cache_dir=tmp_path).hash == tokenizer.hash
    assert Tokenizer.load(path).hash == tokenizer.hash


def test_missing_tokenizer_file_is_told(tmp_path):
    with pytest.raises(
        CorpusError, match=r"expected a saved tokenizer, got .*none.json: No such file or directory"
    ):
        Tokenizer.load(tmp_path / "none.json")


def test_cache_is_used_and_kept_apart_by_text_and_size(tmp_path, monkeypatch):
    first = train_tokenizer(SAMPLE, vocab_size=270, cache_dir=tmp_path)
    train_tokenizer(SAMPLE, vocab_size=271, cache_dir=tmp_path)
    train_tokenizer(SAMPLE[:1], vocab_size=270, cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("*.json"))) == 3
    monkeypatch.setattr("moe_lab.text.tokenizer._train", lambda *_: pytest.fail("trained again"))
    assert train_tokenizer(SAMPLE, vocab_size=270, cache_dir=tmp_path).hash == first.hash
