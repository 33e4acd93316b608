"""``Architecture``: one row of the table, from a configuration to the pieces of each layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from moe_lab.accounting.block_factories import Block, join, top
from moe_lab.cost import layer_cost
from moe_lab.cost.parts import Pieces
from moe_lab.hf.fields import MOST, Condition, Fields


class Layer(NamedTuple):
    """The pieces of one layer; ``number`` is None for what stands outside the layers, and counts on
    after them for MTP modules.
    """

    number: int | None
    pieces: Pieces


def copy_of_last_layer(architecture: "Architecture", f: Fields, index: int) -> Pieces:
    """One MTP module as DeepSeek-V3 has it (arXiv 2412.19437 section 2.2): a layer, three norms and
    a projection from the normed hidden state and the embedding of the next token. Embedding and
    head are the main model's, and are not counted again.

    The layer is what ``mtp_layer_types`` and ``mtp_mlp_layer_types`` say, or the last layer again.
    """
    if f.find("mtp_layer_types") is None:
        f.note(
            "mtp",
            "an MTP module is the last layer again, three norms and a projection (the form of "
            "DeepSeek-V3)",
        )
        return mtp_module(f, join(f.at(f.num_layers - 1), architecture.blocks))
    modules = f.size("num_nextn_predict_layers")
    kinds = {
        "layer_types": f.find("mtp_layer_types"),
        "mlp_layer_types": f.optional("mtp_mlp_layer_types", ["sparse"] * modules),
    }
    own = {
        **f.values,
        **kinds,
        "num_hidden_layers": modules,
        "num_nextn_predict_layers": 0,
        "per_layer_config": None,
    }
    return mtp_module(f, join(Fields(own, f.family, f.defaults).at(index), architecture.blocks))


def mtp_module(f: Fields, block: Pieces) -> Pieces:
    return layer_cost.mtp_module(f.size("hidden_size"), block)


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        blocks: what a layer is made of, in order.
        defaults: field -> value (or function of ``Fields``) where a configuration is silent.
        top: embedding, final norm, head.
        mtp: one multi-token-prediction module.
        overrides: layer -> its own fields, where a configuration without ``per_layer_config`` says
            in other words that layers differ.
        layers: replaces the stack of equal layers (encoder-decoder models).
    """

    blocks: tuple[Block, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    top: Block = field(default_factory=top)
    mtp: Callable[["Architecture", Fields, int], Pieces] = copy_of_last_layer
    overrides: Callable[[Fields], Mapping[int, Mapping[str, Any]]] | None = None
    layers: Callable[[Fields], list[Layer]] | None = None

    def build(self, f: Fields) -> list[Layer]:
        """All pieces of the model, MTP modules last."""
        if self.overrides is not None and not f.given("per_layer_config"):
            f.override(self.overrides(f))
        if self.layers is not None:
            return self.layers(f)
        count = f.num_layers
        known: list[tuple[list[Condition], Pieces]] = []
        stack = [
            Layer(None, self.top(f)),
            *(Layer(number, self._layer(f, number, known)) for number in range(count)),
        ]
        modules = f.size_or("num_nextn_predict_layers", 0, most=MOST)
        return stack + [Layer(count + index, self.mtp(self, f, index)) for index in range(modules)]

    def _layer(self, f: Fields, number: int, known: list[tuple[list[Condition], Pieces]]) -> Pieces:
        """The pieces of one layer: those of an earlier one where it would see the same values."""
        for conditions, pieces in known:
            if f.holds(number, conditions):
                return pieces
        view = f.at(number)
        known.append((view.conditions, join(view, self.blocks)))
        return known[-1][1]

    def variant(self, **changes: Any) -> "Architecture":
        """The same row with other blocks; ``defaults`` are added to those of the row."""
        changes["defaults"] = {**self.defaults, **changes.get("defaults", {})}
        return replace(self, **changes)
