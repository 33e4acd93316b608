"""``models()``: the published MoE models with their counts, and the figures that their laboratories
gave.

``models.json`` holds facts only: configuration, published figures, date, and where each comes from.
Everything else is counted. The convention in which a laboratory's active figure is right stands
beside it, since the same model has three.
"""

from typing import TYPE_CHECKING, Any

from moe_lab.accounting.model_names import facts
from moe_lab.accounting.parameter_count import CONVENTIONS, ParameterCount, count
from moe_lab.cost.parts import Part

if TYPE_CHECKING:
    import polars as pl


def models() -> "pl.DataFrame":
    """One row per published model.

    Columns: name, family, model_type, date (first of the month), num_layers, num_experts, top_k
    (mean of real experts per token where there are zero-computation ones), slots (K),
    num_zero_experts, num_shared_experts; total, tables (n-gram tables in it), mtp; active_a,
    active_b, active_c (means), active_min, active_max (convention B), active_prefill (in the named
    convention); published_total, published_active, published_min, published_max, convention (of
    the published active figure) and fits (every convention that rounds to it); active (mean in that
    convention); ratio_experts = E / k, ratio_parameters = total / active; sparsity = 1 - active /
    total, expert_sparsity = 1 - k / E; source, config_source, status, note.
    """
    import polars as pl

    rows = [_row(entry, count(entry["config"])) for entry in facts()]
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return frame.with_columns(pl.col("date").str.to_date("%Y-%m")).sort("date", "name")


def _row(entry: dict[str, Any], counted: ParameterCount) -> dict[str, Any]:
    published, convention = entry["published"], entry["published"]["convention"]
    active = {name: counted.active(name) for name in CONVENTIONS}
    experts = next(iter(counted.moe_layers.values()))
    idle = next((piece for _, piece in counted.pieces() if piece.part is Part.ZERO_EXPERT), None)
    assert experts.used is not None
    mean = experts.used.mean
    return {
        "name": entry["name"],
        "family": entry["family"],
        "model_type": counted.model_type,
        "date": entry["date"],
        "num_layers": len(
            {
                layer
                for layer, piece in counted.pieces()
                if layer is not None and piece.part is not Part.MTP
            }
        ),
        "num_experts": experts.copies,
        "top_k": float(mean),
        "slots": int(experts.used.most),
        "num_zero_experts": 0 if idle is None else idle.copies,
        "num_shared_experts": _shared(entry["config"], counted),
        "total": counted.total,
        "tables": counted.by_part[Part.NGRAM_TABLE],
        "mtp": counted.mtp,
        **{f"active_{name.lower()}": value for name, value in active.items()},
        "active_min": counted.active_min,
        "active_max": counted.active_max,
        "active_prefill": counted.active(convention, phase="prefill"),
        "published_total": figure(published.get("total")),
        "published_active": figure(published.get("active")),
        "published_min": figure(published.get("active_min")),
        "published_max": figure(published.get("active_max")),
        "convention": convention,
        "fits": "".join(
            name for name, value in active.items() if rounds_to(value, published.get("active"))
        ),
        "active": active[convention],
        "ratio_experts": experts.copies / mean,
        "ratio_parameters": counted.total / active[convention],
        "sparsity": 1 - active[convention] / counted.total,
        "expert_sparsity": 1 - mean / experts.copies,
        "source": published["source"],
        "config_source": entry["config_source"],
        "status": entry["status"],
        "note": entry.get("note"),
    }


def _shared(config: dict[str, Any], counted: ParameterCount) -> int:
    """Shared experts of an MoE layer: the configured number, else one if there are any."""
    for name in (
        "n_shared_experts",
        "num_shared_experts",
        "num_shared_expert",
        "moe_num_shared_experts",
    ):
        if config.get(name) is not None:
            return int(config[name])
    return int(counted.by_part[Part.SHARED.value] > 0)


def figure(text: str | None) -> float | None:
    """ "37B" -> 37e9."""
    return None if text is None else float(text[:-1]) * _UNITS[text[-1]]


def rounds_to(value: float, text: str | None) -> bool:
    """Whether ``value`` equals the published figure when it is rounded to its digits.

    36.63e9 becomes "37B", 37.55e9 does not.
    """
    if text is None:
        return False
    _, _, decimals = text[:-1].partition(".")
    unit = _UNITS[text[-1]] / 10 ** len(decimals)
    return abs(value - float(text[:-1]) * _UNITS[text[-1]]) <= unit / 2


_UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}
