"""Two hosts with their own addresses, names and processes (``hosts.py``): Ray and SLURM over a
cable, hosts that vanish without a signal and come back.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import delayed_files
import pytest
from grid_process import Driver
from hosts import SECONDS, Host, HostError, two_hosts
from tiny_grid import HOLD, HOLD_IN, SILENCE, lasting, results

from moe_lab.sweeps import readable, status
from moe_lab.trace import open_trace

if TYPE_CHECKING:
    from s3_server import S3Server

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("slurm.sh")
Start = Callable[..., Driver]
Results = dict[str, dict[str, Any]]
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else a token of this user would be needed on either host
    "RAY_enable_worker_prestart": "0",  # idle workers import ray, on cores that the runs need
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host, str]]:
    try:
        with two_hosts() as made:
            yield made
    except HostError as error:
        pytest.skip(str(error))


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds every run in the middle of its training while ``HOLD`` lies there."""
    folder = tmp_path / "held"
    folder.mkdir()
    (folder / HOLD).touch()
    monkeypatch.setenv(HOLD_IN, str(folder))
    monkeypatch.setenv(SILENCE, "6")
    return folder


def held_on(folder: Path, host: Host) -> dict[str, str]:
    """Process by run of the runs that stand still on ``host``."""
    found = {}
    for path in folder.iterdir():
        with suppress(OSError):
            pid, _, name = path.read_text().partition(" ")
            if name == host.name:
                found[path.name] = pid
    return found


