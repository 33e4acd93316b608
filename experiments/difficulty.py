"""Does compute follow difficulty? Five routers whose count can vary, two tokenizers, two balance
strengths, three seeds; and a calibration.

Each run is a small decoder; what its router spends on documents that neither model nor tokenizer
has seen is set against two difficulties that the model has no hand in: cross-fitted trigram
surprisal and the loss of a dense twin. A verdict is printed only where sign and equivalence class
agree in 80 % of the cells. ``calibrate`` asks the same analysis about simulated routers of known
answer.

    moe-lab sweep run experiments/difficulty.py --preset cpu --out runs/difficulty
    python experiments/difficulty.py judge runs/difficulty  # writes cells.parquet, verdicts.parquet
    python experiments/difficulty.py calibrate  # writes coverage.parquet, calibration.parquet
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from moe_lab.analysis.difficulty import difficulty_association
from moe_lab.analysis.difficulty.scored_documents import score
from moe_lab.files import atomic_path
from moe_lab.model import DecoderConfig, MoEConfig
from moe_lab.routing import RouterConfig
from moe_lab.sweeps import SweepConfig
from moe_lab.text import (
    Split,
    TextConfig,
    TokenizedText,
    load_tokens,
    ngram_surprisal,
    token_classes,
)
from moe_lab.training import Dtype, Excerpt, OptimizerConfig, RunConfig, load_run
from moe_lab.training.reference import dense_twins

QUESTION = "Does compute follow difficulty once the identity of the token is held fixed?"
PRESETS = ("smoke", "cpu", "gpu")
OUT = Path(__file__).parent / "difficulty"

LONGCAT = {"num_zero_experts": 8, "top_k": 3, "routed_scaling_factor": 8.0}
ROUTERS: dict[str, dict[str, Any]] = {
    "longcat": LONGCAT,
    "moepp": {"num_zero_experts": 8, "top_k": 3},
    "top_p": {"top_k": 16, "top_p": 0.4},
    "remoe": {"max_slots": 16, "router_bias": True},
    "expert_threshold": {"max_slots": 16, "min_slots": 1},
}
"""Label -> fields of ``RouterConfig``, at about two of 16 experts per token."""

BALANCE: dict[str, dict[str, dict[str, Any]]] = {
    "none": {
        "longcat": {"aux": 0.0, "controller": None},
        "moepp": {"aux": 0.0},
        "top_p": {"aux": 0.0, "own": 1e-4},
        "remoe": {"aux": 0.0},
        "expert_threshold": {"aux": 0.0},
    },
    "strong": {
        "longcat": {
            "aux": 1e-2,
            "controller": {"kind": "proportional", "rate": 0.1, "target_ffn_count": 2.0},
        },
        "moepp": {"aux": 1e-1},
        "top_p": {"aux": 1e-1, "own": 1e-4},
        "remoe": {"aux": 1e-1},
        "expert_threshold": {"aux": 1e-1},
    },
}
"""Balance strength -> router -> ``aux`` (coefficient of the balance loss), ``own`` (of the router's
own), and fields of the router.
"""

_COLUMNS = ("width", "layers", "length", "tokens", "batch", "vocabularies", "seeds", "excerpt")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(zip(_COLUMNS, (32, 2, 64, 2_000, 4, (512,), 1, 70), strict=True)),
    "cpu": dict(zip(_COLUMNS, (48, 2, 96, 48_000, 4, (2048, 8192), 3, 150), strict=True)),
    "gpu": dict(zip(_COLUMNS, (256, 8, 256, 200_000_000, 64, (2048, 8192), 3, None), strict=True)),
}
"""``excerpt``: leading tokens of each unseen document that are judged; None: all.

