"""What a user names is read only if it is a regular file: a FIFO would wait, a device may have no
end.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_lab.commands.train import _read
from moe_lab.errors import MoELabError
from moe_lab.files import digest_of, open_regular, read_regular
from moe_lab.hf.configuration import plain
from moe_lab.runs import read_run
from moe_lab.runs.done_file import check_seal
from moe_lab.runs.folder_claims import holder
from moe_lab.runs.folder_store import RunStore
from moe_lab.runs.record import parse_object
from moe_lab.scaling import read_runs
from moe_lab.scaling.run_files import READERS as TABLES
from moe_lab.text import Tokenizer, load_corpus
from moe_lab.text.corpus import READERS as CORPORA
from moe_lab.trace import import_trace, open_trace
from moe_lab.training.checkpoint import load_tensors, read_metadata


def imported(kind: str) -> Callable[[Path], object]:
    return lambda path: import_trace(kind, path, path.with_name("out"), num_experts=8)


def in_folder(read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: read(path.parent)


READERS: dict[str, Callable[[Path], object]] = {
    **{f"corpus{end}": load_corpus for end in CORPORA},
    **{f"runs{end}": read_runs for end in TABLES},
    "tokenizer.json": Tokenizer.load,
    "hf/config.json": plain,
    "run/config.json": _read,
    "a/checkpoint.safetensors": read_metadata,
    "b/checkpoint.safetensors": load_tensors,
    "counts.json": imported("counts"),
    "routes.npy": imported("vllm"),
    "routes.npz": imported("vllm"),
    "routes.pt": imported("megatron"),
    "sweep/sweep.json": in_folder(lambda folder: RunStore(folder).plan()),
    "result.json": parse_object,
    "r/done": in_folder(check_seal),
    "trace/meta.json": in_folder(open_trace),
}


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A reader that waits is interrupted."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the reader waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", ["fifo", "device", "folder"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_in_one_line(name: str, make: str, tmp_path: Path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(MoELabError) as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_run_folder_of_fifos_is_read_as_one_without_files(tmp_path: Path) -> None:
    names = ("config.json", "status.json", "result.json", "error.txt", "error.json", "log.txt")
    for name in (*names, ".claim-1", "done"):
        os.mkfifo(tmp_path / name)
    assert "not a regular file" in read_run(tmp_path).error.lower()
    (tmp_path / "done").unlink()
    assert read_run(tmp_path).error == "failed without a message"
    assert holder(tmp_path) is None


def test_a_regular_file_is_read_and_a_name_that_becomes_a_fifo_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert read_regular(path) == b"abc"
    assert read_regular(path, 2) == b"ab"
    assert len(digest_of(path)) == 32
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)
