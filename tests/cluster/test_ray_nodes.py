"""A real Ray cluster of three nodes on this machine, each with its own processes, under ``kill
-9``.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
from grid_process import Driver, family, hold, parents, trainers
from refusals import refused
from tiny_grid import results

from moe_lab import analysis
from moe_lab.analysis.map_reduce import Sum, appended, mapped, reduced
from moe_lab.errors import AnalysisError
from moe_lab.sweeps import run
from moe_lab.sweeps.launchers.ray_tasks import RayTasks
from moe_lab.trace import LayerMeta, Trace, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.rows import slot_rows

pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}


class Nodes:
    """Three nodes of two CPUs; the first is the head.

    Nodes are killed with everything they started, as by pulling a plug.
    """

    def __init__(self) -> None:
        self.cluster: Any = None

    def begin(self, port: int = 0, others: int = 2, **resources: int) -> str:
        """The address. Once more where the machine was too busy: Ray gives a node 30 seconds to
        come up.
        """
        before = family({os.getpid()})
        for last in (False, False, True):
            try:
                return self._begin(port, others, **resources)
            except Exception:
                for pid in family({os.getpid()}) - before:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self.cluster = None
                if last:
                    raise
        raise AssertionError

    def _begin(self, port: int, others: int, **resources: int) -> str:
        from ray.cluster_utils import Cluster

        fixed = {"gcs_server_port": port} if port else {}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={**NODE, "include_dashboard": False, **fixed, **resources},
        )
        for _ in range(others):
            self.cluster.add_node(**NODE)
        return self.cluster.address

    @staticmethod
    def processes(node: Any) -> set[int]:
        return family({info.process.pid for infos in node.all_processes.values() for info in infos})

    def kill(self, node: Any) -> set[int]:
        """The processes that were killed."""
        everyone = self.processes(node)
        for pid in everyone:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return everyone

    def end(self) -> None:
        if self.cluster is None:
            return
        for node in [self.cluster.head_node, *self.cluster.worker_nodes]:
            if node is not None:
                self.kill(node)
        self.cluster.shutdown()
        self.cluster = None


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv(
        "RAY_enable_worker_prestart", "0"
    )  # idle workers import ray, on cores that the runs need
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    nodes = Nodes()
    yield nodes
    nodes.end()


Start = Callable[..., Driver]
Results = dict[str, dict[str, Any]]


def test_a_node_killed_in_the_middle_costs_nothing_but_time(
    nodes: Nodes, start: Start, local_results: Results, tmp_path: Path
) -> None:
    driver = start(hold(tmp_path / "out"), "ray", f"address={nodes.begin()}")

    def training() -> list[Any]:
        return [
            node
            for node in nodes.cluster.worker_nodes
            if nodes.processes(node) & set(driver.held())
        ]

    nodes.kill(driver.wait_for("a node with a run on its way", training)[0])
    driver.release()
    assert driver.end() == 0
    assert "outcome 4 0 0" in driver.said()
    assert "resuming from its checkpoint" in driver.said()
    assert results(driver.out) == local_results


def test_a_killed_driver_leaves_nothing_and_a_killed_head_one_line(
    nodes: Nodes, start: Start, local_results: Results, tmp_path: Path
) -> None:
    address = nodes.begin(others=1)
    command = (hold(tmp_path / "out"), "ray", f"address={address}", "seeds=1")
    driver = start(*command)
    driver.wait_for("a run on its way", driver.held)
    driver.kill()
    driver.wait_for("the end of the runs' processes", lambda: not trainers(driver.out))

    driver = start(*command)
    driver.wait_for("a run on its way", driver.held)
    nodes.kill(nodes.cluster.head_node)
    assert driver.end() == 2
    (ours,) = re.findall("^moe-lab: .*$", driver.said(), flags=re.M)  # Ray prints its own log too
    assert ours.startswith(
        f"moe-lab: lost the Ray cluster (no answer from its head at {address} for "
    )
    assert ours.endswith("s); run the same command again to continue")

    nodes.end()
    driver.release()
    assert nodes.begin(port=int(address.rpartition(":")[2]), others=1) == address
    driver = start(*command)
    assert driver.end() == 0
    found = results(driver.out)
    assert found == {run: local_results[run] for run in found}
    assert len(found) == 2


def test_four_runs_share_one_gpu_by_fraction(
    nodes: Nodes, stubs: ModuleType, tmp_path: Path
) -> None:
    """Ray counts a GPU that nobody looks at: the stub trainer needs none."""
    runs = [stubs.StubRun(name=f"run {seed}", seed=seed, device="cuda") for seed in range(4)]
    options = {"address": nodes.begin(others=0, num_cpus=4, num_gpus=1), "gpus": "0.25"}
    (tmp_path / stubs.HOLD).touch()
    most = 0

    def watch() -> None:
        nonlocal most
        deadline = time.monotonic() + 600
        while most < 4 and time.monotonic() < deadline:
            most = max(most, len(trainers(tmp_path)))
            time.sleep(0.1)
        (tmp_path / stubs.HOLD).unlink()

    watcher = threading.Thread(target=watch)
    watcher.start()
    outcome = run(
        stubs.stub_sweep(*runs),
        tmp_path,
        progress=False,
        trainer=stubs.STUB,
        launcher="ray",
        launcher_options=options,
    )
    watcher.join()
    assert outcome.complete
    assert most == 4

    with pytest.warns(
        UserWarning,
        match=r"expected a Ray node with CPU 1, GPU 2 for a run on cuda, got CPU 4, GPU "
        r"1; try .* grows",
    ):
        run(
            stubs.stub_sweep(stubs.StubRun(device="cuda")),
            tmp_path / "large",
            progress=False,
            trainer=stubs.STUB,
            launcher="ray",
            launcher_options=options | {"gpus": "2"},
            max_hours=0,
        )


@pytest.fixture
def small_trace(tmp_path: Path) -> Trace:
    """600 tokens of 12 documents, in files of 100 rows."""
    layer = LayerMeta(0, 8, 0, 2)
    meta = TraceMeta(layers=(layer,), has_weights=False, has_scores=False)
    doc, pos = (np.arange(600, dtype=np.uint32) // 50, np.arange(600, dtype=np.uint32) % 50)
    ids = np.random.default_rng(0).permuted([range(8)] * 600, axis=1)[:, :2]
    with TraceWriter(tmp_path / "trace", meta, rows_per_part=100) as writer:
        writer.write_tokens(pl.DataFrame({"doc": doc, "pos": pos, "token_id": pos % 7}))
        rows = slot_rows(layer, doc, pos, ids, None, None, None)
        writer.write_rows(0, rows, np.bincount(ids.ravel(), minlength=8))
    return open_trace(tmp_path / "trace")


def test_an_analysis_on_two_nodes_equals_the_one_here_through_a_kill_of_a_worker(
    nodes: Nodes, small_trace: Trace, tmp_path: Path
) -> None:
    trace, killed = small_trace, tmp_path / "killed"
    whole = analysis.coactivation(trace), analysis.vocabulary_specialisation(trace)

    def once(part: Trace) -> pl.DataFrame:  # a function of a function travels by value
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pl.concat(part.batches(None, ["doc"])).unique()

    tasks = RayTasks(options={"address": nodes.begin(others=1)})
    with mapped(tasks, cache=tmp_path / "kept", rows=1):
        assert analysis.coactivation(trace).equals(whole[0])
        assert analysis.vocabulary_specialisation(trace).equals(whole[1])
        with pytest.warns(UserWarning, match="a Ray worker died"):
            (frames,) = reduced([Sum(once, (trace,), (None,), appended)])
        with refused("column", AnalysisError):
            analysis.class_profile(trace, "absent")
    assert pl.concat(frames)["doc"].n_unique() == 12


def test_an_analysis_continues_after_a_kill_of_its_driver_and_goes_on_after_one_of_a_node(
    nodes: Nodes, small_trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six parts, four at a time, of which the first three do not wait."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "analysis"))
    import held_analysis  # type: ignore[import-not-found]

    (tmp_path / "hold").touch()
    script, trace = str(held_analysis.__file__), str(small_trace.folder)
    command = [sys.executable, script, trace, str(tmp_path), nodes.begin(others=1)]

    def begin() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 600
        while not (found := condition()):
            assert time.monotonic() < deadline
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.1)
        return found

    def waiting() -> set[int]:
        begun = {pids[-1] for part, pids in held_analysis.marks(tmp_path).items() if part >= 3}
        return begun & set(parents()) if len(begun) == 3 else set()

    driver = begin()
    try:
        wait_for(lambda: held_analysis.kept(tmp_path) == 3 and waiting())
        first = waiting()
        driver.kill()
        driver.communicate()
        driver = begin()
        second = wait_for(lambda: len(found := waiting() - first) == 3 and found)
        (node,) = nodes.cluster.worker_nodes
        lost = second & nodes.processes(node)
        assert 0 < len(lost) < 3
        nodes.kill(node)
        (tmp_path / "hold").unlink()
        out, said = driver.communicate(timeout=600)
    finally:
        driver.kill()
    assert sorted(set(json.loads(out.splitlines()[-1]))) == list(range(12)), said
    assert said.count("a Ray worker died") == len(lost)
    calls = [len(pids) for _, pids in sorted(held_analysis.marks(tmp_path).items())]
    assert calls[:3] == [1, 1, 1], "finished parts are not read again"
    assert sum(calls[3:]) == 6 + len(lost)


def test_a_cluster_of_another_version_is_refused_in_one_line(
    nodes: Nodes, start: Start, tmp_path: Path
) -> None:
    from ray._raylet import GcsClient

    address = nodes.begin(others=0)
    store = GcsClient(address=address)
    said = json.loads(store.internal_kv_get(b"CLUSTER_METADATA", b"cluster"))
    store.internal_kv_put(
        b"CLUSTER_METADATA", json.dumps(said | {"ray_version": "2.0.1"}).encode(), True, b"cluster"
    )
    driver = start(tmp_path / "out", "ray", f"address={address}")
    assert driver.end() == 2
    last = driver.said().strip().splitlines()[-1]
    assert f"expected a Ray cluster at {address}, got" in last
    assert "Ray: 2.0.1" in last
    assert "try one shared environment" in last
