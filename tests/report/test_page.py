"""The page as a file: what it says, what it escapes, what lies beside it, and how it fails."""

import base64
import errno
import hashlib
import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unicodedata import category

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from report_fixtures import (
    HOSTILE,
    Shape,
    make_failed_run,
    make_run,
    make_sweep,
    make_trace,
    write_plan,
)

from moe_lab.analysis.difficulty import difficulty_curves, difficulty_frame
from moe_lab.commands.report import _summary
from moe_lab.errors import RunError, StorageError
from moe_lab.plain_text import LONGEST_ON_PAGE, on_page
from moe_lab.report import figures, write_report
from moe_lab.report.document import script_json
from moe_lab.report.figure_blocks import MAX_TABLE_ROWS
from moe_lab.report.glossary import glossary
from moe_lab.report.run_tables import MAX_FAILURES, failed_runs
from moe_lab.report.sources import Material, RunRecord, RunState
from moe_lab.trace import open_trace

MAX_BYTES = 8_000_000
SMALL = Shape(layers=1, experts=4, documents=2, tokens=30)
ROUND_TRIP = [HOSTILE, "</SCRIPT >", "<!-- <script>", "\u2028\u2029", "&lt;"]


def scripts(text: str) -> list[str]:
    """The contents of all executable scripts."""
    return re.findall(r"<script>(.*?)</script>", text, flags=re.S)


def without_scripts(text: str) -> str:
    return re.sub(r"<script.*?</script>", "", text, flags=re.S)


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from texts(entry)


