"""A large trace from outside opens from its manifest; a child process takes each file when it is
first read.
"""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from listings import as_older_version, relist

from moe_lab import analysis
from moe_lab.analysis.map_reduce import mapped
from moe_lab.errors import TraceError
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, clean_copies, open_trace, reader
from moe_lab.trace.clean_copies import CleanCopies
from moe_lab.trace.seal import SEAL_FILE

FILE = "routing/layer=1/part-00001.parquet"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 tokens in files of 100 rows, two layers of 6 experts; too large to be checked at once."""
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", 0)
    meta = TraceMeta(layers=(LayerMeta(0, 6), LayerMeta(1, 6)), has_scores=False, has_weights=False)
    number = np.arange(300, dtype=np.uint32)
    keys = {"doc": number // 50, "pos": number % 50}
    with TraceWriter(tmp_path / "t", meta, rows_per_part=100) as writer:
        kind = ["name", "space", "word"] * 100
        writer.write_tokens(pl.DataFrame({**keys, "token_id": number % 7, "kind": kind}))
        for layer in (0, 1):
            ids = ((number * 7 + layer) % 6).astype(np.uint16)[:, None]
            columns = {**keys, "experts": ids, "ffn_count": np.ones(300, np.uint8)}
            columns |= dict.fromkeys(("zero_count", "dropped"), np.zeros(300, np.uint8))
            writer.write_rows(layer, columns, np.bincount(ids[:, 0], minlength=6))
    (tmp_path / "t" / SEAL_FILE).unlink()
    return tmp_path / "t"


def copied(trace) -> set[str]:
    """The files that were taken so far."""
    assert isinstance(trace.storage, CleanCopies)
    found = trace.storage.copy.rglob("*.parquet")
    names = {path.relative_to(trace.storage.copy).as_posix() for path in found}
    return {name for name in names if not name.startswith("manifest/")}


def forge(folder: Path, name: str = FILE) -> None:
    """A file whose numbers contradict its rows, listed as a forger would."""
    frame = pl.read_parquet(folder / name, hive_partitioning=False)
    changed = frame.with_columns(pl.col("ffn_count") + 1)
    changed.write_parquet(folder / name, metadata={"moe_lab_trace_version": "3"})
    relist(folder, name)


def test_a_file_is_taken_when_it_is_first_read_and_once(folder: Path, monkeypatch):
    trace = open_trace(folder)
    assert copied(trace) == set()
    assert trace.counts()["count"].sum() == 600
    assert copied(trace) == set()
    assert trace.read(FILE)["doc"].to_list() == [number // 50 for number in range(100, 200)]
    assert copied(trace) == {FILE}
    load = analysis.expert_load(trace, by="kind")
    monkeypatch.setattr(clean_copies, "call", None)  # no child is asked again
    again = open_trace(folder)
    assert analysis.expert_load(again, by="kind").equals(load)
    assert again.check().routing.collect().height == 600
    assert len(copied(again)) == 9


def test_a_forged_file_is_refused_when_it_is_first_read(folder: Path):
    forge(folder)
    trace = open_trace(folder)
    assert len(list(trace.batches(0, ["experts"]))) == 3
    for read in (
        lambda: trace.read(FILE, ["doc"]),
        lambda: trace.routing,
        lambda: analysis.expert_load(trace, by="kind"),
        lambda: open_trace(folder).check(),
    ):
        with pytest.raises(TraceError, match=r"^layer 1: expected ffn_count to be the") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert FILE not in copied(trace)


def test_listed_counts_that_are_not_those_of_the_rows_are_named(folder: Path):
    relist(folder, FILE, counts=[100, 0, 0, 0, 0, 0])
    trace = open_trace(folder)
    with pytest.raises(TraceError, match=f"^{FILE}: expected the slots of each expert as listed"):
        trace.read(FILE)


def test_a_changed_or_missing_file_is_refused_when_it_is_first_read(folder: Path):
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[:-1] + b"x")
    with pytest.raises(TraceError, match=f"^{FILE}: expected .* got another checksum"):
        open_trace(folder).read(FILE)
    (folder / FILE).unlink()
    with pytest.raises(TraceError, match=r"part-00001.parquet: No such file"):
        open_trace(folder).read(FILE)
    with pytest.raises(TraceError, match=f"expected 9 files, got 1 missing, first {FILE}"):
        open_trace(folder).check()


@pytest.mark.parametrize("replace", [True, False])
def test_a_clean_copy_that_is_damaged_or_anothers_is_made_again(folder: Path, replace: bool):
    trace = open_trace(folder)
    rows, path = trace.read(FILE), trace.path(FILE)
    if replace:  # with its mark: neither is a proof under another name
        other = trace.path("routing/layer=1/part-00000.parquet")
        shutil.copy(other, path)
        shutil.copy(clean_copies.mark_of(other), clean_copies.mark_of(path))
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert open_trace(folder).read(FILE).equals(rows)


def test_token_files_of_other_columns_are_refused_whichever_is_read_first(folder: Path):
    name = "tokens/part-00001.parquet"
    frame = pl.read_parquet(folder / name, hive_partitioning=False).drop("kind")
    frame.write_parquet(folder / name, metadata={"moe_lab_trace_version": "3"})
    relist(folder, name)
    with pytest.raises(TraceError, match=f"^{name}: expected the columns of the first token file"):
        open_trace(folder).read(name)


def test_workers_take_the_files_that_they_read(folder: Path, tmp_path: Path):
    trace = open_trace(folder)
    with mapped(1, cache=tmp_path / "kept", rows=100):
        frame = analysis.coactivation(trace)
        forge(folder)
        with pytest.raises(TraceError, match="layer 1"):
            analysis.coactivation(open_trace(folder))
    assert frame.equals(analysis.coactivation(trace))


def test_a_trace_of_an_older_schema_is_taken_file_by_file(folder: Path):
    (folder / SEAL_FILE).touch()
    counts = open_trace(folder).counts()
    as_older_version(folder, 2, sealed=False)
    trace = open_trace(folder)
    assert copied(trace) == set()
    assert trace.counts().equals(counts)
    assert len(copied(trace)) == 6
