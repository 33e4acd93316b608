"""Two hosts on one machine: network, process, host-name and mount namespaces of their own, a cable
between them, and a temporary folder that only they see. Needs root, ``ip`` and ``unshare``.

A host lives as long as its first process, which dies with the test's: then the kernel ends all its
processes and takes its network away, also after ``kill -9``.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter")
SECONDS = 600
"""For a command on a host: enough on the busiest machine."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_BEGIN = """
set -e
hostname "$0"
mount -t tmpfs tmpfs "$1"
ip link set lo up
echo up
exec env --ignore-signal=CHLD sleep infinity
"""
"""Ignored, so that processes which lose their parent leave no zombie."""


class HostError(Exception):
    """Why this machine makes no hosts, in one line."""


class Host:
    """Attributes:
    name: its host name.
    address: of this host, as the other one reaches it.
    private: a folder that has the same path on every host and another content.
    """

    def __init__(self, name: str, address: str, private: Path) -> None:
        self.name, self.address, self.private = name, address, private
        command = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            [*command, "--mount-proc", "sh", "-c", _BEGIN, name, str(private)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
            text=True,
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != "up":
            self._process.wait()
            raise HostError(f"cannot make a host on this machine: {said}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.first = int(children.read_text().split()[0])
        """Process id, on this machine, of the host's first process."""

    def command(self, *words: str) -> list[str]:
        """``words`` as a command of this machine that runs them on the host."""
        return [
            *("nsenter", "--target", str(self.first), "--net", "--uts", "--pid", "--mount", "--"),
            *words,
        ]

    def run(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """What the command prints. Raises ``CalledProcessError`` with it where it fails."""
        done = subprocess.run(
            self.command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
            timeout=SECONDS,
        )
        if done.returncode:
            error = subprocess.CalledProcessError(done.returncode, words, done.stdout)
            error.add_note(done.stdout[-2000:])
            raise error
        return done.stdout

    def processes(self) -> set[int]:
        """Process ids, on this machine, of everything that runs on the host."""
        mine, found = os.readlink(f"/proc/{self.first}/ns/pid"), set()
        for path in Path("/proc").glob("[0-9]*/ns/pid"):
            with suppress(OSError):
                if os.readlink(path) == mine:
                    found.add(int(path.parts[2]))
        return found

    def pids(self) -> set[str]:
        """Process ids, on the host, of everything that runs there."""
        return set(self.run("ls", "/proc").split())

    def vanish(self) -> None:
        """Take the cables out and stop every process, without a signal to the other host."""
        self._cables("down")
        self.send(signal.SIGSTOP)

    def come_back(self) -> None:
        self.send(signal.SIGCONT)
        self._cables("up")

    def send(self, number: signal.Signals) -> None:
        """A signal to everything that runs on the host."""
        for pid in self.processes() - {self.first}:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _cables(self, state: str) -> None:
        for cable in ("other", "outside"):
            self.run("ip", "link", "set", cable, state)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, str]]:
    """The hosts, and the address of this machine on both. Raises ``HostError`` where they cannot be
    made.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid():
        raise HostError(f"needs {missing[0]}" if missing else "needs root: it makes namespaces")
    first_address = ip_address("198.18.0.0") + 16 * (os.getpid() % 8192)  # for tests: RFC 2544
    between_first, between_second, here, outside_first, there, outside_second = (
        str(first_address + place) for place in (1, 2, 5, 6, 9, 10)
    )
    private = Path(tempfile.mkdtemp(prefix="ml", dir="/tmp"))  # short: sockets lie in it
    hosts: list[Host] = []
    try:
        for name, address in (("moe-a", between_first), ("moe-b", between_second)):
            hosts.append(Host(name, address, private))
        try:
            _remove_cables()
            first, second = hosts
            mine = f"ml{os.getpid()}"
            _connect(None, f"{mine}a", here, first, "outside", outside_first)
            _connect(None, f"{mine}b", there, second, "outside", outside_second)
            _connect(first, "other", between_first, second, "other", between_second)
            second.run("ip", "route", "add", here, "via", there)
        except subprocess.CalledProcessError as error:
            raise HostError(f"cannot connect hosts: {error.stdout.strip()}") from error
        yield first, second, here
    finally:
        for host in hosts:
            host.end()
        _remove_cables(os.getpid())
        private.rmdir()


def _remove_cables(mine: int = 0) -> None:
    """Those of this process, or those of tests that were killed: a connection that still waits for
    an answer keeps its host's network for minutes after its last process.
    """
    for path in Path("/sys/class/net").glob("ml*"):
        owner = re.fullmatch(r"ml(\d+)[ab]", path.name)
        if owner and (int(owner[1]) == mine or not Path(f"/proc/{owner[1]}").exists()):
            subprocess.run(["ip", "link", "delete", path.name], stderr=subprocess.DEVNULL)


def _connect(
    left: Host | None, name: str, address: str, right: Host, far: str, far_address: str
) -> None:
    """A cable from ``left``, None: this machine, to ``right``."""
    near = ["netns", str(left.first)] if left else []
    cable = ["ip", "link", "add", name, *near, "type", "veth", "peer", far, "netns"]
    subprocess.run(
        [*cable, str(right.first)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for host, end, own in ((left, name, address), (right, far, far_address)):
        for words in (["addr", "add", f"{own}/30", "dev", end], ["link", "set", end, "up"]):
            command = ["ip", *words]
            subprocess.run(
                host.command(*command) if host else command,
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
