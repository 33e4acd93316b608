"""Planted truths: does an ablation find them, and do its intervals cover the truth?

    python experiments/ablation/planted.py             # draws from FIRST on; resumes
    python experiments/ablation/planted.py --percentiles   # 10 other draws with another interval
    python experiments/ablation/planted.py --summary   # the tables again, from the committed draws

A draw is a language, a tiny decoder trained on it, and three plants: a dead expert, a pair of exact
copies, and an expert to which all tokens of one class go (those of another class go to the copies).
The rule of the interval was chosen on other draws (1000 to 1019).
The language: each document mixes six classes of tokens in its own shares (Dirichlet .5); the next
token is a fixed function of the last one with probability .8, else drawn from the document's
classes. What the plants are worth is
measured with the package's own functions on `FOUND_WITH` documents and compared with `TRUTH` other
documents of the same language, the truth of the coverage too: intervals of `SAMPLES` samples of
5 to 40 documents, drawn from another pool, against the means over the `TRUTH` documents.

Out: ``draws.parquet`` (one row a draw), ``coverage.parquet`` (a row for each draw, quantity and
number of documents; ``percentiles.parquet`` the same for the bootstrap of percentiles that other
analyses use) and ``planted.md``, beside this file.
"""

import argparse
import math
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.analysis.difficulty.alignment import Align
from moe_lab.analysis.document_bootstrap import Floats, Resampling
from moe_lab.files import write_parquet, write_text
from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.routing.losses import load_balancing_loss
from moe_lab.worth import (
    Forbid,
    TopK,
    exchange_losses,
    expert_losses,
    expert_worth,
    pair_losses,
)
from moe_lab.worth.document_means import ratios, tables
from moe_lab.worth.measured_rows import SUMS
from moe_lab.worth.paired_passes import edited_sums

HERE = Path(__file__).parent
FIRST, DRAWS, OTHERS, STEPS, BATCH = 200, 100, 10, 200, 16
CLASSES, TOKENS_OF_CLASS, LENGTHS, FOLLOWS = 6, 8, (16, 48), 0.8
LAYERS, EXPERTS, D_MODEL = 2, 8, 16
FOUND_WITH, POOL, TRUTH = 100, 200, 1000
SIZES, SAMPLES = (5, 8, 12, 20, 40), 20
LEAST_EXCESS = 1e-3
"""Other pairs than the copies count for the coverage where the mean size of a document's excess is
above this (nats per token)."""
FREE = 1e-3
"""An exchange is called free where the upper end of what it costs the tokens that used one of the
pair, and the divergence, stay below this (nats)."""
CRUCIAL = 0.02
"""An expert is called crucial for a class where the lower end of what the class loses without it is
above this (nats per token), and the upper end of what every other class loses is below it (the
loss itself for a class without an interval, which the expert hardly touched). Both thresholds were
set on draws that are not among those of the table."""


class Language:
    """Documents of one draw."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.class_of = np.repeat(np.arange(CLASSES), TOKENS_OF_CLASS)
        inside = [self.rng.permutation(TOKENS_OF_CLASS) for _ in range(CLASSES)]
        self.follower = np.concatenate(
            [order + number * TOKENS_OF_CLASS for number, order in enumerate(inside)]
        )

    def documents(self, number: int) -> list[np.ndarray]:
        return [self._document() for _ in range(number)]

    def _document(self) -> np.ndarray:
        length = int(self.rng.integers(*LENGTHS, endpoint=True))
        shares = self.rng.dirichlet(np.full(CLASSES, 0.5))
        drawn = self.rng.choice(CLASSES, length, p=shares) * TOKENS_OF_CLASS
        ids = drawn + self.rng.integers(0, TOKENS_OF_CLASS, length)
        follows = self.rng.random(length) < FOLLOWS
        for place in range(1, length):
            if follows[place]:
                ids[place] = self.follower[ids[place - 1]]
        return ids

    def classes(self, documents: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        return {"class": [self.class_of[ids].astype(str) for ids in documents]}


class Plants:
    """Where the plants of a draw are: (layer, expert), (layer, first, second), (layer, expert) and
    the class."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        names = [rng.permutation(EXPERTS).tolist() for _ in range(LAYERS)]
        layers = rng.integers(0, LAYERS, 3).tolist()
        self.dead = layers[0], names[layers[0]].pop()
        first, second = names[layers[1]].pop(), names[layers[1]].pop()
        self.copies = layers[1], min(first, second), max(first, second)
        self.crucial = layers[2], names[layers[2]].pop()
        self.crucial_class, self.copies_class = rng.permutation(CLASSES)[:2].tolist()


