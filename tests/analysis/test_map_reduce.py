"""Analyses by several workers: the same frames to the bit, through kills and interruptions."""

import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import held_analysis
import numpy as np
import polars as pl
import pytest
from polars import selectors
from refusals import refused

from moe_lab import analysis, serving, worth
from moe_lab.analysis import map_reduce
from moe_lab.analysis.map_reduce import Sum, Task, appended, mapped, reduced
from moe_lab.errors import AnalysisError, MoELabError, RunError, StorageError, TraceError
from moe_lab.trace import open_trace
from moe_lab.trace.data_files import FolderFiles
from moe_lab.trace.manifest import Manifest

ANALYSES: dict[str, Callable[[Any, Any], pl.DataFrame]] = {
    "load": lambda a, _: analysis.expert_load(a),
    "load_by_class": lambda a, _: analysis.expert_load(a, by="kind"),
    "load_by_next_id": lambda a, _: analysis.load_summary(a, by="true_id"),
    "load_interval": lambda a, _: analysis.load_interval(a),
    "windows": lambda a, _: analysis.load_over_windows(a, 50),
    "coactivation": lambda a, _: analysis.coactivation(a),
    "transitions": lambda a, _: analysis.transitions(a),
    "domains": lambda a, _: analysis.domain_specialisation(a, "kind"),
    "divergence": lambda a, _: analysis.domain_divergence(a, "kind"),
    "vocabulary": lambda a, _: analysis.vocabulary_specialisation(a),
    "entropy": lambda a, _: analysis.router_entropy(a),
    "zero_compute": lambda a, _: analysis.zero_compute(a),
    "ffn_spread": lambda a, _: analysis.ffn_spread(a),
    "token_loss": lambda a, _: analysis.token_loss(a),
    "repetition": lambda a, _: analysis.repetition(a),
    "class_profile": lambda a, _: analysis.class_profile(a, "kind"),
    "class_entropy": lambda a, _: analysis.class_profile(a, "kind", "entropy"),
    "expert_vocabulary": lambda a, _: analysis.expert_vocabulary(a),
    "saturation": lambda a, b: analysis.saturation({"early": b}, a),
    "compare": lambda a, b: analysis.compare(a, b),
    "load_shift": lambda a, b: analysis.load_shift(a, b),
    "cache": lambda a, _: serving.expert_cache(a, [3, 8], expert_bytes=1, per_document=True),
    "calibration": lambda a, _: serving.calibration_tokens(a, 5),
    "coverage": lambda a, _: serving.coverage(a, [0.5, 0.9]),
    "gate_mass": lambda a, _: serving.coverage(a, [0.5, 0.9], of="gate_mass"),
    "gate_mass_by_class": lambda a, _: serving.coverage(a, [0.9], of="gate_mass", by="kind"),
    "distinct": lambda a, _: serving.distinct_experts(a, [3, 5], [2, 7], resamples=20),
    "speculation": lambda a, _: serving.speculation(a, [4], expert_bytes=1, resamples=20),
    "nodes": lambda a, _: serving.nodes_touched(a, serving.place(a.counts(), 2, nodes=2)),
    "transfer": lambda a, _: serving.placement_transfer(a, 2, resamples=20),
    "tokens_needed": lambda a, _: serving.tokens_needed(a, 2, repeats=3),
    "prefetch": lambda a, _: serving.prefetch(a, max_tokens=600, resamples=20),
}
WHOLE = ("load", "windows", "repetition", "load_by_next_id", "prefetch")
"""Analyses that read the manifest alone, or join files."""


