"""Theorem 4 of the paper: no fixed step is fast on the whole class. Two functions stand for the class."""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import problems, theory

checked = settings(max_examples=100, deadline=None, derandomize=True)
small = st.floats(-1, 1).map(lambda e: 10.0**e)


# Long steps diverge


def test_relative_slope_of_the_extremal_function_increases():
    """F'(x)/x = (L0/(L1 x))(e^{L1 x} - 1): with t = L1 x the derivative of (e^t - 1)/t has the sign of
    t e^t - e^t + 1, which vanishes at 0 and increases.
    """
    t = sp.Symbol("t", positive=True)
    numerator = sp.simplify(sp.diff((sp.exp(t) - 1) / t, t) * t**2)
    assert sp.simplify(numerator - (t * sp.exp(t) - sp.exp(t) + 1)) == 0
    assert numerator.subs(t, 0) == 0
    assert sp.simplify(sp.diff(numerator, t) - t * sp.exp(t)) == 0


@checked
@given(small, small, st.floats(0.1, 8), st.floats(1, 3))
def test_steps_from_the_limit_on_never_reach_a_smaller_gradient(L0, L1, t, factor):
    """x⁺ = x (1 - h F'(x)/x): for h ≥ h_c the bracket is ≤ -1 now and ever after, |x| never falls."""
    x = start = t / L1
    M = L0 / L1 * math.expm1(t)
    h = factor * 2 * float(theory.exact_step_1d(M, L0, L1))
    assert h * M / start >= 2 * (1 - 1e-14)
    for _ in range(3):
        if L1 * abs(x) > 600:
            break
        following = x - h * math.copysign(L0 / L1 * math.expm1(L1 * abs(x)), x)
        # At h = h_c exactly the iterates alternate between ± x₀; rounding grows by the slope of the map.
        assert abs(following) >= abs(x) * (1 - 1e-11)
        x = following


def test_limit_is_sharp():
    """0.999 of the limit converges, 1.001 of it leaves every interval."""
    problem = problems.extremal(L0=1.0, L1=2.0)
    M = 200.0
    limit = 2 * float(theory.exact_step_1d(M, 1.0, 2.0))
    for factor, converges in ((0.999, True), (1.001, False)):
        x = torch.tensor([math.log1p(2 * M) / 2], dtype=torch.float64)
        for _ in range(4_000):
            gradient = problem.gradient(x)
            if gradient.abs().item() < 1e-3 or not x.abs().item() < 50:
                break
            x = x - factor * limit * gradient
        assert (gradient.abs().item() < 1e-3) == converges


def test_extremal_function_is_in_the_class_with_its_gap():
    """Its gap at gradient M is Ψ(M), the least that any function of the class can have."""
    for L0, L1, M in [(1.0, 1.0, 50.0), (0.2, 3.0, 5.0), (4.0, 0.5, 1e4)]:
        problem = problems.extremal(L0=L0, L1=L1)
        x = torch.tensor([math.log1p(L1 * M / L0) / L1], dtype=torch.float64)
        assert problem.gradient(x).item() == pytest.approx(M, rel=1e-12)
        assert problem.f(x).item() == pytest.approx(theory.gap_bound(M, L0, L1), rel=1e-12)


def test_recalled_hard_function_as_printed_is_refuted_unless_L0_is_at_least_L1():
    """L1 x²/2 + 1/(2 L1) inside |x| ≤ 1/L1 has f'(0) = 0 and f''(0) = L1: the condition needs L0 ≥ L1."""
    x, L1 = sp.symbols("x L1", positive=True)
    inside = L1 * x**2 / 2 + 1 / (2 * L1)
    outside = sp.exp(L1 * x) / (L1 * sp.E)
    joint = 1 / L1
    for order in range(3):  # it is twice continuously differentiable
        assert sp.simplify((sp.diff(inside, x, order) - sp.diff(outside, x, order)).subs(x, joint)) == 0
    assert sp.diff(inside, x).subs(x, 0) == 0
    assert sp.diff(inside, x, 2) == L1
    # With L0 ≥ L1 it is in the class: outside f'' = L1 f', inside f'' = L1 ≤ L0.
    assert sp.simplify(sp.diff(outside, x, 2) - L1 * sp.diff(outside, x)) == 0


# Short steps are slow


