"""The hostile traces of the published data: each ends in one line and exit code 2, or is right."""

import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from listings import relist

from moe_lab.analysis import class_profile
from moe_lab.errors import TraceError
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, clean_copies, open_trace, reader
from moe_lab.trace.clean_copies import CleanCopies
from moe_lab.trace.part_files import write_part
from moe_lab.trace.seal import SEAL_FILE

pytestmark = pytest.mark.data
FIRST = "routing/layer=0/part-00000.parquet"
LIMIT = 60
"""Seconds of processor time: what is not refused would take hours."""
REFUSED = {
    "deep_schema_2900": "expected a readable file",
    "footer_nested_lists_2000": "expected readable Parquet",
    "bomb_text_same": "bytes of text",
    "dict_bomb_400": "expected",
    "range_entropy_neg": "expected entropy from 0 to",
    "meta_bigint": "expected",
    "meta_surrogate": "expected",
    "meta_notes_int": "expected notes as a list, got 5",
}

COUNTS, ROUTES = "trace --import counts --top-k 2 IN --out OUT", "trace --import vllm IN --out OUT"
FOLDERS = (*REFUSED, "forged_statistics", "run_metrics_abort", "ansi_meta", "ansi_sweep")
COMMANDS = {
    **{f"{name}.tar.gz": "report IN --out OUT" for name in FOLDERS},
    **dict.fromkeys(("gap59.json", "dup0.json", "dd.json"), COUNTS),
    **dict.fromkeys(("brackets.npy", "huge_shape.npy", "enc.npz", "m99.npz"), ROUTES),
    **dict.fromkeys(
        ("10pow400.json", "1e308.json", "architectures_int.json", "bigint5000.json"), "count IN"
    ),
}
RIGHT = ("forged_statistics.tar.gz", "gap59.json")


@pytest.fixture
def unpacked(data_dir: Path, tmp_path: Path):
    def unpack(name: str) -> Path:
        archive = data_dir / "hostile" / f"{name}.tar.gz"
        if not archive.is_file():
            pytest.skip(f"needs {archive}")
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
        return tmp_path / name

    return unpack


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command whose processes take at most ``LIMIT`` s of processor time together, each 1 GB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        resource.setrlimit(resource.RLIMIT_DATA, (10**9, 10**9))

    environment = os.environ | {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
    before = seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "moe_lab", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=limit,
        timeout=300,
    )
    assert seconds_of_children() - before < LIMIT
    return done