@pytest.fixture
def make_traces(make_trace, draw) -> Callable[..., tuple[Any, Any]]:
    """Two traces of the same tokens (700 in 20 documents, which files cut), ``rows`` in each file
    of one and of the other; ``real`` and ``zero`` experts of each layer.
    """

    def make(rows=(64, 100), tokens=700, real=6, zero=2, top_k=3, **columns) -> tuple[Any, Any]:
        generator = np.random.default_rng(0)
        columns = {
            "doc": np.arange(tokens) // 35,
            "pos": np.arange(tokens) % 35,
            "token_id": generator.integers(0, 30, tokens),
            "kind": generator.choice(["name", "space", "word"], tokens),
            "loss": generator.random(tokens),
        } | columns
        shares = [5, 1, 1, 1, 2, 1, 3, 1][: real + zero]
        slots = [
            {
                2: draw(seed, tokens, real + zero, top_k, shares),
                5: draw(seed + 1, tokens, real + zero, top_k),
            }
            for seed in (1, 3)
        ]
        return tuple(
            make_trace(
                ids,
                real,
                zero,
                rows_per_part=number,
                weights=generator.random((tokens, top_k)),
                scores=generator.random((tokens, real + zero)),
                **columns,
            )
            for ids, number in zip(slots, rows, strict=True)
        )

    return make


@pytest.fixture
def traces(make_traces) -> tuple[Any, Any]:
    """Files of 64 and of 100 rows."""
    return make_traces()


class Here:
    """Workers that compute in this process what another one would."""

    ahead = 3

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def submit(self, task: Task) -> Task:
        self.tasks.append(task)
        return pickle.loads(pickle.dumps(task))

    def result(self, submitted: Task) -> pl.DataFrame:
        return submitted()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("rows", "names"),
    [(1, ANALYSES), (257, ("class_entropy", "saturation", "transitions", "gate_mass", "distinct"))],
)
def test_frames_do_not_depend_on_the_groups_of_files(traces, tmp_path, rows, names):
    for name in names:
        whole, workers = ANALYSES[name](*traces), Here()
        with mapped(workers, cache=tmp_path / "kept", rows=rows):
            assert ANALYSES[name](*traces).equals(whole), name
        if name not in WHOLE:
            assert len(workers.tasks) >= {1: 11, 257: 2}[rows], name
    assert not list((tmp_path / "kept").iterdir()), "partial frames are removed at the end"


def test_each_analysis_of_a_trace_is_listed_as_read_by_workers_or_with_a_reason():
    """The tables of docs/analysis.md; those of the first one are compared above."""
    page = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    section = page.partition("## Several processes")[2].partition("\n## ")[0]
    tables = [
        {
            name
            for line in block.splitlines()[2:]
            for name in re.findall(r"`(\w+)[`(]", line.split("|")[1])
        }
        for block in re.split(r"\n\n", section)
        if block.startswith("|")
    ]
    assert len(tables) == 2
    known = {
        function.__name__
        for package in (analysis, serving, worth)
        for function in (getattr(package, name) for name in package.__all__)
        if inspect.isfunction(function) and re.search(r"\bTrace\b", str(signature(function)))
    }
    by_workers, alone = tables
    assert by_workers | alone == known | {"difficulty_association"}
    assert by_workers & alone == {"expert_cache"}, "of which one kind is, and the other is not"
    compared = {name for one in ANALYSES.values() for name in one.__code__.co_names}
    assert by_workers <= compared


@pytest.mark.parametrize(("workers", "rows"), [(1, (64, 100)), (3, (200, 250)), (5, (1000, 1000))])
def test_frames_do_not_depend_on_the_number_of_processes(
    make_traces, tmp_path, workers, rows, capfd
):
    """Fewer workers than files, and more than the one file of each table."""
    traces, names = make_traces(rows), ANALYSES
    if workers == 1:
        names = "class_entropy", "saturation", "vocabulary"
    whole = {name: ANALYSES[name](*traces) for name in names}
    with mapped(workers, cache=tmp_path, rows=1):
        for name in names:
            assert ANALYSES[name](*traces).equals(whole[name]), name
    assert capfd.readouterr() == ("", "")


ODD: dict[str, dict[str, Any]] = {
    "no rows": {"tokens": 0},
    "no class": {"kind": pl.Series([None] * 70, dtype=pl.String)},
    "one expert, large numbers, documents in turns": {
        "real": 1,
        "zero": 0,
        "top_k": 1,
        "doc": 2**32 - 7 + np.arange(70) % 7,
        "pos": np.arange(70) // 7,
        "token_id": np.arange(70) * 60_000_000,
    },
    "one document": {"doc": np.zeros(70, int), "pos": np.arange(70)},
    "documents of one token, a class without a value": {
        "doc": np.arange(70),
        "pos": np.ones(70, int),
        "kind": np.where(np.arange(70) % 5 == 0, np.nan, np.arange(70) % 3),
    },
}


