"""Dense twins: the difficulty of tokens for dense models that are independent of the studied one.

The documents are divided into folds; one dense decoder is trained on each fold and scores the
others, so that no token is judged by a model that has read it. Losses at several points of the
training tell what was learnt when.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from moe_lab.config import require
from moe_lab.document_pass import (
    IGNORE,
    Excerpt,
    token_losses_and_entropies,
    windows,
)
from moe_lab.model import Decoder
from moe_lab.text import TokenizedDocument
from moe_lab.text.surprisal import fold_of_each
from moe_lab.training.config import RunConfig
from moe_lab.training.data import Batches
from moe_lab.training.optimizer import build_optimizer, lr_factor


def dense_twins(
    documents: Sequence[TokenizedDocument],
    config: RunConfig,
    *,
    folds: int = 2,
    checkpoints: int = 1,
    excerpts: Sequence[Excerpt] | None = None,
) -> pl.DataFrame:
    """Losses of ``documents`` under dense decoders that were trained on the other documents.

    Args:
        documents: all documents; each fold holds every ``folds``-th of a seeded permutation.
        config: sizes, optimiser, tokens and seed of a twin; its model must be dense. Each twin
            trains ``config.train_tokens``.
        checkpoints: how often, evenly spaced, each twin scores what it did not train on; the last
            is the end of the training.
        excerpts: what to score; all tokens by default.

    Returns:
        [doc, pos, ref_loss, ref_entropy, ref_losses]: nats, null for the first token of a document
            or excerpt; ``ref_losses`` lists the
        loss at each checkpoint. With more than two folds the numbers are means over the twins that
        did not train on the document.

    Raises:
        CorpusError: fewer documents than folds.
        ConfigError: the configuration is not dense.
    """
    require(config.model.moe is None, "a dense model for a reference", "MoE layers")
    require(checkpoints >= 1, "at least 1 checkpoint", checkpoints)
    part = fold_of_each(len(documents), folds, config.seed)
    ids = [document.ids for document in documents]
    excerpts = (
        [Excerpt(index, 0, len(row)) for index, row in enumerate(ids) if len(row) > 1]
        if excerpts is None
        else list(excerpts)
    )
    total = np.zeros((checkpoints, 2, sum(map(len, ids))))
    offsets = np.cumsum([0, *map(len, ids)])[:-1]
    for fold in range(folds):
        fold_ids = [ids[index] for index in np.flatnonzero(part == fold)]
        asked = [excerpt for excerpt in excerpts if part[excerpt.document] != fold]
        stream = np.concatenate(fold_ids).astype(np.int64)
        total += _train_and_score(
            config.replace(seed=config.seed + fold), stream, ids, asked, checkpoints, offsets
        )
    total /= folds - 1
    seen = np.zeros(total.shape[2], dtype=bool)
    for excerpt in excerpts:
        seen[
            offsets[excerpt.document] + excerpt.start + 1 : offsets[excerpt.document] + excerpt.stop
        ] = True
    total[:, :, ~seen] = np.nan
    frame = pl.DataFrame(
        {
            "doc": np.repeat(
                [document.index for document in documents], [len(row) for row in ids]
            ).astype(np.uint32),
            "pos": np.concatenate([np.arange(len(row), dtype=np.uint32) for row in ids]),
            "ref_loss": total[-1, 0].astype(np.float32),
            "ref_entropy": total[-1, 1].astype(np.float32),
            "ref_losses": pl.Series(
                total[:, 0].T.astype(np.float32), dtype=pl.Array(pl.Float32, checkpoints)
            ),
        }
    )
    return frame.with_columns(pl.col("ref_loss", "ref_entropy").fill_nan(None))


def _train_and_score(
    config: RunConfig,
    stream: np.ndarray,
    ids: list[np.ndarray],
    excerpts: list[Excerpt],
    checkpoints: int,
    offsets: np.ndarray,
) -> np.ndarray:
    """[checkpoints, 2, tokens] loss and entropy of the excerpts, 0 elsewhere."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model).to(config.device)
    optimizer = build_optimizer(model, config.optimizer)
    batches = Batches(stream, config.batch_size, config.seq_length, config.seed)
    stops = {
        -(-config.steps * (number + 1) // checkpoints): number for number in range(checkpoints)
    }
    totals = np.zeros((checkpoints, 2, sum(map(len, ids))))
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * lr_factor(step, config.steps, config.optimizer)
        batch = batches(step).to(config.device)
        loss = model(batch[:, :-1], batch[:, 1:]).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in stops:
            _score(model.eval(), config, ids, excerpts, offsets, totals[stops[step + 1]])
            model.train()
    return totals


@torch.no_grad()
def _score(
    model: Decoder,
    config: RunConfig,
    ids: list[np.ndarray],
    excerpts: list[Excerpt],
    offsets: np.ndarray,
    totals: np.ndarray,
) -> None:
    for batch in windows(ids, excerpts, config.seq_length, 16):
        output = model(batch.ids.to(config.device))
        scores = token_losses_and_entropies(output.logits, batch.targets)
        predicts = (batch.targets != IGNORE).numpy()
        place = offsets[batch.doc[predicts]] + batch.pos[predicts] + 1
        for row, values in zip(totals, scores, strict=True):
            row[place] = values[predicts]
