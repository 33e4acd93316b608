"""Operations and bytes per token against sums over every position written out, and against torch's
own counter.
"""

from typing import Any

import pytest
import torch
from refusals import refused
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.accounting import count, find_model, flops
from moe_lab.accounting.flop_count import capped_sum, kernel_flops
from moe_lab.cost.parts import Attend, Index, Recur
from moe_lab.errors import ConfigError
from moe_lab.model import (
    DecoderConfig,
    LatentAttentionConfig,
    MoEConfig,
    NgramConfig,
    SparseAttentionConfig,
    Wiring,
)
from moe_lab.routing import RouterConfig

WITHIN = 0.01


def config_of(name: str) -> dict[str, Any]:
    entry = find_model(name)
    assert entry is not None
    return entry["config"]


def counted_by_torch(model: torch.nn.Module, ids: torch.Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        logits = model(ids).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# our own decoders

DECODERS = {
    "dense": DecoderConfig(
        vocab_size=200, num_layers=3, d_model=64, num_heads=4, context_length=96, d_dense=160
    ),
    "grouped, untied": DecoderConfig(
        vocab_size=90,
        num_layers=2,
        d_model=48,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        context_length=96,
        d_dense=70,
        tie_embeddings=False,
    ),
    "sparse": DecoderConfig(
        vocab_size=120,
        num_layers=3,
        d_model=64,
        num_heads=4,
        context_length=96,
        moe=MoEConfig(64, 40, RouterConfig(num_experts=8, top_k=3)),
    ),
    "shared and dense layers": DecoderConfig(
        vocab_size=120,
        num_layers=3,
        d_model=32,
        num_heads=4,
        context_length=96,
        moe=MoEConfig(
            32, 24, RouterConfig(kind="deepseek_v3", num_experts=8, top_k=2), num_shared_experts=2
        ),
        num_dense_layers=1,
        d_dense=100,
    ),
    "shortcut with latent attention and latent experts": DecoderConfig(
        vocab_size=120,
        num_layers=2,
        d_model=48,
        num_heads=4,
        context_length=96,
        moe=MoEConfig(48, 24, RouterConfig(num_experts=8, top_k=2), d_latent=20),
        d_dense=60,
        wiring=Wiring.SHORTCUT,
        latent_attention=LatentAttentionConfig(
            kv_rank=20, q_rank=24, nope_dim=10, rope_dim=4, value_dim=8
        ),
    ),
    "n-gram tables and a gated place": DecoderConfig(
        vocab_size=120,
        num_layers=2,
        d_model=48,
        num_heads=4,
        context_length=96,
        d_dense=60,
        ngram=NgramConfig(layers=(1,)),
    ),
    "sparse attention that layers share": DecoderConfig(
        vocab_size=120,
        num_layers=4,
        d_model=48,
        num_heads=4,
        num_kv_heads=2,
        context_length=96,
        d_dense=60,
        sparse_attention=SparseAttentionConfig(top_k=24, num_heads=3, head_dim=16, share=2),
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_flops_of_our_decoders_agree_with_torchs_counter(name: str) -> None:
    config, length = DECODERS[name], 96
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, length))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        seen = counted_by_torch(config.build(), ids)
        trained = counted_by_torch(config.build(), ids, backward=True)
    ours = flops(config, length, "prefill")
    assert 2 * length * ours.forward == pytest.approx(seen, rel=WITHIN)
    if (
        config.sparse_attention is None
    ):  # an indexer has no gradient from the logits: it learns from a loss of its own
        assert 2 * length * ours.training == pytest.approx(trained, rel=WITHIN)


def test_a_causal_kernel_does_half_of_the_scores() -> None:
    config, length = DECODERS["dense"], 96
    full, causal = flops(config, length), flops(config, length, causal=True)
    assert causal.by_part["attention_scores"] / full.by_part["attention_scores"] == pytest.approx(
        (length + 1) / 2 / length
    )
    assert causal.by_part["dense"] == full.by_part["dense"] == 3 * 2 * 3 * 64 * 160


# --------------------------------------------------------------------------------------------------
# transformers

HF_SIZES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 24, "intermediate_size": 72, "num_experts": 8,
        "num_experts_per_tok": 3, "mlp_only_layers": [1]},
    "Olmoe": {"intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2},
    "GptOss": {"intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2,
        "sliding_window": 128},
    "DeepseekV2": {
        "intermediate_size": 96, "moe_intermediate_size": 24, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "Glm4Moe": {
        "intermediate_size": 96, "moe_intermediate_size": 24, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "Phimoe": {"intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.hf
@pytest.mark.parametrize("stem", HF_SIZES)
def test_flops_of_transformers_models_agree_with_torchs_counter(stem: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    shape = {
        "vocab_size": 150,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = getattr(transformers, f"{stem}Config")(**shape, **HF_SIZES[stem], pad_token_id=0)
    # the grouped and fused kernels are unknown to the counter
    config._attn_implementation = config._experts_implementation = "eager"
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    ids = torch.randint(1, 150, (1, 64))
    with torch.no_grad():
        seen = counted_by_torch(model, ids)
    assert 64 * flops(config, 64, "prefill").forward == pytest.approx(seen, rel=WITHIN)


# ---------------------------------------------------------------------------------------------
# kernels, position by position


def by_position(visible: list[int], cost: int) -> float:
    return sum(visible) * cost / len(visible)


@pytest.mark.parametrize("context", [1, 7, 64, 65, 300])
def test_attention_costs_the_keys_that_each_position_sees(context: int) -> None:
    positions = range(1, context + 1)
    cases = {
        Attend(3, 8, 6): list(positions),
        Attend(3, 8, 6, window=16): [min(t, 16) for t in positions],
        Attend(3, 8, 6, top=20): [min(t, 20) for t in positions],
        Attend(3, 8, 6, chunk=10): [(t - 1) % 10 + 1 for t in positions],
        Attend(3, 8, 6, stride=4): [t // 4 for t in positions],
        Attend(3, 8, 6, stride=4, top=5): [min(t // 4, 5) for t in positions],
        Attend(3, 8, 6, causal=False): [context for _ in positions],
    }
    for kernel, visible in cases.items():
        assert kernel_flops(kernel, context, "train", causal=True) == pytest.approx(
            by_position(visible, 2 * 3 * (8 + 6))
        ), kernel
        assert kernel_flops(kernel, context, "train") == 2 * 3 * (8 + 6) * max(visible), kernel
        assert kernel_flops(kernel, context, "decode") == 2 * 3 * (8 + 6) * visible[-1], kernel


def test_capped_sums_are_sums() -> None:
    for length in (1, 5, 12, 31):
        for stride in (1, 3, 4):
            for cap in (None, 1, 2, 50):
                terms = [
                    min(t // stride, 10**9 if cap is None else cap) for t in range(1, length + 1)
                ]
                assert capped_sum(length, stride, cap) == sum(terms), (length, stride, cap)


def test_indexers_score_every_key_and_recurrences_none() -> None:
    assert kernel_flops(Index(4, 16), 100, "decode") == 2 * 4 * 17 * 100
    assert (
        kernel_flops(Index(4, 16, stride=4), 100, "train", causal=True)
        == 2 * 4 * 17 * sum(t // 4 for t in range(1, 101)) / 100
    )
    assert kernel_flops(Recur(50), 10, "train") == kernel_flops(Recur(50), 10**6, "decode") == 100


def test_mla_decodes_in_the_latent_space() -> None:
    kernel = Attend(2, qk=24, v=16, absorbed=(40, 32))
    assert kernel_flops(kernel, 10, "decode") == 2 * 2 * (40 + 32) * 10
    assert kernel_flops(kernel, 10, "prefill") == 2 * 2 * (24 + 16) * 10
    assert kernel_flops(kernel, 10, "prefill", causal=True) == 2 * 2 * (24 + 16) * 5.5


def test_sparse_attention_stops_growing_at_its_top_k_and_its_indexer_does_not() -> None:
    v32, context = config_of("DeepSeek-V3.2"), 65536
    sparse, dense = (
        flops(v32, context, "decode"),
        flops(config_of("DeepSeek-V3"), context, "decode"),
    )
    assert sparse.by_part["attention_scores"] * 32 == dense.by_part["attention_scores"]
    assert (
        sparse.by_part["attention_scores"] == flops(v32, 2048, "decode").by_part["attention_scores"]
    )
    assert sparse.by_part["indexer"] == 61 * 2 * 64 * 129 * context
    assert (
        flops(config_of("LongCat-2.0"), context, "decode").by_part["indexer"]
        == 38 * 2 * 32 * 129 * context
    )
    assert sparse.forward < dense.forward


def test_sliding_windows_hold_every_second_layer_of_gpt_oss_constant() -> None:
    short, long = (
        flops(config_of("gpt-oss-120b"), context, "decode").by_part["attention_scores"]
        for context in (128, 12800)
    )
    assert long - short == 18 * 2 * 64 * 128 * (12800 - 128)


def test_v4_attends_to_a_window_and_to_compressed_keys() -> None:
    pro, context = flops(config_of("DeepSeek-V4-Pro"), 1_000_000, "decode"), 1_000_000
    heavy, light = 31, 30  # layers of ratio 128 and of ratio 4 among the 61; see compress_ratios
    keys = 61 * 128 + heavy * (context // 128) + light * 1024
    assert pro.by_part["attention_scores"] == 2 * 128 * (512 + 512) * keys
    assert pro.by_part["indexer"] == light * 2 * 64 * 129 * (context // 4)


# --------------------------------------------------------------------------------------------------
# phases


def test_training_is_three_forward_passes_and_names_its_parts() -> None:
    work = flops(config_of("DeepSeek-V3"), 4096)
    assert (
        work.total
        == work.training
        == 3 * work.forward
        == pytest.approx(3 * sum(work.by_part.values()))
    )
    assert {"attention", "attention_scores", "router", "routed", "shared", "dense", "head"} == set(
        work.by_part
    )
    assert work.by_part["head"] == 2 * 129280 * 7168
    assert work.frame()["total"].sum() == pytest.approx(work.total)
    assert flops(config_of("DeepSeek-V3"), 4096, "prefill").total == work.forward


def test_a_context_that_is_not_given_is_ours_or_is_said_to_be_assumed() -> None:
    ours = flops(DECODERS["dense"])
    assert (ours.context, ours.assumed) == (96, count(DECODERS["dense"]).assumed)
    theirs = flops(config_of("Mixtral-8x7B"))
    assert theirs.forward == flops(config_of("Mixtral-8x7B"), 4096).forward
    assert theirs.assumed[-1] == "context = 4096 tokens (none was given)"


def test_mtp_modules_are_told_apart() -> None:
    v3 = config_of("DeepSeek-V3")
    none = flops({**v3, "num_nextn_predict_layers": 0}, 4096)
    assert none.mtp == 0
    assert flops(v3, 4096).forward == none.forward
    two = flops({**v3, "num_nextn_predict_layers": 2}, 4096)
    assert two.mtp == pytest.approx(2 * flops(v3, 4096).mtp)


def test_dynamic_models_have_a_range_of_work() -> None:
    work = flops(config_of("LongCat-Flash-Chat"), 4096)
    slot = 2 * 28 * 3 * 6144 * 2048
    assert work.forward_max - work.forward == 4 * slot
    assert work.forward - work.forward_min == 8 * slot


# --------------------------------------------------------------------------------------------------
# decoding


def test_one_sequence_reads_the_active_weights() -> None:
    for name in ("Qwen3-30B-A3B", "DeepSeek-V3", "gpt-oss-20b"):
        work = flops(config_of(name), 1000, "decode")
        assert work.weight_bytes == pytest.approx(2 * count(config_of(name)).active("B")), name
    tied = config_of("granite-3.0-1b-a400m")
    assert flops(tied, 1000, "decode").weight_bytes == pytest.approx(2 * count(tied).active("A"))


def test_a_batch_reads_the_expected_distinct_experts() -> None:
    qwen = config_of("Qwen3-30B-A3B")
    for batch in (1, 4, 64):
        work = flops(qwen, 1000, "decode", batch=batch)
        assert work.distinct_experts == pytest.approx(128 * (1 - (1 - 8 / 128) ** batch))
    huge = flops(qwen, 1000, "decode", batch=100_000)
    stored = count(qwen)
    assert huge.weight_bytes == pytest.approx(2 * (stored.total - stored.by_part["embedding"]))
    assert huge.weight_bytes_per_token == pytest.approx(huge.weight_bytes / 100_000)  # type: ignore[operator]


def test_uneven_load_reads_fewer_experts() -> None:
    qwen = config_of("Qwen3-30B-A3B")
    even = flops(qwen, 1000, "decode", batch=32)
    flat = flops(qwen, 1000, "decode", batch=32, load=[5.0] * 128)
    skewed = flops(qwen, 1000, "decode", batch=32, load=[9.0] * 8 + [1.0] * 120)
    assert flat.weight_bytes == pytest.approx(even.weight_bytes)
    assert skewed.distinct_experts is not None
    shares = [8 * 9 / 192] * 8 + [8 * 1 / 192] * 120
    assert skewed.distinct_experts == pytest.approx(sum(1 - (1 - share) ** 32 for share in shares))
    assert skewed.weight_bytes < even.weight_bytes  # type: ignore[operator]
    dead = flops(qwen, 1000, "decode", batch=10**6, load=[1.0] * 64 + [0.0] * 64)
    assert dead.distinct_experts == pytest.approx(64)


def test_load_may_differ_from_layer_to_layer() -> None:
    mixtral = {**config_of("Mixtral-8x7B"), "num_hidden_layers": 2}
    by_layer = {0: [1.0] * 8, 1: [1.0] * 4 + [0.0] * 4}
    work = flops(mixtral, 100, "decode", batch=10**6, load=by_layer)
    assert work.distinct_experts == pytest.approx((8 + 4) / 2)
    with refused("load"):
        flops(mixtral, 100, "decode", load={0: [1.0] * 8})


@pytest.mark.parametrize("load", [[1.0] * 7, [0.0] * 8, [-1.0] + [1.0] * 7, [1.0] + [0.0] * 7])
def test_impossible_loads_are_refused(load: list[float]) -> None:
    with refused("load"):
        flops(config_of("Mixtral-8x7B"), 100, "decode", load=load)


@pytest.mark.parametrize(
    "arguments",
    [
        {"context": 0},
        {"context": 1.5},
        {"context": 8, "batch": 0},
        {"context": 8, "phase": "dream"},
    ],
)
def test_impossible_questions_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected (context|batch|a phase)"):
        flops(config_of("Mixtral-8x7B"), **arguments)