The gpu preset wants a corpus of a thousand documents.
"""

MIN_DOCUMENTS = 150
"""The default corpus leaves 174 documents unseen; the rule of 200 is relaxed to what there is."""
AGREEMENT = 0.8
NEITHER = ("frequency-driven", "identity-driven", "no material association")
RIGHT = {
    0.0: NEITHER,
    0.05: ("difficulty-aligned",),
    0.10: ("difficulty-aligned",),
    -0.10: ("inverted",),
}


def sweep(preset: str, *, seed: int = 0, device: str = "cpu") -> SweepConfig:
    size = SIZES[preset]
    runs = [
        _run(preset, size, router, balance, vocabulary, seed + offset, device)
        for offset in range(size["seeds"])
        for vocabulary in size["vocabularies"]
        for balance in BALANCE
        for router in ROUTERS
    ]
    return SweepConfig(
        name=f"difficulty_{preset}", question=QUESTION, preset=preset, runs=tuple(runs)
    )


def _run(
    preset: str,
    size: dict[str, Any],
    router: str,
    balance: str,
    vocabulary: int,
    seed: int,
    device: str,
) -> RunConfig:
    fields = {"num_experts": 16, "top_k": 2} | ROUTERS[router] | BALANCE[balance][router]
    aux, own = fields.pop("aux"), fields.pop("own", 1.0)
    moe = MoEConfig(
        d_model=size["width"],
        d_expert=size["width"],
        router=RouterConfig.from_dict({"kind": router} | fields),
    )
    return RunConfig(
        name=f"{router}-{balance}-v{vocabulary}-s{seed}",
        arm=f"{router}, {balance}",
        seed=seed,
        model=_decoder(size, vocabulary, moe),
        text=TextConfig(vocab_size=vocabulary),
        optimizer=OptimizerConfig(lr=2e-3 if preset == "gpu" else 4e-3),
        batch_size=size["batch"],
        seq_length=size["length"],
        train_tokens=size["tokens"],
        router_aux_loss_coef=aux,
        router_own_loss_coef=own,
        eval_tokens=5_000 if preset != "gpu" else 200_000,
        device=device,
        dtype=Dtype.BFLOAT16 if preset == "gpu" else Dtype.FLOAT32,
    )


def _decoder(size: dict[str, Any], vocabulary: int, moe: MoEConfig | None) -> DecoderConfig:
    heads = max(1, size["width"] // 24 if size["width"] % 32 else size["width"] // 32)
    return DecoderConfig(
        vocab_size=vocabulary,
        num_layers=size["layers"],
        d_model=size["width"],
        num_heads=heads,
        context_length=size["length"],
        moe=moe,
        d_dense=None if moe is not None else 3 * size["width"],
    )


def judge(
    folder: Path, preset: str, vocabularies: tuple[int, ...] = (), resamples: int = 1000
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Every finished run of the sweep (of some vocabularies) against both difficulties: one row per
    cell, layer and alignment; and one verdict per router.
    """
    rows = list(_cells(folder, SIZES[preset], vocabularies, resamples))
    cells = pl.concat(rows)
    return cells, verdicts(cells)


def _cells(
    folder: Path, size: dict[str, Any], vocabularies: tuple[int, ...], resamples: int
) -> Iterator[pl.DataFrame]:
    kept: dict[int, tuple[TokenizedText, pl.DataFrame]] = {}
    for path in sorted(folder.glob("*/done")):
        run = load_run(path.parent)
        vocabulary = run.config.text.vocab_size
        if vocabularies and vocabulary not in vocabularies:
            continue
        if vocabulary not in kept:
            text = load_tokens(run.config.text)
            kept[vocabulary] = text, _difficulties(text, run.config, size)
        text, difficulties = kept[vocabulary]
        documents = _unseen(text)
        ids = [document.ids[: size["excerpt"]] for document in documents]
        scored = score(
            run.model,
            ids,
            [document.index for document in documents],
            seq_length=run.config.seq_length,
        )
        frame = scored.frame().join(difficulties, on=["doc", "pos"], how="left")
        router, balance, _, _ = run.config.name.rsplit("-", 3)
        for name in ("ngram_loss", "ref_loss"):
            table = difficulty_association(
                frame, name, resamples=resamples, min_documents=MIN_DOCUMENTS, details=True
            )
            cell = {
                "router": router,
                "balance": balance,
                "vocabulary": vocabulary,
                "seed": run.config.seed,
                "difficulty": name,
            }
            cell |= {
                "loss": float(np.nanmean(scored.loss)),
                "mean_ffn_count": float(scored.ffn_count.mean()),
            }
            yield table.select(*(pl.lit(value).alias(key) for key, value in cell.items()), pl.all())
        print(f"judged {run.config.name}", flush=True)


def _unseen(text: TokenizedText) -> list[Any]:
    return [*text.documents(Split.VALIDATION), *text.documents(Split.REFERENCE)]


def _difficulties(text: TokenizedText, config: RunConfig, size: dict[str, Any]) -> pl.DataFrame:
    """[doc, pos, ngram_loss, ref_loss, lexer] of the unseen documents; each is scored by text that
    does not hold it.
    """
    unseen = _unseen(text)
    documents = [*unseen, *text.documents(Split.TRAIN)]
    vocabulary = text.tokenizer.vocab_size
    surprisal = ngram_surprisal([document.ids for document in documents], vocabulary)[: len(unseen)]
    classes = [token_classes(document, text.tokenizer, text.counts()) for document in unseen]
    frame = pl.concat(classes).select(
        "doc", "pos", "lexer", "freq_band", "subword", "copy", "boundary"
    )
    frame = frame.with_columns(ngram_loss=pl.Series(np.concatenate(surprisal)))
    twin = config.replace(
        model=_decoder(size, vocabulary, None), seed=1000, train_tokens=2 * size["tokens"]
    )
    excerpts = [
        Excerpt(index, 0, min(len(document.ids), size["excerpt"] or len(document.ids)))
        for index, document in enumerate(unseen)
    ]
    twins = dense_twins(documents, twin, excerpts=excerpts).select("doc", "pos", "ref_loss")
    print(
        f"twins of vocabulary {vocabulary}: {twins['ref_loss'].drop_nulls().mean():.3f} nats/token",
        flush=True,
    )
    return frame.join(twins, on=["doc", "pos"], how="left").with_columns(
        pl.col("doc", "pos").cast(pl.Int64)
    )


