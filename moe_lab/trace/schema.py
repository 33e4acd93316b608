"""The form of a trace on disk: columns, metadata, and the limits that a reader holds untrusted
files to.

    meta.json                           TraceMeta, "complete", and how many files the manifest lists
    manifest/part-00000.parquet         one row per Parquet file: rows, bytes, digest, counts per
                                        expert (``moe_lab.trace.manifest``)
    tokens/part-00000.parquet           one row per token: doc, pos, token_id, loss, further columns
    routing/layer=3/part-00000.parquet  one row per token: what layer 3 decided; the layer is in the
                                        path (hive partitioning)

A row of ``routing`` lists the slots that ran something, in slot order: ``experts`` holds ids
(zero-compute ones from ``num_experts`` on), ``weights`` the gate weight of each. Unused and dropped
slots are not listed; the dropped ones are counted in ``dropped``.

Additions that ``meta.json`` names where they are used, and leaves out where not: nulls where a
source recorded no weights or no scores, the routing column ``output_ratio``, the token column
``routed``, and provenance per layer.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import polars as pl

from moe_lab.config import Config, Range, require
from moe_lab.versions import versions as library_versions

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
"""Version 2 added layers that run several times (``LayerMeta.model_layer``). Version 3 lists the
files in ``manifest/``; versions 1 and 2 list them in ``meta.json`` and are read as before.
"""
FIRST_WITH_MANIFEST = 3
VERSION_KEY = "moe_lab_trace_version"
"""Key of the Parquet metadata that repeats ``SCHEMA_VERSION`` in every file."""

META_FILE = "meta.json"
MAX_CHOICES = 65_535
"""Real and zero-compute experts together: ids are u16 and one value is kept for the unused slot."""
MAX_TOP_K = 255
MAX_LAYERS = 4096
ROWS_PER_PART = 2**18
"""Rows of one Parquet file (and its one row group): what a writer holds per layer before it writes.
"""
MAX_ROWS_PER_PART = 2**20
"""A reader refuses larger parts before it allocates anything, so reading part by part is bounded in
memory.
"""
MAX_MANIFEST_PARTS = 2**14
"""A writer fills one with 2^14 files, or fewer with many experts."""
MAX_PART_NUMBER = 999_999_999
MAX_FILE_BYTES = 2**50
PART_PATH = re.compile(
    r"(?:tokens|routing/layer=(0|[1-9]\d{0,4}))/part-(\d{5}|[1-9]\d{5,8})\.parquet"
)

TOKEN_COLUMNS: dict[str, pl.DataType] = {
    "doc": pl.UInt32(),
    "pos": pl.UInt32(),
    "token_id": pl.UInt32(),
    "loss": pl.Float32(),
}
"""The columns every ``tokens`` table begins with; ``loss`` (nats) is null where the token was not
predicted.
"""

ROUTING_COLUMNS: dict[str, pl.DataType] = {
    "doc": pl.UInt32(),
    "pos": pl.UInt32(),
    "experts": pl.List(pl.UInt16()),
    "weights": pl.List(pl.Float16()),
    "ffn_count": pl.UInt8(),
    "zero_count": pl.UInt8(),
    "gate_mass_ffn": pl.Float32(),
    "entropy": pl.Float32(),
    "margin": pl.Float32(),
    "dropped": pl.UInt8(),
}
"""Columns of one layer's table as they are read. ``gate_mass_ffn`` is the sum of the weights on
real experts; ``entropy`` is in nats; ``margin`` is null where every expert is selected. ``weights``
and ``gate_mass_ffn`` are null in a trace without weights, ``entropy`` and ``margin`` in one without
scores (``TraceMeta.has_weights``, ``has_scores``).
"""

OUTPUT_RATIO = "output_ratio"
"""Further routing column f32 where ``TraceMeta.has_output_ratio``: norm of the experts' summed
output over that of their input.
"""

ROUTED = "routed"
"""Optional bool column of ``tokens``: False where the source recorded no routing for the token, so
no layer has a row for it.
"""


def _whole(low: int, high: int) -> Range:
    return Range(
        lambda value: type(value) is int and low <= value <= high,
        f"to be an integer from {low} to {high}",
    )


def _is_texts(value: Any) -> bool:
    return all(isinstance(item, str) for item in value)


_TEXT = Range(lambda value: isinstance(value, str), "to be text")
_TEXTS = Range(lambda value: isinstance(value, tuple) and _is_texts(value), "to be texts")
_NAMED_TEXTS = Range(
    lambda value: isinstance(value, dict) and _is_texts(value) and _is_texts(value.values()),
    "to map names to texts",
)
_FLAG = Range(lambda value: isinstance(value, bool), "to be true or false")


@dataclass(frozen=True)
class LayerMeta(Config):
    """One traced layer, or one run of a layer that runs several times.

    Attributes:
        layer: index in the model, counted from 0 over all its layers. Where a model runs some of
            its layers several times, it counts runs, in the order in which a token goes through
            them.
        num_experts: real experts.
        num_zero_experts: zero-compute experts, whose ids follow the real ones.
        top_k: the most slots a token can use.
        module: name of the traced module, where there was one.
        score_func: from logits to the scores behind ``entropy`` and ``margin``: softmax, sigmoid or
            sqrt_softplus.
        zero_kinds: what each zero-compute expert returns (identity, zero, constant, skip), or
            nothing where unknown.
        expert_bytes: bytes of one real expert as the source stored it, 0 where it does not say.
        model_layer: index in the model where ``layer`` counts runs; None: the same as ``layer``.
        pass_number: which run of that layer this is, from 0.
    """

    layer: Annotated[int, _whole(0, 99_999)]
    num_experts: Annotated[int, _whole(1, MAX_CHOICES)]
    num_zero_experts: Annotated[int, _whole(0, MAX_CHOICES)] = 0
    top_k: Annotated[int, _whole(1, MAX_TOP_K)] = 1
    module: Annotated[str, _TEXT] = ""
    score_func: Annotated[str, _TEXT] = ""
    zero_kinds: Annotated[tuple[str, ...], _TEXTS] = ()
    expert_bytes: Annotated[int, _whole(0, 2**50)] = 0
    model_layer: Annotated[int | None, _whole(0, 99_999)] = None
    pass_number: Annotated[int, _whole(0, MAX_LAYERS)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_choices <= MAX_CHOICES,
            f"at most {MAX_CHOICES} experts",
            self.num_choices,
            field="num_experts",
        )
        require(
            len(self.zero_kinds) in (0, self.num_zero_experts),
            "one kind for each zero-compute expert, or none",
            len(self.zero_kinds),
            field="zero_kinds",
        )
        require(
            self.top_k <= self.num_choices,
            f"top_k of at most {self.num_choices} (all experts of layer {self.layer})",
            self.top_k,
            field="top_k",
        )

    @property
    def num_choices(self) -> int:
        """Real and zero-compute experts together."""
        return self.num_experts + self.num_zero_experts

    @property
    def in_model(self) -> int:
        """Index of the layer in the model."""
        return self.layer if self.model_layer is None else self.model_layer


@dataclass(frozen=True)
class TraceMeta(Config):
    """Provenance of a trace. Strings are plain text from wherever the model came from: escape them
    before showing them in HTML.

    Attributes:
        layers: the traced layers, each once; a trace holds exactly these.
        model: name of the model, with its revision where there is one.
        model_hash: hash of its configuration or weights.
        tokenizer_hash: hash of the tokenizer.
        corpus_hash: hash of the text.
        seed: seed of the run, or None where nothing was drawn.
        phase: "eval", "prefill", "decode" or "train"; "generate" where the token column ``phase``
            tells prefill from decode.
        vocab_size: token ids are below it, or None where unknown.
        versions: library versions by name.
        created_from: the command or configuration hash that made the trace.
        has_weights, has_scores: whether gate weights, and entropy and margin, were recorded; they
            are null where not.
        has_output_ratio: whether the routing has the column ``output_ratio``.
        zero_experts_known: False where the source writes zero-compute experts as real ones (vLLM
            and others: expert 0), so that the counts of those cannot be believed.
        has_token_ids: False where the source has no ids of tokens: ``token_id`` is null.
        per_token: False where only counts were recorded and the rows were made up to have them:
            load can be read, nothing about tokens.
        max_tokens: leading tokens of each document that were taken, or None where no limit was set.
        notes: what else a reader of the numbers must know, one sentence each.
        schema_version: of the layout described in this module.
    """

    layers: tuple[LayerMeta, ...]
    model: Annotated[str, _TEXT] = ""
    model_hash: Annotated[str, _TEXT] = ""
    tokenizer_hash: Annotated[str, _TEXT] = ""
    corpus_hash: Annotated[str, _TEXT] = ""
    seed: Annotated[int | None, _whole(0, 2**63)] = None
    phase: Annotated[str, _TEXT] = "eval"
    vocab_size: Annotated[int | None, _whole(0, 2**63)] = None
    versions: Annotated[dict[str, str], _NAMED_TEXTS] = field(default_factory=library_versions)
    created_from: Annotated[str, _TEXT] = ""
    has_weights: Annotated[bool, _FLAG] = True
    has_scores: Annotated[bool, _FLAG] = True
    has_output_ratio: Annotated[bool, _FLAG] = False
    zero_experts_known: Annotated[bool, _FLAG] = True
    has_token_ids: Annotated[bool, _FLAG] = True
    per_token: Annotated[bool, _FLAG] = True
    max_tokens: Annotated[int | None, _whole(0, 2**63)] = None
    notes: Annotated[tuple[str, ...], _TEXTS] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        require(
            self.schema_version == SCHEMA_VERSION,
            f"trace schema version {SCHEMA_VERSION}",
            _short(self.schema_version),
            field="schema_version",
        )
        super().__post_init__()
        require(
            1 <= len(self.layers) <= MAX_LAYERS,
            f"from 1 to {MAX_LAYERS} layers",
            len(self.layers),
            field="layers",
        )
        numbers = [layer.layer for layer in self.layers]
        require(
            len(set(numbers)) == len(numbers), "each layer once", _short(numbers), field="layers"
        )
        runs = [(layer.in_model, layer.pass_number) for layer in self.layers]
        require(
            len(set(runs)) == len(runs), "each pass of a layer once", _short(runs), field="layers"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the additions that are not used, so that any reader of this
        version understands the rest.
        """
        values = super().to_dict()
        return {
            **_used(values, ADDED),
            "layers": [_used(layer, ADDED_TO_LAYERS) for layer in values["layers"]],
        }

    def routing_schema(self) -> dict[str, pl.DataType]:
        """Columns and types of the routing tables."""
        return (
            {**ROUTING_COLUMNS, OUTPUT_RATIO: pl.Float32()}
            if self.has_output_ratio
            else ROUTING_COLUMNS
        )

    def not_recorded(self) -> list[str]:
        """Columns of the routing tables that are null in every row."""
        return [
            *([] if self.has_weights else ["weights", "gate_mass_ffn"]),
            *([] if self.has_scores else ["entropy", "margin"]),
        ]

    def layer(self, number: int) -> LayerMeta | None:
        """The layer of that index, or None where the trace has none."""
        return next((layer for layer in self.layers if layer.layer == number), None)

    @property
    def loops(self) -> bool:
        """Whether the model runs some of its layers several times."""
        return any(layer.model_layer is not None for layer in self.layers)