def answer(name: str, traces: tuple[Any, Any]) -> Any:
    """The frame with its types, or the sentence of the refusal."""
    try:
        frame = ANALYSES[name](*traces)
    except MoELabError as error:
        return str(error)
    return frame.schema, frame.write_ipc(None).getvalue()


@pytest.mark.parametrize("world", ODD)
def test_odd_traces_have_one_answer(make_traces, tmp_path, world):
    traces = make_traces(**{"rows": (30, 40), "tokens": 70} | ODD[world])
    for name in ANALYSES:
        whole = answer(name, traces)
        with mapped(Here(), cache=tmp_path / "kept", rows=1):
            assert answer(name, traces) == whole, name
        if not isinstance(whole, str):
            numbers = pl.read_ipc(whole[1]).select(selectors.float())
            assert not numbers.select(pl.all().is_infinite() | pl.all().is_nan()).to_numpy().any()


@pytest.mark.parametrize("rows", [60_000_000, 200_000_000])
def test_the_committed_measurement_has_equal_frames_in_less_than_a_gigabyte(rows):
    """One process, one and two workers, and two nodes of Ray; two cost at most 15 % more work."""
    folder = Path(__file__).parents[2] / "experiments" / "benchmarks" / "results"
    measured = pl.read_parquet(folder / f"trace_workers_{rows}.parquet")
    for name, table in measured.group_by("analysis"):
        modes = {row["mode"]: row for row in table.rows(named=True)}
        assert set(modes) == {"here", "one", "two", "ray"}
        assert table["digest"].n_unique() == 1, name
        assert table.select(pl.max_horizontal("driver_gb", "worker_gb").max()).item() < 1
        work = {
            mode: row["driver_processor"] + row["worker_processor"] for mode, row in modes.items()
        }
        assert work["one"] / work["two"] >= 0.85


def test_files_of_other_rows_are_read_whole(make_trace, draw, tmp_path):
    """The tokens stand in another order than the routing, so that files hold other keys."""
    order = np.random.default_rng(1).permutation(300)
    ids = draw(0, 300, 4, 2)
    kind = np.where(ids[:, 0] == 0, "zero", "other")
    columns = {"doc": np.zeros(300, int), "kind": kind, "pos": np.arange(300)}
    trace = make_trace({0: ids, 1: ids[::-1].copy()}, 4, rows_per_part=50, **columns)
    profile = analysis.class_profile(trace, "kind")
    tokens = pl.concat([pl.read_parquet(path) for path in trace_files(trace)])[order]
    for number, path in enumerate(trace_files(trace)):
        tokens[50 * number : 50 * number + 50].write_parquet(path)
    trace = replace(trace, storage=FolderFiles(trace.folder, verify=False))
    whole, workers = analysis.expert_load(trace, by="kind"), Here()
    with mapped(workers, cache=tmp_path, rows=1):
        assert analysis.expert_load(trace, by="kind").equals(whole)
    assert analysis.class_profile(trace, "kind").equals(profile)
    with mapped(Here(), cache=tmp_path, rows=1):
        assert analysis.class_profile(trace, "kind").equals(profile)
    whole = whole.filter(layer=0)
    assert whole.filter(kind="zero", expert=0)["count"].item() == (kind == "zero").sum()
    assert [len(task.parts[0].manifest.entries) for task in workers.tasks][-1] == 12


def trace_files(trace) -> list[Path]:
    return sorted((trace.folder / "tokens").glob("*.parquet"))


def test_counts_that_no_manifest_lists_are_those_of_the_rows(traces, tmp_path):
    trace, workers = traces[0], Here()
    older = replace(trace, manifest=Manifest(trace.manifest.entries.with_columns(slots=pl.lit(0))))
    with mapped(workers, cache=tmp_path, rows=1):
        assert analysis.expert_load(older).equals(analysis.expert_load(trace))
    assert len(workers.tasks) == 22


def test_workers_compare_the_checksums_of_the_files_that_they_read(traces, tmp_path):
    trace = open_trace(traces[0].folder)
    path = Path(trace.folder) / "routing/layer=5/part-00007.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"layer=5/part-00007.*damaged"), mapped(2, cache=tmp_path):
        analysis.coactivation(trace)