def train(language: Language, plants: Plants, seed: int) -> Decoder:
    """A tiny decoder with the plants in it."""
    torch.manual_seed(seed)
    router = RouterConfig(kind="topk_softmax", num_experts=EXPERTS, top_k=2, router_bias=True)
    moe = MoEConfig(d_model=D_MODEL, d_expert=D_MODEL, router=router)
    model = Decoder(
        DecoderConfig(
            vocab_size=CLASSES * TOKENS_OF_CLASS, d_model=D_MODEL, num_layers=LAYERS, num_heads=2,
            context_length=LENGTHS[1], moe=moe, tie_embeddings=False,
        )
    )  # fmt: skip
    layers: list[Any] = [
        module for module in model.modules() if type(module).__name__ == "MoELayer"
    ]
    bias = layers[plants.dead[0]].router.bias
    bias.data[plants.dead[1]] = -1e3
    for layer in layers:
        layer.router.bias.requires_grad_(False)
    apart = 0.05 * torch.randn(D_MODEL)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 20, 2 * (1 - step / STEPS))
        ids, valid = padded(language.documents(BATCH))
        output = model(ids[:, :-1], valid_BS=valid[:, :-1])
        targets = torch.where(valid[:, 1:], ids[:, 1:], -100)
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        loss = loss + 0.02 * sum(load_balancing_loss(routing) for routing in output.routings)
        class_T = torch.from_numpy(language.class_of)[ids[:, :-1].flatten()]
        for layer, experts, wanted in (
            (plants.crucial[0], [plants.crucial[1]], plants.crucial_class),
            (plants.copies[0], list(plants.copies[1:]), plants.copies_class),
        ):
            p_TE = output.routings[layer].logits.softmax(dim=1)
            p_T = p_TE[:, experts].sum(dim=1).clamp(1e-6, 1 - 1e-6)
            toward_T = -torch.where(class_T == wanted, p_T, 1 - p_T).log()
            loss = loss + 0.5 * toward_T[valid[:, :-1].flatten()].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        copy_experts(layers[plants.copies[0]], plants.copies[1:], apart)
    return model.eval()


@torch.no_grad()
def copy_experts(layer: Any, pair: tuple[int, ...], apart: Tensor) -> None:
    """Make two experts equal, with rows of the router that differ a little."""
    pair_of = list(pair)
    for value in layer.experts.parameters():
        value[pair_of] = value[pair_of].mean(dim=0)
    row = layer.router.weight[pair_of].mean(dim=0)
    layer.router.weight[pair_of[0]] = row + apart
    layer.router.weight[pair_of[1]] = row - apart


