"""`smoothness.fit`, its bootstrap and `recommend`, against scipy, enumeration and simulated runs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.regression.quantile_regression import QuantReg

from gradclip.rules import clip_factor
from gradclip.smoothness import Fit, fit, recommend
from gradclip.smoothness.fit import _envelopes, _quantiles

METHODS = ["ols", "quantile", "envelope"]
every_method = pytest.mark.parametrize("method", METHODS)


def cloud(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    g = np.exp(rng.normal(size=n))
    return g, (0.5 + 2 * g) * np.exp(0.4 * rng.normal(size=n))


def autoregression(rng: np.random.Generator, n: int, phi: float) -> np.ndarray:
    """Stationary Gaussian AR(1) with variance one."""
    noise = rng.normal(size=n)
    x = np.empty(n)
    x[0] = noise[0]
    for t in range(1, n):
        x[t] = phi * x[t - 1] + math.sqrt(1 - phi**2) * noise[t]
    return x


def intercept_of(line: Fit) -> float:
    return line.L0


def slope_of(line: Fit) -> float:
    return line.L1


positive = st.floats(-3.0, 3.0).map(lambda e: 10.0**e)
clouds = st.lists(st.tuples(positive, positive), min_size=8, max_size=14).filter(
    # Nearly equal g make the slope of a line through two points meaningless in float64.
    lambda points: len({round(math.log(g), 2) for g, _ in points}) > 1
)
properties = settings(max_examples=60, deadline=None, derandomize=True)


@every_method
@pytest.mark.parametrize(("L0", "L1"), [(3.0, 2.0), (0.0, 5.0), (7.0, 0.0), (1e-3, 1e3), (1e5, 1e-2)])
def test_points_on_a_line_give_the_line(method, L0, L1):
    g = np.geomspace(0.01, 50.0, 40)
    line = fit(g, L0 + L1 * g, method=method)
    # The points are rounded to 1e-16 of the largest, L0 + 50 L1; spread over the range of g that is an error
    # of that size in L0 and a 50th of it in L1. A hundred times as much is allowed.
    error = 1e-14 * (L0 + 50 * L1)
    assert intercept_of(line) == pytest.approx(L0, abs=error)
    assert slope_of(line) == pytest.approx(L1, abs=error / 50)
    assert line.method == method
    assert line.n == 40


@properties
@given(points=clouds)
def test_least_squares_agrees_with_scipy(points):
    g, s = np.array(points).T
    line = fit(g, s, method="ols")
    expected, residual = scipy.optimize.nnls(np.column_stack((np.ones_like(g), g)), s)
    # Compared by what is minimised and by the fitted heights: the coefficients alone may be ill-conditioned.
    heights = expected[0] + expected[1] * g
    assert np.linalg.norm(s - line.predict(g)) <= residual * (1 + 1e-9) + 1e-12 * s.max()
    assert line.predict(g) == pytest.approx(heights, rel=1e-6, abs=1e-9 * s.max())
    assert min(line.L0, line.L1) >= 0


def pinball(line: Fit, g: np.ndarray, s: np.ndarray, q: float) -> float:
    residual = s - line.predict(g)
    return float(np.maximum(q * residual, (q - 1) * residual).sum())


def smallest_pinball(g: np.ndarray, s: np.ndarray, q: float) -> float:
    """By linear programming: s = L0 + L1 g + u − v, all four non-negative, minimising q Σu + (1 − q) Σv."""
    n = len(g)
    result = scipy.optimize.linprog(
        np.concatenate(([0.0, 0.0], np.full(n, q), np.full(n, 1 - q))),
        A_eq=np.column_stack((np.ones(n), g / g.max(), np.eye(n), -np.eye(n))),
        b_eq=s / s.max(),
        bounds=(0, None),
    )
    assert result.success
    return float(result.fun) * s.max()


@properties
@given(points=clouds, q=st.sampled_from([0.01, 0.3, 0.5, 0.75, 0.95]))
def test_quantile_regression_agrees_with_a_linear_programme(points, q):
    g, s = np.array(points).T
    line = fit(g, s, method="quantile", quantile=q)
    assert min(line.L0, line.L1) >= 0
    # HiGHS accepts constraints violated by 1e-7, on data scaled to at most 1; ours is exact to rounding.
    assert pinball(line, g, s, q) == pytest.approx(smallest_pinball(g, s, q), rel=1e-6, abs=2e-6 * s.max())


@pytest.mark.parametrize("shape", ["free", "through zero", "flat", "constant"])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.95])
def test_quantile_regression_with_and_without_active_constraints(shape, q):
    rng = np.random.default_rng(11)
    for _ in range(10):
        g = np.exp(0.5 * rng.normal(size=50))
        middle = {"free": 1 + 2 * g, "through zero": g**3, "flat": 1 / g, "constant": 0 * g + 1}
        s = middle[shape] * np.exp(0.1 * rng.normal(size=50))
        line = fit(g, s, method="quantile", quantile=q)
        # The same programme with a tighter check of its value than the property above has.
        assert pinball(line, g, s, q) <= smallest_pinball(g, s, q) * (1 + 1e-9)
        if shape == "free":
            assert min(line.L0, line.L1) > 0
        elif shape == "through zero":
            assert line.L0 == 0.0 < line.L1
        elif shape == "flat":
            assert line.L1 == 0.0 < line.L0
            # A flat line is the quantile of s alone.
            expected = np.quantile(s, q, method="inverted_cdf")
            assert intercept_of(line) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore::statsmodels.tools.sm_exceptions.IterationLimitWarning")
def test_quantile_regression_is_that_of_statsmodels_only_exact(q):
    for seed in range(5):
        g, s = cloud(200, seed)
        line = fit(g, s, method="quantile", quantile=q)
        theirs = QuantReg(s, np.column_stack((np.ones_like(g), g))).fit(q, max_iter=2000)
        assert min(theirs.params) > 0  # its fit has no sign constraints
        their_line = dataclasses.replace(line, L0=theirs.params[0], L1=theirs.params[1])
        # It iterates weighted least squares, which stall before the minimum; ours is the vertex itself.
        best = pinball(line, g, s, q)
        assert best <= pinball(their_line, g, s, q) * (1 + 1e-12)
        assert pinball(their_line, g, s, q) <= 1.01 * best


@properties
@given(points=clouds, q=st.floats(0.01, 0.99))
def test_the_quantile_line_has_the_share_of_points_below_it_that_its_name_says(points, q):
    g, s = np.array(points).T
    n = len(g)
    line = fit(g, s, method="quantile", quantile=q)
    height = line.predict(g)
    margin = 1e-12 * s.max()  # of rounding, for the points that the line passes through
    assert (s > height + margin).sum() <= n * (1 - q) + 1e-9
    if line.L0 > 0:
        assert (s > height - margin).sum() >= n * (1 - q) - 1e-9


def test_outliers_move_the_envelope_and_hardly_the_quantile():
    g, s = cloud(200)
    wild = s.copy()
    wild[:4] *= 100
    moved = fit(g, wild, method="quantile", quantile=0.9).predict(1.0)
    assert moved == pytest.approx(fit(g, s, method="quantile", quantile=0.9).predict(1.0), rel=0.15)
    assert fit(g, wild).predict(1.0) > 10 * fit(g, s).predict(1.0)


def test_quantile_regression_of_many_samples_is_that_of_each():
    g, s = cloud(50)
    index = np.random.default_rng(2).integers(50, size=(30, 50))
    together = np.array(_quantiles(g[index], s[index], q=0.9))
    for i, (L0, L1) in zip(index, together.T, strict=True):
        alone = fit(g[i], s[i], method="quantile", quantile=0.9)
        assert (alone.L0, alone.L1) == (L0, L1)


@properties
@given(points=clouds)
def test_the_envelope_is_the_lowest_vertex_found_by_enumeration(points):
    g, s = np.array(points).T
    line = fit(g, s)
    assert min(line.L0, line.L1) >= 0
    assert (s / line.predict(g)).max() == pytest.approx(1.0, abs=1e-14)  # above every point, and touching
    # An optimum of a linear programme lies at a vertex: two of the constraints hold with equality.
    candidates = [(s.max(), 0.0), (0.0, (s / g).max())]
    for i, j in itertools.combinations(range(len(g)), 2):
        if g[i] != g[j]:
            slope = (s[i] - s[j]) / (g[i] - g[j])
            candidates.append((s[i] - slope * g[i], slope))
    heights = [
        L0 + L1 * g.mean()
        for L0, L1 in candidates
        if L0 >= 0 and L1 >= 0 and (L0 + L1 * g >= s * (1 - 1e-9) - 1e-12 * s.max()).all()
    ]
    assert line.predict(g.mean()) == pytest.approx(min(heights), rel=1e-8)


@properties
@given(seed=st.integers(0, 10**6), tilt=st.floats(0.0, 10.0))
def test_no_other_line_above_the_points_is_lower_on_average(seed, tilt):
    g, s = cloud(seed=seed)
    slope = 2.0 * tilt
    intercept = max(0.0, (s - slope * g).max())  # the lowest feasible line with that slope
    line = fit(g, s)
    assert line.predict(g).mean() <= (intercept + slope * g).mean() * (1 + 1e-12)


@every_method
@pytest.mark.parametrize("g_scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("s_scale", [1e-8, 1.0, 1e8])
def test_units_do_not_matter(method, g_scale, s_scale):
    g, s = cloud()
    line, scaled = fit(g, s, method=method), fit(g_scale * g, s_scale * s, method=method)
    # Scaling changes the last bit of each number, which moves sums and the vertex by some roundings.
    assert intercept_of(scaled) == pytest.approx(s_scale * line.L0, rel=1e-10, abs=0)
    assert slope_of(scaled) == pytest.approx(s_scale / g_scale * line.L1, rel=1e-10, abs=0)
    assert scaled.log_slope == pytest.approx(line.log_slope, rel=1e-10)
    assert scaled.log_correlation == pytest.approx(line.log_correlation, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_envelope_covers_sixteen_decades_within_one_cloud(seed):
    rng = np.random.default_rng(seed)
    g = 10.0 ** rng.uniform(-8, 8, 100)
    s = g ** rng.uniform(0.3, 0.7) * np.exp(0.2 * rng.normal(size=100))
    line = fit(g, s)
    assert (s / line.predict(g)).max() == pytest.approx(1.0, abs=1e-14)
    # The same optimum by walking along the upper hull, in double precision throughout.
    (intercept,), (slope,) = _envelopes(g[None], s[None])
    assert intercept_of(line) == pytest.approx(intercept, rel=1e-9, abs=0)
    assert slope_of(line) == pytest.approx(slope, rel=1e-9, abs=0)


def test_the_envelope_keeps_an_intercept_far_below_the_largest_smoothness():
    # 1e-6 is 1e-14 of the largest s, far below the tolerance of a solver on data scaled by it.
    g = np.geomspace(1e-8, 1e8, 60)
    line = fit(g, 1e-6 + g)
    # Where g is far below 1e-6 the points determine the intercept to rounding; a solver in float64 adds some.
    assert intercept_of(line) == pytest.approx(1e-6, rel=1e-9, abs=0)
    assert slope_of(line) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("exponent", "correlation"), [(1.7, 1.0), (-0.5, -1.0), (1.0, 1.0)])
def test_a_power_law_gives_its_exponent(exponent, correlation):
    g = np.geomspace(0.01, 100.0, 30)
    line = fit(g, 3 * g**exponent)
    assert line.log_slope == pytest.approx(exponent, rel=1e-13)
    assert line.log_correlation == pytest.approx(correlation, rel=1e-13)


def test_log_statistics_agree_with_numpy():
    g, s = cloud()
    line = fit(g, s)
    assert line.log_slope == pytest.approx(np.polyfit(np.log(g), np.log(s), 1)[0], rel=1e-10)
    assert line.log_correlation == pytest.approx(np.corrcoef(np.log(g), np.log(s))[0, 1], rel=1e-10)


def test_constant_smoothness_has_no_correlation():
    line = fit(np.linspace(1, 2, 20), np.full(20, 0.3))
    assert intercept_of(line) == pytest.approx(0.3, abs=1e-15)
    assert slope_of(line) == pytest.approx(0.0, abs=1e-15)
    assert line.log_slope == pytest.approx(0.0, abs=1e-15)
    assert math.isnan(line.log_correlation)
    interval = line.interval(resamples=50)
    assert all(map(math.isnan, interval.log_correlation))
    assert max(interval.L1) <= 1e-15


G, S = cloud(12)


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        torch.tensor,
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: [torch.tensor(value, requires_grad=True, dtype=torch.float64) for value in x],
        lambda x: (value for value in x),
        np.array,
    ],
)
def test_any_sequence_of_numbers_is_accepted(convert):
    line = fit(convert(G.tolist()), convert(S.tolist()), method="ols")
    assert line.n == 12
    expected = fit(G, S, method="ols").predict(G)
    assert line.predict(G) == pytest.approx(expected, rel=1e-6)  # the tensors made from lists are float32


def test_predict_returns_what_it_is_given():
    line = Fit(1.0, 2.0, "ols", 1.0, 1.0, 12, G, S)
    assert line.predict(3.0) == 7.0
    assert line.predict([0.0, 1.0]).tolist() == [1.0, 3.0]
    assert line.predict(np.ones((2, 3))).shape == (2, 3)
    tensor = line.predict(torch.tensor([0.5], dtype=torch.float64))
    assert torch.equal(tensor, torch.tensor([2.0], dtype=torch.float64))


def test_a_fit_keeps_its_own_data():
    g, s = cloud()
    line = fit(g, s)
    before = line.interval(resamples=50)
    g[:] = 1.0
    assert line.interval(resamples=50) == before


@every_method
def test_one_block_of_all_points_gives_back_the_estimate(method):
    # A circular block of length n is the run itself, started elsewhere. So all resamples agree, and for the
    # envelope this also compares the hull used in the bootstrap with the linear programme.
    for seed in range(10):
        line = fit(*cloud(seed=seed), method=method)
        interval = line.interval(block=60, resamples=20)
        for name in ("L0", "L1", "log_slope", "log_correlation"):
            # Sums in another order, on top of a solver that reaches its vertex to rounding.
            assert getattr(interval, name) == pytest.approx((getattr(line, name),) * 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("block", [1, 7, 40])
def test_the_bootstrap_agrees_with_a_plain_loop(block):
    g, s = cloud(60)
    starts = np.random.default_rng(5).integers(60, size=(50, -(-60 // block), 1))
    slopes = []
    for row in starts[:, :, 0]:
        index = [(start + k) % 60 for start in row for k in range(block)][:60]
        slopes.append(np.polyfit(np.log(g[index]), np.log(s[index]), 1)[0])
    interval = fit(g, s).interval(0.8, block=block, resamples=50, seed=5)
    assert interval.log_slope == pytest.approx(tuple(np.quantile(slopes, (0.1, 0.9))), rel=1e-10)


def test_a_resampled_envelope_is_never_above_the_full_one_at_its_own_mean():
    g, s = cloud(80)
    line = fit(g, s)
    index = np.random.default_rng(1).integers(80, size=(500, 80))
    L0, L1 = _envelopes(g[index], s[index])
    middle = g[index].mean(axis=1)
    below = (L0 + L1 * middle) / line.predict(middle)
    assert below.max() <= 1 + 1e-12
    assert below.min() < 0.9  # so the percentile interval is one-sided, as its docstring warns


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_block_bootstrap_intervals_cover_the_truth_for_correlated_points(phi):
    rng = np.random.default_rng(7)
    runs, hits, hits_of_single_points = 120, 0, 0
    for _ in range(runs):
        x, e = autoregression(rng, 300, phi), autoregression(rng, 300, phi)
        line = fit(np.exp(x), np.exp(0.7 * x + 0.3 * e), method="ols")
        for block in (None, 1):
            low, high = line.interval(0.9, block=block, resamples=200).log_slope
            if block is None:
                hits += low <= 0.7 <= high
            else:
                hits_of_single_points += low <= 0.7 <= high
    # Nominal 0.9; 120 runs give a standard error of 0.03, and percentile intervals tend to be short.
    assert hits / runs > 0.75
    if phi:
        # The variance of the slope is (1 + φ²)/(1 − φ²) = 4.6 times what independent points would give, so
        # intervals from single points are too short by 2.1 and cover P(|z| < 1.645/2.1) = 0.56.
        assert hits_of_single_points / runs < 0.7


@pytest.mark.parametrize(("phi", "expected"), [(0.0, 28), (0.8, 84)])
def test_the_default_block_follows_its_rule(phi, expected):
    # n = 20000: n^(1/3) = 27.1, and (1.5 n (1.6 / 0.36)²)^(1/3) = 84.0 for ρ = 0.8. The error of ρ is about
    # 0.005, which moves b by 3 %.
    rng = np.random.default_rng(3)
    x, e = autoregression(rng, 20_000, phi), autoregression(rng, 20_000, phi)
    line = fit(np.exp(x), np.exp(0.7 * x + 0.3 * e), method="ols")
    assert line.interval(resamples=1).block == pytest.approx(expected, rel=0.08)


def test_the_default_block_leaves_four_blocks():
    drift = np.cumsum(np.random.default_rng(0).normal(size=100)) / 10
    line = fit(np.exp(np.linspace(0, 1, 100)), np.exp(drift), method="ols")
    assert line.interval(resamples=1).block == 25


@every_method
def test_intervals_are_reproducible_nested_and_leave_the_global_generator_alone(method):
    line = fit(*cloud(), method=method)
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy generator is what must stay untouched
    wide, again, narrow = line.interval(0.95), line.interval(0.95), line.interval(0.5)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert wide == again
    assert wide != line.interval(0.95, seed=1)
    for name in ("L0", "L1", "log_slope", "log_correlation"):
        (outer_low, outer_high), (low, high) = getattr(wide, name), getattr(narrow, name)
        assert outer_low <= low <= high <= outer_high
        assert outer_low < outer_high
    assert (wide.level, wide.resamples) == (0.95, 1000)


def test_long_runs_are_resampled_in_pieces():
    g, s = cloud(4000)
    line = fit(g, s, method="ols")
    interval = line.interval(resamples=600)  # 2.4 million numbers: three pieces
    assert interval.L1[0] < line.L1 < interval.L1[1]
    assert interval.L1[1] - interval.L1[0] < 0.5


@pytest.mark.parametrize(
    ("grad_norms", "smoothness", "method", "message"),
    [
        (G, S, "median", "method must be 'ols', 'quantile' or 'envelope', got 'median'"),
        (G, S[:-1], "ols", "grad_norms and smoothness must have one length, got 12 and 11"),
        (G[:7], S[:7], "ols", "a fit needs at least 8 points, got 7"),
        ([], [], "ols", "a fit needs at least 8 points, got 0"),
        (np.ones(9), np.ones(9), "ols", "grad_norms must not all be equal, got 9 times 1.0"),
        ([*G[:3], -1.0, *G[3:]], S, "ols", r"grad_norms\[3\] must be positive and finite, got -1.0"),
        (G, [0.0, *S[1:]], "envelope", r"smoothness\[0\] must be positive and finite, got 0.0"),
        (G, [*S[:-1], math.inf], "envelope", r"smoothness\[11\] must be positive and finite, got inf"),
        ([math.nan, *G[1:]], S, "envelope", r"grad_norms\[0\] must be positive and finite, got nan"),
        (G.reshape(3, 4), S, "ols", r"grad_norms must have one dimension, got shape \(3, 4\)"),
    ],
)
def test_wrong_data_are_named(grad_norms, smoothness, method, message):
    with pytest.raises(ValueError, match=message):
        fit(grad_norms, smoothness, method=method)


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5, math.nan])
def test_wrong_quantiles_are_named(quantile):
    with pytest.raises(ValueError, match=f"quantile must be between 0 and 1, got {quantile}"):
        fit(G, S, method="quantile", quantile=quantile)


def test_a_fit_knows_its_quantile():
    assert fit(G, S, method="quantile", quantile=0.8).quantile == 0.8
    assert fit(G, S).quantile is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 1.0}, "level must be between 0 and 1, got 1.0"),
        ({"level": math.nan}, "level must be between 0 and 1, got nan"),
        ({"block": 0}, "block must be between 1 and 12, the number of points, got 0"),
        ({"block": 13}, "block must be between 1 and 12, the number of points, got 13"),
        ({"resamples": 0}, "resamples must be at least 1, got 0"),
    ],
)
def test_wrong_interval_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(G, S).interval(**arguments)


@properties
@given(L0=positive, L1=positive, g=positive)
def test_soft_clipping_with_the_recommendation_is_the_best_step_of_the_quadratic_model(L0, L1, g):
    advice = recommend(L0, L1)
    factor = clip_factor(torch.tensor(g, dtype=torch.float64), advice.max_norm, rule="soft").item()
    step = advice.lr * factor
    assert step == pytest.approx(1 / (L0 + L1 * g), rel=1e-14)

    def model(eta):
        return -eta * g**2 + (L0 + L1 * g) * (eta * g) ** 2 / 2

    assert model(step) < min(model(0.9 * step), model(1.1 * step))


@pytest.mark.parametrize("multiple", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("intercept", "rule"), [(4.0, "soft"), (3e-3, "soft"), (3e-4, "normalize")])
def test_a_line_recommends_a_multiple_of_its_step(intercept, rule, multiple):
    # L1 = 2 and g from 1/2: 1e-3 of L1 g is 1e-3 at the least, below which the intercept is left out.
    g = np.arange(1.0, 9.0) / 2
    advice = fit(g, intercept + 2.0 * g, method="envelope").recommend(multiple)
    assert advice.rule == rule
    norms = torch.from_numpy(g)
    lengths = advice.lr * clip_factor(norms, advice.max_norm, rule=advice.rule) * norms
    # 3e-4 is left out of at least 1 + 3e-4; the line itself comes back to the solver's 1e-10.
    rel = 3.1e-4 if rule == "normalize" else 1e-6
    assert lengths.tolist() == pytest.approx((multiple * g / (intercept + 2.0 * g)).tolist(), rel=rel)


def test_without_growth_there_is_nothing_to_clip():
    assert recommend(4.0, 0.0).max_norm == math.inf
    assert recommend(4.0, 0.0).lr == 0.25


@properties
@given(L1=positive, g=positive)
def test_without_an_intercept_every_step_is_equally_long(L1, g):
    advice = recommend(0.0, L1)
    assert advice.rule == "normalize"
    factor = clip_factor(torch.tensor(g, dtype=torch.float64), advice.max_norm, rule=advice.rule).item()
    assert advice.lr * factor * g == pytest.approx(1 / L1, rel=1e-14)  # four roundings
    # The limit of the steps with a small intercept: they are 1/(1 + L0/(L1 g)) times as long.
    near = recommend(1e-9 * L1 * g, L1)
    soft = clip_factor(torch.tensor(g, dtype=torch.float64), near.max_norm, rule=near.rule).item()
    assert near.lr * soft * g == pytest.approx(1 / L1, rel=2e-9)


@pytest.mark.parametrize(
    ("L0", "L1", "message"),
    [
        (-1.0, 1.0, "L0 must be non-negative and finite, got -1.0"),
        (1.0, math.nan, "L1 must be non-negative and finite, got nan"),
        (math.inf, 1.0, "L0 must be non-negative and finite, got inf"),
        (0.0, 0.0, r"must not both be 0, got 0\.0 and 0\.0: the gradient is constant"),
    ],
)
def test_recommendations_that_do_not_exist_are_explained(L0, L1, message):
    with pytest.raises(ValueError, match=message):
        recommend(L0, L1)


def test_a_quantile_line_through_zero_has_no_intercept_of_rounding():
    g = np.geomspace(0.1, 10.0, 40)
    line = fit(g, 15 * g**2.5, method="quantile", quantile=0.95)
    assert line.L0 == 0.0
    assert recommend(line.L0, line.L1).rule == "normalize"


def test_a_fit_is_not_taken_for_a_number():
    with pytest.raises(TypeError, match="L0 must be a number, got Fit"):
        recommend(fit(G, S), 1.0)
