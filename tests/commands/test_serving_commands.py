"""``moe-lab cache``, ``place`` and ``decode`` on a trace with several documents."""

import json
import re

import numpy as np
import pytest

from moe_lab.cli import main
from moe_lab.commands import report
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.serving.expert_bytes import other_model
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter
from moe_lab.trace.rows import slot_rows
from moe_lab.training import RunConfig


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    generator = np.random.default_rng(0)
    meta = TraceMeta(
        tuple(LayerMeta(n, 8, top_k=2, expert_bytes=2**20) for n in range(2)),
        has_weights=False,
        has_scores=False,
    )
    doc, pos = np.divmod(np.arange(240, dtype=np.uint32), np.uint32(20))
    folder = tmp_path_factory.mktemp("serving") / "trace"
    with TraceWriter(folder, meta) as writer:
        for layer in meta.layers:
            keys = generator.gumbel(size=(240, 8)) + generator.normal(size=8)
            ids = np.argsort(-keys, axis=1)[:, :2]
            rows = slot_rows(layer, doc, pos, ids, None, None, None)
            writer.write_rows(layer.layer, rows, np.bincount(ids.ravel(), minlength=8))
    return folder


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_cache_prints_a_table_and_the_interval_first(trace, capsys):
    code, out, _ = run(capsys, "cache", trace, "--budget", "8MiB", "--policy", "lru", "--prefetch")
    assert code == 0
    finds = r"A cache of 8.39 MB under lru finds [\d.]+ to [\d.]+ % \(95 % interval; [\d.]+ "
    assert re.search(finds + r"measured\) of the experts", out)
    assert "last_token" in out
    code, out, _ = run(capsys, "cache", trace, "--budget", "1MiB", "--budget", "8MiB", "--json",
                       "--bandwidth", "1GB", "--compute", "0.01")  # fmt: skip
    values = json.loads(out)
    assert len(values["cache"]) == 2 * 6 * 2
    assert any("cliff" in sentence for sentence in values["sentences"])
    assert any("tokens a second" in sentence for sentence in values["sentences"])


def test_workers_of_a_cache_need_one_per_document(trace, capsys, tmp_path):
    command = ("cache", trace, "--budget", "8MiB", "--policy", "lru")
    code, out, err = run(capsys, *command, "--workers", 1)
    assert (code, out) == (2, "")
    assert "--per-document" in err
    code, alone, _ = run(capsys, *command, "--per-document", "--json")
    assert code == 0
    assert json.loads(alone)["cache"][0]["requests"] == 240 * 2 * 2


@pytest.mark.parametrize("words", [("place", "--devices", 4), ("decode", "--window", 4)])
def test_workers_print_what_one_process_prints(trace, capsys, tmp_path, words):
    kept = tmp_path / "kept"
    name, *options = words
    alone = run(capsys, name, trace, *options)
    assert alone[0] == 0
    assert run(capsys, name, trace, *options, "--workers", 1, "--partial-frames", kept) == alone
    assert not list(kept.iterdir())