ADDED = {
    **dict.fromkeys(
        ("has_weights", "has_scores", "zero_experts_known", "has_token_ids", "per_token"), True
    ),
    "has_output_ratio": False,
    "max_tokens": None,
    "notes": [],
}
ADDED_TO_LAYERS = {
    **{"module": "", "score_func": "", "zero_kinds": [], "expert_bytes": 0},
    **{"model_layer": None, "pass_number": 0},
}
"""Fields that came after the first release, with the values that say nothing."""


def _used(values: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in values.items() if name not in added or value != added[name]
    }


@dataclass(frozen=True)
class ManifestMeta(Config):
    """What ``meta.json`` says of the manifest.

    Attributes:
        files: Parquet files that it lists.
        parts: Parquet files that it consists of.
        digest: over all of them (``manifest.whole_digest``).
    """

    files: Annotated[int, _whole(0, 2**32)]
    parts: Annotated[int, _whole(0, MAX_MANIFEST_PARTS)]
    digest: Annotated[str, _TEXT]


@dataclass(frozen=True)
class PartMeta(Config):
    """One Parquet file in ``meta.json`` of a trace of schema 1 or 2: its rows, used slots (0 for
    tokens), bytes and CRC-32.
    """

    rows: Annotated[int, _whole(0, MAX_ROWS_PER_PART)]
    slots: Annotated[int, _whole(0, MAX_ROWS_PER_PART * MAX_TOP_K)]
    bytes: Annotated[int, _whole(0, MAX_FILE_BYTES)]
    crc32: Annotated[int, _whole(0, 2**32 - 1)]


def _short(value: object) -> str:
    """A value from an untrusted file, cut so that a message stays one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
