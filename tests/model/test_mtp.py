"""Multi-token prediction: DeepSeek-V3's equations 21 to 23 written anew, what a module predicts,
what it may see, and its loss.
"""

import math
from typing import Any

import pytest
import torch
from hf_copied import largest, randomise
from refusals import refused
from torch import Tensor

from moe_lab.model import (
    IGNORE,
    Amplification,
    Decoder,
    DecoderConfig,
    LatentAttentionConfig,
    MTPConfig,
    Wiring,
)
from moe_lab.model.mtp import MTPModule

DECODER = DecoderConfig(
    vocab_size=17,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    context_length=12,
    d_dense=20,
    mtp=MTPConfig(3, d_hidden=10),
)


def norm(x: Tensor, weight: Any) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(head: Tensor, theta: float = 1e4) -> Tensor:
    """[S, dim] rotated as complex numbers (first half real, second half imaginary)."""
    length, half = head.shape[0], head.shape[1] // 2
    angles = torch.outer(
        torch.arange(length).double(), theta ** (-torch.arange(half).double() / half)
    )
    z = torch.complex(head[:, :half], head[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=1)


def module_by_hand(module: Any, hidden: Tensor, embedded: Tensor) -> Tensor:
    """[S, D] of one sequence: ``TRM_k(M_k [RMSNorm(h); RMSNorm(Emb)])``, head by head."""
    x = (
        torch.cat(
            (norm(hidden, module.hidden_norm.weight), norm(embedded, module.embedding_norm.weight)),
            dim=1,
        )
        @ module.join.weight.T
    )
    u, length = norm(x, module.attention_norm.weight), x.shape[0]
    rows = module.attention.qkv.weight.split(4)  # 4 query, 2 key, 2 value heads of 4 channels
    mixed = []
    for head in range(4):
        group = head // 2
        query, key, value = u @ rows[head].T, u @ rows[4 + group].T, u @ rows[6 + group].T
        logits = turned(query) @ turned(key).T / math.sqrt(4)
        mixed.append(
            logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(dim=1)
            @ value
        )
    x = x + torch.cat(mixed, dim=1) @ module.attention.out.weight.T
    gate, up = (norm(x, module.ffn_norm.weight) @ module.ffn.gate_up.T).chunk(2, dim=1)
    return x + (gate * gate.sigmoid() * up) @ module.ffn.down.T


def test_drafts_and_loss_follow_the_equations_of_deepseek_v3() -> None:
    model = Decoder(DECODER).double().eval()
    randomise(model, 1)
    ids, targets = torch.randint(0, 17, (2, 12)), torch.randint(0, 17, (2, 12))
    targets[0, 5] = targets[1, 11] = IGNORE
    output = model(ids, targets)
    nats: list[list[Tensor]] = [[], [], []]
    for row in range(2):
        hidden = output.hidden[row]
        for number, module in enumerate(model.mtp, start=1):
            hidden = module_by_hand(
                module, hidden[: 12 - number], model.embedding.weight[ids[row, number:]]
            )
            logits = norm(hidden, module.norm.weight) @ model.embedding.weight.T
            found = list(model.drafts(output.hidden, ids))[number - 1][row]
            torch.testing.assert_close(
                found, logits, rtol=1e-6, atol=1e-6
            )  # our rotary tables are float32
            for place in range(12 - number):
                if (target := int(targets[row, place + number])) != IGNORE:
                    nats[number - 1].append(-logits[place].log_softmax(dim=0)[target])
    wanted = 0.3 * sum(torch.stack(each).mean() for each in nats) / 3
    assert [len(each) for each in nats] == [20, 18, 16]
    torch.testing.assert_close(output.losses["mtp"].double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        DECODER,
        DECODER.replace(
            wiring=Wiring.SHORTCUT, tie_embeddings=False, amplification=Amplification.SQRT
        ),
        DECODER.replace(num_kv_heads=None, latent_attention=LatentAttentionConfig(8, 6, 4, 4, 4)),
    ],
    ids=["plain", "shortcut", "latent"],
)
def test_module_k_sees_no_token_after_i_plus_k(config: DecoderConfig) -> None:
    model = Decoder(config).double().eval()
    randomise(model, 2)
    ids = torch.randint(0, 17, (1, 12))
    before = list(model.drafts(model(ids).hidden, ids))
    assert [tuple(draft.shape) for draft in before] == [(1, 11, 17), (1, 10, 17), (1, 9, 17)]
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 17
        after = list(model.drafts(model(changed).hidden, changed))
        for number, (old, new) in enumerate(zip(before, after, strict=True), start=1):
            first = max(place - number, 0)
            assert largest(old[:, :first], new[:, :first]) < 1e-12 if first else True
            if place >= number:
                assert largest(old[:, first], new[:, first]) > 1e-9, "entry i reads token i + k"


