"""The power of a planned sweep: the probability of each verdict under candidate truths, its cost,
and the cheapest that suffices.

A design is a grid of ratios, seeds at each, an active size that may grow with the router, and a
token budget. Each truth is a
loss as a function of the ratio; sweeps are drawn from it with the noise the user expects and judged
exactly as `wall_verdict` judges a real one.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_lab.config import Config, require
from moe_lab.errors import AnalysisError
from moe_lab.scaling.compute_slope import MARGIN, law_slope
from moe_lab.scaling.frontier_forms import effective_ratio
from moe_lab.scaling.laws import LAWS
from moe_lab.scaling.sweep_losses import TOKENS_PER_EXPERT
from moe_lab.scaling.two_way import Layout
from moe_lab.scaling.wall_rule import Judgement, Outcome, Price, doublings, judge

DOUBLING_WORTH = 1.14
"""Compute that a doubling is worth in the default truths: 30 mnats at 10M x 1B (Kimi K2: 1.21)."""
TARGET = 0.9
NO_NOISE = 1e-7


@dataclass(frozen=True)
class Design(Config):
    """One planned sweep: ``ratios`` total:active ascending, ``seeds`` runs at each, or ``seeds_at``
    each; ``active_params``, and ``active_at`` each ratio where the router's growth is to be
    charged; ``tokens`` per run; ``compute_slope`` -dL/dlnC where it was measured.
    """

    ratios: tuple[float, ...]
    seeds: int
    active_params: float
    tokens: float
    seeds_at: tuple[int, ...] = ()
    active_at: tuple[float, ...] = ()
    compute_slope: float | None = None

    def __post_init__(self) -> None:
        require(len(self.ratios) >= 3, "three or more ratios", len(self.ratios), field="ratios")
        require(
            list(self.ratios) == sorted(set(self.ratios)) and self.ratios[0] >= 1,
            "ascending ratios from 1",
            self.ratios,
            field="ratios",
        )
        require(min(self.counts) >= 1, "one seed or more", self.seeds_at or self.seeds)
        require(
            self.active_params > 0 and self.tokens > 0,
            "sizes above 0",
            (self.active_params, self.tokens),
        )
        for name in ("seeds_at", "active_at"):
            size = len(getattr(self, name))
            require(size in (0, len(self.ratios)), f"{name} of each ratio", size)

    @property
    def counts(self) -> tuple[int, ...]:
        """Seeds at each ratio."""
        return self.seeds_at or (self.seeds,) * len(self.ratios)

    @property
    def active(self) -> tuple[float, ...]:
        """Active parameters at each ratio: they grow with the router's rows."""
        return self.active_at or (self.active_params,) * len(self.ratios)

    @property
    def runs(self) -> int:
        return sum(self.counts)

    @property
    def flops(self) -> float:
        """6 N D per run: the head and attention come on top (`moe_lab.accounting` counts them)."""
        runs = zip(self.counts, self.active, strict=True)
        return sum(6 * count * active * self.tokens for count, active in runs)

    @property
    def layout(self) -> Layout:
        return Layout.grid(np.log2(self.ratios), np.array(self.counts))

    def price(self, margin: float = MARGIN) -> Price:
        """The margin, and what the router's growth is charged."""
        x = np.log2(self.ratios)
        low, high = doublings(x).T
        active = np.log(self.active)
        charge = self.slope * (active[high] - active[low]) / (x[high] - x[low])
        return Price((margin - 1) * self.slope, charge=charge)

    @property
    def slope(self) -> float:
        """-dL/dlnC; by default of the law that the verdict uses, in the middle of the grid."""
        if self.compute_slope is not None:
            return self.compute_slope
        middle = math.sqrt(self.ratios[0] * self.ratios[-1])
        return law_slope(self.active_params, self.tokens, middle).value


