"""The command line as a user meets it: quick help, one line and exit code 2 for each mistake, JSON
for machines.
"""

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moe_lab.cli import COMMANDS, command_parsers, main

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "experiments" / "sparsity_wall.py"


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


def moe_lab(*arguments: object, cache: Path | None = None) -> Ended:
    """The command in this process (workers of a sweep are processes of their own)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        if cache is not None:
            patch.setenv("MOE_LAB_CACHE", str(cache))
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


def fails(*arguments: object, cache: Path | None = None) -> str:
    """The one line of a command that must end with exit code 2."""
    result = moe_lab(*arguments, cache=cache)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma(", ")", "def", "return", "1", "\n"]
    for index in range(20):
        (folder / f"doc{index}.txt").write_text(f"{index} " + " ".join(rng.choice(words, size=150)))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A recipe of two runs of a few steps, one with zero-compute experts."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(
        "from experiments_sparsity_wall import SHAPES, sweep as wall\n"
        "from moe_lab.sweeps import SweepConfig\n"
        "PRESETS = ('tiny',)\n"
        "def sweep(preset, *, seed=0, device='cpu'):\n"
        "    runs = [run.replace(train_tokens=4096, eval_tokens=2000, eval_excerpt_tokens=64)\n"
        "            for run in wall('demo', seed=seed, device=device).runs\n"
        "            if run.seed == seed and run.ratio in (1.0, 2.0, 8.0)]\n"
        "    return SweepConfig(name='tiny', question='?', preset=preset, runs=tuple(runs))\n"
    )
    (path.parent / "experiments_sparsity_wall.py").write_text(RECIPE.read_text())
    path.write_text(f"import sys; sys.path.insert(0, {str(path.parent)!r})\n" + path.read_text())
    return path


def test_help_loads_neither_torch_nor_scipy_nor_plotly() -> None:
    code = (
        "import sys\nfrom moe_lab.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'scipy', 'plotly', 'polars', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().endswith("[]")
    for command in (
        "demo",
        "sweep",
        "train",
        "trace",
        "scaling",
        "difficulty",
        "report",
        "count",
        "doctor",
    ):
        assert command in result.stdout


@pytest.mark.parametrize(
    "command",
    ["demo", "sweep", "train", "trace", "scaling", "difficulty", "report", "count", "doctor"],
)
def test_every_command_has_help_without_torch(command: str) -> None:
    code = "import sys\nfrom moe_lab.cli import main\n"
    code += f"try:\n    main(['{command}', '--help'])\nfinally:\n"
    code += "    assert 'torch' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"moe-lab {command}" in result.stdout


def parsers() -> Iterator[argparse.ArgumentParser]:
    """That of every command, and of its subcommands."""
    for name in COMMANDS:
        _, parser = command_parsers(name)
        yield parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def example_lines(parser: argparse.ArgumentParser) -> list[str]:
    head, *lines = (parser.epilog or "").splitlines()
    assert head == "examples:", parser.prog
    return [line.strip() for line in lines]


def test_every_command_has_examples_that_parse() -> None:
    for parser in parsers():
        lines = example_lines(parser)
        assert lines, parser.prog
        for line in lines:
            assert line.startswith(parser.prog), line
            _, command, *arguments = shlex.split(line)
            command_parsers(command)[1].parse_args(arguments)
        assert "\nexamples:\n  moe-lab" in parser.format_help()


CHEAP = ("count", "list", "doctor", "scaling step")


@pytest.mark.parametrize("command", CHEAP)
def test_examples_that_need_no_files_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    parser = next(one for one in parsers() if one.prog == f"moe-lab {command}")
    for line in example_lines(parser):
        if "runs/" not in line:
            result = moe_lab(*shlex.split(line)[1:])
            assert result.returncode == 0, (line, result.stderr)
            assert result.stdout


def test_help_says_each_default_once() -> None:
    for parser in parsers():
        text = " ".join(parser.format_help().split())
        assert not re.search(r"default: (None|False|\[\])|\(default[^()]*\) \(default", text), text


def test_a_recipe_alone_is_planned_and_not_run(
    recipe: Path, corpus: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = [recipe, "--corpus", corpus, "--vocab-size", 280, "--out", out]
    result = moe_lab("sweep", *arguments, cache=cache)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split("\t")[:3] == ["run", "name", "arm"]
    assert "4 runs, " in lines[5]
    assert lines[-1].startswith("next: moe-lab sweep run ")
    assert not out.exists()


@pytest.mark.parametrize(("answer", "runs"), [("y", True), ("", False), ("n", False)])
def test_on_a_terminal_a_recipe_alone_asks(
    answer: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_lab import sweeps
    from moe_lab.commands import sweep

    frame = pl.DataFrame({"name": ["a"]})
    monkeypatch.setattr(sweeps, "plan", lambda *_, **__: frame)
    monkeypatch.setattr(sweeps, "plan_rows", lambda _: [])
    monkeypatch.setattr(sweeps, "plan_totals", lambda _: "1 run")
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: answer)
    args = argparse.Namespace(json=False, recipe=RECIPE)
    assert sweep._confirmed(args, None) is runs  # type: ignore[arg-type]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_that_does_not_fit_into_memory_is_one_line(corpus: Path, cache: Path) -> None:
    line = fails(
        "train", "--corpus", corpus, "--tokenizer", "byte", "--experts", 100_000_000, cache=cache
    )
    assert re.search(r"within the [\d,.]+ GB of memory .* one that needs [\d,.]+ GB", line)


def test_an_unknown_command_or_option_is_one_line() -> None:
    assert fails("tran").endswith("got 'tran'; try train or trace")
    assert "got --colour; try moe-lab doctor --help" in fails("doctor", "--colour")
    assert fails("train", "--tokns=3").endswith("got --tokns=3; try --tokens or --top-k")
    assert fails("train", "--on-alarm", "stopp").endswith("got 'stopp'; try stop")
    assert "expected a value after --tokens, got none" in fails("train", "--tokens")
    assert "expected a value after --out, got an empty one" in fails("train", "--out", "")
    assert "expected a value after --out, got an empty one" in fails("train", "--out=")


def test_doctor_speaks_json() -> None:
    result = moe_lab("doctor", "--json")
    found = json.loads(result.stdout)
    assert found["packages"]["torch"]
    assert found["corpus"].startswith("stdlib:")
    assert found["tested"]["transformers"][0] <= found["tested"]["transformers"][1]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(found["extras"]) == set(project["optional-dependencies"])


@pytest.mark.slow
def test_a_sweep_runs_reports_and_is_not_trained_twice(
    recipe: Path, corpus: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = [
        "sweep",
        "run",
        recipe,
        "--preset",
        "tiny",
        "--corpus",
        corpus,
        "--vocab-size",
        280,
        "--out",
        tmp_path / "out",
        "--json",
    ]
    first = moe_lab(*arguments, cache=cache)
    assert first.returncode == 0, first.stderr
    outcome = json.loads(first.stdout)
    assert len(outcome["finished"]) == 4
    assert outcome["verdict"]["verdict"] == "cannot tell"
    page = Path(outcome["report"])
    assert page.exists()
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")
    }
    assert len(stamps) == 4
    assert moe_lab(*arguments, cache=cache).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    status = json.loads(moe_lab("sweep", "status", tmp_path / "out", "--json").stdout)
    assert {row["state"] for row in status} == {"finished"}

    run = next(
        path.parent
        for path in stamps
        if json.loads((path.parent / "result.json").read_text())["arm"] == "zero"
    )
    text = tmp_path / "one.txt"
    text.write_text("def gamma(alpha): return 1 <script>")
    traced = moe_lab("trace", run, "--text", text, "--out", tmp_path / "trace", "--json")
    assert traced.returncode == 0, traced.stderr
    assert json.loads(traced.stdout)["documents"] == 1
    rows = pl.read_parquet(
        tmp_path / "trace" / "routing" / "**" / "*.parquet", hive_partitioning=True
    )
    assert rows["layer"].n_unique() == 3
    reported = moe_lab("report", run, "--out", tmp_path / "page.html", "--json")
    assert reported.returncode == 0, reported.stderr
    assert json.loads(reported.stdout)["bytes"] > 1000


def test_train_takes_flags_and_writes_a_run(corpus: Path, cache: Path, tmp_path: Path) -> None:
    result = moe_lab(
        "train", "--corpus", corpus, "--tokenizer", "byte", "--tokens", 2048, "--experts", 4,
        "--zero-experts", 2, "--top-k", 3,
        "--set", "model.num_layers=1", "--out", tmp_path / "run", "--json", cache=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["num_experts"], record["num_zero_experts"], record["target_ffn_count"]) == (
        4,
        2,
        2.0,
    )
    assert (tmp_path / "run" / "done").exists()
    assert "expected --set FIELD=VALUE" in fails(
        "train", "--corpus", corpus, "--set", "model.layers=2", cache=cache
    )
    assert "expected top_k of at most 4" in fails(
        "train", "--corpus", corpus, "--experts", 4, "--top-k", 5, cache=cache
    )
    assert "expected --top-k as a whole number above 0, got '0'; try --top-k 2" in fails(
        "train", "--corpus", corpus, "--top-k", 0, cache=cache
    )
    assert "expected a folder of run" in fails(
        "train", "--corpus", corpus, "--out", tmp_path / "run", "--tokens", 99, cache=cache
    )


def test_bad_text_is_one_line_each(tmp_path: Path, cache: Path) -> None:
    def demo(corpus: Path) -> str:
        return fails("demo", "--corpus", corpus, "--out", tmp_path / "out", cache=cache)

    assert "nowhere" in demo(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in demo(empty)
    single = tmp_path / "single"
    single.mkdir()
    (single / "a.txt").write_text("only one document")
    assert "document" in demo(single)
    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "a.txt").write_text("text")
    (binary / "b.txt").write_bytes(b"\0\1\2\xff")
    assert "b.txt" in demo(binary)
    small = tmp_path / "small"
    small.mkdir()
    for index in range(12):
        (small / f"{index}.txt").write_text(f"tiny text {index}")
    assert "vocab" in demo(small)
    assert not (tmp_path / "out" / "report.html").exists()


def test_bad_recipes_and_folders_are_one_line_each(tmp_path: Path, cache: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    assert "broken.py:1 failed: ModuleNotFoundError" in fails("sweep", "run", broken, cache=cache)
    assert "expected a recipe file" in fails("sweep", "plan", tmp_path / "none.py", cache=cache)
    assert "demo, small, " in fails("sweep", "run", RECIPE, "--preset", "huge", cache=cache)
    assert "finished run" in fails("report", tmp_path, cache=cache)
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "cannot" in fails("demo", "--out", blocker / "below", cache=cache)
    assert "expected a finished run" in fails("trace", tmp_path, "--text", blocker, cache=cache)


def test_the_text_to_use_has_one_name_in_every_command():
    from moe_lab.commands import difficulty, sweep, trace, train

    for command in (train, sweep, trace, difficulty):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        parsers = [parser]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        names = [set(action.option_strings) for one in parsers for action in one._actions]
        assert {"--text", "--corpus"} in names, command.__name__
