"""From a finished sweep of ``recipe.py`` to answers: paired differences, their margin in compute,
verdicts, MTP acceptance.

    python experiments/longcat_mini/judge.py runs/longcat_mini --out experiments/longcat_mini

writes ``runs.parquet`` (one row per run), ``comparisons.parquet``, ``acceptance.parquet`` and
``verdict.md``. A comparison is the loss of one arm less that of another on the same seed, at the
same tokens; its interval is a 95 % t interval over seeds. It says "no difference of .02" only where
the whole interval lies within .02 nats (the effect that LongCat-Flash-Lite reports of
amplification), and "cannot tell" where the interval holds 0 and more than that. Compute: a
difference is worth ``exp(-difference / s)`` times the base's compute, with s the fall of the base's
loss per e-fold of tokens, from its own runs at half the tokens. ``q`` is the false discovery rate
among all comparisons; over the ratios the tables' mean loss and its trend are tested once each.
Without a folder the saved runs are judged again.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.stats import t

from moe_lab.analysis.difficulty.intervals import false_discovery
from moe_lab.files import atomic_path, write_text
from moe_lab.scaling import SHORT, crossing
from moe_lab.scaling.alternatives_compared import Result, result_of
from moe_lab.seed_intervals import mean_interval
from moe_lab.sweeps import RunStore
from moe_lab.text import Split, load_tokens
from moe_lab.training import excerpts_of, load_run
from moe_lab.training.acceptance import acceptance_rate
from moe_lab.versions import provenance

MARGIN = 0.02
COLUMNS = (
    *(
        "run",
        "arm",
        "seed",
        "loss",
        "total_params",
        "active_params",
        "flops_per_token",
        "train_tokens",
        "mean_ffn_count",
        "sd_ffn_count",
    ),
    *("load_cv", "dead_experts", "eval_tokens", "eval_documents", "corpus_hash"),
)


class Question(NamedTuple):
    """``arm`` against ``other``, both at the base ratio."""

    number: int
    text: str
    arm: str
    other: str


QUESTIONS = (
    Question(
        1,
        "zero-computation experts against fixed top-k at the same mean of real experts",
        "zero",
        "topk",
    ),
    Question(2, "shortcut wiring against its sequential twin", "zero", "sequential"),
    Question(4, "amplification by sqrt(d), with tables", "ngram", "ngram-plain"),
    Question(4, "amplification by a LayerNorm, with tables", "ngram-norm", "ngram-plain"),
    Question(4, "amplification by sqrt(d), without tables", "topk", "topk-plain"),
    Question(5, "one MTP module, its loss on the main one", "mtp", "topk"),
)


def read(folder: Path) -> pl.DataFrame:
    """One row per run: COLUMNS, and ``ratio`` as the recipe means it (that of the topk run with the
    same parameters).
    """
    store = RunStore(folder)
    plan = store.plan()
    rows = []
    for run in plan["sweeps"][-1]["runs"]:
        record = json.loads((store.path(run) / "result.json").read_text())
        ratio = int(plan["runs"][run]["name"].split("-r")[-1].split("-")[0])
        rows.append(
            {
                "run": run,
                "ratio": ratio,
                **{name: record.get(name) for name in COLUMNS if name != "run"},
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def paired(runs: pl.DataFrame, arm: str, other: str, ratio: int) -> np.ndarray:
    """[seeds] loss of ``arm`` less loss of ``other``."""
    both = [
        runs.filter(pl.col("arm") == name, pl.col("ratio") == ratio).select("seed", "loss")
        for name in (arm, other)
    ]
    joined = both[0].join(both[1], on="seed", suffix="_other").sort("seed")
    return (joined["loss"] - joined["loss_other"]).to_numpy()


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high): 95 %, t with n - 1 degrees of freedom; unbounded for one value."""
    mean, low, high = mean_interval(values)
    return mean, -np.inf if low is None else low, np.inf if high is None else high


