"""N-gram tables: ids against big integers in plain Python, the embedding by hand, gradients,
shards, collisions, and Engram's gate.
"""

import math

import numpy as np
import pytest
import torch
from hf_copied import largest, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from torch import Tensor

from moe_lab.errors import ConfigError
from moe_lab.model import Amplification, Decoder, DecoderConfig, NgramConfig
from moe_lab.model.ngram import GatedMemory, NgramTables, ngram_ids

DECODER = DecoderConfig(
    vocab_size=29, num_layers=3, d_model=24, num_heads=4, context_length=16, d_dense=20
)
NGRAM = NgramConfig(max_n=4, num_splits=2, table_ratio=3.3)


def rows_by_hand(
    sequence: list[int], vocab_size: int, max_n: int, num_splits: int, ratio: float, start: int
) -> list[list[int]]:
    """``sum_j t_{i-j} V^j mod rows`` of every table at every position; a document is what follows
    its opening id.

    The numbers before the remainder are whole, however large: an n-gram's is its last id plus V
    times that of the n-1 ids before.
    """
    tables: list[list[int]] = [[] for _ in range((max_n - 1) * num_splits)]
    filed = [
        (
            order,
            [
                (int(ratio * vocab_size + 2 * table + 1), tables[table].append)
                for table in range(first, first + num_splits)
            ],
        )
        for order, first in ((order, (order - 2) * num_splits) for order in range(2, max_n + 1))
    ]
    numbers = [0] * (max_n + 1)
    for token in sequence:
        if token == start:
            numbers = [0] * (max_n + 1)
        numbers = [0, *(token + vocab_size * before for before in numbers[:-1])]
        for order, targets in filed:
            number = numbers[order]
            for rows, file in targets:
                file(number % rows)
    return tables


def check_ids(ids: Tensor, vocab_size: int, config: NgramConfig, start: int) -> None:
    found = ngram_ids(ids, vocab_size, config.table_rows(vocab_size), config.num_splits, start)
    assert found.shape == (config.num_tables, *ids.shape)
    for row in range(ids.shape[0]):
        wanted = rows_by_hand(
            ids[row].tolist(),
            vocab_size,
            config.max_n,
            config.num_splits,
            config.table_ratio,
            start,
        )
        assert torch.equal(found[:, row], torch.tensor(wanted).reshape(config.num_tables, -1))


def stream(
    shape: tuple[int, int], vocab_size: int, start: int, mean_document: int, seed: int
) -> Tensor:
    """Zipf-like ids with documents of random lengths."""
    rng = np.random.default_rng(seed)
    ids = (vocab_size * rng.random(shape) ** 3).astype(np.int64)
    ids[ids == start] = (start + 1) % vocab_size
    ids[rng.random(shape) < 1 / mean_document] = start
    return torch.from_numpy(ids)


def test_ids_of_a_million_positions_equal_big_integers() -> None:
    """LongCat-Flash-Lite's vocabulary of 131072 and four orders' worth of powers: V^3 times an id
    is beyond 2^64.
    """
    ids = stream((50, 20_000), 131_072, 131_071, 40, seed=0)
    assert (ids == 131_071).sum() > 20_000
    check_ids(ids, 131_072, NgramConfig(max_n=4, num_splits=1, table_ratio=7.3), 131_071)


@settings(max_examples=120, deadline=None)
@given(
    vocab_size=st.integers(2, 300),
    max_n=st.integers(2, 6),
    num_splits=st.integers(1, 4),
    ratio=st.floats(0.02, 12),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12)),
    mean_document=st.sampled_from((1, 2, 5, 1000)),
    data=st.data(),
)
def test_ids_of_any_shape_and_size_equal_big_integers(
    vocab_size: int,
    max_n: int,
    num_splits: int,
    ratio: float,
    shape: tuple[int, int],
    mean_document: int,
    data: st.DataObject,
) -> None:
    """Sequences shorter than the longest n-gram, documents of one token, an opening id anywhere in
    the vocabulary.
    """
    try:
        config = NgramConfig(max_n, num_splits, ratio)
    except ConfigError:
        return  # a ratio near a whole number
    start = data.draw(st.integers(0, vocab_size - 1))
    check_ids(
        stream(shape, vocab_size, start, mean_document, seed=data.draw(st.integers(0, 99))),
        vocab_size,
        config,
        start,
    )


def test_an_n_gram_does_not_reach_before_its_document() -> None:
    """The same document has the same rows wherever it stands; another opening id joins the two."""
    document = [28, 5, 7, 5, 9]
    alone, behind = torch.tensor([document]), torch.tensor([[3, 4, 28, 6, 1, *document]])
    tables = NgramTables(NGRAM, 29, 24)
    assert torch.equal(tables.ids(behind)[:, :, -5:], tables.ids(alone))
    joined = NgramTables(NGRAM.replace(document_start=0), 29, 24)
    assert not torch.equal(joined.ids(behind)[:, :, -5:], joined.ids(alone))