CLASSES = {
    "difficulty-aligned": 1,
    "inverted": -1,
    "frequency-driven": 0,
    "identity-driven": 0,
    "no material association": 0,
}


def verdicts(cells: pl.DataFrame) -> pl.DataFrame:
    """[router, layer, align, cells, agree, verdict, rho_token, rho_min, rho_max]: over balance,
    tokenizer, difficulty and seed.

    The verdict is the commonest equivalence class (aligned, inverted, nothing material within ids)
    if ``AGREEMENT`` of the cells share it and the sign, in words; else "no verdict: the cells
    disagree".
    """
    classed = cells.with_columns(
        sign=pl.col("verdict").replace_strict(CLASSES, default=None, return_dtype=pl.Int8),
        static=pl.col("verdict") == "static layer",
    )
    rows = []
    for key, group in classed.group_by("router", "layer", "align", maintain_order=True):
        moving = group.filter(~pl.col("static"))
        counts = moving["sign"].value_counts(sort=True).drop_nulls("sign")
        common = counts.row(0, named=True) if counts.height else None
        agree = common["count"] / group.height if common else 0.0
        words = {1: "difficulty-aligned", -1: "inverted", 0: "no material association within ids"}
        verdict = (
            words[common["sign"]]
            if common and agree >= AGREEMENT
            else "no verdict: the cells disagree"
        )
        if moving.height < (1 - AGREEMENT) * group.height:
            verdict = "static layer"
        row = dict(zip(("router", "layer", "align"), key, strict=True)) | {
            "cells": group.height,
            "agree": agree,
            "verdict": verdict,
        }
        row |= {"rho_raw": moving["rho_raw"].mean(), "rho_token": moving["rho_token"].mean()}
        rows.append(
            row | {"rho_min": moving["rho_token"].min(), "rho_max": moving["rho_token"].max()}
        )
    return pl.DataFrame(rows, infer_schema_length=None).sort("router", "layer", "align")


def _report_calibration(draws: int, corpora: int, seed: int) -> None:
    from simulated_routers import (  # beside this file, when it is run as a script
        calibrate,
        coverage,
        coverage_by_documents,
    )

    cells = coverage_by_documents(corpora, seed)
    _save(cells, "coverage_documents")
    print(cells)
    if not draws:
        return

    spread = coverage(corpora, seed)
    _save(spread, "coverage")
    for name, lo, hi in (
        ("rho_token", "lo", "hi"),
        ("rho_token", "naive_lo", "naive_hi"),
        ("rho_raw", "raw_lo", "raw_hi"),
    ):
        true = spread[name].mean()
        share = ((spread[lo] < true) & (spread[hi] > true)).mean()
        print(f"{lo}..{hi} covers {name} (mean {true:.4f}) in {share:.3f} of {corpora} corpora")
    table = calibrate(draws, seed)
    _save(table, "calibration")
    for (effect,), group in table.group_by("effect", maintain_order=True):
        right = group["verdict"].is_in(RIGHT[float(effect)]).sum()  # type: ignore[arg-type]
        found = dict(group["verdict"].value_counts().rows())
        known = group["known"].to_numpy().mean()
        print(
            f"effect {effect:+.2f} (known {known:+.3f}): {right} of {group.height} right, {found}"
        )


def _save(frame: pl.DataFrame, name: str) -> None:
    with atomic_path(OUT / f"{name}.parquet") as temporary:
        frame.write_parquet(temporary)
    print("saved", OUT / f"{name}.parquet")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    judging = verbs.add_parser("judge", help="a finished sweep")
    judging.add_argument("folder", type=Path)
    judging.add_argument("--preset", default="cpu", choices=PRESETS)
    judging.add_argument(
        "--vocabulary",
        type=int,
        nargs="*",
        default=(),
        help="judge the runs of these vocabularies only",
    )
    calibrating = verbs.add_parser("calibrate", help="simulated routers of known answer")
    calibrating.add_argument(
        "--draws", type=int, default=100, help="0: only coverage by effective documents"
    )
    calibrating.add_argument("--corpora", type=int, default=200)
    calibrating.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.verb == "calibrate":
        _report_calibration(args.draws, args.corpora, args.seed)
        return
    cells, summary = judge(args.folder, args.preset, tuple(args.vocabulary))
    _save(cells, "cells")
    _save(summary, "verdicts")
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        float_precision=3,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
    ):
        print(summary)


if __name__ == "__main__":
    main()
