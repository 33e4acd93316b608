"""``moe-lab ablate`` on a tiny trained run and on a pretrained model in a folder."""

import json

import numpy as np
import polars as pl
import pytest
from refusals import refused
from test_difficulty_command import WORDS, config_of

from moe_lab.cli import command_parsers, main
from moe_lab.errors import AnalysisError, ConfigError, MoELabError, TraceError
from moe_lab.text import Split, load_tokens
from moe_lab.training import load_run, train
from moe_lab.worth import expert_losses, measures
from moe_lab.worth.worth_files import WORTH_FOLDER


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    corpus, generator = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for number in range(40):
        text = " ".join(generator.choice(WORDS, 60)) + f" {number}\n"
        (corpus / f"d{number:02}.py").write_text(text)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(config_of(corpus, num_zero_experts=2), folder, cache_dir=tmp_path_factory.mktemp("cache"))
    return folder


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch):
    monkeypatch.setattr(measures, "TIMED_SECONDS", 1e-9)


def test_a_run_is_judged_on_its_own_validation_documents(run, capsys):
    assert main(["ablate", str(run), "--max-tokens", "60", "--by-class", "lexer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 experts of 2 layers, ")
    assert "about 0:0" in lines[0]
    assert "of 8 measured experts matter" in lines[1]
    assert lines[2].split("\t")[:5] == ["layer", "expert", "d_loss", "lo", "hi"]
    assert lines[-1] == f"next: moe-lab report {run}"
    folder = run / WORTH_FOLDER
    worth = pl.read_parquet(folder / "worth.parquet")
    assert {"lexer", None} == set(worth["by"].to_list())
    text = load_tokens(load_run(run).config.text)
    documents = [document.ids[:60] for document in text.documents(Split.VALIDATION)]
    losses = expert_losses(load_run(run).model, documents)
    held = pl.read_parquet(folder / "losses.parquet").filter(pl.col("class").is_null())
    assert held.sort("layer", "expert", "doc")["d_loss"].to_numpy() == pytest.approx(
        losses["d_loss"].to_numpy(), abs=1e-6
    )
    with refused("out", AnalysisError):
        main_raising(["ablate", str(run)])


def main_raising(arguments):
    """The error of a command before it is printed."""
    _, parser = command_parsers(arguments[0])
    from moe_lab.commands import ablate

    return ablate.main(parser.parse_args(arguments[1:]))


def test_the_plan_measures_nothing_and_json_has_the_tables(run, tmp_path, capsys):
    out = tmp_path / "worth"
    options = [str(run), "--experts", "2", "--layers", "1", "--max-tokens", "40", "--json"]
    assert main(["ablate", *options, "--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"].startswith("2 experts of 1 layer, ")
    assert set(plan["minutes"]) == {"losses", "scores"}
    assert not out.exists()
    assert not (run / "other").exists()
    assert main(["ablate", *options, "--out", str(out)]) == 0
    got = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in got["experts"]] == [1, 1]
    assert got["sentences"]
    assert {row["score"] for row in got["scores"]} >= {"frequency", "reap"}
    assert sorted(path.name for path in out.iterdir()) == [
        "agreement.parquet", "losses.parquet", "meta.json", "scores.parquet", "worth.parquet",
    ]  # fmt: skip


def test_a_pretrained_model_needs_a_text_and_a_folder(pretrained, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "again.txt").write_text("cat")
    (tmp_path / "twice.txt").write_text("cat")
    for number in range(6):
        words = np.random.default_rng(number).choice(["cat", "mat", "42", "x = 1\n"], 12)
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    text, out = ["--text", str(tmp_path)], ["--out", str(tmp_path / "worth")]
    with refused("", ConfigError):
        main_raising(["ablate", str(pretrained), *text])
    with refused("", ConfigError):
        main_raising(["ablate", str(pretrained), *out])
    options = ["--experts", "1", "--edit", "silence", "--dtype", "float32"]
    assert main(["ablate", str(pretrained), *text, *out, *options]) == 0
    printed = capsys.readouterr().out
    assert "2 measured experts" in printed
    assert "; predictions of a pass take 0.001 GB" in printed
    assert "note: Documents left out: 1 blank and 1 repeated." in printed
    worth = pl.read_parquet(tmp_path / "worth" / "worth.parquet")
    assert worth["edit"].to_list() == ["silence", "silence"]
    assert worth["docs"].to_list() == [7, 7]


def test_what_does_not_fit_is_refused(run, tmp_path):
    for options, field in (
        (["--experts", "0"], "--experts"),
        (["--layers", "7"], "layers"),
        (["--by-class", "colour"], "by_class"),
        (["--curves", "--layers", "1"], "layers"),
    ):
        with pytest.raises(MoELabError, check=lambda error, field=field: error.field == field):
            main_raising(["ablate", str(run), *options, "--plan"])
    for option in ("--experts", "--pairs"):
        with refused(option.strip("-"), ConfigError):
            main_raising(["ablate", str(run), option, "99", "--plan"])
    with refused("--layers", ConfigError):
        main_raising(["ablate", str(run), "--layers", "1-0", "--plan"])
    with refused("--dtype", ConfigError):
        main_raising(["ablate", str(run), "--dtype", "float16", "--plan"])
    for options in (["--text", "x", "--plan"], []):
        with refused("source", TraceError):
            main_raising(["ablate", str(tmp_path / "nothing"), *options])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    with refused("out", AnalysisError):
        main_raising(["ablate", str(run), "--out", str(tmp_path / "taken")])
