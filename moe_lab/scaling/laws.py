"""The published laws, one entry each, as printed in their papers (reference values:
docs/scaling.md).
"""

import numpy as np

from moe_lab.scaling.frontier_forms import effective_ratio
from moe_lab.scaling.law import LN2, LN10, Base, Law, Term, Values, clark_experts, ling_activation

CLARK_SHAPE = ("Estart", "Emax")


def _doublings(point: Values) -> np.ndarray:
    return np.log(point["ratio"]) / LN2


_ALL = (
    Law(
        "clark",
        "Clark et al. 2022",
        "arXiv 2202.01169, eqs. 4-5 and table 3: log10 L = a log10 N + b log10 Eh + c log10 N "
        "log10 Eh + d",
        (Term("d", {"a": ("n", 1.0), "b": ("e", 1.0), "c": ("ne", 1 / LN10)}, Base.LOG10),),
        {
            "S-BASE": {
                "a": -0.082,
                "b": -0.108,
                "c": 0.009,
                "d": 1.104,
                "Estart": 1.847,
                "Emax": 314.478,
            },
            "RL-R": {
                "a": -0.083,
                "b": -0.126,
                "c": 0.012,
                "d": 1.111,
                "Estart": 1.880,
                "Emax": 469.982,
            },
            "HASH": {
                "a": -0.087,
                "b": -0.136,
                "c": 0.012,
                "d": 1.157,
                "Estart": 4.175,
                "Emax": 477.741,
            },
        },
        {"active_params": (1.5e7, 1.31e9), "ratio": (1, 512), "tokens": (1.3e11, 1.31e11)},
        CLARK_SHAPE,
        clark_experts,
        caution="one token budget (130B), top-1, learning rate not retuned per E; "
        "printed to three decimals",
    ),
    Law(
        "bilinear",
        "Clark et al. 2022, without saturation",
        "arXiv 2202.01169, eq. 3: ln L = const + lnN ln N + lnE ln E + lnE_lnN ln N ln E",
        (Term("const", {"lnN": ("n", 1.0), "lnE": ("x", 1.0), "lnE_lnN": ("nx", 1.0)}, Base.LN),),
        {"SLDBench": {"const": 2.563144, "lnN": -0.084521, "lnE": -0.100962, "lnE_lnN": 0.004064}},
        {"active_params": (1.5e7, 3.7e8), "ratio": (1, 512)},
    ),
    Law(
        "separable",
        "Clark et al. 2022, no interaction",
        "arXiv 2202.01169, eq. 2: ln L = const + lnN ln N + lnE ln E",
        (Term("const", {"lnN": ("n", 1.0), "lnE": ("x", 1.0)}, Base.LN),),
    ),
    Law(
        "sldbench",
        "SLDBench on Clark's runs",
        "arXiv 2507.21184 (leaderboard): L = L0 + C N^-alpha E^-beta, least squares, step "
        "249000, N < 1e9",
        (Term("L0"), Term("C", {"alpha": ("n", -1.0), "beta": ("x", -1.0)})),
        {"SLDBench": {"L0": 1.617018, "C": 43.4757, "alpha": 0.198986, "beta": 0.073983}},
        {"active_params": (1.5e7, 3.7e8), "ratio": (1, 512)},
    ),
    Law(
        "hoffmann",
        "Hoffmann et al. 2022 (Chinchilla)",
        "arXiv 2203.15556 eq. 10; refitted in 2404.10102: L = E + A N^-alpha + B D^-beta",
        (Term("E"), Term("A", {"alpha": ("n", -1.0)}), Term("B", {"beta": ("d", -1.0)})),
        {
            "epoch": {"A": 482.01, "B": 2085.43, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585},
            "hoffmann": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
        },
        {"active_params": (4.4e7, 1.62e10), "tokens": (2.5e8, 1.5e12)},
        caution="dense models only",
    ),
    Law(
        "tied",
        "Muennighoff et al. 2023; Gadre et al. 2024",
        "arXiv 2305.16264: L = E + A N^-alpha + B D^-alpha; 2403.08540 eq. 4 is the same law "
        "with alpha = 2 eta and amplitudes 6^-eta a, b",
        (Term("E"), Term("A", {"alpha": ("n", -1.0)}), Term("B", {"alpha": ("d", -1.0)})),
        {"muennighoff": {"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.3526596}},
        caution="dense models only",
    ),
    Law(
        "krajewski",
        "Krajewski et al. 2024",
        "arXiv 2402.07871 eq. 9 and table 1: L = c + (g G^-gamma + a) N^-alpha + b D^-beta",
        (
            Term("c"),
            Term("g", {"gamma": ("g", -1.0), "alpha": ("n", -1.0)}),
            Term("a", {"alpha": ("n", -1.0)}),
            Term("b", {"beta": ("d", -1.0)}),
        ),
        {
            "moe": {
                "a": 18.1,
                "alpha": 0.115,
                "b": 30.8,
                "beta": 0.147,
                "g": 2.1,
                "gamma": 0.58,
                "c": 0.47,
            }
        },
        {"granularity": (1, 16), "tokens": (1.6e10, 1.3e11)},
        caution="64 experts of full size throughout: says nothing about the ratio",
    ),
    Law(
        "ludziejewski",
        "Ludziejewski et al. 2025",
        "arXiv 2502.05172 eq. 6 and table 3: L = a Eh^delta N^(alpha + gamma ln Eh) + b "
        "Eh^omega D^(beta + zeta ln Eh) + c",
        (
            Term("a", {"delta": ("e", 1.0), "alpha": ("n", 1.0), "gamma": ("ne", 1.0)}),
            Term("b", {"omega": ("e", 1.0), "beta": ("d", 1.0), "zeta": ("de", 1.0)}),
            Term("c"),
        ),
        {
            "joint": {
                "a": 35.91,
                "alpha": -0.1889,
                "delta": -0.2285,
                "gamma": 0.0098,
                "b": 35.98,
                "beta": -0.1775,
                "omega": 0.5529,
                "zeta": -0.0259,
                "Estart": 2.0732,
                "Emax": 290.4521,
                "c": 1.3637,
            }
        },
        {"active_params": (7.8e7, 2.72e9), "tokens": (5e8, 8e10), "ratio": (1, 32)},
        CLARK_SHAPE,
        clark_experts,
        caution="top-1 in every layer; E_max 290 lies nine times past its largest ratio",
    ),
    Law(
        "abnar",
        "Abnar et al. 2025",
        "arXiv 2501.12370 eq. 2 and table 3: L = a N^-alpha + b D^-beta + c (1-S)^-lambda + d "
        "(1-S)^-delta N^-gamma + e, N total",
        (
            Term("a", {"alpha": ("t", -1.0)}),
            Term("b", {"beta": ("d", -1.0)}),
            Term("c", {"lambda": ("x", 1.0)}),
            Term("d", {"delta": ("x", 1.0), "gamma": ("t", -1.0)}),
            Term("e"),
        ),
        {
            "isoflop": {
                "alpha": 0.5962,
                "beta": 0.3954,
                "lambda": -0.1666,
                "delta": 0.1603,
                "gamma": 0.1595,
                "a": 16612.5,
                "b": 5455.67,
                "c": 0.4598,
                "d": 17.26,
                "e": 0.94,
            }
        },
        {"ratio": (1, 20)},
        caution="held-out R2 at sparsity .98 is .68: weakest where a wall would be",
    ),
    Law(
        "ling",
        "Ling team 2025 (efficiency leverage)",
        "arXiv 2507.17702 eq. 9 and table 2: EL = Ah^(a + d log10 C + gamma (log2 G)^2 + beta "
        "log2 G); logarithm bases inferred",
        (
            Term(
                "one",
                {
                    "a": ("e", 1.0),
                    "d": ("ec", 1 / LN10),
                    "gamma": ("egg", 1 / LN2**2),
                    "beta": ("eg", 1 / LN2),
                },
                Base.ONE,
            ),
        ),
        {
            "table 2": {
                "a": 1.23,
                "d": -0.0761,
                "gamma": 0.0167,
                "beta": -0.117,
                "Astart": 0.0163,
                "Amax": 5.28e16,
            }
        },
        {"ratio": (1, 125), "compute": (1e18, 6e20), "granularity": (2, 16)},
        ("Astart", "Amax"),
        ling_activation,
        output="leverage",
    ),
    Law(
        "marin",
        "Marin grug MoE (isoFLOP optima)",
        "marin-community/marin experiments/grug/moe/README.md: Paloma macro loss = floor + A "
        "C^-alpha, ratio 16",
        (Term("floor"), Term("A", {"alpha": ("c", -1.0)})),
        {"macro": {"floor": 1.6, "A": 95.18, "alpha": 0.0941}},
        {"compute": (1e18, 3e20)},
        caution="the floor was chosen, not found (1.45 +- .15)",
    ),
    Law(
        "kimi",
        "Kimi K2 report (sparsity)",
        "FLOPs to validation loss 1.5 at sparsity 8, 16, 32, 48 are as 1.69, 1.39, 1.15, 1: "
        "compute saved ~ ratio^slope",
        (Term("one", {"slope": ("x", 1.0)}, Base.ONE),),
        {"report": {"slope": 0.289}},
        {"ratio": (8, 48)},
        output="leverage",
        caution="four rounded numbers from one report",
    ),
    Law(
        "line",
        "straight line in log ratio",
        "L = c - s log2 r",
        formula=lambda k, v: k["c"] - k["s"] * _doublings(v),
    ),
    Law(
        "power",
        "saturating power law of the ratio",
        "L = c + a r^-b",
        (Term("c"), Term("a", {"b": ("x", -1.0)})),
    ),
    Law(
        "saturation",
        "Clark's saturation in log ratio",
        "L = c - s log2 Eh(r; Estart, Emax), Eh as 2202.01169 eq. 5",
        formula=lambda k, v: (
            k["c"] - k["s"] * np.log(effective_ratio(v["ratio"], k["Estart"], k["Emax"])) / LN2
        ),
        shape=CLARK_SHAPE,
    ),
    Law(
        "hinge",
        "two slopes in log ratio",
        "L = c - s x - u max(0, x - log2 t), x = log2 r",
        formula=lambda k, v: (
            k["c"]
            - k["s"] * _doublings(v)
            - k["u"] * np.maximum(0, _doublings(v) - np.log2(k["t"]))
        ),
    ),
    Law(
        "plateau",
        "straight line, then nothing",
        "L = c - s min(x, log2 t), x = log2 r",
        formula=lambda k, v: k["c"] - k["s"] * np.minimum(_doublings(v), np.log2(k["t"])),
    ),
)

LAWS: dict[str, Law] = {law.name: law for law in _ALL}
LAW_ALIASES = {"chinchilla": "hoffmann", "muennighoff": "tied", "gadre": "tied"}
"""Names that people use -> names in ``LAWS``."""
