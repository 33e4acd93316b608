"""The mean loss of a trace and its interval."""

import numpy as np
import pytest

from moe_lab.analysis import token_loss


def test_the_mean_is_over_the_tokens_that_have_a_loss(make_trace):
    trace = make_trace(
        np.zeros((4, 1), dtype=int), 2, doc=[0, 0, 1, 1], pos=[0, 1, 0, 1],
        loss=[None, 1.0, 2.0, 6.0],
    )  # fmt: skip
    assert token_loss(trace).row(0) == (4, 2, 3, pytest.approx(3.0), None, None)


def test_the_interval_is_of_documents(make_trace):
    doc = np.repeat(np.arange(20), 50)
    loss = doc.astype(float)
    trace = make_trace(
        np.zeros((1000, 1), dtype=int), 2, doc=doc, pos=np.tile(np.arange(50), 20), loss=loss
    )
    row = token_loss(trace).row(0, named=True)
    half = 1.96 * loss.std() / np.sqrt(20)
    assert row["loss"] == pytest.approx(9.5)
    assert row["hi"] - row["lo"] == pytest.approx(2 * half, rel=0.25)


def test_a_trace_without_losses_has_none(make_trace):
    trace = make_trace(np.zeros((3, 1), dtype=int), 2)
    assert token_loss(trace)["loss"][0] is None
