"""Fixtures of the sweeps' tests."""

import pytest
from fake_launcher import FakeLauncher, Times

from moe_lab.sweeps.admission import Admission
from moe_lab.sweeps.launchers import LAUNCHERS


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    """What is built for ``launcher="ray"``."""
    fake = FakeLauncher()
    monkeypatch.setitem(LAUNCHERS, "ray", lambda *_: fake)
    return fake


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """A clock for ``max_hours`` that a test sets by what has happened."""
    times = Times()
    monkeypatch.setattr(Admission, "out_of_time", property(lambda _: times.over()))
    return times
