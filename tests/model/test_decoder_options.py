"""Every option of ``DecoderConfig``: it survives JSON, half precision and compilation, is causal,
and says what does not fit.
"""

import json
from typing import Any

import pytest
import torch
from decoder_options import LATENT, OPTIONS, PLAIN, SPARSE, V4
from hf_copied import largest, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from moe_lab.errors import ConfigError
from moe_lab.model import (
    Amplification,
    Decoder,
    DecoderConfig,
    DecoderOutput,
    LatentAttentionConfig,
    MoEConfig,
    MTPConfig,
    NgramConfig,
    QKNorm,
    Wiring,
)
from moe_lab.routing import RouterConfig

NAMES = pytest.mark.parametrize("name", OPTIONS)


def total(output: DecoderOutput) -> torch.Tensor:
    assert output.loss is not None
    return output.loss + sum(output.losses.values())


def ids_of(config: DecoderConfig, length: int = 20, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(
        0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed)
    )
    ids[:, [0, 9]] = config.vocab_size - 1  # two documents
    return ids


@NAMES
def test_an_option_survives_json_and_changes_the_hash(name: str) -> None:
    config = OPTIONS[name]
    again = DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.hash() == config.hash()
    assert len({other.hash() for other in OPTIONS.values()}) == len(OPTIONS)


@NAMES
def test_an_option_is_causal_and_every_parameter_gets_a_gradient(name: str) -> None:
    config = OPTIONS[name]
    model = Decoder(config).double()
    randomise(model, 1)
    ids = ids_of(config)
    total(model(ids, ids.roll(-1, 1))).backward()
    without = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    }
    assert not without
    model.eval()
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % config.vocab_size
    before, after = model(ids).logits, model(changed).logits
    assert largest(before[:, :12], after[:, :12]) < 1e-12
    assert largest(before[:, 12:], after[:, 12:]) > 1e-6


@st.composite
def combinations(draw: st.DrawFn) -> DecoderConfig:
    """Whatever fits together."""
    zero, layers, latent = (
        draw(st.integers(0, 2)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from((None, LATENT, LATENT.replace(q_rank=None)))),
    )
    dense = draw(st.integers(0, layers))
    router = (
        RouterConfig(kind="longcat", num_experts=5, num_zero_experts=zero, top_k=3) if zero else V4
    )
    places = draw(st.sets(st.integers(0, layers - 1)).map(lambda found: tuple(sorted(found))))
    sparse = SPARSE.replace(
        top_k=draw(st.integers(3, 30)),
        share=draw(st.integers(1, 4)),
        initial=draw(st.integers(0, 1)),
    )
    ngram = NgramConfig(
        draw(st.integers(2, 4)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from((0.02, 0.6, 3.37))),
        places,
    )
    return DecoderConfig(
        vocab_size=draw(st.integers(3, 40)),
        num_layers=layers,
        num_dense_layers=dense,
        d_model=24,
        num_heads=4,
        num_kv_heads=None if latent else draw(st.sampled_from((1, 2, 4, None))),
        context_length=draw(st.integers(4, 24)),
        moe=MoEConfig(
            24,
            draw(st.integers(1, 9)),
            router,
            draw(st.integers(0, 2)),
            d_latent=draw(st.sampled_from((None, 3, 30))),
        ),
        d_dense=draw(st.sampled_from((None, 7))),
        num_hash_layers=0 if zero else draw(st.integers(0, layers - dense)),
        wiring=draw(st.sampled_from(Wiring)),
        qk_norm=QKNorm.NONE if latent else draw(st.sampled_from(QKNorm)),
        latent_attention=latent,
        sparse_attention=draw(st.sampled_from((None, sparse))),
        ngram=draw(st.sampled_from((None, ngram))),
        mtp=draw(st.sampled_from((None, MTPConfig(1), MTPConfig(2, d_hidden=5)))),
        amplification=draw(st.sampled_from(Amplification)),
        hidden_z_loss_coef=draw(st.sampled_from((0.0, 1e-4))),
        tie_embeddings=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(config=combinations(), data=st.data())
def test_any_combination_runs_is_causal_and_gives_finite_gradients(
    config: DecoderConfig, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, config.context_length))
    torch.manual_seed(0)
    model = Decoder(config).double()
    ids = torch.randint(0, config.vocab_size, (2, length))
    output = model(ids, torch.randint(0, config.vocab_size, (2, length)))
    total(output).backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )
    assert len(output.routings) == len(config.moe_layers)
    cut = data.draw(st.integers(1, length))
    prefix = model.eval()(ids[:, :cut]).logits
    assert largest(prefix, model(ids).logits[:, :cut]) < 1e-10


