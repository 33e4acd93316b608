"""Batches and the learning-rate schedule are pure functions of the step."""

from itertools import pairwise

import numpy as np
import pytest
from refusals import refused

from moe_lab.errors import CorpusError
from moe_lab.training import OptimizerConfig
from moe_lab.training.data import Batches
from moe_lab.training.optimizer import lr_factor


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order() -> None:
    batches = Batches(np.arange(101), batch_size=5, seq_length=10, seed=3)
    assert batches.num_windows == 10
    first = [int(row[0]) for step in (0, 1) for row in batches(step)]
    second = [int(row[0]) for step in (2, 3) for row in batches(step)]
    assert sorted(first) == sorted(second) == list(range(0, 100, 10))
    assert first != second


def test_a_batch_depends_on_its_step_alone() -> None:
    one, other = (Batches(np.arange(500), 4, 7, seed=1) for _ in range(2))
    later = [one(step) for step in range(40)]
    assert all((other(step) == later[step]).all() for step in (39, 0, 17, 39))


def test_inputs_and_targets_are_neighbours_in_the_stream() -> None:
    batch = Batches(np.arange(500), 4, 7, seed=1)(3)
    assert batch.shape == (4, 8)
    assert (batch[:, 1:] == batch[:, :-1] + 1).all()


def test_too_short_a_stream_is_refused() -> None:
    with refused("text", CorpusError):
        Batches(np.arange(9), 4, 10, seed=0)


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    config = OptimizerConfig(warmup_fraction=0.1, decay_fraction=0.2, final_lr_ratio=0.1)
    factors = [lr_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert all(later > earlier for earlier, later in pairwise(factors[:10]))
    assert factors[10:80] == [1.0] * 70
    assert all(later < earlier for earlier, later in pairwise(factors[80:]))
    assert factors[99] == pytest.approx(0.1 + 0.9 / 21)
