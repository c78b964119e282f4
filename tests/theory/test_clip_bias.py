"""What noise leaves: the largest |f'(x)| at which a clipped stochastic gradient has mean zero."""

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from gradclip import theory

s, c, x = sp.symbols("s c x", positive=True)


def least_variance(mean, threshold, *, size=4001, reach=12.0):
    """Least variance of Y with E Y = mean and E clip(Y) = 0, by linear programming over values on a grid.

    Independent of the proof: no duality, no two-point ansatz.
    """
    grid = np.concatenate([np.linspace(-reach, reach, size), [-threshold, threshold]])
    constraints = np.vstack([np.ones_like(grid), grid, np.clip(grid, -threshold, threshold)])
    done = linprog((grid - mean) ** 2, A_eq=constraints, b_eq=[1.0, mean, 0.0], method="highs")
    assert done.status == 0
    return done.fun


@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("mean", [0.1, 0.4, 1.0, 1.7])
def test_bias_is_the_worst_over_all_noise(threshold, mean):
    """The least deviation with that bias, by linear programming: the formula must give the bias back."""
    deviation = np.sqrt(least_variance(mean, threshold))
    # The grid has the kinks ± c; between its points the cost is off by 0.006², relative to 4 c x ≥ 0.1.
    assert theory.clip_bias(deviation, threshold) == pytest.approx(mean, rel=4e-4)
    assert theory.clip_bias(deviation, threshold) >= mean - 1e-6


def test_scarf_argument():
    """x ≤ E(Y - c)⁺ ≤ (sqrt(s² + (c - x)²) - (c - x))/2 gives (c + x)² ≤ s² + (c - x)², that is 4 c x ≤ s².

    (y - c)⁺ lies below the parabola (y - c + w)²/(4w), w = sqrt(s² + (c - x)²), whose mean is that bound.
    """
    assert sp.expand((c + x) ** 2 - (c - x) ** 2) == 4 * c * x
    w, d = sp.symbols("w d", positive=True)
    z = sp.Symbol("z", real=True)
    assert sp.expand((z + w) ** 2 / (4 * w) - z - (z - w) ** 2 / (4 * w)) == 0  # above z; above 0 as a square
    # Mean of (Y - c + w)²/(4w), Y - c of mean -d and variance s², at w² = s² + d²:
    mean = (s**2 + (w - d) ** 2) / (4 * w)
    assert sp.simplify(mean.subs(s, sp.sqrt(w**2 - d**2)) - (w - d) / 2) == 0


def test_small_threshold_argument():
    """x ≥ c: (y - x)² ≥ α + β(y - x) + μ clip(y), α = (x + c)², β = 2(x + c), μ c = -2(x + c)²: s ≥ x + c.

    Above c the difference is (y - 2x - c)²; at y = -c it is 0 and its slope to the right is ≥ 0 since x ≥ c.
    """
    y = sp.Symbol("y", real=True)
    alpha, beta, mu = (x + c) ** 2, 2 * (x + c), -2 * (x + c) ** 2 / c
    above = (y - x) ** 2 - (alpha + beta * (y - x) + mu * c)
    assert sp.expand(above - (y - 2 * x - c) ** 2) == 0
    within = (y - x) ** 2 - (alpha + beta * (y - x) + mu * y)
    assert sp.simplify(within.subs(y, -c)) == 0
    assert sp.simplify(sp.diff(within, y).subs(y, -c) - 2 * (x + c) * (x - c) / c) == 0
    assert sp.diff(within, y, 2) == 2  # convex
    below = (y - x) ** 2 - (alpha + beta * (y - x) - mu * c)
    assert sp.simplify(below.subs(y, -c)) == 0
    assert sp.simplify(sp.diff(below, y).subs(y, -c) + 4 * (x + c)) == 0  # and it falls towards -c


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(0.5, 50), st.floats(-3, 3))
def test_two_values_attain_it_for_large_thresholds(ratio, exponent):
    """Noise 2c with probability p, else -2qc, q = p/(1 - p) = s²/(4c²): mean 0, variance s², bias s²/(4c)."""
    deviation = 10.0**exponent
    threshold = ratio * deviation
    q = (deviation / (2 * threshold)) ** 2
    p = q / (1 + q)
    values, weights = np.array([2 * threshold, -2 * q * threshold]), np.array([p, 1 - p])
    bias = float(theory.clip_bias(deviation, threshold))
    assert abs(weights @ values) <= 1e-14 * threshold
    assert weights @ values**2 == pytest.approx(deviation**2, rel=1e-12)
    clipped = np.clip(bias + values, -threshold, threshold)
    assert abs(weights @ clipped) <= 1e-14 * threshold
    assert bias == pytest.approx(deviation**2 / (4 * threshold), rel=1e-14)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0.001, 0.5), st.floats(-3, 3))
def test_a_fair_coin_attains_it_for_small_thresholds(ratio, exponent):
    """Noise ± s: at x = s - c both values are clipped, to ± c."""
    deviation = 10.0**exponent
    threshold = ratio * deviation
    bias = float(theory.clip_bias(deviation, threshold))
    clipped = np.clip(bias + np.array([deviation, -deviation]), -threshold, threshold)
    # -c is met from s - c - s: one rounding of a number of size s.
    assert abs(clipped.mean()) <= 1e-15 * deviation


def test_two_pieces_meet():
    assert theory.clip_bias(2.0, 1.0) == 1.0
    below, above = theory.clip_bias(2.0, np.array([1 - 1e-9, 1 + 1e-9]))
    assert below == pytest.approx(above, abs=3e-9)
    assert theory.clip_bias(1.0, 1e-12) == pytest.approx(1.0, rel=1e-11)  # s as c falls to 0


def test_symmetric_noise_leaves_none():
    """E clip(x + ξ) has the sign of x if ξ and -ξ have the same law and the density reaches the threshold."""
    rng = np.random.default_rng(0)
    noise = rng.standard_t(1.5, size=200_000)
    noise = np.concatenate([noise, -noise])
    for mean in (0.05, 0.5, 2.0):
        for threshold in (0.1, 1.0, 5.0):
            assert np.clip(mean + noise, -threshold, threshold).mean() > 0
            assert np.clip(noise, -threshold, threshold).mean() == pytest.approx(0, abs=1e-12)
