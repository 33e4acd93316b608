"""No host synchronisation in a training step, on fake CUDA tensors (fake_cuda.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest
import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
DATA_ON_CPU = {"router base": "numpy()", "router sinkhorn": "change = float("}
"""Routers that solve their assignment with values on the host, and the line that asks for them."""
NARROW = {"decoder, most at once", "backend cpu"}
"""Widths that ``grouped_mm`` does not take, and the backend for them."""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Step -> waits."""
    if torch.version.cuda is not None:
        pytest.skip("torch has its own CUDA")
    compiler = which("c++") or pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    libraries = f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH}/lib"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{TORCH}/include",
               str(HERE / "fake_cuda.cpp"), *libraries, "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    tests = HERE.parent
    paths = (tests.parent, HERE, tests, tests / "routing")
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda.py"), str(library)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["step"]: line["waits"] for line in lines}


@pytest.mark.slow
def test_a_training_step_waits_for_nothing(steps: dict[str, dict[str, int]]) -> None:
    """With the options of the decoder, every router and every backend for CUDA."""
    waits = {step: found for step, found in steps.items() if found}
    assert set(waits) == {"logged", *NARROW, *DATA_ON_CPU}
    for step, line in DATA_ON_CPU.items():
        assert all(line in what for what in waits[step])
    for step in NARROW:
        assert all("slots.ends.tolist()" in what for what in waits[step])
    assert len(steps) > 40


@pytest.mark.slow
def test_a_logged_step_waits_three_times_for_any_number_of_layers(
    steps: dict[str, dict[str, int]],
) -> None:
    """For the losses, the norm of the gradients, and the readings of all layers together."""
    files = sorted(what.split(" at ")[1].split(":")[0] for what in steps["logged"])
    assert files == ["readings.py", "run.py", "run.py"]
    assert [n for what, n in steps["logged"].items() if "readings.py" in what] == [1]