def slope(runs: pl.DataFrame, ratio: int) -> float:
    """Nats by which the base's loss falls per e-fold of tokens, between half of them and all."""
    fall = []
    for _, group in runs.filter(
        pl.col("ratio") == ratio, pl.col("arm").is_in(["topk", f"topk{SHORT}"])
    ).group_by("seed"):
        long, short = (group.filter(pl.col("arm") == arm) for arm in ("topk", f"topk{SHORT}"))
        fall.append(
            (short["loss"][0] - long["loss"][0])
            / np.log(long["train_tokens"][0] / short["train_tokens"][0])
        )
    return float(np.mean(fall))


def verdict(low: float, high: float) -> str:
    result = result_of(low, high, MARGIN)
    return {
        Result.NO_DIFFERENCE: "no difference of .02",
        Result.CANNOT_TELL: "cannot tell at this size",
    }.get(result, result.value)


def comparisons(runs: pl.DataFrame, base: int) -> pl.DataFrame:
    """One row per question and ratio: question, text, arm, other, ratio, seeds, difference, low,
    high (nats), compute, verdict.
    """
    asked = [(question, base) for question in QUESTIONS]
    ratios = runs.filter(pl.col("arm") == "ngram")["ratio"].unique().sort().to_list()
    asked += [
        (Question(3, "n-gram tables for half of the experts", "ngram", "topk"), ratio)
        for ratio in ratios
    ]
    worth, rows = slope(runs, base), []
    for question, ratio in asked:
        values = paired(runs, question.arm, question.other, ratio)
        mean, low, high = interval(values)
        shape = runs.filter(pl.col("arm") == question.arm, pl.col("ratio") == ratio)
        rows.append(
            {
                **dict(zip(("question", "text", "arm", "other"), question, strict=True)),
                "ratio": ratio,
                "seeds": len(values),
                "difference": mean,
                "low": low,
                "high": high,
                "compute": float(np.exp(-mean / worth)),
                "compute_low": float(np.exp(-high / worth)),
                "compute_high": float(np.exp(-low / worth)),
                "total_over_active": shape["total_params"][0]
                / runs.filter(pl.col("ratio") == ratio, arm="topk")["active_params"][0],
                "verdict": verdict(low, high),
            }
        )
    return pl.DataFrame(rows).sort("question", "ratio", maintain_order=True)


