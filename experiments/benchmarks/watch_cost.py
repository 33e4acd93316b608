"""What ``moe-lab watch`` takes: memory, processor time, and how long until it shows what is there.

    python experiments/benchmarks/watch_cost.py           # all; --save keeps the table
    python experiments/benchmarks/watch_cost.py open open --save    # some of open, quiet, busy

``open``: 10,000 finished runs of small results, from the start of the command until the page's
answer counts all of them. ``quiet``: 78 runs of a sweep, of which none changes, and a browser that
asks every two seconds. ``busy``: the same while four runs log a step twice a second and one of them
ends every half minute, and the browser looks into a run.

Memory is that of the process and of its child together. ``resident`` counts a page that both share
(code of libraries) once; ``rss`` is the sum of what ``ps`` shows.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import polars as pl
from measure import RESULTS, save

TESTS = Path(__file__).resolve().parents[2] / "tests"
"""Where the functions lie that make run folders."""
sys.path.insert(0, str(TESTS))
from watched_runs import finish, log_step, make_run  # noqa: E402

from moe_lab.runs import RunState  # noqa: E402
from moe_lab.versions import provenance  # noqa: E402

TICKS = os.sysconf("SC_CLK_TCK")
RUNS, RUNNING, FAILED = 78, 4, 2
STEPS, LAYERS, EXPERTS = 1000, 6, 64


def sweep(folder: Path) -> list[Path]:
    """78 runs of six layers and 64 experts: 72 finished, 4 that run, 2 failed; those that run."""
    running = []
    for number in range(RUNS):
        ratio, seed = 2.0 ** (number % 8), number // 8
        state = RunState.FINISHED
        if number < RUNNING:
            state = RunState.RUNNING
        elif number < RUNNING + FAILED:
            state = RunState.FAILED
        sizes: dict[str, Any] = {
            "steps": STEPS,
            "of": 4 * STEPS,
            "layers": LAYERS,
            "experts": EXPERTS,
        }
        run = make_run(folder / f"{number:012x}", state=state, ratio=ratio, seed=seed, **sizes)
        if state is RunState.RUNNING:
            running.append(run)
    return running


def small_runs(folder: Path, count: int) -> None:
    """Finished runs without tables."""
    for number in range(count):
        run = folder / f"{number:012x}"
        run.mkdir(parents=True)
        result = {"run": run.name, "arm": "topk", "ratio": 2.0 ** (number % 8), "seed": number // 8}
        (run / "config.json").write_text(json.dumps({"name": run.name, "seed": number}))
        (run / "result.json").write_text(json.dumps(result | {"loss": 3.0 + number / 1e5}))
        (run / "done").write_text("{}")


class Watch:
    """``moe-lab watch PLACE`` as a process of its own."""

    def __init__(self, place: Path) -> None:
        self.began = time.monotonic()
        command = [sys.executable, "-m", "moe_lab", "watch", str(place), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(" at ")[1].split(" ")[0]
        self.mark = self.seen = ""
        self.peak = {"resident": 0.0, "rss": 0.0}

    def ask(self, **view: str) -> dict[str, Any]:
        """What a browser asks, with what it has."""
        query = urllib.parse.urlencode({"mark": self.mark, "seen": self.seen, **view})
        with urllib.request.urlopen(f"{self.url}changes?{query}") as response:
            answer = json.load(response)
        self.mark, self.seen = answer["mark"], answer["seen"]
        self.look()
        return answer["parts"]

    def pids(self) -> list[int]:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def look(self) -> None:
        """Note the memory of now."""
        resident, rss = memory(self.pids())
        self.peak = {
            "resident": max(self.peak["resident"], resident),
            "rss": max(self.peak["rss"], rss),
        }

    def seconds(self) -> float:
        """Processor time of the process and of its living children."""
        total = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            # Its own, and that of children that ended.
            total += sum(map(int, fields[11:15]))
        return total / TICKS

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)


def memory(pids: list[int]) -> tuple[float, float]:
    """MB of the processes together, shared pages of files once; the sum of what ``ps`` shows."""
    own, rss = 0, 0
    files: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        except OSError:
            continue
        place = ("", "")
        held = 0
        for line in lines:
            fields = line.split()
            if "-" in fields[0] and not fields[0].endswith(":"):
                named = len(fields) > 5 and fields[5].startswith("/")
                place = (fields[5], fields[2]) if named else ("", "")
            elif fields[0] == "Rss:":
                held = int(fields[1])
                rss += held
            elif fields[0] == "Anonymous:":
                own += int(fields[1]) if place[0] else held
                if place[0]:
                    files[place][pid] += held - int(fields[1])
    shared = sum(max(parts.values()) for parts in files.values())
    return (own + shared) / 1024, rss / 1024


def measure_open(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        small_runs(Path(folder), count)
        watch = Watch(Path(folder))
        printed = time.monotonic() - watch.began
        sentence = ""
        while f"{count:,} finished" not in sentence:
            sentence = watch.ask().get("answer", {}).get("sentence", sentence)
            time.sleep(0.05)
        row = {"wall_s": time.monotonic() - watch.began, "printed_s": printed}
        row |= {"cpu_s": watch.seconds(), **watch.peak}
        watch.close()
    return row | {"load": os.getloadavg()[0]}


def measure_78(minutes: float, *, busy: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        running = sweep(folder)
        stop = threading.Event()
        writer = threading.Thread(target=_write, args=(running, stop))
        watch = Watch(folder)
        view: dict[str, str] = {}
        notes = ["not read yet"]
        while any("not read yet" in note for note in notes):
            notes = watch.ask().get("answer", {}).get("notes", notes)
            time.sleep(0.1)
        opened = time.monotonic() - watch.began
        time.sleep(6)  # until what is new is settled
        watch.ask()
        row = {"wall_s": opened, "open_cpu_s": watch.seconds()}
        if busy:
            view = {"run": running[0].name}
            writer.start()
        began, used = time.monotonic(), watch.seconds()
        while time.monotonic() - began < 60 * minutes:
            watch.ask(**view)
            time.sleep(2)
        took = time.monotonic() - began
        cpu = watch.seconds() - used
        stop.set()
        if busy:
            writer.join()
        watch.close()
    row |= {"cpu_s": cpu, "cpu_s_per_minute": 60 * cpu / took, **watch.peak}
    return row | {"load": os.getloadavg()[0]}


def _write(running: list[Path], stop: threading.Event) -> None:
    """Four runs log; one ends every half minute and another begins."""
    step, ended = STEPS, time.monotonic()
    while not stop.wait(0.5):
        step += 1
        for run in running:
            log_step(run, step, of=4 * STEPS, layers=LAYERS, experts=EXPERTS)
        if time.monotonic() - ended > 30:
            ended = time.monotonic()
            finish(running.pop())
            new = running[0].with_name(f"{int(ended):012x}")
            running.append(make_run(new, steps=2, of=4 * STEPS, layers=LAYERS, experts=EXPERTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["open", "quiet", "busy"])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows = []
    for what in args.what:
        row = (
            measure_open(args.runs)
            if what == "open"
            else measure_78(args.minutes, busy=what == "busy")
        )
        rows.append({"measured": what, "runs": args.runs if what == "open" else RUNS, **row})
        print({name: round(v, 2) if isinstance(v, float) else v for name, v in rows[-1].items()})
    if args.save:
        new, kept = pl.DataFrame(rows), RESULTS / "watch_cost.parquet"
        if kept.exists():
            old = pl.read_parquet(kept).filter(~pl.col("measured").is_in(args.what))
            new = pl.concat([new, old.drop(provenance(), "threads")], how="diagonal_relaxed")
        print(save(new, "watch_cost"))


if __name__ == "__main__":
    main()
