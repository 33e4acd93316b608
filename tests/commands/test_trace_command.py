"""``moe-lab trace`` on a pretrained model and on records: what is written, told and refused."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused

from moe_lab.cli import main
from moe_lab.errors import TraceError
from moe_lab.trace import open_trace

TEXTS = {
    "a.txt": "the cat sat on the mat. 12 cats sat on 345 mats\n" * 3,
    "b.txt": "def f(x):\n    return x + 1\n",
    "c.txt": "naive words, words and more words",
}


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.hf
def test_a_pretrained_model_is_traced_over_documents(
    pretrained, texts, tmp_path, capsys, monkeypatch
):
    import socket

    monkeypatch.setattr(
        socket.socket, "connect", lambda *_: pytest.fail("a local model must not use the network")
    )
    arguments = [
        "trace",
        "--hf",
        str(pretrained),
        "--text",
        str(texts),
        "--out",
        str(tmp_path / "t"),
    ]
    assert main([*arguments, "--max-tokens", "100", "--batch-tokens", "128", "--json"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    trace = open_trace(tmp_path / "t").check()
    tokens = trace.tokens.sort("doc", "pos").collect()
    lengths = [min(100, len(text.encode())) for text in TEXTS.values()]
    assert tokens.group_by("doc").len().sort("doc")["len"].to_list() == lengths
    assert summary["tokens"] == sum(lengths)
    assert summary["documents"] == 3
    assert "".join(tokens.filter(pl.col("doc") == 1)["text"].to_list()) == TEXTS["b.txt"]
    assert tokens["unicode"].n_unique() > 2
    assert not re.search(r"%|left", printed.err)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pretrained).eval()
    ids = torch.tensor([tokens.filter(pl.col("doc") == 2)["token_id"].to_list()])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    want = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    got = tokens.filter(pl.col("doc") == 2)["loss"]
    assert got[0] is None
    np.testing.assert_allclose(got[1:].to_numpy(), want, rtol=1e-3, atol=1e-4)
    assert summary["loss"] == pytest.approx(float(tokens["loss"].mean()), rel=1e-6)  # type: ignore[arg-type]
    assert trace.meta.tokenizer_hash
    assert trace.meta.corpus_hash


@pytest.mark.hf
def test_an_interrupted_trace_of_a_pretrained_model_goes_on(
    pretrained, texts, tmp_path, monkeypatch
):
    import moe_lab.trace.capturing.hub as hub

    arguments = [
        "trace",
        "--hf",
        str(pretrained),
        "--text",
        str(texts),
        "--batch-tokens",
        "1",
        "--out",
    ]
    real, calls = hub.pad_right, []

    def fail_in_the_third(batch, pad):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(batch, pad)

    monkeypatch.setattr(hub, "pad_right", fail_in_the_third)
    assert main([*arguments, str(tmp_path / "t")]) != 0
    assert (
        len(
            open_trace(tmp_path / "t.incomplete", allow_incomplete=True)
            .check()
            .tokens.collect()["doc"]
            .unique()
        )
        == 2
    )
    monkeypatch.undo()
    assert main([*arguments, str(tmp_path / "t")]) == 0
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    both = [
        open_trace(tmp_path / name).check().routing.sort("layer", "doc", "pos").collect()
        for name in ("t", "whole")
    ]
    assert both[0].equals(both[1])


@pytest.mark.hf
def test_a_folder_that_is_no_model_is_one_line(texts, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert (
        main(
            [
                "trace",
                "--hf",
                str(tmp_path / "empty"),
                "--text",
                str(texts),
                "--out",
                str(tmp_path / "t"),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "cannot load" in error


@pytest.mark.hf
def test_a_model_without_its_tokenizer_is_refused_by_that_name(tmp_path):
    from transformers import Qwen3MoeConfig

    from moe_lab.trace.capturing import hub

    Qwen3MoeConfig(vocab_size=50).save_pretrained(tmp_path)
    with refused("tokenizer", TraceError):
        hub.load_pretrained(tmp_path, hub.Loading())


def test_records_of_an_engine_become_a_trace(tmp_path, capsys):
    ids = np.argsort(np.random.default_rng(0).random((9, 2, 8)), axis=2)[..., :2].astype(np.int32)
    np.savez(tmp_path / "dump.npz", routed_experts=ids, token_ids=np.arange(10))
    arguments = [
        "trace",
        "--import",
        "vllm",
        str(tmp_path / "dump.npz"),
        "--out",
        str(tmp_path / "t"),
        "--num-experts",
        "8",
    ]
    assert main([*arguments, "--num-zero-experts", "2"]) == 0
    printed = capsys.readouterr().out
    assert "9 tokens" in printed
    assert "note: vllm records zero-compute experts as expert 0" in printed
    assert open_trace(tmp_path / "t").check().num_tokens == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of RUN, --hf ID_OR_PATH or --import KIND SRC, got none"),
        (["run", "--hf", "x"], "expected one of RUN, --hf ID_OR_PATH or --import KIND SRC"),
        (["run"], "expected a text to trace, got none; try --text PATH"),
        (["--import", "vllm"], "expected --import KIND SRC --out FOLDER, got no SRC"),
        (
            ["--import", "vllm", "nowhere.npz", "--out", "t"],
            "expected a file or folder at nowhere.npz, got none",
        ),
    ],
)
def test_what_is_missing_is_told(arguments, message, capsys):
    assert main(["trace", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.hf
@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_that_came_with_a_model_never_runs_unasked(pretrained, texts, tmp_path, place):
    """With ``y`` on standard input, in a network namespace where the machine allows one."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(pretrained, folder)
    values = json.loads((folder / place).read_text())
    if place == "config.json":
        values |= {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
        values["auto_map"] = {
            "AutoConfig": "evil.EvilConfig",
            "AutoModelForCausalLM": "evil.EvilForCausalLM",
        }
    else:
        values |= {
            "tokenizer_class": "EvilTokenizer",
            "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        }
        (folder / "tokenizer.json").unlink()
    (folder / place).write_text(json.dumps(values))
    code = (
        f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nEvilConfig = EvilForCausalLM "
        f"= EvilTokenizer = object\n"
    )
    (folder / "evil.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "moe_lab",
        "trace",
        "--hf",
        str(folder),
        "--text",
        str(texts),
        "--out",
        str(tmp_path / "t"),
    ]
    isolated = (
        ["unshare", "--net"]
        if not subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode
        else []
    )
    done = subprocess.run(
        [*isolated, *command], input="y\n" * 9, capture_output=True, text=True, timeout=600
    )
    assert not marker.exists()
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--trust-remote-code" in done.stderr


def test_layers_and_tokens_of_an_import_can_be_given(tmp_path, capsys):
    (tmp_path / "c.json").write_text("[[0, 0, 0, 0], [4, 3, 2, 1], [0, 4, 3, 0]]")
    arguments = ["--import", "counts", str(tmp_path / "c.json"), "--out", str(tmp_path / "t")]
    assert main(["trace", *arguments, "--top-k", "3", "--layers", "1-2", "--tokens", "4"]) == 0
    assert [layer.layer for layer in open_trace(tmp_path / "t").meta.layers] == [1, 2]
    capsys.readouterr()
    assert main(["trace", *arguments, "--top-k", "3", "--layers", "1..2"]) == 2
    assert "--layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "option"),
    [
        (["--import", "counts", "x.json", "--out", "o"], ["--text", "corpus"]),
        (["--import", "counts", "x.json", "--out", "o"], ["--max-tokens", "5"]),
        (["--hf", "model", "--text", "corpus", "--out", "o"], ["--top-k", "2"]),
        (["runs/x", "--text", "corpus"], ["--dtype", "float32"]),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(mode, option, capsys):
    assert main(["trace", *mode, *option]) == 2
    assert option[0] in capsys.readouterr().err


def trace_hf(folder, texts, out, *options):
    return main(
        ["trace", "--hf", str(folder), "--text", str(texts), "--out", str(out), "--json", *options]
    )


@pytest.mark.hf
def test_what_is_cut_or_left_out_is_said_and_recorded(pretrained, texts, tmp_path, capsys):
    (texts / "long.txt").write_text("ab" * 300)
    (texts / "again.txt").write_text(TEXTS["b.txt"])
    assert trace_hf(pretrained, texts, tmp_path / "t", "--batch-tokens", "64") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    trace = open_trace(tmp_path / "t").check()
    assert list(trace.meta.notes) == notes
    assert any("256 positions" in note and "344 of" in note for note in notes)
    assert any(note.startswith("Left out for repeating") and note.endswith(" 1.") for note in notes)
    names = trace.tokens.select("doc", "document").unique().sort("doc").collect()["document"]
    assert names.to_list() == ["a.txt", "again.txt", "c.txt", "long.txt"]


@pytest.mark.hf
@pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")
def test_a_document_longer_than_a_pass_is_traced_in_parts_as_in_one_pass(
    pretrained, texts, tmp_path, capsys, monkeypatch
):
    from moe_lab.trace.capturing import hub

    passes = []

    def watched(body, ids, mask, part, cache):
        passes.append((ids[:, part].numel(), ids[:, part].numel() * part.stop))
        return run_part(body, ids, mask, part, cache)

    run_part = hub.run_part
    monkeypatch.setattr(hub, "run_part", watched)
    assert trace_hf(pretrained, texts, tmp_path / "whole") == 0
    passes.clear()
    assert trace_hf(pretrained, texts, tmp_path / "parts", "--batch-tokens", "40") == 0
    assert len(passes) > 4
    assert max(tokens for tokens, _ in passes) <= 40
    assert max(pairs for _, pairs in passes) <= 40 * 40
    whole, parts = (open_trace(tmp_path / name).check() for name in ("whole", "parts"))
    assert parts.meta.notes == ()
    keys = ["layer", "doc", "pos"]
    routes = [trace.routing.sort(keys).select(*keys, "experts") for trace in (whole, parts)]
    assert routes[0].collect().equals(routes[1].collect())
    tokens = [trace.tokens.sort("doc", "pos").collect() for trace in (whole, parts)]
    assert tokens[0].drop("loss").equals(tokens[1].drop("loss"))
    assert tokens[0]["loss"].is_null().equals(tokens[1]["loss"].is_null())
    difference = (tokens[0]["loss"] - tokens[1]["loss"]).abs().max()
    assert difference < 1e-4  # type: ignore


@pytest.mark.hf
def test_windows_of_a_model_without_a_cache_are_said(
    pretrained, texts, tmp_path, capsys, monkeypatch
):
    from moe_lab.trace.capturing import hub

    monkeypatch.setattr(hub, "cache_that_joins", lambda *_: None)
    assert trace_hf(pretrained, texts, tmp_path / "t", "--batch-tokens", "40") == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "longer than 40 tokens" in note
    assert note.endswith(": 1.")
    trace = open_trace(tmp_path / "t").check()
    assert trace.meta.notes == (note,)
    long = trace.tokens.filter(pl.col("document") == "a.txt").sort("pos").collect()
    assert long["pos"].to_list() == list(range(long.height))
    starts = long.filter(pl.col("loss").is_null())["pos"].to_list()
    assert starts == list(range(0, long.height, 40))  # a window's first token is not predicted


@pytest.mark.hf
def test_the_hash_of_a_tokenizer_does_not_depend_on_how_it_was_called(pretrained, texts, tmp_path):
    from transformers import AutoTokenizer

    from moe_lab.trace.capturing.fingerprints import tokenizer_hash

    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    before = tokenizer_hash(tokenizer)
    tokenizer("some text", truncation=True, max_length=3, padding="max_length")
    assert tokenizer_hash(tokenizer) == before
    for name, options in (("t", []), ("u", ["--max-tokens", "5"])):
        trace_hf(pretrained, texts, tmp_path / name, *options)
    hashes = {open_trace(tmp_path / name).meta.tokenizer_hash for name in ("t", "u")}
    assert hashes == {before}


@pytest.mark.hf
def test_a_checkpoint_without_its_router_is_refused_by_name(pretrained, texts, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    shutil.copytree(pretrained, folder)
    weights = load_file(folder / "model.safetensors")
    gate = next(name for name in weights if name.endswith("gate.weight"))
    del weights[gate]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert trace_hf(folder, texts, tmp_path / "t") == 2
    assert gate in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "t").exists()


@pytest.mark.hf
@pytest.mark.parametrize("damage", ["truncated", "config of a list", "other shape"])
def test_a_damaged_checkpoint_is_one_line(pretrained, texts, tmp_path, capsys, damage):
    folder = tmp_path / "m"
    shutil.copytree(pretrained, folder)
    if damage == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "config of a list":
        (folder / "config.json").write_text("[1, 2]")
    else:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"hidden_size": 48}))
    assert trace_hf(folder, texts, tmp_path / "t") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("moe-lab trace: ")


@pytest.mark.hf
@pytest.mark.data
def test_bytes_and_spaces_of_sentencepiece_and_byte_level_tokens(data_dir):
    done = subprocess.run(
        [sys.executable, str(data_dir / "cases" / "spm_tokenizer_trace.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if "sum of n_bytes" in line]
    assert len(lines) == 2
    for line in lines:
        assert "bytes of the text 22 | sum of n_bytes 22 | text joined 'some words here " in line


@pytest.mark.hf
def test_a_finished_trace_of_a_pretrained_model_is_kept(
    pretrained, texts, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "t"
    assert trace_hf(pretrained, texts, out) == 0
    with monkeypatch.context() as patch:  # refused before the model is loaded
        patch.setattr(
            "moe_lab.trace.capturing.hub.load_pretrained", lambda *_: pytest.fail("was loaded")
        )
        assert trace_hf(pretrained, texts, out, "--max-tokens", "5") == 2
    message = capsys.readouterr().err
    assert "a finished trace of another cut at" in message
    assert "; try --overwrite" in message
    assert open_trace(out).meta.max_tokens is None
    assert trace_hf(pretrained, texts, out, "--max-tokens", "5", "--overwrite") == 0
    assert open_trace(out).meta.max_tokens == 5
