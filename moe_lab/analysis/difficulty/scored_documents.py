"""A forward pass of a decoder over documents: loss, entropy and compute of every token, in memory.

For questions about a model that a trace alone cannot answer (what would it lose with less
compute?). Documents are cut into consecutive windows; a token's loss lies in its own row, its
compute where it went in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from moe_lab.document_pass import (
    IGNORE,
    Excerpt,
    evaluating,
    token_losses_and_entropies,
    windows,
)
from moe_lab.errors import AnalysisError, require
from moe_lab.model import Decoder
from moe_lab.progress import tracked
from moe_lab.routing import Routing


@dataclass(frozen=True, eq=False)
class Scored:
    """T tokens of documents one after another, L MoE layers.

    Attributes:
        doc, pos, token_id: [T].
        loss, entropy: [T] nats, of the token itself given those before it; NaN for the first of a
            document.
        layers: [L] layer numbers.
        ffn_count, gate_mass: [L, T]; ``gate_mass`` is the sum of the gate weights on real experts.
        norm_ratio: [L, T] norm of what the MoE layer adds over the norm of the stream it adds to.
    """

    doc: NDArray[np.int64]
    pos: NDArray[np.int64]
    token_id: NDArray[np.int64]
    loss: NDArray[np.float32]
    entropy: NDArray[np.float32]
    layers: tuple[int, ...]
    ffn_count: NDArray[np.float32]
    gate_mass: NDArray[np.float32]
    norm_ratio: NDArray[np.float32]

    def frame(self) -> pl.DataFrame:
        """[layer, doc, pos, token_id, loss, entropy, ffn_count, gate_mass, norm_ratio], what
        ``difficulty_association`` takes.
        """
        tokens = {
            name: getattr(self, name) for name in ("doc", "pos", "token_id", "loss", "entropy")
        }
        parts = [
            pl.DataFrame(
                tokens
                | {
                    name: getattr(self, name)[row]
                    for name in ("ffn_count", "gate_mass", "norm_ratio")
                }
            ).select(pl.lit(layer, pl.UInt32).alias("layer"), pl.all())
            for row, layer in enumerate(self.layers)
        ]
        return pl.concat(parts).with_columns(pl.col(pl.Float32).fill_nan(None))


@torch.no_grad()
def score(
    model: Decoder,
    documents: Sequence[NDArray],
    numbers: Sequence[int] | None = None,
    *,
    seq_length: int = 128,
    batch_size: int = 32,
) -> Scored:
    """Run ``model`` over [n] arrays of ids.

    Args:
        numbers: the ``doc`` of each; 0, 1, ... by default.

    Raises:
        AnalysisError: no document has two tokens.
    """
    numbers = range(len(documents)) if numbers is None else numbers
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    require(
        len(lengths) and lengths.max() >= 2,
        "a document of at least two tokens",
        f"{len(documents)} documents without",
        error=AnalysisError,
    )
    offsets = np.cumsum(lengths) - lengths
    total, layers = int(lengths.sum()), tuple(model.config.moe_layers)
    scores = np.full((2, total), np.nan, dtype=np.float32)
    compute = np.full((3, len(layers), total), np.nan, dtype=np.float32)
    excerpts = [Excerpt(number, 0, length) for number, length in enumerate(lengths.tolist())]
    device = next(model.parameters()).device
    with evaluating(model), _NormRatios(model) as ratios:
        batches = list(windows(documents, excerpts, seq_length, batch_size))
        for batch in tracked(batches, "scoring documents"):
            valid = batch.valid.to(device)
            output = model(batch.ids.to(device), valid_BS=valid)
            rows_BS = offsets[batch.doc] + batch.pos
            inputs, kept = rows_BS[batch.valid.numpy()], valid.flatten()
            for layer, (routing, ratio) in enumerate(
                zip(output.routings, ratios.taken(), strict=True)
            ):
                measured = (routing.ffn_count(), gate_mass(routing), ratio.flatten())
                for notion, values_T in zip(compute, measured, strict=True):
                    notion[layer, inputs] = values_T[kept].cpu().numpy()
            predicts = (batch.targets != IGNORE).numpy()
            found = token_losses_and_entropies(output.logits, batch.targets)
            for row, values in zip(scores, found, strict=True):
                row[rows_BS[predicts] + 1] = values[predicts]  # the next token is predicted
    doc = np.repeat(np.asarray(list(numbers), dtype=np.int64), lengths)
    pos = np.arange(total) - np.repeat(offsets, lengths)
    token_id = np.concatenate(documents).astype(np.int64)
    loss, entropy = scores
    ffn_count, mass, norm_ratio = compute
    return Scored(doc, pos, token_id, loss, entropy, layers, ffn_count, mass, norm_ratio)


def gate_mass(routing: Routing) -> torch.Tensor:
    """[T] sum of the gate weights on real experts."""
    real = (routing.indices >= 0) & (routing.indices < routing.num_experts)
    return torch.where(real, routing.weights, 0).sum(dim=1)


class _NormRatios:
    """Hooks on the MoE layers that keep the ratio of output norm to the norm of the stream before
    it.
    """

    def __init__(self, model: Decoder) -> None:
        self.blocks: list[Any] = [model.blocks[layer] for layer in model.config.moe_layers]
        self.streams: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "_NormRatios":
        for block in self.blocks:
            self.handles.append(block.moe_norm.register_forward_pre_hook(self._stream))
            self.handles.append(block.moe.register_forward_hook(self._output))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _stream(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.streams.append(inputs[0].norm(dim=-1))

    def _output(
        self,
        _module: torch.nn.Module,
        _inputs: object,
        output: torch.Tensor | tuple[torch.Tensor, object],
    ) -> None:
        self.outputs.append((output[0] if isinstance(output, tuple) else output).norm(dim=-1))

    def taken(self) -> list[torch.Tensor]:
        """The ratios of the last pass, layer by layer."""
        ratios = [
            out / stream.clamp_min(1e-12)
            for out, stream in zip(self.outputs, self.streams, strict=True)
        ]
        self.streams.clear()
        self.outputs.clear()
        return ratios
