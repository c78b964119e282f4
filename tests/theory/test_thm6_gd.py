"""Theorem 6 of the paper: descent with the fixed step 1/(2(L1 M + L0)), and with twice that."""

import numpy as np
import pytest
import sympy as sp
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradclip import theory

L0, L1, M, g = sp.symbols("L0 L1 M g", positive=True)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_decrease_while_the_gradient_is_at_most_M(share):
    """h = s/(L0 + L1 M), g ≤ M: hG ≤ s, so h g²(1 - hG/2) ≥ s(2 - s)/2 g²/(L0 + L1 M)."""
    for norm in np.linspace(0.01, 1, 20) * 7.0:
        h = share * float(theory.gd_step(7.0, 2.0, 3.0))
        decrease = h * norm**2 * (1 - h * (2.0 + 3.0 * norm) / 2)
        assert decrease >= share * (2 - share) / 2 * norm**2 / (2.0 + 3.0 * 7.0) * (1 - 2**-50)


def test_constants():
    """s = 1 gives 2; s = 1/2 gives 8/3, which is below the paper's 4."""
    s = sp.Symbol("s", positive=True)
    constant = 1 / (s * (2 - s) / 2)
    assert constant.subs(s, 1) == 2
    assert constant.subs(s, sp.Rational(1, 2)) == sp.Rational(8, 3)
    ours, paper = (
        bound(1.0, 0.1, 7.0, 2.0, 3.0)
        for bound in (theory.gd_iteration_bound, theory.zhang_gd_iteration_bound)
    )
    assert paper == pytest.approx(2 * ours, rel=1e-15)
    assert paper > 8 / 3 * (2.0 + 21.0) / 0.01


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), share=st.floats(0.3, 1.0))
def test_iterates_stay_below_and_counts_stay_below_the_bound(bounded, data, share):
    """M is not known for a random function; the M that its gap allows is, and is at least as large."""
    case = data.draw(st.sampled_from([case for case in bounded if case.L0 > 0]))
    x, value = case.x, case.f(case.x).item()
    gap = value - case.f_star
    assume(gap > 0)
    bound = float(theory.largest_gradient(gap, case.L0, case.L1))
    h = float(theory.gd_step(bound, case.L0, case.L1))
    eps = share * case.gradient(x).norm().item()
    assume(eps > 0)
    limit = float(theory.gd_iteration_bound(gap, eps, bound, case.L0, case.L1))
    assume(limit <= 800)
    t, gradient = 0, case.gradient(x)
    while gradient.norm().item() > eps:
        x = x - h * gradient
        t, gradient, before = t + 1, case.gradient(x), value
        value = case.f(x).item()
        assert gradient.norm().item() <= bound * (1 + 1e-12)
        assert value <= before + case.slack(case.f(case.x))
        assert t < limit
