"""Capture from our own models and from modules of the user's: numbering, padding, replays, readers,
and what raises.
"""

import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_lab.errors import TraceError
from moe_lab.model import Decoder, DecoderConfig, MoEConfig, MoELayer
from moe_lab.routing import Router, RouterConfig
from moe_lab.trace import capture, merge_traces, open_trace
from moe_lab.trace.score_spread import margin

LAYER = MoEConfig(d_model=16, d_expert=8, router=RouterConfig(num_experts=8, top_k=2))


def decoder(kind="softmax_topk", layers=3, **router):
    torch.manual_seed(0)
    moe = MoEConfig(
        d_model=16, d_expert=8, router=RouterConfig(kind=kind, num_experts=8, top_k=2, **router)
    )
    return Decoder(
        DecoderConfig(
            vocab_size=40, d_model=16, num_layers=layers, num_heads=2, context_length=64, moe=moe
        )
    ).eval()


def token_ids(batch, length, seed=0):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("softmax_topk", {}),
        ("longcat", {"num_zero_experts": 3}),
        ("moepp", {"num_zero_experts": 3}),
        ("deepseek_v3", {"num_groups": 2, "topk_groups": 1}),
        ("switch", {"capacity_factor": 0.5}),
        ("top_p", {}),
        ("zaya", {"num_zero_experts": 1}),
    ],
)
def test_every_decision_of_our_routers_is_recorded(tmp_path, kind, options):
    model = _decoder_of(kind, options)
    with torch.no_grad(), capture(model, tmp_path / "t"):
        output = model(token_ids(3, 20))
    trace = open_trace(tmp_path / "t").check()
    assert [layer.layer for layer in trace.meta.layers] == list(model.config.moe_layers)
    for layer, routing in zip(trace.meta.layers, output.routings, strict=True):
        assert trace.layer_counts(layer).tolist() == routing.counts().tolist()
        rows = trace.routing.filter(pl.col("layer") == layer.layer).sort("doc", "pos").collect()
        assert rows["experts"].to_list() == [
            [i for i in row if i >= 0] for row in routing.indices.tolist()
        ]
        assert rows["zero_count"].to_list() == routing.zero_count().tolist()
        assert rows["dropped"].to_list() == routing.dropped().sum(dim=1).tolist()
        np.testing.assert_allclose(
            rows["entropy"].to_numpy(), routing.entropy().numpy(), rtol=1e-5, atol=1e-6
        )
        finite = routing.margin().isfinite()
        np.testing.assert_allclose(
            rows["margin"].to_numpy()[finite],
            routing.margin()[finite].numpy(),
            rtol=1e-5,
            atol=1e-6,
        )
        assert len(layer.zero_kinds) == layer.num_zero_experts


def _decoder_of(kind, options):
    torch.manual_seed(0)
    one = {"top_k": 1} if kind in ("switch", "zaya") else {"top_k": 2}
    moe = MoEConfig(
        d_model=16, d_expert=8, router=RouterConfig(kind=kind, num_experts=8, **one, **options)
    )
    return Decoder(
        DecoderConfig(
            vocab_size=40, d_model=16, num_layers=3, num_heads=2, context_length=64, moe=moe
        )
    ).eval()


def test_padding_is_left_out_and_positions_count_real_tokens(tmp_path):
    model, ids = decoder(), token_ids(2, 8)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[0, :3] = False  # left
    valid[1, 6:] = False  # right
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model(ids, valid_BS=valid)
    tokens = open_trace(tmp_path / "t").check().tokens.sort("doc", "pos").collect()
    assert tokens["doc"].to_list() == [0] * 5 + [1] * 6
    assert tokens["pos"].to_list() == [*range(5), *range(6)]
    assert tokens["token_id"].to_list() == ids[0, 3:].tolist() + ids[1, :6].tolist()


def test_documents_are_numbered_over_passes(tmp_path):
    model = decoder()
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model(token_ids(2, 4))
        model(token_ids(3, 2))
    tokens = open_trace(tmp_path / "t").check().tokens.sort("doc", "pos").collect()
    assert tokens["doc"].to_list() == [0] * 4 + [1] * 4 + [2, 2, 3, 3, 4, 4]


