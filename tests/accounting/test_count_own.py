"""Counts of this library's own models against the sum of ``numel`` of what their configuration
builds.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from refusals import refused

from moe_lab.accounting import count
from moe_lab.errors import ConfigError
from moe_lab.model import (
    Amplification,
    DecoderConfig,
    LatentAttentionConfig,
    MoEConfig,
    MTPConfig,
    NgramConfig,
    QKNorm,
    SparseAttentionConfig,
    Wiring,
)
from moe_lab.routing import ROUTERS, ControllerConfig, RouterConfig

FIXED = (
    "softmax_topk",
    "sigmoid_topk",
    "deepseek_v3",
    "noisy_topk",
    "gemma",
    "dynmoe",
    "top_p",
    "remoe",
)


def numel(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@st.composite
def routers(draw: st.DrawFn) -> RouterConfig:
    zero = draw(st.integers(0, 4))
    experts = draw(st.integers(2, 9))
    if zero:
        kind = draw(st.sampled_from(("longcat", "moepp", "adamoe")))
        top_k = 2 if kind == "moepp" else draw(st.integers(1, experts))
        return RouterConfig(kind=kind, num_experts=experts, top_k=top_k, num_zero_experts=zero)
    kind = draw(st.sampled_from(FIXED))
    return RouterConfig(kind=kind, num_experts=experts, top_k=draw(st.integers(1, experts)))


@st.composite
def decoders(draw: st.DrawFn) -> DecoderConfig:
    heads, kv = draw(st.sampled_from(((1, 1), (4, 2), (4, 4), (6, 3))))
    dim = draw(st.sampled_from((2, 4, 6)))
    d_model = heads * dim if draw(st.booleans()) else draw(st.integers(4, 40))
    layers = draw(st.integers(1, 4))
    moe = (
        MoEConfig(d_model, draw(st.integers(1, 20)), draw(routers()), draw(st.integers(0, 2)))
        if draw(st.booleans())
        else None
    )
    return DecoderConfig(
        vocab_size=draw(st.integers(5, 300)),
        num_layers=layers,
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from((kv, None))),
        head_dim=None if d_model == heads * dim else dim,
        moe=moe,
        num_dense_layers=draw(st.integers(0, layers)),
        d_dense=draw(st.integers(1, 50)) if moe is None or draw(st.booleans()) else None,
        tie_embeddings=draw(st.booleans()),
    )


@settings(max_examples=120, deadline=None)
@given(decoders())
def test_count_of_any_decoder_is_the_sum_of_numel(config: DecoderConfig) -> None:
    counted = count(config)
    assert counted.total == numel(config.build())
    assert count(config.to_dict()).total == counted.total
    assert counted.by_part["head"] == (
        0 if config.tie_embeddings else config.vocab_size * config.d_model
    )


@st.composite
def decoders_of_parts(draw: st.DrawFn) -> DecoderConfig:
    """Every part that some architecture adds, in any combination that makes a decoder."""
    d, layers = 12 * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    zero = draw(st.integers(0, 3))
    hashed = 0 if zero else draw(st.integers(0, layers))
    router = RouterConfig(
        kind="longcat" if zero else "sqrt_softplus_topk",
        num_experts=5,
        top_k=2,
        num_zero_experts=zero,
    )
    moe = MoEConfig(
        d, 7, router, draw(st.integers(0, 2)), d_latent=draw(st.sampled_from((None, 5)))
    )
    latent = LatentAttentionConfig(
        kv_rank=draw(st.integers(1, 9)),
        q_rank=draw(st.sampled_from((None, 6))),
        nope_dim=3,
        rope_dim=2,
        value_dim=draw(st.integers(1, 5)),
    )
    latent_or_none = draw(st.sampled_from((None, latent)))
    return DecoderConfig(
        vocab_size=draw(st.integers(5, 60)),
        num_layers=layers,
        d_model=d,
        num_heads=2,
        num_kv_heads=None if latent_or_none else draw(st.sampled_from((1, 2, None))),
        context_length=16,
        moe=draw(st.sampled_from((moe, moe, None))) if not hashed else moe,
        num_hash_layers=hashed,
        d_dense=draw(st.integers(1, 20)),
        wiring=draw(st.sampled_from(Wiring)),
        qk_norm=QKNorm.NONE if latent_or_none else draw(st.sampled_from(QKNorm)),
        latent_attention=latent_or_none,
        sparse_attention=draw(
            st.sampled_from(
                (None, SparseAttentionConfig(top_k=4, head_dim=18, share=draw(st.integers(1, 3))))
            )
        ),
        ngram=draw(
            st.sampled_from(
                (
                    None,
                    NgramConfig(
                        3,
                        2,
                        draw(st.floats(0.1, 0.9)),
                        draw(st.sampled_from(((), (0,), (layers - 1,)))),
                    ),
                )
            )
        ),
        mtp=draw(st.sampled_from((None, MTPConfig(2), MTPConfig(1, d_hidden=9)))),
        amplification=draw(st.sampled_from(Amplification)),
        tie_embeddings=draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None)
@given(decoders_of_parts())
def test_count_of_any_combination_of_parts_is_the_sum_of_numel(config: DecoderConfig) -> None:
    model, counted = config.build(), count(config)
    assert counted.mtp == numel(model.mtp)
    assert counted.total == numel(model) - counted.mtp
    assert count(config.to_dict()).by_part == counted.by_part
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_of_before_the_parts_counts_as_it_did() -> None:
    config = DecoderConfig(
        d_model=32, num_heads=4, moe=MoEConfig(32, 16, RouterConfig(num_experts=4, top_k=2))
    )
    old = {"vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim",
    "context_length", "moe", "num_dense_layers",
           "d_dense", "tie_embeddings", "rope_theta", "norm_eps", "init_std"}  # fmt: skip
    assert (
        count({name: value for name, value in config.to_dict().items() if name in old}).by_part
        == count(config).by_part
    )


SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 1},
    {"num_zero_experts": 4},
    {"num_zero_experts": 1, "top_k": 1},
    {"vocab_size": 30},
    {"num_experts": 1, "top_k": 1},
)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_router_kind_is_counted(kind: str) -> None:
    met = 0
    for extra in SHAPES:
        try:
            config = MoEConfig(
                24, 8, RouterConfig.from_dict({"kind": kind, "num_experts": 6, "top_k": 2, **extra})
            )
            layer = config.build()
        except ConfigError:
            continue  # not a shape of this kind
        met += 1
        assert count(config).total == numel(layer), extra
    assert met


def test_an_unknown_router_kind_is_named() -> None:
    config = MoEConfig().to_dict()
    config["router"]["kind"] = "oracle"
    with refused("a router kind"):
        count(config)


def test_zero_experts_give_a_range_around_the_controllers_target() -> None:
    target = ControllerConfig(kind="proportional", target_ffn_count=2.5)  # type: ignore[arg-type]
    router = RouterConfig(
        kind="longcat", num_experts=8, top_k=4, num_zero_experts=3, controller=target
    )
    counted = count(MoEConfig(32, 16, router))
    expert, rest = 3 * 32 * 16, 11 * 32
    assert (counted.active_min, counted.active_mean, counted.active_max) == (
        rest + expert,
        rest + 2.5 * expert,
        rest + 4 * expert,
    )
    uniform = count(MoEConfig(32, 16, router.replace(controller=None)))
    assert uniform.active_mean == round(rest + 4 * 8 / 11 * expert)
    assert any("equally loaded" in sentence for sentence in uniform.assumed)
    assert not any("equally loaded" in sentence for sentence in counted.assumed)


def test_routers_with_a_free_count_have_a_mean_and_no_fixed_range() -> None:
    counted = count(MoEConfig(32, 16, RouterConfig(kind="expert_choice", num_experts=8, top_k=2)))
    experts = next(iter(counted.moe_layers.values()))
    assert experts.used == (0, 2, 8)
    cut = next(
        iter(
            count(
                MoEConfig(32, 16, RouterConfig(kind="top_p", num_experts=8, top_k=3))
            ).moe_layers.values()
        )
    )
    assert cut.used == (1, 3, 3)


def test_a_run_configuration_counts_its_model(tmp_path: Path) -> None:
    model = DecoderConfig(
        d_model=32,
        num_heads=4,
        moe=MoEConfig(32, 16, RouterConfig(num_experts=4, top_k=2)),
        num_dense_layers=1,
    )
    run = {"name": "one", "seed": 0, "model": model.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(run))
    assert count(run).total == count(tmp_path).total == count(model).total == numel(model.build())
    assert sorted(count(model).moe_layers) == [1, 2, 3]


def test_what_if_edits_reach_our_own_fields() -> None:
    config = MoEConfig(32, 16, RouterConfig(num_experts=4, top_k=2))
    larger = MoEConfig(32, 16, RouterConfig(num_experts=9, top_k=3))
    assert (
        count(config, {"num_experts": 9, "num_experts_per_tok": 3}).to_dict()
        == count(larger).to_dict()
    )


def test_configurations_and_their_counts_load_no_torch() -> None:
    code = (
        "import sys\n"
        "from moe_lab.accounting import count\n"
        "from moe_lab.model import preset\n"
        "from moe_lab.routing import FACTS, ROUTERS, RouterConfig, hash_twin\n"
        "assert set(ROUTERS) == set(FACTS)\n"
        "assert count(preset('longcat_2_mini')).total > 0\n"
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
