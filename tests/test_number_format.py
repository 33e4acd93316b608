"""Numbers and paths as text: no sign before zero, no letter before its size, no silent cut."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_lab
from moe_lab.number_format import decimal, magnitude, short_path, whole
from moe_lab.routing.config import ScoreFunc
from moe_lab.trace.score_spread import spread_of_logits


@pytest.mark.parametrize("value", [-0.0, 0.0, -0.0001, np.float32(-1e-9)])
def test_what_rounds_to_zero_has_no_sign(value) -> None:
    assert decimal(value) == "0.000"
    assert whole(value) == "0"
    assert magnitude(-0.0) == "0"
    assert decimal(-0.25, 2) == "\u22120.25"


def test_a_number_beyond_all_use_is_short() -> None:
    assert decimal(1e308) == "1.000e+308"
    assert decimal(999e12, 0) == "999,000,000,000,000"


def test_no_sentence_prints_a_signed_zero() -> None:
    """A format with a sign names ``z``, which takes the sign of what rounds to zero."""
    for path in Path(moe_lab.__file__).parent.rglob("*.py"):
        lines = path.read_text().splitlines()
        python = [line for line in lines if "%{" not in line]  # the formats of plotly have no z
        assert not [line for line in python if re.search(r":\+\.\df\}", line)], path


def test_the_entropy_of_a_certain_router_is_a_zero_without_sign() -> None:
    logits = torch.tensor([[5e3, 0.0, 0.0], [float("nan"), 0.0, 0.0], [1e4, -torch.inf, 0.0]])
    entropy = spread_of_logits(logits, torch.tensor([[0], [0], [0]]), ScoreFunc.SOFTMAX).entropy
    assert entropy[[0, 2]].tolist() == [0.0, 0.0]
    assert not entropy[[0, 2]].signbit().any()
    assert entropy[1].isnan()


def test_a_path_is_whole_or_shows_that_it_was_cut() -> None:
    assert short_path("runs/first") == "runs/first"
    assert short_path("/home/someone/runs/first/sweep", 20) == "\u2026/runs/first/sweep"
    assert short_path("/a/" + "x" * 60, 20) == "\u2026/" + "x" * 60
