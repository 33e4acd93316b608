"""``MeasuredRows``: the sums of a measurement by layer, expert, class and document, in a Parquet
file that grows as they are measured, so that a later call goes on with it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.errors import AnalysisError, require
from moe_lab.files import content_hash, write_parquet
from moe_lab.trace.capturing.fingerprints import model_hash
from moe_lab.worth.paired_passes import SUMS
from moe_lab.worth.token_groups import Classes, TokenGroups

WRITE_SECONDS = 30.0
"""A measurement that is killed loses at most this and one pass."""
ORDER = ("layer", "expert", "by", "class", "doc")
SCHEMA = {
    "layer": pl.Int64,
    "expert": pl.Int64,
    "edit": pl.String,
    "by": pl.String,
    "class": pl.String,
    "doc": pl.Int64,
    **dict.fromkeys(SUMS, pl.Float64),
    "measured": pl.String,
}


class MeasuredRows:
    """The rows of a measurement.

    Args:
        path: of the file; None: there is none.
        facts: column -> its value in all rows: edit and measured (``measurement_key``).

    Raises:
        AnalysisError: ``path`` holds another measurement.
    """

    def __init__(
        self, path: Path | str | None, groups: TokenGroups, facts: Mapping[str, str]
    ) -> None:
        self.path, self.groups, self.facts = path, groups, facts
        self._held = _resumed(path, facts["measured"])
        every = self._held.filter(pl.col("class").is_null()).group_by("layer", "expert").agg("doc")
        self._docs = {(layer, expert): docs for layer, expert, docs in every.iter_rows()}
        self._new: list[tuple[NDArray[np.int64], Floats]] = []
        self._written = monotonic()

    def lacks(self, layer: int, expert: int, docs: NDArray[np.int64]) -> bool:
        """Did the file lack one of these documents at the start?"""
        return not np.isin(docs, self._docs.get((layer, expert), [])).all()

    def add(self, layer: int, expert: int, docs: NDArray[np.int64], sums: Floats) -> None:
        """Take the sums [n, groups, len(SUMS)] of documents [n]."""
        new = ~np.isin(docs, self._docs.get((layer, expert), []))
        keys = np.stack([np.full(len(docs), layer), np.full(len(docs), expert), docs], axis=1)
        self._new.append((keys[new], sums[new]))
        if self.path is not None and monotonic() - self._written >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, where there are new rows."""
        if not self._new:
            return
        keys, sums = (np.concatenate(part) for part in zip(*self._new, strict=True))
        rows = self.groups.frame(sums[None], SUMS)
        places = rows["doc"].to_numpy()
        rows = rows.with_columns(
            *(pl.Series(name, keys[places, place]) for place, name in enumerate(_KEYS)),
            *(pl.lit(value).alias(name) for name, value in self.facts.items()),
        )
        self._held, self._new = pl.concat([self._held, rows.select(*SCHEMA)]), []
        if self.path is not None:
            write_parquet(self.path, self._held)
        self._written = monotonic()

    def of(self, pairs: Sequence[tuple[int, int]]) -> pl.DataFrame:
        """The rows written so far of these (layer, expert), in order."""
        wanted = pl.DataFrame(pairs, schema={"layer": pl.Int64, "expert": pl.Int64}, orient="row")
        rows = self._held.join(wanted, on=["layer", "expert"], how="semi")
        return rows.drop("measured").sort(ORDER)


_KEYS = ("layer", "expert", "doc")


def measurement_key(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    edit: str,
    classes: Classes | None,
    align: Align,
) -> str:
    """Hash of the model's configuration and parameters, and of what is measured."""
    weights = [[name, _bytes_hash(value)] for name, value in model.state_dict().items()]
    labels = {name: [list(values) for values in given] for name, given in (classes or {}).items()}
    return content_hash(
        [model_hash(model), weights, text_hash(documents), str(edit), labels, Align(align).value]
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


def _resumed(path: Path | str | None, key: str) -> pl.DataFrame:
    """The rows that the file holds; none where there is no file."""
    if path is None or not Path(path).exists():
        return pl.DataFrame(schema=SCHEMA)
    try:
        frame = pl.read_parquet(path, glob=False, hive_partitioning=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
        frame = pl.DataFrame()  # damaged
    same = frame.schema == SCHEMA and frame["measured"].unique().to_list() == [key]
    require(
        same,
        f"the measurement of this model, text and edit in {path}",
        "another file" if frame.width else "a file that cannot be read",
        "another path",
        error=AnalysisError,
        field="path",
    )
    return frame
