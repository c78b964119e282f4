"""How much faster: the quotient of the worst counts of the best fixed step and of the step 1/(L0 + L1 g)."""

import numpy as np
import pytest
import sympy as sp
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradclip import theory

sizes = st.floats(-3, 3).map(lambda e: 10.0**e)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, st.floats(0.001, 0.3))
def test_gain_is_the_quotient_of_the_four_bounds(gap, L0, L1, share):
    M = float(theory.largest_gradient(gap, L0, L1))
    eps = share * min(M, L0 / L1)
    assume(gap > 15 / 16 * eps**2 / L0)
    low, high = theory.gain_bounds(gap, eps, L0, L1)
    adaptive = theory.iteration_bound(gap, eps, L0, L1)
    adaptive_least = theory.iteration_lower_bound(theory.quadratic_step(eps, L0, L1), gap, eps, L0)
    fixed = theory.gd_iteration_bound(gap, eps, M, L0, L1)
    fixed_least = theory.gd_iteration_lower_bound(gap, eps, M, L0, L1)
    # M solves its equation to 12 digits.
    assert low == pytest.approx(fixed_least / adaptive, rel=1e-10)
    assert high == pytest.approx(fixed / adaptive_least, rel=1e-10)
    assert low < high


def test_gain_has_no_bound_over_the_gap_and_is_bounded_for_each():
    """Both ends grow without bound with δ = L1² D/L0; the upper one is ≤ 2(1 + δ + sqrt(δ² + 2δ))/κ."""
    delta = np.logspace(0, 12, 25)
    low, high = theory.gain_bounds(delta, 0.01, 1.0, 1.0)
    assert (np.diff(low) > 0).all()
    assert low[-1] > 1e9
    kappa = 1 - 15 / 16 * 1e-4 / delta
    assert (high <= 2 * (1 + delta + np.sqrt(delta * (delta + 2))) / kappa).all()


def test_largest_gradient_grows_like_the_gap():
    """u - ln(1+u) = δ: u/δ → 1 as δ → ∞, and u ≥ δ always."""
    u = sp.Symbol("u", positive=True)
    assert sp.limit(u / (u - sp.log(1 + u)), u, sp.oo) == 1
    delta = np.logspace(-6, 12, 37)
    values = theory.largest_gradient(delta, 1.0, 1.0)
    assert (values >= delta).all()


def test_a_rule_that_is_safe_cannot_step_further_than_two_over_L0():
    """2 ln(1 + u)/(L1 ε) ≤ 2/L0 at every ε: so every safe rule needs L0 (D - (15/16) ε²/L0)/(2 ε²) steps."""
    eps = np.logspace(-6, 6, 61)
    assert (theory.exact_step_limit_1d(eps, 2.0, 3.0) <= 2 / 2.0 * (1 + 2**-50)).all()
    least = theory.iteration_lower_bound(1.0, 100.0, 0.1, 2.0)
    assert theory.iteration_bound(100.0, 0.1, 2.0, 3.0) < 5 * least  # 4 (1 + L1 ε/L0), and the term in ε²
