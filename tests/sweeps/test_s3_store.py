"""A sweep on the S3 protocol over HTTP: what a server refuses, delays or cuts is survived by a
bounded retry, or told in one line, and nothing half-written is read as whole.
"""

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="needs s3fs (group dev)")
pytest.importorskip("moto", reason="needs moto (group dev)")

import s3fs
from s3_server import CUT_DOWNLOAD, CUT_UPLOAD, SHORT, S3Server
from stub_trainer import StubRun, expected_loss, stub_grid, stub_sweep

from moe_lab.errors import RunError, StorageError
from moe_lab.runs import bucket as bucket_module
from moe_lab.runs.bucket import DOWNLOADS, Bucket, _advice
from moe_lab.runs.object_leases import take
from moe_lab.sweeps import SweepOutcome, run, status
from moe_lab.sweeps.launchers.mirror import _Copies

URL = "s3://bucket/sweep"
GRID = stub_grid(2, steps=8, step_seconds=0.0)
LONG = b"".join(index.to_bytes(4) for index in range(25_000))


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process that try twice."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)


def go(*runs: StubRun, workers: int = 1) -> SweepOutcome:
    sweep = stub_sweep(*(runs or GRID))
    return run(sweep, URL, workers=workers, progress=False, trainer="bucket_files:train")


def trained_steps(server: S3Server, one: StubRun) -> list[int]:
    log = server.objects()[f"sweep/files/{one.hash()}/steps.log"].decode()
    return [int(line.split()[1]) for line in log.splitlines()]


@pytest.mark.slow
def test_a_sweep_on_a_server_that_stumbles_has_the_numbers_of_an_undisturbed_one(s3: S3Server):
    own = re.compile(r"/(state|files)/").search
    with (
        s3.fault("SlowDown", 3, lambda method, path: method == "PUT" and bool(own(path))) as slow,
        s3.fault("InternalError", 2, lambda method, path: "status.json" in path) as broken,
        s3.fault(CUT_UPLOAD, 1) as cut,
        s3.fault(CUT_DOWNLOAD, 1) as torn,
    ):
        assert go(workers=2).complete
        frame = status(URL)
    assert [fault.seen for fault in (slow, broken, cut, torn)] == [3, 2, 1, 1]
    assert dict(frame.select("name", "loss").rows()) == {
        one.name: expected_loss(one) for one in GRID
    }
    for one in GRID:
        assert trained_steps(s3, one) == list(range(one.steps))
        assert s3.objects()[f"sweep/files/{one.hash()}/trace/part.txt"] == b"routes"
    left = [name for name in s3.objects() if re.search("checkpoint|lease|clock", name)]
    assert not left


CREDENTIALS = r"try other credentials \(these may be wrong or have expired\), or ask for the right"
TOLD = [
    ("InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist", CREDENTIALS),
    ("SignatureDoesNotMatch", "The request signature we calculated does not match", CREDENTIALS),
    ("ExpiredToken", "The provided token has expired", CREDENTIALS),
    ("AccessDenied", "PermissionError: Access Denied", CREDENTIALS),
    ("SlowDown", "Please reduce your request rate", "run the same command again to continue"),
    ("InternalError", "We encountered an internal error", "run the same command again"),
]


@pytest.mark.parametrize(("kind", "cause", "advice"), TOLD, ids=[kind for kind, *_ in TOLD])
def test_what_a_server_goes_on_refusing_is_one_line(
    s3: S3Server, impatient: None, tmp_path: Path, kind: str, cause: str, advice: str
):
    """Also where the answer has no body, as that to the HEAD before each read."""
    bucket = Bucket(URL)
    bucket.write("a/b", LONG)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: bucket.read("a/b"),
        "read many": lambda: bucket.read_many(["a/b", "a/c"]),
        "write": lambda: bucket.write("a/d", LONG),
        "list": lambda: bucket.names("a"),
        "download": lambda: bucket.download("a/b", tmp_path / "copy"),
        "take": lambda: take(bucket, "lease"),
        "run": go,
        "status": lambda: status(URL),
    }
    with s3.fault(kind):
        for call in calls.values():
            with pytest.raises(StorageError, match=f"^cannot .*; {advice}") as caught:
                call()
            assert "\n" not in str(caught.value)
        with pytest.raises(StorageError, match=cause):
            bucket.write("a/d", LONG)
    assert s3.objects() == {"sweep/a/b": LONG}


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("RequestTimeTooSkewed", "set the clock of this machine"),
        ("AuthorizationHeaderMalformed", r"try the bucket's own region \(AWS_DEFAULT_REGION\)"),
        ("PermanentRedirect", r"try the bucket's own region \(AWS_DEFAULT_REGION\) or endpoint"),
        ("QuotaExceeded", "try another store or free some space"),
    ],
)
def test_advice_fits_what_was_refused(s3: S3Server, impatient: None, kind: str, advice: str):
    with s3.fault(kind), pytest.raises(StorageError, match=f"; {advice}"):
        Bucket(URL).write("a", b"")


