"""Recompute, from published runs, the numbers that published scaling laws rest on; and judge sweeps
drawn from known truths.

    MOE_LAB_DATA=... python experiments/published_laws.py
    python experiments/published_laws.py --only verdicts --draws 500

The first command does everything, in about five minutes on two cores; the second needs no data.

Prints one table per section (what, published, found, within) and exits 1 where a number is not
reproduced. With ``--write`` each section, as it ends, replaces its text in
``published_laws/results.md``, with its date and options.
"""

import argparse
import datetime
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.special import chdtri

from moe_lab.errors import MoELabError
from moe_lab.files import write_text
from moe_lab.scaling import (
    HUBER,
    LAWS,
    SQUARES,
    Design,
    Outcome,
    Truth,
    bootstrap,
    compute_optimal,
    confounds,
    expected_gain,
    fit,
    isoflop,
    leave_largest_out,
    profile,
    published,
    saturation,
    wall_verdict,
)
from moe_lab.scaling.wall_power import draw, law_truth, saturation_truth
from moe_lab.scaling.wall_verdict import wall_at

ROUTERS = {"S-BASE": "S-Base", "RL-R": "RL-R", "HASH": "Hash"}
RESULTS = Path(__file__).parent / "published_laws" / "results.md"
WRONG_NO_WALL = 0.06
CLARK_NOISE = 0.00067  # nats between the three dense 130M runs


@dataclass(frozen=True)
class Row:
    what: str
    published: str
    found: str
    within: bool | None


@dataclass(frozen=True)
class Options:
    data: Path | None
    draws: int
    repetitions: int


def near(what: str, value: float, found: float, tolerance: float, digits: int = 4) -> Row:
    return Row(what, f"{value:.{digits}f}", f"{found:.{digits}f}", abs(found - value) <= tolerance)


def clark_runs(options: Options, router: str, largest: int = 512) -> pl.DataFrame:
    runs = published("clark", options.data).filter(
        (pl.col("routing_frequency") == 0.5) & (pl.col("k") == 1) & (pl.col("seed") == 42)
    )
    return runs.filter(
        pl.col("router_type").is_in([ROUTERS[router], "Dense"]) & (pl.col("num_experts") <= largest)
    )


def clark_table_3(options: Options) -> Iterator[Row]:
    """arXiv 2202.01169 table 3, least squares on ln L; the interval is a bootstrap's 95 %."""
    for router in ROUTERS:
        result = bootstrap(
            fit("clark", clark_runs(options, router), delta=SQUARES), options.repetitions
        )
        for name, value in LAWS["clark"].coefficients(router).items():
            low, high = result.interval(name)
            found = f"{result.coefficients[name]:.4g} [{low:.4g}, {high:.4g}]"
            yield Row(f"{router} {name}", f"{value:g}", found, low <= value <= high)
        largest = leave_largest_out(result, "active_params")
        yield Row(
            f"{router} without its largest size: bias there",
            "-.055 to -.066 (N <= 130M)",
            f"{largest['bias'][0]:.3f} nats",
            None,
        )


def clark_saturation(options: Options) -> Iterator[Row]:
    """E_max follows the edge of the grid it was fitted on, so it is not reported."""
    for router in ROUTERS:
        for largest in (64, 128, 512):
            found = saturation(
                fit("clark", clark_runs(options, router, largest)), options.repetitions
            )
            yield Row(
                f"{router}, E <= {largest}", "not identified", found.sentence, found.value is None
            )


