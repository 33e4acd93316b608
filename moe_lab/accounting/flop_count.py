"""``flops(config, context, phase)``: floating point operations per token, and the weights that a
decoding step reads.

A matrix costs two operations per multiply-accumulate and token; softmax attention costs ``2 h (qk +
v)`` per query and key; a backward pass costs twice the forward one, so training costs three times.
Softmax, norms, activations and rotary embeddings are left out, as they are in torch's flop counter.
In decoding MLA multiplies its up-projections into query and output (arXiv 2405.04434 section
2.1.2), which leaves the cost of the matrices as it is and makes scores ``rkv + rope`` wide and
values ``rkv``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from moe_lab.accounting.parameter_count import At, ParameterCount, count
from moe_lab.cost.parts import LOOKUP, Attend, Index, Kernel, Part, Piece
from moe_lab.errors import ConfigError, expected, require

if TYPE_CHECKING:
    import polars as pl

Phase = Literal["train", "prefill", "decode"]
Load = Sequence[float] | Mapping[int, Sequence[float]]

CONTEXT = 4096
PHASES: tuple[Phase, ...] = ("train", "prefill", "decode")
SCORES, INDEXER, RECURRENCE = "attention_scores", "indexer", "recurrence"
"""Rows of the table beside the parts: work that no weight does."""


@dataclass(frozen=True)
class FlopCount:
    """
    Attributes:
        context: tokens of a sequence (train, prefill), or tokens visible to the new one, itself
            included (decode).
        by_part: forward operations per token; parts, and "attention_scores", "indexer",
            "recurrence".
        forward, forward_min, forward_max: their sum for a token that runs as many experts as the
            mean, the least, the most.
        mtp: forward operations of the multi-token-prediction modules with the head each applies, in
            no other number here.
        weight_bytes: bytes of weights that one decoding step of ``batch`` sequences reads, or the
            prefill of ``batch`` sequences of ``context`` tokens; None in training.
        distinct_experts: mean over MoE layers of the experts that such a step reads; None in
            training.
    """

    model_type: str
    phase: Phase
    context: int
    batch: int
    by_part: dict[str, float]
    forward: float
    forward_min: float
    forward_max: float
    mtp: float
    assumed: tuple[str, ...]
    weight_bytes: float | None = None
    distinct_experts: float | None = None

    @property
    def training(self) -> float:
        """Operations per token of forward and backward pass."""
        return 3 * self.forward

    @property
    def training_with_mtp(self) -> float:
        """As ``training``, with the multi-token-prediction modules: the cost of a training step of
        all parts.
        """
        return 3 * (self.forward + self.mtp)

    @property
    def total(self) -> float:
        """Operations per token of this phase."""
        return self.training if self.phase == "train" else self.forward

    @property
    def weight_bytes_per_token(self) -> float | None:
        tokens = self.batch * (self.context if self.phase == "prefill" else 1)
        return None if self.weight_bytes is None else self.weight_bytes / tokens

    def frame(self) -> "pl.DataFrame":
        """One row per part: part, forward, share, total (operations per token)."""
        import polars as pl

        factor = 3 if self.phase == "train" else 1
        rows = [
            (part, value, value / self.forward, factor * value)
            for part, value in self.by_part.items()
        ]
        schema = {
            "part": pl.String,
            "forward": pl.Float64,
            "share": pl.Float64,
            "total": pl.Float64,
        }
        return pl.DataFrame(rows, schema=schema, orient="row")

    def to_dict(self) -> dict[str, Any]:
        numbers = {
            name: getattr(self, name)
            for name in ("forward", "forward_min", "forward_max", "training", "total", "mtp")
        }
        decoding = {
            name: getattr(self, name)
            for name in ("weight_bytes", "weight_bytes_per_token", "distinct_experts")
        }
        return {
            "phase": self.phase,
            "context": self.context,
            "batch": self.batch,
            **numbers,
            **decoding,
            "by_part": self.by_part,
        }


def flops(
    config: Any,
    context: int | None = None,
    phase: Phase = "train",
    *,
    batch: int = 1,
    load: Load | None = None,
    distinct: float | Mapping[int, float] | None = None,
    causal: bool = False,
    bytes_per_parameter: float = 2.0,
) -> FlopCount:
    """Operations per token of a model, from its configuration or its ``ParameterCount``.

    Args:
        context: tokens of the sequence (train, prefill), or tokens that the new one sees, itself
            included (decode). None takes the ``context_length`` of our own configurations, and 4096
            for others, which ``assumed`` then says.
        phase: "train", "prefill" or "decode". The head is applied to every token in all of them,
            but in the prefill of a model whose prompts do not reach it.
        batch: sequences that decode together (they share the weights that a step reads).
        load: measured tokens (or shares) per real expert, for all layers or by layer, for the
            distinct experts of a decoding step; None takes them as equally loaded. Tokens of a step
            are taken to choose independently, which ``assumed`` then says.
        distinct: measured distinct experts of a step (decode, prefill), for all layers or by layer,
            as ``serving.distinct_experts`` counts them; goes before ``load`` and assumes nothing.
        causal: in training and prefill, the exact mean over the positions of a causal sequence,
            about half the scores: what a kernel executes that skips masked keys. By default every
            position is charged as the last one, which is the custom of the field (12 L h q T of
            arXiv 2204.02311, appendix B) and what ``torch.utils.flop_counter`` reports. Windows,
            chunks and top-k selections limit the keys either way.
        bytes_per_parameter: 2 for bfloat16.

    Raises:
        ConfigError: as ``count``; an unknown phase; a load that does not fit the experts.
    """
    counted = config if isinstance(config, ParameterCount) else count(config)
    require(phase in PHASES, f"a phase among {', '.join(PHASES)}", repr(phase), field="phase")
    assumed = counted.assumed
    if context is None:
        context = counted.context_length or CONTEXT
        assumed += (
            () if counted.context_length else (f"context = {CONTEXT} tokens (none was given)",)
        )
    for name, value in (("context", context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(expected(f"{name} of at least 1 token", repr(value)), field="batch")
    tables: dict[At, dict[str, float]] = {
        at: _by_part(counted, context, phase, causal, at) for at in ("least", "mean", "most")
    }
    head = sum(2 * piece.macs for _, piece in counted.pieces() if piece.part is Part.HEAD)
    modules = len({layer for layer, piece in counted.pieces() if piece.part is Part.MTP})
    mtp = [table.pop(Part.MTP.value, 0.0) for table in tables.values()][1] + modules * head
    tokens = batch * (context if phase == "prefill" else 1)
    read, experts = (
        (None, None) if phase == "train" else _read(counted, tokens, load, distinct, phase)
    )
    if phase == "decode" and batch > 1 and distinct is None and experts:
        how = "all experts equally often" if load is None else "on their own by the load given"
        assumed += (
            f"the tokens of a batch of {batch} choose {how}; measured routing repeats experts more "
            "and reads fewer (distinct=)",
        )
    return FlopCount(
        model_type=counted.model_type,
        phase=phase,
        context=context,
        batch=batch,
        by_part={part: value for part, value in tables["mean"].items() if value},
        forward=sum(tables["mean"].values()),
        forward_min=sum(tables["least"].values()),
        forward_max=sum(tables["most"].values()),
        mtp=mtp,
        assumed=assumed,
        weight_bytes=None if read is None else read * bytes_per_parameter,
        distinct_experts=experts,
    )


def _by_part(
    counted: ParameterCount, context: int, phase: Phase, causal: bool, at: At
) -> dict[str, float]:
    sums: dict[str, float] = {}
    costs: dict[Kernel, float] = {}
    for times, pieces in counted.kinds:
        for piece in pieces:
            if piece.decode_only and phase == "prefill":
                continue
            if piece.macs:
                runs = piece.copies if piece.used is None else getattr(piece.used, at)
                runs *= piece.passes
                sums[piece.part.value] = (
                    sums.get(piece.part.value, 0.0) + times * 2 * piece.macs * runs
                )
            if piece.kernel is not None:
                if piece.kernel not in costs:
                    costs[piece.kernel] = kernel_flops(piece.kernel, context, phase, causal)
                name = Part.MTP.value if piece.part is Part.MTP else _kernel_name(piece.kernel)
                sums[name] = sums.get(name, 0.0) + times * piece.passes * costs[piece.kernel]
    return sums


def _kernel_name(kernel: Kernel) -> str:
    return (
        SCORES
        if isinstance(kernel, Attend)
        else INDEXER
        if isinstance(kernel, Index)
        else RECURRENCE
    )


def kernel_flops(kernel: Kernel, context: int, phase: Phase, causal: bool = False) -> float:
    """Operations of one query: that of the last position, or if ``causal`` the mean over all
    positions of a sequence.
    """
    decoding = phase == "decode"
    mean = causal and not decoding
    if isinstance(kernel, Attend):
        qk, v = kernel.absorbed if decoding and kernel.absorbed else (kernel.qk, kernel.v)
        return 2 * kernel.heads * (qk + v) * _keys(kernel, context, mean, decoding)
    if isinstance(kernel, Index):
        visible = (
            capped_sum(context, kernel.stride, None) / context if mean else context // kernel.stride
        )
        return 2 * kernel.heads * (kernel.dim + 1) * visible
    return 2 * kernel.macs


def _keys(kernel: Attend, context: int, mean: bool, decoding: bool) -> float:
    """Keys that a query attends to."""
    if not kernel.causal:
        return context
    if kernel.chunk is not None:
        whole, rest = divmod(context, kernel.chunk)
        if mean:
            return (whole * kernel.chunk * (kernel.chunk + 1) + rest * (rest + 1)) / 2 / context
        return (context - 1) % kernel.chunk + 1 if decoding else min(context, kernel.chunk)
    cap = min((size for size in (kernel.window, kernel.top) if size is not None), default=None)
    if mean:
        return capped_sum(context, kernel.stride, cap) / context
    visible = context // kernel.stride
    return visible if cap is None else min(visible, cap)


def capped_sum(length: int, stride: int, cap: int | None) -> int:
    """``sum_{t=1}^{length} min(floor(t / stride), cap)``."""
    blocks = length // stride
    if cap is None or blocks <= cap:
        return stride * blocks * (blocks - 1) // 2 + blocks * (length - blocks * stride + 1)
    return stride * cap * (cap - 1) // 2 + cap * (length - cap * stride + 1)


# --------------------------------------------------------------------------------------------------
# decoding


def _read(
    counted: ParameterCount,
    batch: int,
    load: Load | None,
    measured: float | Mapping[int, float] | None,
    phase: Phase,
) -> tuple[float, float]:
    """(parameters that ``batch`` tokens at once read, distinct experts per MoE layer and pass).

    Rows of lookup tables are too few to count. A layer that runs several times is read each time.
    """
    parameters, experts = 0.0, {}
    for layer, piece in counted.pieces():
        skipped = piece.decode_only and phase == "prefill"
        if piece.part in LOOKUP or piece.part is Part.MTP or skipped:
            continue
        if piece.part is Part.HEAD:
            parameters += piece.macs
        elif piece.used is None:
            parameters += piece.size * piece.passes
        else:
            routed = piece.part is Part.ROUTED
            if routed and measured is not None:
                distinct = _measured_of(measured, layer, piece)
            else:
                distinct = distinct_experts(piece, batch, _load_of(load, layer) if routed else None)
            parameters += piece.size * distinct * piece.passes
            if routed:
                experts[layer] = distinct
    return parameters, sum(experts.values()) / len(experts) if experts else 0.0


def _measured_of(measured: float | Mapping[int, float], layer: int | None, piece: Piece) -> float:
    value = measured.get(layer, -1.0) if isinstance(measured, Mapping) else measured  # type: ignore[arg-type]
    if not 0 <= value <= piece.copies:
        what = f"from 0 to {piece.copies} distinct experts in MoE layer {layer}"
        raise ConfigError(expected(what, "none" if value == -1 else f"{value:g}"))
    return float(value)


def _load_of(load: Load | None, layer: int | None) -> Sequence[float] | None:
    if load is None or not isinstance(load, Mapping):
        return load
    if layer is None or layer not in load:
        raise ConfigError(
            expected(
                f"a load for MoE layer {layer}", f"layers {', '.join(map(str, sorted(load)))}"
            ),
            field="load",
        )
    return load[layer]


def distinct_experts(piece: Piece, batch: int, load: Sequence[float] | None) -> float:
    """Expected number of different experts that ``batch`` tokens choose, each on its own.

    Equally loaded: ``E (1 - (1 - k/E)^B)``; under loads q_i with ``sum q_i = k``: ``sum_i 1 - (1 -
    q_i)^B``.
    """
    assert piece.used is not None
    per_token = piece.used.mean
    if load is None:
        return piece.copies * (1 - (1 - min(per_token / piece.copies, 1)) ** batch)
    values = [float(value) for value in load]
    total = sum(values)
    require(
        len(values) == piece.copies and min(values, default=-1.0) >= 0 and total > 0,
        f"a load of {piece.copies} numbers of at least 0 that are not all 0",
        f"{len(values)} numbers",
        field="load",
    )
    shares = [per_token * value / total for value in values]
    if max(shares) > 1 + 1e-6:
        what = (
            f"a load in which no expert has more than 1/{per_token:g} of the total (a token "
            f"chooses an expert once)"
        )
        raise ConfigError(expected(what, f"a share of {max(values) / total:.4f}"), field="load")
    return sum(1 - (1 - min(share, 1.0)) ** batch for share in shares)
