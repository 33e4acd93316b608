"""The manifest: opening reads it alone, counts come from it, rows agree, damage is found."""

import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from listings import as_older_version, edit_manifest, relist

from moe_lab.analysis import expert_load, load_summary
from moe_lab.errors import TraceError
from moe_lab.routing import Routing
from moe_lab.trace import (
    LayerMeta,
    TraceMeta,
    TraceWriter,
    manifest,
    merge_traces,
    open_trace,
    part_files,
    reader,
)
from moe_lab.trace.clean_copies import CleanCopies
from moe_lab.trace.data_files import FolderFiles
from moe_lab.trace.manifest import MANIFEST
from moe_lab.trace.publish import put_in_place
from moe_lab.trace.seal import SEAL_FILE, write_seal

LAYERS = (LayerMeta(1, 6, 2, 3), LayerMeta(4, 4, 0, 2))
FILE = "routing/layer=4/part-00001.parquet"


def write(folder, documents=4, *, first=0, rows_per_part=32, **options):
    """Documents of 25 tokens; some slots are not used."""
    meta = TraceMeta(layers=LAYERS, vocab_size=50)
    with TraceWriter(folder, meta, rows_per_part=rows_per_part, **options) as writer:
        for doc in range(first, documents):
            pos = np.arange(25)
            writer.write_tokens(pl.DataFrame({"doc": [doc] * 25, "pos": pos, "token_id": pos}))
            for layer in LAYERS:
                generator = torch.Generator().manual_seed(doc * 10 + layer.layer)
                scores = torch.rand(25, layer.num_choices, generator=generator)
                ids = scores.argsort(dim=1)[:, : layer.top_k]
                ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -1)
                routing = Routing(
                    ids,
                    torch.ones(ids.shape),
                    scores,
                    scores,
                    layer.num_experts,
                    layer.num_zero_experts,
                )
                writer.write_routing(layer.layer, [doc] * 25 + pos * 0, pos, routing)
            writer.finish_documents([doc])
    return open_trace(folder)


def counts_of_rows(trace):
    """[layer, expert, count] as the rows of every file say."""
    frames = [
        trace.read(name, ["experts"])
        .select(pl.lit(layer).alias("layer"), expert=pl.col("experts").explode())
        .drop_nulls()
        for name, layer, _ in trace.files().drop_nulls().iter_rows()
    ]
    return pl.concat(frames).group_by("layer", "expert").agg(count=pl.len().cast(pl.Int64))


def agree(trace):
    """The manifest has the counts that the rows have, and every file is as listed."""
    found = trace.check().counts().filter(pl.col("count") > 0)
    wanted = counts_of_rows(trace).sort("layer", "expert")
    columns = ["layer", "expert", "count"]
    assert trace.manifest.has_counts
    assert found.select(columns).rows() == wanted.select(columns).rows()


def test_counts_of_a_written_trace_agree_with_its_rows(tmp_path):
    agree(write(tmp_path / "t"))


def test_counts_agree_after_a_merge_a_copy_and_a_change_of_user(tmp_path, monkeypatch):
    parts = [write(tmp_path / name).folder for name in ("a", "b")]
    agree(merge_traces(parts, tmp_path / "merged"))
    shutil.copytree(tmp_path / "merged", tmp_path / "elsewhere")
    agree(open_trace(tmp_path / "elsewhere"))
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    foreign = open_trace(tmp_path / "elsewhere")
    assert isinstance(foreign.storage, CleanCopies)
    agree(foreign)


def test_counts_agree_after_a_way_through_an_object_store(tmp_path):
    store = pytest.importorskip("fsspec").filesystem("memory")
    whole = write(tmp_path / "t")
    store.put(str(whole.folder), "/bucket/t", recursive=True)
    store.get("/bucket/t", str(tmp_path / "back"), recursive=True)
    store.rm("/bucket", recursive=True)
    back = open_trace(tmp_path / "back")
    agree(back)
    assert back.counts().equals(whole.counts())


