"""Traces on an object store, over HTTP: read by range, to the bit as in a folder. What a server
refuses, delays, cuts or replaces is survived or one line, and never a wrong number.
"""

import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("s3fs", reason="needs s3fs (group dev)")
pytest.importorskip("moto", reason="needs moto (group dev)")

import s3fs
from listings import as_older_version, edit_manifest, relist
from s3_server import CUT_DOWNLOAD, S3Server

from moe_lab import analysis, cli
from moe_lab.analysis.map_reduce import mapped
from moe_lab.errors import RunError, StorageError, TraceError
from moe_lab.trace import LayerMeta, Trace, TraceMeta, TraceWriter, merge_traces, open_trace
from moe_lab.trace.clean_copies import CleanCopies
from moe_lab.trace.manifest import check_bytes, part_name
from moe_lab.trace.pieces import unpacked
from moe_lab.trace.reader import fetched_once
from moe_lab.trace.remote_files import RemoteFiles
from moe_lab.trace.seal import write_seal

URL = "s3://bucket/traces/t"
FILE, TOKENS = "routing/layer=3/part-00001.parquet", "tokens/part-00000.parquet"
ROWS, LAYERS = 1000, (1, 3)
ANALYSES: dict[str, Callable[[Trace], pl.DataFrame]] = {
    "load": analysis.expert_load,
    "load_by_class": lambda trace: analysis.expert_load(trace, by="kind"),
    "coactivation": analysis.coactivation,
    "transitions": analysis.transitions,
    "entropy": analysis.router_entropy,
    "vocabulary": analysis.vocabulary_specialisation,
    "class_profile": lambda trace: analysis.class_profile(trace, "kind"),
    "token_loss": analysis.token_loss,
    "repetition": analysis.repetition,
}


def write(folder: Path, seed: int = 0) -> Path:
    """1,000 tokens in files of 600 and 400 rows; two layers, top-3 of 8 experts + 2 zero-compute
    ones.
    """
    generator = np.random.default_rng(seed)
    meta = TraceMeta(layers=tuple(LayerMeta(layer, 8, 2, 3) for layer in LAYERS), model="m")
    number = np.arange(ROWS)
    keys = {"doc": number // 50, "pos": number % 50}
    with TraceWriter(folder, meta, rows_per_part=600) as writer:
        columns = {"token_id": generator.integers(0, 40, ROWS), "loss": generator.random(ROWS)}
        kind = generator.choice(["name", "space", "word"], ROWS)
        writer.write_tokens(pl.DataFrame({**keys, **columns, "kind": kind}))
        for layer in LAYERS:
            ids = generator.random((ROWS, 10)).argsort(axis=1)[:, :3].astype(np.uint16)
            ffn_count = (ids < 8).sum(axis=1).astype(np.uint8)
            columns = {
                **{name: values.astype(np.uint32) for name, values in keys.items()},
                "experts": ids,
                "weights": generator.random((ROWS, 3)).astype(np.float16),
                "ffn_count": ffn_count,
                "zero_count": (3 - ffn_count).astype(np.uint8),
                "gate_mass_ffn": generator.random(ROWS, dtype=np.float32),
                "entropy": generator.random(ROWS, dtype=np.float32),
                "margin": generator.random(ROWS, dtype=np.float32),
                "dropped": np.zeros(ROWS, np.uint8),
            }
            writer.write_rows(layer, columns, np.bincount(ids.ravel(), minlength=10))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A trace under the seal of a cache folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write(tmp_path_factory.mktemp("written") / "t")


@pytest.fixture
def url(s3: S3Server, written: Path) -> str:
    s3.put(written, "traces/t")
    return URL


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process that try twice."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)


@pytest.fixture
def other_user(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))


def fetched(s3: S3Server) -> dict[str, int]:
    """Bytes of each object that were sent since the last call."""
    total: dict[str, int] = {}
    for method, path, size in s3.sent:
        if method == "GET":
            name = path.removeprefix("/bucket/traces/t/")
            total[name] = total.get(name, 0) + size
    s3.sent.clear()
    return total


