"""How fast, how exactly and how steadily do balancing rules hold the number of real experts per
token?

Part ``plant``: a simulated router. Its logits are a fixed preference per expert plus independent
noise per token, so what a rule does is seen without a model that learns around it. Step response
from an unbalanced start, steady-state error against step size and batch size, and a sudden change
of the token mix (another preference). Shapes are LongCat-Flash's, 512 + 256 experts, and
LongCat-2.0's, 768 + 128, both top-12 with K_e = 8; the second is the one where the target is not
uniform load.

Part ``model``: the same rules in a small decoder that trains on the default corpus.

    python experiments/balance_control.py --out experiments/balance_control

Each figure is written as SVG (extra ``figures``) beside the Parquet file that it shows.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from moe_lab.files import atomic_path
from moe_lab.measures import load_cv, max_violation
from moe_lab.routing import (
    ControllerConfig,
    ControllerKind,
    Router,
    RouterConfig,
    RouterContext,
    build_router,
)
from moe_lab.versions import provenance

TARGET, TOP_K = 8, 12
SHAPES = {"512+256 (uniform)": (512, 256), "768+128 (zero experts 3x)": (768, 128)}


@dataclass(frozen=True)
class Plant:
    """Logits = preference + noise.

    ``mix`` 0, 1, ... are different preferences of the same spread.
    """

    width: int
    tokens: int = 1024
    spread: float = 0.5
    seed: int = 0

    def logits(self, steps: int, shift_at: int | None = None) -> Iterator[torch.Tensor]:
        """[tokens, width] for each step; the preference changes at ``shift_at``."""
        generator = torch.Generator().manual_seed(self.seed)
        before, after = (
            torch.randn(self.width, generator=generator) * self.spread for _ in range(2)
        )
        for step in range(steps):
            preference = before if shift_at is None or step < shift_at else after
            yield preference + torch.randn(self.tokens, self.width, generator=generator)


def proportional(rate: float, decay: float = 0.0) -> ControllerConfig:
    return ControllerConfig(
        kind=ControllerKind.PROPORTIONAL, rate=rate, target_ffn_count=TARGET, decay=decay
    )


RULES = {
    "no rule": ControllerConfig(),
    "proportional, mu 0.1": proportional(0.1),
    "proportional, mu 0.3": proportional(0.3),
    "proportional, mu 1": proportional(1.0),
    "proportional, mu 3": proportional(3.0),
    "PID, K_i 1, K_p 0.3, K_d 0.1": ControllerConfig(
        kind=ControllerKind.PID,
        rate=1.0,
        proportional_gain=0.3,
        derivative_gain=0.1,
        target_ffn_count=TARGET,
        limit=0.1,
    ),
    "sign with target, u 1e-4": ControllerConfig(
        kind=ControllerKind.SIGN, rate=1e-4, target_ffn_count=TARGET
    ),
    "quantile dual": ControllerConfig(kind=ControllerKind.QUANTILE, target_ffn_count=TARGET),
}


def router_of(real: int, zero: int, rule: ControllerConfig) -> Router:
    return build_router(
        RouterConfig(
            kind="longcat", num_experts=real, num_zero_experts=zero, top_k=TOP_K, controller=rule
        ),
        d_model=4,
    )


@torch.no_grad()
def simulate(router: Router, plant: Plant, steps: int, shift_at: int | None = None) -> pl.DataFrame:
    """One row per step: mean ffn_count before the step's update, and the imbalance among real
    experts.
    """
    rows = []
    for step, logits in enumerate(plant.logits(steps, shift_at)):
        routing = router.route(logits, RouterContext())
        load = routing.counts()[: router.config.num_experts]
        rows.append(
            {
                "step": step,
                "mean_ffn_count": routing.ffn_count().double().mean().item(),
                "sd_ffn_count": routing.ffn_count().double().std().item(),
                "load_cv": load_cv(load).item(),
                "max_violation": max_violation(load).item(),
            }
        )
        router.update([routing])
    return pl.DataFrame(rows)


def step_response(steps: int = 150) -> pl.DataFrame:
    """From zero bias.

    Columns: shape, rule, step, mean_ffn_count, sd_ffn_count, load_cv, max_violation.
    """
    return pl.concat(
        simulate(router_of(real, zero, rule), Plant(real + zero), steps).with_columns(
            shape=pl.lit(shape), rule=pl.lit(name)
        )
        for shape, (real, zero) in SHAPES.items()
        for name, rule in RULES.items()
    )


def steady_state(steps: int = 400, last: int = 100) -> pl.DataFrame:
    """The last ``last`` steps at LongCat-2.0's ratios, an eighth of its experts.

    Columns: tokens, mu, error (of the mean, %), wander (sd of the steps' means, %), load_cv (mean
    over steps, noise of counting included).
    """
    rows = []
    for tokens in (256, 1024, 4096):
        for rate in (0.03, 0.1, 0.3, 1.0, 3.0):
            found = simulate(
                router_of(96, 16, proportional(rate)), Plant(112, tokens=tokens), steps
            ).tail(last)
            mean, wander = (
                found["mean_ffn_count"].to_numpy().mean(),
                found["mean_ffn_count"].to_numpy().std(),
            )
            rows.append(
                {
                    "tokens": tokens,
                    "mu": rate,
                    "error": 100 * abs(mean / TARGET - 1),
                    "wander": 100 * wander / TARGET,
                    "load_cv": found["load_cv"].to_numpy().mean(),
                }
            )
    return pl.DataFrame(rows)


def mix_shift(steps: int = 300, at: int = 120) -> pl.DataFrame:
    """The preference changes at step ``at``; with a decaying rate the rule has gone to sleep by
    then. Columns as ``step_response``.
    """
    rules = {
        "proportional, mu 1": proportional(1.0),
        "proportional, mu 1 decaying (0.1)": proportional(1.0, decay=0.1),
        "sign with target, u 1e-3": ControllerConfig(
            kind=ControllerKind.SIGN, rate=1e-3, target_ffn_count=TARGET
        ),
        "quantile dual": RULES["quantile dual"],
    }
    return pl.concat(
        simulate(router_of(96, 16, rule), Plant(112, tokens=2048), steps, at).with_columns(
            shape=pl.lit("96+16"), rule=pl.lit(name), shift_at=pl.lit(at)
        )
        for name, rule in rules.items()
    )


def trained_model(train_tokens: int = 160_000) -> pl.DataFrame:
    """A two-layer decoder with 24 + 4 experts, top-6, K_e = 4, without balance loss.

    Columns: rule, step, mean_ffn_count, load_cv, loss.
    """
    from moe_lab.model import DecoderConfig, MoEConfig
    from moe_lab.training import RunConfig, train

    def rule(kind: ControllerKind, rate: float) -> ControllerConfig:
        return ControllerConfig(kind=kind, rate=rate, target_ffn_count=4)

    rules = {
        "no rule": ControllerConfig(),
        "proportional, mu 0.03": rule(ControllerKind.PROPORTIONAL, 0.03),
        "proportional, mu 0.3": rule(ControllerKind.PROPORTIONAL, 0.3),
        "sign with target, u 1e-3": rule(ControllerKind.SIGN, 1e-3),
        "quantile dual": ControllerConfig(kind=ControllerKind.QUANTILE, target_ffn_count=4),
    }
    frames = []
    for name, controller in rules.items():
        router = RouterConfig(
            kind="longcat",
            num_experts=24,
            num_zero_experts=4,
            top_k=6,
            routed_scaling_factor=28 / 6,
            controller=controller,
        )
        moe = MoEConfig(d_model=64, d_expert=32, router=router)
        model = DecoderConfig(
            vocab_size=2048, num_layers=2, d_model=64, num_heads=4, context_length=128, moe=moe
        )
        run = RunConfig(
            model=model,
            name=name,
            batch_size=8,
            train_tokens=train_tokens,
            log_every=1,
            eval_tokens=512,
            router_aux_loss_coef=0.0,
        )
        rows: list[dict] = []
        with tempfile.TemporaryDirectory() as folder:
            train(run, Path(folder) / "run", on_step=rows.append)
        frames.append(
            pl.DataFrame(rows)
            .select("step", "mean_ffn_count", "load_cv", "loss")
            .with_columns(rule=pl.lit(name))
        )
    return pl.concat(frames)


def lines(frame: pl.DataFrame, title: str, target: float, panels: str | None = None):
    """Mean ffn_count over steps, one line per rule, one panel per value of ``panels``; the band is
    1 % around the target.
    """
    from plotly.subplots import make_subplots

    from moe_lab.report import theme

    names = frame[panels].unique(maintain_order=True).to_list() if panels else [""]
    figure = make_subplots(
        rows=1, cols=len(names), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.05
    )
    rules = frame["rule"].unique(maintain_order=True).to_list()
    for column, name in enumerate(names, start=1):
        panel = frame.filter(pl.col(panels) == name) if panels else frame
        for index, rule in enumerate(rules):
            part = panel.filter(pl.col("rule") == rule)
            colour = theme.SERIES[index % len(theme.SERIES)]
            figure.add_scatter(
                x=part["step"].to_list(),
                y=part["mean_ffn_count"].to_list(),
                name=rule,
                legendgroup=rule,
                showlegend=column == 1,
                line={"color": colour, "width": 1.5},
                row=1,
                col=column,
            )
        figure.add_hrect(
            y0=0.99 * target,
            y1=1.01 * target,
            fillcolor="grey",
            opacity=0.3,
            line_width=0,
            row=1,  # type: ignore[arg-type]  # plotly's default "all" is read as str
            col=column,  # type: ignore[arg-type]
        )
    figure.update_xaxes(title="optimiser step")
    figure.update_yaxes(title="mean real experts per token", col=1)
    return _dressed(figure, title)


def errors(frame: pl.DataFrame, title: str):
    """Error and wander of the mean against mu, one line per batch size."""
    import plotly.graph_objects as go

    from moe_lab.report import theme

    figure = go.Figure()
    for index, (tokens,) in enumerate(
        frame.select("tokens").unique(maintain_order=True).iter_rows()
    ):
        part = frame.filter(pl.col("tokens") == tokens)
        for value, dash in (("error", "solid"), ("wander", "dot")):
            figure.add_scatter(
                x=part["mu"].to_list(),
                y=part[value].to_list(),
                name=f"{value}, {tokens} tokens",
                mode="lines+markers",
                line={"color": theme.SERIES[index], "dash": dash},
            )
    figure.add_hline(y=1.0, line={"color": "grey", "width": 1})
    figure.update_xaxes(title="mu", type="log")
    figure.update_yaxes(title="% of the target K_e = 8", type="log")
    return _dressed(figure, title)


def _dressed(figure, title: str):
    from moe_lab.report import theme

    figure.update_layout(
        template=theme.template("light"),
        title={"text": title, "y": 0.97, "yanchor": "top"},
        margin={"t": 80, "b": 110, "l": 60, "r": 20},
        legend={"orientation": "h", "y": -0.28},
        width=1100,
        height=500,
    )
    return figure


PARTS = {
    "plant": (
        (
            "step_response",
            step_response,
            lambda f: lines(
                f, "Step response on a simulated router, top-12, K_e = 8", TARGET, "shape"
            ),
        ),
        (
            "steady_state",
            steady_state,
            lambda f: errors(f, "Steady state of the proportional rule, 96 + 16 experts"),
        ),
        (
            "mix_shift",
            mix_shift,
            lambda f: lines(f, "The token mix changes at step 120, 96 + 16 experts", TARGET),
        ),
    ),
    "model": (
        (
            "trained_model",
            trained_model,
            lambda f: lines(f, "A decoder in training, 24 + 4 experts, top-6, K_e = 4", 4),
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(""))
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part, figures in PARTS.items():
        if arguments.part not in (part, "all"):
            continue
        for name, compute, draw in figures:
            frame = compute()
            with atomic_path(arguments.out / f"{name}.parquet") as path:
                frame.with_columns(
                    pl.lit(value).alias(key) for key, value in provenance().items()
                ).write_parquet(path)
            with atomic_path(arguments.out / f"{name}.svg") as path:
                draw(frame).write_image(path, format="svg")
            print(f"{arguments.out / name}.svg")


if __name__ == "__main__":
    main()