@NAMES
def test_an_option_starts_near_the_uniform_guess(name: str) -> None:
    """Nothing that an option adds is so large at the start that the model is sure of something."""
    torch.manual_seed(0)
    config = OPTIONS[name]
    loss = Decoder(config)(ids_of(config), ids_of(config, seed=1)).loss
    assert loss is not None
    assert loss.item() == pytest.approx(torch.tensor(61.0).log().item(), abs=0.6)


@NAMES
def test_an_option_runs_under_autocast_forward_and_backward(name: str) -> None:
    torch.manual_seed(0)
    model, config = Decoder(OPTIONS[name]), OPTIONS[name]
    ids = ids_of(config)
    wanted = model(ids, ids.roll(-1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids, ids.roll(-1, 1))
    assert found.losses.keys() == wanted.losses.keys()
    assert total(found).item() == pytest.approx(total(wanted).item(), rel=0.03)
    total(found).backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )


@NAMES
def test_padding_behind_a_sequence_changes_nothing_before_it(name: str) -> None:
    config = OPTIONS[name]
    model = Decoder(config).double().eval()
    randomise(model, 2)
    ids = ids_of(config)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[:, 14:] = False
    short, padded = model(ids[:, :14]), model(ids, valid_BS=valid)
    assert largest(short.logits, padded.logits[:, :14]) < 1e-12
    for one, other in zip(short.routings, padded.routings, strict=True):
        assert torch.equal(one.counts(), other.counts())


@pytest.mark.slow
def test_most_options_at_once_compile() -> None:
    """Without the code generator, which would take a minute: the tracer's limits are what a model
    can break.
    """
    torch.manual_seed(0)
    config = OPTIONS["most at once"].replace(num_layers=1)
    model = Decoder(config)
    ids = ids_of(config)
    compiled = torch.compile(model, backend="eager")
    found, wanted = compiled(ids, ids), model(ids, ids)
    assert largest(found.logits, wanted.logits) < 1e-5
    total(found).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_hidden_z_loss_is_the_squared_log_sum_of_magnitudes_over_real_tokens() -> None:
    model = Decoder(PLAIN.replace(hidden_z_loss_coef=0.25)).eval()
    ids, valid = ids_of(PLAIN), torch.ones(2, 20, dtype=torch.bool)
    valid[1, 5:] = False
    output = model(ids, ids, valid)
    kept = output.hidden[valid]
    wanted = 0.25 * sum(row.abs().exp().sum().log() ** 2 for row in kept) / 25
    torch.testing.assert_close(output.losses["hidden_z"], wanted)
    assert "hidden_z" not in Decoder(PLAIN)(ids, ids).losses


@pytest.mark.parametrize(
    ("field", "name", "member"),
    [
        ("wiring", "plain", Wiring.PLAIN),
        ("wiring", "shortcut", Wiring.SHORTCUT),
        ("qk_norm", "head", QKNorm.HEAD),
        ("amplification", "sqrt", Amplification.SQRT),
        ("amplification", "norm", Amplification.NORM),
    ],
)
def test_a_choice_by_its_plain_name_builds_the_same_decoder(
    field: str, name: str, member: Any
) -> None:
    """Both have the same hash, so they must be the same model."""
    models = []
    for value in (name, member):
        torch.manual_seed(0)
        models.append(Decoder(PLAIN.replace(**{field: value})).eval())
    assert models[0].config.hash() == models[1].config.hash()
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert torch.equal(models[0](ids_of(PLAIN)).logits, models[1](ids_of(PLAIN)).logits)