def test_columns_that_change_between_passes_are_refused(tmp_path):
    model = decoder()
    with (
        refused("columns", TraceError),
        torch.no_grad(),
        capture(model, tmp_path / "t") as captured,
    ):
        model(token_ids(2, 4))
        captured.documents([7, 9], label=np.array([list("abcd")] * 2))
        model(token_ids(2, 4))


def test_given_documents_positions_and_columns_are_kept(tmp_path):
    model, ids = decoder(), token_ids(2, 4)
    with torch.no_grad(), capture(model, tmp_path / "t") as captured:
        captured.documents([7, 9], pos=[10, 0], label=np.array([list("abcd"), list("efgh")]))
        model(ids)
        captured.documents(
            np.array([[3, 3, 4, 4]]), pos=np.array([[0, 1, 0, 1]]), label=np.array([list("ijkl")])
        )
        model(ids[:1])
    tokens = open_trace(tmp_path / "t").check().tokens.sort("doc", "pos").collect()
    assert tokens.select("doc", "pos").rows() == [
        (3, 0),
        (3, 1),
        (4, 0),
        (4, 1),
        *((7, p) for p in range(10, 14)),
        *((9, p) for p in range(4)),
    ]
    assert "".join(tokens["label"].to_list()) == "ijklabcdefgh"


