"""The lightning indexer and attention to what it chose: against transformers' DeepSeek-V3.2, dense
attention, and plain Python.
"""

from typing import Any

import pytest
import torch
from hf_copied import causal, copy_decoder, copy_latent, doubled, largest, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from torch import Tensor

from moe_lab.errors import ConfigError
from moe_lab.model import (
    Decoder,
    DecoderConfig,
    LatentAttentionConfig,
    MoEConfig,
    MTPConfig,
    SparseAttentionConfig,
    Wiring,
)
from moe_lab.model import attention as attention_module
from moe_lab.model.attention import LatentAttention, build_attention
from moe_lab.model.rotary import rotary_tables
from moe_lab.model.sparse_attention import Selection, attend, choose, indexer_loss
from moe_lab.routing import ControllerConfig, RouterConfig

LATENT = LatentAttentionConfig(kv_rank=10, q_rank=12, nope_dim=6, rope_dim=4, value_dim=5)
SPARSE = SparseAttentionConfig(top_k=5, num_heads=3, head_dim=8)
GROUPED = DecoderConfig(
    vocab_size=31,
    num_layers=3,
    d_model=24,
    num_heads=4,
    num_kv_heads=2,
    context_length=20,
    d_dense=20,
    sparse_attention=SPARSE,
)
LATENT_DECODER = GROUPED.replace(num_kv_heads=None, latent_attention=LATENT)
BOTH = pytest.mark.parametrize("config", [GROUPED, LATENT_DECODER], ids=["grouped", "latent"])


# ------------------------------------------------------------------------------------------------
# transformers