@pytest.mark.parametrize("files_per_part", [1, 3, 2**14])
def test_counts_agree_after_an_interruption_however_the_manifest_is_split(
    tmp_path, monkeypatch, files_per_part
):
    monkeypatch.setattr(part_files, "FILES_PER_PART", files_per_part)

    def interrupted(documents, **options):
        with pytest.raises(KeyError):
            interrupted_write(tmp_path / "t", documents, **options)

    interrupted(7)
    before = open_trace(tmp_path / "t.incomplete", allow_incomplete=True)
    assert len(before.manifest.parts) == -(-before.files().height // files_per_part)
    agree(before)
    interrupted(9, first=7, resume=True)
    again = write(tmp_path / "t", 12, first=9, resume=True)
    agree(again)
    assert again.counts().equals(write(tmp_path / "whole", 12).counts())


def interrupted_write(folder, documents, **options):
    real = TraceWriter.finish_documents

    def fail_after(writer, numbers):
        real(writer, numbers)
        if numbers == [documents - 1]:
            raise KeyError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraceWriter, "finish_documents", fail_after)
        write(folder, documents, **options)


def test_an_interrupted_trace_whose_manifest_is_newer_than_its_meta_file_opens(tmp_path):
    """A writer killed between the two."""
    with pytest.raises(KeyError):
        interrupted_write(tmp_path / "t", 5)
    folder = tmp_path / "t.incomplete"
    meta = (folder / "meta.json").read_bytes()
    edit_manifest(folder, lambda frame: frame[::-1])
    (folder / "meta.json").write_bytes(meta)
    agree(open_trace(folder, allow_incomplete=True))
    agree(write(tmp_path / "t", 6, first=5, resume=True))


def test_the_meta_file_does_not_grow_with_the_trace(tmp_path):
    sizes = []
    for documents in (2, 40):
        trace = write(tmp_path / str(documents), documents)
        sizes.append((Path(trace.folder) / "meta.json").stat().st_size)
    assert sizes[1] - sizes[0] <= 2  # digits of the number of files


def test_opening_and_counting_read_no_data_file(tmp_path):
    counts = write(tmp_path / "t").counts()
    for table in ("tokens", "routing"):
        shutil.rmtree(tmp_path / "t" / table)
    trace = open_trace(tmp_path / "t")
    assert trace.counts().equals(counts)
    assert expert_load(trace)["count"].sum() == load_summary(trace)["slots"].sum() > 0
    assert trace.num_tokens == 100
    with pytest.raises(TraceError, match=r"routing/layer=4/part-00000.parquet: No such file"):
        list(trace.batches(4, ["pos"]))
    with pytest.raises(TraceError, match=r"expected 12 files, got 12 missing, first routing/"):
        trace.check()


def test_the_committed_measurement_meets_the_bars_of_ten_billion_tokens():
    path = Path(__file__).parents[2] / "experiments/benchmarks/results/trace_opening.parquet"
    table = pl.read_parquet(path).filter(pl.col("tokens") == 10**10)
    opening, load = (
        table.filter(pl.col("what") == what).to_dicts()[0] for what in ("open", "load")
    )
    assert opening["files"] > 900_000
    assert opening["processor"] < 2
    assert load["processor"] < 10
    assert max(opening["most_mb"], load["most_mb"]) < 300


