"""Kills and power cuts at every place where a run, a trace or a page is written: what the next
start makes of them is what an undisturbed process makes.

    python experiments/kills.py                  # 40 kills and 20 power cuts

A forked child trains a tiny run, writes a trace, or writes a page. At the chosen event (a file of
the folder opened for writing, renamed or removed) it ends by ``SIGKILL``; every second time the
newest half-written file is cut in half first. A power cut also drops what was not synced: bytes
after the last ``fsync`` of their file, and renames whose folder was not synced since. Another child
starts again and must end with the same losses, metrics, weights, trace and page data, to the bit,
and with the same files: nothing may be left behind. Exit code 1 if one differs.
"""

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moe_lab.runs.layout import TABLE_NAMES

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS"), "1")

TIMED = ("seconds", "tokens_per_second", "updated_at")
"""Measured, so different each time."""
WORDS = ("one", "two", "three", "four", "five", "six", "seven")
KILLS = {"checkpoint": 12, "metrics": 8, "trace finish": 10, "page": 10}
CUTS = {"checkpoint": 6, "metrics": 5, "trace finish": 5, "page": 4}


# ------------------------------------------------------------------------------------------------
# what is written


def config(place: Path) -> Any:
    """A run of 12 steps, a checkpoint every 3, a validation every 5, on a corpus in ``place``."""
    from moe_lab.model import DecoderConfig, MoEConfig
    from moe_lab.routing import RouterConfig
    from moe_lab.text import TextConfig
    from moe_lab.training import OptimizerConfig, RunConfig

    corpus = place / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        for number in range(12):
            text = " ".join(WORDS[(number * k) % 7] for k in range(1, 90))
            (corpus / f"{number:02}.txt").write_text(f"{number} {text}")
    router = RouterConfig("longcat", num_experts=4, num_zero_experts=2, top_k=2)
    return RunConfig(
        model=DecoderConfig(
            vocab_size=257, num_layers=1, d_model=16, num_heads=2, context_length=32,
            moe=MoEConfig(16, 8, router), num_dense_layers=0,
        ),
        text=TextConfig(corpus=str(corpus), tokenizer="byte"),  # type: ignore[arg-type]
        batch_size=2, seq_length=32, train_tokens=64 * 12, checkpoint_every=3, log_every=1,
        validate_every=5, eval_tokens=None, eval_excerpt_tokens=80,
        optimizer=OptimizerConfig(lr=1e-2),
    )  # fmt: skip


def train(place: Path, folder: Path) -> None:
    from moe_lab.training import train

    train(config(place), folder / "run", cache_dir=place / "cache")


def trace(place: Path, folder: Path) -> None:
    import numpy as np
    import polars as pl

    from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter

    meta = TraceMeta(tuple(LayerMeta(layer, 4) for layer in (0, 1)), has_scores=False)
    meta = meta.replace(has_weights=False)
    with TraceWriter(folder / "trace", meta, rows_per_part=16) as writer:
        pos = np.arange(40, dtype=np.uint32)
        doc, ids = np.zeros_like(pos), (pos % 4).astype(np.uint16)[:, None]
        writer.write_tokens(pl.DataFrame({"doc": doc, "pos": pos, "token_id": pos % 7}))
        rows = {"doc": doc, "pos": pos, "experts": ids, "ffn_count": np.ones(40, np.uint8)}
        rows |= dict.fromkeys(("zero_count", "dropped"), np.zeros(40, np.uint8))
        for layer in (0, 1):
            writer.write_rows(layer, rows, np.bincount(ids[:, 0], minlength=4))


def page(place: Path, folder: Path) -> None:
    from moe_lab.report import write_report

    write_report(place / "whole train" / "run", folder / "page.html", command="moe-lab report")


WRITERS: dict[str, Callable[[Path, Path], None]] = {"train": train, "trace": trace, "page": page}
PLACES = {
    "checkpoint": ("train", ("checkpoint.safetensors",)),
    "metrics": (
        "train",
        (
            *(f"{name}.{ending}" for name in TABLE_NAMES for ending in ("jsonl", "parquet")),
            *("result.json", "done"),
        ),
    ),
    "trace finish": ("trace", ("",)),
    "page": ("page", ("",)),
}
"""Place -> what writes there, and the ends of the names that count."""


