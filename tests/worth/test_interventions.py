"""Interventions on this library's routers, replays, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from refusals import refused

from moe_lab.errors import TraceError
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, RouterConfig
from moe_lab.trace import capture, open_trace
from moe_lab.worth import Exchange, Forbid, Replay, Silence, TopK, intervene

KINDS = [
    ("softmax_topk", {}),
    ("deepseek_v3", {"num_groups": 1, "topk_groups": 1}),
    ("gemma", {}),
    ("noisy_topk", {}),
    ("topk_softmax", {}),
    ("sigmoid_topk", {}),
    ("top_p", {}),
    ("llama4", {}),
    ("longcat", {"num_zero_experts": 2}),
    ("moepp", {"num_zero_experts": 2}),
    ("remoe", {}),
    ("zaya", {"num_zero_experts": 1, "top_k": 1}),
]


def decoder(kind="softmax_topk", layers=2, **options):
    torch.manual_seed(0)
    router = RouterConfig(kind=kind, **{"num_experts": 6, "top_k": 2, **options})
    moe = MoEConfig(d_model=16, d_expert=8, router=router)
    config = DecoderConfig(
        vocab_size=40, d_model=16, num_layers=layers, num_heads=2, context_length=32, moe=moe
    )
    return Decoder(config).double().eval()


def moe_layers(model) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "MoELayer"]


def ids(seed=0):
    return torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(seed))


def logits(model, *edits):
    with torch.no_grad():
        if not edits:
            return model(ids()).logits
        with intervene(model, *edits):
            return model(ids()).logits


def most_used(model):
    return int(model(ids()).routings[-1].counts()[:6].argmax())


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_silence_is_an_expert_whose_output_is_zero(kind, options):
    model = decoder(kind, **options)
    expert, zeroed = most_used(model), copy.deepcopy(model)
    bank = moe_layers(zeroed)[1].experts
    for value in bank.parameters():
        value.data[expert] = 0
    silenced = logits(model, Silence(1, expert))
    torch.testing.assert_close(silenced, logits(zeroed), rtol=1e-12, atol=1e-14)
    assert not torch.equal(silenced, logits(model))


@pytest.mark.parametrize(
    ("kind", "options"),
    [row for row in KINDS if row[0] != "moepp"],  # its layers are linked by the number of experts
)
def test_forbid_is_an_expert_whose_rows_are_deleted(kind, options):
    model = decoder(kind, **options)
    expert, deleted = most_used(model), copy.deepcopy(model)
    (name,) = [name for name, module in deleted.named_modules() if module is moe_layers(deleted)[1]]
    smaller = moe_layers(decoder(kind, **{**options, "num_experts": 5}))[1]
    shapes = {key: value.shape for key, value in smaller.state_dict().items()}
    smaller.load_state_dict(
        {
            key: without_row(value, expert, shapes[key])
            for key, value in deleted.get_submodule(name).state_dict().items()
        }
    )
    deleted.set_submodule(name, smaller)
    forbidden = logits(model, Forbid(1, expert))
    torch.testing.assert_close(forbidden, logits(deleted), rtol=1e-9, atol=1e-12)
    assert not torch.equal(forbidden, logits(model))


def without_row(value, expert, shape):
    """The tensor without the expert's row, where ``shape`` has one less."""
    if value.shape == shape:
        return value
    keep = [row for row in range(len(value)) if row != expert]
    return value[torch.tensor(keep)]


def test_an_exchange_with_an_exact_copy_changes_nothing_to_the_bit():
    model = decoder()
    expert = most_used(model)
    other = (expert + 1) % 6
    before = logits(model, Exchange(1, expert, other))
    assert not torch.equal(before, logits(model))
    for value in moe_layers(model)[1].experts.parameters():
        value.data[other] = value.data[expert]
    assert torch.equal(logits(model, Exchange(1, expert, other)), logits(model))


def test_an_exchange_made_twice_is_none():
    model = decoder(top_k=3)
    assert torch.equal(logits(model, Exchange(0, 1, 4), Exchange(0, 4, 1)), logits(model))


@pytest.mark.parametrize("k", [1, 4])
def test_top_k_of_some_tokens_is_that_of_all_at_their_places(k):
    model, named = decoder(), torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    before, every = logits(model), logits(model, TopK(1, k))
    some = logits(model, TopK(1, k, named))  # in the last layer no token sees another's experts
    assert torch.allclose(some[named], every[named], atol=1e-12)
    assert torch.allclose(some[~named], before[~named], atol=1e-12)
    assert not torch.allclose(before[named], every[named])
    nowhere = torch.zeros(3, 12, dtype=torch.bool)
    assert torch.allclose(logits(model, TopK(None, k, nowhere)), before, atol=1e-12)
    everywhere = torch.ones(3, 12, dtype=torch.bool)
    assert torch.allclose(logits(model, TopK(None, k, everywhere)), logits(model, TopK(None, k)))
    with refused("tokens", TraceError):
        logits(model, TopK(1, k, named[:2]))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_is_that_of_a_model_configured_so(k):
    model, other = decoder(), decoder(top_k=k)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, TopK(None, k)), logits(other))
    assert not torch.equal(logits(model, TopK(1, k)), logits(other))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_replay_of_the_models_own_trace_is_equal_to_the_bit(kind, options, tmp_path):
    model = decoder(kind, **options)
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model(ids())
    trace = open_trace(tmp_path / "t")
    assert torch.equal(logits(model, Replay(trace)), logits(model))
    recorded = logits(model, Replay(trace, recorded_weights=True))
    torch.testing.assert_close(recorded, logits(model), rtol=1e-2, atol=1e-3)
    assert not torch.equal(recorded, logits(model))  # a trace keeps weights as float16


