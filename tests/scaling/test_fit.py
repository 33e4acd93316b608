"""Fits on runs made from known laws, and the batched path against scipy's."""

import math

import numpy as np
import polars as pl
import pytest
from plain_fit import plain_fit
from refusals import refused
from scipy.optimize import least_squares, rosen, rosen_der

from moe_lab.errors import AnalysisError
from moe_lab.scaling import (
    LAWS,
    SQUARES,
    bootstrap,
    fit,
    leave_largest_out,
    profile,
    profile_interval,
    saturation,
)
from moe_lab.scaling.fit import aicc, make_problem
from moe_lab.scaling.fit_problem import to_theta
from moe_lab.scaling.frontier_forms import FORMS, fit_form
from moe_lab.scaling.minimise import minimise

DOUBLINGS = 2.0 ** np.arange(8)


def grid(noise=0.0, ratios=DOUBLINGS, seed=0, law="ludziejewski", coefficients=None):
    """Runs of 4 sizes x 3 budgets x ratios: losses of a published law, ``noise`` on ln loss."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"active_params": 1e8 * 2.5 ** np.arange(4)}).join(
        pl.DataFrame({"tokens": [2e9, 1e10, 5e10]}), how="cross"
    )
    frame = frame.join(pl.DataFrame({"ratio": ratios}), how="cross").with_columns(
        total_params=pl.col("active_params") * pl.col("ratio"),
        compute=6 * pl.col("active_params") * pl.col("tokens"),
        granularity=pl.Series(np.tile([1.0, 2.0, 4.0, 8.0], len(ratios) * 3)[: 12 * len(ratios)]),
    )
    loss = LAWS[law].predict({name: frame[name].to_numpy() for name in frame.columns}, coefficients)
    return frame.with_columns(
        loss=np.broadcast_to(loss, frame.height) * np.exp(rng.normal(0, noise, frame.height))
    )


FITTED = (
    "clark",
    "bilinear",
    "separable",
    "sldbench",
    "hoffmann",
    "krajewski",
    "ludziejewski",
    "abnar",
    "ling",
    "power",
)
SEPARABLE = {"const": 3.0, "lnN": -0.08, "lnE": -0.04}
POWER = {"c": 2.0, "a": 1.0, "b": 0.3}


@pytest.mark.parametrize("name", FITTED)
def test_the_gradient_is_that_of_the_objective(name):
    law = LAWS[name]
    frame = grid(0.01)
    coefficients = {"separable": SEPARABLE, "power": POWER}.get(name) or law.coefficients()
    problem = make_problem(law, frame, 0.05, None)
    theta, rows, h = to_theta(law, coefficients)[None], np.zeros(1, int), 1e-6
    _, gradient = problem.objective(theta, rows)
    for index in range(theta.shape[1]):
        step = np.eye(theta.shape[1])[index] * h
        low, high = (
            problem.objective(theta - step, rows)[0],
            problem.objective(theta + step, rows)[0],
        )
        assert gradient[0, index] == pytest.approx((high - low)[0] / (2 * h), rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["clark", "bilinear", "sldbench", "hoffmann", "krajewski"])
def test_exact_losses_give_back_their_law(name):
    law = LAWS[name]
    frame = grid(law=name)
    # without the published coefficients among the starts
    blank = type(law)(**{**law.__dict__, "published": {}})
    result = fit(blank, frame)
    assert result.rmse < 1e-6
    assert result.predict(frame) == pytest.approx(frame["loss"].to_numpy(), rel=1e-5)


@pytest.mark.slow
def test_exact_losses_of_the_joint_law_are_found_without_being_told():
    law = LAWS["ludziejewski"]
    blank = type(law)(**{**law.__dict__, "published": {}})
    result = fit(blank, grid(), delta=SQUARES)
    assert result.rmse < 2e-4


@pytest.mark.parametrize("delta", [SQUARES, 1e-3])
def test_the_batched_fit_is_scipys(delta):
    frame = grid(0.01, law="clark")
    fast, plain = fit("clark", frame, delta=delta), plain_fit("clark", frame, delta=delta, starts=6)
    assert fast.objective <= plain.objective * (1 + 1e-9)
    assert fast.objective == pytest.approx(plain.objective, rel=1e-6)
    for name, value in plain.coefficients.items():
        assert fast.coefficients[name] == pytest.approx(value, rel=2e-3)


def unequal_seeds():
    """Runs of 8 ratios, of 3 to 6 seeds each."""
    ratio = np.repeat(DOUBLINGS, [3, 4, 5, 6, 6, 5, 4, 3])
    noise = np.random.default_rng(2).normal(0, 0.01, len(ratio))
    return pl.DataFrame({"ratio": ratio, "loss": 3 - 0.05 * np.minimum(np.log2(ratio), 4) + noise})


@pytest.mark.parametrize("name", ["line", "saturation", "hinge", "plateau"])
def test_a_form_of_the_ratio_is_fitted_as_if_to_each_run(name):
    frame = unequal_seeds().sample(fraction=1, shuffle=True, seed=1)
    found, runs = fit(name, frame), frame.sort("ratio")
    x = np.log2(runs["ratio"].to_numpy())
    each = fit_form(FORMS[name], x, runs["loss"].to_numpy()[None], np.ones(len(x)))
    assert found.rmse == pytest.approx(math.sqrt(each.rss[0] / len(x)), rel=1e-9)
    assert found.predict(runs) == pytest.approx(each.fitted[0], abs=1e-9)
    errors = found.predict(frame) - frame["loss"].to_numpy()
    assert found.rmse == pytest.approx(math.sqrt((errors**2).mean()), rel=1e-9)


@pytest.mark.parametrize("log", [True, False])
def test_least_squares_on_repeated_runs_is_scipys_on_each_run(log):
    frame = unequal_seeds()
    found = fit("power", frame, delta=SQUARES, log=log)
    loss = frame["loss"].to_numpy()
    target = np.log(loss) if log else loss

    def errors(theta):
        predicted = np.exp(theta[0]) + np.exp(theta[1]) * frame["ratio"].to_numpy() ** -theta[2]
        return (np.log(predicted) if log else predicted) - target

    plain = least_squares(errors, [math.log(2.7), math.log(0.3), 0.3], xtol=1e-14, ftol=1e-14)
    assert found.objective == pytest.approx(plain.cost, rel=1e-9)
    square = 2 * plain.cost / len(loss)
    assert found.rmse == pytest.approx(math.sqrt(square), rel=1e-9)
    assert found.aicc == pytest.approx(aicc(square, len(loss), 4), rel=1e-9)
    predicted = errors(plain.x) + target
    assert found.predict(frame) == pytest.approx(np.exp(predicted) if log else predicted, abs=1e-6)


def test_each_bootstrap_draw_is_the_fit_of_its_own_runs():
    frame = grid(0.01, law="clark")
    drawn = bootstrap(fit("clark", frame, delta=SQUARES), 3, seed=3)
    counts = np.random.default_rng(3).multinomial(
        frame.height, np.full(frame.height, 1 / frame.height), 3
    )
    assert drawn.draws is not None
    for row in range(3):
        again = fit(
            "clark",
            frame.with_columns(times=counts[row].astype(float)),
            weight="times",
            delta=SQUARES,
            starts=20,
        )
        assert drawn.draws["objective"][row] == pytest.approx(again.objective, rel=1e-7)
        assert drawn.draws["b"][row] == pytest.approx(again.coefficients["b"], rel=1e-3)


def test_bootstrap_errors_are_those_of_linear_regression():
    """The bilinear law is ordinary least squares on logs, whose standard errors have a formula."""
    frame = grid(0.01, law="bilinear")
    n, e = np.log(frame["active_params"].to_numpy()), np.log(frame["ratio"].to_numpy())
    design = np.stack([np.ones_like(n), n, e, n * e], 1)
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ design))) * 0.01
    for kind in ("runs", "parametric"):
        drawn = bootstrap(fit("bilinear", frame, delta=SQUARES), 400, kind=kind)
        assert drawn.draws is not None
        for name, expected in zip(("const", "lnN", "lnE", "lnE_lnN"), error, strict=True):
            assert float(np.std(drawn.draws[name].to_numpy())) == pytest.approx(expected, rel=0.3)


def test_clustered_runs_widen_the_interval():
    """Every size has its own error, which redrawing single runs does not see."""
    frame = grid(0.002, law="bilinear")
    shifts = {
        size: math.exp(s)
        for size, s in zip(
            sorted(set(frame["active_params"])), (0.01, -0.02, 0.02, -0.01), strict=True
        )
    }
    frame = frame.with_columns(pl.col("loss") * pl.col("active_params").replace_strict(shifts))
    result = fit("bilinear", frame, delta=SQUARES)
    widths = {}
    for kind in ("runs", "cluster"):
        low, high = bootstrap(result, 300, kind=kind, cluster="active_params").interval("lnN")
        widths[kind] = high - low
    assert widths["cluster"] > 2 * widths["runs"]


def test_the_profile_interval_of_an_exponent_is_the_linear_one():
    frame = grid(0.01, law="bilinear")
    result = fit("bilinear", frame, delta=SQUARES)
    low, high = profile_interval(
        profile(result, "lnE", result.coefficients["lnE"] * np.linspace(1.4, 0.6, 61))
    )
    n, e = np.log(frame["active_params"].to_numpy()), np.log(frame["ratio"].to_numpy())
    design = np.stack([np.ones_like(n), n, e, n * e], 1)
    error = math.sqrt(np.linalg.inv(design.T @ design)[2, 2]) * result.rmse
    assert abs(high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_saturation_beyond_the_grid_is_not_reported_and_inside_it_is():
    law = {"a": -0.083, "b": -0.12, "c": 0.01, "d": 1.11, "Estart": 2.0}
    beyond = saturation(
        fit("clark", grid(0.003, law="clark", coefficients={**law, "Emax": 300.0}), delta=SQUARES),
        40,
    )
    assert beyond.value is None
    assert beyond.high > 2 * 128
    assert beyond.sentence.startswith("E_max not identified")
    inside = saturation(
        fit(
            "clark",
            grid(0.0005, seed=1, law="clark", coefficients={**law, "Emax": 20.0}),
            delta=SQUARES,
        ),
        40,
    )
    assert inside.value == pytest.approx(20, rel=0.1)
    assert inside.low < 20 < inside.high


def test_leaving_the_largest_out_shows_a_law_without_a_floor_underestimating():
    """Clark's form has no irreducible loss; on losses that have one it predicts the largest models
    too low.
    """
    held = leave_largest_out(
        fit("bilinear", grid(law="ludziejewski"), delta=SQUARES), "active_params"
    )
    assert held["held_out"].to_list() == [1e8 * 2.5**3]
    assert held["bias"][0] < -0.01
    assert held["rmse"][0] >= abs(held["bias"][0])


def test_forms_of_the_ratio_are_fitted_on_the_loss():
    ratios = 2.0 ** np.arange(9)
    for name, k in {
        "line": {"c": 3.0, "s": 0.03},
        "plateau": {"c": 3.0, "s": 0.03, "t": 32.0},
    }.items():
        frame = pl.DataFrame({"ratio": ratios, "loss": LAWS[name].predict({"ratio": ratios}, k)})
        found = fit(name, frame)
        assert found.coefficients == pytest.approx(k, rel=0.02)
        assert found.predict(frame) == pytest.approx(frame["loss"].to_numpy(), abs=1e-3)
        with refused("law", AnalysisError):
            bootstrap(found)


def test_the_minimiser_solves_many_rosenbrock_valleys_at_once():
    def objective(points, rows):
        return np.array([rosen(p) for p in points]), np.array([rosen_der(p) for p in points])

    def curved(points, rows):
        return *objective(points, rows), np.tile(np.eye(points.shape[1]), (len(points), 1, 1))

    start = np.random.default_rng(0).uniform(-2, 2, (20, 5))
    points, values, done = minimise(objective, curved, start)
    assert done.all()
    assert (values < 1e-12).sum() >= 10, (
        "the rest sit in the known second minimum near (-1, 1, 1, 1, 1)"
    )
    assert np.isclose(values[values > 1e-12], 3.9308, atol=1e-3).all()
    assert points[values < 1e-12] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda f: ("chinchila", f), "law"),
        (
            lambda f: ("clark", f.drop("ratio")),
            "ratio",
        ),
        (lambda f: ("clark", f.drop("loss")), "loss"),
        (
            lambda f: ("clark", f.head(6)),
            "law",
        ),
        (
            lambda f: ("clark", f.with_columns(loss=-pl.col("loss"))),
            "loss",
        ),
        (
            lambda f: ("clark", f.with_columns(ratio=0 * pl.col("ratio"))),
            "ratio",
        ),
    ],
)
def test_bad_input_to_a_fit_is_told_in_one_line(change, field):
    law, frame = change(grid(law="clark"))
    with refused(field, AnalysisError):
        fit(law, frame)


def test_bad_input_to_the_uncertainties_is_told_in_one_line():
    result = fit("bilinear", grid(0.01, law="bilinear"), delta=SQUARES)
    for call, message in (
        (lambda: result.interval("lnE"), "bootstrap draws"),
        (lambda: bootstrap(result, 10, kind="cluster"), "column of the groups"),
        (lambda: bootstrap(result, 10, kind="cluster", cluster="ratio_"), "column of the groups"),
        (lambda: profile(result, "Emax"), "a coefficient of bilinear"),
        (lambda: saturation(result), "saturates in the ratio"),
        (lambda: leave_largest_out(result, "size"), "a column of"),
    ):
        with pytest.raises(AnalysisError, match=message):
            call()
