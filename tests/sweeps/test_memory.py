"""The memory a run is expected to need, against what a real run took, and how many runs that lets
through.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from stub_trainer import STUB, StubRun, stub_sweep

from moe_lab import free_memory
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import Job, memory, run
from moe_lab.sweeps.admission import PATIENCE, Admission
from moe_lab.sweeps.memory import run_memory, too_large
from moe_lab.text import TextConfig, load_tokens
from moe_lab.training import RunConfig

PEAK = """
import json, sys
from pathlib import Path
from typing import Any
from moe_lab.sweeps.launchers import train_run
train_run(json.loads(sys.argv[1]), Path(sys.argv[2]))
lines = open("/proc/self/status")
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def make(corpus: str = "stdlib", **changes) -> RunConfig:
    """Two layers of 4 experts on bytes."""
    experts, width = changes.pop("num_experts", 4), changes.pop("d_model", 32)
    moe = MoEConfig(
        d_model=width,
        d_expert=changes.pop("d_expert", 32),
        router=RouterConfig(num_experts=experts, top_k=2),
    )
    shape = {
        "vocab_size": 257,
        "num_layers": 2,
        "d_model": width,
        "context_length": 128,
        "moe": moe,
    }
    model = DecoderConfig(**shape | changes.pop("model", {}))
    text = TextConfig(corpus=corpus, tokenizer="byte")  # type: ignore[arg-type]
    values: dict[str, Any] = {"batch_size": 2, "seq_length": 128, "eval_tokens": 500}
    return RunConfig(model=model, text=text, **values | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(30):
        (folder / f"{index}.txt").write_text(f"document {index} says {index * index}. " * 40)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ({"num_experts": 64, "d_model": 256, "d_expert": 256}, "parameters"),
        ({"batch_size": 64, "d_model": 128, "d_expert": 64}, "activations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_real_run_peaks_near_its_estimate_and_not_above(
    corpus: Path, tmp_path: Path, shape: dict, most: str
):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc for the peak of a process")
    tiny = make(str(corpus), **shape)
    tiny = tiny.replace(text=tiny.text.resolve(), train_tokens=3 * tiny.tokens_per_step)
    command = [sys.executable, "-c", PEAK, json.dumps(tiny.to_dict()), str(tmp_path / "run")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak / 1.1 < run_memory(tiny) < 1.5 * peak, most


def test_the_ids_of_a_text_are_part_of_the_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MOE_LAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for index in range(4):
        (tmp_path / "text" / f"{index}.txt").write_text(f"{index} " + "some text " * 100_000)
    run = make(str(tmp_path / "text"))
    run = run.replace(text=run.text.resolve())
    unknown = run_memory(run)  # nobody has made its ids yet
    ids = load_tokens(run.text).ids
    assert 2 < (run_memory(run) - unknown) / ids.nbytes < 3
    cuda = run.replace(device="cuda")
    assert run_memory(cuda) == run_memory(cuda.replace(text=run.text.replace(corpus_hash=None)))


def test_a_parameter_costs_weight_gradient_and_two_moments():
    one, more = make(num_experts=8, d_model=256), make(num_experts=64, d_model=256)
    experts = 2 * 56 * 3 * 256 * 32
    assert run_memory(more) - run_memory(one) > 16 * experts
    assert run_memory(more) - run_memory(one) < 24 * experts


def test_logits_and_activations_grow_with_the_micro_batch_and_not_with_the_batch():
    plain, split = make(batch_size=256), make(batch_size=256, grad_accumulation=16)
    assert (
        run_memory(plain) - run_memory(split) > 4 * 3 * 240 * 128 * 257
    )  # three copies of the logits of 240 sequences
    assert run_memory(make(batch_size=16)) == run_memory(split)


@pytest.mark.parametrize(
    "extra",
    [
        {"num_layers": 4},
        {"vocab_size": 5000},
        {"tie_embeddings": False},
        {"num_dense_layers": 1, "d_dense": 4096},
    ],
)
def test_whatever_adds_tensors_adds_memory(extra: dict):
    assert run_memory(make(batch_size=32, model=extra)) > run_memory(make(batch_size=32))


def test_a_gpu_run_needs_no_interpreter_on_the_device():
    assert run_memory(make(device="cuda")) < run_memory(make()) + memory.CUDA_CONTEXT_BYTES


def test_another_trainers_run_says_itself_what_it_needs():
    assert run_memory(StubRun(memory_bytes=7)) == 7  # type: ignore[arg-type]


def test_free_memory_is_the_smaller_of_the_kernels_and_the_groups(tmp_path: Path):
    info, groups = tmp_path / "meminfo", tmp_path / "groups"
    groups.mkdir()
    info.write_text("MemTotal:  16 kB\nMemAvailable:    8 kB\n")
    assert free_memory._free_here(info, groups) == 8192
    (groups / "memory.max").write_text("6000\n")
    (groups / "memory.current").write_text("2000\n")
    assert free_memory._free_here(info, groups) == 4000
    (groups / "memory.max").write_text("max\n")
    assert free_memory._free_here(info, groups) == 8192
    assert free_memory._free_here(tmp_path / "none", groups) is None


def job(name: str, need: int) -> Job:
    return Job(name, name, Path(name), {}, memory_bytes=need)


def test_runs_start_while_their_sum_fits_and_a_small_one_goes_past_a_large_one():
    large, small, tiny = job("large", 6), job("small", 3), job("tiny", 2)
    admission = Admission(memory=10)
    assert admission.next([large, small, tiny], []) == large
    assert admission.next([large, small, tiny], [large]) == small
    assert admission.next([large, tiny], [large, small]) is None
    assert admission.next([large, tiny], [small]) == large


def test_one_run_always_starts_however_large():
    assert Admission(memory=10).next([job("huge", 11)], []) is not None
    assert Admission(memory=10).next([job("huge", 11)], [job("tiny", 1)]) is None


def test_small_runs_do_not_keep_a_large_one_waiting_for_ever():
    admission, large = Admission(memory=10), job("large", 9)
    line = [large, *(job(str(index), 1) for index in range(2 * PATIENCE))]
    started = 0
    while admission.next(line, [job("other", 2)]):
        started += 1
    assert started == PATIENCE
    assert admission.next(line, []) == large


def test_a_sweep_keeps_within_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("moe_lab.sweeps.running.free_memory", lambda device: 10)
    runs = [
        StubRun(name=str(need), seed=index, memory_bytes=need, steps=4)
        for index, need in enumerate((6, 6, 5, 4, 3, 2))
    ]
    running: dict[str, int] = {}
    seen: list[int] = []
    lock = threading.Lock()

    class Watch:
        def opened(self, *_): ...
        def say(self, line): ...
        def refresh(self, active): ...
        def close(self): ...
        def started(self, job):
            with lock:
                running[job.run] = job.memory_bytes
                seen.append(sum(running.values()))

        def ended(self, job, ending):
            running.pop(job.run)

    monkeypatch.setattr("moe_lab.sweeps.running.build_view", lambda *_: Watch())
    assert run(stub_sweep(*runs), tmp_path, workers=4, trainer=STUB).complete
    assert 6 < max(seen) <= 10


def test_a_run_that_fits_nowhere_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("moe_lab.sweeps.running.free_memory", lambda device: 10**9)
    assert run(
        stub_sweep(StubRun(name="huge", memory_bytes=2 * 10**9)), tmp_path, trainer=STUB
    ).complete
    line = (
        "huge: expected to need 2.0 GB of the 1.0 GB that runs may take here; starts "
        "alone and may run out of memory; "
    )
    assert line + "try a larger grad_accumulation" in capsys.readouterr().out.splitlines()
    assert too_large({"a": 1, "b": 3, "c": 2}, 1).startswith("b and 1 more: ")
    assert too_large({"a": 1}, 1) == ""