def one_line(error: pytest.ExceptionInfo[Exception]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_opening_and_the_load_fetch_the_manifest_alone(s3: S3Server, url: str, written: Path):
    trace, here = open_trace(url), open_trace(written)
    assert isinstance(trace.storage, RemoteFiles)
    assert analysis.expert_load(trace).equals(analysis.expert_load(here))
    assert (trace.num_tokens, trace.name, trace.meta) == (here.num_tokens, "t", here.meta)
    assert trace.files().equals(here.files())
    names = {"meta.json", "seal.json", part_name(0)}
    assert {name for name in fetched(s3) if name != "/bucket"} == names
    open_trace(url)
    assert part_name(0) not in fetched(s3), "the manifest is in the cache folder"


def test_an_analysis_fetches_the_pieces_of_the_columns_that_it_reads(
    s3: S3Server, url: str, written: Path
):
    trace = open_trace(url)
    pieces = pl.read_parquet(written / part_name(0)).filter(layer=3)["pieces"]
    columns = list(trace.meta.routing_schema())
    wanted = [columns.index(name) for name in ("doc", "pos", "experts")] + [-1]
    sizes = [[piece.end - piece.start for piece in unpacked(value)] for value in pieces]
    assert all(len(one) == len(columns) + 1 for one in sizes)
    assert [sum(one) for one in sizes] == trace.manifest.of_layer(3)["bytes"].to_list()
    trace.read("routing/layer=1/part-00000.parquet", ["doc"])  # which tells the order of columns
    fetched(s3)
    analysis.coactivation(trace, [3])
    assert fetched(s3) == {
        f"routing/layer=3/part-{part:05d}.parquet": sum(sizes[part][at] for at in wanted)
        for part in range(2)
    }


def test_frames_are_those_of_the_folder(url: str, written: Path):
    trace, here = open_trace(url), open_trace(written)
    for name, frame in ANALYSES.items():
        assert frame(trace).equals(frame(here)), name


def test_frames_of_two_processes_are_those_of_the_folder(url: str, written: Path, tmp_path: Path):
    trace, here = open_trace(url), open_trace(written)
    with mapped(2, cache=tmp_path / "kept", rows=500):
        for name in ("class_profile", "coactivation"):
            assert ANALYSES[name](trace).equals(ANALYSES[name](here)), name


def test_analyses_of_one_command_fetch_each_piece_once(
    s3: S3Server, url: str, written: Path, tmp_path: Path
):
    here = open_trace(written)
    with fetched_once([open_trace(url), "another source"]) as (trace, other):
        assert isinstance(trace, Trace)
        assert isinstance(trace.storage, RemoteFiles)
        assert trace.storage.kept is not None
        assert other == "another source"
        fetched(s3)
        for frame in ANALYSES.values():
            assert frame(trace).equals(frame(here))
        sizes = {name: (written / name).stat().st_size for name in trace.manifest.names()}
        got = fetched(s3)
        assert sum(got.values()) > 0.5 * sum(sizes.values())
        assert all(got[name] <= sizes[name] for name in got)
        with mapped(2, cache=tmp_path / "kept", rows=500):
            assert ANALYSES["transitions"](trace).equals(ANALYSES["transitions"](here))
        assert trace.tokens.collect().equals(here.tokens.collect())
        assert sum(fetched(s3).values()) == 0, "neither by workers nor for frames"
        kept = trace.storage.kept.folder
        assert not kept.stat().st_mode & 0o077
        for path in kept.iterdir():
            if content := path.read_bytes():  # locks are empty
                path.write_bytes(flipped(content, 0))
        assert analysis.coactivation(trace).equals(analysis.coactivation(here))
        assert sum(fetched(s3).values()) > 0, "a damaged piece is fetched again"
    assert not kept.exists()
    with fetched_once([open_trace(url)], most=5000) as (trace,):
        first, second = [(analysis.coactivation(trace), fetched(s3))[1] for _ in range(2)]
        assert trace.storage.kept is not None  # type: ignore[union-attr]
        folder = trace.storage.kept.folder  # type: ignore[union-attr]
        assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= 5000
    assert 0 < sum(second.values()) < sum(first.values())


def test_two_readers_of_one_file_fetch_it_once(s3: S3Server, url: str, written: Path):
    asked, second = [], threading.Event()

    def hold(method: str, path: str) -> None:
        if path.endswith(FILE):
            asked.append(path)
            (second.set if asked[1:] else second.wait)(*([] if asked[1:] else [0.5]))

    with fetched_once([open_trace(url)]) as (trace,):
        trace.read("routing/layer=3/part-00000.parquet", ["doc"])  # the order of columns is known
        other = pickle.loads(pickle.dumps(trace))
        fetched(s3)
        s3.before_answer = hold
        with ThreadPoolExecutor(2) as pool:
            frames = list(pool.map(lambda one: one.read(FILE, ["experts"]), (trace, other)))
        s3.before_answer = None
        once = fetched(s3)[FILE]
    with fetched_once([open_trace(url)]) as (trace,):
        trace.read("routing/layer=3/part-00000.parquet", ["doc"])
        fetched(s3)
        assert trace.read(FILE, ["experts"]).equals(frames[0])
        assert once == fetched(s3)[FILE]
    assert frames[0].equals(frames[1])


@pytest.mark.slow
def test_frames_of_a_ray_cluster_are_those_of_the_folder(url: str, written: Path, tmp_path: Path):
    pytest.importorskip("ray", reason="needs ray (extra ray)")
    from moe_lab.sweeps.launchers.ray_tasks import RayTasks

    trace, here = open_trace(url), open_trace(written)
    with mapped(RayTasks(2), cache=tmp_path / "kept", rows=500):
        assert analysis.coactivation(trace).equals(analysis.coactivation(here))


def test_lazy_frames_are_those_of_the_folder(s3: S3Server, url: str, written: Path):
    trace, here = open_trace(url), open_trace(written)
    assert trace.tokens.collect_schema() == here.tokens.collect_schema()
    assert trace.routing.collect_schema() == here.routing.collect_schema()
    queries: list[Callable[[Any], pl.LazyFrame]] = [
        lambda one: one.tokens,
        lambda one: one.routing.sort("layer", "doc", "pos"),
        lambda one: one.routing.group_by("layer").agg(pl.col("entropy").max()).sort("layer"),
        lambda one: one.tokens.join(one.routing, on=["doc", "pos"]).select(pl.len()),
        lambda one: one.tokens.filter(pl.col("kind") == "name").select("pos").head(3),
        lambda one: one.routing.select(pl.len()),
    ]
    for query in queries:
        assert query(trace).collect().equals(query(here).collect())
        assert query(trace).collect(engine="streaming").height == query(here).collect().height
    fetched(s3)
    layer, first = pl.col("layer"), pl.col("pos") < 5
    frequent = pl.col("entropy") > 0.5
    for one in (
        layer == 3,
        (layer == 3) & first,
        (layer.is_in([3, 7]) & frequent) & (first | (layer > 3)),
    ):
        query = trace.routing.filter(one).select("layer", "pos")
        assert query.collect().equals(here.routing.filter(one).select("layer", "pos").collect())
        names = fetched(s3)
        assert names
        assert all("layer=3" in name for name in names)
    either = (layer == 3) | first
    want = here.routing.filter(either).sort("layer", "doc", "pos").collect()
    assert trace.routing.filter(either).sort("layer", "doc", "pos").collect().equals(want)


def test_check_compares_all_bytes(s3: S3Server, url: str):
    trace = open_trace(url)
    sizes = dict(trace.files().select("name", "rows").rows())
    fetched(s3)
    assert pickle.loads(pickle.dumps(trace)).check().counts().equals(trace.counts())
    whole = fetched(s3)
    assert all(whole[name] >= trace.storage.bucket.size(name) for name in sizes)  # type: ignore
    key = f"traces/t/{FILE}"
    s3fs.S3FileSystem().pipe(f"bucket/{key}", flipped(s3.objects()[key], -100))
    with pytest.raises(TraceError, match=f"^{FILE}: expected .* got another checksum") as caught:
        trace.check()
    one_line(caught)


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def test_no_changed_byte_is_decoded(s3: S3Server, url: str, written: Path):
    key, files = f"traces/t/{FILE}", s3fs.S3FileSystem()
    trace, data = open_trace(url), (written / FILE).read_bytes()
    whole = open_trace(written).read(FILE, ["doc", "experts"])
    generator = np.random.default_rng(0)
    refused = 0
    for at in generator.integers(0, len(data), 25):
        files.pipe(f"bucket/{key}", flipped(data, at))
        try:
            assert trace.read(FILE, ["doc", "experts"]).equals(whole)
        except TraceError as error:
            assert str(error).startswith(f"{FILE}: expected bytes ")  # noqa: PT017
            refused += 1
    assert 5 < refused < 25


def test_an_object_replaced_or_removed_while_it_is_read_is_one_line(
    s3: S3Server, url: str, tmp_path: Path
):
    trace, files = open_trace(url), s3fs.S3FileSystem()
    other = write(tmp_path / "other", seed=1)
    key = f"bucket/traces/t/{FILE}"
    seen: list[str] = []

    def replace(method: str, path: str) -> None:
        if path.endswith(FILE) and not seen:
            seen.append(path)
            files.pipe(key, (other / FILE).read_bytes())

    trace.read("routing/layer=3/part-00000.parquet", ["experts"])  # the order of columns is known
    s3.before_answer = replace
    trace.read(FILE, ["experts"])  # both ranges may still be of the old object
    s3.before_answer = None
    assert seen
    with pytest.raises(TraceError, match=f"^{FILE}: expected bytes .* damaged or replaced") as one:
        trace.read(FILE, ["experts"])
    one_line(one)
    files.pipe(key, b"short")
    with pytest.raises(TraceError, match=f"^{FILE}: expected bytes .* damaged or replaced") as one:
        trace.read(FILE, ["experts"])
    one_line(one)
    with pytest.raises(TraceError, match=f"^{FILE}: expected .* bytes as written, got 5 bytes"):
        trace.read(FILE)
    files.rm(key)
    for columns in (["experts"], None):
        with pytest.raises(TraceError, match=f"^{FILE}: expected the file .*, got none") as one:
            trace.read(FILE, columns)
        one_line(one)


def test_a_server_that_stumbles_costs_time_alone(s3: S3Server, url: str, written: Path):
    for kind, times in (("SlowDown", 3), ("InternalError", 2), (CUT_DOWNLOAD, 2)):
        with s3.fault(kind, times, lambda _, path: "routing" in path) as fault:
            trace = open_trace(url)
            frame = analysis.coactivation(trace, [3])
        assert fault.seen == times
        assert frame.equals(analysis.coactivation(open_trace(written), [3]))


CREDENTIALS = r"try other credentials \(these may be wrong or have expired\)"


REFUSALS = {
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "ExpiredToken": CREDENTIALS,
    "AccessDenied": CREDENTIALS,
    "SlowDown": "run the same command again",
    "InternalError": "run the same command again",
    CUT_DOWNLOAD: "again",
}


def test_what_a_server_goes_on_refusing_is_one_line(s3: S3Server, impatient: None, url: str):
    trace = open_trace(url)
    calls: list[Callable[[], object]] = [
        lambda: trace.read(FILE, ["weights"]),
        lambda: trace.read(FILE),
        lambda: analysis.coactivation(trace),
        lambda: trace.routing.select("weights").collect(),
    ]
    for kind, advice in REFUSALS.items():
        opens = [] if kind == CUT_DOWNLOAD else [lambda: open_trace(url)]
        for call in [*calls, *opens]:
            with s3.fault(kind), pytest.raises(StorageError, match=advice) as caught:
                call()
            one_line(caught)
    assert trace.read(FILE, ["weights"]).height == 400


def test_what_is_not_there_is_one_line(url: str, written: Path):
    cases: dict[str, tuple[type[Exception], str]] = {
        "s3://nobodys/t": (StorageError, "^cannot .*no such bucket or folder"),
        "s3://bucket/traces": (TraceError, "^expected a trace at s3://bucket/traces, got no meta"),
        "gs://bucket/t": (
            RunError,
            "^expected the package that opens gs://, got .*; try pip",
        ),
        "nosuch://bucket/t": (RunError, r"^expected a folder or a URL that fsspec knows \(s3"),
    }
    for place, (error, message) in cases.items():
        with pytest.raises(error, match=message) as caught:
            open_trace(place)
        one_line(caught)
    trace = open_trace(f"{url}/")
    with pytest.raises(TraceError, match=r"expected a file of this machine.*try trace.read"):
        trace.path(FILE)
    assert open_trace(f"file://{written}").path(FILE) == written / FILE


@pytest.mark.parametrize("version", [1, 2])
def test_a_trace_of_an_older_schema_and_one_without_pieces_are_read_whole(
    s3: S3Server, written: Path, tmp_path: Path, version: int
):
    folder = tmp_path / "t"
    shutil.copytree(written, folder)
    if version == 1:
        as_older_version(folder, version, sealed=True)
    else:
        edit_manifest(folder, lambda frame: frame.drop("pieces"))
        write_seal(folder)
    s3.put(folder, "traces/t")
    trace, here = open_trace(URL), open_trace(written)
    assert isinstance(trace.storage, RemoteFiles)
    fetched(s3)
    assert trace.read(FILE, ["doc"]).equals(here.read(FILE, ["doc"]))
    assert fetched(s3)[FILE] >= (written / FILE).stat().st_size
    with fetched_once([trace]) as (once,):
        for columns in (["doc"], ["pos"], None):
            assert once.read(FILE, columns).equals(here.read(FILE, columns))
    assert fetched(s3)[FILE] == (written / FILE).stat().st_size
    assert trace.check().counts().equals(here.counts())
    s3fs.S3FileSystem().pipe(f"{URL}/{FILE}", flipped((written / FILE).read_bytes(), 300))
    with pytest.raises(TraceError, match=f"^{FILE}: expected"):
        trace.read(FILE, ["doc"])


def test_a_merged_trace_is_read_and_an_interrupted_one_refused(
    s3: S3Server, written: Path, tmp_path: Path
):
    merged = merge_traces([written, written], tmp_path / "merged")
    s3.put(tmp_path / "merged", "traces/t")
    trace = open_trace(URL)
    assert analysis.coactivation(trace).equals(analysis.coactivation(merged))
    meta = TraceMeta(layers=(LayerMeta(0, 8, 0, 2),))
    with pytest.raises(KeyError), TraceWriter(tmp_path / "cut", meta):
        raise KeyError
    s3.put(tmp_path / "cut.incomplete", "cut")
    with pytest.raises(TraceError, match=r"^expected a complete trace at s3://bucket/cut") as one:
        open_trace("s3://bucket/cut")
    one_line(one)


def test_the_trace_of_another_user_is_checked_file_by_file(
    s3: S3Server, url: str, other_user: None, written: Path
):
    trace = open_trace(url)
    assert isinstance(trace.storage, CleanCopies)
    assert not [name for name in fetched(s3) if "routing" in name]
    assert analysis.coactivation(trace, [3]).equals(analysis.coactivation(open_trace(written), [3]))
    assert {name.split("/")[1] for name in fetched(s3) if "routing" in name} == {"layer=3"}
    analysis.coactivation(open_trace(url), [3])
    assert not [name for name in fetched(s3) if "routing" in name], "they were copied"
    assert trace.check().counts().equals(open_trace(written).counts())


def test_a_hostile_file_of_another_user_is_refused(
    s3: S3Server, other_user: None, written: Path, tmp_path: Path
):
    folder = tmp_path / "t"
    shutil.copytree(written, folder)
    frame = pl.read_parquet(folder / FILE, hive_partitioning=False)
    frame.with_columns(pl.col("ffn_count") + 1).write_parquet(
        folder / FILE, metadata={"moe_lab_trace_version": "3"}
    )
    relist(folder, FILE)
    s3.put(folder, "traces/t")
    trace = open_trace(URL)
    assert len(list(trace.batches(1, ["doc"]))) == 2
    with pytest.raises(TraceError, match=r"^layer 3: expected ffn_count to be") as caught:
        trace.read(FILE, ["doc"])
    one_line(caught)
    s3fs.S3FileSystem().pipe(f"{URL}/{FILE}", b"x" * 10**6)
    with pytest.raises(TraceError, match=f"^{FILE}: expected .* got 1000000 bytes"):
        trace.read(FILE, ["doc"])


@pytest.mark.slow
def test_the_commands_take_a_url(
    s3: S3Server,
    impatient: None,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    data = [name for name in s3.objects() if "/routing/" in name or "/tokens/" in name]
    sizes = {name.removeprefix("traces/t/"): len(s3.objects()[name]) for name in data}
    for words in (
        f"cache {url} --budget 1KiB --expert-bytes 100",
        f"place {url} --devices 2 --workers 2 --partial-frames kept",
        f"decode {url} --batch 2",
        f"compare {url} {url}",
        f"difficulty {url}",
        f"report {url} --out page.html",
    ):
        fetched(s3)
        assert cli.main(words.split()) == 0, (words, capsys.readouterr().err)
        got = {name: size for name, size in fetched(s3).items() if name in sizes}
        assert got, words
        assert all(got[name] <= sizes[name] for name in got), f"{words}: each piece once"
    assert (tmp_path / "page.html").stat().st_size > 10_000
    capsys.readouterr()
    begun = threading.Event()
    s3.before_answer = lambda _, path: "/routing/" in path and begun.set()
    with s3.fault("ExpiredToken", hits=lambda *_: begun.is_set()):
        assert cli.main(f"report {url} --out cut.html".split()) == 2, "in the middle of the page"
    s3.before_answer = None
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "cut.html").exists()
    assert cli.main(["place", "s3://bucket/nothing", "--devices", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_null_digest_under_a_seal_is_one_line(written: Path, tmp_path: Path):
    folder = tmp_path / "t"
    shutil.copytree(written, folder)
    edit_manifest(folder, lambda frame: frame.with_columns(digest=pl.lit(None, pl.Binary())))
    write_seal(folder)
    with pytest.raises(TraceError, match=r"^manifest: expected a digest of 32 bytes for each file"):
        open_trace(folder)


def test_pieces_are_the_whole_file(written: Path):
    for row in pl.read_parquet(written / part_name(0)).filter(layer=3).to_dicts():
        path = written / f"routing/layer=3/part-{row['part']:05d}.parquet"
        check_bytes(path, path.name, row)
        data, pieces = path.read_bytes(), unpacked(row["pieces"])
        assert (pieces[0].start, pieces[-1].end) == (0, len(data))
        assert all(piece.fits(data[piece.start : piece.end]) for piece in pieces)
