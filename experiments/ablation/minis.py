"""What the experts of small trained models are worth: which score is right, curves, k, pairs.

    for seed in 0 1 2; do
      moe-lab train --experts 16 --top-k 2 --text stdlib --tokens 600k --seed $seed \\
        --set model.num_layers=3 --set model.d_model=64 --set model.moe.d_model=64 \\
        --set model.moe.d_expert=64 --out runs/mini-$seed
    done
    python experiments/ablation/minis.py runs/mini-*    # a finished run is not measured again
    python experiments/ablation/minis.py                # the page again, from the committed tables

Held-out documents are the first `TOKENS` tokens of `DOCUMENTS` validation documents of the run's
corpus. Out, beside this file: ``minis_{worth,agreement,curves,top_k,pairs,exchanges,replay,
routing}.parquet``, each with a column ``run``, and ``minis.md``. The last two compare the model in
bfloat16, which records a trace, with the same in float32, which replays it.
"""

import argparse
import copy
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import torch

from moe_lab.files import write_parquet, write_text
from moe_lab.text import (
    Split,
    TokenizedDocument,
    TokenizedText,
    load_tokens,
    token_classes,
)
from moe_lab.trace import capture, open_trace
from moe_lab.training import LoadedRun, load_run
from moe_lab.worth import (
    drift_sentence,
    exchange_losses,
    expert_losses,
    expert_scores,
    expert_worth,
    pair_losses,
    removal_curves,
    replay_divergence,
    routing_agreement,
    score_agreement,
    top_k_losses,
)

HERE = Path(__file__).parent
DOCUMENTS, TOKENS, RANDOM_ORDERS, PAIRS = 80, 128, 19, 20
CLASSES = ("lexer", "copy")
MEASURED = ("worth", "agreement", "curves", "top_k", "pairs", "exchanges")
REPLAYED = ("replay", "routing")
TABLES = (*MEASURED, *REPLAYED)


def held_out(run: LoadedRun) -> tuple[TokenizedText, list[TokenizedDocument]]:
    """The text of a run, and the documents whose beginnings are measured."""
    text = load_tokens(run.config.text)
    every = text.documents(Split.VALIDATION)
    places = np.linspace(0, len(every) - 1, min(DOCUMENTS, len(every))).astype(int)
    return text, [every[place] for place in places]


def measure(folder: Path) -> dict[str, pl.DataFrame]:
    """The tables `MEASURED` of one run."""
    run = load_run(folder)
    text, chosen = held_out(run)
    documents = [document.ids[:TOKENS] for document in chosen]
    columns = [token_classes(document, run.tokenizer, text.counts()) for document in chosen]
    classes = {name: [frame[name][:TOKENS] for frame in columns] for name in CLASSES}
    losses = expert_losses(run.model, documents)
    scores = expert_scores(run.model, documents)
    return {
        "worth": expert_worth(losses),
        "agreement": score_agreement(scores, losses),
        "curves": removal_curves(run.model, documents, scores, losses, random_orders=RANDOM_ORDERS),
        "top_k": top_k_losses(run.model, documents, range(1, 5), classes=classes),
        "pairs": pair_losses(run.model, documents, PAIRS),
        "exchanges": exchange_losses(run.model, documents, PAIRS),
    }


def replay(folder: Path) -> dict[str, pl.DataFrame]:
    """The tables `REPLAYED` of one run."""
    run = load_run(folder)
    _, chosen = held_out(run)
    model, halved = run.model, copy.deepcopy(run.model).bfloat16()
    with TemporaryDirectory() as scratch:
        traces = []
        for name, recorded in (("float32", model), ("bfloat16", halved)):
            with torch.no_grad(), capture(recorded, Path(scratch) / name):
                for document in chosen:
                    recorded(torch.from_numpy(document.ids[:TOKENS].astype(np.int64))[None])
            traces.append(open_trace(Path(scratch) / name))
        return {
            "replay": replay_divergence(model, traces[1], recorder=halved),
            "routing": routing_agreement(*traces),
        }


# ------------------------------------------------------------------------------------------------
# the page


