"""Options that take a number: what they accept, and what they say of anything else."""

import argparse
import json
from pathlib import Path

import pytest

from moe_lab.cli import COMMANDS, main
from moe_lab.commands.options import BYTE_UNITS, UNITS, add_number
from moe_lab.errors import MoELabError


@pytest.mark.parametrize(
    ("settings", "text", "value"),
    [
        ({"whole": True}, "16", 16),
        ({"whole": True}, "9007199254740993", 2**53 + 1),
        ({"whole": True, "least": 0}, "0", 0),
        ({"whole": True, "units": UNITS}, "1.5k", 1500),
        ({"units": UNITS}, "1.6T", 1.6e12),
        ({"units": BYTE_UNITS}, "1.5GiB", 1.5 * 2**30),
        ({"units": BYTE_UNITS}, "2kB", 2000.0),
        ({"least": 0}, "0", 0.0),
        ({}, "3e-4", 3e-4),
    ],
)
def test_a_number_is_read_in_full(settings, text, value) -> None:
    parser = argparse.ArgumentParser()
    add_number(parser, "--size", 1, **settings)
    read = parser.parse_args(["--size", text]).size
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train --experts x", "--experts as a whole number above 0, got 'x'; try --experts 16"),
        ("train --experts 0", "--experts as a whole number above 0, got '0'; try --experts 16"),
        (
            "train --seed -1",
            f"--seed as a whole number of at least 0 and at most {2**63 - 1}, got '-1'; "
            "try --seed 0",
        ),
        (
            f"train --set seed={2**63}",
            f"--set seed as a number of at most {2**63 - 1}, got {2**63}; try --set seed=0",
        ),
        (
            "train --tokens 1.5",
            "--tokens as a whole number above 0, with k, M, B or T, got '1.5'; try --tokens 200k",
        ),
        (
            "train --tokens 0",
            "--tokens as a whole number above 0, with k, M, B or T, got '0'; try --tokens 200k",
        ),
        (
            "train --tokens -5k",
            "--tokens as a whole number above 0, with k, M, B or T, got '-5k'; try --tokens 200k",
        ),
        ("train --lr -1e-3", "--lr as a number above 0, got '-1e-3'; try --lr 0.003"),
        ("train --lr nan", "--lr as a number above 0, got 'nan'; try --lr 0.003"),
        (
            "train --set model.num_layers=0",
            "--set model.num_layers as a number of at least 1, got 0; try --set model.num_layers=4",
        ),
        (
            "train --set seed=-1",
            "--set seed as a number of at least 0, got -1; try --set seed=0",
        ),
        ("decode t --batch 4 0", "--batch as a whole number above 0, got '0'; try --batch 8"),
        (
            "sweep plan r.py --target 2",
            "--target as a number above 0 and at most 1, got '2'; try --target 0.9",
        ),
        ("sweep plan r.py --seeds 0", "--seeds as a whole number above 0, got '0'; try --seeds 2"),
        (
            "sweep plan r.py --ratios 1,x",
            "--ratios as three or more numbers of at least 1 with commas between, got '1,x'; "
            "try --ratios 1,2,4,8",
        ),
        (
            "sweep plan r.py --ratios 1,nan,4",
            "--ratios as three or more numbers of at least 1 with commas between, got '1,nan,4'; "
            "try --ratios 1,2,4,8",
        ),
        (
            "trace --import vllm a --top-k 256",
            "--top-k as a whole number above 0 and at most 255, got '256'; try --top-k 8",
        ),
        ("scaling verdict r --column x", "--column OURS=YOURS, got 'x'; try --column loss=val_bpb"),
    ],
)
def test_another_value_is_one_sentence_with_the_option_and_an_example(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"moe-lab {line.split()[0]}: expected {sentence}\n"


def test_the_error_names_the_option_as_its_field() -> None:
    parser = argparse.ArgumentParser()
    add_number(parser, "--size", 8, whole=True)
    with pytest.raises(MoELabError) as caught:
        parser.parse_args(["--size", "1e400"])
    assert caught.value.field == "--size"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_leaves_a_number_to_the_words_of_argparse(name: str) -> None:
    import importlib

    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    actions = list(parser._actions)
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [one for sub in action.choices.values() for one in sub._actions]
        assert action.type not in (int, float), action.option_strings


@pytest.mark.parametrize(
    "line",
    [
        "count {}",
        "train --config {}",
        "trace --import sglang {} --out {}-out",
        "trace --import counts {} --out {}-out",
    ],
)
def test_an_empty_file_is_said_to_be_empty(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.json"
    for content in ("", " \n"):
        path.write_text(content)
        assert main(line.replace("{}", str(path)).split()) == 2
        error = capsys.readouterr().err
        assert "it is empty" in error
        assert "; try" in error


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "switch_transformers"}))
    text = tmp_path / "a.txt"
    text.write_text("some words in a document, and a few more of them")
    out = tmp_path / "out"
    line = ["trace", "--hf", str(tmp_path), "--text", str(text), "--out", str(out)]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "expected a model with one stream of tokens, got" in error
    assert "only='decoder'" in error
    assert not out.exists()
