"""Scores that compressors rank experts by, and whether they rank as the measured loss does.

A score is larger for an expert that should stay. ``frequency`` is the share of tokens that use the
expert; ``gate_mass`` its mean gate weight over all tokens; ``output_norm`` the mean norm of its
weighted output over all tokens; ``reap`` the same over the tokens that use it (arXiv 2510.13999);
``activation_norm`` the mean norm of its output without the gate over those tokens (arXiv
2606.15716). ``router_distance`` and ``output_distance`` are one minus the largest cosine similarity
to another expert of the layer, of the rows of the router's matrix and of the summed weighted
outputs: what is close to another can be replaced by it.

The weighted output of an expert is what the block around its router returns less what it returns
with the expert silenced, so it is known for every class. Shape letters: B batch, S sequence, T
tokens, D d_model, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from moe_lab.analysis.difficulty.rank_statistics import Order, standard_ranks
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.document_pass import evaluating
from moe_lab.errors import AnalysisError, TraceError, expected, require
from moe_lab.files import write_parquet
from moe_lab.progress import tell
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.hooks import Hooks, Pass
from moe_lab.trace.capturing.router_output import Reader, Reading
from moe_lab.trace.capturing.traced_router import TracedRouter
from moe_lab.worth.batches import Batch, padded_batches
from moe_lab.worth.edits import Silence
from moe_lab.worth.interventions import intervene
from moe_lab.worth.measured_rows import MEASURED, held_rows, measurement_key
from moe_lab.worth.paired_passes import logits_of

MEANS = {
    "frequency": ("used", "tokens"),
    "gate_mass": ("gate", "tokens"),
    "output_norm": ("norm", "tokens"),
    "reap": ("norm", "used"),
    "activation_norm": ("plain_norm", "used"),
}
DISTANCES = ("router_distance", "output_distance")
SCORES = (*MEANS, *DISTANCES)
TOP_SHARE = 0.1
SCHEMA = {
    **dict.fromkeys(("layer", "expert", "doc"), pl.Int64),
    **dict.fromkeys(("tokens", "used", "gate", "norm", "plain_norm", *DISTANCES), pl.Float64),
    MEASURED: pl.String,
}
"""Of the file that ``expert_scores`` writes."""


def expert_scores(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 2048,
    path: Path | str | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> pl.DataFrame:
    """What the scores of all real experts are made from, by document.

    Args:
        model, documents, layers, batch_tokens, readers: as for ``expert_losses``.
        path: a Parquet file that takes the rows of each layer as it is done. Layers that it holds
            are not scored again.

    Returns:
        [layer, expert, doc, tokens, used, gate, norm, plain_norm, router_distance,
        output_distance]: tokens of the document, tokens that used the expert, the sums of its gate
        weights and of the norms of its output, weighted and not. The distances are of all
        documents; ``router_distance`` is null where the router has no matrix with a row for each
        expert.

    Raises:
        AnalysisError: ``path`` holds the scores of another model or text.
        TraceError: naming the router, where the block around it cannot run by itself.
    """
    every, _ = find_sites(model, readers, None)
    sites = [site for site in every if layers is None or site.layer in layers]
    batches = padded_batches(model, documents, batch_tokens)
    key = measurement_key(path, model, documents, "scores")
    held = held_rows(path, SCHEMA, key)
    done = set(held["layer"])
    sites = [site for site in sites if site.layer not in done]
    with evaluating(model), torch.no_grad():
        for place, site in enumerate(sites):
            sums = _LayerSums(model, site, len(documents), readers)
            for number, batch in enumerate(batches):
                tell("scoring experts", place * len(batches) + number, len(sites) * len(batches))
                sums.add(batch)
            frame = sums.frame().with_columns(pl.lit(key).alias(MEASURED))
            held = pl.concat([held, frame.cast(pl.Schema(SCHEMA))])
            if path is not None:
                write_parquet(path, held)
    chosen = held if layers is None else held.filter(pl.col("layer").is_in(layers))
    return chosen.drop(MEASURED).sort("layer", "expert", "doc")


def scored_layers(
    path: Path | str | None, model: nn.Module, documents: Sequence[np.ndarray]
) -> set[int]:
    """The layers that ``expert_scores`` wrote to ``path``."""
    key = measurement_key(path, model, documents, "scores")
    return set(held_rows(path, SCHEMA, key)["layer"])


class _LayerSums:
    """Sums [experts, documents] of one layer."""

    def __init__(
        self,
        model: nn.Module,
        site: TracedRouter,
        documents: int,
        readers: Mapping[str, Reader] | None,
    ) -> None:
        if site.num_experts is None:
            what = "a router whose number of experts is configured"
            raise TraceError(f"{site}: {expected(what, 'none')}", field=site.name)
        self.model, self.site, self.readers = model, site, readers
        self.block: Any = model.get_submodule(site.name.rpartition(".")[0])
        self.experts = site.num_experts
        self.tokens = np.zeros(documents)
        self.used, self.gate, self.norm, self.plain = np.zeros((4, self.experts, documents))
        self.vectors: Tensor | None = None

    def add(self, batch: Batch) -> None:
        """Run the model once, and the block once for each expert."""
        calls: list[tuple[Any, Any, Any]] = []
        readings: list[Reading] = []

        def read(running: Pass, output: Any) -> None:
            readings.extend(self.site.readings(running.calls[0], batch.ids.numel()))

        with ExitStack() as stack:
            hooks = Hooks(self.model, [self.site], read, ratio=False)
            stack.callback(hooks.remove)
            handle = self.block.register_forward_hook(
                lambda module, args, kwargs, output: calls.append((args, kwargs, output)),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
            logits_of(self.model, batch)
        if len(calls) != len(readings) or readings[0].weights is None:
            what = "a block around the router that is called once for each of its runs"
            raise TraceError(f"{self.site}: {expected(what, f'{len(calls)} calls')}", "model")
        numbers = [document.number for document in batch.documents]
        real_BS = batch.mask.bool()
        np.add.at(self.tokens, numbers, len(calls) * real_BS.sum(dim=1).numpy())
        for call, reading in zip(calls, readings, strict=True):
            self._add_call(call, reading, real_BS, numbers)

    def _add_call(
        self, call: tuple[Any, Any, Any], reading: Reading, real_BS: Tensor, numbers: list[int]
    ) -> None:
        args, kwargs, output = call
        untouched_TD = _first(output)
        if not torch.equal(_first(self.block(*args, **kwargs)), untouched_TD):
            what = "the same output when the block around the router runs again"
            raise TraceError(f"{self.site}: {expected(what, 'another')}", "model")
        assert reading.weights is not None
        weights_TK = reading.weights.cpu()
        for expert in range(self.experts):
            chosen_TK = reading.indices.cpu() == expert
            used_T = chosen_TK.any(dim=1) & real_BS.reshape(-1)
            if not bool(used_T.any()):
                continue
            with intervene(self.model, Silence(self.site.layer, expert), readers=self.readers):
                silenced_TD = _first(self.block(*args, **kwargs))
            moved_TD = (untouched_TD - silenced_TD).double().cpu() * used_T[:, None]
            gates_T = (weights_TK * chosen_TK).sum(dim=1).double() * used_T
            norms_T = moved_TD.norm(dim=1)
            for sums, values_T in (
                (self.used, used_T.double()),
                (self.gate, gates_T),
                (self.norm, norms_T),
                (self.plain, torch.where(gates_T != 0, norms_T / gates_T.abs(), 0)),
            ):
                rows = values_T.view(real_BS.shape).sum(dim=1).numpy()
                np.add.at(sums[expert], numbers, rows)
            if self.vectors is None:
                self.vectors = torch.zeros(self.experts, moved_TD.shape[1], dtype=torch.float64)
            self.vectors[expert] += moved_TD.sum(dim=0)

    def frame(self) -> pl.DataFrame:
        docs = np.flatnonzero(self.tokens)
        weight = getattr(self.site.module, "weight", None)
        rows = None
        if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) >= self.experts:
            rows = weight.detach()[: self.experts]
        count = self.experts * len(docs)
        return pl.DataFrame(
            {
                "layer": np.full(count, self.site.layer),
                "expert": np.repeat(np.arange(self.experts), len(docs)),
                "doc": np.tile(docs, self.experts),
                "tokens": np.tile(self.tokens[docs], self.experts),
                "used": self.used[:, docs].reshape(-1),
                "gate": self.gate[:, docs].reshape(-1),
                "norm": self.norm[:, docs].reshape(-1),
                "plain_norm": self.plain[:, docs].reshape(-1),
                "router_distance": _repeated(_distances(rows), len(docs), count),
                "output_distance": _repeated(_distances(self.vectors), len(docs), count),
            }
        )


def _first(output: Any) -> Tensor:
    """[T, D] of a block's output."""
    tensor = output[0] if isinstance(output, tuple) else output
    return tensor.reshape(-1, tensor.shape[-1])


