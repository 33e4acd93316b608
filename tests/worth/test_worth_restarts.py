"""Measurements that were stopped, also by ``kill -9``, go on with what they had measured."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused
from test_expert_worth import texts
from test_interventions import decoder

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.errors import AnalysisError
from moe_lab.worth import expert_losses, expert_scores, measures, pair_losses
from moe_lab.worth.ablation import Ablation
from moe_lab.worth.paired_passes import Untouched
from moe_lab.worth.worth_files import UNFINISHED

TESTS = Path(__file__).parent
KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_worth_restarts as here
from moe_lab.worth import measured_rows
from moe_lab.worth.paired_passes import Untouched

measured_rows.WRITE_SECONDS = 0.0
original, passes = Untouched.differences, []

def differences(self, *rest):
    if len(passes) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    passes.append(1)
    return original(self, *rest)

Untouched.differences = differences
here.ablation().run(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def _timed_once(monkeypatch):
    monkeypatch.setattr(measures, "TIMED_SECONDS", 1e-9)


def ablation():
    """Small enough that it takes a second."""
    torch.set_num_threads(1)
    options = {"experts": 2, "batch_tokens": 256, "curves": True, "pairs": 2}
    return Ablation(decoder(layers=1), texts(8), **options)


def count_passes(monkeypatch, stop=None):
    """A list that grows with each edited pass; ``KeyboardInterrupt`` after ``stop``."""
    original, passes = Untouched.differences, []

    def differences(self, *rest):
        if len(passes) == stop:
            raise KeyboardInterrupt
        passes.append(1)
        return original(self, *rest)

    monkeypatch.setattr(Untouched, "differences", differences)
    return passes


@pytest.mark.slow
def test_after_a_kill_among_the_pairs_nothing_is_measured_twice(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        every = count_passes(patch)
        whole = ablation().run(tmp_path / "whole")
    paths = [str(TESTS), str(TESTS.parent)]
    script = KILLED.format(paths=paths, number=len(every) - 3)
    command = [sys.executable, "-c", script, str(tmp_path / "cut")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    left = ablation().minutes(tmp_path / "cut")
    assert left["losses"] == left["scores"] == 0 < left["pairs"]
    with monkeypatch.context() as patch:
        passes = count_passes(patch)
        again = ablation().run(tmp_path / "cut")
    assert len(passes) == 3
    for name, table in whole.items():
        assert again[name].equals(table), name
    assert not (tmp_path / "cut" / UNFINISHED).exists()


def test_curves_go_on_where_they_stopped_and_the_plan_says_what_is_left(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        every = count_passes(patch)
        whole = ablation().run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_passes(patch, stop=14)
        with pytest.raises(KeyboardInterrupt):
            ablation().run(tmp_path / "cut")
    plans = [ablation().minutes(), ablation().minutes(tmp_path / "cut")]
    assert plans[1]["scores"] == 0 < plans[0]["scores"]
    with monkeypatch.context() as patch:
        passes = count_passes(patch)
        again = ablation().run(tmp_path / "cut")
    assert len(passes) == len(every) - 14
    assert again["curves"].equals(whole["curves"])


def test_sums_of_another_model_are_refused(tmp_path):
    path = tmp_path / "pairs.parquet"
    pair_losses(decoder(layers=1), texts(), [(0, 1, 2)], path=path)
    with refused("path", AnalysisError):
        pair_losses(decoder(), texts(), [(0, 1, 2)], path=path)
    scores = tmp_path / "scores.parquet"
    expert_scores(decoder(layers=1), texts(), path=scores)
    with refused("path", AnalysisError):
        expert_scores(decoder(layers=1), texts(3), path=scores)


@pytest.mark.parametrize("align", Align)
def test_windows_of_a_document_stop_and_go_on_and_sum_to_the_whole(tmp_path, monkeypatch, align):
    model, generator = decoder(), np.random.default_rng(0)  # context 32
    documents = [*texts(3), generator.integers(0, 40, 150)]
    classes = {"half": [np.where(np.arange(len(ids)) % 3, "a", "b") for ids in documents]}
    options = {"experts": [(0, 1), (1, 4)], "classes": classes, "align": align}
    whole = expert_losses(model, documents, batch_tokens=10**6, **options)
    path = tmp_path / "losses.parquet"
    for stop in (1, 2, 3):
        with monkeypatch.context() as patch:
            count_passes(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                expert_losses(model, documents, batch_tokens=64, path=path, **options)
    got = expert_losses(model, documents, batch_tokens=64, path=path, **options)
    keys = ["layer", "expert", "by", "class", "doc"]
    assert got.select(*keys, "tokens", "used").equals(whole.select(*keys, "tokens", "used"))
    for name in ("d_loss", "kl", "d_loss_used"):
        assert got[name].to_numpy() == pytest.approx(whole[name].to_numpy(), abs=1e-9)
    held = pl.read_parquet(path)
    assert held.height == got.height