def test_a_listing_without_a_next_page_is_no_matter_of_credentials():
    assert _advice(KeyError("NextContinuationToken")) == bucket_module._AGAIN


def test_a_refusal_without_a_sentence_is_told_by_its_code(s3: S3Server, impatient: None):
    s3.wordless = True
    for kind in ("SignatureDoesNotMatch", "InvalidAccessKeyId", "AccessDenied"):
        told = rf"^cannot write {URL}: PermissionError: {kind}; {CREDENTIALS}"
        with s3.fault(kind), pytest.raises(StorageError, match=told):
            Bucket(URL).write("a", b"")


def test_an_answer_without_an_end_is_one_line(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    bucket = Bucket(URL)
    bucket.write("a/b", LONG)
    calls: list[Callable[[], object]] = [
        lambda: bucket.read("a/b"),
        lambda: bucket.read_many(["a/b", "a/c"]),
        lambda: bucket.ranges("a/b", [(0, 9)]),
        lambda: bucket.write("a/d", b""),
        lambda: bucket.names("a"),
        lambda: bucket.download("a/b", tmp_path / "copy"),
    ]
    ended = threading.Event()
    s3.before_answer = lambda method, path: ended.wait(60)
    monkeypatch.setattr(bucket_module, "CALL_SECONDS", 0.2)
    try:
        for call in calls:
            with pytest.raises(StorageError, match=r"no end of the answer within \d+ s; check the"):
                call()
    finally:
        ended.set()


def test_an_object_cut_short_without_a_word_is_read_again(s3: S3Server, tmp_path: Path):
    bucket = Bucket(URL)
    bucket.write("checkpoint", LONG)
    with s3.fault(SHORT, 1) as short:
        bucket.download("checkpoint", tmp_path / "copy")
    assert short.seen == 1
    assert (tmp_path / "copy").read_bytes() == LONG
    with s3.fault(SHORT), pytest.raises(StorageError, match="checkpoint was replaced or cut short"):
        bucket.download("checkpoint", tmp_path / "copy")


def test_a_url_is_no_pattern_and_marks_of_folders_are_no_objects(s3: S3Server):
    bucket, other = Bucket("s3://bucket/a*[b]?"), Bucket("s3://bucket/axbc")
    for one in (bucket, other):
        one.write("files/x", one.url.encode())
        s3fs.S3FileSystem().call_s3("put_object", Bucket="bucket", Key=f"{one.url[12:]}/files/")
    assert bucket.read_many(["files/x", "files/y"]) == {"files/x": bucket.url.encode()}
    bucket.rename("files/x", "files/z")
    assert bucket.names("files") == ["files/z"]
    assert other.names("files") == ["files/x"]
    assert bucket.read("files/z") == bucket.url.encode()
    assert bucket.ranges("files/z", [(0, 4), (900, 901)]) == [b"s3:/", b""]


@pytest.mark.parametrize("url", ["s3://bucket/../x", "s3://bucket/x/."])
def test_a_url_with_dots_for_names_is_refused(url: str):
    """Clients write such names elsewhere than they list them."""
    with pytest.raises(RunError, match=r"expected a URL without the names \. and \.\., got s3:"):
        Bucket(url)


def test_an_object_that_cannot_be_read_is_not_taken_for_a_missing_one(
    s3: S3Server, impatient: None
):
    bucket = Bucket(URL)
    bucket.write("a", b"1")
    bucket.write("b", b"2")
    assert bucket.read_many(["a", "b", "c"]) == {"a": b"1", "b": b"2"}
    with (
        s3.fault("InternalError", hits=lambda _, path: path.endswith("/b")),
        pytest.raises(StorageError, match="cannot read"),
    ):
        bucket.read_many(["a", "b", "c"])


@pytest.mark.parametrize("call", [go, lambda: status(URL)], ids=["run", "status"])
def test_a_bucket_that_is_not_there_is_one_line(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]
):
    monkeypatch.setitem(globals(), "URL", "s3://nobodys/sweep")
    with pytest.raises(
        StorageError,
        match=r"^cannot (write|list) s3://nobodys/sweep: no such bucket or folder \(The specified "
        r"bucket does not exist\); try another URL$",
    ):
        call()


