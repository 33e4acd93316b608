"""Frames of this package in one plain sentence each, the interval first."""

import polars as pl


def bytes_text(value: float) -> str:
    """3.2 MB, 4.19 GB: decimal units, three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} bytes"


def ranged(value: float, low: float | None, high: float | None, unit: str, digits: int = 1) -> str:
    """``28.2 to 29.7 % (95 % interval; 29.0 measured)``; without an interval ``29.0 %``.

    Args:
        unit: with its leading space.
    """
    if low is None or high is None:
        return f"{value:.{digits}f}{unit}"
    ends = f"{low:.{digits}f} to {high:.{digits}f}{unit}"
    return f"{ends} (95 % interval; {value:.{digits}f} measured)"


def cache_sentences(frame: pl.DataFrame) -> list[str]:
    """A sentence on the hit rate of a cache of the middle budget, and one on the budget below which
    caching fails.

    Args:
        frame: as ``expert_cache``.
    """
    phase = "decode" if frame.filter(phase="decode")["requests"].sum() else "all"
    rows = frame.filter(phase=phase).drop_nulls("hit_rate")
    if not rows.height:
        return ["No policy could be judged on this trace."]
    budgets = rows["budget"].unique().sort()
    budget = budgets[len(budgets) // 2]
    at = {row["policy"]: row for row in rows.filter(budget=budget).iter_rows(named=True)}
    first = at.get("lru") or next(iter(at.values()))
    bound = at.get("bound") or at.get("clairvoyant")
    low, high = (
        None if first[name] is None else 100 * first[name]
        for name in ("hit_rate_lo", "hit_rate_hi")
    )
    found = ranged(100 * first["hit_rate"], low, high, " %")
    text = (
        f"A cache of {bytes_text(budget)} under {first['policy']} finds {found} of "
        f"the experts that {'decoded tokens' if phase == 'decode' else 'all steps'} ask for, and "
        f"reads {bytes_text(first['bytes_per_token'])} a token"
    )
    if bound is not None and bound is not first:
        text += f"; a cache that knows the future finds {100 * bound['hit_rate']:.1f} %"
    sentences = [f"{text}."]
    if first["tokens_per_second"] is not None:
        name = "tokens_per_second"
        speeds = first[name], first[f"{name}_lo"], first[f"{name}_hi"]
        sentences.append(
            f"That is {ranged(*speeds, ' tokens a second', 2)} where a token waits for its reads, "
            f"and {first['tokens_per_second_overlapped']:.2f} where reading and computing overlap."
        )
    cycle = rows["cycle_bytes"][0]
    below = rows.filter(pl.col("budget") < cycle, policy="lru")
    if below.height and cycle:
        nothing = (below["hit_rate"] == 0).all()
        sentences.append(
            f"Budgets below {bytes_text(cycle)}, the bytes of one token's experts in all layers, "
            "are below the cliff: LRU drops an expert before the next token can use it"
            + (" and finds nothing." if nothing else ".")
        )
    return sentences


def decode_sentence(frame: pl.DataFrame) -> str:
    """A sentence on what the largest window (or batch) reads, beside the formulas.

    Args:
        frame: as ``distinct_experts``.
    """
    rows = frame.filter(pl.col("layer").is_null()).drop_nulls("measured")
    if not rows.height:
        return "No batch or window of these sizes fits the trace."
    row = rows.sort("size", "kind").row(-1, named=True)
    kind = "tokens in a row" if row["kind"] == "window" else "requests together"
    if not row["measured"]:
        return f"Steps of {row['size']} {kind} touch no real expert."
    touched = ranged(row["measured"], row["lo"], row["hi"], " experts of a layer")
    return (
        f"Steps of {row['size']} {kind} touch {touched}; independent tokens of the same "
        f"load would touch {row['by_load']:.1f}, and of equal load {row['by_equal_load']:.1f}, "
        f"{row['by_equal_load'] / row['measured']:.2f} times as many."
    )


def speculation_sentence(frame: pl.DataFrame) -> str:
    """A sentence on the number of accepted drafts from which the largest window pays.

    Args:
        frame: as ``speculation``.
    """
    rows = frame.drop_nulls("cost")
    if not rows.height:
        return "No document is long enough to say what speculation costs."
    row = rows.sort("window").row(-1, named=True)
    ends = row["accepted_lo"], row["accepted_hi"]
    accepted = ranged(row["accepted_needed"], *ends, " accepted drafts", 2)
    read = "all weights" if row["everything"] else "routed experts alone"
    return (
        f"A step that verifies {row['window']} tokens pays from {accepted} on, counting {read}; "
        "with equal loads assumed the answer would be "
        f"{max(row['cost_by_equal_load'] - row['cost'] + row['accepted_needed'], 0):.2f}."
    )
