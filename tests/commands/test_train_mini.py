"""``moe-lab train --mini``: every published architecture in small trains from the command line, on
the default corpus.
"""

import json
from pathlib import Path

import pytest

from moe_lab.cli import main
from moe_lab.model.minis import MINIS


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIS)
def test_a_mini_trains_and_records_what_it_is(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train",
        "--mini",
        name,
        "--tokens",
        "4096",
        "--set",
        "eval_tokens=2000",
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["arm"] == name
    assert 4.0 < record["loss"] < 8.0  # nats, from ln 2048 = 7.6 downwards
    assert record["num_experts"] == MINIS[name].config["moe"]["router"]["num_experts"]
    assert (record["attention_sparsity"] > 0) == ("sparse_attention" in MINIS[name].config)
    assert len(record["gradient_ratio"]) == MINIS[name].config["num_layers"] - MINIS[
        name
    ].config.get("num_dense_layers", 0)
    assert (tmp_path / "run" / "done").exists()


def test_a_mini_and_a_configuration_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--mini", "olmoe_mini", "--config", str(tmp_path / "config.json")]) == 2
    assert "expected one of --config and --mini, got both" in capsys.readouterr().err
    assert main(["train", "--mini", "gpt_mini"]) == 2
    assert "expected a mini among longcat_flash_mini" in capsys.readouterr().err
