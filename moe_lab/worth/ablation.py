"""One measurement of what the experts of a model are worth: its files in a folder, and what they
say in sentences.

``losses.parquet`` grows while it runs; ``meta.json`` is written last, so that a folder without it
holds an unfinished measurement, which goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from moe_lab.document_pass import evaluating
from moe_lab.errors import TraceError, require
from moe_lab.files import write_json, write_parquet
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.fingerprints import model_hash
from moe_lab.versions import versions
from moe_lab.worth.curves import SHARES, removal_curves, top_k_losses
from moe_lab.worth.interventions import Forbid
from moe_lab.worth.measured_rows import text_hash
from moe_lab.worth.measures import EditKind, expert_losses, expert_minutes, expert_worth
from moe_lab.worth.paired_passes import edited_sums, log_probabilities, logits_of, padded_batches
from moe_lab.worth.pairs import exchange_losses, pair_losses
from moe_lab.worth.scores import SCORES, expert_scores, score_agreement
from moe_lab.worth.token_groups import Classes
from moe_lab.worth.worth_files import LOSSES, META, refuse_taken
from moe_lab.worth.worth_sentences import curve_sentences, worth_sentences

CURVES = (len(SCORES) + 11) * len(SHARES)
"""Points of ``removal_curves``: each score, the measured loss and ten random orders."""


@dataclass(frozen=True)
class Ablation:
    """What is measured.

    Attributes:
        model: that ``intervene`` can edit.
        documents: token ids [n] each, of texts that the model was not trained on.
        experts: so many real experts of each layer, drawn with ``seed``; None: all.
        layers: those that are measured; None: all with experts.
        edit, classes, batch_tokens, seed: as for ``expert_losses``.
        curves: also ``removal_curves`` and ``top_k_losses`` for k from 1 to twice the model's; they
            need all layers.
        pairs: also ``pair_losses`` and ``exchange_losses`` of so many pairs of each layer.

    Example:
        >>> ablation = Ablation(model, documents, experts=8)
        >>> print(sum(ablation.minutes().values()))
        >>> tables = ablation.run("worth")
    """

    model: nn.Module
    documents: Sequence[np.ndarray]
    experts: int | None = None
    layers: Sequence[int] | None = None
    edit: EditKind = EditKind.FORBID
    classes: Classes | None = None
    batch_tokens: int = 2048
    seed: int = 0
    curves: bool = False
    pairs: int | None = None

    def __post_init__(self) -> None:
        require(
            not (self.layers is not None and (self.curves or self.pairs)),
            "all layers for curves and pairs",
            "some",
            "leaving layers out",
            field="layers",
        )

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.documents))

    @cached_property
    def measured(self) -> dict[int, int]:
        """Layer -> how many of its experts are measured."""
        sites, _ = find_sites(self.model, None, None)
        sizes = {site.layer: site.num_experts or 0 for site in sites}
        return {
            layer: size if self.experts is None else min(size, self.experts)
            for layer, size in sizes.items()
            if self.layers is None or layer in self.layers
        }

    def minutes(self, folder: Path | str | None = None) -> dict[str, float]:
        """Minutes that each part will take, from timing it on one batch of documents; of the losses
        those that an unfinished measurement in ``folder`` lacks.
        """
        path = None if folder is None else Path(folder) / LOSSES
        parts = {
            "losses": expert_minutes(
                self.model, self.documents, path=path, classes=self.classes, **self._chosen
            )
        }
        batches = padded_batches(self.model, self.documents, self.batch_tokens)
        timed = [self.documents[i] for i in np.unique(batches[len(batches) // 2].docs)]
        share = self.tokens / sum(map(len, timed)) / 60
        parts["scores"] = (
            share * len(self.measured) * _seconds(self._scores, timed, [*self.measured][:1])
        )
        if self.curves or self.pairs:
            forbidden = [[Forbid(layer, 0) for layer in self.measured]]
            # half of it is the untouched pass, which many sets of edits share
            seconds = share * _seconds(edited_sums, self.model, timed, forbidden) / 2
            if self.curves:  # curves are judged on every other document
                parts["curves"] = seconds * (len(self.ks) + CURVES / 2)
            if self.pairs:  # two single experts, both and the exchange, on average from mid-height
                parts["pairs"] = seconds * self.pairs * len(self.measured) * 4 / 2
        return parts

    def run(self, folder: Path | str, facts: Mapping[str, Any] = {}) -> dict[str, pl.DataFrame]:
        """Measure, and write each table as Parquet, then ``meta.json`` with hashes, versions,
        sentences and ``facts``.

        Returns:
            losses, worth, scores, agreement; with ``curves`` also curves and top_k (where the
            model's k can be changed; else a note in ``meta.json`` says why not), with ``pairs``
            also pairs and exchanges.

        Raises:
            AnalysisError: a finished measurement in ``folder``, or an unfinished one of another
                model, text or edit.
        """
        folder, notes = Path(folder), []
        refuse_taken(folder)
        losses = expert_losses(
            self.model,
            self.documents,
            path=folder / LOSSES,
            classes=self.classes,
            **self._chosen,
        )
        given: dict[str, Any] = {"batch_tokens": self.batch_tokens, "seed": self.seed}
        text = self.model, self.documents
        scores = self._scores(self.documents, [*self.measured])
        tables = {
            "worth": expert_worth(losses),
            "scores": scores,
            "agreement": score_agreement(scores, losses, seed=self.seed),
        }
        loss = untouched_loss(*text, self.batch_tokens)
        sentences = worth_sentences(tables["worth"], losses, tables["agreement"], loss)
        if self.curves:
            measured = losses if self.experts is None else None
            tables["curves"] = removal_curves(*text, scores, measured, **given)
            sentences += curve_sentences(tables["curves"])
            try:
                tables["top_k"] = top_k_losses(
                    *text, self.ks, classes=self.classes, batch_tokens=self.batch_tokens
                )
            except TraceError as error:
                notes.append(f"No losses against k: {error}.")
        if self.pairs:
            tables["pairs"] = pair_losses(*text, self.pairs, edit=self.edit, **given)
            tables["exchanges"] = exchange_losses(*text, self.pairs, **given)
        for name, table in tables.items():
            write_parquet(folder / f"{name}.parquet", table)
        meta = {
            "sentences": sentences,
            "notes": notes,
            "loss": loss,
            "experts": sum(self.measured.values()),
            "documents": losses["doc"].n_unique(),
            "tokens": self.tokens,
            "edit": self.edit.value,
            "seed": self.seed,
            "model_hash": model_hash(self.model),
            "text_hash": text_hash(self.documents),
            "versions": versions(),
        }
        write_json(folder / META, {**facts, **meta})
        return {"losses": losses} | tables

    @property
    def ks(self) -> list[int]:
        """From 1 to twice the model's number of slots."""
        sites, _ = find_sites(self.model, None, None)
        most = min((site.num_choices or 1 for site in sites), default=1)
        return list(range(1, min(2 * max(site.top_k or 1 for site in sites), most) + 1))

    @property
    def _chosen(self) -> dict[str, Any]:
        names = ("experts", "layers", "edit", "batch_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def _scores(self, documents: Sequence[np.ndarray], layers: Sequence[int]) -> pl.DataFrame:
        return expert_scores(self.model, documents, layers=layers, batch_tokens=self.batch_tokens)


def _seconds(work: Callable[..., Any], *args: Any) -> float:
    """Of the second call: the first is not counted."""
    work(*args)
    start = perf_counter()
    work(*args)
    return perf_counter() - start


@torch.no_grad()
def untouched_loss(
    model: nn.Module, documents: Sequence[np.ndarray], batch_tokens: int = 2048
) -> float:
    """Mean loss in nats per predicted token of the model as it is."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in padded_batches(model, documents, batch_tokens):
            start = 0
            for log_p in log_probabilities(logits_of(model, batch), batch):
                targets = batch.targets[start : start + len(log_p)].to(log_p.device)
                total -= float(log_p.gather(1, targets[:, None]).double().sum())
                start += len(log_p)
            count += start
    return total / count