@dataclass(frozen=True)
class Truth:
    """One candidate truth of a simulation. ``loss(ratios [R], design) -> [R]`` nats up to a
    constant; ``wall`` the ratio past which nothing is gained, None if nowhere; ``forms`` the names
    of `FORMS` that count as having recognised it.
    """

    name: str
    loss: Callable[[np.ndarray, Design], np.ndarray]
    forms: tuple[str, ...]
    wall: float | None = None


def line_truth(worth: float = DOUBLING_WORTH) -> Truth:
    """Every doubling is worth the same compute, without end."""
    return Truth("line", lambda r, d: -d.slope * math.log(worth) * np.log2(r), ("line",))


def saturation_truth(maximum: float = 300.0, worth: float = 1.2, start: float = 2.0) -> Truth:
    """Clark's saturation at ``maximum``; a doubling of the effective ratio is worth ``worth``."""

    def loss(r: np.ndarray, d: Design) -> np.ndarray:
        return (
            -d.slope
            * math.log(worth)
            * np.log2(effective_ratio(r, np.array(start), np.array(maximum)))
        )

    return Truth(f"saturation at {maximum:g}", loss, ("saturation", "power"))


def wall_truth(at: float = 32.0, worth: float = DOUBLING_WORTH) -> Truth:
    """Equal gains up to ratio ``at``, and no gain after it."""
    return Truth(
        f"wall at {at:g}",
        lambda r, d: -d.slope * math.log(worth) * np.log2(np.minimum(r, at)),
        ("plateau", "hinge"),
        wall=at,
    )


def law_truth(law: str = "ludziejewski", coefficients: str | None = None) -> Truth:
    """A published law at the design's size and budget."""

    def loss(r: np.ndarray, d: Design) -> np.ndarray:
        point = {
            "active_params": d.active_params,
            "tokens": d.tokens,
            "ratio": r,
            "total_params": d.active_params * r,
        }
        return np.asarray(LAWS[law].predict(point, coefficients))

    return Truth(f"law {law}", loss, ("saturation",))


def default_truths() -> tuple[Truth, ...]:
    return line_truth(), saturation_truth(), law_truth(), wall_truth(32), wall_truth(8)


def designs(
    active_params: float,
    tokens: float,
    *,
    ratio_max: Iterable[float] = (64, 128, 256, 512),
    seeds: Iterable[int] = (2, 3, 5, 8),
) -> list[Design]:
    """Grids of doublings from 1 to each ``ratio_max``, with each number of seeds."""
    grids = [tuple(2.0**e for e in range(round(math.log2(top)) + 1)) for top in ratio_max]
    return [Design(grid, count, active_params, tokens) for grid in grids for count in seeds]


def draw(
    truth: Truth,
    design: Design,
    noise_sd: float,
    draws: int,
    rng: np.random.Generator,
    *,
    margin: float = MARGIN,
    known: bool = False,
) -> Judgement:
    """Judge ``draws`` simulated sweeps.

    ``known`` hands the noise to the verdict, as one seed would need.
    """
    layout = design.layout
    exact = truth.loss(np.array(design.ratios), design)[layout.ratio]
    losses = exact + rng.normal(0, noise_sd, (draws, layout.runs))
    return judge(layout, losses, design.price(margin), known=noise_sd if known else None)


def right_answers(truth: Truth, design: Design, margin: float = MARGIN) -> frozenset[Outcome]:
    """What a sweep of this design without noise should say, by its last gain and the average of its
    last two doublings; none where those two lie on different sides of the margin.

    Where the truth has a wall inside the grid, "wall" is right beside "below margin".
    """
    exact = _exact(truth, design, margin)
    if exact.below[0]:
        wall = truth.wall is not None and truth.wall <= design.ratios[-1]
        return frozenset({Outcome.BELOW_MARGIN} | ({Outcome.WALL} if wall else set()))
    return frozenset({Outcome.NO_WALL}) if exact.no_wall[0] else frozenset()


def _exact(truth: Truth, design: Design, margin: float) -> Judgement:
    one = design.replace(seeds=1, seeds_at=())
    losses = truth.loss(np.array(design.ratios), design)[None]
    return judge(one.layout, losses, one.price(margin), known=NO_NOISE)