def test_module_k_learns_the_token_k_places_after_the_next() -> None:
    """Ids that walk a fixed cycle: each of the 17 ids says which follow, and no two offsets predict
    alike.
    """
    torch.manual_seed(0)
    model, cycle = Decoder(DECODER), torch.randperm(17)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        walk = cycle[(torch.randint(0, 17, (8, 1)) + torch.arange(13)) % 17]
        output = model(walk[:, :-1], walk[:, 1:])
        assert output.loss is not None
        optimizer.zero_grad()
        (output.loss + output.losses["mtp"]).backward()
        optimizer.step()
    walk = cycle[(torch.arange(17)[:, None] + torch.arange(16)) % 17]
    ids = walk[:, :12]
    for number, draft in enumerate(model.drafts(model(ids).hidden, ids), start=1):
        wanted = walk[:, number + 1 : number + 1 + draft.shape[1]]
        assert (draft.argmax(dim=2) == wanted).float().mean() > 0.99


def test_the_modules_loss_trains_the_decoder_below_and_the_shared_head() -> None:
    model = Decoder(DECODER.replace(tie_embeddings=False))
    ids = torch.randint(0, 17, (2, 12))
    model(ids, ids).losses["mtp"].backward()
    for name in (
        "embedding.weight",
        "head.weight",
        "blocks.0.attention.qkv.weight",
        "mtp.0.join.weight",
        "mtp.2.norm.weight",
    ):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0, name
    assert model.norm.weight.grad is None, "the modules read the stream before the last norm"


def test_modules_do_not_run_without_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Decoder(DECODER)
    monkeypatch.setattr(MTPModule, "forward", lambda *_: pytest.fail("a module ran"))
    assert not model(torch.randint(0, 17, (1, 12))).losses


def test_the_coefficient_multiplies_the_loss() -> None:
    ids, found = torch.randint(0, 17, (2, 12)), []
    for coefficient in (1.0, 0.1):
        torch.manual_seed(0)
        found.append(
            Decoder(DECODER.replace(mtp=MTPConfig(2, loss_coef=coefficient)))(ids, ids)
            .losses["mtp"]
            .item()
        )
    assert found[1] == pytest.approx(found[0] / 10)


@pytest.mark.parametrize(("length", "modules"), [(4, 3), (3, 2), (2, 1), (1, 0)])
def test_sequences_that_are_too_short_for_a_module_leave_it_out(length: int, modules: int) -> None:
    model = Decoder(DECODER)
    ids = torch.randint(0, 17, (2, length))
    output = model(ids, ids)
    assert len(list(model.drafts(output.hidden, ids))) == modules
    assert ("mtp" in output.losses) == (modules > 0)
    assert all(loss.isfinite() for loss in output.losses.values())


def test_targets_that_end_early_cost_nothing_and_are_no_nan() -> None:
    targets = torch.full((1, 12), IGNORE)
    targets[0, 0] = 3
    output = Decoder(DECODER)(torch.randint(0, 17, (1, 12)), targets)
    assert output.loss is not None
    assert output.loss.isfinite()
    assert output.losses["mtp"] == 0


def test_modules_that_do_not_fit_are_refused() -> None:
    with refused("mtp.num_modules"):
        DECODER.replace(mtp=MTPConfig(11))
    with refused("num_modules"):
        MTPConfig(0)
    with refused("d_hidden"):
        MTPConfig(d_hidden=0)
    with refused("loss_coef"):
        MTPConfig(loss_coef=-1)
