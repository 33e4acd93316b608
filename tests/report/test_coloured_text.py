"""The coloured text: tints and their legend, visible signs, and what the script looks up."""

import base64
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from report_fixtures import CODE, Shape, make_trace

from moe_lab.report.frames import Frames
from moe_lab.report.sources import NamedTrace
from moe_lab.report.text_section import NO_SLOT, SLOT_BUDGET, coloured_text, show, tint
from moe_lab.trace import open_trace


def test_few_integers_get_a_tint_each() -> None:
    codes, labels = tint(np.array([2.0, 0, 1, 2, np.nan]))
    assert codes == "6036-"
    assert labels == {"0": "0", "3": "1", "6": "2", "-": "no value"}


def test_a_tint_s_label_is_the_extent_of_its_values() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=500)
    codes, labels = tint(values)
    assert list(labels) == list("0123456")
    ends = []
    for code, label in labels.items():
        inside = values[np.array([own == code for own in codes])]
        assert label == f"{inside.min():.2f} to {inside.max():.2f}"
        ends += [inside.min(), inside.max()]
    assert ends == sorted(ends)


def test_means_over_layers_are_not_split_by_rounding() -> None:
    thirds = np.array(
        [0.1 + 0.2, 0.3, 1 / 3, 1 - 2 / 3, 1.0, 4 / 3, 1 + 1 / 3, 2.0, 7 / 3, 8 / 3, 3.0]
    )
    codes, _ = tint(thirds)
    assert codes[2] == codes[3]
    assert codes[5] == codes[6]


def test_one_value_and_no_value_are_possible() -> None:
    assert tint(np.array([1.5, 1.5])) == ("00", {"0": "1.50"})
    assert tint(np.array([np.nan])) == ("-", {"-": "no value"})


@pytest.mark.parametrize(
    ("text", "shown", "label"),
    [
        ("def ", "def ", ""),
        ("\n    ", "\n    ", "newline 4 spaces"),
        ("\x00a\u202e", "␀a[U+202E]", ""),
        ("\t", "\t", "tab"),
    ],
)
def test_no_character_can_rearrange_the_page(text: str, shown: str, label: str) -> None:
    token = show(text)
    assert (token.text, token.label) == (shown, label)


def test_the_lookup_holds_the_slots_of_the_trace(tmp_path: Path) -> None:
    trace = open_trace(
        make_trace(
            tmp_path / "t",
            Shape(layers=2, experts=4, zero_experts=2, top_k=3, documents=3, tokens=40),
        )
    )
    shown = coloured_text(NamedTrace("t", trace), Frames(), fixed=False)
    assert shown is not None
    lookup = shown.lookup
    size = len(lookup["token"])
    experts = np.frombuffer(base64.b64decode(lookup["experts"]), "<u2").reshape(size, 2, 3)
    weights = (
        np.frombuffer(base64.b64decode(lookup["weights"]), "u1").reshape(size, 2, 3)
        / 255
        * lookup["largestWeight"]
    )
    routing = trace.routing.collect()
    for index in (0, 17, size - 1):
        key = (pl.col("doc") == lookup["doc"][index]) & (pl.col("pos") == lookup["pos"][index])
        for layer in (0, 1):
            row = routing.filter(key & (pl.col("layer") == layer)).row(0, named=True)
            assert [expert for expert in experts[index, layer] if expert != NO_SLOT] == row[
                "experts"
            ]
            np.testing.assert_allclose(
                weights[index, layer][: len(row["weights"])],
                row["weights"],
                atol=lookup["largestWeight"] / 500,
            )
    assert lookup["firstZero"] == [4, 4]


def test_the_text_is_the_document_from_its_beginning(tmp_path: Path) -> None:
    trace = open_trace(
        make_trace(tmp_path / "t", Shape(layers=1, documents=1, tokens=60), documents=(CODE,))
    )
    shown = coloured_text(NamedTrace("t", trace), Frames(), fixed=True)
    assert shown is not None
    assert CODE.startswith("".join(token.text for token in shown.documents[0].tokens))
    assert [mode.name for mode in shown.modes] == ["router entropy in nats", "loss in nats"]


def test_colours_are_the_counts_of_the_trace_layer_by_layer(tmp_path: Path) -> None:
    trace = open_trace(
        make_trace(
            tmp_path / "t",
            Shape(layers=2, experts=4, zero_experts=4, top_k=2, documents=1, tokens=50),
        )
    )
    shown = coloured_text(NamedTrace("t", trace), Frames(), fixed=False)
    assert shown is not None
    second = next(mode for mode in shown.modes if mode.name == "ffn_count, layer 1")
    label = {code: int(text.split()[0]) for code, text in second.legend}
    counts = (
        trace.routing.filter(pl.col("layer") == 1, pl.col("pos") > 0)
        .sort("pos")
        .collect()["ffn_count"]
        .to_list()
    )
    assert [label[code] for code in second.codes] == counts


def test_a_deep_model_shows_fewer_tokens(tmp_path: Path) -> None:
    trace = open_trace(
        make_trace(tmp_path / "t", Shape(layers=60, experts=12, top_k=12, documents=3, tokens=400))
    )
    shown = coloured_text(NamedTrace("t", trace), Frames(), fixed=True)
    assert shown is not None
    assert 120 <= len(shown.lookup["token"]) <= SLOT_BUDGET / (60 * 12)


def test_a_trace_without_text_is_left_out(tmp_path: Path) -> None:
    trace = open_trace(
        make_trace(tmp_path / "t", Shape(layers=1, documents=1, tokens=20), documents=(CODE,))
    )

    class Textless:
        tokens, meta, routing = trace.tokens.drop("text"), trace.meta, trace.routing

    assert coloured_text(NamedTrace("t", Textless()), Frames(), fixed=True) is None  # type: ignore[arg-type]


def test_a_document_has_the_name_of_its_file_where_the_trace_has_it(tmp_path: Path) -> None:
    folder = make_trace(tmp_path / "t", Shape())
    unnamed = coloured_text(NamedTrace("t", open_trace(folder)), Frames(), fixed=False)
    assert unnamed is not None
    assert all(document.name.startswith("Document ") for document in unnamed.documents)
    number = unnamed.documents[0].name.split(",")[0]
    for part in (folder / "tokens").rglob("*.parquet"):
        frame = pl.read_parquet(part)
        frame.with_columns(document=pl.lit("notes/a\u202e.txt")).write_parquet(part)
    trace = open_trace(folder, verify=False)
    named = coloured_text(NamedTrace("t", trace), Frames(), fixed=False)
    assert named is not None
    assert named.documents[0].name.startswith(f"{number}, notes/a\\u202e.txt, tokens 1 to ")