def test_replays_of_activation_checkpointing_are_not_counted(tmp_path):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(MoELayer(LAYER) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = x + checkpoint(layer, x, use_reentrant=False)
            return x

    model, x = Checkpointed(), torch.randn(3, 5, 16, requires_grad=True)
    with capture(model, tmp_path / "t"):
        model(x).sum().backward()
        model(x).sum().backward()
    trace = open_trace(tmp_path / "t").check()
    assert trace.num_tokens == 30
    assert trace.meta.phase == "train"
    assert trace.tokens.collect().height == 0


def test_a_bare_router_and_a_bare_layer_are_models_too(tmp_path):
    layer = MoELayer(
        MoEConfig(d_model=16, d_expert=8, router=RouterConfig(num_experts=8, top_k=2))
    ).eval()
    with torch.no_grad(), capture(layer, tmp_path / "layer"):
        layer(torch.randn(2, 5, 16))
    with torch.no_grad(), capture(layer.router, tmp_path / "router"):
        layer.router(torch.randn(7, 16))
    assert open_trace(tmp_path / "layer").check().num_tokens == 10
    assert open_trace(tmp_path / "router").check().num_tokens == 7


class Theirs(nn.Module):
    """A block of another house: its gate returns what ``answer`` makes of logits and top k."""

    def __init__(self, answer, experts=6, slots=2, softmax=True):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Module()
        self.mlp.gate = Gate(answer, experts, slots, softmax)
        self.mlp.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))
        self.embed = nn.Embedding(30, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.mlp.gate(self.embed(input_ids).flatten(0, 1))


class Gate(nn.Module):
    def __init__(self, answer, experts, slots, softmax):
        super().__init__()
        self.linear, self.answer, self.softmax = nn.Linear(8, experts, bias=False), answer, softmax
        self.num_experts, self.top_k = experts, slots
        nn.init.normal_(self.linear.weight, std=2.0)

    def forward(self, x):
        logits = self.linear(x)
        scores = logits.softmax(dim=1) if self.softmax else logits.sigmoid()
        weights, indices = scores.topk(self.top_k, dim=1)
        return self.answer(logits, weights, indices)


@pytest.mark.parametrize("order", ["lwi", "ilw", "iwl", "wil", "wli", "lwixy"])
def test_a_triple_is_read_in_any_order(tmp_path, order):
    def answer(logits, weights, indices):
        parts = {"l": logits, "w": weights, "i": indices, "x": torch.zeros(()), "y": torch.zeros(3)}
        return tuple(parts[name] for name in order)

    model = Theirs(answer)
    with torch.no_grad(), capture(model, tmp_path / "t"):
        output = dict(zip(order, model(token_ids(2, 9) % 30), strict=False))
    rows = open_trace(tmp_path / "t").check().routing.sort("doc", "pos").collect()
    assert rows["experts"].to_list() == output["i"].tolist()
    np.testing.assert_allclose(
        rows["weights"].explode().to_numpy(), output["w"].flatten(), atol=1e-3
    )


@pytest.mark.parametrize("softmax", [True, False])
def test_the_score_function_is_told_by_the_weights(tmp_path, softmax):
    model = Theirs(lambda *triple: triple, softmax=softmax)
    with torch.no_grad(), capture(model, tmp_path / "t"):
        logits, _, _ = model(token_ids(2, 9) % 30)
    trace = open_trace(tmp_path / "t")
    assert trace.meta.layers[0].score_func == ("softmax" if softmax else "sigmoid")
    scores = logits.softmax(dim=1) if softmax else logits.sigmoid()
    share = (scores / scores.sum(dim=1, keepdim=True)).double()
    np.testing.assert_allclose(
        trace.routing.collect()["entropy"].to_numpy(),
        -(share * share.log()).sum(dim=1).numpy(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_probabilities_under_the_name_of_logits_are_not_softmaxed_again(tmp_path):
    model = Theirs(lambda logits, weights, indices: (logits.softmax(dim=1), weights, indices))
    with torch.no_grad(), capture(model, tmp_path / "t"):
        share, _, _ = model(token_ids(2, 9) % 30)
    rows = open_trace(tmp_path / "t").routing.collect()
    np.testing.assert_allclose(
        rows["entropy"].to_numpy(), -(share * share.log()).sum(dim=1).numpy(), rtol=1e-4, atol=1e-6
    )
    top = share.topk(3, dim=1).values
    np.testing.assert_allclose(
        rows["margin"].to_numpy(), (top[:, 1] - top[:, 2]).numpy(), atol=1e-6
    )


def test_a_users_reader_reads_what_is_not_known(tmp_path):
    model = Theirs(lambda logits, weights, indices: {"where": indices, "how": weights})
    with pytest.raises(
        TraceError,
        match=r"^mlp.gate \(Gate\): .*expected integer indices \[tokens, 2\] among its outputs, "
        r"got \(dict\)",
    ):
        run(model, tmp_path / "t")
    reader = lambda module, seen: (seen["output"]["how"], seen["output"]["where"])  # noqa: E731
    with torch.no_grad(), capture(model, tmp_path / "t", readers={r"mlp\.gate": reader}):
        output = model(token_ids(2, 9) % 30)
    trace = open_trace(tmp_path / "t").check()
    assert (
        trace.routing.sort("doc", "pos").collect()["experts"].to_list() == output["where"].tolist()
    )
    assert not trace.meta.has_scores
    with refused("readers", TraceError):
        capture(model, tmp_path / "t", readers={"mlp.router": reader})


def run(model, folder, **options):
    with torch.no_grad(), capture(model, folder, **options):
        model(token_ids(2, 9) % 30)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda logits, w, i: (logits, w, i + 5),
            r"mlp.gate \(Gate\): layer 0: expected expert ids between -1 and 5",
        ),
        (
            lambda logits, w, i: (logits, w, i * 0),
            r"mlp.gate \(Gate\): layer 0: expected each token to name an expert at most once",
        ),
        (
            lambda logits, w, i: (logits, w / 0, i),
            r"mlp.gate \(Gate\): layer 0: expected finite gate weights",
        ),
        (
            lambda logits, w, i: (logits * float("nan"), w, i),
            r"mlp.gate \(Gate\): layer 0: expected finite router scores",
        ),
        (
            lambda logits, w, i: (logits[:5], w[:5], i[:5]),
            r"mlp.gate \(Gate\): expected one decision for each of 18 tokens, got 5 in 1 calls",
        ),
    ],
)
def test_what_does_not_fit_raises_and_names_the_module(tmp_path, answer, message):
    with pytest.raises(TraceError, match=message):
        run(Theirs(answer), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_experts_without_a_known_router_are_named(tmp_path):
    model = Theirs(lambda *triple: triple)
    model.mlp.gate = nn.Linear(8, 6)
    with refused("readers", TraceError):
        capture(model, tmp_path / "t")
    both = nn.ModuleDict({"first": Theirs(lambda *triple: triple), "second": model})
    with refused("readers", TraceError):
        capture(both, tmp_path / "t")
    capture(both, tmp_path / "t", only="first")


def test_a_router_that_does_not_run_is_named(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(MoELayer(LAYER) for _ in range(2))

        def forward(self, x):
            return self.layers[0](x)

    model = Half().eval()
    with refused("layers.1.router", TraceError):
        run_on(model, tmp_path / "t", torch.randn(2, 3, 16))
    run_on(model, tmp_path / "t", torch.randn(2, 3, 16), only=r"layers\.0\.")
    with (
        refused("model", TraceError),
        capture(model, tmp_path / "u"),
    ):
        pass


def run_on(model, folder, x, **options):
    with torch.no_grad(), capture(model, folder, **options):
        model(x)


def test_outputs_changed_in_place_are_noticed(tmp_path):
    class Rude(Theirs):
        def forward(self, input_ids, attention_mask=None):
            logits, weights, indices = super().forward(input_ids)
            weights.mul_(2)
            return logits, weights, indices

    with refused("outputs", TraceError):
        run(Rude(lambda *triple: triple), tmp_path / "t")


def test_an_error_of_the_model_leaves_hooks_off_and_an_incomplete_trace(tmp_path):
    model = decoder()
    with pytest.raises(ValueError, match="stop"), torch.no_grad(), capture(model, tmp_path / "t"):  # noqa: PT012
        model(token_ids(2, 6))
        raise ValueError("stop")
    assert open_trace(tmp_path / "t.incomplete", allow_incomplete=True).check().num_tokens == 12
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_interrupted_capture_goes_on(tmp_path):
    model = decoder()
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        torch.no_grad(),
        capture(model, tmp_path / "t") as captured,
    ):
        for doc in range(4):
            captured.documents([doc])
            model(token_ids(1, 6, seed=doc))
        raise KeyboardInterrupt
    with torch.no_grad(), capture(model, tmp_path / "t", resume=True) as captured:
        assert captured.finished == {0, 1, 2}  # the last could have gone on
        for doc in sorted(set(range(6)) - captured.finished):
            captured.documents([doc])
            model(token_ids(1, 6, seed=doc))
    with torch.no_grad(), capture(model, tmp_path / "whole"):
        for doc in range(6):
            model(token_ids(1, 6, seed=doc))
    both = [
        open_trace(tmp_path / name).check().routing.sort("layer", "doc", "pos").collect()
        for name in ("t", "whole")
    ]
    assert both[0].equals(both[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_give_no_loss_are_refused(tmp_path, value):
    """A null would say that the token was not predicted."""
    model = decoder()

    def spoil(module, inputs, output):
        output.logits[1, 3, 7] = value

    model.register_forward_hook(spoil)
    with torch.no_grad():
        with refused("losses", TraceError), capture(model, tmp_path / "t", losses=True):
            model(token_ids(2, 9))
        with capture(model, tmp_path / "routes"):
            model(token_ids(2, 9))
    assert open_trace(tmp_path / "routes").num_tokens == 18


def test_losses_are_those_of_the_next_token(tmp_path):
    model, ids = decoder(), token_ids(2, 7)
    with torch.no_grad(), capture(model, tmp_path / "t", losses=True):
        logits = model(ids).logits
    want = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(2, 6)
    tokens = open_trace(tmp_path / "t").tokens.sort("doc", "pos").collect()
    losses = np.array(tokens["loss"].fill_null(float("nan")).to_list()).reshape(2, 7)
    assert np.isnan(losses[:, 0]).all()
    np.testing.assert_allclose(losses[:, 1:], want, rtol=1e-5)


def test_weights_and_statistics_can_be_left_out_and_the_output_ratio_taken_in(tmp_path):
    model = decoder()
    with (
        torch.no_grad(),
        capture(model, tmp_path / "t", weights=False, statistics=False, output_ratio=True),
    ):
        model(token_ids(2, 7))
    trace = open_trace(tmp_path / "t").check()
    rows = trace.routing.collect()
    assert not trace.meta.has_weights
    assert not trace.meta.has_scores
    assert rows["weights"].null_count() == rows.height
    assert (rows["output_ratio"] > 0).all()


def test_ranks_are_merged_and_documents_counted_once(tmp_path):
    model = decoder()
    for rank in range(2):
        with torch.no_grad(), capture(model, tmp_path / f"rank{rank}"):
            model(token_ids(2, 5, seed=rank))
    merged = merge_traces([tmp_path / "rank0", tmp_path / "rank1"], tmp_path / "all").check()
    assert merged.num_tokens == 20
    assert merged.tokens.select(pl.col("doc").n_unique()).collect().item() == 4
    parts = [open_trace(tmp_path / f"rank{rank}") for rank in range(2)]
    assert (
        merged.counts()["count"].to_list()
        == (parts[0].counts()["count"] + parts[1].counts()["count"]).to_list()
    )
    second = (
        merged.routing.filter(pl.col("doc") >= 2)
        .with_columns(pl.col("doc") - 2)
        .sort("layer", "doc", "pos")
        .collect()
    )
    assert second.equals(parts[1].routing.sort("layer", "doc", "pos").collect())
    with refused("doc", TraceError):
        merge_traces([tmp_path / "rank0", tmp_path / "rank1"], tmp_path / "kept", renumber=False)


def test_the_fast_margin_is_the_sorted_one():
    scores = torch.rand(200, 9)
    top = scores.topk(4, dim=1)
    want = top.values[:, 2] - top.values[:, 3]
    assert torch.equal(margin(scores, top.indices[:, :3]), want)
    other = torch.rand(200, 9).topk(3, dim=1).indices  # a selection that a bias made
    torch.testing.assert_close(margin(scores, other), want)
    assert torch.isinf(margin(scores, torch.arange(9).expand(200, 9))).all()


def test_routers_of_ours_are_found_by_type():
    names = [name for name, module in decoder().named_modules() if isinstance(module, Router)]
    assert names == [f"blocks.{layer}.ffn.router" for layer in range(3)]


FORKING = """
import os, sys, torch
from moe_lab.errors import TraceError
from moe_lab.trace import capture, open_trace
from moe_lab.model import MoEConfig, MoELayer
from moe_lab.routing import RouterConfig
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = MoELayer(MoEConfig(16, 8, router=RouterConfig(num_experts=8, top_k=2)))
    def forward(self, hidden):
        return self.moe(hidden)

model, x, ended = Model().eval(), torch.zeros(2, 5, 16), 3
with torch.no_grad(), capture(model, sys.argv[1]) as recorded:
    model(x)
    if (child := os.fork()) == 0:
        try:
            model(x)
        except TraceError as error:
            ended = 7 if "got a forked child" in str(error) else 4
if child == 0:
    os._exit(ended)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(open_trace(sys.argv[1]).check().num_tokens)
"""


def test_a_forked_child_leaves_capture_without_touching_the_trace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path / "t")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MOE_LAB_NATIVE": "0"},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "10"), done.stderr[-1500:]


class Letters:
    """A tokenizer of single characters."""

    alphabet = "abcdefghij 0123456789.\nABCDEFGHIJKLMNOP"

    def __len__(self):
        return len(self.alphabet)

    def get_vocab(self):
        return {letter: number for number, letter in enumerate(self.alphabet)}

    def decode(self, ids):
        return "".join(self.alphabet[number] for number in ids)


def test_classes_of_tokens_are_recorded_on_request_and_the_error_says_so(tmp_path):
    from moe_lab.analysis import class_profile
    from moe_lab.errors import AnalysisError

    model, letters = decoder(), Letters()
    texts = ["abc 12", "cab\n9 "]
    ids = torch.tensor([[letters.alphabet.index(letter) for letter in text] for text in texts])
    for name, classes in (("with", True), ("without", False)):
        options = {"tokenizer": letters, "classes": classes}
        with torch.no_grad(), capture(model, tmp_path / name, **options):
            model(ids)
    tokens = open_trace(tmp_path / "with").tokens.sort("doc", "pos").collect()
    assert "".join(tokens["text"]) == "".join(texts)
    kinds = dict(zip(tokens["text"].to_list(), tokens["unicode"].to_list(), strict=True))
    assert kinds["a"] == kinds["b"] != kinds["1"] == kinds["9"]
    assert set(tokens["repeat"]) == {"first"}
    profile = class_profile(open_trace(tmp_path / "with"), "unicode", include_first=True)
    assert set(profile["class"]) == set(kinds.values())
    with refused("column", AnalysisError) as caught:
        class_profile(open_trace(tmp_path / "without"), "unicode")
    assert "classes=True" in str(caught.value)
    with refused("tokenizer"):
        capture(model, tmp_path / "none", classes=True)
