"""Published laws against their formulas written out again, and against numbers that their papers
print and docs/scaling.md gives.
"""

import math

import numpy as np
import pytest
from refusals import refused

from moe_lab.errors import AnalysisError
from moe_lab.scaling import LAWS


def saturated(ratio, start, maximum):
    return 1 / (1 / (ratio - 1 + 1 / (1 / start - 1 / maximum)) + 1 / maximum)


def written_out_ludziejewski(k, n, d, r):
    eh = saturated(r, k["Estart"], k["Emax"])
    size = k["a"] * eh ** k["delta"] * n ** (k["alpha"] + k["gamma"] * math.log(eh))
    return size + k["b"] * eh ** k["omega"] * d ** (k["beta"] + k["zeta"] * math.log(eh)) + k["c"]


def written_out_clark(k, n, d, r):
    eh, n10 = math.log10(saturated(r, k["Estart"], k["Emax"])), math.log10(n)
    return 10 ** (k["a"] * n10 + k["b"] * eh + k["c"] * n10 * eh + k["d"])


def written_out_abnar(k, n, d, r):
    sparsity, total = 1 - 1 / r, n * r
    a, b = k["a"] / total ** k["alpha"], k["b"] / d ** k["beta"]
    return (
        a
        + b
        + k["c"] / (1 - sparsity) ** k["lambda"]
        + k["d"] / ((1 - sparsity) ** k["delta"] * total ** k["gamma"])
        + k["e"]
    )


def written_out_krajewski(k, n, d, r, g=12.0):
    return k["c"] + (k["g"] / g ** k["gamma"] + k["a"]) / n ** k["alpha"] + k["b"] / d ** k["beta"]


def written_out_hoffmann(k, n, d, r):
    return k["E"] + k["A"] / n ** k["alpha"] + k["B"] / d ** k["beta"]


def written_out_bilinear(k, n, d, r):
    return math.exp(
        k["const"]
        + k["lnN"] * math.log(n)
        + k["lnE"] * math.log(r)
        + k["lnE_lnN"] * math.log(n) * math.log(r)
    )


WRITTEN_OUT = {
    "ludziejewski": written_out_ludziejewski,
    "clark": written_out_clark,
    "abnar": written_out_abnar,
    "krajewski": written_out_krajewski,
    "hoffmann": written_out_hoffmann,
    "bilinear": written_out_bilinear,
}


def point(active=1e8, tokens=1e10, ratio=16.0):
    values = {
        "active_params": active,
        "total_params": active * ratio,
        "tokens": tokens,
        "ratio": ratio,
        "granularity": 12.0,
    }
    return {**values, "compute": 6 * active * tokens}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_table_of_terms_is_the_formula_of_the_paper(name):
    for which, coefficients in LAWS[name].published.items():
        for values in (point(), point(1e9, 3e11, 64.0), point(2e7, 1e9, 1.0)):
            expected = WRITTEN_OUT[name](
                coefficients, values["active_params"], values["tokens"], values["ratio"]
            )
            assert LAWS[name].predict(values, which) == pytest.approx(expected, rel=1e-12)


UNPUBLISHED = {
    "const": 3.0,
    "lnN": -0.08,
    "lnE": -0.04,
    "c": 3.0,
    "s": 0.03,
    "u": -0.01,
    "t": 20.0,
    "a": 1.0,
    "b": 0.3,
    "Estart": 2.0,
    "Emax": 300.0,
}


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_the_slope_of_the_formula(name):
    law = LAWS[name]
    coefficients = None if law.published else UNPUBLISHED
    for variable in law.variables:
        h = 1e-5
        low, high = (
            law.predict({**point(), variable: point()[variable] * math.exp(s * h)}, coefficients)
            for s in (-1, 1)
        )
        assert law.derivative(variable, point(), coefficients) == pytest.approx(
            (high - low) / (2 * h), rel=1e-6
        )


def test_forms_of_the_ratio_read_as_their_docstrings_say():
    k, r = UNPUBLISHED, np.array([1.0, 16.0, 64.0])
    x = np.log2(r)
    expected = {
        "line": 3 - 0.03 * x,
        "power": 3 + r**-0.3,
        "saturation": 3 - 0.03 * np.log2(saturated(r, 2.0, 300.0)),
        "hinge": 3 - 0.03 * x + 0.01 * np.maximum(0, x - np.log2(20)),
        "plateau": 3 - 0.03 * np.minimum(x, np.log2(20)),
    }
    for name, values in expected.items():
        assert LAWS[name].predict({"ratio": r}, k) == pytest.approx(values, rel=1e-12)