def clark_verdicts(options: Options) -> Iterator[Row]:
    """Each size of S-BASE is a sweep of one seed, with the noise given: no wall may be claimed."""
    for largest in (64, 128, 512):
        runs = clark_runs(options, "S-BASE", largest)
        for (size,), sweep in runs.sort("active_params").group_by(
            "active_params", maintain_order=True
        ):
            if sweep["ratio"].n_unique() < 3:
                continue
            verdict = wall_verdict(sweep, noise_sd=CLARK_NOISE)
            at = "" if verdict.at is None else f" at {verdict.at:g}"
            found = f"{verdict.outcome}{at}, elasticity {verdict.elasticity:.2f}"
            yield Row(
                f"{size / 1e6:.0f}M, E <= {largest}",
                "no wall claimed",
                found,
                verdict.outcome is not Outcome.WALL,
            )  # type: ignore[operator]


def sldbench(options: Options) -> Iterator[Row]:
    """arXiv 2507.21184: step 249000, trained below 1e9 parameters, tested on 1.3B.

    E counts experts, whatever k.
    """
    runs = (
        published("clark_curves", options.data)
        .filter(pl.col("step") == 249000)
        .with_columns(ratio=pl.col("num_experts").cast(float))
    )
    train, test = (
        runs.filter(pl.col("active_params") < 1e9),
        runs.filter(pl.col("active_params") > 1e9),
    )
    loss = test["loss"].to_numpy()
    for law, log, r2 in (("sldbench", False, 0.832695), ("bilinear", True, 0.690013)):
        result = fit(law, train, delta=SQUARES, log=log)
        for name, value in LAWS[law].coefficients("SLDBench").items():
            digits = 4 if value > 10 else 6
            yield near(
                f"{law} {name}", value, result.coefficients[name], 0.51 * 10**-digits, digits
            )
        found = 1 - ((result.predict(test) - loss) ** 2).sum() / ((loss - loss.mean()) ** 2).sum()
        yield near(f"{law} test R2", r2, float(found), 5.1e-7, 6)


def epoch(options: Options) -> Iterator[Row]:
    """arXiv 2404.10102 (coefficients of its notebook), the five largest losses left out;
    Llama-3-style parabolas on the same runs.
    """
    runs = published("epoch", options.data)
    result = fit("hoffmann", runs.sort("loss").head(240))
    yield near("objective x 1e3", 1.0182740346, 1e3 * result.objective, 5e-8, 8)
    for name, value in {
        "A": 477.84,
        "B": 2143.86,
        "E": 1.81724,
        "alpha": 0.34731,
        "beta": 0.36718,
    }.items():
        yield near(name, value, result.coefficients[name], 5e-4 * value)
    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    nearest = budgets[np.abs(np.log(runs["compute"].to_numpy()[:, None] / budgets)).argmin(1)]
    close = np.abs(np.log(runs["compute"].to_numpy() / nearest)) < 0.08
    parabolas = isoflop(runs.with_columns(compute=pl.Series(nearest)).filter(pl.Series(close)))
    yield near(
        "isoFLOP parabolas: exponent of N (2203.15556 table 2)",
        0.49,
        parabolas.active_exponent,
        0.015,
    )
    yield near("isoFLOP parabolas: exponent of D", 0.51, parabolas.token_exponent, 0.015)


def gadre(options: Options) -> Iterator[Row]:
    """arXiv 2403.08540: five small RedPajama runs predict 1.4B at 640 tokens per parameter and 6.9B
    at 20.
    """
    runs = published("gadre", options.data).filter(pl.col("dataset") == "rpj").sort("active_params")
    sizes = runs["active_params"].unique().sort()
    small = (pl.col("chin_mult") == 1) & (pl.col("active_params") <= sizes[3])
    long = (pl.col("chin_mult") == 16) & (pl.col("active_params") == sizes[0])
    result = fit("tied", runs.filter(small | long), delta=SQUARES, log=False)
    eta = result.coefficients["alpha"] / 2
    for name, value, found in (
        ("a", 212.2, result.coefficients["A"] * 6**eta),
        ("b", 366.7, result.coefficients["B"] * 6**eta),
        ("eta", 0.1364, eta),
        ("E", 1.837, result.coefficients["E"]),
    ):
        yield near(name, value, found, 5e-4 * value)
    for name, error in (("rpj-open_lm_1b-32.0", 0.7103), ("rpj-open_lm_7b-1.0", 0.7320)):
        target = runs.filter(pl.col("name") == name)
        yield near(
            f"{name}, error in %",
            error,
            100 * float(result.predict(target)[0] / target["loss"][0] - 1),
            1e-4,
        )


