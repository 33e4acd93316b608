"""A finished trace is replaced only on request, at every entry that writes one."""

import os

import numpy as np
import pytest
import torch
from refusals import refused

from moe_lab.cli import main
from moe_lab.errors import TraceError, TraceExistsError
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig, Routing
from moe_lab.trace import (
    LayerMeta,
    TraceMeta,
    TraceWriter,
    capture,
    import_trace,
    merge_traces,
    open_trace,
)

META = TraceMeta((LayerMeta(0, 4, 0, 1),), model="first", corpus_hash="text")
MOE = MoEConfig(d_model=16, d_expert=8, router=RouterConfig(num_experts=4, top_k=2))
DECODER = DecoderConfig(
    vocab_size=40, d_model=16, num_layers=2, num_heads=2, context_length=64, moe=MOE
)


def write(folder, meta=META, tokens=3, **options):
    ids, weights = torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1)
    scores = torch.full((tokens, 4), 0.25)
    with TraceWriter(folder, meta, **options) as writer:
        writer.write_routing(
            0, np.zeros(tokens, int), np.arange(tokens), Routing(ids, weights, scores, scores, 4)
        )


def refused_then_replaced(folder, write_again):
    """``write_again(overwrite=...)`` is refused and leaves ``folder``, or replaces it if asked."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(TraceExistsError, match="expected a new folder, got a finished trace"):
        write_again()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in folder.parent.glob(folder.name + ".*")] == []
    os.utime(folder / "meta.json", (0, 0))
    write_again(overwrite=True)
    assert (folder / "meta.json").stat().st_mtime > 0
    open_trace(folder).check()


def test_a_writer_keeps_a_finished_trace(tmp_path):
    write(tmp_path / "t")
    refused_then_replaced(tmp_path / "t", lambda **options: write(tmp_path / "t", **options))


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({}, "a finished trace at"),
        ({"corpus_hash": "other"}, "a finished trace of another text at"),
        ({"model": "second"}, "a finished trace of another model at"),
        ({"max_tokens": 5}, "a finished trace of another cut at"),
        ({"corpus_hash": ""}, "a finished trace at"),  # unknown
        (
            {"corpus_hash": "other", "model": "second", "model_hash": "h"},
            "a finished trace of another text and another model at",
        ),
    ],
)
def test_the_refusal_names_what_differs(tmp_path, changes, got):
    write(tmp_path / "t")
    with pytest.raises(TraceExistsError) as caught:
        write(tmp_path / "t", META.replace(**changes))
    assert caught.value.got == f"{got} {tmp_path / 't'}"


def test_a_finished_trace_with_damaged_metadata_is_kept(tmp_path):
    write(tmp_path / "t")
    (tmp_path / "t" / "meta.json").write_text("{")
    with pytest.raises(TraceExistsError):
        write(tmp_path / "t")


def test_an_interrupted_trace_of_another_cut_is_not_continued(tmp_path):
    with pytest.raises(KeyboardInterrupt), TraceWriter(tmp_path / "t", META):
        raise KeyboardInterrupt
    with refused("max_tokens", TraceError):
        write(tmp_path / "t", META.replace(max_tokens=5), resume=True)
    write(tmp_path / "t", resume=True)
    assert open_trace(tmp_path / "t").check().num_tokens == 3


def test_capture_keeps_a_finished_trace(tmp_path):
    model = Decoder(DECODER)

    def run(**options):
        with torch.no_grad(), capture(model, tmp_path / "t", max_tokens=8, **options):
            model(torch.randint(0, 20, (2, 8)))

    run()
    assert open_trace(tmp_path / "t").meta.max_tokens == 8
    refused_then_replaced(tmp_path / "t", run)


def test_an_import_keeps_a_finished_trace(tmp_path, capsys):
    (tmp_path / "c.json").write_text("[[4, 3, 2, 1]]")

    def run(**options):
        import_trace("counts", tmp_path / "c.json", tmp_path / "t", top_k=2, **options)

    run()
    refused_then_replaced(tmp_path / "t", run)
    command = ["trace", "--import", "counts", str(tmp_path / "c.json"), "--top-k", "2"]
    command += ["--out", str(tmp_path / "t")]
    assert main(command) == 2
    assert "; try --overwrite, or another folder" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_merging_keeps_a_finished_trace(tmp_path):
    write(tmp_path / "one")

    def run(**options):
        merge_traces([tmp_path / "one"], tmp_path / "all", **options)

    run()
    refused_then_replaced(tmp_path / "all", run)