@checked
@given(small, st.floats(1.0001, 3), small)
def test_slow_function_is_in_the_class_and_has_the_stated_gap(L0, ratio, eps):
    """ramp(σ, L0): ‖f''‖ ≤ L0, ‖f'‖ ≤ σ, and f = σ(x - a) + (5/8)σa beyond a = 3σ/(2 L0)."""
    slope = ratio * eps
    problem = problems.ramp(slope, L0)
    a = 1.5 * slope / L0
    x = torch.linspace(-3 * a, 3 * a, 601, dtype=torch.float64)[:, None]
    assert problem.hessian_norm(x).max().item() <= L0 * (1 + 2**-50)
    assert problem.gradient(x).abs().max().item() <= slope * (1 + 2**-50)
    far = torch.tensor([5 * a], dtype=torch.float64)
    assert problem.f(far).item() == pytest.approx(slope * 4 * a + 5 / 8 * slope * a, rel=1e-14)
    assert 5 / 8 * slope * a == pytest.approx(15 / 16 * slope**2 / L0, rel=1e-14)


def test_gap_of_the_rounded_bottom():
    """∫₀¹ (3z - z³)/2 dz = 5/8, and the steepest part of its slope is 3/2 at z = 0."""
    z = sp.Symbol("z")
    s = (3 * z - z**3) / 2
    assert sp.integrate(s, (z, 0, 1)) == sp.Rational(5, 8)
    assert s.subs(z, 1) == 1
    assert sp.diff(s, z).subs(z, 1) == 0
    assert sp.diff(s, z).subs(z, 0) == sp.Rational(3, 2)


@checked
@given(small, st.floats(1.001, 1.5), small, st.floats(3, 200), st.floats(0.01, 1))
def test_slow_function_takes_the_stated_number_of_steps(L0, ratio, eps, size, share):
    """Run it: at least (D - (15/16)σ²/L0)/(h σ²) steps, whatever the start."""
    slope, h = ratio * eps, share / L0
    D = 15 / 16 * slope**2 / L0 * (1 + size)
    problem = problems.ramp(slope, L0)
    a = 1.5 * slope / L0
    x = torch.tensor([a + (D - 5 / 8 * slope * a) / slope], dtype=torch.float64)
    assert problem.f(x).item() == pytest.approx(D, rel=1e-13)
    bound = (D - 15 / 16 * slope**2 / L0) / (h * slope**2)
    if bound > 1000:
        return
    t = 0
    while problem.gradient(x).abs().item() > eps:
        x = x - h * problem.gradient(x)
        t += 1
    # t steps of length at most h σ cover the distance to a; one rounding per step.
    assert t >= bound * (1 - 1e-12)


# Together


