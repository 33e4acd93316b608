"""moe_lab: train, trace and judge Mixture-of-Experts models (see docs/design.md)."""

from moe_lab.lazy import on_first_use

__version__ = "0.1.0"

__getattr__ = on_first_use(
    __name__,
    dict.fromkeys(
        (
            "accounting",
            "analysis",
            "model",
            "report",
            "routing",
            "scaling",
            "serving",
            "sweeps",
            "text",
            "trace",
            "training",
            "watch",
            "worth",
        ),
        (),
    ),
)  # ``import moe_lab; moe_lab.routing``