def words(text: str) -> str:
    """What the page says, without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", without_scripts(text))).split())


@pytest.fixture(scope="module")
def page(sweep_page: Path) -> str:
    return sweep_page.read_text(encoding="utf-8")


def test_the_page_stays_under_its_limit(sweep_page: Path) -> None:
    assert sweep_page.stat().st_size < MAX_BYTES


def test_the_answer_comes_first_and_each_section_is_in_the_navigation(page: str) -> None:
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page, flags=re.S)
    plain = [re.sub(r"<[^>]*>", "", heading) for heading in headings]
    assert plain[0] == "Verdict: cannot tell"
    assert plain[1] == "Loss against the total:active ratio#"
    anchors = re.findall(r'<section id="([^"]*)"', page)
    assert len(anchors) == len(plain) == len(set(anchors)) == 12
    nav = re.search(r"<nav.*?</nav>", page, flags=re.S)
    assert nav is not None
    assert re.findall(r'href="#([^"]*)"', nav[0]) == anchors


def test_the_first_screen_is_question_answer_figure_and_three_cards(page: str) -> None:
    first = page.partition('<section id="answer"')[2].partition("</section>")[0]
    places = [first.index(mark) for mark in ("question", "lead", "figure-frontier", "cards")]
    assert places == sorted(places)
    cards = re.findall(r"<h3>(.*?)</h3><p>(.*?)</p><p><a href=\"#(.*?)\"", first, flags=re.S)
    assert [(title, anchor) for title, _, anchor in cards] == [
        ("Loss against ratio", "frontier"),
        ("Evenness of the load", "load"),
        ("By class of token", "compute"),
    ]
    assert all(f'<section id="{anchor}"' in page for _, _, anchor in cards)
    assert re.search(r"lowered the loss of topk by .* \(90 % interval .* to ", words(first))


def test_every_link_within_the_page_leads_somewhere(
    page: str, fixed_page: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", "topk", 2, 0, SMALL)
    lone = make_run(tmp_path / "lone" / "run", "dense", 2, 0, None).parent
    pages = [write_report(source, tmp_path / f"{source.name}.html") for source in (run, lone)]
    texts = [page, *(path.read_text(encoding="utf-8") for path in (fixed_page, *pages))]
    for text in map(without_scripts, texts):
        ids = re.findall(r' id="([^"]*)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_names_in_the_prose_of_a_page_are_in_the_glossary(page: str, fixed_page: Path) -> None:
    """A name with an underscore is no English: its definition has to be at hand."""
    known = {spelling for term in glossary() for spelling in term.spellings}
    for text in (page, fixed_page.read_text(encoding="utf-8")):
        prose = without_scripts(text).partition("<main")[2].partition('<section id="made"')[0]
        for part in ("code", "pre", "table", "option", "style", "a"):
            prose = re.sub(rf"<{part}\b.*?</{part}>", " ", prose, flags=re.S)
        prose = re.sub(r'<div class="documents".*?</aside>', " ", prose, flags=re.S)
        names = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", words(prose)))
        assert names <= known


def test_reasons_and_tables_are_folded(page: str) -> None:
    open_parts = re.sub(r"<details.*?</details>", "", page, flags=re.S)
    assert "<table" not in open_parts
    assert "Reasons for the verdict" in page
    assert "What else could have made, or hidden, a wall" in page


def test_every_word_of_the_glossary_that_is_marked_is_in_the_glossary_of_the_page(
    page: str,
) -> None:
    entries = dict(re.findall(r'<dt id="word-[^"]*">(.*?)</dt><dd>(.*?)</dd>', page))
    marked = set(re.findall(r'<abbr title="([^"]*)">', page))
    assert {html.unescape(meaning) for meaning in entries.values()} == {
        html.unescape(meaning) for meaning in marked
    }
    assert len(marked) > 20


def test_names_and_hashes_of_runs_lead_to_their_rows(page: str) -> None:
    rows = set(re.findall(r'<tr id="(run-[^"]*)"', page))
    assert "run-topk0161" in rows
    links = re.findall(r'<a class="run" href="#([^"]*)">', page)
    assert links
    assert set(links) <= rows


def test_the_data_of_the_figures_are_inside_the_page(page: str, sweep_page: Path) -> None:
    held = dict(
        re.findall(r'<script type="application/octet-stream" id="data-(\w+)">(.*?)</script>', page)
    )
    folder = sweep_page.with_name("a page_data")
    assert set(held) == {path.stem for path in folder.iterdir()}
    for name, text in held.items():
        assert base64.b64decode(text) == (folder / f"{name}.parquet").read_bytes()


def test_data_beyond_the_bound_lie_beside_the_page_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", "topk", 2, 0, None, [])
    whole = write_report(run, tmp_path / "whole.html").stat().st_size
    monkeypatch.setattr("moe_lab.report.page.MAX_BYTES", whole - 3000)
    page = write_report(run, tmp_path / "less.html")
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < whole
    by_size = sorted(page.with_name("less_data").iterdir(), key=lambda path: path.stat().st_size)
    held = [f'id="data-{path.stem}"' in text for path in by_size]
    assert held == [True] * (len(held) - 1) + [False]
    assert f"Beside it, in less_data, lie {by_size[-1].name} (" in words(text)


def test_failed_and_unfinished_runs_are_listed_with_their_reason(page: str) -> None:
    assert (
        "topk-64 failed the loss is nan at step 17; try a lower learning rate than 0.3 <b>"
        in words(page)
    )
    assert "topk-128 interrupted stopped at step 40 of 600" in words(page)


def test_failed_runs_show_their_last_lines_as_text(tmp_path: Path) -> None:
    make_run(tmp_path / "good", "topk", 2, 0, None, [])
    failed = make_failed_run(tmp_path / "bad", "it broke")
    (failed / "log.txt").write_text(HOSTILE)
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    shown = re.search(
        r"<summary>Last lines of topk-64: it broke</summary>\s*<pre[^>]*>(.*?)</pre>",
        page,
        flags=re.S,
    )
    assert shown is not None
    assert "<" not in shown[1]
    assert (
        html.unescape(shown[1])
        == HOSTILE.replace("\u2028", "") + "\nTraceback (most recent call last):\n  ..."
    )


def test_more_runs_than_a_table_holds_are_in_the_data_file(tmp_path: Path) -> None:
    make_run(tmp_path / "good", "topk", 2, 0, None, [])
    waiting = [f"waits {index}" for index in range(MAX_TABLE_ROWS + 30)]
    write_plan(tmp_path, waiting)
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count(">pending</td>") == MAX_TABLE_ROWS
    assert "30 more rows are in the data file" in page
    runs = pl.read_parquet(tmp_path / "report_data" / "runs.parquet")
    assert runs["state"].to_list() == ["finished", *["pending"] * len(waiting)]


def test_numbers_of_the_runs_are_those_of_result_json(page: str, sweep: Path) -> None:
    result = json.loads((sweep / "topk0161" / "result.json").read_text())
    assert (
        f"topk 16 1 16M 1M 6M 1.23M {result['loss']:.4f} {result['bits_per_byte']:.4f} 0.310 2.020 "
        "2.000 5.41k topk0161" in words(page)
    )


def test_hostile_text_stays_text(page: str) -> None:
    body = without_scripts(page)
    assert "<script" not in body
    assert "<img" not in body
    shown = "".join(
        html.unescape(token)
        for token in re.findall(r'<span role="option"[^>]*>(.*?)</span>', body, flags=re.S)
    )
    assert HOSTILE.replace("\u2028", "[U+2028]") in shown


def test_title_is_escaped(page: str) -> None:
    assert "<title>Wall &lt;i&gt;&amp; co&lt;/i&gt;</title>" in page


@pytest.mark.parametrize("text", ROUND_TRIP)
def test_json_in_scripts_cannot_close_them_and_round_trips(text: str) -> None:
    written = str(script_json({"text": text}))
    assert not re.search(r"[<>&\u2028\u2029]", written)
    assert json.loads(written) == {"text": on_page(text)}


def test_no_direction_control_or_invisible_character_stands_on_the_page(tmp_path: Path) -> None:
    marks = "\u202a\u202e\u2066\u2069\u200e\u200f\u061c\u200b\ufeff\x1b[31m\x9b\x7f"
    arm = f"topk{marks}" + "x" * 100_000
    make_run(tmp_path / "good", arm, 2, 0, None, [])
    failed = make_failed_run(tmp_path / "bad", f"it broke {marks}")
    (failed / "log.txt").write_text(marks)
    page = write_report(tmp_path, tmp_path / "report.html", title=marks).read_text(encoding="utf-8")
    for script in scripts(page):  # our own
        page = page.replace(script, "")
    values = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.S)
    for text in (page, html.unescape(page), *texts([json.loads(value) for value in values])):
        raw = {c for c in text if category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t\r"}
        assert not raw
    assert "topk\\u202a\\u202e" in words(page)
    assert max(map(len, re.findall(r">([^<]*)<", without_scripts(page)))) < LONGEST_ON_PAGE + 100


def test_only_the_page_s_own_scripts_may_run(page: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    allowed = html.unescape(policy.group(1))
    own = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in scripts(page)
    ]
    assert len(own) == 3
    assert all(f"'sha256-{digest}'" in allowed for digest in own)
    assert allowed.startswith("default-src 'none';")
    assert not re.search(r"https?:", allowed)


def test_nothing_on_the_page_points_to_the_network(page: str) -> None:
    assert not re.findall(r'(?:src|href)="(?!#)(?!a%20page_data/)[^"]*"', without_scripts(page))


def test_each_figure_has_its_data_its_command_and_its_numbers(
    page: str, sweep_page: Path, sweep: Path
) -> None:
    names = re.findall(r'<figure id="figure-(\w+)"', page)
    evidence = ["wall_compute", "law_fit", "wall_gain", "wall_elasticity"]
    whose = [
        "domain_specialisation",
        "domain_divergence",
        "coactivation",
        "transitions",
        "repetition",
    ]
    assert names == [
        "frontier",
        *evidence,
        "expert_load",
        "load_interval",
        "ffn_spread",
        "class_profile",
        *whose,
        "expert_cache",
        "placement_load",
        "distinct_experts",
        "training_curves",
    ]
    folder = sweep_page.with_name("a page_data")
    assert sorted(path.stem for path in folder.iterdir()) == sorted(
        [*names, "coloured_text", "runs", "wall_power"]
    )
    for name, figure in zip(
        names, re.findall(r"<figure.*?</figure>", page, flags=re.S), strict=True
    ):
        assert hasattr(figures, name)
        assert pl.read_parquet(folder / f"{name}.parquet").height > 0
        caption = words(figure)
        assert f"moe-lab report {sweep} --out '{sweep_page}'" in caption
        assert "n = " in caption
        assert "interval" in caption
        assert f'href="a%20page_data/{name}.parquet"' in figure
        assert "<table>" in figure
        assert re.search(r'role="img" aria-label="[A-Z][^"]{30,}"', figure)


def test_load_beside_the_page_adds_up_to_the_slots_of_the_trace(
    sweep_page: Path, sweep: Path
) -> None:
    load = pl.read_parquet(sweep_page.with_name("a page_data") / "expert_load.parquet").filter(
        pl.col("run") == "zero 8:1, seed 0"
    )
    trace = open_trace(sweep / "zero0" / "trace")
    assert load["count"].sum() == 3 * 4 * trace.num_tokens
    assert load["is_zero"].sum() == 8 * 4


def test_variation_alone_is_said_to_prove_nothing(page: str) -> None:
    assert "Variation alone proves nothing" in words(page)


def test_fixed_k_is_said_in_words_and_the_text_is_coloured_by_entropy(fixed_page: Path) -> None:
    text = fixed_page.read_text(encoding="utf-8")
    assert "every token runs the same number of real experts : ffn_count is 2 in fixed" in words(
        text
    )
    assert "ffn_count is constant here, so the colour is the router entropy" in words(text)
    assert 'id="figure-ffn_spread"' not in text


def test_fixed_k_is_profiled_by_certainty_by_class_and_by_difficulty(fixed_page: Path) -> None:
    text = fixed_page.read_text(encoding="utf-8")
    figures_of = re.findall(r'<section id="compute".*?</section>', text, flags=re.S)[0]
    assert re.findall(r'<figure id="figure-(\w+)"', figures_of) == [
        "class_profile",
        "difficulty_curves",
    ]
    named = re.findall(r"<option[^>]*>(.*?)</option>", figures_of)
    assert {"router entropy, by lexer class", "margin, by lexer class"} <= set(named)
    assert any(name.startswith("gate mass, layer 1, ") for name in named)


def test_the_curves_of_certainty_are_those_of_each_measure_alone(
    fixed_trace: Path, fixed_page: Path
) -> None:
    curves = pl.read_parquet(fixed_page.with_name("trace_data") / "difficulty_curves.parquet")
    rows = difficulty_frame(open_trace(fixed_trace)).collect()
    assert curves["value"].n_unique() > 1
    for (value,), part in curves.group_by("value"):
        alone = difficulty_curves(rows, "ngram_loss", compute=str(value), resamples=200)
        alone = alone.filter(pl.col("layer").is_in(part["layer"].implode()))
        assert_frame_equal(part.drop("run", "value"), alone)


def test_a_bare_trace_makes_a_page_without_a_verdict(fixed_page: Path) -> None:
    text = words(fixed_page.read_text(encoding="utf-8"))
    assert "Verdict:" not in text
    assert "Which experts did the tokens of this trace go to?" in text
    assert "Model made up" in text
    assert "Documents 4" in text
    assert re.search(r"Loss \d\.\d{3} nats per token", text)


def test_blank_rows_of_a_map_of_pairs_are_explained_where_there_are_any(
    fixed_page: Path, tmp_path: Path
) -> None:
    busy = make_trace(tmp_path / "busy", Shape(layers=2, experts=4, documents=2, tokens=120))
    pages = {2: fixed_page, 0: write_report(busy, tmp_path / "busy.html")}
    for maps, page in pages.items():
        text = words(page.read_text(encoding="utf-8"))
        assert "in proportion to the product of the two loads" in text
        assert text.count("Blank rows and columns: experts that no token ran.") == maps


def test_runs_without_any_trace_make_a_page(tmp_path: Path) -> None:
    make_run(tmp_path / "dense", "dense", 1, 0, None)
    text = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Verdict:" not in words(text), "one run has no wall"
    assert re.findall(r'<figure id="figure-(\w+)"', text) == ["training_curves"]


def test_the_command_names_the_best_finished_run_of_each_sweep(tmp_path: Path) -> None:
    for name, losses in (("a", [3.2, 3.1]), ("b", [2.9])):
        (tmp_path / name).mkdir()
        for seed, loss in enumerate(losses):
            path = make_run(tmp_path / name / f"r{seed}", "topk", 2, seed, None) / "result.json"
            changed = {"loss": loss, "name": f"n{seed}"}
            path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        make_failed_run(tmp_path / name / "failed", "the loss is nan")
        write_plan(tmp_path / name, [])
    folders = [tmp_path / "a", tmp_path / "b"]
    page = write_report(folders, tmp_path / "page.html")
    lines = [line for folder in folders for line in _summary(folder, page)]
    assert lines == [
        "2 finished runs, lowest loss 3.1000 nats/token (n1)",
        "1 finished run, lowest loss 2.9000 nats/token (n0)",
    ]


def test_a_sweep_of_one_seed_cannot_tell(tmp_path: Path) -> None:
    for ratio in (1, 2, 4, 8, 16):
        make_run(tmp_path / f"r{ratio}", "topk", ratio, 0, None)
    text = words(write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Verdict: cannot tell" in text
    assert "each point is one seed, so there is no interval" in text


def test_the_same_sources_give_the_same_page(
    fixed_trace: Path, fixed_page: Path, tmp_path: Path
) -> None:
    again = write_report(fixed_trace, tmp_path / "trace.html", command="x").read_bytes()
    assert again == write_report(fixed_trace, tmp_path / "trace.html", command="x").read_bytes()


def test_the_given_command_is_the_one_in_the_captions(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", SMALL)
    text = write_report(trace, tmp_path / "p.html", command="make <demo>").read_text(
        encoding="utf-8"
    )
    assert text.count("make &lt;demo&gt;") >= 3


def test_a_folder_without_finished_runs_leaves_no_page(tmp_path: Path) -> None:
    make_failed_run(tmp_path / "runs" / "a", "the loss is nan")
    with pytest.raises(RunError, match="expected at least one finished run"):
        write_report(tmp_path / "runs", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_says_so_in_one_line(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"cannot write .*; try another folder or free some space"
    ) as error:
        write_report(trace, tmp_path / "file" / "page.html")
    assert "\n" not in str(error.value)


def test_a_page_of_a_sweep_of_many_runs_stays_under_the_limit(tmp_path: Path) -> None:
    make_sweep(tmp_path / "many", seeds=6, ratios=(1, 2, 4))
    assert write_report(tmp_path / "many", tmp_path / "p.html").stat().st_size < MAX_BYTES


def test_attention_sparsity_stands_beside_expert_sparsity_where_there_is_any(
    tmp_path: Path,
) -> None:
    dense = make_run(tmp_path / "a", "topk", 2, 0, None)
    assert "attention sparsity" not in words(
        write_report(dense, tmp_path / "dense.html").read_text(encoding="utf-8")
    )
    sparse = make_run(tmp_path / "b", "sparse", 2, 0, None)
    result = json.loads((sparse / "result.json").read_text()) | {
        "expert_sparsity": 0.9583,
        "attention_sparsity": 0.5614,
    }
    (sparse / "result.json").write_text(json.dumps(result))
    page = words(write_report([dense, sparse], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "expert sparsity attention sparsity" in page
    assert ".958 .561" in page.replace("0.958", ".958").replace("0.561", ".561")


def test_a_page_needs_no_torch(sweep: Path, tmp_path: Path) -> None:
    """Importing it, or scipy.stats, takes longer than drawing the page."""
    code = (
        "import sys; from moe_lab.report import write_report; "
        "write_report(sys.argv[1], sys.argv[2]); "
        "heavy = {'torch', 'scipy.stats', 'transformers', 'plotly.graph_objects'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(sweep), str(tmp_path / "report.html")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_last_lines_are_counted_beyond_those_shown(tmp_path: Path) -> None:
    runs = [
        RunRecord(
            tmp_path / str(number),
            RunState.FAILED,
            error=f"trouble {number}",
            last_lines=f"the end of {number}" if number else "",
        )
        for number in range(MAX_FAILURES + 4)
    ]
    found = failed_runs(Material(tuple(runs), ()))
    assert found is not None
    assert [lines for _, _, lines in found.shown] == [
        f"the end of {number}" for number in range(1, MAX_FAILURES + 1)
    ]
    assert found.left_out == 3
    assert failed_runs(Material(tuple(runs[:1]), ())) is None, "it left nothing to read"


@pytest.mark.parametrize("full", ["runs.parquet", "report.html"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "topk", 2, 0, None, [])
    out = tmp_path / "out"
    written = Path.write_bytes, Path.write_text

    def fill(path: Path, content: Any, *args: Any, **options: Any) -> int:
        if path.name.endswith(full):
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written[isinstance(content, str)](path, content, *args, **options)

    monkeypatch.setattr(Path, "write_bytes", fill)
    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(StorageError, match=rf"cannot write .*{full}: No space left"):
        write_report(tmp_path / "run", out / "report.html")
    assert not list(out.rglob(".tmp*"))
    assert not (out / "report.html").exists()
    monkeypatch.undo()
    (out / ".tmp-0badcafe-report.html").touch()  # what kill -9 left
    (out / "report_data" / ".tmp-0badcafe-load.parquet").touch()
    write_report(tmp_path / "run", out / "report.html")
    assert not list(out.rglob(".tmp*"))