def _distances(rows_ED: Tensor | None) -> np.ndarray | None:
    """[E] one minus the largest cosine similarity to another row; 1 for a row of zeros."""
    if rows_ED is None or len(rows_ED) < 2:
        return None
    unit = nn.functional.normalize(rows_ED.double().cpu(), dim=1)
    return (1 - (unit @ unit.T).fill_diagonal_(-1).amax(dim=1)).numpy()


def _repeated(values: np.ndarray | None, times: int, count: int) -> pl.Series:
    if values is None:
        return pl.Series([None] * count, dtype=pl.Float64)
    return pl.Series(np.repeat(values, times))


def score_agreement(
    scores: pl.DataFrame,
    losses: pl.DataFrame,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pl.DataFrame:
    """How each score ranks the experts, beside the measured loss.

    Args:
        scores, losses: of ``expert_scores`` and ``expert_losses`` over the same documents; experts
            that were not measured are left out.

    Returns:
        [layer, score, rho, lo, hi, top, top_chance, experts, docs]: Spearman's rank correlation of
        the score with ``d_loss`` per token, with an interval from resampling documents (of both);
        ``top`` the share of the tenth of experts with the largest loss that is in the tenth with
        the largest score, and ``top_chance`` what a random order gives. ``layer`` null: all
        experts of the model in one order. Null where fewer than three experts were measured or a
        score is not known.

    Raises:
        AnalysisError: other documents in the two frames.

    Example:
        >>> score_agreement(scores, losses).filter(pl.col("layer").is_null()).sort("rho")
    """
    keys = ["layer", "expert", "doc"]
    losses = losses.filter(pl.col("class").is_null())
    table = losses.join(scores, on=keys, how="inner", suffix="_all").sort(keys)
    docs = losses["doc"].n_unique()
    require(
        table.height == losses.height and losses.height % docs == 0 and losses.height > 0,
        "scores of the documents and experts of the losses",
        "others",
        error=AnalysisError,
        field="scores",
    )
    experts = table.select("layer", "expert").unique(maintain_order=True)
    names = ("d_loss", "tokens", "tokens_all", "used_all", "gate", "norm", "plain_norm")
    sums = {name: table[name].to_numpy().reshape(-1, docs).T for name in names}
    fixed = {name: table[name].to_numpy().reshape(-1, docs)[:, 0] for name in DISTANCES}
    resampling, whole = Resampling(resamples, seed, level), np.ones((1, docs))
    rows = []
    layers = experts["layer"].to_numpy()
    for layer in (*np.unique(layers).tolist(), None):
        chosen = np.arange(len(layers)) if layer is None else np.flatnonzero(layers == layer)
        for score in SCORES:
            known = np.isfinite(_values(score, sums, fixed, whole, chosen)).all()
            facts = {"layer": layer, "score": score, "experts": len(chosen), "docs": docs}
            if len(chosen) < 3 or not known:
                rows.append(facts)
                continue

            def correlation(weights: Floats, score: str = score, chosen: Any = chosen) -> Floats:
                pairs = zip(
                    _values(score, sums, fixed, weights, chosen),
                    _ratio(weights, sums["d_loss"], sums["tokens"], chosen),
                    strict=True,
                )
                return np.array([_spearman(*pair) for pair in pairs])[:, None]

            low, high = resampling.interval(correlation, docs)
            number = math.ceil(TOP_SHARE * len(chosen))
            tops = [
                set(np.argsort(-values[0], kind="stable")[:number].tolist())
                for values in (
                    _values(score, sums, fixed, whole, chosen),
                    _ratio(whole, sums["d_loss"], sums["tokens"], chosen),
                )
            ]
            facts |= {"rho": float(correlation(whole)[0, 0]), "lo": low[0], "hi": high[0]}
            facts |= {"top": len(tops[0] & tops[1]) / number, "top_chance": number / len(chosen)}
            rows.append(facts)
    return pl.DataFrame(rows, schema=_AGREEMENT).with_columns(pl.col(pl.Float64).fill_nan(None))


_AGREEMENT = {
    "layer": pl.Int64,
    "score": pl.String,
    **dict.fromkeys(("rho", "lo", "hi", "top", "top_chance"), pl.Float64),
    "experts": pl.Int64,
    "docs": pl.Int64,
}


def _values(
    score: str,
    sums: Mapping[str, Floats],
    fixed: Mapping[str, Floats],
    weights: Floats,
    chosen: np.ndarray,
) -> Floats:
    """[B, experts] of a score, one row for each row of document weights."""
    if score in DISTANCES:
        return np.broadcast_to(fixed[score][chosen], (len(weights), len(chosen)))
    above, below = (name + "_all" if name in ("used", "tokens") else name for name in MEANS[score])
    return _ratio(weights, sums[above], sums[below], chosen)


def _ratio(weights: Floats, above: Floats, below: Floats, chosen: np.ndarray) -> Floats:
    """[B, experts]; 0 where nothing is below: an expert that no drawn document used."""
    total = weights @ below[:, chosen]
    return np.divide(weights @ above[:, chosen], total, out=np.zeros_like(total), where=total > 0)


def _spearman(first: Floats, second: Floats) -> float:
    """NaN where one of the rows is constant."""
    ranks = [standard_ranks(Order.of(row)) for row in (first, second)]
    return float((ranks[0] * ranks[1]).mean()) if all(row.any() for row in ranks) else float("nan")