def over_ratios(runs: pl.DataFrame) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high), 95 % t intervals over seeds, of what the tables lose: their mean over the
    ratios, and its change per doubling of the ratio (each seed's slope).
    """
    both = runs.filter(arm="ngram").join(
        runs.filter(arm="topk"), on=["ratio", "seed"], suffix="_topk"
    )
    both = both.with_columns(x=pl.col("ratio").log(2), lost=pl.col("loss") - pl.col("loss_topk"))
    seeds = [part for _, part in both.group_by("seed", maintain_order=True)]
    slopes = [np.polyfit(part["x"].to_numpy(), part["lost"].to_numpy(), 1)[0] for part in seeds]
    means = [part["lost"].mean() for part in seeds]
    return {
        "mean": interval(np.array(means, dtype=float)),
        "per doubling": interval(np.array(slopes)),
    }


def false_discoveries(table: pl.DataFrame) -> np.ndarray:
    """[rows] q of each difference among all of ``comparisons`` (Benjamini and Hochberg)."""
    df = table["seeds"].to_numpy() - 1
    half = ((table["high"] - table["low"]) / 2).to_numpy()
    statistic = np.abs(table["difference"].to_numpy()) / half * t.ppf(0.975, df)
    return false_discovery(2 * t.sf(statistic, df))


def acceptance(folder: Path, runs: pl.DataFrame) -> pl.DataFrame:
    """Per seed, of the mtp runs on their validation excerpts: seed, count ("text" or "generated"),
    drafts, accepted, rate.
    """
    rows = []
    for run, seed in runs.filter(arm="mtp").select("run", "seed").iter_rows():
        loaded = load_run(folder / run)
        config = loaded.config
        documents = load_tokens(config.text).documents(Split.VALIDATION)
        excerpts = excerpts_of(
            [len(one.ids) for one in documents], config.eval_excerpt_tokens, config.eval_tokens
        )
        for count, prompt, chosen in (
            ("text", None, excerpts),
            ("generated", config.seq_length // 2, excerpts[::4]),
        ):
            found = acceptance_rate(
                loaded.model,
                documents,
                seq_length=config.seq_length,
                excerpts=chosen,
                prompt_tokens=prompt,
            )
            drafts, accepted = int(found["drafts"].sum()), int(found["accepted"].sum())
            rows.append(
                {
                    "seed": seed,
                    "count": count,
                    "drafts": drafts,
                    "accepted": accepted,
                    "rate": accepted / drafts,
                }
            )
    return pl.DataFrame(rows)


def page(runs: pl.DataFrame, table: pl.DataFrame, drafts: pl.DataFrame, base: int) -> str:
    """``verdict.md``."""
    means = runs.group_by("arm", "ratio").agg(
        pl.len().alias("seeds"), pl.col("loss").mean(), pl.col("loss").std().alias("sd")
    )
    lines = ["# LongCat in miniature", ""]
    first = runs.row(0, named=True)
    lines += [
        f"{runs.height} runs, {runs['seed'].n_unique()} seeds, "
        f"{runs['train_tokens'].max():,} tokens each, questions at ratio {base} unless they say "
        f"another; losses on {first['eval_tokens']:,} tokens of {first['eval_documents']} "
        "documents that no run saw. Differences are paired by seed; the interval is a 95 % t "
        "interval over seeds. Compute: what the difference is worth in tokens of the base (its "
        f"loss falls {slope(runs, base):.3f} nats per e-fold between half of the tokens and all).",
        "",
        "| question | ratio | difference, nats | worth in compute | verdict | q |",
        "|---|---|---|---|---|---|",
    ]
    for row, q in zip(table.iter_rows(named=True), false_discoveries(table), strict=True):
        change = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        compute = f"x{row['compute']:.2f} ({row['compute_low']:.2f} to {row['compute_high']:.2f})"
        lines.append(
            f"| {row['question']}. {row['text']} | {row['ratio']} | {change} | {compute} | "
            f"{row['verdict']} | {q:.3f} |"
        )
    tables = table.filter(question=3).select("ratio", result="verdict")
    over = [
        f"{words}: {mean:+.4f} nats ({low:+.4f} to {high:+.4f})."
        for words, (mean, low, high) in zip(
            ("What tables lose, mean over the ratios", "Its change per doubling of the ratio"),
            over_ratios(runs).values(),
            strict=True,
        )
    ]
    lines += [
        "",
        "q: false discovery rate among these rows; above .05 a row is no finding alone.",
        "",
        f"N-gram tables over ratios: {crossing(tables)}.",
        *over,
        "",
        "Losses:",
        "",
        "| arm | ratio | loss | sd over seeds |",
    ]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {arm} | {ratio} | {loss:.4f} | {sd or 0:.4f} |"
        for arm, ratio, _, loss, sd in means.sort("arm", "ratio").iter_rows()
    ]
    lines += ["", "Drafts of the MTP module that greedy verification keeps:", ""]
    for (count,), group in drafts.group_by("count", maintain_order=True):
        mean, low, high = interval(group["rate"].to_numpy())
        spread = f"{max(low, 0):.1%} to {min(high, 1):.1%} over {group.height} seeds"
        lines.append(f"- {count}: {mean:.1%} ({spread}), {group['drafts'].sum():,} drafts")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="the finished sweep (default: judge the saved runs again)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="where the results go"
    )
    args = parser.parse_args()
    if args.folder is None:
        runs, drafts = (
            pl.read_parquet(args.out / f"{name}.parquet") for name in ("runs", "acceptance")
        )
        base = int(runs.filter(arm="zero")["ratio"][0])
        write_text(args.out / "verdict.md", page(runs, comparisons(runs, base), drafts, base))
        return
    runs = read(args.folder)
    base = int(runs.filter(arm="zero")["ratio"][0])
    table, drafts = comparisons(runs, base), acceptance(args.folder, runs)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, frame in (("runs", runs), ("comparisons", table), ("acceptance", drafts)):
        with atomic_path(args.out / f"{name}.parquet") as path:
            frame.with_columns(
                pl.lit(value).alias(column) for column, value in provenance().items()
            ).write_parquet(path)
    text = page(runs, table, drafts, base)
    write_text(args.out / "verdict.md", text)
    print(text)


if __name__ == "__main__":
    main()
