"""Many light processes that take up, write and finish the runs of one store, each as a worker does,
and each with a plan of its own.
"""

import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

from stub_trainer import StubRun, stub_sweep

from moe_lab.files import write_json, write_text
from moe_lab.sweeps import Job, Result, RunStore
from moe_lab.sweeps.launchers.worker import execute

UPDATES = 5


def train(values: dict[str, Any], folder: Path) -> None:
    with open(folder / "starts", "a") as starts:
        starts.write("started\n")
    for step in range(UPDATES):
        write_json(
            folder / "status.json",
            {"step": step + 1, "steps": UPDATES, "loss": float(values["seed"])},
        )
    write_json(folder / "result.json", {"loss": float(values["seed"])})
    write_text(folder / "done", "")


def shared_runs(number: int) -> list[StubRun]:
    return [StubRun(name=f"shared {seed}", seed=seed) for seed in range(number)]


def write(out: Path, writer: int, number: int) -> None:
    """Go through all runs in an order of one's own, until every one is done by someone."""
    store = RunStore(out)
    own = StubRun(name=f"own {writer}", seed=10_000 + writer)
    store.add(stub_sweep(own, name=f"own-{writer}"))
    store.add(stub_sweep(*shared_runs(number), name="shared"))
    left = [own, *shared_runs(number)]
    random.Random(writer).shuffle(left)
    while left:
        busy = []
        for one in left:
            ending = execute(
                train, Job(one.hash(), one.name, store.path(one.hash()), one.to_dict())
            )
            assert ending.result in (Result.FINISHED, Result.BUSY), ending
            if ending.result is Result.BUSY:
                busy.append(one)
        left = busy
        time.sleep(0.01)


def compete(out: Path, writers: int, number: int) -> float:
    """Seconds that so many writers take for so many shared runs."""
    context = multiprocessing.get_context("fork")
    began = time.monotonic()
    processes = [
        context.Process(target=write, args=(out, writer, number)) for writer in range(writers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = {process.exitcode for process in processes}
    assert codes == {0}, codes
    return time.monotonic() - began


def lost(out: Path, writers: int, number: int) -> list[str]:
    """What is not as it must be: runs or plans that are missing, runs that two trained, files that
    are torn or left over.
    """
    plan = RunStore(out).plan()
    problems = [] if len(plan["sweeps"]) == writers + 1 else [f"{len(plan['sweeps'])} plans"]
    for one in [
        *shared_runs(number),
        *(StubRun(name=f"own {writer}", seed=10_000 + writer) for writer in range(writers)),
    ]:
        folder = out / one.hash()
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if one.hash() not in plan["runs"]:
            problems.append(f"{one.name} is not planned")
        if names != {"starts", "status.json", "result.json", "done", "log.txt"}:
            problems.append(f"{one.name} has {sorted(names)}")
        elif json.loads((folder / "result.json").read_text()) != {"loss": float(one.seed)}:
            problems.append(f"{one.name} has another result")
        elif (folder / "starts").read_text() != "started\n":
            problems.append(f"{one.name} was trained twice")
    return problems