def test_the_replay_of_another_model_selects_its_experts_and_trains_the_weights(tmp_path):
    model, other = decoder(), decoder()
    for layer in moe_layers(other):
        layer.router.weight.data.neg_()
    with torch.no_grad(), capture(other, tmp_path / "t"):
        wanted = other(ids()).routings
    with intervene(model, Replay(open_trace(tmp_path / "t"))):
        output = model(ids())
    # The second layer of the other model saw other tokens; its recorded ids are replayed too.
    for got, want in zip(output.routings, wanted, strict=True):
        assert torch.equal(got.indices, want.indices)
        torch.testing.assert_close(got.weights, got.scores.gather(1, want.indices))
    output.logits.square().sum().backward()
    for layer in moe_layers(model):
        assert layer.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_gradient_of_a_replay_is_that_of_fixed_ids(kind, options, tmp_path):
    """A step that moves the model's own selection moves the replayed logits as their gradient says:
    nothing but the weights of the recorded ids depends on the router.
    """
    model = decoder(kind, **options)
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model(ids())
    trace, weight = open_trace(tmp_path / "t"), moe_layers(model)[0].router.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()

    if kind in ("top_p", "remoe"):  # their own scores say how many slots a token has
        weight.data += direction
        with refused("edits", TraceError):
            logits(model, Replay(trace))
        return

    def output(step):
        weight.data += step * direction
        with intervene(model, Replay(trace)):
            value = model(ids()).logits.square().sum()
        weight.data -= step * direction
        return value

    output(0.0).backward()
    slope = (weight.grad * direction).sum()
    numeric = (output(1e-5) - output(-1e-5)) / 2e-5
    torch.testing.assert_close(numeric.detach(), slope, rtol=1e-5, atol=1e-8)
    weight.data += direction
    with torch.no_grad():
        moved = model(ids()).routings[0].indices
        with intervene(model, Replay(trace)):
            assert not torch.equal(model(ids()).routings[0].indices, moved)


def test_padding_selects_for_itself_in_a_replay(tmp_path):
    model, valid = decoder(), torch.ones(3, 12, dtype=torch.bool)
    valid[1, 8:] = False
    with torch.no_grad(), capture(model, tmp_path / "t"):
        untouched = model(ids(), valid_BS=valid).logits
    with torch.no_grad(), intervene(model, Replay(open_trace(tmp_path / "t"))):
        assert torch.equal(model(ids(), valid_BS=valid).logits, untouched)


def test_a_trace_of_an_edited_model_shows_the_edit(tmp_path):
    model = decoder()
    expert = most_used(model)
    edits = intervene(model, Forbid(1, expert), TopK(0, 1))
    with torch.no_grad(), edits, capture(model, tmp_path / "t"):
        model(ids())
    trace = open_trace(tmp_path / "t").check()
    counts = [trace.layer_counts(layer) for layer in trace.meta.layers]
    assert counts[1][expert] == 0
    assert counts[0].sum() == 36
    assert counts[1].sum() == 72


def test_an_exception_leaves_the_model_as_it_was():
    model, before = decoder(), copy.deepcopy(decoder().state_dict())
    untouched = logits(model)
    modules = {name: set(vars(module)) for name, module in model.named_modules()}
    edits = [Forbid(0, 1), Silence(1, 2), TopK(None, 3), Exchange(1, 0, 5)]
    with pytest.raises(IndexError), intervene(model, *edits):
        model(ids() + 40)  # ids that are not in the vocabulary
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    assert all(not module._forward_hooks for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), untouched)


def test_a_selection_bias_does_not_bring_a_forbidden_expert_back():
    bias = ControllerConfig(kind="sign")
    model = decoder("deepseek_v3", num_groups=1, topk_groups=1, controller=bias)
    moe_layers(model)[1].router.controller.bias[3] = 100.0
    with torch.no_grad(), intervene(model, Forbid(1, 3)):
        assert not bool((model(ids()).routings[1].indices == 3).any())


@pytest.mark.parametrize("kind", ["hash", "random"])
def test_routers_without_logits_are_named(kind):
    options = {"vocab_size": 40} if kind == "hash" else {}
    model = decoder(kind, **options)
    for edit in (Forbid(1, 2), *([TopK(1, 3)] if kind == "hash" else [])):
        with pytest.raises(TraceError, match=r"blocks\.1"):
            logits(model, edit)
    logits(model, Silence(1, 2))


def test_what_is_not_there_is_refused(tmp_path):
    model = decoder()
    for field, edit in (
        ("layer", Silence(7, 0)),
        ("expert", Forbid(1, 6)),
        ("expert", Exchange(1, 0, -1)),
        ("k", TopK(1, 7)),
        ("k", TopK(None, 0)),
    ):
        with refused(field, TraceError):
            logits(model, edit)
    with refused("edits", TraceError), intervene(model, Silence(1, 0)):
        pass  # no forward pass
    with refused("edits", TraceError), intervene(model):
        pass
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model(ids(seed=1))
    for inputs in (ids(), ids(seed=1)[:, :4].repeat(1, 4)):
        with (
            refused("trace", TraceError),
            torch.no_grad(),
            intervene(model, Replay(open_trace(tmp_path / "t"))),
        ):
            model(inputs)
    with refused("trace", TraceError):
        logits(decoder(num_experts=5), Replay(open_trace(tmp_path / "t")))