READS = {
    "batches": lambda trace: list(trace.batches(4, ["pos"])),
    "read": lambda trace: trace.read(FILE),
    "path": lambda trace: trace.path(FILE),
    "routing": lambda trace: trace.routing.collect(),
    "check": lambda trace: trace.check(),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("read", READS)
def test_a_changed_file_is_found_when_it_is_first_read(tmp_path, read, version):
    folder = Path(write(tmp_path / "t").folder)
    if version < 3:
        as_older_version(folder, version, sealed=True)
    flip(folder / FILE)
    trace = open_trace(folder)
    assert isinstance(trace.storage, FolderFiles)
    assert trace.tokens.collect().height == len(list(trace.batches(1, ["pos"]))) * 25
    size = (folder / FILE).stat().st_size
    with pytest.raises(TraceError, match=f"{FILE}: expected {size} bytes as written, got another"):
        READS[read](trace)
    with pytest.raises(TraceError, match=FILE):  # and again: a refusal is not forgotten
        READS[read](trace)


def test_a_changed_token_file_is_found_when_tokens_are_read(tmp_path):
    folder = Path(write(tmp_path / "t").folder)
    flip(folder / "tokens/part-00001.parquet")
    trace = open_trace(folder)
    with pytest.raises(TraceError, match=r"tokens/part-00001.parquet: expected"):
        _ = trace.tokens


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_folder_whose_name_looks_like_a_pattern_is_itself(tmp_path, version, sealed):
    whole = write(tmp_path / "other", first=2)
    write(tmp_path / "t1", 2)  # which the pattern matches
    copy, folder = tmp_path / "copy", tmp_path / "t[1]"
    shutil.copytree(whole.folder, copy)
    if version == 2:
        as_older_version(copy, version, sealed)
    elif not sealed:
        (copy / SEAL_FILE).unlink()
    copy.rename(folder)
    trace = open_trace(folder).check()
    assert trace.counts().equals(whole.counts())
    assert trace.read(FILE).equals(whole.read(FILE))
    assert trace.routing.collect().equals(whole.routing.collect())


def test_a_changed_file_of_a_trace_from_outside_is_found_on_opening(tmp_path):
    folder = Path(write(tmp_path / "t").folder)
    (folder / SEAL_FILE).unlink()
    open_trace(folder)
    flip(folder / FILE)
    with pytest.raises(TraceError, match=f"{FILE}: expected"):
        open_trace(folder)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (pl.col("rows").cast(pl.UInt64), "rows UInt64"),
        (pl.col("counts").cast(pl.List(pl.Int64)), r"counts List\(Int64\)"),
        (pl.lit(1).alias("more"), "more Int32"),
    ],
)
def test_a_manifest_of_other_columns_is_refused_by_what_differs(tmp_path, change, got):
    folder = Path(write(tmp_path / "t").folder)
    edit_manifest(folder, lambda frame: frame.with_columns(change))
    write_seal(folder)
    wanted = f"part-00000.parquet: expected .*, got expected the documented columns, got {got}; try"
    with pytest.raises(TraceError, match=wanted):
        open_trace(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.with_columns(pl.col("layer").replace({4: 7})),
        lambda frame: frame.filter(pl.col("layer").is_null() | (pl.col("layer") != 4)),
    ],
)
def test_a_manifest_with_files_of_other_layers_under_a_seal_is_refused(tmp_path, change):
    folder = Path(write(tmp_path / "t").folder)
    edit_manifest(folder, change)
    write_seal(folder)
    with pytest.raises(TraceError, match=r"^manifest: expected files for layers \[1, 4\], got"):
        open_trace(folder)


@pytest.mark.parametrize("sealed", [True, False])
def test_small_parts_are_read_together_and_open_as_one(tmp_path, monkeypatch, sealed):
    counts = write(tmp_path / "whole").counts()
    monkeypatch.setattr(part_files, "FILES_PER_PART", 1)
    folder = Path(write(tmp_path / "t").folder)
    if not sealed:
        (folder / SEAL_FILE).unlink()
    read, groups = manifest._read_together, []

    def note(paths, *rest):
        groups.append(len(paths))
        return read(paths, *rest)

    monkeypatch.setattr(manifest, "_read_together", note)
    trace = open_trace(folder)
    assert isinstance(trace.storage, FolderFiles if sealed else CleanCopies)
    assert len(trace.manifest.parts) == (12 if sealed else 1)
    assert trace.counts().equals(counts)
    assert set(groups) == ({12} if sealed else {1})
    agree(trace)


def test_one_part_of_other_columns_among_many_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "FILES_PER_PART", 1)
    trace = write(tmp_path / "t")
    path = trace.manifest.parts[5]
    frame = pl.read_parquet(path)
    for change in (
        pl.col("counts").cast(pl.List(pl.Int64)),
        pl.col("rows").cast(pl.UInt16),
        pl.lit(1).alias("more"),
    ):
        frame.with_columns(change).write_parquet(path)
        with pytest.raises(TraceError, match=r"^manifest/part-00005.parquet: expected readable"):
            list(manifest.clean_parts(trace.manifest, trace.meta))
    path.write_bytes(b"no Parquet")
    with pytest.raises(TraceError, match=r"^manifest/part-00005.parquet: expected readable"):
        trace.counts()


@pytest.mark.parametrize(("few", "least"), [(11, 10**5), (12, 10**5), (11, 100)])
def test_many_small_parts_from_outside_are_refused_before_they_are_read(
    tmp_path, monkeypatch, few, least
):
    monkeypatch.setattr(part_files, "FILES_PER_PART", 1)
    folder = Path(write(tmp_path / "t").folder)
    (folder / SEAL_FILE).unlink()
    monkeypatch.setattr(manifest, "FEW_PARTS", few)
    monkeypatch.setattr(manifest, "LEAST_BYTES", least)
    if (few, least) != (11, 10**5):
        agree(open_trace(folder))
        return
    monkeypatch.setattr("moe_lab.trace.reader.call", None)  # no child is asked
    with pytest.raises(TraceError, match=f"^expected a manifest of .* got 12 parts of .* {folder}"):
        open_trace(folder)