def test_a_lease_that_cannot_be_given_back_fails_no_run(s3: S3Server, impatient: None):
    bucket = Bucket(URL)
    lease = take(bucket, "lease")
    assert lease is not None
    with s3.fault("InternalError"), lease:
        pass
    assert bucket.read("lease") is not None, "it ends with this process"


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A content that is uploaded in three parts."""
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda *_, **__: 5 * 2**20)
    return LONG * 110


def test_a_connection_cut_in_the_middle_of_a_part_costs_a_second_try(
    s3: S3Server, tmp_path: Path, in_parts: bytes
):
    (tmp_path / "weights").write_bytes(in_parts)
    with s3.fault(CUT_UPLOAD, 1) as cut:
        Bucket(URL).upload(tmp_path / "weights", "weights")
    assert cut.seen == 1
    assert s3.objects() == {"sweep/weights": in_parts}
    assert not s3.unfinished_uploads()


def test_a_part_that_never_arrives_leaves_the_old_object_whole(
    s3: S3Server, impatient: None, tmp_path: Path, in_parts: bytes
):
    bucket = Bucket(URL)
    bucket.write("weights", b"old")
    (tmp_path / "weights").write_bytes(in_parts)
    with (
        s3.fault(CUT_UPLOAD),
        pytest.raises(
            StorageError,
            match=r"^cannot write .*; check the network and the endpoint, then run the",
        ),
    ):
        bucket.upload(tmp_path / "weights", "weights")
    assert bucket.read("weights") == b"old"
    assert not s3.unfinished_uploads(), "nobody pays for parts that nobody completes"


def test_a_download_whose_object_is_replaced_is_one_version_and_not_two_halves(
    s3: S3Server, tmp_path: Path
):
    """The client asks for what is missing of a cut answer, and gets it of the newer object."""
    bucket = Bucket(URL)
    newer = bytes(reversed(LONG))
    bucket.write("checkpoint", LONG)

    def replace(method: str, path: str) -> None:
        if method == "GET" and path.endswith("checkpoint"):
            s3.before_answer = None
            Bucket(URL).write("checkpoint", newer)

    s3.before_answer = replace
    with s3.fault(CUT_DOWNLOAD, 1) as cut:
        bucket.download("checkpoint", tmp_path / "copy")
    assert cut.seen == 1
    assert (tmp_path / "copy").read_bytes() == newer

    versions = iter(range(100))

    def replace_always(method: str, path: str) -> None:
        if method == "GET" and path.endswith("checkpoint"):
            Bucket(URL).write("checkpoint", str(next(versions)).encode())

    s3.before_answer = replace_always
    with pytest.raises(StorageError, match=f"checkpoint was replaced or cut short {DOWNLOADS} t"):
        bucket.download("checkpoint", tmp_path / "copy")


@pytest.mark.slow
def test_credentials_that_expire_while_runs_train_cost_what_was_not_copied(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They expire at the first copy of a checkpoint, for which the run waits in its middle."""
    slow, copied = StubRun(name="slow", trouble="waits for file"), tmp_path / "copied"
    monkeypatch.setenv("STUB_FILE", str(copied))

    def expire(method: str, path: str) -> None:
        if method == "PUT" and "checkpoint" in path:
            copied.touch()

    s3.before_answer = expire
    with (
        s3.fault("ExpiredToken", hits=lambda *_: copied.exists()),
        pytest.raises(StorageError, match=rf"^cannot .*; {CREDENTIALS}"),
    ):
        go(slow)
    assert go(slow).complete
    assert status(URL)["loss"].item() == expected_loss(slow)
    steps = trained_steps(s3, slow)
    assert steps.count(0) == 1, "it began again"


@pytest.mark.slow
def test_old_listings_cost_time_and_no_run(s3: S3Server):
    """No listing shows a plan, a run or a checkpoint of this test."""
    s3.listed_at = 0.0
    for _ in range(2):  # a finished run that no listing shows is asked for by its name
        assert go().complete
        for one in GRID:
            assert trained_steps(s3, one) == list(range(one.steps))
    assert not [name for name in s3.objects() if "checkpoint" in name]
    with pytest.raises(RunError, match="expected a sweep's store with sweeps/"):
        status(URL)
    s3.listed_at = None
    assert status(URL)["state"].to_list() == ["finished"] * 2


def test_a_listing_that_names_what_is_gone_stops_no_run(s3: S3Server, tmp_path: Path):
    bucket, one = Bucket(URL), GRID[0].hash()
    names = [f"files/{one}/gone", f"files/{one}/kept"]
    for name in names:
        bucket.write(name, b"x")
    s3.listed_at = time.monotonic()
    bucket.delete(names[:1])
    assert bucket.names("files") == names
    _Copies(bucket, one, tmp_path / "copies", tmp_path / "log.txt", lambda: None).fetch()
    assert os.listdir(tmp_path / "copies") == ["kept"]