def single_numbers(options: Options) -> Iterator[Row]:
    """Marin's forecast, Ludziejewski's tables from table 3, Ling's leverage, Kimi's slope,
    LongCat's step.
    """
    rows = published("marin", options.data).sort("compute")
    slope, level = np.polyfit(np.log(rows["compute"][:6]), np.log(rows["loss"][:6] - 1.6), 1)
    yield near(
        "Marin refit at 1e21 (measured 2.599)", 2.605, 1.6 + math.exp(level) * 1e21**slope, 5e-4
    )
    law = LAWS["ludziejewski"]
    k = law.coefficients()
    reduced = published("ludziejewski_reduced", options.data)
    point = {"active_params": 1e9, "tokens": 1e10, "ratio": reduced["ratio"].to_numpy()}
    experts = np.exp(law.logs(point, k["Estart"], k["Emax"])["e"])
    for column, found in (
        ("m", k["a"] * experts ** k["delta"]),
        ("n", k["b"] * experts ** k["omega"]),
    ):
        worst = float(np.abs(found / reduced[column].to_numpy() - 1).max())
        yield Row(
            f"Ludziejewski table 3 -> 4, {column}",
            "<= 0.3 %",
            f"{100 * worst:.2f} %",
            worst <= 0.003,
        )
    worst = 0.0
    for row in published("ludziejewski_optima", options.data).iter_rows(named=True):
        active, tokens = compute_optimal(law, row["compute"], {"ratio": row["ratio"]})
        worst = max(worst, abs(active / row["active_params"] - 1), abs(tokens / row["tokens"] - 1))
    yield Row("Ludziejewski table 3 -> 1", "<= 2.6 %", f"{100 * worst:.1f} %", worst <= 0.026)
    leverage = LAWS["ling"].predict({"ratio": 1 / 0.031, "granularity": 12.0, "compute": 1e22})
    yield near("Ling EL(.031, 12, 1e22)", 7.245, float(leverage), 5e-4)
    kimi = published("kimi", options.data)
    slope = np.polyfit(
        np.log(kimi["ratio"].to_numpy()), np.log(kimi["compute_multiplier"].to_numpy()), 1
    )[0]
    yield near("Kimi K2 d ln C / d ln ratio", -0.289, float(slope), 5e-4)
    step = expected_gain(1.6e12, 48e9, 135e9, 35e12, routed=135e9 / 0.092)
    yield near("LongCat +135B, doublings", 0.127, float(step["doublings"][0]), 5e-4)
    yield near("LongCat +135B, nats by Ludziejewski", 0.0008, float(step["gain"][0]), 5e-5)


def misfit(options: Options) -> Iterator[Row]:
    """The wall between 64 and 256 experts comes from the grid of learning rates."""
    runs = published("misfit", options.data).filter(pl.col("balance") == 0)
    for name, status, detail in confounds(runs).iter_rows():
        if name.startswith(("gain depends", "learning rate spacing")):
            yield Row(name, "suspect", f"{status}: {detail}", status == "suspect")


