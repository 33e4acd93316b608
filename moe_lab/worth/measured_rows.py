"""``MeasuredRows``: the sums of a measurement by what was edited, class and document, in a Parquet
file that grows as they are measured, so that a later call goes on with it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.errors import AnalysisError, require
from moe_lab.files import content_hash, write_parquet
from moe_lab.trace.capturing.fingerprints import model_hash
from moe_lab.worth.batches import Document
from moe_lab.worth.token_groups import TokenGroups

SUMS = ("tokens", "d_loss", "kl", "used", "d_loss_used")
"""What is summed over the predicted tokens of a document, in this order."""
WRITE_SECONDS = 30.0
"""A measurement that is killed loses at most this and one pass."""
MEASURED = "measured"
"""Column of the file: which measurement a row is of (``measurement_key``)."""
Key = tuple[Any, ...]


class MeasuredRows:
    """The rows of a measurement.

    A document may be measured window by window, in order: its row then holds the sums of the first
    ones, and ``tokens`` says how many they are.

    Args:
        path: of the file; None: there is none.
        keys: column -> type of what names an edit.
        facts: column -> its value in all rows; ``MEASURED`` among them.

    Raises:
        AnalysisError: ``path`` holds another measurement.
    """

    def __init__(
        self,
        path: Path | str | None,
        groups: TokenGroups,
        keys: Mapping[str, type[pl.DataType]],
        facts: Mapping[str, str],
    ) -> None:
        self.path, self.groups, self.keys, self.facts = path, groups, list(keys), facts
        self.schema = {
            **keys,
            **{name: pl.String for name in facts if name != MEASURED},
            **{"by": pl.String, "class": pl.String, "doc": pl.Int64},
            **dict.fromkeys(SUMS, pl.Float64),
            MEASURED: pl.String,
        }
        self._held = held_rows(path, self.schema, facts[MEASURED])
        every = self._held.filter(pl.col("class").is_null()).select(*keys, "doc", "tokens")
        self._tokens = {row[:-1]: row[-1] for row in every.iter_rows()}
        self._new: list[tuple[Key, Sequence[Document], Floats]] = []
        self._written = monotonic()

    @property
    def tokens(self) -> float:
        """Predicted tokens that the file held at the start, over all keys."""
        return sum(self._tokens.values())

    def lacks(self, key: Key, documents: Sequence[Document]) -> bool:
        """Did the file lack one of these windows at the start?"""
        return any(self._is_new(key, document) for document in documents)

    def _is_new(self, key: Key, document: Document) -> bool:
        # As many tokens are predicted before a window as there are before its first.
        return document.start >= self._tokens.get((*key, document.number), 0)

    def add(self, key: Key, documents: Sequence[Document], sums: Floats) -> None:
        """Take the sums [n, groups, len(SUMS)] of windows [n]."""
        new = [place for place, item in enumerate(documents) if self._is_new(key, item)]
        self._new.append((key, [documents[place] for place in new], sums[new]))
        if self.path is not None and monotonic() - self._written >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, where there are new rows."""
        if not self._new:
            return
        named = [(*key, item.number) for key, items, _ in self._new for item in items]
        owner = {name: self.schema[name] for name in (*self.keys, "doc")}
        owners = pl.DataFrame(named, owner, orient="row")
        rows = self.groups.frame(np.concatenate([sums for *_, sums in self._new])[None], SUMS)
        places = rows["doc"].to_numpy()
        rows = rows.drop("doc", "set").with_columns(
            *owners[places], *(pl.lit(value).alias(name) for name, value in self.facts.items())
        )
        held = pl.concat([self._held, rows.select(*self.schema)])
        if any(item.start for _, items, _ in self._new for item in items):
            others = [name for name in self.schema if name not in SUMS]
            held = held.group_by(others, maintain_order=True).agg(pl.sum(*SUMS))
        self._held, self._new = held.select(*self.schema), []
        if self.path is not None:
            write_parquet(self.path, self._held)
        self._written = monotonic()

    def of(self, keys: Sequence[Key]) -> pl.DataFrame:
        """The rows written so far of these keys, in order."""
        wanted = pl.DataFrame(keys, {name: self.schema[name] for name in self.keys}, orient="row")
        rows = self._held.join(wanted, on=self.keys, how="semi")
        return rows.drop(MEASURED).sort(*self.keys, "by", "class", "doc")

    def sums(self, keys: Sequence[Key], documents: int) -> Floats:
        """[keys, documents, groups, len(SUMS)] written so far; 0 where nothing is held."""
        schema = {name: self.schema[name] for name in self.keys}
        distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}  # keys may repeat
        wanted = pl.DataFrame(list(distinct), schema, orient="row").with_row_index("key")
        rows = self._held.join(wanted, on=self.keys).join(
            self.groups.labels.with_row_index("group"), on=["by", "class"], nulls_equal=True
        )
        table = np.zeros((len(distinct), documents, len(self.groups.names), len(SUMS)))
        table[tuple(rows[name].to_numpy() for name in ("key", "doc", "group"))] = rows.select(
            SUMS
        ).to_numpy()
        return table[[distinct[key] for key in keys]]


def measurement_key(
    path: Path | str | None,
    model: nn.Module,
    documents: Sequence[np.ndarray],
    edit: str,
    groups: TokenGroups | None = None,
) -> str:
    """Hash of the model's configuration and parameters, and of what is measured; empty where no
    file keeps it.
    """
    if path is None:
        return ""
    groups = groups or TokenGroups(documents)
    weights = [[name, _bytes_hash(value)] for name, value in model.state_dict().items()]
    labels = {name: [list(values) for values in given] for name, given in groups.classes.items()}
    return content_hash(
        [model_hash(model), weights, text_hash(documents), str(edit), labels, groups.align.value]
    )


def _bytes_hash(value: Tensor) -> str:
    """Hash of a parameter's bytes: a sum is the same for experts in another order."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def text_hash(documents: Sequence[np.ndarray]) -> str:
    """Hash of the token ids of documents, in order."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "big") + np.asarray(ids, np.int64).tobytes())
    return digest.hexdigest()[:12]


def held_rows(
    path: Path | str | None, schema: Mapping[str, type[pl.DataType]], key: str
) -> pl.DataFrame:
    """The rows that the file holds; none where there is no file.

    Raises:
        AnalysisError: rows of another ``measurement_key``, or none that can be read.
    """
    if path is None or not Path(path).exists():
        return pl.DataFrame(schema=schema)
    try:
        frame = pl.read_parquet(path, glob=False, hive_partitioning=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
        frame = pl.DataFrame()  # damaged
    same = frame.schema == schema and frame[MEASURED].unique().to_list() == [key]
    require(
        same,
        f"the measurement of this model, text and edit in {path}",
        "another file" if frame.width else "a file that cannot be read",
        "another path",
        error=AnalysisError,
        field="path",
    )
    return frame
