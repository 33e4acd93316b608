"""A forward pass of a decoder over documents: loss, entropy and compute of every token, in memory.

For questions about a model that a trace alone cannot answer (what would it lose with less
compute?). Documents are cut into consecutive windows; a token's loss lies in its own row, its
compute where it went in.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from moe_lab.errors import AnalysisError, expected
from moe_lab.model import Decoder
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
    if not len(lengths) or lengths.max() < 2:
        raise AnalysisError(
            expected("a document of at least two tokens", f"{len(documents)} documents without")
        )
    offsets = np.cumsum(lengths) - lengths
    total, layers = int(lengths.sum()), tuple(model.config.moe_layers)
    ids = np.concatenate(documents).astype(np.int64)
    doc = np.repeat(np.asarray(list(numbers), dtype=np.int64), lengths)
    pos = np.arange(total) - np.repeat(offsets, lengths)
    found = {name: np.full(total, np.nan, dtype=np.float32) for name in ("loss", "entropy")}
    compute = {
        name: np.full((len(layers), total), np.nan, dtype=np.float32)
        for name in ("ffn_count", "gate_mass", "norm_ratio")
    }
    pieces = [
        (first, min(first + seq_length, end))
        for start, end in zip(offsets, offsets + lengths, strict=True)
        for first in range(start, end, seq_length)
    ]
    ends = np.repeat(offsets + lengths, lengths)
    with _training_off(model), _NormRatios(model) as ratios:
        for begin in range(0, len(pieces), batch_size):
            _score_batch(
                model,
                pieces[begin : begin + batch_size],
                ids,
                ends,
                seq_length,
                found,
                compute,
                ratios,
            )
    return Scored(doc, pos, ids, found["loss"], found["entropy"], layers, **compute)


def _score_batch(
    model: Decoder,
    pieces: list[tuple[int, int]],
    ids: NDArray[np.int64],
    ends: NDArray[np.int64],
    seq_length: int,
    found: dict[str, NDArray[np.float32]],
    compute: dict[str, NDArray[np.float32]],
    ratios: "_NormRatios",
) -> None:
    width = max(stop - start for start, stop in pieces)
    place = np.full((len(pieces), width), -1, dtype=np.int64)
    for row, (start, stop) in enumerate(pieces):
        place[row, : stop - start] = np.arange(start, stop)
    valid = place >= 0
    device = next(model.parameters()).device
    inputs = torch.from_numpy(np.where(valid, ids[place], 0)).to(device)
    output = model(inputs, valid_BS=torch.from_numpy(valid).to(device))
    inside = place[valid]
    for layer, (routing, ratio) in enumerate(zip(output.routings, ratios.taken(), strict=True)):
        kept = torch.from_numpy(valid.reshape(-1)).to(device)
        compute["ffn_count"][layer, inside] = routing.ffn_count()[kept].cpu().numpy()
        compute["gate_mass"][layer, inside] = gate_mass(routing)[kept].cpu().numpy()
        compute["norm_ratio"][layer, inside] = ratio.reshape(-1)[kept].cpu().numpy()
    # What is predicted at a place is the next token of the document.
    predicts = valid & (np.where(valid, place, 0) + 1 < ends[np.where(valid, place, 0)])
    chosen = torch.from_numpy(predicts).to(device)
    logits = output.logits[chosen].float()
    target = place[predicts] + 1
    log_p = logits.log_softmax(dim=1)
    found["loss"][target] = (
        F.nll_loss(log_p, torch.from_numpy(ids[target]).to(device), reduction="none").cpu().numpy()
    )
    found["entropy"][target] = -(log_p.exp() * log_p).sum(dim=1).cpu().numpy()


def gate_mass(routing: Routing) -> torch.Tensor:
    """[T] sum of the gate weights on real experts."""
    real = (routing.indices >= 0) & (routing.indices < routing.num_experts)
    return torch.where(real, routing.weights, 0).sum(dim=1)


@contextmanager
def _training_off(model: Decoder) -> Iterator[None]:
    """Evaluation mode for a while."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


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
