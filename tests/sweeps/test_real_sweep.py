"""Real training under ``kill -9``: the numbers of undisturbed runs, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from real_sweep import real_sweep
from safetensors.torch import load_file

from moe_lab.runs.folder_claims import holder
from moe_lab.runs.owners import process_start
from moe_lab.sweeps import run, status
from moe_lab.training import train

VOLATILE = ("seconds", "tokens_per_second")
STEPS = 240
"""Of both runs."""


def result(folder: Path) -> dict:
    return {
        key: value
        for key, value in json.loads((folder / "result.json").read_text()).items()
        if key not in VOLATILE
    }


def wait_for_steps(out: Path, number: int) -> None:
    """Until the runs are ``number`` steps further than now, or at their end."""
    deadline = time.monotonic() + 600
    wanted = min(STEPS, number + (steps(out) if (out / "sweep.json").exists() else 0))
    while not (out / "sweep.json").exists() or steps(out) < wanted:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def steps(out: Path) -> int:
    return sum(status(out)["step"])


def kill_a_worker(out: Path, after_steps: int) -> None:
    wait_for_steps(out, after_steps)
    for path in out.glob("*/.claim-*"):
        with suppress(FileNotFoundError):
            pid = json.loads(path.read_text() or '{"pid": 0}')["pid"]
            if pid and process_start(pid) is not None:  # not of the sweep that was killed
                os.kill(pid, signal.SIGKILL)
                return


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    for index in range(40):
        (corpus / f"{index}.txt").write_text(
            "".join(f"{index} times {n} is {index * n}.\n" for n in range(40))
        )
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    sweep, chance = real_sweep(corpus), random.Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    calm = {config.hash(): train(config, tmp_path / config.name).folder for config in sweep.runs}
    torch.set_num_threads(threads)

    whole = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "real_sweep.py"), str(corpus), str(out)],
        start_new_session=True,
    )
    wait_for_steps(out, chance.randint(10, 60))
    os.killpg(whole.pid, signal.SIGKILL)
    whole.wait()

    killer = threading.Thread(target=kill_a_worker, args=(out, chance.randint(10, 60)))
    killer.start()
    outcome = run(sweep, out, workers=2, progress=False)
    killer.join()
    assert outcome.complete

    for run_hash, folder in calm.items():
        assert result(out / run_hash) == result(folder)
        ours, theirs = (
            load_file(place / "model.safetensors") for place in (out / run_hash, folder)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
        assert holder(out / run_hash) is None
