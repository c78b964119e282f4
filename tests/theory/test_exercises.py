"""The key fact behind each solution of the book's exercises that no other test covers."""

import math

import numpy as np
import pytest
from scipy.special import lambertw

from gradclip import theory
from gradclip.experiments import convergence


def test_largest_gradient_for_small_and_large_gaps():
    """sqrt(2 L0 D) for small gaps, L1 D + (L0/L1) ln(L1² D/L0) for large ones."""
    # U = sqrt(2δ)(1 + O(sqrt δ)): at δ = 1e-8 the correction is below 1e-4.
    assert theory.largest_gradient(1e-8, 1.0, 1.0) == pytest.approx(math.sqrt(2e-8), rel=1e-4)
    assert theory.largest_gradient(1e8, 1.0, 1.0) == pytest.approx(1e8 + math.log(1e8), rel=1e-7)
    assert theory.largest_gradient(1e-9, 5.0, 0.1) == pytest.approx(math.sqrt(1e-8), rel=1e-4)


def test_threshold_L0_over_L1_loses_at_most_a_factor_two():
    """2(L0 + L1 c)/ε² at c = L0/L1 over its value at c = ε is 2 L0/(L0 + L1 ε), in [1, 2] for ε ≤ L0/L1."""
    L0, L1 = 3.0, 0.5
    for eps in np.geomspace(1e-4, L0 / L1, 30):
        loss = 2 * (L0 + L1 * L0 / L1) / eps**2 / (theory.iteration_bound(1.0, eps, L0, L1))
        assert loss == pytest.approx(2 * L0 / (L0 + L1 * eps), rel=1e-13)
        assert 1 - 1e-12 <= loss <= 2


def test_quartic_tolerates_longer_steps_than_the_worst_function():
    """1/(2 x²) > 2 ln(1 + M/16)/M at M = 4 x³, for every x: x⁴ is not the worst (16, 1)-smooth function."""
    x = np.geomspace(1e-3, 1e4, 500)
    assert (1 / (2 * x**2) > theory.exact_step_limit_1d(4 * x**3, 16.0, 1.0)).all()
    for start in (0.5, 2.0):
        h = 1 / (2 * start**2)
        for factor, closer in ((0.99, True), (1.01, False)):
            y = start - factor * h * 4 * start**3
            assert (abs(y) < start) == closer


def test_bias_of_exponential_noise():
    """-W(-e^{-c-1}) is where the mean of the clipped sample, computed by quadrature, vanishes."""
    for threshold, rounded in ((1.0, 0.16), (4.0, 0.0068)):
        bias = -lambertw(-math.exp(-threshold - 1)).real
        z, w = np.polynomial.legendre.leggauss(400)
        grid, weights = 20 * (z + 1), 20 * w  # 0 to 40, where e^-40 is 4e-18
        mean = weights @ (np.exp(-grid) * np.minimum(bias + grid - 1, threshold))
        # Quadrature across one kink with 400 points.
        assert mean == pytest.approx(0, abs=2e-4)
        assert bias == pytest.approx(rounded, rel=0.02)
        assert bias < theory.clip_bias(1.0, threshold)


@pytest.mark.parametrize("p", [2.0, 3.0, 6.0, 50.0])
def test_polyak_on_powers_contracts_by_one_factor(p):
    for x in (0.01, 1.0, 30.0):
        following = x - float(theory.polyak_step(x ** (p - 1), x**p / p)) * x ** (p - 1)
        assert following == pytest.approx(x * (1 - 1 / p), rel=1e-12)
    steps = math.ceil(math.log(100) / -math.log((1 - 1 / p) ** p))
    assert steps == (4 if p == 2 else 4 if p == 3 else 5)


def test_count_on_the_slow_function_is_inverse_to_the_step():
    one = np.ones(1)
    counts = [
        convergence.slow_count(lambda g, F, h=h: h * one, 1e4 * one, 0.1 * one, 100)[0] for h in (0.01, 0.02)
    ]
    # Rounded up to whole steps, of which there are 1e8; the last few are on the rounded bottom.
    assert counts[0] / counts[1] == pytest.approx(2, rel=1e-5)