def worst_of_both(L0, L1, M, eps, D, h, limit=200_000):
    """The larger count of the two hard functions, inf if the extremal one is not done in time."""
    x = math.log1p(L1 * M / L0) / L1
    t = 0
    while L0 / L1 * math.expm1(L1 * abs(x)) > eps:
        x -= h * math.copysign(L0 / L1 * math.expm1(L1 * abs(x)), x)
        t += 1
        if t == limit or L1 * abs(x) > 600:
            return math.inf
    sigma = eps * (1 + 1e-9)
    a = 1.5 * sigma / L0
    return max(t, (D - 5 / 8 * sigma * a) / (h * sigma**2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small, small, st.floats(1, 6), st.floats(0.05, 0.9), st.floats(0.02, 1.3))
def test_no_fixed_step_beats_the_lower_bound(L0, L1, t, share, factor):
    M = L0 / L1 * math.expm1(t)
    eps = share * min(M, L0 / L1)
    D = max(float(theory.gap_bound(M, L0, L1)), 2 * eps**2 / L0)
    bound = float(theory.gd_iteration_lower_bound(D, eps, M, L0, L1))
    h = factor * 2 * float(theory.exact_step_1d(M, L0, L1))
    # σ = (1 + 1e-9) ε costs 2e-9 of the count, a little more when D is close to its limit.
    assert worst_of_both(L0, L1, M, eps, D, h, limit=2000) >= bound * (1 - 1e-7)


def test_bound_is_nearly_attained_by_the_best_step():
    """A fixed step a little below the limit needs a little more than the bound on these two functions."""
    L0 = L1 = 1.0
    M, eps = 1000.0, 0.05
    D = float(theory.gap_bound(M, L0, L1))
    limit = 2 * float(theory.exact_step_1d(M, L0, L1))
    best = min(worst_of_both(L0, L1, M, eps, D, f * limit) for f in (0.9, 0.95, 0.98, 0.99, 0.995))
    assert 1 < best / theory.gd_iteration_lower_bound(D, eps, M, L0, L1) < 1.02


@checked
@given(small, small, small)
def test_lower_bound_contains_the_one_of_lipschitz_gradients(L0, L1, M):
    """L1 M/ln(1 + u) = L0 u/ln(1 + u) ≥ L0: the second term of the paper's remark is in it."""
    assert L1 * M / math.log1p(L1 * M / L0) >= L0 * (1 - 2**-50)
    assert theory.gd_iteration_lower_bound(100.0, 0.1, M, L0, 0.0) == pytest.approx(
        L0 * (100.0 - 15 / 16 * 0.01 / L0) / 0.02, rel=1e-13
    )


def test_upper_and_lower_bound_differ_by_a_logarithm():
    """2(1 + u) over u/(2 ln(1 + u)): four times (1 + u) ln(1 + u)/u, up to the small term in ε."""
    u = np.logspace(-2, 6, 33)
    ratio = theory.gd_iteration_bound(1e9, 1.0, u, 1.0, 1.0) / theory.gd_iteration_lower_bound(
        1e9, 1.0, u, 1.0, 1.0
    )
    # The lower bound has D - 15/16 in place of D = 1e9.
    np.testing.assert_allclose(ratio, 4 * (1 + u) * np.log1p(u) / u, rtol=2e-9)


def test_units_of_the_recalled_bound_are_refuted_by_a_change_of_scale():
    """f = α F and x = λ y change the unit of M and with it ln M + 1; the bound for all L0 stays."""
    D, eps, M, L0, L1 = 100.0, 0.1, 50.0, 2.0, 1.5
    for alpha, lam in ((10.0, 1.0), (1.0, 10.0), (5.0, 2.0)):
        scaled = (alpha * D, alpha * lam * eps, alpha * lam * M, alpha * lam**2 * L0, lam * L1)
        ours = theory.gd_iteration_lower_bound(*scaled)
        assert ours == pytest.approx(theory.gd_iteration_lower_bound(D, eps, M, L0, L1), rel=1e-13)
        printed = theory.zhang_gd_iteration_lower_bound(*scaled)
        assert abs(printed / theory.zhang_gd_iteration_lower_bound(D, eps, M, L0, L1) - 1) > 0.05


@pytest.mark.parametrize("M", [10.0, 100.0, 1e4])
def test_bound_is_larger_than_the_recalled_one(M):
    """Where both apply (L0 ≥ L1 ≥ 1, say L0 = L1 = 1), 1/2 and ln(1 + M) against 1/8 and ln M + 1."""
    D, eps = float(theory.gap_bound(M, 1.0, 1.0)), 0.05
    ours = theory.gd_iteration_lower_bound(D, eps, M, 1.0, 1.0)
    assert ours > 4 * theory.zhang_gd_iteration_lower_bound(D, eps, M, 1.0, 1.0)


def test_half_the_limit_has_the_order_of_the_lower_bound_on_a_line():
    """h = h_c/2 ≤ ln(1 + u)/(L1 g) for g ≤ M, and up to there the worst decrease is concave in the step.

    So it is at least the share h L1 g/ln(1 + u) of Ψ(g), that is h (L0/L1) g (u/ln(1 + u) - 1), which grows.
    """
    M, L0, L1 = 1000.0, 1.0, 1.0
    h = float(theory.exact_step_1d(M, L0, L1))
    norms = np.geomspace(1e-3, M, 400)
    share = h * norms * (norms / np.log1p(norms) - 1)
    assert (np.diff(share) > 0).all()
    # Both are differences of numbers that agree to u², down to 1e-6.
    assert (-theory.exact_bound_1d(norms, h * norms, L0, L1) >= share * (1 - 1e-9)).all()
    eps, D = 1e-3, float(theory.gap_bound(M, L0, L1))
    upper = D / (h * eps * (eps / math.log1p(eps) - 1))
    # Relative size of the terms left out: ε.
    assert upper / theory.gd_iteration_lower_bound(D, eps, M, L0, L1) == pytest.approx(4, rel=2e-3)
