"""What an object shows in a terminal or a notebook: short enough to read, and enough to know it."""

import importlib.util
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from refusals import refused

import moe_lab
from moe_lab.accounting import count
from moe_lab.accounting.model_names import facts
from moe_lab.errors import ConfigError
from moe_lab.model import DecoderConfig, MoEConfig, MoELayer
from moe_lab.model.minis import MINIS, mini_config
from moe_lab.routing import RouterConfig, Routing
from moe_lab.scaling import fit, wall_verdict
from moe_lab.trace import LayerMeta, Trace, TraceMeta
from moe_lab.trace.data_files import FolderFiles
from moe_lab.trace.manifest import Manifest

RECIPE = Path(__file__).resolve().parents[1] / "experiments" / "sparsity_wall.py"


def assert_fits_a_screen(value: object) -> None:
    lines = repr(value).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 120


def test_configurations_show_what_differs_from_the_default() -> None:
    router = RouterConfig(kind="longcat", num_experts=64, num_zero_experts=32, top_k=12)
    assert repr(router) == "RouterConfig(kind='longcat', top_k=12, num_zero_experts=32)"
    model = MoEConfig(d_model=512, router=router)
    assert eval(repr(model), {"MoEConfig": MoEConfig, "RouterConfig": RouterConfig}) == model
    for name in MINIS:
        assert_fits_a_screen(DecoderConfig.from_dict(mini_config(name)))
    assert eval(repr(DecoderConfig(d_dense=8)), {"DecoderConfig": DecoderConfig}) == DecoderConfig(
        d_dense=8
    )


def test_a_sweep_shows_the_number_of_its_runs() -> None:
    spec = importlib.util.spec_from_file_location("sparsity_wall_recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    sweep = recipe.sweep("gpu")
    assert f"<{len(sweep.runs)} RunConfig>" in repr(sweep)
    assert_fits_a_screen(sweep)
    assert_fits_a_screen(sweep.runs[0])


@pytest.mark.parametrize(
    ("kind", "more"), [("longcat", {"num_zero_experts": 4}), ("hash", {"vocab_size": 16})]
)
def test_layers_show_their_sizes(kind: str, more: dict[str, Any]) -> None:
    layer = MoELayer(MoEConfig(32, 16, RouterConfig(kind=kind, num_experts=8, top_k=2, **more)))
    assert f"RouterConfig(kind='{kind}', num_experts=8, top_k=2, " in repr(layer)
    assert "8 experts, d_model=32, d_expert=16" in repr(layer)
    assert_fits_a_screen(layer)


def test_a_routing_shows_tokens_slots_and_experts() -> None:
    layer = MoELayer(
        MoEConfig(32, 16, RouterConfig(kind="longcat", num_experts=8, num_zero_experts=4, top_k=3))
    )
    _, routing = layer(torch.randn(5, 32), return_routing=True)
    assert repr(routing).startswith("Routing(5 tokens x 3 slots over 8 + 4 zero-compute experts")
    assert_fits_a_screen(routing)


def test_every_published_model_is_counted_by_its_name_and_shown() -> None:
    for entry in facts():
        counted = count(entry["name"])
        assert f"total {counted.total:,}" in repr(counted)
        assert_fits_a_screen(counted)
    with pytest.raises(ConfigError) as caught:
        count("deepseek-ai/DeepSeek-W3")
    assert "deepseek-ai/DeepSeek-V3" in str(caught.value)


def test_fits_and_verdicts_show_their_answer() -> None:
    ratios = [1, 2, 4, 8, 16, 32, 64]
    rng = np.random.default_rng(0)
    rows = [
        {
            "ratio": float(ratio),
            "seed": seed,
            "loss": 3.4 - 0.05 * np.log2(ratio) + 0.003 * rng.normal(),
            "active_params": 1e6,
            "total_params": 1e6 * ratio,
            "tokens": 1e9,
        }
        for ratio in ratios
        for seed in range(3)
    ]
    verdict = wall_verdict(pl.DataFrame(rows), compute_slope=0.05)
    assert repr(verdict).startswith(f"Verdict({verdict.outcome.value})\n")
    assert verdict.sentence[:60] in repr(verdict)
    assert_fits_a_screen(verdict)
    assert verdict.sentence in shown(verdict).texts
    line = fit("line", pl.DataFrame(rows))
    assert repr(line).startswith("Fit(line, 21 runs, rmse ")
    assert_fits_a_screen(line)
    assert set(line.coefficients) <= set(shown(line).texts)


def test_the_packages_are_there_after_importing_moe_lab() -> None:
    packages = [path.parent.name for path in Path(moe_lab.__file__).parent.glob("*/__init__.py")]
    for name in {*packages} - {"commands", "cost", "hf", "runs"}:
        assert getattr(moe_lab, name).__name__ == f"moe_lab.{name}"
    with pytest.raises(AttributeError):
        moe_lab.nothing_of_this_name  # noqa: B018


class Page(HTMLParser):
    """Tags and text of a piece of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def shown(value: Any) -> Page:
    """What a notebook shows: at most 26 rows below the names, no tag but those of a table."""
    page = Page(value._repr_html_())
    assert page.tags.count("tr") <= 27
    assert set(page.tags) <= {"div", "table", "tr", "th", "td", "br"}
    return page


def test_notebooks_show_the_fields_that_differ() -> None:
    page = shown(RouterConfig(kind="longcat", num_experts=64, num_zero_experts=32, top_k=12))
    assert "kind" in page.texts
    assert "num_experts" not in page.texts  # 64 is the default
    for name in MINIS:
        assert "moe.d_expert" in shown(DecoderConfig.from_dict(mini_config(name))).texts


def test_notebooks_show_the_parts_of_every_published_model() -> None:
    for entry in facts():
        counted = count(entry["name"])
        page = shown(counted)
        assert f"{counted.by_part['routed']:,}" in page.texts


def test_notebooks_show_the_slots_of_experts_the_busiest_first() -> None:
    scores = torch.rand(50, 300).softmax(-1)
    page = shown(Routing.from_scores(scores, scores.topk(4).indices))
    cells = page.texts[page.texts.index("of all slots") + 1 :]
    slots = [int(cell) for cell in cells[1:60:3]]
    assert slots == sorted(slots, reverse=True)
    assert "and 275 more" in page.texts


def test_notebooks_escape_what_files_say(tmp_path: Path) -> None:
    meta = TraceMeta(
        layers=(LayerMeta(layer=0, num_experts=2, num_zero_experts=0, top_k=1, module="<b>x"),),
        model="<script>alert(1)</script>",
        notes=("a <img src=x> note",),
    )
    no_files = Manifest(pl.DataFrame(schema={"layer": pl.Int32, "rows": pl.Int64}))
    page = shown(Trace(tmp_path, meta, no_files, True, FolderFiles(tmp_path)))
    assert "<b>x" in page.texts
    assert any("<img src=x>" in text for text in page.texts)


def test_widths_are_stated_once() -> None:
    config = DecoderConfig(d_model=64, moe=MoEConfig(d_expert=32))
    assert config.moe is not None
    assert (config.moe.d_model, MoEConfig().d_model) == (64, 256)
    stated = DecoderConfig(d_model=64, moe=MoEConfig(d_model=64, d_expert=32))
    assert config == stated
    assert config.hash() == stated.hash()
    with refused("moe.d_model"):
        DecoderConfig(d_model=64, moe=MoEConfig(d_model=256))
    assert DecoderConfig().dense_width == 4 * 128