def test_two_commands_that_open_one_trace_from_outside_at_once_share_its_copies(
    tmp_path, monkeypatch
):
    folder = Path(write(tmp_path / "t").folder)
    (folder / SEAL_FILE).unlink()
    monkeypatch.setattr(reader, "CHECKED_AT_OPENING", -1)
    call, opened = reader.call, []

    def open_another(*args, **options):
        result = call(*args, **options)
        if not opened:
            opened.append(None)
            opened[0] = open_trace(folder)
            opened[0].read(FILE)
        return result

    monkeypatch.setattr(reader, "call", open_another)
    trace = open_trace(folder)
    assert isinstance(trace.storage, CleanCopies)
    assert opened[0].storage.copy == trace.storage.copy
    assert opened[0].read(FILE).equals(trace.read(FILE)), "its copy is still there"


def test_a_folder_that_another_process_puts_in_place_meanwhile_is_replaced(tmp_path, monkeypatch):
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    monkeypatch.setattr(Path, "exists", lambda _: False)  # as it was a moment ago
    put_in_place(tmp_path / "new", tmp_path / "target")
    assert os.listdir(tmp_path / "target") == ["new"]
    assert os.listdir(tmp_path) == ["target"]


def test_a_changed_manifest_is_refused(tmp_path):
    folder = Path(write(tmp_path / "t").folder)
    flip(folder / MANIFEST / "part-00000.parquet")
    with pytest.raises(TraceError, match="manifest: expected the 1 parts that were written"):
        open_trace(folder)


@pytest.mark.parametrize("sealed", [True, False])
def test_counts_that_are_not_those_of_the_rows_are_named_by_file(tmp_path, sealed):
    folder = Path(write(tmp_path / "t").folder)
    relist(folder, FILE, counts=[9, 9, 9, 0])
    if sealed:
        write_seal(folder)
        assert open_trace(folder).counts().height == 12
    message = f"{FILE}: expected the slots of each expert as listed in the manifest, 9 of expert 0"
    with pytest.raises(TraceError, match=message) as caught:
        open_trace(folder).check()
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_those_of_the_file_are_named(tmp_path):
    folder = Path(write(tmp_path / "t").folder)
    relist(folder, FILE, rows=17)
    write_seal(folder)
    with pytest.raises(TraceError, match=f"{FILE}: expected 17 rows as recorded, got 18"):
        open_trace(folder).check()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_trace_of_an_older_version_opens_with_the_same_rows_and_counts(tmp_path, version, sealed):
    new = write(tmp_path / "t")
    shutil.copytree(new.folder, tmp_path / "old")
    as_older_version(tmp_path / "old", version, sealed)
    old = open_trace(tmp_path / "old").check()
    assert isinstance(old.storage, FolderFiles) == sealed
    assert not old.manifest.has_counts
    assert old.counts().equals(new.counts())
    assert old.files().equals(new.files())
    assert old.routing.collect().equals(new.routing.collect())
    assert old.tokens.collect().equals(new.tokens.collect())


def test_slots_of_an_older_version_that_are_not_those_of_the_rows_are_named(tmp_path):
    folder = Path(write(tmp_path / "t").folder)
    edit_manifest(
        folder,
        lambda frame: frame.with_columns(
            pl.col("counts").list.eval(pl.element() + 1).cast(pl.List(pl.UInt32))
        ),
    )
    as_older_version(folder, 2, sealed=True)
    with pytest.raises(TraceError, match=r"layer=1/part-00000.parquet: expected used slots as"):
        open_trace(folder).check()


def test_an_interrupted_trace_of_an_older_version_goes_on(tmp_path):
    with pytest.raises(KeyError):
        interrupted_write(tmp_path / "t", 5)
    as_older_version(tmp_path / "t.incomplete", 2, sealed=True)
    trace = write(tmp_path / "t", 8, first=5, resume=True)
    agree(trace)
    assert trace.counts().equals(write(tmp_path / "whole", 8).counts())


@pytest.mark.parametrize("name", ["tokens/part-99999.parquet", "../x.parquet", "/etc/passwd", ""])
def test_a_name_that_is_no_file_of_the_trace_is_refused(tmp_path, name):
    trace = write(tmp_path / "t")
    with pytest.raises(TraceError):
        trace.path(name)