def seconds_of_children() -> float:
    """Processor time of the processes that this one started and has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_trace_is_refused_for_what_is_wrong_with_it(name: str, unpacked) -> None:
    with pytest.raises(TraceError) as caught:
        open_trace(unpacked(name))
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_hostile_input_is_one_line_and_exit_code_2_or_right(
    name: str, data_dir: Path, tmp_path: Path
) -> None:
    source = data_dir / "hostile" / name
    if not source.is_file():
        pytest.skip(f"needs {source}")
    if name.endswith(".tar.gz"):
        with tarfile.open(source) as file:
            file.extractall(tmp_path, filter="data")
        source = tmp_path / name.removesuffix(".tar.gz")
    words = COMMANDS[name].split()
    done = run(*(str({"IN": source, "OUT": tmp_path / "out"}.get(word, word)) for word in words))
    lines = done.stderr.strip().splitlines()
    if name in RIGHT:
        assert (done.returncode, lines) == (0, []), done.stderr[-2000:]
    else:
        assert (done.returncode, len(lines)) == (2, 1), done.stderr[-2000:]
        assert len(done.stderr) < 2000


def test_forged_statistics_hide_no_row(unpacked) -> None:
    trace = open_trace(unpacked("forged_statistics")).check()
    assert trace.tokens.filter(pl.col("pos") > 0).collect().height == 196
    names = trace.tokens.collect_schema().names()
    column = next(name for name in names if name not in ("doc", "pos", "token_id", "loss"))
    profile = class_profile(trace, column).filter(pl.col("layer").is_not_null())
    assert profile.group_by("layer").agg(pl.col("n_tokens").sum())["n_tokens"].to_list() != [0]


def copy_of(folder: Path) -> Path | None:
    """The clean copies that a trace is read from; None: it is read where it lies."""
    storage = open_trace(folder).storage
    return storage.copy if isinstance(storage, CleanCopies) else None


def small_trace(folder: Path, rows: int = 200) -> Path:
    meta = TraceMeta(layers=(LayerMeta(0, 4),), has_scores=False, has_weights=False)
    with TraceWriter(folder, meta) as writer:
        doc, pos = np.repeat(0, rows).astype(np.uint32), np.arange(rows, dtype=np.uint32)
        writer.write_tokens(pl.DataFrame({"doc": doc, "pos": pos, "token_id": pos % 7}))
        ids = (pos % 4).astype(np.uint16)[:, None]
        columns = {"doc": doc, "pos": pos, "experts": ids, "ffn_count": np.ones(rows, np.uint8)}
        columns |= dict.fromkeys(("zero_count", "dropped"), np.zeros(rows, np.uint8))
        writer.write_rows(0, columns, np.bincount(ids[:, 0], minlength=4))
    return folder


def test_a_large_meta_of_layers_is_refused_in_seconds(tmp_path: Path) -> None:
    folder = small_trace(tmp_path / "t")
    values = json.loads((folder / "meta.json").read_text())
    values["layers"] = values["layers"] * 500_000
    (folder / "meta.json").write_text(json.dumps(values))
    with pytest.raises(TraceError) as caught:
        open_trace(folder)
    assert len(str(caught.value)) < 600


def test_a_footer_of_sixteen_megabytes_of_structures_is_refused(tmp_path: Path) -> None:
    folder = small_trace(tmp_path / "t")
    name = "routing/layer=0/part-00000.parquet"
    footer = b"\x15\x04\x19\xfc" + b"\xff\xff\xff\x07" + b"\x00" * 2**24
    data = b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    (folder / name).write_bytes(data)
    with pytest.raises(TraceError, match=f"{name}: expected .* bytes as written"):
        open_trace(folder).check()
    relist(folder, name)
    with pytest.raises(TraceError, match="expected a readable file"):
        open_trace(folder)


def test_a_trace_of_ours_is_read_where_it_lies_and_an_edited_one_is_not(tmp_path: Path) -> None:
    folder = small_trace(tmp_path / "t")
    assert copy_of(folder) is None
    values = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**values, "model": "another"}))
    edited = open_trace(folder)
    assert isinstance(edited.storage, CleanCopies)
    assert (edited.folder, edited.meta.model) == (folder, "another")
    assert edited.path(FIRST).is_relative_to(edited.storage.copy)


def test_a_column_name_of_several_lines_stays_one_line(tmp_path: Path) -> None:
    folder = small_trace(tmp_path / "t")
    name = "routing/layer=0/part-00000.parquet"
    frame = pl.read_parquet(folder / name, hive_partitioning=False)
    write_part(folder / name, frame.rename({"pos": "\np\x1bos"}))
    relist(folder, name)
    with pytest.raises(TraceError, match="expected columns") as caught:
        open_trace(folder)
    assert not {"\n", "\x1b"} & set(str(caught.value))


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"files": {}, "code": 1}', "{", "\x00"])
def test_a_forged_seal_opens_nothing(text: str, tmp_path: Path) -> None:
    folder = small_trace(tmp_path / "t")
    (folder / SEAL_FILE).write_text(text)
    assert copy_of(folder) is not None


def test_a_seal_of_another_user_opens_nothing(tmp_path: Path, monkeypatch) -> None:
    folder = small_trace(tmp_path / "t")
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    copied = copy_of(folder)
    assert copied is not None
    assert copied.is_relative_to(tmp_path / "cache")
    assert copy_of(folder) == copied  # the second time the copy is known
    (tmp_path / "cache" / "trace.key").chmod(0o644)
    assert copy_of(folder) is not None  # a key that others can read is no key


def test_a_clean_copy_of_another_version_is_not_taken(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    folder = small_trace(tmp_path / "t")
    (folder / SEAL_FILE).unlink()
    first = copy_of(folder)
    monkeypatch.setattr(reader, "__version__", "0.0.1")
    assert copy_of(folder) != first


def test_clean_copies_that_nobody_opens_are_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    folders = [small_trace(tmp_path / f"t{rows}", rows) for rows in (10, 20, 30, 40)]
    for folder in folders:
        (folder / SEAL_FILE).unlink()
    copies = [copy for folder in folders if (copy := copy_of(folder))]
    assert [copy.exists() for copy in copies] == [True] * 4
    for copy, days in zip(copies, (40, 2, 0.5, 0), strict=True):
        opened = time.time() - 86400 * days
        os.utime(copy, (opened, opened))
    clean_copies.prune(copies[0].parent)
    assert [copy.exists() for copy in copies] == [False, True, True, True]
    monkeypatch.setattr(clean_copies, "COPY_BYTES", 1)
    clean_copies.prune(copies[0].parent)
    assert [copy.exists() for copy in copies] == [False, False, True, True]
    open_trace(tmp_path / "t30")  # opening it makes it the newest
    assert time.time() - copies[2].stat().st_mtime < 60
