"""Frames of this package in one plain sentence each, the interval first."""

import polars as pl

PERCENT = "(95 %)"


def bytes_text(value: float) -> str:
    """3.2 MB, 4.19 GB: decimal units, three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} bytes"


def _ends(row: dict, name: str, scale: float = 1.0, digits: int = 1) -> str:
    low, high = row[f"{name}_lo"], row[f"{name}_hi"]
    if low is None or high is None:
        return ""
    return f"{scale * low:.{digits}f} to {scale * high:.{digits}f} {PERCENT}, "


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
    text = (
        f"A cache of {bytes_text(budget)} under {first['policy']} finds "
        f"{_ends(first, 'hit_rate', 100)}{100 * first['hit_rate']:.1f} % in all of the experts "
        f"that {'decoded tokens' if phase == 'decode' else 'all steps'} ask for and reads "
        f"{bytes_text(first['bytes_per_token'])} a token"
    )
    if bound is not None and bound is not first:
        text += f"; a cache that knows the future finds {100 * bound['hit_rate']:.1f} %"
    sentences = [f"{text}."]
    if first["tokens_per_second"] is not None:
        sentences.append(
            f"That is {_ends(first, 'tokens_per_second', 1, 2)}{first['tokens_per_second']:.2f} "
            "tokens a second in all where a token waits for its reads, and "
            f"{first['tokens_per_second_overlapped']:.2f} where reading and computing overlap."
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
    ends = "" if row["lo"] is None else f"{row['lo']:.1f} to {row['hi']:.1f} {PERCENT}, "
    return (
        f"Steps of {row['size']} {kind} touch {ends}{row['measured']:.1f} experts of a layer in "
        f"the mean; independent tokens of the same load would touch {row['by_load']:.1f}, and of "
        f"equal load {row['by_equal_load']:.1f}, "
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
    ends = _ends(row, "accepted", 1, 2)
    read = "all weights" if row["everything"] else "routed experts alone"
    return (
        f"A step that verifies {row['window']} tokens pays from {ends}{row['accepted_needed']:.2f} "
        f"accepted drafts on, counting {read}; with equal loads assumed the answer would be "
        f"{max(row['cost_by_equal_load'] - row['cost'] + row['accepted_needed'], 0):.2f}."
    )
