"""``moe-lab count`` as a user meets it."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_lab.accounting import count, find_model, flops
from moe_lab.cli import main

Printed = pytest.CaptureFixture[str]


def printed(capsys: Printed, *arguments: str) -> str:
    assert main(["count", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: Printed, *arguments: str) -> str:
    assert main(["count", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def config_of(name: str) -> dict[str, Any]:
    entry = find_model(name)
    assert entry is not None
    return entry["config"]


def test_the_table_shows_the_three_conventions_and_what_was_published(capsys: Printed) -> None:
    text = printed(capsys, "meituan-longcat/LongCat-Flash-Chat")
    for number in (560664958976, 27149490176, 18693773312, 31377348608, 27954796544):
        assert f"\t{number}\n" in text
    assert "published as 560B total, 27B active in convention B (arXiv 2509.01322" in text
    assert (
        "180,388,626,432 further rows are stored or allocated by transformers and never read"
        in text
    )


def test_a_name_needs_no_owner_and_no_capitals(capsys: Printed) -> None:
    assert printed(capsys, "deepseek-v3").lower() == printed(capsys, "DeepSeek-V3").lower()


def test_json_holds_the_count_and_the_work(capsys: Printed) -> None:
    found = json.loads(
        printed(capsys, "Qwen/Qwen3-30B-A3B", "--json", "--context", "1000", "--batch", "16")
    )
    counted = count(config_of("Qwen3-30B-A3B"))
    assert found["total"] == counted.total
    assert found["active"]["A"] == dict.fromkeys(("least", "mean", "most"), counted.active("A"))
    assert found["by_part"]["routed"] == counted.by_part["routed"]
    work = flops(counted, 1000, "decode", batch=16)
    assert found["flops"]["decode"]["weight_bytes"] == pytest.approx(work.weight_bytes)
    assert found["flops"]["train"]["total"] == pytest.approx(3 * flops(counted, 1000).forward)


def test_two_models_stand_side_by_side_with_their_ratio(capsys: Printed) -> None:
    text = printed(capsys, "DeepSeek-V3", "DeepSeek-V3.2")
    assert "parameters\ttotal\t671026404352\t671877929216" in text.splitlines()
    both = json.loads(printed(capsys, "DeepSeek-V3", "Mixtral-8x7B", "--json"))
    assert [one["total"] for one in both] == [671_026_404_352, 46_702_792_704]


def test_what_if_edits_are_counted(capsys: Printed) -> None:
    found = json.loads(
        printed(
            capsys,
            "Qwen3-30B-A3B",
            "--set",
            "num_experts=256",
            "--set",
            "tie_word_embeddings=true",
            "--json",
        )
    )
    assert [one.get("edits") for one in found] == [
        None,
        "num_experts=256, tie_word_embeddings=True",
    ]
    assert found[0]["total"] == count("Qwen3-30B-A3B").total
    assert (
        found[1]["total"]
        == count(
            {**config_of("Qwen3-30B-A3B"), "num_experts": 256, "tie_word_embeddings": True}
        ).total
    )
    text = printed(capsys, "Qwen3-30B-A3B", "--set", "num_experts=256")
    assert "Qwen3-30B-A3B with num_experts=256" in text.splitlines()[0]
    assert text.count("published as") == 1


def test_a_file_or_a_folder_is_counted(capsys: Printed, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Mixtral-8x7B")))
    for path in (tmp_path, tmp_path / "config.json"):
        assert json.loads(printed(capsys, str(path), "--json"))["total"] == 46_702_792_704


def test_assumptions_are_printed(capsys: Printed) -> None:
    assert (
        "head_dim = 128 (not in the configuration; hidden_size / num_attention_heads)"
        in printed(capsys, "Mixtral-8x7B")
    )


def test_without_a_model_the_known_ones_are_listed(capsys: Printed) -> None:
    names = printed(capsys).split()
    assert "deepseek-ai/DeepSeek-V3" in names
    assert len(names) >= 48


def test_mistakes_are_one_line(capsys: Printed) -> None:
    near = refused(capsys, "deepseek-v9")
    assert near.startswith(
        "moe-lab count: expected a published model or a path to a config.json, got "
        "'deepseek-v9'; try one of "
    )
    assert "deepseek-ai/DeepSeek-V3" in near
    assert "moe-lab count, which lists the known models" in refused(capsys, "zzzzzz")
    assert "num_experts_per_tok of at most num_experts = 4" in refused(
        capsys, "Qwen3-30B-A3B", "--set", "num_experts=4"
    )
    assert "expected --set FIELD=VALUE, got 'num_experts'" in refused(
        capsys, "Qwen3-30B-A3B", "--set", "num_experts"
    )
    assert "num_experts as a whole number" in refused(
        capsys, "Qwen3-30B-A3B", "--set", "num_experts=many"
    )
    assert "expected one model, without --set, with --trace" in refused(
        capsys, "dbrx", "dbrx", "--trace", "nowhere"
    )
    assert "expected a trace at" in refused(capsys, "dbrx", "--trace", "nowhere")
    assert "expected --context as a whole number above 0" in refused(
        capsys, "dbrx", "--context", "0"
    )


def test_the_atlas_is_one_offline_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "experiments"))
    import atlas  # type: ignore[import-not-found]

    monkeypatch.setattr(atlas, "RESULTS", tmp_path / "atlas")
    monkeypatch.setattr(sys, "argv", ["atlas.py", "--out", str(tmp_path / "atlas.html")])
    atlas.main()
    page = (tmp_path / "atlas.html").read_text()
    assert 'src="http' not in page
    for text in ("LongCat-2.0", "94%", "97%", "99%", "sparse by parameters"):
        assert text in page
    said = capsys.readouterr().out
    assert (
        "LongCat-Flash-Chat: 94.4% sparse for a token that runs 12 real experts, 96.7% for one "
        "that runs none" in said
    )
    committed = Path(__file__).resolve().parents[2] / "experiments" / "atlas" / "models.csv"
    assert (tmp_path / "atlas" / "models.csv").read_text() == committed.read_text()


def test_published_models_are_listed_by_a_condition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "--where", "sparsity > .97 and total < 1e12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == [
        "name",
        "date",
        "total",
        "active",
        "sparsity",
        "expert_sparsity",
    ]
    assert "deepseek-ai/DeepSeek-V4.1-Flash" in lines[1] + lines[2]
    assert lines[-1] == f"{len(lines) - 2} of 86 published models"
    assert main(["count", "--where", "sparsty > .97"]) == 2
    assert "a condition on columns such as date, total" in capsys.readouterr().err
    assert main(["count", "--where", "read_csv('models.csv') is not null"]) == 2
    assert main(["count", "--where", "total > 1", "DeepSeek-V3"]) == 2


MANY = ("DeepSeek-V3", "Qwen3-30B-A3B", "gpt-oss-20b", "Llama-3.1-8B", "Kimi-K2-Instruct")


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_table_of_any_number_of_models_fits_the_terminal(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch, width: int, number: int
) -> None:
    monkeypatch.setattr("moe_lab.commands.count.window_width", lambda: width)
    monkeypatch.setattr("moe_lab.terminal.window_width", lambda: width)
    lines = printed(capsys, *MANY[:number]).splitlines()
    assert max(map(len, lines)) <= width
    heads = " ".join(lines[:2] if width == 200 else lines).split()
    assert set(MANY[:number]) <= set(heads)
    totals = [line for line in lines if line.startswith("total ")]
    assert any("671B" in line for line in totals)


def test_memory_for_serving_is_in_all_three_forms(capsys: Printed) -> None:
    found = json.loads(printed(capsys, "DeepSeek-V3", "--json", "--context", "128k"))
    assert found["weight_bytes"] == {
        "bf16": 2 * found["total"],
        "fp8": found["total"],
        "4 bits": found["total"] / 2,
    }
    assert found["cache"]["bytes_per_token"] == {"bf16": 70_272, "fp8": 35_136}
    assert found["cache"]["bytes_at_context"]["fp8"] == 35_136 * 128_000
    rows = list(csv.reader(printed(capsys, *MANY, "--csv").splitlines()))
    assert rows[0] == ["section", "quantity", *MANY]
    cells = {(row[0], row[1]): row[2:] for row in rows[1:]}
    assert cells["parameters", "total"][3] == "8030261248"
    assert cells["cache of one sequence", "bytes per token, bf16"][0] == "70272.0"
    assert float(cells["weights, GB", "fp8"][1]) == pytest.approx(30.532, abs=1e-3)
    text = printed(capsys, "DeepSeek-V3", "--batch", "64")
    assert "assumed of decoding: a step reads each weight once for its whole batch" in text
    assert "weights, GB\t4 bits\t335.513" in text


def test_one_form_at_a_time(capsys: Printed) -> None:
    with pytest.raises(SystemExit):
        main(["count", "DeepSeek-V3", "--json", "--csv"])
    assert len(capsys.readouterr().err.splitlines()) == 1
