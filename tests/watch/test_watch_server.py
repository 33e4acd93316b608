"""What the server of ``moe-lab watch`` answers, and to whom."""

import gzip
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from refusals import refused
from watched_runs import make_run

from moe_lab.cli import main
from moe_lab.errors import RunError
from moe_lab.runs import RunState
from moe_lab.watch import WatchServer, open_place

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "results"
COSTS = RESULTS / "watch_cost.parquet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    make_run(folder / "a")
    make_run(folder / "b", state=RunState.FINISHED)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[WatchServer]:
    yield from serving(WatchServer(open_place(folder), port=0))


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[WatchServer]:
    """One that listens on another address than loopback."""
    yield from serving(WatchServer(open_place(folder), "0.0.0.0", 0))


def serving(server: WatchServer) -> Iterator[WatchServer]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(
    server: WatchServer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=600)
    connection.putrequest(method, path, skip_host=host is not None)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    body = answer.read()
    connection.close()
    return answer.status, headers, body


def test_the_page_and_its_changes_are_served(server: WatchServer) -> None:
    status, headers, body = ask(server, "/")
    assert status == 200
    assert gzip.decompress(body).startswith(b"<!doctype html>")
    assert headers["content-encoding"] == "gzip"
    assert "connect-src 'self'" in headers["content-security-policy"]
    status, headers, body = ask(server, "/changes?run=a")
    assert status == 200
    assert headers["content-type"].startswith("application/json")
    assert {"answer", "curve/a", "layers"} <= set(json.loads(body)["parts"])


@pytest.mark.parametrize("path", ["/", "/changes", "/nothing"])
def test_no_answer_may_be_read_or_framed_by_another_site(server: WatchServer, path: str) -> None:
    _, headers, _ = ask(server, path)
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"])
def test_only_get_is_answered(server: WatchServer, method: str) -> None:
    status, _, body = ask(server, "/", method)
    assert status == 501
    assert b"doctype" not in body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8642", "", "127.0.0.1.evil.example", "[x"]
)
def test_a_name_that_points_here_is_refused(server: WatchServer, host: str) -> None:
    for path in ("/", "/changes"):
        status, _, body = ask(server, path, host=host)
        assert status in (400, 421)
        assert b"doctype" not in body
        assert b"curve" not in body


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "LOCALHOST:1", "[::1]:5"])
def test_addresses_and_tunnels_are_known(server: WatchServer, host: str) -> None:
    assert ask(server, "/", host=host)[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd", "/a/metrics.jsonl", "/changes/",
     "/sweep.json", "/?/../x/..", "/\\..\\x"],
)  # fmt: skip
def test_no_path_leads_to_a_file(server: WatchServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status == 404 or gzip.decompress(body).startswith(b"<!doctype html>")
    assert b"root:" not in body
    assert b'"step"' not in body


@pytest.mark.parametrize(
    "query", ["run=../b", "run=%00", "step=-1", "step=9e9", "metric=x&search=%ff%00(", "mark=x-9",
              "mark=-", "seen=" + "a." * 99]
)  # fmt: skip
def test_a_query_of_any_kind_is_answered(server: WatchServer, query: str) -> None:
    status, _, body = ask(server, f"/changes?{query}")
    assert status == 200
    assert "answer" in json.loads(body)["parts"]


def test_a_query_of_many_fields_is_refused_in_one_line(server: WatchServer) -> None:
    status, _, body = ask(server, "/changes?" + "&".join(f"field{place}=1" for place in range(30)))
    assert (status, body) == (400, b"not a request of this page\n")


def test_another_address_than_loopback_needs_the_token(guarded: WatchServer) -> None:
    token = guarded.url.rstrip("/").rpartition("/")[2]
    assert len(token) >= 32
    for path in ("/", "/changes", "/x/", f"/{token[:-1]}/", f"/{token}x/changes", "/%ff/"):
        assert ask(guarded, path)[0] == 404
    assert ask(guarded, f"/{token}/")[0] == 200
    assert "answer" in json.loads(ask(guarded, f"/{token}/changes")[2])["parts"]
    assert ask(guarded, f"/{token}/", host="evil.example")[0] == 421
    assert ask(guarded, f"/{token}/", host="localhost:1")[0] == 200
    status, headers, _ = ask(guarded, f"/{token}")  # from there "changes" would be another address
    assert (status, headers["location"]) == (308, f"/{token}/")


def test_loopback_has_no_token(server: WatchServer) -> None:
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"


def test_a_port_that_is_taken_is_one_line(server: WatchServer, folder: Path) -> None:
    with refused("port", RunError):
        WatchServer(open_place(folder), port=server.server_address[1])
    with refused("port", RunError):
        WatchServer(open_place(folder), "256.1.1.1", 0)


def test_the_command_writes_one_file_and_refuses_a_place_without_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(folder), "--once", str(tmp_path / "now.html")]) == 0
    assert capsys.readouterr().out.startswith(f"page: {tmp_path / 'now.html'} (")
    assert main(["watch", str(tmp_path / "nothing")]) == 2
    assert main(["watch", str(folder), "--once", str(folder / "a" / "config.json" / "x")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2
    assert "Traceback" not in error


def test_the_committed_cost_is_within_what_the_page_promises() -> None:
    rows = pl.read_parquet(COSTS)
    of_78 = rows.filter(pl.col("measured") != "open")
    assert set(of_78["measured"]) == {"quiet", "busy"}
    assert (of_78["cpu_s_per_minute"] < 0.01 * 60).all()
    assert (of_78["resident"] < 150).all()
    opened = rows.filter(measured="open", runs=10_000)
    assert opened["wall_s"].to_numpy().mean() < 5
    assert (opened["resident"] < 150).all()
