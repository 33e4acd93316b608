"""The examples of CONTRIBUTING.md as one plugin, a file outside the package: every command knows
what it adds by its name.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands.test_cli import moe_lab

from moe_lab import plugins
from moe_lab.errors import ConfigError
from moe_lab.model import MoEConfig
from moe_lab.routing import RouterConfig, register
from moe_lab.routing.routers.top_p import TopP
from moe_lab.training import RunConfig

REPOSITORY = Path(__file__).resolve().parents[1]
SHOOTOUT = REPOSITORY / "experiments" / "router_shootout.py"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples of CONTRIBUTING.md as one file."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    path = tmp_path_factory.mktemp("outside") / "plugin.py"
    path.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma(", ")", "def", "return", "1", "\n"]
    for index in range(30):
        (folder / f"doc{index}.txt").write_text(f"{index} " + " ".join(rng.choice(words, size=150)))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_LAB_CACHE", str(path))
        patch.delenv(plugins.VARIABLE, raising=False)
        yield path


def does(*arguments: object) -> str:
    """What a command that must succeed prints."""
    ended = moe_lab(*arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def run(plugin: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the router, the controller and the loss of the plugin."""
    folder = tmp_path_factory.mktemp("run") / "r"
    controller = json.dumps({"kind": "soft_sign", "rate": 0.05})
    does(
        *("train", "--plugin", plugin, "--router", "near_best", "--loss", "confidence=0.5"),
        *("--set", f"model.moe.router.controller={controller}", "--set", "eval_tokens=4000"),
        *("--set", "eval_excerpt_tokens=64", "--corpus", corpus, "--tokenizer", "byte"),
        *("--tokens", 4096, "--out", folder),
    )
    return folder


def test_a_run_has_the_router_the_controller_and_the_loss_by_name(run: Path) -> None:
    config = RunConfig.from_dict(json.loads((run / "config.json").read_text()))
    assert config.model.moe is not None
    assert config.model.moe.router.kind == "near_best"
    assert config.model.moe.router.controller is not None
    assert config.model.moe.router.controller.kind == "soft_sign"
    assert [(term.name, term.coefficient) for term in config.losses] == [("confidence", 0.5)]
    record = json.loads((run / "result.json").read_text())
    layer = config.model.build().moe_layers()[0]
    assert record["total_params"] == sum(p.numel() for p in config.model.build().parameters())
    assert layer.router.temperature.shape == (1,)
    assert 1 <= record["mean_ffn_count"] <= 2
    assert record["active_params_min"] < record["active_params"]
    assert record["sees_later_tokens"] is False


def test_the_loss_and_the_controller_act(run: Path, plugin: Path) -> None:
    config = RunConfig.from_dict(json.loads((run / "config.json").read_text()))
    assert config.model.moe is not None
    router = config.model.moe.router.build(8)
    routing = router(torch.randn(20, 8))
    loss = plugins.load(plugin).confidence(routing)  # type: ignore[union-attr]
    assert 1 / 16 < float(loss.detach()) <= 1
    router.update([routing])
    assert router.controller is not None
    assert router.controller.bias.abs().sum() > 0
    assert config.replace(losses=()).hash() != config.hash()


