"""The writer when something ends it: what stays readable, what is told, and how it goes on."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused

from moe_lab.errors import TraceError
from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, open_trace
from moe_lab.trace.background import Background
from moe_lab.trace.resume import ranges

META = TraceMeta(layers=(LayerMeta(0, 8, 0, 2), LayerMeta(3, 8, 0, 2)), vocab_size=100)
LENGTH = 10


def write_document(writer, doc, length=LENGTH):
    generator = torch.Generator().manual_seed(doc)
    pos = np.arange(length)
    writer.write_tokens(pl.DataFrame({"doc": np.full(length, doc), "pos": pos, "token_id": pos}))
    for layer in (0, 3):
        scores = torch.rand(length, 8, generator=generator)
        indices = scores.topk(2, dim=1).indices
        writer.write_routing(
            layer,
            np.full(length, doc),
            pos,
            Routing(indices, scores.gather(1, indices), scores, scores, 8),
        )


def whole(folder, documents):
    with TraceWriter(folder, META) as writer:
        for doc in range(documents):
            write_document(writer, doc)
    return open_trace(folder).check()


def same(first, second):
    for table in ("tokens", "routing"):
        keys = ["doc", "pos"] if table == "tokens" else ["layer", "doc", "pos"]
        assert (
            getattr(first, table)
            .sort(keys)
            .collect()
            .equals(getattr(second, table).sort(keys).collect())
        )


def test_an_interrupted_trace_goes_on_behind_its_finished_documents(tmp_path):
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        TraceWriter(tmp_path / "t", META, rows_per_part=16) as writer,
    ):
        for doc in range(7):
            write_document(writer, doc)
            writer.finish_documents([doc])
        write_document(writer, 7, length=4)  # half a document
        raise KeyboardInterrupt
    with TraceWriter(tmp_path / "t", META, resume=True) as writer:
        assert writer.finished == set(range(7))
        for doc in range(7, 12):
            write_document(writer, doc)
    same(open_trace(tmp_path / "t").check(), whole(tmp_path / "whole", 12))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "whole"]


def test_resume_without_an_interrupted_trace_begins_one(tmp_path):
    with TraceWriter(tmp_path / "t", META, resume=True) as writer:
        assert not writer.finished
        write_document(writer, 0)
    assert open_trace(tmp_path / "t").check().num_tokens == LENGTH


def test_resuming_the_trace_of_another_model_is_refused_and_keeps_it(tmp_path):
    with pytest.raises(RuntimeError), TraceWriter(tmp_path / "t", META) as writer:  # noqa: PT012
        write_document(writer, 0)
        writer.finish_documents([0])
        raise RuntimeError
    with (
        refused("model", TraceError),
        TraceWriter(tmp_path / "t", META.replace(model="other"), resume=True),
    ):
        pass
    with TraceWriter(tmp_path / "t", META, resume=True) as writer:
        assert writer.finished == {0}


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import moe_lab.trace.writer as module
from test_trace_writer_resume import META, write_document
module.META_SHARE = 1e9  # list after every part
with module.TraceWriter(sys.argv[1], META, rows_per_part=30) as writer:
    for doc in range(1000):
        write_document(writer, doc)
        writer.finish_documents([doc])
        if len(writer.finished) >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
        if doc % 5 == 0:
            writer._background.drain()  # the thread that writes must keep up
"""


def test_a_killed_writer_leaves_a_readable_trace_that_can_be_resumed(tmp_path):
    here = os.path.dirname(__file__)
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "t"), here, os.path.dirname(here)],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with refused("path", TraceError):
        open_trace(tmp_path / "t")
    rest = open_trace(tmp_path / "t.incomplete", allow_incomplete=True)
    assert not rest.complete
    assert rest.routing.filter(pl.col("layer") == 3).collect().height > 0
    with TraceWriter(tmp_path / "t", META, resume=True) as writer:
        assert len(writer.finished) >= 10
        for doc in set(range(40)) - writer.finished:
            write_document(writer, doc)
        resumed = writer.finished | set(range(40))
    trace = open_trace(tmp_path / "t").check()
    assert trace.num_tokens == LENGTH * len(resumed)
    same(trace, whole(tmp_path / "whole", 40))


def test_a_full_disk_names_the_folder_and_leaves_what_fitted(tmp_path, monkeypatch):
    import moe_lab.trace.writer as module

    real, calls = module.write_part, []

    def full_after_three(path, frame):
        calls.append(path)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(path, frame)

    monkeypatch.setattr(module, "write_part", full_after_three)
    with (  # noqa: PT012
        pytest.raises(
            TraceError,
            match=r"cannot write .*: .*No space left on device",
        ),
        TraceWriter(tmp_path / "t", META, rows_per_part=LENGTH) as writer,
    ):
        for doc in range(200):
            write_document(writer, doc)
            writer.finish_documents([doc])
    rest = open_trace(tmp_path / "t.incomplete", allow_incomplete=True)
    assert rest.files().height == 6
    monkeypatch.undo()
    with TraceWriter(tmp_path / "t", META, resume=True) as writer:
        assert writer.finished == {0, 1}
        for doc in range(2, 4):
            write_document(writer, doc)
    same(open_trace(tmp_path / "t").check(), whole(tmp_path / "whole", 4))


def test_a_second_writer_of_the_same_folder_is_refused(tmp_path):
    with TraceWriter(tmp_path / "t", META) as writer:
        write_document(writer, 0)
        with (
            refused("folder", TraceError),
            TraceWriter(tmp_path / "t", META),
        ):
            pass
    assert open_trace(tmp_path / "t").check().num_tokens == LENGTH


def test_tokens_whose_route_is_missing_are_no_rows_of_any_layer(tmp_path):
    pos = np.arange(3)
    scores = torch.rand(2, 8)
    with TraceWriter(tmp_path / "t", META) as writer:
        writer.write_tokens(
            pl.DataFrame(
                {"doc": [0] * 3, "pos": pos, "token_id": pos, "routed": [True, True, False]}
            )
        )
        for layer in (0, 3):
            indices = scores.topk(2, dim=1).indices
            writer.write_routing(
                layer,
                np.zeros(2, int),
                pos[:2],
                Routing(indices, scores.gather(1, indices), scores, scores, 8),
            )
    trace = open_trace(tmp_path / "t").check()
    assert trace.tokens.collect().height == 3
    assert trace.routing.collect().height == 4


def test_the_queue_makes_the_caller_wait_and_never_holds_more_than_its_limit():
    background, gate, done = Background(100), threading.Event(), []
    background.submit(gate.wait, 60)
    time.sleep(0.05)  # the first job runs; its bytes are still held
    blocked = threading.Thread(target=lambda: background.submit(lambda: done.append(1), 60))
    blocked.start()
    blocked.join(0.2)
    assert blocked.is_alive()
    gate.set()
    blocked.join(60)
    assert not blocked.is_alive()
    background.drain()
    assert done == [1]
    background.stop()


def test_an_error_in_the_background_is_raised_by_the_next_call_and_stops_later_jobs():
    background, done = Background(10), []

    def fail():
        raise ValueError("disk")

    background.submit(fail, 1)
    with pytest.raises(ValueError, match="disk"):
        background.drain()
    with pytest.raises(ValueError, match="disk"):
        background.submit(lambda: done.append(1), 1)
    background.stop()
    assert not done


def test_ranges_are_runs_of_consecutive_numbers():
    assert ranges([5, 1, 2, 3, 9]) == [[1, 3], [5, 5], [9, 9]]
    assert ranges([]) == []