def _documents(part, folder: str, trouble: str) -> pl.DataFrame:
    """The documents of a part; leaves a mark in ``folder`` for each call."""
    (name,) = part.manifest.names()
    marks = Path(folder) / Path(name).stem
    with marks.open("a") as file:
        file.write(f"{os.getpid()}\n")
    calls = len(marks.read_text().split())
    if name.endswith("2.parquet") and (trouble == "always" or (trouble == "once" and calls == 1)):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.endswith("2.parquet") and trouble == "error":
        raise TraceError("file 2 is damaged", "file")
    return pl.concat(part.batches(None, ["doc"])).unique().sort("doc")


def _calls(folder: Path) -> list[int]:
    return [len(path.read_text().split()) for path in sorted(folder.iterdir())]


@pytest.fixture
def marks(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def _sum(trace, marks: Path, trouble: str) -> Sum:
    from test_map_reduce import _documents as partial  # as the workers import it

    return Sum(partial, (trace,), (None,), appended, (str(marks), trouble))


def test_a_killed_worker_costs_one_line(traces, tmp_path, marks):
    with (
        mapped(2, cache=tmp_path / "kept", rows=1),
        pytest.warns(UserWarning, match="SIGKILL") as lines,
    ):
        (frames,) = reduced([_sum(traces[0], marks, "once")])
    assert sum("SIGKILL" in str(line.message) for line in lines) == 1
    assert pl.concat(frames)["doc"].unique().to_list() == list(range(20))
    assert _calls(marks) == [1, 1, 2, *[1] * 8]


@pytest.mark.filterwarnings("ignore:a worker process ended")
def test_a_task_that_kills_every_worker_is_an_error_and_the_rest_is_kept(traces, tmp_path, marks):
    with refused("workers", RunError), mapped(1, cache=tmp_path / "kept", rows=1):
        list(reduced([_sum(traces[0], marks, "always")]))
    assert _calls(marks)[:3] == [1, 1, 3]
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_the_same_command_continues_from_finished_parts(traces, tmp_path, marks):
    job = _sum(traces[0], marks, "error")
    with refused("file", TraceError), mapped(1, cache=tmp_path / "kept", rows=1):
        list(reduced([job]))
    before = _calls(marks)
    monkey = Sum(job.partial, job.traces, job.layers, job.fold, job.arguments)
    with refused("file", TraceError), mapped(1, cache=tmp_path / "kept", rows=1):
        list(reduced([monkey]))
    assert _calls(marks)[:2] == before[:2] == [1, 1]


def test_a_finished_part_that_is_damaged_or_removed_meanwhile_is_computed_again(traces, tmp_path):
    kept, whole = tmp_path / "kept", ANALYSES["load_by_class"](*traces)
    with suppress(KeyError), mapped(Here(), cache=kept, rows=1):
        ANALYSES["load_by_class"](*traces)
        raise KeyError
    first, second, *_ = sorted(kept.iterdir())
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(b"")
    workers = Here()
    with mapped(workers, cache=kept, rows=1):
        assert ANALYSES["load_by_class"](*traces).equals(whole)
    assert len(workers.tasks) == 2


def test_a_place_for_parts_that_is_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    message = "file: File exists; try another folder"
    with pytest.raises(StorageError, match=message), mapped(1, cache=tmp_path / "file"):
        pass


def test_another_trace_function_or_argument_has_other_parts(traces):
    def names(*sums: Sum) -> set[str]:
        return {task.name for one in sums for task in map_reduce._tasks(one, 100)}

    first = Sum(_documents, traces[:1], (None,), appended, ("a", ""))
    others = [
        Sum(_documents, traces[1:], (None,), appended, ("a", "")),
        Sum(_documents, traces[:1], (2,), appended, ("a", "")),
        Sum(_documents, traces[:1], (None,), appended, ("b", "")),
        Sum(_calls, traces[:1], (None,), appended, ("a", "")),  # type: ignore[arg-type]
    ]
    assert names(first) == names(first)
    assert all(names(first).isdisjoint(names(other)) for other in others)


def test_workers_end_with_the_process_that_started_them(traces, tmp_path):
    """``kill -9`` of the driver closes the input of its workers."""
    from moe_lab.worker_processes import WorkerProcesses

    workers = WorkerProcesses(1)
    workers.submit(list).result()
    (process,) = workers._all
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=600) == 0
    workers.close()