def test_count_trace_report_and_difficulty_know_it(run: Path, plugin: Path, tmp_path: Path) -> None:
    counted = json.loads(does("count", run / "config.json", "--plugin", plugin, "--json"))
    assert counted["total"] == json.loads((run / "result.json").read_text())["total_params"]
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("def gamma(alpha): return 1\n" * 20)
    does("trace", run, "--plugin", plugin, "--text", text, "--out", tmp_path / "trace")
    assert (tmp_path / "trace" / "meta.json").is_file()
    does("report", run, "--plugin", plugin, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "The busiest expert of each layer" in page
    busiest = pl.read_parquet(tmp_path / "page_data" / "busiest_expert.parquet")
    assert busiest.columns == ["layer", "expert", "is_zero", "slots"]
    assert busiest["layer"].to_list() == [0, 1, 2]
    found = does("difficulty", run, "--plugin", plugin, "--resamples", 100, "--out", tmp_path / "d")
    assert found


RECIPE = """
import runpy
from moe_lab.sweeps import SweepConfig
from moe_lab.text import TextConfig

PRESETS = ("cpu",)
sweep_all = runpy.run_path({shootout!r})["sweep"]

def sweep(preset, *, seed=0, device="cpu"):
    wanted = ("softmax_topk", "near_best")
    runs = [
        run.replace(
            train_tokens=2048, eval_tokens=2000, eval_excerpt_tokens=64,
            text=TextConfig(corpus={corpus!r}, tokenizer="byte").resolve(),
            model=run.model.replace(vocab_size=259),
        )
        for run in sweep_all("cpu", seed=seed, device=device).runs if run.arm in wanted
    ]
    return SweepConfig(name="shootout", question="?", preset=preset, runs=tuple(runs))
"""


def test_a_sweep_plans_runs_it_in_worker_processes_and_shoots_it_out(
    plugin: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tmp_path / "recipe.py", tmp_path / "sweep"
    recipe.write_text(RECIPE.format(shootout=str(SHOOTOUT), corpus=str(corpus)))
    planned = does(
        *("sweep", "plan", recipe, "--preset", "cpu", "--plugin", plugin, "--no-calibration")
    )
    assert "near_best" in planned
    does(
        "sweep", "run", recipe, "--preset", "cpu", "--plugin", plugin, "--out", out, "--workers", 1
    )
    monkeypatch.setattr(
        sys, "argv", ["x", str(out), "--plugin", str(plugin), "--out", str(tmp_path / "t.parquet")]
    )
    runpy.run_path(str(SHOOTOUT), run_name="__main__")
    table = pl.read_parquet(tmp_path / "t.parquet")
    assert sorted(table["arm"]) == ["near_best", "softmax_topk"]
    assert table["seeds"].to_list() == [3, 3]


ONE_RUN = """
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import SweepConfig
from moe_lab.text import TextConfig
from moe_lab.training import RunConfig

PRESETS = {{"one": None}}

def sweep(preset, *, seed, device):
    router = RouterConfig(kind="near_best", num_experts=4, top_k=2)
    model = DecoderConfig(
        vocab_size=257, num_layers=1, d_model=16, num_heads=2, context_length=64,
        moe=MoEConfig(d_model=16, d_expert=8, router=router),
    )
    text = TextConfig(corpus={corpus!r}, tokenizer="byte")
    run = RunConfig(
        model, text=text, seq_length=64, train_tokens=2048, eval_tokens=2048,
        eval_excerpt_tokens=64,
    )
    return SweepConfig(name="one", question="?", preset=preset, runs=(run,))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "launcher"),
    [("ray", ["ray"]), ("submitit", ["slurm", "--launcher-option", "cluster=local"])],
    ids=["ray", "slurm"],
)
def test_workers_of_a_cluster_have_the_plugins_of_the_driver(
    package: str, launcher: list[str], plugin: Path, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    recipe, out = tmp_path / "recipe.py", tmp_path / "sweep"
    recipe.write_text(ONE_RUN.format(corpus=str(corpus)))
    does("sweep", "run", recipe, "--plugin", plugin, "--out", out, "--launcher", *launcher)
    assert [path.parent.parent for path in out.glob("*/done")] == [out]


def in_a_process(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=True,
    ).stdout


BUILD = """
from moe_lab.routing import RouterConfig
print(type(RouterConfig(kind="near_best", num_experts=4, top_k=2).build(8)).__name__)
"""


def test_an_installed_package_names_its_plugins_by_entry_points(
    plugin: Path, tmp_path: Path
) -> None:
    (tmp_path / "installed_plugin.py").write_bytes(plugin.read_bytes())
    described = tmp_path / "installed_plugin-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[moe_lab.plugins]\nany = installed_plugin\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert in_a_process(BUILD, PYTHONPATH=path, **{plugins.VARIABLE: ""}) == "NearBest\n"


def test_a_dispatch_backend_from_outside_is_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "backend.py"
    path.write_text(
        "from moe_lab.model.dispatch import BACKENDS\n\n"
        "calls = []\n\n"
        '@BACKENDS.register("counted_for_a_test")\n'
        "def counted(x_TD, routing, bank):\n"
        "    calls.append(len(x_TD))\n"
        '    return BACKENDS["oracle"](x_TD, routing, bank)\n'
    )
    monkeypatch.setenv(plugins.VARIABLE, "")
    module = plugins.load(path)
    assert module is not None
    config = MoEConfig(8, 4, RouterConfig(num_experts=4, top_k=2), dispatch="counted_for_a_test")
    layer, x = config.build(), torch.randn(5, 8)
    oracle = config.replace(dispatch="oracle").build()
    oracle.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), oracle(x))
    assert module.calls == [5]


def test_another_process_finds_a_plugin_that_the_environment_names(plugin: Path) -> None:
    assert in_a_process(BUILD, **{plugins.VARIABLE: str(plugin)}) == "NearBest\n"


def test_a_plugin_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no\\nluck')")
    for source, got in (
        (broken, "RuntimeError: no"),
        (tmp_path / "absent.py", "no Python file"),
        ("not_a_module_of_anybody", "No module named"),
    ):
        ended = moe_lab("count", "--plugin", source)
        assert ended.returncode == 2
        assert len(ended.stderr.splitlines()) == 1
        assert got in ended.stderr
        assert str(source) in ended.stderr


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ConfigError, match="a router kind that is not taken"):

        @register("top_p")
        class Other(TopP):
            pass


def test_a_plain_router_needs_no_facts() -> None:
    from moe_lab.accounting import count
    from moe_lab.routing import Router

    @register("plain_for_a_test")
    class Plain(Router):
        def route(self, logits_TE, context):
            top = logits_TE.softmax(dim=1).topk(self.config.top_k, dim=1)
            return self.routing(
                top.indices, top.values, logits_TE, logits_TE.softmax(dim=1), context
            )

    layer = MoEConfig(
        d_model=8, d_expert=4, router=RouterConfig(kind="plain_for_a_test", num_experts=4, top_k=2)
    )
    assert count(layer).total == sum(p.numel() for p in layer.build().parameters())
    assert layer.build()(torch.randn(5, 8)).shape == (5, 8)
