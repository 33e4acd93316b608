"""Twelve routers that look at one thing other than the difficulty of a token, on real text.

    python experiments/single_cue_routers.py                 # 200 draws of each; resumes
    python experiments/single_cue_routers.py --draws 20 --write-docs

None of them may be called difficulty-aligned or inverted, but for the one that sees the token's own
difficulty, with ``align="input"``: once strongly and once weakly, which measures the power. The
text is the default corpus as BPE tokens (2,048 ids) and as bytes, in four corpora of 300 documents
of 160 tokens each: every second one of the documents' beginnings, the others of excerpts from
anywhere. A draw is a new table (for routers that look something up) and new binomial counts.

Each corpus is written as it ends, so the same command continues after an interruption. Out:
``experiments/difficulty/single_cues.parquet`` and the table in docs/difficulty.md.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit
from simulated_routers import SLOTS, beyond_identity, codes_of, standard  # beside this file

from moe_lab.analysis.difficulty.alignment import PLACES, since
from moe_lab.analysis.difficulty.association import measure, pairings
from moe_lab.analysis.difficulty.context import copied_suffix
from moe_lab.analysis.difficulty.difficulty_verdict import MARGIN, MIN_DOCUMENTS
from moe_lab.analysis.difficulty.intervals import Bootstrap, false_discovery
from moe_lab.analysis.document_bootstrap import Floats
from moe_lab.files import atomic_path, write_text
from moe_lab.versions import provenance

OUT = Path(__file__).parent / "difficulty"
DOCS = Path(__file__).parents[1] / "docs" / "difficulty.md"
BEGIN, END = "<!-- single cues -->", "<!-- end of single cues -->"
KINDS = {"bpe": "2,048 BPE ids", "byte": "bytes"}
CORPORA = 4
STRONG, WEAK = "difficulty of the token", "difficulty, weakly"
WEAK_SHARE = 0.1
FALSE = ("difficulty-aligned", "inverted")


def cue_corpus(kind: str, documents: int, tokens: int, number: int = 0) -> pl.DataFrame:
    """[doc, pos, token_id, lexer, boundary, subword, ngram_loss] of ``documents`` documents of the
    default corpus, ``tokens`` of each, as ``bpe`` or ``byte`` tokens.

    Args:
        number: of the corpus: it draws the documents and, where it is odd, where excerpts begin.
    """
    from moe_lab.text import TextConfig, load_tokens, ngram_surprisal, token_classes
    from moe_lab.text.tokenizer import TokenizerKind

    text = load_tokens(TextConfig(tokenizer=TokenizerKind(kind), vocab_size=2048))
    long = [item for item in text.documents("train") if len(item.ids) > tokens]
    generator = np.random.default_rng(number)
    chosen = [long[place] for place in generator.permutation(len(long))[:documents]]
    starts = [int(generator.integers(len(item.ids) - tokens)) * (number % 2) for item in chosen]
    ids = [item.ids[start : start + tokens] for item, start in zip(chosen, starts, strict=True)]
    surprisal = ngram_surprisal(ids, text.tokenizer.vocab_size, seed=number)
    frames = [
        token_classes(item, text.tokenizer)
        .slice(start, tokens)
        .select(
            pl.lit(doc).alias("doc"),
            pl.int_range(tokens).alias("pos"),
            pl.col("token_id").cast(pl.Int64),
            "lexer",
            "boundary",
            "subword",
            ngram_loss=pl.Series(loss.astype(np.float32)).fill_nan(None),
        )
        for doc, (item, start, loss) in enumerate(zip(chosen, starts, surprisal, strict=True))
    ]
    return pl.concat(frames)


def single_cues(tokens: pl.DataFrame, seed: int) -> dict[str, Floats]:
    """What each router looks at, standardised (but for ``WEAK``), for tokens of ``cue_corpus`` in
    order of (doc, pos).
    """
    generator = np.random.default_rng(seed)
    ids, number = codes_of(tokens["token_id"])
    doc, _ = codes_of(tokens["doc"])
    lexer, classes = codes_of(tokens["lexer"])
    pos = tokens["pos"].to_numpy().astype(np.float64)
    previous = np.append(0, np.where(doc[1:] == doc[:-1], ids[:-1] + 1, 0))
    pair = np.unique(previous * (number + 1) + ids, return_inverse=True)[1]
    loss = tokens["ngram_loss"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    cues = {
        "nothing": np.zeros(len(ids)),
        "token id": generator.normal(size=number)[ids],
        "frequency": -np.log(np.bincount(ids))[ids],
        "log position": np.log1p(pos),
        "linear position": pos,
        "copied suffix": copied_suffix(ids, doc).astype(np.float64),
        "previous token": generator.normal(size=number + 1)[previous],
        "bigram": generator.normal(size=int(pair.max()) + 1)[pair],
        "lexer class": generator.normal(size=classes)[lexer],
    }
    for name, (column, value) in PLACES.items():
        cues[name] = np.log1p(since((tokens[column] == value).to_numpy(), doc))
    cues[STRONG] = beyond_identity(ids, loss)
    standardised = {name: standard(values) for name, values in cues.items()}
    return standardised | {WEAK: WEAK_SHARE * standardised[STRONG]}


def cue_verdicts(
    corpus: pl.DataFrame, draws: range, weight: float = 0.5, resamples: int = 400
) -> pl.DataFrame:
    """[cue, align, draw, rho_token, verdict] of every router on one corpus, each judged by itself,
    as ``difficulty_association`` judges a frame of one layer.
    """
    frame = corpus.with_columns(layer=pl.lit(0), ffn_count=pl.lit(0, pl.UInt8))
    paired = [
        (tokens, pairing) for pairing, (tokens,) in pairings(frame, "ngram_loss", "ffn_count")
    ]
    documents = paired[0][1].aligned.num_documents
    bootstrap = Bootstrap(documents, resamples, draws.start, 0.95)
    rows = []
    for draw in draws:
        for number, (cue, values) in enumerate(single_cues(corpus, draw).items()):
            spent = _spent(expit(weight * values), draw, number)
            found = [
                measure(replace(tokens, compute=spent), pairing, bootstrap)
                for tokens, pairing in paired
            ]
            qs = false_discovery(np.array([one.evidence.token.p for one in found]))
            for one, q in zip(found, qs.tolist(), strict=True):
                row = one.row(q, MARGIN, MIN_DOCUMENTS)
                names = ("align", "rho_token", "verdict")
                rows.append({"cue": cue, "draw": draw} | {name: row[name] for name in names})
    return pl.DataFrame(rows)


def _spent(share: NDArray[np.float64], draw: int, number: int) -> Floats:
    return np.random.default_rng([draw, number]).binomial(SLOTS, share).astype(np.float64)


def false_verdicts(verdicts: pl.DataFrame) -> pl.DataFrame:
    """[cue, align, draws, rho_token, aligned, inverted, false]: shares of draws; ``false`` is null
    where aligned is the right answer.
    """
    right = pl.col("cue").is_in([STRONG, WEAK]) & (pl.col("align") == "input")
    return (
        verdicts.group_by("cue", "align", maintain_order=True)
        .agg(
            draws=pl.len(),
            rho_token=pl.col("rho_token").mean(),
            aligned=(pl.col("verdict") == FALSE[0]).mean(),
            inverted=(pl.col("verdict") == FALSE[1]).mean(),
        )
        .with_columns(false=pl.when(~right).then(pl.col("aligned") + pl.col("inverted")))
    )


def markdown(table: pl.DataFrame) -> str:
    """One line a router: the share called aligned or inverted, by text and alignment."""
    sides = [(kind, align) for kind in KINDS for align in ("input", "target")]
    lines = [
        f"| router looks at | {' | '.join(f'{KINDS[kind]}, {align}' for kind, align in sides)} |",
        "|---|---|---|---|---|",
    ]
    for (cue,), rows in table.group_by("cue", maintain_order=True):
        cells = []
        for kind, align in sides:
            row = rows.row(
                by_predicate=(pl.col("tokens") == kind) & (pl.col("align") == align), named=True
            )
            share = row["aligned"] if row["false"] is None else row["false"]
            told = f"{share:.3f} ({row['rho_token']:+.3f})"
            cells.append(f"**{told}**" if row["false"] is None else told)
        lines.append(f"| {cue} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs")
    args = parser.parse_args()
    os.nice(10)
    blocks = OUT / "single_cues_blocks"
    blocks.mkdir(parents=True, exist_ok=True)
    each = -(-args.draws // CORPORA)
    frames = []
    for number in range(CORPORA):
        for kind in KINDS:
            path = blocks / f"{kind}-{number}-{each}-{args.documents}x{args.tokens}.parquet"
            if not path.exists():
                corpus = cue_corpus(kind, args.documents, args.tokens, number)
                verdicts = cue_verdicts(corpus, range(number * each, (number + 1) * each))
                with atomic_path(path) as temporary:
                    verdicts.write_parquet(temporary)
            frames.append(pl.read_parquet(path).with_columns(tokens=pl.lit(kind)))
    verdicts = pl.concat(frames)
    table = pl.concat(
        [
            false_verdicts(verdicts.filter(pl.col("tokens") == kind)).select(
                pl.lit(kind).alias("tokens"), pl.all()
            )
            for kind in KINDS
        ]
    )
    record = {name: pl.lit(value) for name, value in provenance().items()}
    with atomic_path(OUT / "single_cues.parquet") as path:
        table.with_columns(**record).write_parquet(path)
    print(markdown(table))
    if args.write_docs:
        text = DOCS.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        write_text(DOCS, f"{before}{BEGIN}\n{markdown(table)}\n{END}{after}")


if __name__ == "__main__":
    main()