# ------------------------------------------------------------------------------------------------
# embedding


@pytest.mark.parametrize(
    ("amplification", "factor"), [(Amplification.NONE, 1.0), (Amplification.SQRT, math.sqrt(24))]
)
def test_the_embedding_is_the_mean_of_the_token_and_its_projected_tables(
    amplification: Amplification, factor: float
) -> None:
    model = Decoder(DECODER.replace(ngram=NGRAM, amplification=amplification)).double()
    randomise(model, 1)
    ids = torch.tensor([[28, 3, 4, 3, 4, 28, 3, 4]])
    found = model.embed(ids)
    assert model.ngram is not None
    by_hand = rows_by_hand(ids[0].tolist(), 29, 4, 2, 3.3, 28)
    for place in range(8):
        total = model.embedding.weight[ids[0, place]]
        for table in range(6):
            row = model.ngram.tables[table][by_hand[table][place]]
            assert row.shape == (4,), "24 channels over 6 tables"
            total = total + model.ngram.projection[:, 4 * table : 4 * table + 4] @ row
        torch.testing.assert_close(found[0, place], factor * total / 7, rtol=1e-12, atol=1e-12)


def test_layer_norm_amplification_has_unit_variance_and_learned_scale() -> None:
    model = Decoder(DECODER.replace(amplification=Amplification.NORM))
    found = model.embed(torch.arange(29)[None, :16])
    assert largest(found.mean(dim=2), torch.zeros(1, 16)) < 1e-5
    assert largest(found.var(dim=2, correction=0), torch.ones(1, 16)) < 1e-2
    assert model.embedding_norm is not None
    assert {name for name, _ in model.embedding_norm.named_parameters()} == {"weight", "bias"}


def test_tied_heads_read_the_token_embedding_alone() -> None:
    model = Decoder(DECODER.replace(ngram=NGRAM, amplification=Amplification.SQRT))
    hidden = torch.randn(1, 3, 24)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight.T)


# ------------------------------------------------------------------------------------------------
# gradients, shards


def test_sparse_gradients_equal_dense_ones_and_touch_only_rows_that_were_read() -> None:
    dense, sparse = NgramTables(NGRAM, 29, 24), NgramTables(NGRAM, 29, 24, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    ids, weight = stream((3, 16), 29, 28, 6, seed=1), torch.randn(3, 16, 24)
    for module in (dense, sparse):
        (module(ids) * weight).sum().backward()
    for table, (mine, wanted) in enumerate(zip(sparse.tables, dense.tables, strict=True)):
        assert mine.grad is not None
        assert wanted.grad is not None
        assert mine.grad.is_sparse
        torch.testing.assert_close(mine.grad.to_dense(), wanted.grad)
        assert set(mine.grad.coalesce().indices()[0].tolist()) == set(
            dense.ids(ids)[table].flatten().tolist()
        )
    torch.testing.assert_close(sparse.projection.grad, dense.projection.grad)


def test_a_sparse_optimiser_moves_the_rows_that_were_read() -> None:
    tables = NgramTables(NGRAM, 29, 24, sparse=True)
    before = [table.detach().clone() for table in tables.tables]
    ids = stream((1, 5), 29, 28, 6, seed=2)
    tables(ids).square().sum().backward()
    torch.optim.SparseAdam(list(tables.tables), lr=0.1).step()
    for table, (old, rows) in enumerate(zip(before, tables.ids(ids), strict=True)):
        moved = (tables.tables[table] != old).any(dim=1).nonzero()[:, 0]
        assert set(moved.tolist()) <= set(rows.flatten().tolist())
        assert len(moved) > 0


# ------------------------------------------------------------------------------------------------
# collisions


def excess_of_collisions(ids: np.ndarray, vocab_size: int, ratio: float) -> float:
    """How often two places with different bigrams share a row of a table, over how often they would
    if rows were drawn at random.
    """
    size = int(ratio * vocab_size + 1)
    rows = ngram_ids(torch.from_numpy(ids)[None], vocab_size, (size,), 1, vocab_size - 1)[
        0, 0
    ].numpy()
    previous = np.concatenate([[0], ids[:-1]])
    alike = np.unique(ids + previous * vocab_size, return_counts=True)[1].astype(float)
    together = np.bincount(rows, minlength=size).astype(float)
    different = len(ids) ** 2 - (alike**2).sum()
    return ((together**2).sum() - (alike**2).sum()) / different * size


def test_tables_near_a_whole_multiple_of_the_vocabulary_collide_more() -> None:
    """The paper's warning (arXiv 2601.21204, section 3.3) on ids whose frequencies follow Zipf's
    law, the frequent ones first.
    """
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 2048)
    ids = rng.choice(2047, size=200_000, p=share / share.sum()).astype(np.int64)
    excess = {
        ratio: excess_of_collisions(ids, 2048, ratio)
        for ratio in (4.0, 5.0, 4.5, 4.37, 4.62, NgramConfig().table_ratio)
    }
    assert min(excess[4.0], excess[5.0]) > 5
    assert 2 < excess[4.5] < 4, "a half is better than a whole number, and still bad"
    assert max(excess[4.37], excess[4.62], excess[NgramConfig().table_ratio]) < 1