# ------------------------------------------------------------------------------------------------
# events, kills and cuts, in the child


class Disk:
    """Sees what is written below ``folder`` and ends the process at the chosen event.

    Attributes:
        names: of the files of the events so far, temporary prefixes taken off.
    """

    def __init__(self, folder: Path, place: str, at: int | None, cut: bool) -> None:
        self.folder, self.ends, self.at, self.cut = folder, PLACES[place][1], at, cut
        self.names: list[str] = []
        self.synced = {status.st_ino: status.st_size for _, status in self._files()}
        self.renamed: list[tuple[Path, Path | None]] = []
        self.shadows = Path(tempfile.mkdtemp(dir=folder.parent))
        self.lock = threading.RLock()
        self.inside = False

    def watch(self) -> None:
        """Look at every event of this process from now on."""
        self._replace, self._fsync = os.replace, os.fsync
        os.replace, os.fsync = self.replace, self.fsync  # type: ignore[assignment]
        sys.addaudithook(self.event)

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and isinstance(arguments[0], str) and self._writes(*arguments[1:]):
            self.happens(arguments[0])
        elif name in ("os.rename", "os.remove", "os.mkdir"):
            self.happens(os.fsdecode(arguments[1 if name == "os.rename" else 0]))

    @staticmethod
    def _writes(mode: str | None, flags: int) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR)) or bool(mode and set(mode) & set("wax+"))

    def happens(self, path: str) -> None:
        with self.lock:
            if self.inside or not path.startswith(f"{self.folder}/"):
                return
            name = Path(path).name
            name = name.split("-", 2)[-1] if name.startswith(".tmp-") else name
            if not name.endswith(self.ends):
                return
            self.names.append(name)
            if self.at is not None and len(self.names) > self.at:
                self.inside = True
                self._lose() if self.cut else self._halve()
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    def replace(self, source: Any, target: Any) -> None:
        with self.lock:
            kept = None
            if Path(target).exists():
                kept = self.shadows / uuid.uuid4().hex
                os.link(target, kept)
            self._replace(source, target)
            self.renamed.append((Path(target), kept))

    def fsync(self, descriptor: int) -> None:
        with self.lock:
            self._fsync(descriptor)
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                folder = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                self.renamed = [entry for entry in self.renamed if entry[0].parent != folder]
            else:
                self.synced[status.st_ino] = status.st_size

    def _halve(self) -> None:
        """Every second time: the newest temporary file as a kill within its writing leaves it."""
        half = [(status.st_mtime_ns, path) for path, status in self._files() if ".tmp" in path.name]
        if half and len(self.names) % 2:
            newest = max(half)[1]
            os.truncate(newest, newest.stat().st_size // 2)

    def _lose(self) -> None:
        """What a power cut may take."""
        for path, status in self._files():
            if status.st_size > (known := self.synced.get(status.st_ino, 0)):
                os.truncate(path, known)
        for target, kept in reversed(self.renamed):
            self._replace(kept, target) if kept else target.unlink(missing_ok=True)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        return [(path, path.stat()) for path in self.folder.rglob("*") if path.is_file()]


def in_child(task: Callable[[], Any]) -> Any:
    """What ``task`` returns in a forked child; None where that was killed."""
    receiving, sending = os.pipe()
    if (child := os.fork()) == 0:
        os.close(receiving)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives us
        try:
            text = json.dumps({"result": task()})
        except BaseException:
            text = json.dumps({"error": traceback.format_exc()[-1500:]})
        os.write(sending, text.encode())
        os._exit(0)
    os.close(sending)
    with open(receiving, "rb") as answers:
        text = answers.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def write(place: Path, folder: Path, where: str, at: int | None, cut: bool) -> list[str]:
    """Write ``folder``, ending at an event; the names of all events where it is not ended."""
    folder.mkdir(parents=True, exist_ok=True)
    disk = Disk(folder, where, at, cut)
    disk.watch()
    WRITERS[PLACES[where][0]](place, folder)
    shutil.rmtree(disk.shadows)
    return disk.names


# ------------------------------------------------------------------------------------------------
# comparison


def outcome(folder: Path) -> dict[str, str]:
    """Relative path of each file -> a digest of what must be equal in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> bytes:
    if path.parent.name == "manifest":
        return b""  # of digests
    if path.suffix == ".parquet":
        import polars as pl

        frame = pl.read_parquet(path, hive_partitioning=False)
        return frame.drop(*TIMED, "folder", strict=False).write_json().encode()
    if path.name in ("result.json", "status.json", "metrics.jsonl"):
        text = path.read_text()
        rows = [json.loads(text)] if path.suffix == ".json" else map(json.loads, text.splitlines())
        kept = [{name: row[name] for name in sorted(row) if name not in TIMED} for row in rows]
        return json.dumps(kept).encode()
    if path.name in ("done", "meta.json", "seal.json") or path.suffix == ".html":
        return b""  # of digests, times and folder names
    return path.read_bytes()


def check(place: Path, number: int, where: str, at: int, cut: bool) -> str:
    """Kill or cut once, start again, compare; what is wrong, "" if nothing."""
    folder = place / f"{number}"
    kind = PLACES[where][0]
    while (killed := in_child(partial(write, place, folder, where, at, cut))) is not None:
        if not at or "error" in killed:
            return f"not ended at event {at}: {killed}"
        shutil.rmtree(folder)  # a slower process logs more often, so this one had fewer events
        at -= 1
    for leftover in place.glob("tmp*"):
        shutil.rmtree(leftover)
    again = in_child(lambda: write(place, folder, where, None, False))
    if again is None or "error" in again:
        return "the next start failed: " + (again or {"error": "killed"})["error"]
    differing = in_child(lambda: _differences(place / f"whole {kind}", folder))
    shutil.rmtree(folder)
    return ", ".join(differing["result"]) if "result" in differing else differing["error"]


def _differences(whole: Path, folder: Path) -> list[str]:
    first, second = outcome(whole), outcome(folder)
    return [
        f"{name}: {'left behind' if name not in first else 'differs' if name in second else 'lost'}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def spread(total: int, count: int) -> list[int]:
    """``count`` places among ``total`` events, evenly, the first and the last among them."""
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def kills(place: Path, wanted: dict[str, dict[str, int]]) -> tuple[Counter[tuple[str, str]], int]:
    """Do ``wanted`` ("kill" or "power cut" -> place -> how many); returns how many of each (place,
    way) were done, and how many failed.
    """
    done: Counter[tuple[str, str]] = Counter()
    failures = number = 0
    for where in PLACES:
        kind = PLACES[where][0]
        whole = in_child(lambda w=where, k=kind: write(place, place / f"whole {k}", w, None, False))
        if whole is None or "error" in whole:
            raise SystemExit(f"{where}: the undisturbed process failed: {whole}")
        fresh = place / "counted"
        events = in_child(lambda w=where, f=fresh: write(place, f, w, None, False))["result"]
        shutil.rmtree(fresh)
        for way, counts in wanted.items():
            for at in spread(len(events), counts.get(where, 0)):
                number += 1
                wrong = check(place, number, where, at, cut=way == "power cut")
                done[where, way] += 1
                if wrong:
                    failures += 1
                    print(f"{way} at event {at} of {where} ({events[at]}): {wrong}", flush=True)
    return done, failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--few", action="store_true", help="4 kills and 2 cuts")
    args = parser.parse_args()
    wanted = {"kill": KILLS, "power cut": CUTS}
    if args.few:
        wanted = {
            "kill": dict.fromkeys(KILLS, 1),
            "power cut": {"checkpoint": 1, "metrics": 1},
        }
    import polars  # noqa: F401  (imported once; children begin from here)
    import torch

    import moe_lab.report
    import moe_lab.training  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="moe_lab-kills-") as folder:
        os.environ["MOE_LAB_CACHE"] = f"{folder}/cache"
        done, failures = kills(Path(folder), wanted)
    print("| place | kills | power cuts |\n|---|---|---|")
    for where in PLACES:
        print(f"| {where} | {done[where, 'kill']} | {done[where, 'power cut']} |")
    print(f"\n{done.total()} in all, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
