"""Files of runs and sweeps with values of other types: a right result, or one error of ours.

python tests/test_run_files_fuzz.py 10000    # so many mutations; CI makes a few hundred
"""

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_lab.errors import MoELabError
from moe_lab.report.sources import gather, run_table
from moe_lab.runs import read_runs
from moe_lab.scaling import read_runs as read_results
from moe_lab.sweeps import status
from moe_lab.training import RunConfig

FIXTURE = Path(__file__).parent / "fixtures" / "sweep"
FILES = ("sweep.json", "*/status.json", "*/result.json", "*/config.json")
DEEP: Any = json.loads("[" * 500 + "]" * 500)
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2.5, 10**30, 10**400, 1e308, float("nan"), float("inf"), "", "x", "5",
    "\ud800", "\u202e<script>", "../../x", "/abs", "a" * 5000, [], [1], ["x"], [[[]]], {}, {"a": 1},
    {"hash": {}}, DEEP,
)  # fmt: skip
TEXTS = (
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a": ' + b"9" * 5000 + b"}",
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def mutate(path: Path, rng: random.Random) -> str:
    """Change one file; what was done, for the message of a failure."""
    if rng.random() < 0.1:
        text = rng.choice(TEXTS)
        path.write_bytes(text)
        return f"{path.name} = {text[:20]!r}"
    values = json.loads(path.read_text())
    container, key = rng.choice(list(places(values)))
    if rng.random() < 0.2:
        del container[key]
        done = f"{path.name}: no {key!r}"
    else:
        container[key] = rng.choice(VALUES)
        done = f"{path.name}: {key!r} = {str(container[key])[:40]!r}"
    path.write_text(json.dumps(values))
    return done


def read_everything(sweep: Path) -> None:
    readers = (
        status,
        lambda folder: run_table(gather(folder).runs),
        read_results,
        lambda folder: [run.config for run in read_runs(folder).values()],
        lambda folder: [
            RunConfig.from_dict(run.config).hash() for run in read_runs(folder).values()
        ],
    )
    for read in readers:
        try:
            read(sweep)
        except MoELabError as error:
            assert "\n" not in str(error)  # noqa: PT017  (an error is allowed, not expected)


def fuzz(count: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        sweep = Path(folder) / "sweep"
        shutil.copytree(FIXTURE, sweep)
        for trace in sweep.glob("*/trace"):
            shutil.rmtree(trace)
        originals = {
            path: path.read_bytes() for pattern in FILES for path in sorted(sweep.glob(pattern))
        }
        by_pattern = [sorted(sweep.glob(pattern)) for pattern in FILES]
        for _ in range(count):
            path = rng.choice(rng.choice(by_pattern))
            what = mutate(path, rng)
            try:
                read_everything(sweep)
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            path.write_bytes(originals[path])


@pytest.mark.parametrize("seed", range(4))
def test_values_of_other_types_give_one_error_of_ours(seed: int) -> None:
    fuzz(60, seed)


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), seed=random.randrange(10**9))