def deepseek_v32(top_k: int) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    module = pytest.importorskip(
        "transformers.models.deepseek_v32.modeling_deepseek_v32", reason="needs the extra hf"
    )
    config = transformers.DeepseekV32Config(
        vocab_size=31,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        index_topk=top_k,
        index_n_heads=16,
        index_head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    attention = module.DeepseekV32Attention(config, 0).eval()
    randomise(attention, top_k)
    return attention


@pytest.mark.hf
@pytest.mark.parametrize("top_k", [1, 4, 13, 40])
def test_indexer_and_attention_equal_transformers_deepseek_v32(
    top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, length = deepseek_v32(top_k), 20
    sparse = SPARSE.replace(top_k=top_k, local=0, num_heads=16)  # so many that no scores tie at 0
    config = LATENT_DECODER.replace(sparse_attention=sparse)
    ours = LatentAttention(config, LATENT, 0).eval()
    copy_latent(ours, theirs)
    x, rotary, scores, plain_topk = (
        torch.randn(2, length, 24),
        rotary_tables(length, 4, 1e4),
        [],
        torch.Tensor.topk,
    )

    def seen_topk(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        scores.append(tensor)
        return plain_topk(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", seen_topk)
    wanted, _ = theirs(x, position_embeddings=doubled(rotary), attention_mask=causal(length))
    monkeypatch.undo()
    index_scores = scores[0]
    mine, selection = ours(x, rotary)
    assert selection is not None
    assert ours.indexer is not None
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        own_scores = ours.indexer.scores(x, ours.project(x, rotary)[3], rotary)
    assert largest(own_scores[:, visible], index_scores[:, visible]) < 1e-5
    chosen = torch.zeros(2, length, length + 1, dtype=torch.bool)
    chosen.scatter_(2, torch.where(selection.seen, selection.indices, length), True)
    theirs_chosen = (
        torch.zeros_like(chosen).scatter_(2, index_scores.topk(min(top_k, length)).indices, True)[
            ..., :length
        ]
        & visible
    )
    assert torch.equal(chosen[..., :length], theirs_chosen)
    assert largest(mine, wanted) < 1e-5


@pytest.mark.hf
def test_the_whole_model_has_the_logits_of_transformers_deepseek_v32() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    router = RouterConfig(
        kind="deepseek_v3",
        num_experts=8,
        top_k=3,
        num_groups=4,
        topk_groups=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        controller=ControllerConfig(),
    )
    config = LATENT_DECODER.replace(
        num_dense_layers=1,
        moe=MoEConfig(24, 9, router, num_shared_experts=1),
        tie_embeddings=False,
        sparse_attention=SPARSE.replace(local=0, num_heads=16),
    )
    theirs = transformers.DeepseekV32ForCausalLM(
        transformers.DeepseekV32Config(
            vocab_size=31,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=12,
            kv_lora_rank=10,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=5,
            index_topk=5,
            index_n_heads=16,
            index_head_dim=8,
            intermediate_size=20,
            moe_intermediate_size=9,
            n_shared_experts=1,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            max_position_embeddings=20,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            attn_implementation="eager",
            experts_implementation="eager",
        )
    ).eval()
    ours = Decoder(config).eval()
    randomise(theirs, 8, std=0.2)
    copy_decoder(ours, theirs)
    ids = torch.randint(0, 31, (3, 20), generator=torch.Generator().manual_seed(0))
    assert theirs(ids).logits.std() > 0.1
    assert largest(ours(ids).logits, theirs(ids).logits) < 1e-5


# ------------------------------------------------------------------------------------------------
# choice


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 14),
    top_k=st.integers(1, 14),
    initial=st.integers(0, 4),
    local=st.integers(0, 4),
    levels=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_the_choice_is_the_forced_positions_and_the_best_of_the_others(
    length: int, top_k: int, initial: int, local: int, levels: int, seed: int
) -> None:
    """Ties are frequent here: of equal scores the later position is chosen."""
    if initial + local > top_k:
        return
    scores = (
        torch.randint(
            -levels, levels + 1, (2, length, length), generator=torch.Generator().manual_seed(seed)
        )
        * 0.3
    )
    indices = choose(scores, min(top_k, length), initial, local)
    for row in range(2):
        for query in range(length):
            forced = {
                position
                for position in range(query + 1)
                if position < initial or query - position < local
            }
            free = sorted(
                (position for position in range(query + 1) if position not in forced),
                key=lambda at: (scores[row, query, at], at),
            )
            best = free[::-1][: max(0, top_k - len(forced))]
            found = indices[row, query].tolist()
            assert len(set(found)) == min(top_k, length), "no position twice"
            assert {position for position in found if position <= query} == forced | set(best)


def test_a_choice_does_not_depend_on_what_follows() -> None:
    """Scores of 0 tie, and a partial sort breaks ties as the length happens to have it."""
    scores = torch.randn(3, 60, 60).relu() * (torch.rand(3, 60, 60) < 0.3)
    whole, half = choose(scores, 9, 1, 1), choose(scores[:, :30, :30], 9, 1, 1)
    seen = half <= torch.arange(30)[:, None]
    assert torch.equal(half[seen], whole[:, :30][seen])
    assert torch.equal(choose(-0.0 * scores, 9, 1, 1), choose(0.0 * scores, 9, 1, 1))


@BOTH
def test_initial_and_local_positions_are_attended_to_whatever_the_scores(
    config: DecoderConfig,
) -> None:
    sparse = SPARSE.replace(top_k=6, initial=2, local=3)
    block = build_attention(config.replace(sparse_attention=sparse), 0)
    randomise(block, 3, std=2.0)
    _, selection = block(torch.randn(2, 20, 24), rotary_tables(20, config.rotary_dim, 1e4))
    assert selection is not None
    for row in range(2):
        for query in range(20):
            seen = set(selection.indices[row, query][selection.seen[row, query]].tolist())
            assert {
                position
                for position in (0, 1, query - 2, query - 1, query)
                if 0 <= position <= query
            } <= seen
            assert len(seen) == min(6, query + 1)


# ------------------------------------------------------------------------------------------------
# against dense attention


@BOTH
@pytest.mark.parametrize("wiring", [Wiring.PLAIN, Wiring.SHORTCUT])
@pytest.mark.parametrize("top_k", [20, 50])
def test_choosing_all_positions_is_dense_attention_forward_and_backward(
    config: DecoderConfig, wiring: Wiring, top_k: int
) -> None:
    config = config.replace(
        wiring=wiring, sparse_attention=SPARSE.replace(top_k=top_k, initial=1, local=2)
    )
    sparse, dense = Decoder(config), Decoder(config.replace(sparse_attention=None))
    randomise(sparse, 1, std=0.2)
    dense.load_state_dict(
        {name: value for name, value in sparse.state_dict().items() if "indexer" not in name}
    )
    ids = torch.randint(0, 31, (2, 20))
    outputs = [model(ids, ids.roll(-1, 1)) for model in (sparse, dense)]
    assert largest(outputs[0].logits, outputs[1].logits) < 1e-5
    for output in outputs:
        assert output.loss is not None
        output.loss.backward()
    wanted = {name: parameter.grad for name, parameter in dense.named_parameters()}
    for name, parameter in sparse.named_parameters():
        if "indexer" not in name:
            assert parameter.grad is not None
            assert largest(parameter.grad, wanted[name]) < 1e-5, name  # type: ignore[arg-type]


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed_BSS: Tensor
) -> tuple[Tensor, Tensor]:
    """Dense attention of [B, H, S, d] queries under a mask: mixed values, attention matrix."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    logits = torch.einsum("bhsd,bhtd->bhst", query, key) / query.shape[3] ** 0.5
    attention = logits.masked_fill(~allowed_BSS[:, None], -torch.inf).softmax(dim=3)
    return torch.einsum("bhst,bhtd->bhsd", attention, value), attention


def random_selection(batch: int, length: int, top_k: int) -> tuple[Selection, Tensor]:
    """A causal choice by random scores, and it as a mask [B, S, S]."""
    scores = torch.randn(batch, length, length, dtype=torch.float64)
    indices = choose(scores, top_k, 0, 1)
    seen = indices <= torch.arange(length)[:, None]
    allowed = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            allowed[row, query, indices[row, query][seen[row, query]]] = True
    return Selection(indices, seen, scores.gather(2, indices)), allowed


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_attention_to_the_chosen_is_dense_attention_under_a_mask_forward_and_backward(
    heads: int, groups: int
) -> None:
    selection, allowed = random_selection(2, 9, 4)
    shapes = [(2, heads, 9, 6), (2, groups, 9, 6), (2, groups, 9, 5)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found, attention = attend(inputs[0], inputs[1], inputs[2], selection)
    wanted, dense = masked_attention(inputs[0], inputs[1], inputs[2], allowed)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    picked = dense.gather(3, selection.indices[:, None].expand(-1, heads, -1, -1))
    torch.testing.assert_close(attention, picked, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(wanted)
    for mine, their in zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(wanted, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, their, rtol=1e-10, atol=1e-10)


@BOTH
def test_no_later_position_contributes_by_value_or_by_choice(config: DecoderConfig) -> None:
    block = build_attention(config, 0).double()
    randomise(block, 5)
    rotary = rotary_tables(12, config.rotary_dim, 1e4)
    x = torch.randn(1, 12, 24, dtype=torch.float64, requires_grad=True)
    y, selection = block(x, rotary)
    assert selection is not None
    for query in range(12):
        (gradient,) = torch.autograd.grad(y[0, query].sum(), x, retain_graph=True)
        touched = gradient[0].abs().sum(dim=1) > 0
        chosen = selection.indices[0, query][selection.seen[0, query]]
        assert set(touched.nonzero()[:, 0].tolist()) <= set(chosen.tolist()) | {query}
        assert not touched[query + 1 :].any()
        changed = x.detach().clone()
        changed[0, query + 1 :] += 3
        assert largest(block(changed, rotary)[0][:, : query + 1], y[:, : query + 1]) < 1e-12


# ------------------------------------------------------------------------------------------------
# sharing


@pytest.mark.parametrize("share", [1, 2, 3])
@pytest.mark.parametrize("wiring", [Wiring.PLAIN, Wiring.SHORTCUT])
def test_blocks_in_a_row_use_the_selection_of_the_first_of_them(
    share: int, wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Tensor] = []

    def recorded(
        query: Tensor, key: Tensor, value: Tensor, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        used.append(selection.indices)
        return attend(query, key, value, selection)

    monkeypatch.setattr(attention_module, "attend", recorded)
    config = GROUPED.replace(wiring=wiring, sparse_attention=SPARSE.replace(share=share))
    model = Decoder(config)
    randomise(model, 7)
    output = model(torch.randint(0, 31, (2, 20)), torch.randint(0, 31, (2, 20)))
    assert len(used) == config.num_attentions
    for number in range(1, len(used)):
        assert torch.equal(used[number], used[number - 1]) == (number % share != 0)
    indexers = sum(name.endswith("indexer.query.weight") for name, _ in model.named_parameters())
    assert indexers == -(-config.num_attentions // share)
    assert output.losses["indexer"] > 0


# ------------------------------------------------------------------------------------------------
# training


def test_the_indexers_loss_is_the_divergence_from_the_heads_mean_attention() -> None:
    selection, allowed = random_selection(2, 9, 4)
    query, key, value = (torch.randn(2, 4, 9, 6, dtype=torch.float64) for _ in range(3))
    _, attention = attend(query, key, value, selection)
    _, dense = masked_attention(query, key, value, allowed)
    found = indexer_loss(selection, attention)
    for row in range(2):
        for place in range(9):
            chosen = selection.seen[row, place]
            positions, scores = (
                selection.indices[row, place][chosen],
                selection.scores[row, place][chosen],
            )
            target = dense[row, :, place, positions].mean(dim=0)
            model = scores.exp() / scores.exp().sum()
            wanted = (target * (target / model).log()).sum().item()
            assert found[row, place].item() == pytest.approx(wanted, rel=1e-8, abs=1e-12)


def test_the_indexers_loss_is_a_mean_over_blocks_and_real_tokens() -> None:
    model = Decoder(GROUPED).double()
    randomise(model, 6)
    ids, valid = torch.randint(0, 31, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    alone = [model(row, row).losses["indexer"].item() for row in (ids[:1], ids[1:, :12])]
    found = model(ids, ids, valid).losses["indexer"].item()
    assert found == pytest.approx((20 * alone[0] + 12 * alone[1]) / 32, rel=1e-9)


@BOTH
def test_the_indexer_learns_from_its_own_loss_alone_and_nothing_else_does(
    config: DecoderConfig,
) -> None:
    model = Decoder(config.replace(sparse_attention=SPARSE.replace(share=2)))
    ids = torch.randint(0, 31, (2, 20))
    output = model(ids, ids.roll(-1, 1))
    assert output.loss is not None
    output.loss.backward(retain_graph=True)
    assert all(
        (parameter.grad is None) == ("indexer" in name)
        for name, parameter in model.named_parameters()
    )
    model.zero_grad(set_to_none=True)
    output.losses["indexer"].backward()
    assert all(
        (parameter.grad is not None) == ("indexer" in name)
        for name, parameter in model.named_parameters()
    )


@BOTH
def test_training_the_indexer_lowers_its_loss(config: DecoderConfig) -> None:
    torch.manual_seed(0)
    model = Decoder(config)
    randomise(model, 2)
    optimizer = torch.optim.Adam(
        [value for name, value in model.named_parameters() if "indexer" in name], lr=3e-3
    )
    ids, losses = torch.randint(0, 31, (4, 20)), []
    for _ in range(40):
        loss = model(ids, ids.roll(-1, 1)).losses["indexer"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_the_coefficient_multiplies_the_loss_and_evaluation_has_none() -> None:
    ids, found = torch.randint(0, 31, (2, 20)), []
    for coefficient in (1.0, 0.25):
        torch.manual_seed(4)
        model = Decoder(GROUPED.replace(sparse_attention=SPARSE.replace(loss_coef=coefficient)))
        found.append(model(ids, ids).losses["indexer"].item())
        assert "indexer" not in model.eval()(ids, ids).losses
        assert not model(ids).losses
    assert found[1] == pytest.approx(found[0] / 4)


def test_attention_of_mtp_modules_is_dense() -> None:
    model = Decoder(GROUPED.replace(mtp=MTPConfig(2)))
    assert not [name for name, _ in model.mtp.named_parameters() if "indexer" in name]


# ------------------------------------------------------------------------------------------------
# configuration


@pytest.mark.parametrize(("top_k", "context"), [(1, 1), (4, 3), (4, 9), (32, 256)])
def test_attention_sparsity_is_the_share_of_visible_pairs_left_out(
    top_k: int, context: int
) -> None:
    config = GROUPED.replace(sparse_attention=SPARSE.replace(top_k=top_k))
    visible = sum(query + 1 for query in range(context))
    attended = sum(min(top_k, query + 1) for query in range(context))
    assert config.attention_sparsity(context) == pytest.approx(1 - attended / visible)
    assert GROUPED.replace(sparse_attention=None).attention_sparsity(context) == 0


def test_choices_that_do_not_fit_are_refused() -> None:
    with refused("top_k"):
        SPARSE.replace(initial=4, local=3)
    with refused("share"):
        SPARSE.replace(share=0)
    with refused("initial"):
        SPARSE.replace(initial=-1)
    with pytest.raises(
        ConfigError, match=r"expected loss_coef as a number of at least 0, got -0\.5"
    ):
        SPARSE.replace(loss_coef=-0.5)
    with pytest.raises(
        ConfigError,
        match=r"expected sparse_attention\.head_dim of at least the 6 rotary channels, got 4",
    ):
        GROUPED.replace(sparse_attention=SPARSE.replace(head_dim=4))
