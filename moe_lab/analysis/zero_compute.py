"""Zero-compute experts: their share of the slots, and how much the number of real experts varies.

Variation alone proves nothing. A router with zero-compute experts that picks K of N + Z at random
already gives each token a different number of real experts; a claim of adaptive compute must show
more than that, and then that the extra follows the tokens.
"""

import math
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.analysis.aligned_rows import KEY, by_layer
from moe_lab.analysis.conditional_bernoulli import group_count
from moe_lab.analysis.document_bootstrap import RESAMPLES, Floats, Resampling
from moe_lab.analysis.document_sums import (
    Documents,
    documents,
    nulls,
    over,
    ratio_interval,
    unit_sums,
    unit_table,
)
from moe_lab.analysis.map_reduce import Sum, appended, reduced
from moe_lab.analysis.requirements import of_tokens, of_zero_experts
from moe_lab.analysis.slot_counts import layer_counts
from moe_lab.trace import LayerMeta, Trace


@of_tokens
@of_zero_experts
def zero_compute(
    trace: Trace, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """The share of slots of zero-compute experts, and whether tokens are polarised between no real
    expert and all K.

    Returns:
        [layer, n_tokens, n_docs, zero_ratio, lo, hi, compute_intensity, at_zero, at_full,
        polarisation, polarisation_lo, polarisation_hi, binomial]: ``zero_ratio`` of the used slots
        went to zero-compute experts; ``compute_intensity`` is mean ffn_count / K; ``at_zero`` and
        ``at_full`` are the shares of tokens with no real expert and with K of them,
        ``polarisation`` their sum (arXiv 2601.15370, section 6), and ``binomial`` what K
        independent slots of the same mean would give: ``(1-p)^K + p^K``. Slots of one token are
        distinct experts, so a router that ignores the token lies somewhat below it. Layers without
        zero-compute experts are left out.
    """
    docs, resampling = documents(trace, 5), Resampling(resamples, seed, level)
    layers = [layer for layer in by_layer(trace) if layer.num_zero_experts]
    tables = reduced(
        Sum(_zero_sums, (trace,), (layer.layer,), unit_table(docs, 6), (layer, docs))
        for layer in layers
    )
    rows = [
        _zero_row(layer, sums_U6, docs, resampling)
        for layer, sums_U6 in zip(layers, tables, strict=True)
    ]
    return nulls(pl.DataFrame(rows, schema=_ZERO_SCHEMA))


@of_tokens
@of_zero_experts
def ffn_spread(
    trace: Trace, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> pl.DataFrame:
    """Mean and standard deviation of ``ffn_count`` over all tokens of each layer, with three
    token-independent benchmarks.

    Returns:
        [layer, n_tokens, n_docs, mean, sd, sd_lo, sd_hi, min, max, hypergeometric_mean,
        hypergeometric_sd, matched_sd, independent_sd]:

        * ``sd`` is the population standard deviation; ``sd_lo``, ``sd_hi`` its percentile interval
          from resampling documents (null with fewer than 5).
        * ``hypergeometric_mean``, ``hypergeometric_sd``: K distinct experts among N real and Z
          zero-compute ones, all alike. From the configuration alone: 8 and 1.621 for
          LongCat-Flash's top-12 of 512 + 256.
        * ``matched_sd``: the hypergeometric formula at the measured mean, ``sqrt(K p (1-p) (N+Z-K)
          / (N+Z-1))`` with p = mean / K: the two groups keep their measured shares, experts within
          a group are alike.
        * ``independent_sd``: every expert keeps its measured load and nothing else (conditional
          Bernoulli sampling, see ``analysis.conditional_bernoulli``). Skewed loads spread less than
          even ones, so this is the benchmark that ``sd`` must exceed.

        The benchmarks are null in a layer where some token used fewer than K slots: there the
        number of slots is itself the router's choice. Without zero-compute experts they are 0.
    """
    layers, rows = by_layer(trace), []
    found = reduced(
        Sum(_spread_sums, (trace,), (layer.layer,), appended, (layer.layer,)) for layer in layers
    )
    for layer, frames, counts_E in zip(layers, found, layer_counts(trace, layers), strict=True):
        documents = _by_document(frames)
        if not documents.height:
            continue
        sums_D3 = documents.select("n", "total", "square").to_numpy().astype(np.float64)
        mean, sd = _moments(sums_D3.sum(axis=0))
        low, high = Resampling(resamples, seed, level).interval(
            lambda weights, sums=sums_D3: _moments(weights @ sums)[1], len(sums_D3)
        )
        filled = documents["fewest"].min() == layer.top_k
        rows.append(
            {"layer": layer.layer, "n_tokens": int(sums_D3[:, 0].sum()), "n_docs": len(sums_D3)}
            | {"mean": float(mean), "sd": float(sd), "sd_lo": float(low), "sd_hi": float(high)}
            | {"min": documents["min"].min(), "max": documents["max"].max()}
            | (_benchmarks(layer, counts_E, float(mean), sums_D3[:, 0].sum()) if filled else {})
        )
    return pl.DataFrame(rows, schema=_SCHEMA).with_columns(pl.col("sd_lo", "sd_hi").fill_nan(None))


def _spread_sums(trace: Trace, layer: int) -> pl.DataFrame:
    """[doc, n, total, square, min, max, fewest] of ``ffn_count``, and the fewest slots used."""
    ffn = pl.col("ffn_count").cast(pl.Int64)
    columns = ["doc", "ffn_count", "zero_count"]
    frames = [
        batch.select(
            "doc",
            n=pl.lit(1, pl.Int64),
            total=ffn,
            square=ffn**2,
            min="ffn_count",
            max="ffn_count",
            fewest=ffn + pl.col("zero_count"),
        )
        for batch in trace.batches(layer, columns)
    ]
    return _by_document(frames) if frames else pl.DataFrame(schema={"doc": pl.UInt32})


def _by_document(frames: list[pl.DataFrame]) -> pl.DataFrame:
    return (
        pl.concat(frames, how="diagonal")
        .group_by("doc")
        .agg(
            pl.col("^(n|total|square)$").sum(),
            pl.col("^(min|fewest)$").min(),
            pl.col("^max$").max(),
        )
        .sort("doc")
    )


def hypergeometric(num_experts: int, num_zero_experts: int, top_k: int) -> tuple[float, float]:
    """Mean and standard deviation of the real experts among ``top_k`` distinct ones drawn evenly
    from all.
    """
    mean = top_k * num_experts / (num_experts + num_zero_experts)
    return mean, _hypergeometric_sd(mean, num_experts + num_zero_experts, top_k)


def independent_sd(layer: LayerMeta, rates_E: Floats) -> float | None:
    """Standard deviation of the real count when experts keep their inclusion rates [E] (sum = K)
    and the token plays no part.
    """
    distribution = group_count(
        rates_E, np.arange(layer.num_choices) < layer.num_experts, layer.top_k
    )
    if distribution is None:
        return None
    counts = np.arange(layer.top_k + 1)
    mean = distribution @ counts
    return math.sqrt(max(distribution @ counts**2 - mean**2, 0.0))


def _zero_sums(trace: Trace, layer: LayerMeta, docs: Documents) -> pl.DataFrame:
    ffn, zero = (pl.col(name).cast(pl.Int64) for name in ("ffn_count", "zero_count"))
    columns = [pl.lit(1), ffn, ffn == 0, ffn == layer.top_k, ffn + zero, zero]
    named = [column.cast(pl.Int64).alias(str(place)) for place, column in enumerate(columns)]
    batches = (
        (batch["doc"].to_numpy(), batch.select(named).to_numpy())
        for batch in trace.batches(layer.layer, [*KEY, "ffn_count", "zero_count"])
    )
    return unit_sums(docs, batches, 6)


def _zero_row(
    layer: LayerMeta, sums_U6: Floats, docs: Documents, resampling: Resampling
) -> dict[str, Any]:
    (ratio,), (low,), (high,) = ratio_interval(sums_U6[:, 4:], resampling)
    tokens, ffn, at_zero, at_full = sums_U6[:, :4].sum(axis=0)
    ends = np.stack([sums_U6[:, 0], sums_U6[:, 2] + sums_U6[:, 3]], axis=1)
    (polar,), (polar_low,), (polar_high,) = ratio_interval(ends, resampling)
    intensity = float(over(np.array(ffn), np.array(tokens * layer.top_k)))
    independent = (1 - intensity) ** layer.top_k + intensity**layer.top_k if tokens else np.nan
    return {
        "layer": layer.layer,
        "n_tokens": int(tokens),
        "n_docs": len(docs.docs),
        "zero_ratio": ratio,
        "lo": low,
        "hi": high,
        "compute_intensity": intensity,
        "at_zero": float(over(np.array(at_zero), np.array(tokens))),
        "at_full": float(over(np.array(at_full), np.array(tokens))),
        "polarisation": polar,
        "polarisation_lo": polar_low,
        "polarisation_hi": polar_high,
        "binomial": independent,
    }


def _benchmarks(
    layer: LayerMeta, counts_E: NDArray[np.int64], mean: float, tokens: float
) -> dict[str, float | None]:
    even_mean, even_sd = hypergeometric(layer.num_experts, layer.num_zero_experts, layer.top_k)
    matched = _hypergeometric_sd(mean, layer.num_choices, layer.top_k)
    independent = independent_sd(layer, counts_E / tokens) if layer.num_zero_experts else 0.0
    return {
        "hypergeometric_mean": even_mean,
        "hypergeometric_sd": even_sd,
        "matched_sd": matched,
        "independent_sd": independent,
    }


def _hypergeometric_sd(mean: float, choices: int, top_k: int) -> float:
    share = mean / top_k
    return math.sqrt(
        max(top_k * share * (1 - share) * (choices - top_k) / max(choices - 1, 1), 0.0)
    )


def _moments(sums: Floats) -> tuple[Floats, Floats]:
    """Mean and population standard deviation from [..., 3] sums of 1, x and x squared."""
    mean = sums[..., 1] / sums[..., 0]
    return mean, np.sqrt(np.maximum(sums[..., 2] / sums[..., 0] - mean**2, 0))


_SCHEMA = (
    {"layer": pl.UInt32, "n_tokens": pl.Int64, "n_docs": pl.Int64}
    | dict.fromkeys(("mean", "sd", "sd_lo", "sd_hi"), pl.Float64)
    | {"min": pl.UInt8, "max": pl.UInt8}
    | dict.fromkeys(
        ("hypergeometric_mean", "hypergeometric_sd", "matched_sd", "independent_sd"), pl.Float64
    )
)
_ZERO_SCHEMA = {"layer": pl.UInt32, "n_tokens": pl.Int64, "n_docs": pl.Int64} | dict.fromkeys(
    (
        "zero_ratio",
        "lo",
        "hi",
        "compute_intensity",
        "at_zero",
        "at_full",
        "polarisation",
        "polarisation_lo",
        "polarisation_hi",
        "binomial",
    ),
    pl.Float64,
)