@pytest.mark.parametrize(
    "words", [["--launcher-option", "address=auto"], ["--partial-frames", "kept"]]
)
def test_options_of_workers_without_workers_are_refused(trace, capsys, words):
    code, out, err = run(capsys, "place", trace, "--devices", 4, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words[0].rpartition("-")[0] in err.replace(" ", "-")


def test_place_judges_elsewhere_and_writes_engine_files(trace, capsys, tmp_path):
    vllm, sglang = tmp_path / "vllm.json", tmp_path / "sglang.json"
    code, out, _ = run(capsys, "place", trace, "--devices", 4, "--slots", 12, "--tokens-needed",
                       "--vllm", vllm, "--sglang", sglang)  # fmt: skip
    assert code == 0
    assert "On text that it was not chosen on" in out
    assert json.loads(vllm.read_text())["moe_layer_count"] == 2
    assert len(json.loads(sglang.read_text())["physical_to_logical_map"][0]) == 12
    before = vllm.read_bytes()
    code, out, err = run(capsys, "place", trace, "--devices", 2, "--vllm", vllm)
    assert (code, out, err.count("\n"), vllm.read_bytes()) == (2, "", 1, before)
    assert "--overwrite" in err
    code, _, _ = run(capsys, "place", trace, "--devices", 2, "--vllm", vllm, "--overwrite")
    assert (code, vllm.read_bytes() == before) == (0, False)
    code, out, _ = run(capsys, "place", trace, "--devices", 4, "--by", "time", "--json")
    assert json.loads(out)["transfer"][0]["chosen_on"] == "first half"
    code, _, err = run(capsys, "place", trace, "--devices", 3)
    assert (code, err.count("\n")) == (2, 1)


def test_decode_says_what_a_window_touches_and_when_speculation_pays(trace, capsys):
    code, out, _ = run(capsys, "decode", trace, "--window", 4, 8, "--batch", 4)
    assert code == 0
    assert "8 tokens in a row touch" in out
    assert "accepted drafts" in out
    code, out, _ = run(capsys, "decode", trace, "--window", 4, "--json")
    values = json.loads(out)
    assert {row["size"] for row in values["distinct"]} == {4}
    assert values["roofline"] is None


def test_a_size_that_is_no_amount_of_bytes_is_refused(trace, capsys):
    assert main(["cache", str(trace), "--budget", "four"]) == 2
    assert "expected --budget as a number above 0, with kB" in capsys.readouterr().err


def test_a_report_offers_difficulty_where_tokens_differ_in_real_experts(trace, tmp_path):
    assert report._next(trace) == ("place", " --devices 4"), "two experts for every token"
    run = tmp_path / "run"
    run.mkdir()
    assert report._next(run) == ("watch", "")
    (run / "done").touch()
    assert report._next(run) is None, "a dense run"
    (run / "trace").symlink_to(trace)
    assert report._next(run) == ("ablate", "")
    layer = LayerMeta(0, 8, 1, top_k=2)
    doc, pos = np.divmod(np.arange(4, dtype=np.uint32), np.uint32(2))
    ids = np.array([[0, 1], [2, 8], [3, 4], [5, 6]])  # expert 8 computes nothing
    meta = TraceMeta((layer,), has_weights=False, has_scores=False)
    with TraceWriter(tmp_path / "varies", meta) as writer:
        rows = slot_rows(layer, doc, pos, ids, None, None, None)
        writer.write_rows(0, rows, np.bincount(ids.ravel(), minlength=9))
    assert report._next(tmp_path / "varies") == ("difficulty", "")


def test_a_configuration_of_another_model_of_as_many_experts_is_named(trace, capsys, tmp_path):
    def wrote(name, layers, slots=2):
        router = RouterConfig(num_experts=8, top_k=slots)
        moe = MoEConfig(d_model=16, d_expert=8, router=router)
        model = DecoderConfig(vocab_size=10, d_model=16, num_layers=layers, num_heads=2, moe=moe)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(RunConfig(model=model, name=name).to_dict()))
        return path

    command = ("cache", trace, "--budget", "1KiB", "--policy", "lru", "--config")
    assert run(capsys, *command, wrote("here", 2))[::2] == (0, "")
    code, _, err = run(capsys, *command, wrote("larger", 5))
    assert (code, err.count("\n")) == (0, 1)
    assert "3 of the 5 MoE layers of --config are not traced" in err
    code, _, err = run(capsys, *command, wrote("wider", 2, slots=4))
    assert code == 2
    assert "8 experts and 2 slots in layer 0, got one of 8 and 4" in err


@pytest.mark.parametrize(
    ("traced", "given", "doubted"),
    [("org/A@1f", "a", False), ("", "a", False), ("a", "", False), ("org/A", "org/B", True)],
)
def test_models_are_compared_by_name_where_both_are_known(traced, given, doubted):
    router = RouterConfig(num_experts=8, top_k=2)
    moe = MoEConfig(d_model=16, d_expert=8, router=router)
    model = DecoderConfig(vocab_size=10, d_model=16, num_layers=1, num_heads=2, moe=moe)
    doubt = other_model(TraceMeta((LayerMeta(0, 8, top_k=2),), model=traced), model, given)
    assert bool(doubt) == doubted