def number(value: Any, low: float | None = None, high: float | None = None) -> str:
    """A value with its interval."""
    if value is None:
        return ""
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    line = "| " + " | ".join(head) + " |"
    return [line, "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows), ""]


def page(frames: dict[str, pl.DataFrame]) -> str:
    """The page of results."""
    runs = frames["worth"]["run"].unique().sort().to_list()
    worth, curves = frames["worth"], frames["curves"]
    docs = worth["docs"].max()
    lines = [
        "# Experts of small models",
        "",
        f"`python experiments/ablation/minis.py`: {len(runs)} runs of 3 layers x 16 experts, two "
        f"of them a token, 600k training tokens; {docs} held-out documents of {TOKENS} tokens, "
        "intervals of 95 % over documents. Losses in nats per predicted token, with the "
        "experts forbidden. No claim beyond these models.",
        "",
        "## Single experts",
        "",
    ]
    rows = []
    for run in runs:
        part = worth.filter(run=run)
        best = part.sort("d_loss", descending=True).row(0, named=True)
        rows.append(
            [
                run,
                f"layer {best['layer']}, expert {best['expert']}: "
                + number(best["d_loss"], best["lo"], best["hi"]),
                number(part["d_loss"].median()),
                f"{(part['lo'] > 0).sum()} of {part.height}",
                f"{(part['hi'] < 0).sum()}",
            ]
        )
    lines += table(["run", "largest", "median", "interval above 0", "below 0"], rows)
    lines += ["## Which score ranks experts as the loss does", "", "All layers in one order:", ""]
    model = frames["agreement"].filter(pl.col("layer").is_null())
    rows = []
    for score in model["score"].unique(maintain_order=True):
        cells = [model.filter(run=run, score=score).row(0, named=True) for run in runs]
        found = ", ".join(f"{cell['top']:.0%}" for cell in cells)
        rows.append(
            [score, *(number(cell["rho"], cell["lo"], cell["hi"]) for cell in cells), found]
        )
    lines += table(["score", *(f"rho, {run}" for run in runs), "top tenth found"], rows)
    lines += [
        "## Many experts removed",
        "",
        f"Chosen on one half of the documents, judged on the other; p against {RANDOM_ORDERS} "
        "random orders (smallest possible .05).",
        "",
    ]
    named = curves.filter(~pl.col("order").str.starts_with("random"))
    for share in (0.25, 0.5):
        rows = []
        for order in [*named["order"].unique(maintain_order=True), "random, median"]:
            row = [order]
            for run in runs:
                part = curves.filter(run=run, share=share)
                if order == "random, median":
                    random = part.filter(pl.col("order").str.starts_with("random"))["d_loss"]
                    row.append(f"{random.median():.3f} ({random.min():.3f} to {random.max():.3f})")
                    continue
                cell = part.filter(order=order).row(0, named=True)
                row.append(
                    number(cell["d_loss"], cell["lo"], cell["hi"]) + f", p {cell['p_random']:.2f}"
                )
            rows.append(row)
        lines += [f"{share:.0%} of each layer:", ""]
        lines += table(["order", *runs], rows)
    lines += ["## Experts of a token", "", "What k buys over k - 1:", ""]
    every = frames["top_k"].filter(pl.col("class").is_null(), pl.col("gain").is_not_null())
    rows = [
        [str(k)]
        + [
            number(*every.filter(run=run, k=k).select("gain", "gain_lo", "gain_hi").row(0))
            for run in runs
        ]
        for k in (2, 3, 4)
    ]
    lines += table(["k", *runs], rows)
    lines += ["What the second expert buys, by class of the token that has it:", ""]
    second = frames["top_k"].filter(pl.col("class").is_not_null(), k=2)
    common = second.group_by("by", "class").agg(pl.min("docs"), pl.len()).sort("by", "class")
    rows = [
        [f"{by} {name}"]
        + [
            number(
                *second.filter(run=run, by=by, **{"class": name})
                .select("gain", "gain_lo", "gain_hi")
                .row(0)
            )
            for run in runs
        ]
        for by, name, docs, count in common.iter_rows()
        if docs >= 20 and count == len(runs)
    ]
    lines += table(["class", *runs], rows)
    lines += ["## Pairs", ""]
    rows = []
    for run in runs:
        pairs = frames["pairs"].filter(run=run)
        exchanges = frames["exchanges"].filter(run=run)
        singles = (pairs["d_first"] + pairs["d_second"]).to_numpy().sum()
        ratio = pairs["excess"].to_numpy().sum() / singles
        rows.append(
            [
                run,
                f"{(pairs['lo'] > 0).sum()} of {pairs.height}",
                f"{(pairs['hi'] < 0).sum()}",
                f"{ratio:+.0%}",
                number(exchanges["d_loss_used"].min()),
                number(exchanges["d_loss_used"].median()),
            ]
        )
    head = ["run", "excess above 0", "below 0", "excess over the sum, all pairs"]
    head += ["smallest exchange, where used", "median exchange, where used"]
    lines += table(head, rows)
    lines += [
        "## bfloat16 beside float32",
        "",
        "The model in bfloat16 records, the same in float32 replays. KL of its prediction from the "
        "recorder's, in thousandths of a nat per token.",
        "",
    ]
    rows = []
    for run in runs:
        routing, replayed = (frames[name].filter(run=run) for name in REPLAYED[::-1])
        rows.append(
            [
                run,
                f"{routing['slots'].min():.2%} to {routing['slots'].max():.2%}",
                f"{(routing['margin_differs'] / routing['margin_same']).max():.3f}",
                *(
                    number(*(1000 * value for value in row))
                    for row in replayed.select("kl", "lo", "hi").iter_rows()
                ),
            ]
        )
    head = ["run", "equal slots, by layer", "margin of those that differ, over the others'"]
    head += frames["replay"]["selection"].unique(maintain_order=True).to_list()
    lines += table(head, rows)
    lines += [f"{run}: {drift_sentence(frames['routing'].filter(run=run))}" for run in runs]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = {name: HERE / f"minis_{name}.parquet" for name in TABLES}
    for folder in args.runs:
        frames = {n: pl.read_parquet(path) for n, path in paths.items() if path.exists()}
        start, made = time.process_time(), {}
        for names, make in ((MEASURED, measure), (REPLAYED, replay)):
            if not all(name in frames and folder.name in frames[name]["run"] for name in names):
                made |= make(folder)
        for name, frame in made.items():
            frame = frame.select(pl.lit(folder.name).alias("run"), *frame.columns)
            old = [frames[name].filter(pl.col("run") != folder.name)] if name in frames else []
            write_parquet(paths[name], pl.concat([*old, frame]).sort("run", maintain_order=True))
        print(f"{folder}: {time.process_time() - start:.0f} s of processor time", flush=True)
    write_text(HERE / "minis.md", page({n: pl.read_parquet(path) for n, path in paths.items()}))


if __name__ == "__main__":
    main()
