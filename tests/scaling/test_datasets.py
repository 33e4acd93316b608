"""Loaders of published data: found, checked, or refused in one line."""

import gzip

import polars as pl
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.scaling import DATASETS, datasets, published


@pytest.mark.data
@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_is_the_file_it_says_and_fills_our_columns(scaling_data, name):
    frame = published(name, scaling_data)
    assert frame.height > 0
    filled = {
        "loss",
        "active_params",
        "total_params",
        "tokens",
        "ratio",
        "compute",
        "learning_rate",
        "seed",
    } & set(frame.columns)
    assert filled
    for column in filled - {"seed"}:
        assert (frame[column] > 0).all() or column in ("tokens", "compute"), (
            "step 0 of a curve has seen no token"
        )


@pytest.mark.data
def test_rows_are_as_many_as_published(scaling_data):
    rows = {
        "clark": 223,
        "clark_curves": 5799,
        "epoch": 245,
        "gadre": 104,
        "steplaw": 708,
        "misfit": 51,
        "ludziejewski_runs": 270,
    }
    assert {name: published(name, scaling_data).height for name in rows} == rows


@pytest.mark.data
def test_the_environment_names_the_folder_and_a_file_stands_alone(scaling_data, monkeypatch):
    monkeypatch.setenv("MOE_LAB_DATA", str(scaling_data))
    found = published("kimi")
    alone = published("kimi", file=scaling_data / "scaling" / DATASETS["kimi"].file)
    assert found.equals(alone)
    assert found["ratio"].to_list() == [8, 16, 32, 48]


def test_every_source_states_its_licence():
    table = datasets()
    assert table.columns == ["name", "file", "source", "licence", "redistributable", "sha256"]
    assert (table["licence"].str.len_chars() > 0).all()
    assert set(table.filter(~pl.col("redistributable"))["name"]) == {"epoch", "steplaw", "misfit"}
    assert table["sha256"].str.len_chars().unique().to_list() == [64]


def test_a_missing_or_other_file_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MOE_LAB_DATA", raising=False)
    with refused("data_dir", AnalysisError):
        published("clark")
    with refused("file", AnalysisError):
        published("clark", tmp_path)
    with refused("name", AnalysisError):
        published("clarke", tmp_path)
    (tmp_path / "marin_grug_isoflop_optima.csv").write_text("budget_flops,paloma_macro\n1e18,3.5\n")
    with refused("sha256", AnalysisError):
        published("marin", tmp_path)
    assert published("marin", tmp_path, check=False)["loss"].to_list() == [3.5]
    (tmp_path / "marin_grug_isoflop_optima.csv").write_text("budget,loss\n1e18,3.5\n")
    with refused("columns", AnalysisError):
        published("marin", tmp_path, check=False)


def test_a_truncated_archive_is_told_in_one_line(tmp_path):
    whole = gzip.compress(b"hyper_id,step\n0,1\n" * 1000)
    (tmp_path / "clark_curves.csv.gz").write_bytes(whole[:-20])
    with refused("file", AnalysisError):
        published("clark_curves", tmp_path)