def power(
    planned: Design | Sequence[Design],
    truths: Sequence[Truth] | None = None,
    *,
    noise_sd: float,
    draws: int = 500,
    seed: int = 0,
    margin: float = MARGIN,
    known_noise: bool = False,
    flops_per_second: float | None = None,
) -> pl.DataFrame:
    """[design, truth, wall, below_margin, no_wall, cannot_tell, settled, form, wrong, ratios,
    ratio_max, seeds, seeds_max, runs, tokens, active_params, flops, draws, hours]

    one row per design and truth: the share of ``draws`` that ends in each verdict; ``settled`` the
    share that gives a right answer (`right_answers`: "cannot tell" never is one); ``wrong`` the
    share that gives another; ``form`` the share that recognises the shape; ``hours`` at
    ``flops_per_second`` (null without). ``noise_sd``: nats between seeds (docs/scaling.md:
    .004-.008 at 3-11M parameters, .0005-.0007 above 100M). ``known_noise`` lets one seed be judged.
    """
    plans = [planned] if isinstance(planned, Design) else list(planned)
    require(
        plans and draws >= 1 and noise_sd > 0,
        "a design, one draw or more and noise above 0",
        f"{len(plans)} designs, {draws} draws, noise {noise_sd}",
        error=AnalysisError,
        field="plans",
    )
    rows = []
    chosen = truths if truths is not None else default_truths()
    for number, design in enumerate(plans):
        rng = np.random.default_rng([seed, number])
        chances = [
            (truth.name, _chances(truth, design, noise_sd, draws, rng, margin, known_noise))
            for truth in chosen
        ]
        rows.extend({"design": number, "truth": name, **columns} for name, columns in chances)
    table = pl.DataFrame(rows)
    hours = (
        pl.lit(None, pl.Float64)
        if flops_per_second is None
        else pl.col("flops") / flops_per_second / 3600
    )
    return table.with_columns(hours=hours)


def _chances(
    truth: Truth,
    design: Design,
    noise_sd: float,
    draws: int,
    rng: np.random.Generator,
    margin: float,
    known: bool,
) -> dict[str, float | int | None]:
    judged = draw(truth, design, noise_sd, draws, rng, margin=margin, known=known)
    outcomes = judged.outcomes()
    blind = design.layout.df < 1 and not known
    if blind or design.tokens / design.ratios[-1] < TOKENS_PER_EXPERT:
        outcomes = np.full(draws, Outcome.CANNOT_TELL)
    share = {name: float(np.mean(outcomes == outcome)) for name, outcome in _COLUMNS.items()}
    right = right_answers(truth, design, margin)
    false = [name for name, outcome in _COLUMNS.items() if outcome not in right]
    return {
        **share,
        "settled": float(np.isin(outcomes, list(right)).mean()),
        "wrong": sum(share[name] for name in false if name != "cannot_tell"),
        "form": float(np.isin(judged.best_form(), truth.forms).mean()),
        "ratios": len(design.ratios),
        "ratio_max": float(design.ratios[-1]),
        "seeds": min(design.counts),
        "seeds_max": max(design.counts),
        "runs": design.runs,
        "tokens": float(design.tokens),
        "active_params": design.active_params,
        "flops": design.flops,
        "draws": draws,
    }


_COLUMNS = {
    "wall": Outcome.WALL,
    "below_margin": Outcome.BELOW_MARGIN,
    "no_wall": Outcome.NO_WALL,
    "cannot_tell": Outcome.CANNOT_TELL,
}


def cheapest(table: pl.DataFrame, target: float = TARGET) -> int | None:
    """The design of `power`'s table with the fewest FLOPs that settles every truth with probability
    ``target``; None where none does.
    """
    worst = table.group_by("design").agg(pl.col("settled").min(), pl.col("flops").first())
    enough = worst.filter(pl.col("settled") >= target).sort("flops", "design")
    return None if enough.is_empty() else int(enough["design"][0])
