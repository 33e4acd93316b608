"""``active_distribution(count, ffn_counts)``: active parameters as they were measured, token by
token, in place of a nominal number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_lab.accounting.parameter_count import Convention, ParameterCount
from moe_lab.cost.parts import Piece
from moe_lab.errors import ConfigError, expected

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class ActiveDistribution:
    """
    Attributes:
        tokens: how many were measured.
        mean, sd, lowest, highest: of active parameters per token.
        quantiles: share of tokens -> active parameters.
        nominal: (least, mean, most) that the configuration allows.
        mean_ffn_count: MoE layer -> real experts per token.
    """

    convention: Convention
    tokens: int
    mean: float
    sd: float
    lowest: float
    highest: float
    quantiles: dict[float, float]
    nominal: tuple[int, int, int]
    mean_ffn_count: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            **{
                name: getattr(self, name)
                for name in ("convention", "tokens", "mean", "sd", "lowest", "highest")
            },
            "quantiles": {str(share): value for share, value in self.quantiles.items()},
            "nominal": dict(zip(("least", "mean", "most"), self.nominal, strict=True)),
            "mean_ffn_count": {str(layer): value for layer, value in self.mean_ffn_count.items()},
        }


def active_distribution(
    count: ParameterCount, ffn_counts: Mapping[int, Any], convention: Convention = "B"
) -> ActiveDistribution:
    """The distribution over tokens of the parameters that they used.

    Args:
        ffn_counts: MoE layer -> integers [T], the real experts that each token ran there; the same
            tokens in the same order in all layers. Layers go by the model's numbers, or by their
            order where none of those is a MoE layer of the model.

    Raises:
        ConfigError: layers that are not the model's, unequal lengths, no tokens, a count outside
            what the layer allows.
    """
    import numpy as np

    layers = _match(count.moe_layers, sorted(ffn_counts))
    base = count.active(convention, "least") - sum(
        piece.active("least") for piece in layers.values()
    )
    measured = {layer: np.asarray(values) for layer, values in ffn_counts.items()}
    tokens = {values.shape for values in measured.values()}
    if len(tokens) != 1 or len(shape := next(iter(tokens))) != 1 or shape[0] == 0:
        raise ConfigError(
            expected("ffn_counts of the same tokens in every layer", f"shapes {sorted(tokens)}"),
            field="ffn_counts",
        )
    total = np.full(shape, float(base))
    for layer, piece in layers.items():
        assert piece.used is not None
        values = measured[layer]
        if values.min() < 0 or values.max() > piece.copies:
            raise ConfigError(
                expected(
                    f"ffn_counts of 0 to {piece.copies} in layer {layer}",
                    f"{values.min()} to {values.max()}",
                ),
                field="ffn_counts",
            )
        total += piece.size * values.astype(np.float64)
    return ActiveDistribution(
        convention=convention,
        tokens=shape[0],
        mean=float(total.mean()),
        sd=float(total.std()),
        lowest=float(total.min()),
        highest=float(total.max()),
        quantiles={share: float(np.quantile(total, share)) for share in QUANTILES},
        nominal=(
            count.active(convention, "least"),
            count.active(convention),
            count.active(convention, "most"),
        ),
        mean_ffn_count={layer: float(measured[layer].mean()) for layer in layers},
    )


def _match(moe_layers: dict[int, Piece], measured: list[int]) -> dict[int, Piece]:
    """Measured layer -> routed experts."""
    if set(measured) == set(moe_layers):
        return moe_layers
    if len(measured) == len(moe_layers) and not set(measured) & set(moe_layers):
        return dict(zip(measured, moe_layers.values(), strict=True))
    raise ConfigError(
        expected(f"ffn_counts for MoE layers {_brief(sorted(moe_layers))}", _brief(measured)),
        field="ffn_counts",
    )


def _brief(layers: list[int]) -> str:
    return (
        ", ".join(map(str, layers))
        if len(layers) < 8
        else f"{layers[0]} to {layers[-1]} ({len(layers)} layers)"
    )
