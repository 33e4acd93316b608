"""Every MoE directory of transformers 5.23: what is captured is what the model's experts were
given, and the sums conserve.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from hf_capture_models import FAMILIES, SINCE_5_24, WITHOUT_ROUTER, build  # noqa: E402

from moe_lab.errors import TraceError  # noqa: E402
from moe_lab.trace import capture, open_trace  # noqa: E402

pytestmark = pytest.mark.hf

Decisions = dict[str, list[tuple[Tensor, Tensor]]]
"""Router name -> ids and weights [T, K] (-1: nothing ran) of each run of its layer, as an observer
of the experts sees them.
"""


def ran(name: str) -> bool:
    return name not in WITHOUT_ROUTER


@pytest.mark.parametrize("name", [name for name in FAMILIES if ran(name)])
def test_captured_decisions_are_those_that_the_experts_were_given(name: str, tmp_path: Any) -> None:
    config, model, routers = with_routers(name)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    only = None
    if config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids[:, 1:], "decoder_attention_mask": mask[:, 1:]}
        mask, only = mask[:, 1:], "decoder"
    seen: Decisions = {}
    handles = [handle for router in routers for handle in watch(model, router, seen)]
    with torch.no_grad(), capture(model, tmp_path / "t", only=only):
        model(**inputs)
    for handle in handles:
        handle.remove()
    trace = open_trace(tmp_path / "t").check()
    runs = {(name, number) for name, calls in seen.items() for number in range(len(calls))}
    assert {(layer.module, layer.pass_number) for layer in trace.meta.layers} == runs
    real = mask.reshape(-1).bool()
    for layer in trace.meta.layers:
        rows = trace.routing.filter(pl.col("layer") == layer.layer).collect()
        want_ids, want_weights = (values[real] for values in seen[layer.module][layer.pass_number])
        assert rows["experts"].to_list() == [
            [i for i in row if i >= 0] for row in want_ids.tolist()
        ], layer
        kept = [
            [w for i, w in zip(*pair, strict=True) if i >= 0]
            for pair in zip(want_ids.tolist(), want_weights.tolist(), strict=True)
        ]
        got = rows["weights"].to_list()
        assert [len(row) for row in got] == [len(row) for row in kept]
        np.testing.assert_allclose(list(chain(*got)), list(chain(*kept)), rtol=1e-3, atol=1e-6)
        assert int(trace.layer_counts(layer).sum()) == int((want_ids >= 0).sum())
        assert rows["entropy"].is_between(0, np.log(layer.num_choices) + 1e-5).all()
    assert trace.num_tokens == int(real.sum())
    assert (
        trace.tokens.collect()["token_id"].to_list()
        == (ids[:, -mask.shape[1] :].reshape(-1)[real]).tolist()
    )


@pytest.mark.parametrize("name", [name for name in WITHOUT_ROUTER if name in FAMILIES])
def test_models_without_a_router_say_so(name: str, tmp_path: Any) -> None:
    _, model = build(name, 0)
    with refused("readers", TraceError):
        capture(model, tmp_path / "t")


def test_at_least_seventy_of_the_77_directories_are_captured() -> None:
    """nemotron3_5_transcribe has a nemotron_h for its text; the four others have nothing that
    routes tokens.
    """
    families = set(FAMILIES) - set(SINCE_5_24)
    assert len([name for name in families if ran(name)]) + 1 == 73
    assert len(families | set(WITHOUT_ROUTER)) + 1 == 77


def with_routers(name: str) -> tuple[Any, nn.Module, list[str]]:
    """The first random size of the family in which some layer is sparse."""
    for seed in range(20):
        config, model = build(name, seed)
        found = [path for path, module in model.named_modules() if is_router(path, module)]
        if found:
            return config, model, found
    raise AssertionError(f"no sparse layer in {name}")


def is_router(path: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    return kind == "DogeCDMoE" or (
        kind.endswith(("Router", "Gate", "Gating"))
        and hasattr(module, "forward")
        and "Forget" not in kind
        and ("vision" not in path and "Residual" not in kind and "Message" not in kind)
    )


def watch(model: nn.Module, path: str, seen: Decisions) -> list[Any]:
    """Hooks that note what the experts of a router are given: independent of how the capture reads
    the router.
    """
    router = model.get_submodule(path)
    if model.config.is_encoder_decoder and not path.startswith(("decoder", "model.decoder")):  # type: ignore[union-attr]
        return []
    special = OBSERVERS.get(type(router).__name__)
    if special is not None:
        return [
            router.register_forward_hook(
                lambda module, args, output: seen.setdefault(path, []).append(
                    special(module, args, output)
                )
            )
        ]
    block = model.get_submodule(path.rpartition(".")[0])
    assert isinstance(block.experts, nn.Module)

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, ids, weights = (*args, *kwargs.values())
        decisions = (
            ids.reshape(-1, ids.shape[-1]),
            weights.reshape(-1, weights.shape[-1]).float(),
        )
        seen.setdefault(path, []).append(decisions)

    return [block.experts.register_forward_pre_hook(note, with_kwargs=True)]


def dense_scores(module: Any, args: tuple, output: Any) -> tuple[Tensor, Tensor]:
    scores, logits = output
    order = logits.masked_fill(scores == 0, -torch.inf).argsort(dim=1, descending=True)[
        :, : module.top_k
    ]
    return order, scores.gather(1, order).float()


def dispatch_mask(module: Any, args: tuple, output: Any) -> tuple[Tensor, Tensor]:
    mask, probability, _ = output
    mask = mask.reshape(-1, mask.shape[-1])
    ids = torch.where(mask.any(dim=1), mask.argmax(dim=1), -1)
    return ids.unsqueeze(1), probability.reshape(-1, 1).float()


def combining_weights(module: Any, args: tuple, output: Any) -> tuple[Tensor, Tensor]:
    first, weights, _ = output
    ids, gates = [], []
    for mask_E, row_E in zip(first.tolist(), weights.tolist(), strict=True):
        chosen = sorted((e for e in range(len(row_E)) if row_E[e] > 0), key=lambda e: -mask_E[e])
        ids.append(chosen + [-1] * (2 - len(chosen)))
        gates.append([row_E[e] for e in chosen] + [0.0] * (2 - len(chosen)))
    return torch.tensor(ids), torch.tensor(gates)


def slots_by_expert(module: Any, args: tuple, output: Any) -> tuple[Tensor, Tensor]:
    gates, ids = output[4].topk(module.top_k, dim=1)
    return ids, gates.softmax(dim=1)


def skipping(module: Any, args: tuple, output: Any) -> tuple[Tensor, Tensor]:
    _, weights, ids, _ = output
    return torch.where(weights == 0, module.num_experts, ids), weights.float()


def product_keys(module: Any, args: tuple, output: Any) -> tuple[Tensor, Tensor]:
    x_TN, y_TN = output[1]
    pairs = (x_TN.unsqueeze(2) + y_TN.unsqueeze(1)).flatten(1)
    gates, ids = pairs.topk(module.top_k, dim=1)
    return ids, gates.softmax(dim=1)


OBSERVERS: dict[str, Callable[[Any, tuple, Any], tuple[Tensor, Tensor]]] = {
    "Llama4Router": dense_scores,
    "SwitchTransformersTop1Router": dispatch_mask,
    "NllbMoeTop2Router": combining_weights,
    "JetMoeTopKGating": slots_by_expert,
    "ZayaRouter": skipping,
    "DogeCDMoE": product_keys,
}
"""Classes whose experts are not given (hidden states, ids, weights)."""


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "deepseek_v3", "gemma4", "granitemoe", "cohere2_moe", "jamba"],
)
def test_losses_of_chunks_of_logits_are_those_of_whole_logits(
    name: str, tmp_path: Any, monkeypatch: Any
) -> None:
    """Softcaps and scalings of the logits are the model's own."""
    from moe_lab.trace.capturing.hub import ModelHead

    monkeypatch.setattr("moe_lab.trace.capturing.token_loss.CHUNK_LOGITS", 300)
    _, model, _ = with_routers(name)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad(), capture(model, tmp_path / "whole", losses=True):
        model(**inputs)
    with torch.no_grad(), capture(model, tmp_path / "chunks", losses=ModelHead(model)):
        model.base_model(**inputs)
    whole, chunks = (
        open_trace(tmp_path / part).check().tokens.sort("doc", "pos").collect()
        for part in ("whole", "chunks")
    )
    assert whole["loss"].null_count() == chunks["loss"].null_count() == 2
    np.testing.assert_allclose(
        whole["loss"].drop_nulls(), chunks["loss"].drop_nulls(), rtol=1e-4, atol=1e-5
    )
