"""What every test shares: one thread, no network, no deadlines, the place of published data."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "2")

import pytest
from hypothesis import HealthCheck, settings
from registries import registries_as_before

# A busy machine makes an example slow, not wrong. Every run has the same examples;
# ``pytest --hypothesis-profile=search`` tries others.
any_speed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", any_speed)
settings.register_profile("moe_lab", any_speed, derandomize=True, database=None)
settings.load_profile("moe_lab")

if TYPE_CHECKING:
    from s3_server import S3Server

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test and its fixtures draw the same numbers, whatever this process did before."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _own_registries() -> Iterator[None]:
    """What a file's tests register, plugins included, is no part of the next file's tests."""
    with registries_as_before():
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The published data (``MOE_LAB_DATA``, default ``../shared/data``); skips without it."""
    folder = Path(os.environ.get("MOE_LAB_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs the published data: no folder {folder}; set MOE_LAB_DATA")
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "Iterator[S3Server]":
    """An S3 server with the empty bucket ``bucket``, for this process and those it starts."""
    for package in ("s3fs", "moto", "flask_cors"):
        pytest.importorskip(package, reason="needs s3fs and moto's server (group dev)")
    from s3_server import serve

    with serve() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server
