"""The page of ``moe-lab watch`` as a reader meets it: values arrive as they are written, the end of
a sweep, a killed worker and a server that was away change nothing else, and no text is markup.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="the page tests need selenium")
from report_browser import PATIENCE, binary, console, forget, refit, requests, resize
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait
from watched_runs import append, finish, log_step, make_run

from moe_lab.errors import RunError
from moe_lab.runs import RunState
from moe_lab.runs.owners import Owner, process_start, this_host
from moe_lab.watch import Board, WatchServer, open_place, page, write_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (binary() and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed",
    ),
]
FAULTS = Path(__file__).with_name("page_checks.js").read_text() + "return faults();"
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


class Served:
    """A server of the page that can be stopped and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        """Its port may be another process's for a moment."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.server = WatchServer(open_place(self.folder), port=self.port)
                break
            except RunError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


@pytest.fixture
def folder(tmp_path: Path, worker: subprocess.Popen[bytes]) -> Path:
    """Two finished runs, one that runs, and one that failed with a text that is markup."""
    for seed in (0, 1):
        make_run(tmp_path / f"done{seed}", state=RunState.FINISHED, seed=seed, ratio=2.0 + seed)
    run = make_run(tmp_path / "now", arm=HOSTILE)
    owner = Owner(this_host(), worker.pid, process_start(worker.pid))
    (run / ".claim-1").write_text(json.dumps(vars(owner)))
    failed = make_run(tmp_path / "failed", state=RunState.FAILED, arm=HOSTILE)
    (failed / "error.txt").write_text(f"{HOSTILE}\n{HOSTILE}")
    append(run / "alarms.jsonl", {"step": 1, "kind": "dead_experts", "sentence": HOSTILE})
    return tmp_path


def until(driver: Chrome, seen: Callable[[], Any]) -> None:
    """Wait until ``seen`` is true, for longer than any machine needs."""
    WebDriverWait(driver, PATIENCE, poll_frequency=0.1).until(lambda _: seen())


def text_of(driver: Chrome, selector: str) -> str:
    script = "return document.querySelector(arguments[0])?.textContent ?? ''"
    return driver.execute_script(script, selector)


@pytest.mark.slow
def test_values_arrive_and_the_page_outlives_workers_servers_and_the_sweep(
    driver: Chrome,
    folder: Path,
    worker: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A value that is written waits for the next look and the next question: it is there within 5 s.
    assert page.POLL_SECONDS + open_place(folder).seconds < 4
    monkeypatch.setattr(page, "POLL_SECONDS", 0.5)
    served = Served(folder)
    try:
        resize(driver, 1280)
        forget(driver)
        driver.get(served.server.url)
        until(driver, lambda: "1 running" in text_of(driver, "#answer .lead"))
        until(driver, lambda: "Load of every expert at step 40" in text_of(driver, "#run"))

        log_step(folder / "now", 41, loss=1.2345)
        until(driver, lambda: "1.234" in text_of(driver, "#runs"))

        # A killed worker: no file changes.
        worker.kill()
        worker.wait()
        until(driver, lambda: "1 interrupted" in text_of(driver, "#answer .lead"))

        # The server does not answer for a while, as after a laptop slept, and comes back.
        served.stop()
        until(driver, lambda: "No answer from moe-lab watch" in text_of(driver, "#connection"))
        assert "1 interrupted" in text_of(driver, "#answer .lead")
        finish(folder / "now", arm=HOSTILE)
        served.start()
        until(driver, lambda: "3 finished" in text_of(driver, "#answer .lead"))
        assert driver.execute_script("return document.getElementById('connection').hidden")

        # Names and errors are text, and nothing left this machine.
        assert driver.title.startswith("moe_lab watch: ")
        assert HOSTILE in text_of(driver, "#failures")
        assert HOSTILE in text_of(driver, "#alarms")
        assert driver.execute_script("return document.querySelectorAll('main img').length") == 0
        own = (served.server.url, "data:", "blob:")
        assert [url for url in requests(driver) if not url.startswith(own)] == []
        away = ("/changes?", "net::ERR_")  # asked while the server was away
        assert [line for line in console(driver) if not all(word in line for word in away)] == []
    finally:
        served.stop()


@pytest.mark.slow
def test_a_page_of_one_file_can_be_read_and_looked_into(
    driver: Chrome, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_page(Board(open_place(folder)), tmp_path_factory.mktemp("once") / "now.html")
    resize(driver, 1280)
    forget(driver)
    driver.get(path.as_uri())
    until(driver, lambda: "of every expert" in text_of(driver, "#figure-load figcaption"))
    choose = """const [id, value, kind] = arguments, field = document.getElementById(id);
      field.value = value; field.dispatchEvent(new Event(kind));"""
    driver.execute_script(choose, "run-of", "done1", "change")
    until(driver, lambda: "step 40;" in text_of(driver, "#figure-load figcaption"))
    driver.execute_script(choose, "step", "0", "input")
    until(driver, lambda: "step 5;" in text_of(driver, "#figure-load figcaption"))
    driver.execute_script(choose, "layer-metric", "dead_experts", "change")
    until(driver, lambda: "dead experts" in text_of(driver, "#figure-layers figcaption"))
    driver.execute_script(choose, "metric", "validation", "change")
    driver.execute_script(choose, "search", "failed", "input")
    rows = "return [...document.querySelectorAll('#runs tbody tr')].length"
    until(driver, lambda: driver.execute_script(rows) == 1)
    hidden = "return [...document.querySelectorAll('nav li[hidden]')].map(item => item.textContent)"
    assert driver.execute_script(hidden) == []
    found = {}
    for width in (1280, 400):
        resize(driver, width)
        refit(driver)
        found[width] = driver.execute_script(FAULTS)
    resize(driver, 1280)
    assert found == {1280: [], 400: []}
    assert [url for url in requests(driver) if not url.startswith(("file:", "data:"))] == []
    assert console(driver) == []