@pytest.fixture
def late(tmp_path: Path) -> dict[str, str]:
    """Environment of processes that see the files of another host in ``out`` two seconds late."""
    (tmp_path / "out").mkdir()
    try:
        os.setxattr(tmp_path / "out", "user.made", b"")
    except OSError as error:
        pytest.skip(f"needs extended attributes in {tmp_path}: {error.strerror}")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import delayed_files\n")
    path = [str(tmp_path / "site"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        delayed_files.SHARED: str(tmp_path / "out"),
        delayed_files.DELAY: "2",
    }


def test_two_drivers_on_two_hosts_share_the_work_of_a_folder_that_shows_files_late(
    hosts: tuple[Host, Host, str], late: dict[str, str], stubs: ModuleType, tmp_path: Path
) -> None:
    """Each sees the other's claims, checkpoints and ``done`` two seconds late."""
    script = Path(str(stubs.__file__))
    words = [sys.executable, str(script), str(tmp_path / "out"), "4", "30", "0.05", "1"]
    drivers = [
        subprocess.Popen(
            host.command(*words),
            env=os.environ | late,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in hosts[:2]
    ]
    said = [driver.communicate(timeout=SECONDS)[0] for driver in drivers]
    assert [text.split()[-4:] for text in said] == [["outcome", "4", "0", "0"]] * 2, said
    for one in stubs.stub_grid(4, 30, 0.05):
        folder = tmp_path / "out" / one.hash()
        steps = [int(line.split()[1]) for line in (folder / "steps.log").read_text().splitlines()]
        assert steps == list(range(one.steps)), "no step is trained twice"
        result = json.loads((folder / "result.json").read_text())
        assert result["loss"] == stubs.expected_loss(one)


def start_ray(host: Host, environment: dict[str, str], *words: str) -> None:
    """Once more where the machine was too busy: Ray gives its node 30 seconds to come up."""
    command = [str(Path(sys.executable).with_name("ray")), "start", *words]
    command += [f"--node-ip-address={host.address}", "--num-cpus=1"]
    command += [f"--object-store-memory={80 * 2**20}"]
    for last in (False, False, True):
        try:
            host.run(*command, environment=environment)
            return
        except subprocess.CalledProcessError:
            host.send(signal.SIGKILL)
            if last:
                raise


def test_ray_workers_on_s3_outlive_a_host_that_vanishes_and_comes_back(
    hosts: tuple[Host, Host, str],
    s3: "S3Server",
    start: Start,
    held: Path,
    local_results: Results,
    tmp_path: Path,
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    first, second, here = hosts
    environment = {**QUIET, **s3.environment(here), "TMPDIR": str(first.private)}
    address = f"{first.address}:6379"
    temporary = f"--temp-dir={first.private}/ray"
    start_ray(first, environment, "--head", "--port=6379", "--include-dashboard=false", temporary)
    start_ray(second, environment, f"--address={address}")
    driver = start(
        tmp_path / "out",
        *("ray", f"address={address}", "seeds=1"),
        url="s3://bucket/sweep",
        on=first.command,
        environment=environment,
    )
    driver.wait_for("a run on each host", lambda: held_on(held, first) and held_on(held, second))
    ((run, pid),) = held_on(held, second).items()
    checkpoint = f"sweep/files/{run}/checkpoint.safetensors"
    driver.wait_for("a checkpoint in the store", lambda: checkpoint in s3.objects())
    second.vanish()
    (held / HOLD).unlink()
    assert driver.end() == 0
    assert "outcome 2 0 0" in driver.said()
    assert "resuming from its checkpoint" in driver.said()

    with readable("s3://bucket/sweep") as folder:
        traces = [open_trace(path.parent).check() for path in folder.glob("*/trace/meta.json")]
    assert len(traces) == 2
    before = s3.objects()
    names = [name for name in before if name.endswith("result.json")]
    found = lasting({name.split("/")[2]: json.loads(before[name]) for name in names})
    assert found == {run: local_results[run] for run in found}
    assert len(found) == 2
    assert not [name for name in before if "checkpoint" in name or "lease" in name]
    second.come_back()
    driver.wait_for("the end of the run's first process", lambda: pid not in second.pids())
    assert s3.objects() == before, "a worker that was overtaken writes no more"


@pytest.fixture
def slurm(hosts: tuple[Host, Host, str]) -> Iterator[dict[str, str]]:
    """Environment of the clients of a controller on the first host and a node on each, with a
    partition whose jobs take the second node from those of the other.
    """
    pytest.importorskip("submitit", reason="needs the extra slurm (submitit)")
    first, second, _ = hosts
    folder = Path(tempfile.mkdtemp(prefix="ml", dir="/tmp"))  # short: sockets lie in it
    nodes = "\n".join(
        [
            *(f"NodeName={one.name} NodeAddr={one.address} CPUs=1" for one in (first, second)),
            f"PartitionName=low Nodes={first.name},{second.name} Default=YES PriorityTier=1",
            f"PartitionName=high Nodes={second.name} PriorityTier=9",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SlurmdTimeout=20",
        ]
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    described = {"SLURM_AT": first.address, "SLURM_NODES": nodes}
    try:
        first.run("bash", str(SCRIPT), "start", str(folder), environment=described)
        second.run("slurmd", environment=environment)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no SLURM could be brought up: {' / '.join(error.stdout.splitlines())}")
    yield environment
    shutil.rmtree(folder, ignore_errors=True)  # its daemons end with their hosts


def test_slurm_takes_a_run_from_a_host_by_priority_drains_it_and_loses_it(
    hosts: tuple[Host, Host, str],
    slurm: dict[str, str],
    late: dict[str, str],
    start: Start,
    held: Path,
    local_results: Results,
    tmp_path: Path,
) -> None:
    first, second, _ = hosts
    environment = slurm | late

    def ask(*words: str) -> str:
        return first.run(*words, environment=slurm).strip()

    def state() -> str:
        return ask("sinfo", "--noheader", "--nodes", second.name, "--format=%T").splitlines()[0]

    driver = start(
        tmp_path / "out",
        *("slurm", "partition=low", "minutes=9", "seeds=1"),
        on=first.command,
        environment=environment,
    )
    driver.wait_for("a run on each host", lambda: held_on(held, first) and held_on(held, second))
    begun = held_on(held, second)
    ((run, pid),) = begun.items()

    wait = f"while [ -e {held / HOLD}.high ]; do sleep 0.2; done"
    (held / f"{HOLD}.high").touch()
    high = ask("sbatch", "--parsable", "--partition=high", "--output=/dev/null", "--wrap", wait)
    driver.wait_for("the run's end", lambda: pid not in second.pids())
    driver.wait_for(
        "the other job on its node",
        lambda: ask("squeue", "--noheader", f"--jobs={high}", "--format=%T") == "RUNNING",
    )
    (held / f"{HOLD}.high").unlink()
    driver.wait_for("the run again", lambda: held_on(held, second).get(run, pid) != pid)
    begun = held_on(held, second)
    (pid,) = begun.values()

    ask("scontrol", "update", f"NodeName={second.name}", "State=DRAIN", "Reason=test")
    assert state() == "draining"
    assert held_on(held, second) == begun, "what runs on a drained node goes on"
    second.vanish()
    driver.wait_for("the loss of the node", lambda: "down" in state() or "drained" in state())
    (held / HOLD).unlink()
    assert driver.end() == 0
    assert "outcome 2 0 0" in driver.said()
    found = results(driver.out)
    assert found == {run: local_results[run] for run in found}
    assert len(found) == 2

    def files() -> dict[Path, bytes]:
        paths = (driver.out / run).rglob("*")
        return {
            path: path.read_bytes() for path in paths if path.is_file() and path.name != "log.txt"
        }

    before = files()
    second.come_back()
    driver.wait_for("the end of the run's lost process", lambda: pid not in second.pids())
    assert files() == before


def test_slurm_workers_on_s3_share_no_folder_but_that_of_their_jobs(
    hosts: tuple[Host, Host, str],
    slurm: dict[str, str],
    s3: "S3Server",
    stubs: ModuleType,
    tmp_path: Path,
) -> None:
    """The temporary folder is another on each host, and some requests are refused or cut."""
    from s3_server import CUT_UPLOAD

    first, second, here = hosts
    environment = slurm | s3.environment(here) | {"TMPDIR": str(first.private)}
    code = (
        "import os\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "from moe_lab.sweeps import run\n"
        "from stub_trainer import stub_grid, stub_sweep\n"
        "outcome = run(stub_sweep(*stub_grid(2, 30, 0.1)), 's3://bucket/sweep', "
        "launcher='slurm', trainer='bucket_files:train', progress=False)\n"
        "print('outcome', len(outcome.finished), len(outcome.failed))"
    )
    with s3.fault("SlowDown", 4, lambda method, _: method == "PUT"), s3.fault(CUT_UPLOAD, 2):
        said = first.run(sys.executable, "-c", code, environment=environment)
    assert said.splitlines()[-1] == "outcome 2 0", said
    frame = status("s3://bucket/sweep")
    assert dict(frame.select("name", "loss").rows()) == {
        one.name: stubs.expected_loss(one) for one in stubs.stub_grid(2, 30, 0.1)
    }
    logs = [path.read_text() for path in (tmp_path / "slurm").glob("*/*_log.out")]
    assert len(logs) == 2
    assert not [name for name in s3.objects() if "checkpoint" in name or "lease" in name]
    for host in (first, second):
        assert not host.run("find", str(host.private), "-path", "*/moe_lab*", "-type", "f")