CLARK_130M = {"a": -0.0830, "b": -0.1180, "c": 0.0099, "d": 1.1136, "Estart": 2.07, "Emax": 300.0}
LINE = Truth("line", lambda r, d: -0.03 * np.log2(r), ("line",))
SMOOTH = Truth(
    "Clark E_max 300",
    lambda r, d: LAWS["clark"].predict({"active_params": 1.3e8, "ratio": r}, CLARK_130M),
    ("saturation",),
)
JOINT = law_truth("ludziejewski")
WALL = Truth(
    "hard wall at 32", lambda r, d: -0.03 * np.log2(np.minimum(r, 32)), ("plateau",), wall=32.0
)
# truth, largest ratio, nats between seeds, seeds, share of the right form in docs/scaling.md (None:
# not in that table)
GRID: tuple[tuple[Truth, int, float, int, float | None], ...] = (
    (LINE, 64, 0.006, 3, 0.95),
    (LINE, 256, 0.006, 3, 0.95),
    (LINE, 512, 0.006, 3, 0.95),
    (SMOOTH, 64, 0.003, 3, 1.0),
    (SMOOTH, 64, 0.006, 3, 0.90),
    (SMOOTH, 64, 0.006, 1, 0.43),
    (SMOOTH, 64, 0.012, 3, 0.27),
    (SMOOTH, 256, 0.006, 3, 0.97),
    (SMOOTH, 256, 0.006, 1, 0.71),
    (SMOOTH, 256, 0.012, 3, 0.67),
    (JOINT, 64, 0.003, 3, 0.98),
    (JOINT, 64, 0.006, 3, 0.59),
    (JOINT, 64, 0.006, 1, 0.23),
    (JOINT, 512, 0.006, 3, 0.91),
    (JOINT, 512, 0.006, 1, 0.88),
    (WALL, 64, 0.006, 3, 0.94),
    (WALL, 64, 0.006, 1, 0.71),
    (WALL, 64, 0.012, 3, 0.64),
    (WALL, 256, 0.006, 3, 0.99),
    (WALL, 256, 0.006, 1, 0.95),
    (WALL, 256, 0.012, 3, 0.89),
    (WALL, 512, 0.003, 3, None),
    (WALL, 512, 0.006, 3, None),
)


def verdicts(options: Options) -> Iterator[Row]:
    """Sweeps drawn at 10M active and 1B tokens: the right form as often as docs/scaling.md, the
    noise known as there, and the verdicts. Within: the right form not below the notes by three
    standard errors, "wall" on at most 2 % of smooth truths, "no wall" on at most 6 % of walls (by
    three standard errors: a wall in the last doubling alone is the hardest case, docs/scaling.md).
    """
    for number, (truth, largest, sd, seeds, share) in enumerate(GRID):
        design = Design(
            tuple(2.0**e for e in range(round(math.log2(largest)) + 1)), seeds, 1e7, 1e9
        )
        judged = draw(truth, design, sd, options.draws, np.random.default_rng(number), known=True)
        right = float(np.isin(judged.best_form(), truth.forms).mean())
        outcomes = judged.outcomes()
        false = float((outcomes == (Outcome.NO_WALL if truth.wall else Outcome.WALL)).mean())
        error = (
            0.0 if share is None else 3 * math.sqrt(max(share * (1 - share), 0.01) / options.draws)
        )
        rates = _shares(outcomes, 2)
        what = f"{truth.name}, 1-{largest}, sd {sd} x {seeds}"
        yield Row(
            what,
            "" if share is None else f"form {share:.2f}",
            f"form {right:.2f}; {rates}",
            false <= (WRONG_NO_WALL + 3 * math.sqrt(0.06 / options.draws) if truth.wall else 0.02)
            and (share is None or right >= share - error),
        )


def random_design(rng: np.random.Generator) -> Design:
    """Another size, budget, grid and number of seeds than those of docs/scaling.md; every expert
    has the tokens a verdict asks for.
    """
    active = 10 ** rng.uniform(6.3, 9)
    step, first = rng.choice([0.5, 1.0, 1.0, 1.5, 2.0]), rng.integers(0, 2)
    exponents = np.arange(first, rng.choice([6, 7, 8, 9, 10]) + 1e-9, step)
    ratios = tuple((2.0**exponents).tolist())
    return Design(
        ratios,
        int(rng.integers(2, 6)),
        active,
        max(active * 10 ** rng.uniform(1.3, 2.5), 1.1e6 * ratios[-1]),
    )