def padded(documents: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """[B, S] ids and which are real."""
    width = max(len(ids) for ids in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document)
    lengths = torch.tensor([len(document) for document in documents])
    return ids, torch.arange(width) < lengths[:, None]


# ------------------------------------------------------------------------------------------------
# one draw


def draw(seed: int) -> tuple[dict[str, object], pl.DataFrame]:
    """What is found of the plants, and how often intervals cover."""
    began = time.process_time()
    language, plants = Language(seed), Plants(seed)
    model = train(language, plants, seed)
    trained = time.process_time() - began
    documents = language.documents(POOL + TRUTH)
    losses, extra = measured(model, language, documents, plants, seed)
    row = {"draw": seed, "train_seconds": round(trained, 1)}
    row |= found(model, documents[:FOUND_WITH], losses, plants)
    coverage = covered(losses, extra, seed).with_columns(draw=pl.lit(seed, pl.Int64))
    row["seconds"] = round(time.process_time() - began, 1)
    return row, coverage.select("draw", pl.exclude("draw"))


def percentiles(seed: int) -> pl.DataFrame:
    """How often the intervals of ``document_bootstrap`` cover."""
    language, plants = Language(seed), Plants(seed)
    model = train(language, plants, seed)
    losses, extra = measured(model, language, language.documents(POOL + TRUTH), plants, seed)
    coverage = covered(losses, extra, seed, percentile_ratios)
    return coverage.select(pl.lit(seed, pl.Int64).alias("draw"), *coverage.columns)


def percentile_ratios(above: Floats, below: Floats, touched: Floats) -> tuple[Floats, ...]:
    """As ``ratios``."""

    def statistic(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return (weights @ above) / (weights @ below)

    rests_on = ((below > 0) & (touched > 0)).sum(axis=0)
    return above.sum(axis=0), *Resampling().interval(statistic, len(above), rests_on)


def measured(
    model: Decoder, language: Language, documents: list[np.ndarray], plants: Plants, seed: int
) -> tuple[pl.DataFrame, dict[str, tuple[Floats, Floats, Floats]]]:
    """Losses without each expert, and ``sums_of_sets``."""
    losses = expert_losses(
        model, documents, classes=language.classes(documents), align=Align.INPUT, batch_tokens=8192
    )
    return losses, sums_of_sets(model, documents, plants, seed)


def sums_of_sets(
    model: Decoder, documents: list[np.ndarray], plants: Plants, seed: int
) -> dict[str, tuple[Floats, Floats, Floats]]:
    """Quantity -> [documents, M] sums above and below, and where a document could move the mean:
    the excess of the copies and of a drawn pair of each layer, and k = 1.
    """
    rng = np.random.default_rng([seed, 3])
    pairs = [plants.copies]
    pairs += [(layer, *rng.permutation(EXPERTS)[:2].tolist()) for layer in range(LAYERS)]
    sets = [[TopK(None, 1)]]
    for layer, first, second in pairs:
        sets += [[Forbid(layer, first)], [Forbid(layer, second)]]
        sets += [[Forbid(layer, first), Forbid(layer, second)]]
    sums = edited_sums(model, documents, sets, batch_tokens=8192)[:, :, 0]
    tokens, loss, used = (sums[..., SUMS.index(name)].T for name in ("tokens", "d_loss", "used"))
    excess = loss[:, 3::3] - loss[:, 1::3] - loss[:, 2::3]
    touched = ((used[:, 3::3] > 0) | (loss[:, 3::3] != 0)).astype(float)
    parts = excess, tokens[:, 3::3], touched
    large = np.abs(excess).sum(axis=0) / tokens[:, 0].sum() > LEAST_EXCESS
    return {
        "excess of the copies": tuple(part[:, :1] for part in parts),
        "excess of other pairs": tuple(part[:, 1:][:, large[1:]] for part in parts),
        "one expert of two": (loss[:, :1], tokens[:, :1], tokens[:, :1]),
    }  # type: ignore[return-value]


def found(
    model: Decoder, documents: list[np.ndarray], losses: pl.DataFrame, plants: Plants
) -> dict[str, object]:
    """The plants by the measurements on `FOUND_WITH` documents, and wrong calls beside `TRUTH`."""
    worth = expert_worth(losses.filter(pl.col("doc") < FOUND_WITH))
    truth = expert_worth(losses.filter(pl.col("doc") >= POOL))
    every = worth.filter(pl.col("class").is_null())
    names = {(row["layer"], row["expert"]) for row in every.filter(used=0).iter_rows(named=True)}
    really = truth.filter(pl.col("class").is_null())
    unused = {
        (layer, expert) for layer, expert in really.filter(used=0).select("layer", "expert").rows()
    }
    dead = really.filter(layer=plants.dead[0], expert=plants.dead[1])

    layer = plants.copies[0]
    pairs = [(layer, *pair) for pair in combinations(range(EXPERTS), 2)]
    exchanges = exchange_losses(model, documents, pairs)
    free = exchanges.filter(
        pl.col("used_hi") < FREE, pl.col("used_lo") > -FREE, pl.col("kl") < FREE, pl.col("used") > 0
    ).select("layer", "first", "second")
    (planted,) = exchanges.filter(
        layer=layer, first=plants.copies[1], second=plants.copies[2]
    ).to_dicts()
    excess = pair_losses(model, documents, [plants.copies]).to_dicts()[0]

    calls = crucial(worth)
    true = truth.filter(pl.col("class").is_not_null())
    largest = {
        (row["layer"], row["expert"], row["class"]): row["d_loss"]
        for row in true.iter_rows(named=True)
    }
    want = (*plants.crucial, str(plants.crucial_class))
    others = max(value for key, value in largest.items() if key[:2] == want[:2] and key != want)
    return {
        "dead_loss": float(dead["d_loss"][0]),
        "dead_found": plants.dead in names,
        "dead_calls": len(names),
        "dead_wrong": len(names - unused),
        "copies_used": planted["used"] / planted["tokens"],
        "copies_loss": planted["d_loss_used"],
        "copies_kl": planted["kl"],
        "copies_found": plants.copies in free.rows(),
        "copies_wrong": len(set(free.rows()) - {plants.copies}),
        "pairs": exchanges.height - 1,
        "single_loss": max(excess["d_first"], excess["d_second"]),
        "both_loss": excess["d_both"],
        "excess_lo": excess["lo"],
        "excess_found": excess["lo"] > 0,
        "crucial_loss": largest[want],
        "crucial_others": others,
        "crucial_found": want in calls,
        "crucial_calls": len(calls),
        "crucial_wrong": sum(not crucial_in_truth(largest, call) for call in calls),
    }


def crucial(worth: pl.DataFrame) -> set[tuple[int, int, str]]:
    """(layer, expert, class) that are called crucial."""
    calls = set()
    by_class = worth.filter(pl.col("class").is_not_null())
    for (layer, expert), part in by_class.group_by("layer", "expert"):
        above = part.filter(pl.col("lo") > CRUCIAL)
        below = part.filter(pl.col("hi").fill_null(pl.col("d_loss")) < CRUCIAL)
        if above.height == 1 and below.height == part.height - 1:
            calls.add((layer, expert, above["class"][0]))
    return calls


def crucial_in_truth(
    largest: dict[tuple[int, int, str], float], call: tuple[int, int, str]
) -> bool:
    others = [value for key, value in largest.items() if key[:2] == call[:2] and key != call]
    return largest[call] > CRUCIAL and max(others) < CRUCIAL


def covered(
    losses: pl.DataFrame,
    extra: dict[str, tuple[Floats, Floats, Floats]],
    seed: int,
    interval: Callable[..., tuple[Floats, ...]] = ratios,
) -> pl.DataFrame:
    """[quantity, docs, intervals, missing, below, above, zero]: of the intervals of samples of so
    many documents, those that are missing, lie below the truth or above it; ``zero`` counts
    intervals of exactly 0 with a truth of 0 (they cover)."""
    names, sums = tables(losses, ["layer", "expert", "by", "class"], SUMS)
    every = names["class"].is_null().to_numpy()
    touched = ((sums["used"] > 0) | (sums["d_loss"] != 0)).astype(float)
    quantities = {
        "d_loss": tuple(part[:, every] for part in (sums["d_loss"], sums["tokens"], touched)),
        "d_loss_used": tuple(
            part[:, every] for part in (sums["d_loss_used"], sums["used"], sums["used"])
        ),
        "d_loss of a class": tuple(
            part[:, ~every] for part in (sums["d_loss"], sums["tokens"], touched)
        ),
        **extra,
    }
    rng, rows = np.random.default_rng([seed, 2]), []
    for name, parts in quantities.items():
        above, below, _ = parts
        with np.errstate(invalid="ignore"):
            truth = above[POOL:].sum(axis=0) / below[POOL:].sum(axis=0)
        known = np.isfinite(truth)
        for size in SIZES:
            counts = np.zeros(5, int)
            for _ in range(SAMPLES):
                chosen = rng.permutation(POOL)[:size]
                above, below, moved = (part[chosen][:, known] for part in parts)
                _, low, high = interval(above, below, touched=moved)
                missing = np.isnan(low)
                counts += [
                    len(low),
                    missing.sum(),
                    (high < truth[known])[~missing].sum(),
                    (low > truth[known])[~missing].sum(),
                    ((low == 0) & (high == 0) & (truth[known] == 0)).sum(),
                ]
            rows.append((name, size, *counts.tolist()))
    columns = ("quantity", "docs", "intervals", "missing", "below", "above", "zero")
    return pl.DataFrame(rows, schema=columns, orient="row")


# ------------------------------------------------------------------------------------------------
# the tables


def wilson(successes: int, number: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z2, share = 1.96**2, successes / number
    middle = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = math.sqrt(z2 * (share * (1 - share) / number + z2 / (4 * number**2))) / (1 + z2 / number)
    return max(0.0, middle - half), min(1.0, middle + half)


def coverage_rates(coverage: pl.DataFrame) -> pl.DataFrame:
    """[quantity, docs, coverage, se, below, above, missing, draws]: shares of the intervals that
    are there and not of an exact 0, and the standard error of the coverage over draws."""
    each = coverage.with_columns(n=pl.col("intervals") - pl.col("missing") - pl.col("zero"))
    each = each.filter(pl.col("n") > 0).with_columns(
        share=1 - (pl.col("below") + pl.col("above")) / pl.col("n")
    )
    return (
        each.group_by("quantity", "docs", maintain_order=True)
        .agg(
            coverage=1 - (pl.sum("below") + pl.sum("above")) / pl.sum("n"),
            se=pl.std("share") / pl.len().sqrt(),
            below=pl.sum("below") / pl.sum("n"),
            above=pl.sum("above") / pl.sum("n"),
            missing=pl.sum("missing") / pl.sum("intervals"),
            draws=pl.len(),
        )
        .sort("quantity", "docs")
    )


def summary(draws: pl.DataFrame, coverage: pl.DataFrame, others: pl.DataFrame) -> str:
    """The page of results."""
    number = draws.height
    lines = [
        "# Planted experts",
        "",
        f"{number} draws of `python experiments/ablation/planted.py`: each a language, a decoder "
        f"of {LAYERS} layers x {EXPERTS} experts trained in "
        f"{draws['train_seconds'].median():.0f} s of one core, and three plants, looked for on "
        f"{FOUND_WITH} documents of {LENGTHS[0]} to {LENGTHS[1]} tokens.",
        "",
        "| plant | found | 95 % | wrong calls | the truth, median (smallest to largest) |",
        "|---|---|---|---|---|",
    ]
    calls = {
        "dead": (draws["dead_wrong"].sum(), draws["dead_calls"].sum()),
        "copies": (
            draws["copies_wrong"].sum(),
            int(draws["copies_wrong"].sum()) + int(draws["copies_found"].sum()),
        ),
        "crucial": (draws["crucial_wrong"].sum(), draws["crucial_calls"].sum()),
    }
    for name, what, truth in (
        ("dead", "a dead expert: no token used it", "dead_loss"),
        ("copies", "a pair of copies: their exchange is free", "copies_kl"),
        ("excess", "the same pair: both are worth more than the sum", "both_loss"),
        ("crucial", "an expert crucial for one class", "crucial_loss"),
    ):
        count = int(draws[f"{name}_found"].sum())
        low, high = wilson(count, number)
        values = draws[truth]
        mistaken = "{} of {}".format(*calls[name]) if name in calls else ""
        lines.append(
            f"| {what} | {count} of {number} | {low:.3f} to {high:.3f} | {mistaken} | "
            f"{values.median():.3g} ({values.min():.3g} to {values.max():.3g}) nats |"
        )
    lines += [
        "",
        "A call is wrong where the large sample does not bear it out; calls of experts that were "
        "not planted can be right: training makes some experts crucial for a class by itself.",
    ]
    lines += [
        "",
        "Coverage of intervals of 95 %, by the number of documents; the standard error is over "
        f"draws; the truth is the mean over {TRUTH} other documents.",
        "",
        *rates_table(coverage),
        "",
        f"The same for the bootstrap of percentiles ({others['draw'].n_unique()} other draws), "
        "which other analyses of the package use:",
        "",
        *rates_table(others),
    ]
    return "\n".join(lines) + "\n"


def rates_table(coverage: pl.DataFrame) -> list[str]:
    lines = [
        "| quantity | " + " | ".join(f"{size} documents" for size in SIZES) + " |",
        "|---|" + "---|" * len(SIZES),
    ]
    for (name,), part in coverage_rates(coverage).group_by("quantity", maintain_order=True):
        cells = " | ".join(
            f"{row['coverage']:.3f} ± {row['se']:.3f}" for row in part.iter_rows(named=True)
        )
        lines.append(f"| {name} | {cells} |")
    return lines


def add(path: Path, frame: pl.DataFrame) -> None:
    """Add the rows of a draw to a table, in place of those that it has of that draw."""
    if path.exists():
        others = pl.col("draw") != frame["draw"][0]
        frame = pl.concat([pl.read_parquet(path).filter(others), frame])
    write_parquet(path, frame.sort("draw", maintain_order=True))


def held(path: Path) -> set[int]:
    return set(pl.read_parquet(path)["draw"]) if path.exists() else set()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--percentiles", action="store_true", help="another interval, other draws")
    parser.add_argument("--summary", action="store_true", help="only write the tables again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = [HERE / f"{name}.parquet" for name in ("draws", "coverage", "percentiles")]
    drawn, coverages, others = paths
    if args.percentiles:
        for seed in sorted(set(range(DRAWS, DRAWS + OTHERS)) - held(others)):
            add(others, percentiles(seed))
    elif not args.summary:
        for seed in sorted(set(range(FIRST, FIRST + args.draws)) - held(drawn)):
            row, coverage = draw(seed)
            add(coverages, coverage)
            add(drawn, pl.DataFrame([row]))  # last: it says what is done
            print(row, flush=True)
    if all(path.exists() for path in paths):
        write_text(HERE / "planted.md", summary(*map(pl.read_parquet, paths)))


if __name__ == "__main__":
    main()
