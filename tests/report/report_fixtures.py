"""A small sweep folder as the contract of a run directory says, made without training: losses,
metrics and routings are drawn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from moe_lab.routing import Routing
from moe_lab.trace import LayerMeta, TraceMeta, TraceWriter, import_trace

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "{{ 7*7 }} <!-- \u2028 & \"quoted\" 'text'"
)
CODE = '''def mean(values: list[float]) -> float:
    """The arithmetic mean of a list that is not empty."""
    total = 0.0
    for value in values:
        total += value  # accumulate
    return total / len(values)


class Counter:
\tdef __init__(self):
\t\tself.seen = {}

'''
PROSE = (
    "The router looks at every token and asks how much work it deserves. "
    "Most words need little; a few need all of it.\n"
)


@dataclass(frozen=True)
class Shape:
    """Size of a made-up trace."""

    layers: int = 4
    experts: int = 16
    zero_experts: int = 0
    top_k: int = 2
    documents: int = 6
    tokens: int = 240


def split(text: str) -> list[str]:
    """Cut a text into word, blank and sign pieces that join to the text again."""
    pieces: list[str] = []
    for character in text:
        kind = (
            "word"
            if character.isalnum() or character == "_"
            else "blank"
            if character.isspace()
            else "sign"
        )
        if (
            pieces
            and kind != "sign"
            and pieces[-1][-1:].isspace() == (kind == "blank")
            and (kind == "blank" or pieces[-1][-1].isalnum())
        ):
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


def lexer_class(piece: str) -> str:
    if piece.isspace():
        return "whitespace"
    return (
        "keyword"
        if piece in {"def", "for", "return", "class", "in"}
        else "name"
        if piece[0].isalpha()
        else "operator"
    )


def token_frame(shape: Shape, documents: Sequence[str]) -> pl.DataFrame:
    random = np.random.default_rng(3)
    frames = []
    for index in range(shape.documents):
        text = documents[index % len(documents)]
        pieces = split(text * (1 + shape.tokens // max(len(split(text)), 1)))[: shape.tokens]
        texts = ["", *pieces]
        classes = ["eos", *map(lexer_class, pieces)]
        size = len(texts)
        frames.append(
            pl.DataFrame(
                {
                    "doc": np.full(size, index, dtype=np.uint32),
                    "pos": np.arange(size, dtype=np.uint32),
                    "token_id": np.array(
                        [sum(map(ord, piece)) % 500 for piece in texts], dtype=np.uint32
                    ),
                    "loss": pl.Series([None, *random.gamma(2, 1.2, size - 1)], dtype=pl.Float32),
                    "text": texts,
                    "lexer": classes,
                    "subword": ["start" if piece[:1].isspace() else "inside" for piece in texts],
                    "freq_band": [f"band {len(piece) % 4}" for piece in texts],
                }
            )
        )
    return pl.concat(frames)


def make_routing(shape: Shape, tokens: pl.DataFrame, layer: int) -> Routing:
    """Random routing in which names prefer real experts and, with more than four, the last expert
    of layer 0 is dead.
    """
    generator = torch.Generator().manual_seed(layer)
    total = shape.experts + shape.zero_experts
    logits = torch.randn(tokens.height, total, generator=generator) + 0.6 * torch.randn(
        total, generator=generator
    )
    names = torch.from_numpy((tokens["lexer"] == "name").to_numpy())
    if shape.zero_experts:
        logits[names, : shape.experts] += 0.8
    if layer == 0 and shape.experts > 4:
        logits[:, shape.experts - 1] = -50.0
    scores = logits.softmax(dim=1)
    weights, indices = scores.topk(shape.top_k, dim=1)
    return Routing(
        indices,
        weights,
        logits,
        scores,
        num_experts=shape.experts,
        num_zero_experts=shape.zero_experts,
    )


def make_trace(
    folder: Path, shape: Shape, documents: Sequence[str] = (CODE, PROSE), model: str = "made up"
) -> Path:
    tokens = token_frame(shape, documents)
    layers = tuple(
        LayerMeta(layer, shape.experts, shape.zero_experts, shape.top_k)
        for layer in range(shape.layers)
    )
    meta = TraceMeta(
        layers=layers,
        model=model,
        corpus_hash="c0ffee",
        tokenizer_hash="beef",
        seed=0,
        created_from="tests",
    )
    with TraceWriter(folder, meta) as writer:
        writer.write_tokens(tokens)
        for layer in range(shape.layers):
            writer.write_routing(
                layer,
                tokens["doc"].to_numpy(),
                tokens["pos"].to_numpy(),
                make_routing(shape, tokens, layer),
            )
    return folder


def make_run(
    folder: Path,
    arm: str,
    ratio: float,
    seed: int,
    shape: Shape | None,
    documents: Sequence[str] = (CODE, PROSE),
) -> Path:
    """One finished run. ``shape`` None is a dense model, which has no trace."""
    random = np.random.default_rng([seed, int(ratio)])
    folder.mkdir(parents=True)
    steps = np.arange(1, 601)
    loss = 3.1 - 0.05 * np.log2(ratio) + 0.004 * random.standard_normal()
    metrics = {
        "step": steps,
        "tokens": steps * 2048,
        "loss": loss + 4 * np.exp(-steps / 60) + 0.05 * random.standard_normal(steps.size),
        "lr": np.full(steps.size, 3e-3),
        "grad_norm": 0.5 + 2 * np.exp(-steps / 40) + 0.1 * random.random(steps.size),
    }
    result: dict[str, object] = {
        "run": folder.name,
        "name": f"{arm}-{ratio:g}",
        "arm": arm,
        "ratio": ratio,
        "ratio_meaning": "routed experts over routed experts run per token",
        "seed": seed,
        "total_params": int(1e6 * ratio),
        "active_params": 1_000_000,
        "params_meaning": "all parameters, the embedding included",
        "flops_per_token": 6e6,
        "train_tokens": 1_228_800,
        "loss": loss,
        "bits_per_byte": loss / 2.2,
        "tokens_per_second": 5400.0 + 10 * seed,
        "device": "cpu",
        "corpus_hash": "c0ffee",
        "tokenizer_hash": "beef",
        "versions": {"torch": "2.13.0", "moe_lab": "0.1.0"},
    }
    if shape is not None:
        target = shape.top_k * shape.experts / (shape.experts + shape.zero_experts)
        result |= {
            "num_experts": shape.experts,
            "num_zero_experts": shape.zero_experts,
            "top_k": shape.top_k,
            "load_cv": 0.31,
        }
        result |= {
            "mean_ffn_count": target * 1.01,
            "target_ffn_count": target,
            "max_violation": 0.8,
            "tokens_per_expert": 1.2e6 / shape.experts,
        }
        metrics |= {
            "load_cv": 0.3 + np.exp(-steps / 80),
            "max_violation": 0.8 + np.exp(-steps / 50),
            "mean_ffn_count": np.full(steps.size, target),
        }
        make_trace(folder / "trace", shape, documents, model=str(result["name"]))
    pl.DataFrame(metrics).write_parquet(folder / "metrics.parquet")
    (folder / "config.json").write_text(
        json.dumps({"name": result["name"], "seed": seed, "model": {"d_model": 128}})
    )
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "done").write_text("")
    return folder


def make_worth(folder: Path, layers: int = 4, experts: int = 16) -> Path:
    """The tables of a made-up measurement of experts, two of which were not measured."""
    folder.mkdir(parents=True)
    random, count = np.random.default_rng(5), layers * experts
    d_loss = random.normal(0.002, 0.004, count)
    d_loss[3] = 0.4
    docs = {"tokens": np.full(count, 9000), "docs": np.full(count, 40)}
    worth = pl.DataFrame(
        {
            "layer": np.repeat(np.arange(layers), experts),
            "expert": np.tile(np.arange(experts), layers),
            "edit": ["forbid"] * count,
            "by": pl.Series([None] * count, dtype=pl.String),
            "class": pl.Series([None] * count, dtype=pl.String),
            "d_loss": d_loss,
            "lo": d_loss - 0.003,
            "hi": d_loss + 0.004,
            "used": np.full(count, 700),
            **docs,
        }
    )
    scores = ("frequency", "gate_mass", "output_norm", "reap", "activation_norm")
    agreement = pl.DataFrame(
        [
            {
                "layer": layer, "score": score, "rho": rho, "lo": rho - 0.2, "hi": rho + 0.1,
                "top": 0.5, "top_chance": 0.1, "experts": experts, "docs": 40,
            }
            for layer in (None, *range(layers))
            for score, rho in zip(scores, random.uniform(-0.2, 0.8, 5), strict=True)
        ],
        schema_overrides={"layer": pl.Int64},
    )  # fmt: skip
    orders = (*scores, "measured loss", *(f"random {number + 1}" for number in range(10)))
    curves = pl.DataFrame(
        [
            {
                "order": order, "share": share, "removed": int(share * count),
                "d_loss": 0.1 * (1 + place) * share, "lo": 0.08 * (1 + place) * share,
                "hi": 0.13 * (1 + place) * share, "p_random": None, "docs": 20,
            }
            for place, order in enumerate(orders)
            for share in (0.125, 0.25, 0.375, 0.5)
        ]
    )  # fmt: skip
    top_k = pl.DataFrame(
        [
            {
                "k": k, "by": by, "class": name, "d_loss": 0.3 / k - 0.15, "lo": 0.28 / k - 0.15,
                "hi": 0.33 / k - 0.15, "docs": 40,
            }
            for k in (1, 2, 3, 4)
            for by, name in ((None, None), ("lexer", "keyword"), ("lexer", "name"))
        ]
    )  # fmt: skip
    pairs = [(layer, first, first + 1) for layer in range(layers) for first in range(3)]
    names = pl.DataFrame(pairs, ("layer", "first", "second"), orient="row")
    number, one = names.height, random.normal(0.002, 0.004, (2, names.height))
    excess = random.normal(0.001, 0.002, number)
    pair_table = names.with_columns(
        d_first=one[0], d_second=one[1], d_both=one.sum(axis=0) + excess, excess=excess,
        lo=excess - 0.001, hi=excess + 0.001, docs=40,
    )  # fmt: skip
    exchanges = names.with_columns(
        d_loss=excess / 4, lo=excess / 4, hi=excess / 4, d_loss_used=excess,
        used_lo=excess - 0.001, used_hi=excess + 0.001, kl=excess**2, tokens=9000, used=700,
        docs=40,
    )  # fmt: skip
    tables = {"worth": worth[:-2], "agreement": agreement, "curves": curves, "top_k": top_k}
    tables |= {"pairs": pair_table, "exchanges": exchanges}
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    meta = {"sentences": ["12 of 62 measured experts matter."], "notes": [], "loss": 3.1}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def _run_with_worth(folder: Path) -> Path:
    run = make_run(folder / "run", "topk", 8, 0, Shape(experts=16))
    make_worth(run / "worth")
    return run


def make_failed_run(folder: Path, error: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": "topk-64", "seed": 9}))
    (folder / "error.txt").write_text(f"{error}\nTraceback (most recent call last):\n  ...\n")
    return folder


def make_unfinished_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": "topk-128", "seed": 1}))
    (folder / "status.json").write_text(json.dumps({"step": 40, "steps": 600}))
    return folder


def run_name(index: int) -> str:
    """A name such as a plan gives to a run."""
    return f"{index:012x}"


def write_plan(folder: Path, names: Sequence[str], question: str = "") -> None:
    """A plan of runs called ``names``, in folders ``run_name(0)``, ``run_name(1)``, ..."""
    runs = {
        run_name(index): {"name": name, "arm": "topk", "ratio": 2.0, "seed": index, "config": {}}
        for index, name in enumerate(names)
    }
    sweep = {"hash": "0", "name": "s", "question": question, "preset": "", "runs": list(runs)}
    plan = {"schema_version": 1, "sweeps": [sweep], "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(plan))


def make_sweep(
    folder: Path,
    seeds: int = 2,
    ratios: Sequence[int] = (1, 2, 4, 8, 16),
    documents: Sequence[str] = (CODE, PROSE),
) -> Path:
    """A sweep with three arms, one failed and one unfinished run."""
    for seed in range(seeds):
        for ratio in ratios:
            make_run(
                folder / f"topk{ratio:03d}{seed}",
                "topk",
                ratio,
                seed,
                Shape(experts=2 * ratio),
                documents,
            )
        zero = Shape(experts=16, zero_experts=8, top_k=3)
        make_run(folder / f"zero{seed}", "zero", 8, seed, zero, documents)
        make_run(folder / f"dense{seed}", "dense", 1, seed, None, documents)
    make_failed_run(
        folder / "failed", "the loss is nan at step 17; try a lower learning rate than 0.3 <b>"
    )
    make_unfinished_run(folder / "unfinished")
    return folder


def _demo(folder: Path) -> Path:
    """A sweep of two arms and three seeds, with text enough to judge difficulty."""
    for seed in range(3):
        for ratio in (1, 2, 4, 8):
            make_run(folder / f"topk{ratio}-{seed}", "topk", ratio, seed, Shape(experts=2 * ratio))
        zero = Shape(experts=16, zero_experts=8, top_k=3, documents=36, tokens=60)
        make_run(folder / f"zero{seed}", "zero", 8, seed, zero)
    return folder


def _imported(folder: Path) -> Path:
    """Routes of an engine that recorded no tokens."""
    folder.mkdir(parents=True)
    routes = np.random.default_rng(0).random((300, 3, 8)).argsort(axis=2)[:, :, :2]
    np.save(folder / "routes.npy", routes.astype(np.int32))
    import_trace("vllm", folder / "routes.npy", folder / "t", num_experts=8, top_k=2)
    return folder / "t"


def _two(folder: Path) -> list[Path]:
    """The same model shape on texts of different length."""
    sizes = {"before": 240, "after": 200}
    return [
        make_trace(folder / name, Shape(layers=4, experts=48, top_k=4, tokens=tokens))
        for name, tokens in sizes.items()
    ]


PAGES = {
    "demo": _demo,
    "run": _run_with_worth,
    "olmoe": lambda folder: make_trace(
        folder / "OLMoE", Shape(layers=16, experts=64, top_k=8), model="OLMoE"
    ),
    "imported": _imported,
    "two traces": _two,
}
"""The kinds of pages that people make -> what makes their sources in a folder."""
