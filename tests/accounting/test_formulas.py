"""The closed forms against sums written out by hand, and the three conventions against their
definitions.
"""

import subprocess
import sys

import pytest

from moe_lab.accounting import Part, count, find_model, models
from moe_lab.cost.attention_cost import gqa, indexer, mla
from moe_lab.cost.layer_cost import plain_ffn
from moe_lab.cost.parts import Pieces


def total(pieces: Pieces) -> int:
    return sum(piece.params for piece in pieces)


def test_gqa_is_its_four_matrices() -> None:
    d, h, kv, hd = 48, 6, 2, 10
    assert total(gqa(d, h, kv, hd)) == d * h * hd + 2 * d * kv * hd + h * hd * d
    assert total(gqa(d, h, kv, hd, bias=True)) - total(gqa(d, h, kv, hd)) == (h + 2 * kv) * hd


@pytest.mark.parametrize("rank_q", [None, 24])
def test_mla_is_the_sum_of_its_published_form(rank_q: int | None) -> None:
    d, h, rkv, nope, rope, v = 64, 4, 16, 12, 6, 10
    query = (
        d * h * (nope + rope)
        if rank_q is None
        else d * rank_q + rank_q + rank_q * h * (nope + rope)
    )
    rest = d * (rkv + rope) + rkv + rkv * h * (nope + v) + h * v * d
    assert total(mla(d, h, rank_q, rkv, nope, rope, v)) == query + rest


def test_non_gated_experts_have_two_matrices_and_an_indexer_four_pieces() -> None:
    assert total(plain_ffn(Part.ROUTED, 8, 20)) == 2 * 8 * 20
    assert total(indexer(64, 24, 4, 16)) == 24 * 4 * 16 + 64 * 16 + 2 * 16 + 64 * 4


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-ai/DeepSeek-V3",
        "Zyphra/ZAYA1-8B",
        "meituan-longcat/LongCat-Flash-Lite",
        "openai/gpt-oss-20b",
    ],
)
def test_conventions_are_what_they_are_defined_as(name: str) -> None:
    entry = find_model(name)
    assert entry is not None
    counted = count(entry["config"])
    parts = counted.by_part
    unused = sum(piece.params - piece.active() for piece in counted.moe_layers.values())
    assert counted.active("A") == pytest.approx(counted.total - unused, abs=1)
    lookups = parts["ngram_table"] + (0 if counted.tied else parts["embedding"])
    assert counted.active("A") - counted.active("B") == lookups
    assert counted.active("B") - counted.active("C") == (
        parts["embedding"] if counted.tied else parts["head"]
    )


def test_parts_add_up_to_the_total_and_layers_to_the_parts() -> None:
    for row in models().iter_rows(named=True):
        entry = find_model(row["name"])
        assert entry is not None
        counted = count(entry["config"])
        assert sum(counted.by_part.values()) == counted.total + counted.mtp
        assert sum(piece.params for _, piece in counted.pieces()) == counted.total + counted.mtp


def test_the_frame_has_a_row_for_each_piece_and_sums_to_the_count() -> None:
    entry = find_model("DeepSeek-V3")
    assert entry is not None
    counted = count(entry["config"])
    frame = counted.frame()
    assert frame["params"].sum() == counted.total + counted.mtp
    assert set(frame.columns) == {
        "layer",
        "part",
        "name",
        "params",
        "copies",
        "passes",
        "active_min",
        "active_mean",
        "active_max",
        "phantom",
    }
    routed = counted.by_layer().filter(part="routed")
    assert routed["layer"].to_list() == list(range(3, 61))
    assert routed["params"].unique().to_list() == [256 * 3 * 7168 * 2048]


def test_models_has_one_row_per_published_model_and_states_both_ratios() -> None:
    frame = models()
    assert len(frame) == frame["name"].n_unique() >= 48
    rows = {row["name"].partition("/")[2]: row for row in frame.iter_rows(named=True)}
    k2, pro, longcat = rows["Kimi-K2-Instruct"], rows["DeepSeek-V4-Pro"], rows["LongCat-2.0"]
    assert k2["ratio_experts"] == 48
    assert k2["ratio_parameters"] == pytest.approx(31.2, abs=0.05)
    assert (pro["ratio_experts"], round(pro["total"] / pro["active_a"], 1)) == (64, 31.6)
    assert (
        longcat["num_experts"],
        longcat["num_zero_experts"],
        longcat["slots"],
        longcat["top_k"],
    ) == (768, 128, 12, 8)


def test_counting_imports_neither_torch_nor_polars_nor_plotly() -> None:
    code = (
        "import sys; from moe_lab.accounting import count, find_model, flops; from "
        "moe_lab.accounting.model_names import named_config\n"
        "config = find_model('LongCat-2.0')['config']; count(config).active('A'); flops(config, "
        "4096, 'decode', batch=8)\n"
        "loaded = {'torch', 'polars', 'plotly', 'numpy', 'scipy', 'transformers'} & "
        "set(sys.modules); print(sorted(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
