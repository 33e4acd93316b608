"""One measurement of what the experts of a model are worth: its files in a folder, and what they
say in sentences.

``losses.parquet`` and the files in ``.unfinished`` grow while it runs; ``meta.json`` is written
last, so that a folder without it holds an unfinished measurement, which goes on.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.document_pass import evaluating
from moe_lab.errors import TraceError, require
from moe_lab.files import write_json, write_parquet
from moe_lab.number_format import listing
from moe_lab.trace.capturing.find_routers import find_sites
from moe_lab.trace.capturing.fingerprints import model_hash
from moe_lab.versions import versions
from moe_lab.worth.batches import padded_batches, pass_bytes
from moe_lab.worth.curves import SHARES, both_halves, possible_shares, removal_curves, top_k_losses
from moe_lab.worth.decisions import LEAST_SLOTS
from moe_lab.worth.measured_rows import text_hash
from moe_lab.worth.measures import EDITS, EditKind, expert_losses, expert_minutes, expert_worth
from moe_lab.worth.paired_passes import edited_sums, log_probabilities, logits_of, set_rows
from moe_lab.worth.pairs import chosen_pairs, exchange_losses, pair_losses
from moe_lab.worth.scores import SCORES, expert_scores, score_agreement, scored_layers
from moe_lab.worth.token_groups import Classes, TokenGroups
from moe_lab.worth.worth_files import LOSSES, META, SHORT, UNFINISHED, refuse_taken
from moe_lab.worth.worth_sentences import curve_sentences, worth_sentences

ORDERS = len(SCORES) + 11
"""Of ``removal_curves``: each score, the measured loss and ten random ones."""


@dataclass(frozen=True)
class Ablation:
    """What is measured.

    Attributes:
        model: that ``intervene`` can edit.
        documents: token ids [n] each, of texts that the model was not trained on. Those of fewer
            than two tokens are left out, and counted.
        experts: so many real experts of each layer, drawn with ``seed``; None: all.
        layers: those that are measured; None: all with experts.
        edit, classes, batch_tokens, seed: as for ``expert_losses``.
        curves: also ``removal_curves`` and ``top_k_losses`` for k from 1 to twice the model's; they
            need all layers.
        alone: also ``top_k_losses`` of each class alone; needs ``curves`` and ``classes``.
        pairs: also ``pair_losses`` and ``exchange_losses`` of so many pairs of each layer.
        left_out: how many documents were left out before, by what they are ("blank").

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
    alone: bool = False
    pairs: int | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            not (self.layers is not None and (self.curves or self.pairs)),
            "all layers for curves and pairs",
            "some",
            "leaving layers out",
            field="layers",
        )
        require(
            not self.alone or (self.curves and self.classes),
            "curves and classes, for k of the tokens of one class alone",
            "none",
            field="alone",
        )

    @cached_property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.documents))

    @cached_property
    def all_left_out(self) -> dict[str, int]:
        """How many documents were left out, by what they are."""
        short = sum(len(ids) < 2 for ids in self.documents)
        counts = Counter(self.left_out) + Counter({SHORT: short})
        return {what: number for what, number in counts.items() if number}

    @cached_property
    def pass_bytes(self) -> int | None:
        """Bytes of the predictions of the largest pass; None where that is unknown."""
        batches = padded_batches(self.model, self.documents, self.batch_tokens)
        return pass_bytes(self.model, max(batch.ids.numel() for batch in batches))

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
        """Minutes that each part will take, from timing it on one batch of documents, without what
        an unfinished measurement in ``folder`` holds.
        """
        path = None if folder is None else Path(folder) / LOSSES
        files = self._files(folder)
        parts = {
            "losses": expert_minutes(
                self.model, self.documents, path=path, classes=self.classes, **self._chosen
            )
        }
        batches = padded_batches(self.model, self.documents, self.batch_tokens)
        timed = [window.ids for window in batches[len(batches) // 2].documents]
        share = self.tokens / sum(map(len, timed)) / 60
        scored = scored_layers(files["scores"], self.model, self.documents)
        missing = [layer for layer in self.measured if layer not in scored]
        seconds = _seconds(self._scores, timed, missing[:1]) if missing else 0.0
        parts["scores"] = share * len(missing) * seconds
        if self.curves or self.pairs:
            edits = [[EDITS[self.edit](layer, 0) for layer in self.measured]]
            # half of it is the untouched pass, which many sets of edits share
            seconds = share * _seconds(edited_sums, self.model, timed, edits) / 2
            if self.curves:
                groups = TokenGroups(self.documents, self.classes, Align.INPUT)
                ks = len(self.ks)
                left = self._left(files["top_k"], self.documents, ks, groups)
                if self.alone:
                    number = ks * (len(groups.names) - 1)
                    left += self._left(files["top_k_alone"], self.documents, number, groups)
                judged = self.documents[1::2]  # half of the documents
                if both_halves(self.documents):
                    points = ORDERS * len(possible_shares(self.model))
                    left += self._left(files["curves"], judged, points) / 2
                parts["curves"] = seconds * left
            if self.pairs:
                chosen_pairs(self.model, self.pairs, self.seed, None)  # raises for too many
                # two single experts, both and the exchange, on average from mid-height
                number = self.pairs * len(self.measured) * 4
                parts["pairs"] = seconds * self._left(files["pairs"], self.documents, number) / 2
        return parts

    def run(self, folder: Path | str, facts: Mapping[str, Any] = {}) -> dict[str, pl.DataFrame]:
        """Measure, and write each table as Parquet, then ``meta.json`` with hashes, versions,
        sentences and ``facts``.

        Returns:
            losses, worth, scores, agreement; with ``curves`` also curves and top_k (where the
            model's k can be changed; else a note in ``meta.json`` says why not), with ``pairs``
            also pairs and exchanges; with ``alone`` also top_k_alone.

        Raises:
            AnalysisError: a finished measurement in ``folder``, or an unfinished one of another
                model, text or edit.
        """
        folder = Path(folder)
        refuse_taken(folder)
        files, notes = self._files(folder), []
        if self.all_left_out:
            parts = [f"{number} {what}" for what, number in self.all_left_out.items()]
            notes.append(f"Documents left out: {listing(parts)}.")
        losses = expert_losses(
            self.model,
            self.documents,
            path=folder / LOSSES,
            classes=self.classes,
            **self._chosen,
        )
        given: dict[str, Any] = {"batch_tokens": self.batch_tokens, "seed": self.seed}
        text = self.model, self.documents
        scores = self._scores(self.documents, [*self.measured], files["scores"])
        tables = {
            "worth": expert_worth(losses),
            "scores": scores,
            "agreement": score_agreement(scores, losses, seed=self.seed),
        }
        loss = untouched_loss(*text, self.batch_tokens)
        sentences = worth_sentences(tables["worth"], losses, tables["agreement"], loss)
        if self.curves:
            measured = losses if self.experts is None else None
            shares = possible_shares(self.model) if both_halves(self.documents) else []
            if not both_halves(self.documents):
                notes.append("No curves of removal: they need two documents.")
            elif left := [f"{100 * share:g} %" for share in SHARES if share not in shares]:
                notes.append(
                    f"No curve without {listing(left)} of the experts: that is no expert, or "
                    "leaves fewer than a token uses."
                )
            if shares:
                tables["curves"] = removal_curves(
                    *text, scores, measured, shares=shares, path=files["curves"], **given
                )
                sentences += curve_sentences(tables["curves"])
            try:
                for name in ("top_k", *["top_k_alone"] * self.alone):
                    tables[name] = top_k_losses(
                        *text,
                        self.ks,
                        classes=self.classes,
                        alone=name == "top_k_alone",
                        batch_tokens=self.batch_tokens,
                        path=files[name],
                    )
            except TraceError as error:
                notes.append(f"No losses against k: {error}.")
        if self.pairs:
            given["path"] = files["pairs"]
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
            "left_out": self.all_left_out,
            "tokens": self.tokens,
            "edit": self.edit.value,
            "seed": self.seed,
            "model_hash": model_hash(self.model),
            "text_hash": text_hash(self.documents),
            "versions": versions(),
        }
        write_json(folder / META, {**facts, **meta})
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        return {"losses": losses} | tables

    @property
    def ks(self) -> list[int]:
        """From 1, or the least that the routers take, to twice the model's number of slots."""
        sites, _ = find_sites(self.model, None, None)
        least = max(LEAST_SLOTS.get(type(site.module).__name__, 1) for site in sites)
        most = min((site.num_choices or 1 for site in sites), default=1)
        return list(range(least, min(2 * max(site.top_k or 1 for site in sites), most) + 1))

    @property
    def _chosen(self) -> dict[str, Any]:
        names = ("experts", "layers", "edit", "batch_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def _scores(
        self, documents: Sequence[np.ndarray], layers: Sequence[int], path: Path | None = None
    ) -> pl.DataFrame:
        return expert_scores(
            self.model, documents, layers=layers, batch_tokens=self.batch_tokens, path=path
        )

    def _files(self, folder: Path | str | None) -> dict[str, Path | None]:
        """Where the sums of each part are kept until the measurement is finished."""
        names = ("scores", "curves", "top_k", "top_k_alone", "pairs")
        if folder is None:
            return dict.fromkeys(names)
        return {name: Path(folder) / UNFINISHED / f"{name}.parquet" for name in names}

    def _left(
        self,
        path: Path | None,
        documents: Sequence[np.ndarray],
        sets: int,
        groups: TokenGroups | None = None,
    ) -> float:
        """How many of so many passes over the documents ``path`` lacks."""
        groups = groups or TokenGroups(documents)
        tokens = sum(max(len(ids) - 1, 0) for ids in documents)
        return max(sets - set_rows(path, self.model, documents, groups).tokens / max(tokens, 1), 0)


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
