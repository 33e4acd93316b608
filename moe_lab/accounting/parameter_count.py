"""``count(config) -> ParameterCount``: total and active parameters in closed form, without building
the model.

Laboratories count active parameters in three ways, and a published figure is right in one of them:

A. everything that is stored, less the experts that a token does not run; B. A without what is only
looked up: the input embedding unless it is also the head, and n-gram tables; C. B without the head
(a tied embedding is the head).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

from moe_lab.accounting.architecture import Layer
from moe_lab.accounting.model_names import named_config
from moe_lab.accounting.own_models import count_own, own_config
from moe_lab.accounting.read_config import resolve
from moe_lab.cost.parts import Part, Piece, Pieces
from moe_lab.errors import ConfigError, expected, require
from moe_lab.hf.configuration import plain
from moe_lab.hf.fields import canonical
from moe_lab.html_table import html_table

if TYPE_CHECKING:
    import polars as pl

Convention = Literal["A", "B", "C"]
At = Literal["least", "mean", "most"]
ActivePhase = Literal["prefill", "decode"]

CONVENTIONS: tuple[Convention, ...] = ("A", "B", "C")


@dataclass(frozen=True)
class ParameterCount:
    """
    Attributes:
        model_type: the architecture's name.
        layers: all pieces, layer by layer.
        assumed: one sentence for each value that the configuration does not hold.
        read: the fields that the count depends on, under the names used here.
        context_length: the context that the configuration is made for, where it is one of this
            library's.
    """

    model_type: str
    layers: tuple[Layer, ...]
    assumed: tuple[str, ...]
    read: frozenset[str] = frozenset()
    context_length: int | None = None

    def __repr__(self) -> str:
        layers = sum(layer.number is not None for layer in self.layers)
        least, most = self.active(at="least"), self.active(at="most")
        active = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        more = [f"MTP modules {self.mtp:,}"] * bool(self.mtp) + list(self.assumed)
        return "\n  ".join(
            [
                f"ParameterCount({self.model_type}, {layers} layers:",
                f"total {self.total:,}, active {active} (convention B))",
                *(shorten(line, 110) for line in more[:20]),
            ]
        )

    def _repr_html_(self) -> str:
        """Parameters of each part, its share, and what a token uses of it on average."""
        active: dict[str, float] = {}
        for _, piece in self.pieces():
            active[piece.part.value] = active.get(piece.part.value, 0.0) + piece.active()
        rows = [
            (part.replace("_", " "), size, size / self.total, round(active[part]))
            for part, size in self.by_part.items()
            if size
        ]
        first, *_ = repr(self).split(":\n")
        caption = f"{first}): total {self.total:,}, active {self.active_mean:,} (convention B)"
        return html_table(
            ("part", "parameters", "of the total", "used by a token"),
            rows,
            caption,
            "\n".join(self.assumed),
        )

    def pieces(self) -> Iterator[tuple[int | None, Piece]]:
        """(layer, piece) for all of them; the layer is None for embedding, head and final norm."""
        return ((layer.number, piece) for layer in self.layers for piece in layer.pieces)

    @cached_property
    def kinds(self) -> tuple[tuple[int, Pieces], ...]:
        """(number of layers, their pieces) for each kind of layer: equal layers hold the same
        pieces.
        """
        found: dict[int, tuple[int, Pieces]] = {}
        for layer in self.layers:
            known, _ = found.get(id(layer.pieces), (0, ()))
            found[id(layer.pieces)] = (known + 1, layer.pieces)
        return tuple(found.values())

    @property
    def total(self) -> int:
        """Every parameter once, without MTP modules and without phantom rows."""
        return sum(size for part, size in self.by_part.items() if part != Part.MTP.value)

    @property
    def mtp(self) -> int:
        """Parameters of the multi-token-prediction modules, beyond the embedding and head that they
        share.
        """
        return self.by_part[Part.MTP.value]

    @property
    def phantom(self) -> int:
        """Rows that checkpoints or the transformers implementation have beside these and no token
        reads: ``numel`` is ``total + phantom`` (Inkling 2 since transformers 5.24: ``total``).
        """
        return sum(times * piece.phantom for times, pieces in self.kinds for piece in pieces)

    @cached_property
    def by_part(self) -> dict[str, int]:
        """Stored parameters of each part; all but ``mtp`` add up to ``total``."""
        sums = dict.fromkeys((part.value for part in Part), 0)
        for times, pieces in self.kinds:
            for piece in pieces:
                sums[piece.part.value] += times * piece.params
        return sums

    @cached_property
    def tied(self) -> bool:
        return any(
            piece.part is Part.HEAD and piece.macs and not piece.size for _, piece in self.pieces()
        )

    @property
    def has_phases(self) -> bool:
        """Whether a token of a prompt runs fewer parameters than a generated token."""
        return any(piece.decode_only for _, pieces in self.kinds for piece in pieces)

    def active(
        self, convention: Convention = "B", at: At = "mean", phase: ActivePhase = "decode"
    ) -> int:
        """Parameters that one token uses in a convention, ``at`` the least, mean or most experts
        that it may run; a layer that runs several times counts once. ``phase`` "prefill": what a
        token of a prompt uses, where that is less than what a generated one does.
        """
        require(convention in CONVENTIONS, "a convention A, B or C", repr(convention))
        require(phase in ("prefill", "decode"), "a phase among prefill, decode", repr(phase))
        left_out = _LEFT_OUT[convention, self.tied]
        used = (
            times * piece.active(at)
            for times, pieces in self.kinds
            for piece in pieces
            if piece.part not in left_out and not (piece.decode_only and phase == "prefill")
        )
        return round(sum(used))

    def active_without_tables(self, at: At = "mean") -> int:
        """Convention A less the n-gram tables, of which a token reads a few rows: what runs of this
        library record as active.
        """
        return self.active("A", at) - self.by_part[Part.NGRAM_TABLE]

    @property
    def active_min(self) -> int:
        """Convention B, a token that runs as few experts as it may."""
        return self.active("B", "least")

    @property
    def active_mean(self) -> int:
        """Convention B, the mean over tokens."""
        return self.active("B", "mean")

    @property
    def active_max(self) -> int:
        """Convention B, a token that runs as many experts as it may."""
        return self.active("B", "most")

    @property
    def moe_layers(self) -> dict[int, Piece]:
        """Layer -> its routed experts as one piece (``size`` is one whole expert), MTP modules left
        out.
        """
        found: dict[int, Piece] = {}
        for layer, piece in self.pieces():
            if layer is not None and piece.part is Part.ROUTED:
                known = found.get(layer)
                found[layer] = (
                    piece if known is None else known._replace(size=known.size + piece.size)
                )
        return found

    def frame(self) -> "pl.DataFrame":
        """One row per piece: layer (null outside the layers), part, name, params, copies, passes,
        active_min, active_mean, active_max, phantom.
        """
        import polars as pl

        rows = [
            (
                layer,
                piece.part.value,
                piece.name,
                piece.params,
                piece.copies,
                piece.passes,
                *map(piece.active, ("least", "mean", "most")),
                piece.phantom,
            )
            for layer, piece in self.pieces()
        ]
        floats = ("active_min", "active_mean", "active_max")
        schema = {
            "layer": pl.Int32,
            "part": pl.String,
            "name": pl.String,
            "params": pl.Int64,
            "copies": pl.Int64,
            "passes": pl.Int64,
        }
        return pl.DataFrame(
            rows,
            schema={**schema, **dict.fromkeys(floats, pl.Float64), "phantom": pl.Int64},
            orient="row",
        )

    def by_layer(self) -> "pl.DataFrame":
        """One row per layer and part: layer, part, params, active_min, active_mean, active_max."""
        import polars as pl

        sums = pl.col("params", "active_min", "active_mean", "active_max").sum()
        return self.frame().group_by("layer", "part", maintain_order=True).agg(sums)

    def to_dict(self) -> dict[str, Any]:
        """The values that ``moe-lab count --json`` prints."""
        active = {
            name: {at: self.active(name, at) for at in ("least", "mean", "most")}
            for name in CONVENTIONS
        }
        numbers = {"total": self.total, "active": active, "mtp": self.mtp, "phantom": self.phantom}
        if self.has_phases:
            numbers["active_prefill"] = {
                name: self.active(name, phase="prefill") for name in CONVENTIONS
            }
        if tables := self.by_part[Part.NGRAM_TABLE]:
            numbers["read_by_row"] = {"parameters": tables, "without": self.total - tables}
        return {
            "model_type": self.model_type,
            **numbers,
            "by_part": self.by_part,
            "assumed": list(self.assumed),
        }


def _left_out(convention: Convention, tied: bool) -> frozenset[Part]:
    out = {Part.MTP}
    if convention != "A":
        out |= (
            {Part.NGRAM_TABLE} if tied and convention == "B" else {Part.NGRAM_TABLE, Part.EMBEDDING}
        )
    return frozenset(out | {Part.HEAD}) if convention == "C" else frozenset(out)


_LEFT_OUT = {
    (convention, tied): _left_out(convention, tied)
    for convention in CONVENTIONS
    for tied in (False, True)
}


def count(
    config: Any, edits: Mapping[str, Any] | None = None, *, defaults: str | None = None
) -> ParameterCount:
    """Count a model from its configuration.

    Args:
        config: the name of a published model or a mini (``"deepseek-ai/DeepSeek-V3"``); a Hugging
            Face configuration (dictionary, path to ``config.json`` or its folder,
            ``PretrainedConfig``), multimodal ones by their text part; Mistral's ``params.json``,
            DeepSeek's own names, a ``.gguf`` file or its metadata; or a ``DecoderConfig``,
            ``MoEConfig`` or ``RunConfig`` of this library.
        edits: "what if": field -> value, in place of what the configuration says under any of the
            field's names.
        defaults: "hf": what the configuration leaves out comes from transformers' class of its
            ``model_type`` (the extra ``hf``), and stands in ``assumed``; by default it is an error.

    Raises:
        ConfigError: an architecture that is not in the table, a field that is missing, fields that
            contradict each other, an edit of a field that the count does not depend on.
    """
    edits = edits or {}
    config = named_config(config) if isinstance(config, str) else config
    own = own_config(config)
    if own is None:
        config = plain(config)
        own = own_config(config)
    if own is not None:
        return ParameterCount(*count_own(own, edits))
    filled: dict[str, str] = {}
    require(defaults in (None, "hf"), "defaults among hf, None", repr(defaults))
    if defaults == "hf":
        from moe_lab.hf.library_defaults import with_library_defaults

        config, filled = with_library_defaults(config)
    architecture, fields = resolve(config, edits)
    layers = tuple(architecture.build(fields))
    if unread := sorted(name for name in edits if canonical(name) not in fields.read):
        near = get_close_matches(unread[0], sorted(fields.read), n=3, cutoff=0.4)
        raise ConfigError(
            expected(f"a field that the count of {fields.family} reads", unread[0], ", ".join(near))
        )
    taken = (sentence for field, sentence in filled.items() if field in fields.read)
    return ParameterCount(
        fields.family, layers, (*fields.assumed.values(), *taken), frozenset(fields.read)
    )