def test_amplification_multiplies_the_embedding_by_the_root_of_the_width() -> None:
    model = Decoder(OPTIONS["embedding times sqrt(d)"])
    torch.testing.assert_close(
        model.embed(torch.tensor([[3, 4]])), model.embedding.weight[None, 3:5] * 24**0.5
    )


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "expected vocab_size as a number of at least 1, got 0"),
    ({"num_layers": 0}, "expected num_layers as a number of at least 1, got 0"),
    ({"context_length": 0}, "expected context_length as a number of at least 1, got 0"),
    ({"wiring": "shortcat"}, "expected wiring among plain, shortcut, sequential, got 'shortcat'"),
    ({"qk_norm": None}, "expected qk_norm among none, head, width, got None"),
    ({"amplification": "double"}, "expected amplification among none, sqrt, norm, got 'double'"),
    ({"head_dim": 5}, r"expected an even head_dim \(rotary pairs\), got 5"),
    ({"num_kv_heads": 3}, "expected num_kv_heads dividing num_heads 4, got 3"),
    ({"num_dense_layers": 3}, "expected num_dense_layers of 0 to 2, got 3"),
    ({"d_dense": 0}, "expected d_dense as a number of at least 1, got 0"),
    ({"rope_theta": 0.0}, r"expected rope_theta as a number above 0, got 0\.0"),
    ({"norm_eps": -1e-6}, "expected norm_eps as a number above 0, got -1e-06"),
    ({"init_std": -0.1}, r"expected init_std as a number above 0, got -0\.1"),
    (
        {"hidden_z_loss_coef": -1.0},
        r"expected hidden_z_loss_coef as a number of at least 0, got -1\.0",
    ),
    ({"num_hash_layers": 1, "num_dense_layers": 2}, "expected num_hash_layers of 0 to 0, got 1"),
    ({"num_hash_layers": -1}, "expected num_hash_layers of 0 to 2, got -1"),
    ({"moe": None, "num_hash_layers": 1}, "expected num_hash_layers of 0 to 0, got 1"),
    (
        {"latent_attention": LATENT},
        "expected no num_kv_heads, head_dim or qk_norm beside latent_attention, got one of them",
    ),
    (
        {"num_kv_heads": None, "latent_attention": LATENT, "head_dim": 6},
        "expected no num_kv_heads, head_dim or qk_norm",
    ),
    (
        {"sparse_attention": SPARSE.replace(head_dim=4)},
        r"expected sparse_attention\.head_dim of at least the 6 rotary channels, got 4",
    ),
    ({"ngram": NgramConfig(layers=(2,))}, r"expected ngram\.layers below 2, got \(2,\)"),
    (
        {"ngram": NgramConfig(6, 1)},
        "expected d_model divisible by the 5 n-gram tables of a place, got 24",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_contradictions_say_what_was_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PLAIN.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_rank": 0}, "kv_rank"),
        ({"q_rank": 0}, "q_rank"),
        ({"nope_dim": 0}, "nope_dim"),
        ({"rope_dim": 3}, "rope_dim"),
        ({"value_dim": 0}, "value_dim"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_latents_that_cannot_be_say_what_was_expected(changes: dict[str, Any], field: str) -> None:
    values: dict[str, Any] = {"kv_rank": 8} | changes
    with refused(field):
        LatentAttentionConfig(**values)


def test_hash_layers_are_the_leading_moe_layers_and_the_config_says_so() -> None:
    assert PLAIN.moe is not None
    config = PLAIN.replace(
        num_layers=5, num_dense_layers=1, num_hash_layers=2, moe=PLAIN.moe.replace(router=V4)
    )
    kinds = [moe.router.kind if (moe := config.moe_of(layer)) else None for layer in range(5)]
    assert kinds == [None, "scored_hash", "scored_hash", "sqrt_softplus_topk", "sqrt_softplus_topk"]