def test_ludziejewski_gains_per_doubling_are_those_of_the_notes():
    ratios = 2.0 ** np.arange(10)
    published = {
        (1e7, 1e9): (0.038, 0.047, 0.051, 0.052, 0.050, 0.045, 0.038, 0.030, 0.021),
        (1e7, 2e8): (0.015, 0.017, 0.016, 0.012, 0.008, 0.004, 0.000, -0.002),
        (1e9, 1e11): (0.022, 0.026, 0.029, 0.030, 0.029, 0.026, 0.022, 0.018, 0.013),
    }
    for (active, tokens), gains in published.items():
        loss = LAWS["ludziejewski"].predict(
            {"active_params": active, "tokens": tokens, "ratio": ratios[: len(gains) + 1]}
        )
        assert -np.diff(loss) == pytest.approx(gains, abs=5.5e-4)


@pytest.mark.parametrize(
    ("active", "tokens", "at_16", "at_64"),
    [
        (1e7, 3e8, 1.08, 1.05),
        (1e7, 1e9, 1.24, 1.18),
        (1e8, 1e10, 1.34, 1.28),
        (1e9, 1e11, 1.37, 1.30),
    ],
)
def test_a_doubling_is_worth_the_compute_that_the_notes_give(active, tokens, at_16, at_64):
    law = LAWS["ludziejewski"]
    for ratio, expected in ((16.0, at_16), (64.0, at_64)):
        start = point(active, tokens, ratio)
        assert law.compute_equivalent(start, {**start, "ratio": 2 * ratio}) == pytest.approx(
            expected, abs=0.006
        )


def test_the_compute_equivalent_really_reaches_the_other_loss():
    law, start = LAWS["ludziejewski"], point()
    multiplier = law.compute_equivalent(start, {**start, "ratio": 32.0})
    grown = {**start, "active_params": 1e8 * multiplier**0.5, "tokens": 1e10 * multiplier**0.5}
    assert law.predict(grown) == pytest.approx(law.predict({**start, "ratio": 32.0}), abs=1e-10)


def test_a_loss_below_the_floor_of_a_law_is_worth_infinite_compute():
    law = LAWS["hoffmann"]
    floor = {"active_params": 1e30, "tokens": 1e30}
    below = {**law.coefficients("epoch"), "E": 1.8}
    multiplier = law.compute_equivalent({"active_params": 1e8, "tokens": 1e10}, floor, below)
    assert multiplier > 1e15
    with refused("law", AnalysisError):
        LAWS["power"].compute_equivalent({"ratio": 2.0}, {"ratio": 4.0}, UNPUBLISHED)


def test_clark_multiplier_shrinks_with_size_to_the_published_cut_off():
    law = LAWS["clark"]
    for router, cut in {"S-BASE": 937e9, "RL-R": 85e9, "HASH": 83e9}.items():
        k = law.coefficients(router)
        at_cut = {"active_params": 10 ** (-k["b"] / k["c"]), "ratio": 16.0}
        assert law.derivative("ratio", at_cut, router) == pytest.approx(0, abs=1e-12)
        # the printed coefficients carry three decimals, the published cut-offs the full ones
        assert math.log10(at_cut["active_params"]) == pytest.approx(math.log10(cut), abs=0.5)


def test_ling_leverage_is_the_papers_more_than_seven():
    law = LAWS["ling"]
    at = {"ratio": 1 / 0.031, "granularity": 12.0, "compute": 1e22}
    assert law.predict(at) == pytest.approx(7.245, abs=5e-4)
    granularity = np.linspace(2, 32, 3001)
    assert granularity[law.predict({**at, "granularity": granularity}).argmax()] == pytest.approx(
        11.3, abs=0.05
    )
    halved = law.compute_equivalent({**at, "ratio": 4.0}, {**at, "ratio": 8.0})
    assert halved == pytest.approx(1.51, abs=0.005)


def test_chinchilla_optimum_is_twenty_tokens_per_parameter():
    """2404.10102: a = beta / (alpha + beta) = .513, and about 20 tokens per parameter at the
    compute of Chinchilla.
    """
    k = LAWS["hoffmann"].coefficients("epoch")
    share = k["beta"] / (k["alpha"] + k["beta"])
    assert share == pytest.approx(0.513, abs=1e-3)
    scale = (k["alpha"] * k["A"] / (k["beta"] * k["B"])) ** (1 / (k["alpha"] + k["beta"]))
    active = scale * (5.76e23 / 6) ** share
    assert 5.76e23 / 6 / active / active == pytest.approx(20, abs=3)


def test_limits_of_validity_are_told():
    law = LAWS["ludziejewski"]
    assert law.outside(point()) == []
    assert law.outside(point(1e7, 1e9, 64.0)) == [
        "active_params 7.8e+07 to 2.72e+09",
        "ratio 1 to 32",
    ]


def test_asking_for_what_is_not_there_names_what_is():
    with refused("name", AnalysisError):
        LAWS["clark"].predict(point(), "TOPK")
    with refused("tokens", AnalysisError):
        LAWS["ludziejewski"].predict({"active_params": 1e8, "ratio": 2.0})