@pytest.mark.slow
def test_after_a_kill_of_the_driver_the_same_command_continues_from_finished_parts(
    traces, tmp_path
):
    (tmp_path / "hold").touch()
    words = [sys.executable, held_analysis.__file__, str(traces[0].folder), str(tmp_path)]
    driver = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 600
        while not (held_analysis.kept(tmp_path) == 3 and 4 in held_analysis.marks(tmp_path)):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.communicate()
    (tmp_path / "hold").unlink()
    again = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    assert sorted(set(json.loads(again.stdout))) == list(range(20))
    calls = [len(pids) for _, pids in sorted(held_analysis.marks(tmp_path).items())]
    assert calls == [1, 1, 1, 2, 2, *[1] * 6]


def test_what_an_analysis_raises_arrives_and_no_process_stays(traces, tmp_path):
    from moe_lab.worker_processes import WorkerProcesses

    workers = WorkerProcesses(2)
    with refused("column", AnalysisError), mapped(workers, cache=tmp_path):
        analysis.class_profile(traces[0], "absent")
    with refused("rows"), mapped(2, cache=tmp_path, rows=0):
        pass
    assert all(process.poll() is not None for process in workers._all)


@pytest.mark.parametrize(("size", "most"), [(0, 2), (map_reduce.MAX_CELLS, 1)])
def test_two_sums_are_computed_at_once_where_both_results_are_small(size, most):
    """``most`` at once: each waits until so many have begun."""
    running, seen, lock, begun = 0, [], threading.Lock(), threading.Barrier(most)

    def partial(number):
        nonlocal running
        with lock:
            running += 1
            seen.append(running)
        begun.wait(300)
        time.sleep(0.02)
        with lock:
            running -= 1
        return pl.DataFrame({"number": [1 // number]})

    def sums(numbers):
        for number in numbers:
            yield Sum(partial, (), (), appended, (number,), size=size)

    assert len(list(reduced(sums([1, 2, 3, 4])))) == 4
    assert max(seen) == most
    begun = threading.Barrier(1)
    with pytest.raises(ZeroDivisionError):
        list(reduced(sums([1, 0, 1])))


def test_two_workers_take_the_clock_time_of_half_the_work_of_one():
    """200M rows, medians of three. The work of one worker in processor seconds is what counts: on
    a machine that others use, one worker alone waits for the processor more than two do.
    """
    folder = Path(__file__).parents[2] / "experiments" / "benchmarks" / "results"
    measured = pl.read_parquet(folder / "trace_workers_clock.parquet")
    assert (measured["rows"] == 200_000_000).all()
    assert (measured.group_by("analysis").agg(pl.col("digest").n_unique())["digest"] == 1).all()
    work = pl.col("driver_processor") + pl.col("worker_processor")
    medians = measured.with_columns(work=work).group_by("analysis", "mode")
    medians = medians.agg(pl.len(), pl.col("seconds", "work").median())
    assert (medians["len"] == 3).all()
    one, two = (medians.filter(mode=mode).sort("analysis") for mode in ("one", "two"))
    assert one["analysis"].to_list() == two["analysis"].to_list() == ["class", "coactivation"]
    for needed in (one["work"], one["seconds"], two["work"]):
        assert (needed / (2 * two["seconds"]) >= 0.85).all()


def test_ray_workers_that_die_again_and_again_are_one_line() -> None:
    pytest.importorskip("ray", reason="needs ray (extra ray)")
    from moe_lab.sweeps.launchers.ray_tasks import RayTasks
    from moe_lab.worker_processes import MOST_DEATHS

    tasks, submitted = object.__new__(RayTasks), SimpleNamespace(deaths=MOST_DEATHS - 1)
    with pytest.raises(RunError, match=r"^expected Ray workers that .*, got X; try fewer workers$"):
        tasks._again(submitted, "X")  # type: ignore[arg-type]
