"""Documents longer than a forward pass: parts that a cache joins give what one pass gives, and no
pass holds more than was asked.
"""

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf")

from hf_capture_models import build

from moe_lab.trace import capture, open_trace
from moe_lab.trace.capturing.hub import ModelHead
from moe_lab.trace.capturing.long_documents import (
    cache_that_joins,
    parts,
    run_part,
)

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("length", "batch_tokens"), [(1, 8), (8, 8), (9, 8), (1000, 32), (50, 1)])
def test_parts_cover_a_document_within_the_tokens_and_pairs_of_one_batch(
    length: int, batch_tokens: int, cached: bool
) -> None:
    slices = list(parts(length, batch_tokens, cached))
    assert [part.start for part in slices] == [0, *(part.stop for part in slices[:-1])]
    assert slices[-1].stop == length
    for part in slices:
        tokens = part.stop - part.start
        assert 1 <= tokens <= batch_tokens
        if cached and tokens > 1:  # a single token is the least that a pass can hold
            assert tokens * part.stop <= batch_tokens**2


@pytest.mark.parametrize(
    "name",
    # full attention; latent attention; sinks and windows shorter than the document; chunks, and
    # no body below the head; linear attention; convolutions
    ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "qwen3_next", "zaya"],
)
def test_parts_that_a_cache_joins_give_the_decisions_and_losses_of_one_pass(
    name: str, tmp_path: Any
) -> None:
    config, model = build(name, 3)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary - 1, (1, 40), generator=torch.Generator().manual_seed(7))
    body: Any = model.base_model
    new_cache = cache_that_joins(model, body, ids)
    assert new_cache is not None
    mask, cache = torch.ones_like(ids), new_cache()
    losses: Any = True if body is model else ModelHead(model)
    with torch.no_grad(), capture(model, tmp_path / "whole", losses=losses):
        body(input_ids=ids, attention_mask=mask, use_cache=False)
    slices = list(parts(40, 15, cached=True))
    assert len(slices) > 2
    with torch.no_grad(), capture(model, tmp_path / "parts", losses=losses) as captured:
        for part in slices:
            captured.documents(np.array([0]), np.array([part.start]))
            run_part(body, ids, mask, part, cache)
    whole, joined = (open_trace(tmp_path / kind).check() for kind in ("whole", "parts"))
    routes = [
        trace.routing.sort("layer", "pos").select("layer", "doc", "pos", "experts").collect()
        for trace in (whole, joined)
    ]
    assert routes[0].equals(routes[1])
    nats = [trace.tokens.sort("pos").collect()["loss"] for trace in (whole, joined)]
    assert nats[0].is_null().equals(nats[1].is_null())
    assert nats[0].null_count() == 1  # the first token of the document
    np.testing.assert_allclose(nats[0].drop_nulls(), nats[1].drop_nulls(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["bamba", "minimax", "doge", "openai_privacy_filter"])
def test_a_model_that_does_not_go_on_from_a_cache_is_found_out(name: str) -> None:
    """Bamba forgets its state, MiniMax refuses the cache, Doge and the filter look both ways."""
    _, model = build(name, 3)
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(7))
    assert cache_that_joins(model, model.base_model, ids) is None
