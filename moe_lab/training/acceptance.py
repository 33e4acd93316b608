"""How many drafted tokens of a multi-token-prediction module are accepted under greedy
verification, as in speculative decoding.

Module k drafts the token k places after the next one. A draft is accepted where it is the token
that the decoder itself would take there (its largest logit), and every draft before it was accepted
too: what a verifying pass keeps. Two ways to count:

- ``text``: along given documents; the token that a module reads is the document's.
- ``generated``: along the decoder's own greedy continuation of prompts from the documents. A small
    model that repeats itself drafts well.
"""

from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

from moe_lab.config import require
from moe_lab.document_pass import Excerpt, evaluating, excerpts_of, windows
from moe_lab.errors import ConfigError, CorpusError, expected
from moe_lab.model import Decoder
from moe_lab.text import TokenizedDocument


@torch.no_grad()
def acceptance_rate(
    model: Decoder,
    documents: Sequence[TokenizedDocument],
    *,
    seq_length: int,
    excerpts: Sequence[Excerpt] | None = None,
    prompt_tokens: int | None = None,
    batch_size: int = 16,
) -> pl.DataFrame:
    """Drafts and accepted drafts of every module, document by document.

    Args:
        excerpts: which tokens; all by default. They are cut into windows of ``seq_length``.
        prompt_tokens: None counts along the text; a number takes so many tokens of each window as a
            prompt and counts along the greedy continuation up to ``seq_length``.

    Returns:
        [doc, module, drafts, accepted]: rates over documents are ``accepted.sum() / drafts.sum()``;
            resample documents for an interval.

    Raises:
        ConfigError: the model has no MTP modules. CorpusError: no window is long enough.
    """
    if model.config.mtp is None:
        raise ConfigError(
            expected(
                "a model with multi-token-prediction modules",
                "mtp None",
                "DecoderConfig(mtp=MTPConfig())",
            ),
            field="mtp",
        )
    length = seq_length if prompt_tokens is None else prompt_tokens
    longest = model.config.context_length
    require(
        2 <= length <= seq_length <= longest,
        f"prompt_tokens <= seq_length of 2 to {longest} tokens",
        f"{length} and {seq_length}",
        field="prompt_tokens",
    )
    ids = [document.ids for document in documents]
    excerpts = excerpts_of([len(row) for row in ids]) if excerpts is None else excerpts
    device = next(model.parameters()).device
    rows: list[dict[str, int]] = []
    with evaluating(model):
        for batch in windows(ids, excerpts, seq_length, batch_size):
            whole = batch.valid.sum(dim=1) >= length
            if not bool(whole.any()):
                continue
            inputs, valid = batch.ids[whole].to(device), batch.valid[whole].to(device)
            first = 0
            if prompt_tokens is not None:
                inputs, first = (
                    _continued(model, inputs[:, :prompt_tokens], seq_length),
                    prompt_tokens,
                )
                valid = torch.ones_like(inputs, dtype=torch.bool)
            docs = [documents[int(row[0])].index for row in batch.doc[whole.numpy()]]
            rows += _verified(model, inputs, valid, docs, first)
    require(
        rows,
        f"a window of at least {length} tokens",
        "none",
        "longer documents",
        error=CorpusError,
        field="documents",
    )
    return pl.DataFrame(rows).group_by("doc", "module", maintain_order=True).sum()


def _verified(
    model: Decoder, ids_BS: Tensor, valid_BS: Tensor, docs: Sequence[int], first: int
) -> list[dict[str, int]]:
    """Counts of one batch.

    The decoder's own choice at i + k, ``greedy[i + k]``, is what module k has to draft at i.
    """
    output = model(ids_BS, valid_BS=valid_BS)
    greedy_BS = output.logits.argmax(dim=2)
    kept_BS = valid_BS.clone()
    kept_BS[:, : max(first - 1, 0)] = False
    rows = []
    for number, logits in enumerate(model.drafts(output.hidden, ids_BS), start=1):
        length = logits.shape[1]
        counted_BS = kept_BS[:, :length] & valid_BS[:, number:]
        right_BS = (logits.argmax(dim=2) == greedy_BS[:, number:]) & counted_BS
        kept_BS = (
            right_BS  # the next module's draft at i is looked at only where this one was accepted
        )
        drafts, accepted = counted_BS.sum(dim=1).tolist(), right_BS.sum(dim=1).tolist()
        rows += [
            {"doc": doc, "module": number, "drafts": int(a), "accepted": int(b)}
            for doc, a, b in zip(docs, drafts, accepted, strict=True)
        ]
    return rows


def _continued(model: Decoder, prompts_BS: Tensor, length: int) -> Tensor:
    """[B, length]: prompts and the decoder's greedy continuation."""
    ids_BS = prompts_BS
    while ids_BS.shape[1] < length:
        following_B = model(ids_BS).logits[:, -1].argmax(dim=1)
        ids_BS = torch.cat((ids_BS, following_B[:, None]), dim=1)
    return ids_BS