@pytest.mark.parametrize("ratio", [1.0, 4.0, 4.04, 78.0, 100.97])
def test_a_ratio_near_a_whole_number_is_refused(ratio: float) -> None:
    with refused("table_ratio"):
        NgramConfig(table_ratio=ratio)
    assert NgramConfig(table_ratio=0.01).table_rows(50)[0] == 1


# ------------------------------------------------------------------------------------------------
# Engram


def test_the_gated_memory_by_hand() -> None:
    """``x + sigmoid(<rms(x), rms(W e)> / sqrt(D)) e`` with e the projected tables, not divided by
    their number.
    """
    memory = GatedMemory(NGRAM, 29, 24, 1e-6).double()
    randomise(memory, 4)
    x, ids = torch.randn(2, 9, 24, dtype=torch.float64), stream((2, 9), 29, 28, 5, seed=5)
    found = memory(x, ids)
    for row in range(2):
        by_hand = rows_by_hand(ids[row].tolist(), 29, 4, 2, 3.3, 28)
        for place in range(9):
            parts = [
                table[by_hand[number][place]] for number, table in enumerate(memory.tables.tables)
            ]
            e = memory.tables.projection @ torch.cat(parts)
            k, q = memory.key.weight @ e, x[row, place]
            k, q = (
                v / (v.square().mean() + 1e-6).sqrt() * n.weight
                for v, n in ((k, memory.key_norm), (q, memory.query_norm))
            )
            wanted = x[row, place] + e / (1 + (-(q @ k) / math.sqrt(24)).exp())
            torch.testing.assert_close(found[row, place], wanted, rtol=1e-10, atol=1e-10)


def test_memories_stand_before_the_chosen_layers_each_with_its_own_tables() -> None:
    model = Decoder(DECODER.replace(ngram=NGRAM.replace(layers=(0, 2)))).eval()
    randomise(model, 6)
    ids, read = stream((2, 16), 29, 28, 5, seed=6), {}
    assert model.ngram is None
    assert sorted(model.memories) == ["0", "2"]
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda _, inputs, layer=layer: read.__setitem__(layer, inputs[0])
        )
    before: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _, __, output: before.append(output[0]))
    model(ids)
    torch.testing.assert_close(read[0], model.memories["0"](model.embed(ids), ids))
    torch.testing.assert_close(read[2], model.memories["2"](before[0], ids))
    assert not torch.equal(
        model.memories["0"].tables.tables[0], model.memories["2"].tables.tables[0]
    )


@pytest.mark.parametrize("layers", [(), (1,)])
def test_a_later_token_changes_no_earlier_logit_with_tables(layers: tuple[int, ...]) -> None:
    model = Decoder(DECODER.replace(ngram=NGRAM.replace(layers=layers))).double().eval()
    randomise(model, 7)
    ids = stream((1, 16), 29, 28, 5, seed=7)
    changed = ids.clone()
    changed[0, 8] = (
        28 if ids[0, 8] != 28 else 1
    )  # opening a document must not change what came before either
    before, after = model(ids).logits, model(changed).logits
    assert largest(before[:, :8], after[:, :8]) < 1e-12
    assert largest(before[:, 8:], after[:, 8:]) > 1e-6


def test_tables_that_do_not_fit_are_refused() -> None:
    with refused("d_model"):
        DECODER.replace(d_model=40, ngram=NGRAM)
    with refused("ngram.layers"):
        DECODER.replace(ngram=NGRAM.replace(layers=(1, 3)))
    with refused("layers"):
        NGRAM.replace(layers=(2, 1))
    with refused("ngram.document_start"):
        DECODER.replace(ngram=NGRAM.replace(document_start=29))
    with refused("max_n"):
        NGRAM.replace(max_n=1)
    with refused("num_splits"):
        NGRAM.replace(num_splits=0)
    with refused("table_ratio"):
        NGRAM.replace(table_ratio=0.0)