def random_smooth(rng: np.random.Generator, design: Design) -> Truth:
    """A line, a saturation, a power law, Ludziejewski's law at its budget or a starved one."""
    worth, maximum, exponent = (
        rng.uniform(1.02, 1.3),
        10 ** rng.uniform(1.5, 3.5),
        rng.uniform(0.1, 1),
    )
    nats = design.slope * math.log(worth)
    kinds = (
        Truth(f"line x{worth:.2f}", lambda r, d: -nats * np.log2(r), ("line",)),
        saturation_truth(maximum, worth),
        Truth(f"power {exponent:.2f}", lambda r, d: 2 * nats / exponent * r**-exponent, ("power",)),
        law_truth("ludziejewski"),
        Truth(
            "ludziejewski, 20 tokens a parameter",
            lambda r, d: law_truth().loss(r, d.replace(tokens=20 * d.active_params)),
            (),
        ),
    )
    return kinds[rng.integers(len(kinds))]


def random_wall(rng: np.random.Generator, design: Design) -> Truth:
    """A plateau or a hinge (a tenth of the gain goes on) anywhere with three and a half doublings
    beyond it.
    """
    at = design.ratios[0] * 2 ** rng.uniform(
        2, max(2.2, math.log2(design.ratios[-1] / design.ratios[0]) - 3.5)
    )
    nats, rest = design.slope * math.log(rng.uniform(1.12, 1.4)), rng.choice([0.0, 0.1])
    loss = lambda r, d: -nats * (np.log2(np.minimum(r, at)) + rest * np.log2(np.maximum(r / at, 1)))  # noqa: E731
    return Truth(f"wall at {at:.3g}", loss, ("plateau", "hinge"), wall=at)


def unseen(options: Options) -> Iterator[Row]:
    """198 settings drawn at random: sizes, budgets, grids (steps of half a doubling to two),
    noises, seeds, truths. Noise relative to the gain of a doubling at the start of the grid; fifty
    draws each.
    """
    rng = np.random.default_rng(2026)
    for name, make in (("smooth truths", random_smooth), ("walls", random_wall)):
        for low, high in ((0.02, 0.1), (0.1, 0.3), (0.3, 1.0)):
            outcomes, away = [], []
            for _ in range(33):
                design = random_design(rng)
                while make is random_wall and design.ratios[-1] < 50 * design.ratios[0]:
                    design = random_design(rng)
                truth = make(rng, design)
                ends = np.array([design.ratios[0], 2 * design.ratios[0]])
                gain = max(float(-np.diff(truth.loss(ends, design))[0]), 1e-4)
                judged = draw(
                    truth,
                    design,
                    gain * 10 ** rng.uniform(math.log10(low), math.log10(high)),
                    50,
                    rng,
                )
                outcomes.append(judged.outcomes())
                if truth.wall:
                    found = [
                        wall_at(judged, np.log2(design.ratios), int(i))
                        for i in np.flatnonzero(outcomes[-1] == Outcome.WALL)
                    ]
                    away += [abs(math.log2(at / truth.wall)) for at in found]
            every = np.concatenate(outcomes)
            found = _shares(every, 3)
            if away:
                found += f"; placed within {np.quantile(away, 0.95):.2f} doublings (95 %)"
            wrong = Outcome.NO_WALL if make is random_wall else Outcome.WALL
            close = not away or float(np.quantile(away, 0.95)) < 0.5
            yield Row(
                f"{name}, noise {low:g}-{high:g} of a gain",
                "wrong <= .02",
                found,
                float((every == wrong).mean()) <= 0.02 and close,
            )


def _shares(outcomes: np.ndarray, digits: int) -> str:
    """Share of each outcome, in words."""
    return ", ".join(f"{name} {(outcomes == name).mean():.{digits}f}" for name in Outcome)


def profile_coverage(options: Options) -> Iterator[Row]:
    """Share of data sets whose 95 % `profile_interval` holds the true coefficient (the deviance
    there is below the limit at which the interval ends): Hoffmann's law, 50 runs of 30M to 10B
    parameters, noise .003 of ln loss. Within: .95 by three standard errors.
    """
    truth = LAWS["hoffmann"].coefficients()
    sets = max(20, options.draws // 2)
    error, limit = 3 * math.sqrt(0.95 * 0.05 / sets), float(chdtri(1, 0.05))
    for how, delta in (("Huber 1e-3", HUBER), ("squares", SQUARES)):
        held = dict.fromkeys(truth, 0)
        for number in range(sets):
            rng = np.random.default_rng([25, number])
            point = {
                "active_params": 10 ** rng.uniform(7.5, 10, 50),
                "tokens": 10 ** rng.uniform(8.5, 11.5, 50),
            }
            noise = np.exp(rng.normal(0, 0.003, 50))
            loss = LAWS["hoffmann"].predict(point) * noise
            result = fit(
                "hoffmann", pl.DataFrame(point).with_columns(loss=loss), delta=delta, starts=20
            )
            for name in held:
                there = profile(result, name, np.array([truth[name]]))
                held[name] += there["deviance"][0] <= limit
        for name, count in held.items():
            share = count / sets
            yield Row(
                f"{name}, {how}", "0.95", f"{share:.3f} of {sets}", abs(share - 0.95) <= error
            )


SECTIONS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "clark": clark_table_3,
    "emax": clark_saturation,
    "clark-verdicts": clark_verdicts,
    "sldbench": sldbench,
    "epoch": epoch,
    "gadre": gadre,
    "numbers": single_numbers,
    "misfit": misfit,
    "verdicts": verdicts,
    "unseen": unseen,
    "profile-coverage": profile_coverage,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder of published data (default: MOE_LAB_DATA)"
    )
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="one section; may be repeated"
    )
    parser.add_argument(
        "--draws", type=int, default=500, help="simulated sweeps per truth and design"
    )
    parser.add_argument("--repetitions", type=int, default=1000, help="bootstrap repetitions")
    parser.add_argument("--write", action="store_true", help="sections into results.md")
    arguments = parser.parse_args()
    options = Options(arguments.data, arguments.draws, arguments.repetitions)
    missed = 0
    for name in arguments.only or SECTIONS:
        section = SECTIONS[name]
        what = " ".join((section.__doc__ or "").split())
        lines = [what, "", "| what | published | found | within |", "|---|---|---|---|"]
        print(f"\n## {name}\n", *lines, sep="\n", flush=True)
        try:
            for row in section(options):
                missed += row.within is False
                lines.append(
                    f"| {row.what} | {row.published} | {row.found} | {_MARKS[row.within]} |"
                )
                print(lines[-1], flush=True)
        except MoELabError as error:
            print(error, file=sys.stderr)
            return 2
        if arguments.write:
            today = datetime.date.today().isoformat()
            command = f"--only {name} --draws {options.draws} --repetitions {options.repetitions}"
            _replace(name, "\n".join([f"`{command}`, {today}.", "", *lines]))
    print(f"\n{'everything reproduced' if not missed else f'{missed} numbers not reproduced'}")
    return 1 if missed else 0


def _replace(name: str, text: str) -> None:
    """Put ``text`` under the heading ``name`` of the results, at the end without that heading."""
    title, *sections = RESULTS.read_text(encoding="utf-8").split("\n## ")
    parts = {one.partition("\n")[0]: one.partition("\n")[2].strip() for one in sections}
    parts[name] = text
    ordered = (name for name in SECTIONS if name in parts)
    body = (f"\n## {name}\n\n{parts[name]}\n" for name in ordered)
    write_text(RESULTS, title.rstrip() + "\n" + "".join(body))


_MARKS = {True: "yes", False: "NO", None: ""}

if __name__ == "__main__":
    sys.exit(main())
