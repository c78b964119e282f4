"""What a gradient costs: f(x) - f* ≥ Ψ(g) = g/L1 - (L0/L1²) ln(1 + L1 g/L0), and its weaker relatives."""

import math

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradclip import problems, theory

L0, L1, g = sp.symbols("L0 L1 g", positive=True)
u = sp.Symbol("u", positive=True)
PSI = g / L1 - L0 / L1**2 * sp.log(1 + L1 * g / L0)
checked = settings(max_examples=200, deadline=None, derandomize=True)
sizes = st.floats(-6, 6).map(lambda e: 10.0**e)


# The exponential form


def test_exponential_form_is_weaker_than_phi():
    """φ(t) = Σ tᵏ⁺²/(k+2)! ≤ Σ tᵏ⁺²/(2 k!) = eᵗ t²/2, term by term, since (k+2)! ≥ 2 k!."""
    assert all(math.factorial(k + 2) >= 2 * math.factorial(k) for k in range(40))
    t = np.linspace(0, 20, 401)
    assert (theory.phi(t) <= np.exp(t) * t**2 / 2 * (1 + 2**-50)).all()


@checked
@given(sizes, st.floats(0, 8), sizes, sizes)
def test_exponential_bound_is_above_the_phi_bound(norm, length, constant, rate):
    radius = length / rate
    weak, strong = (
        bound(norm, radius, constant, rate) for bound in (theory.exponential_bound, theory.phi_bound)
    )
    # Both are sums of -g r and a term below e⁸ times (L0 + L1 g) r²; a few roundings of these.
    scale = norm * radius + (constant + rate * norm) * radius**2 * math.exp(length)
    assert strong <= weak + 2**-48 * scale


def test_exponential_form_gives_its_gap_bound():
    """At η = ν/(L0 + L1 g) with ν e^ν = 1 the bound is -(ν - ν² e^ν/2) g²/G = -ν g²/(2G), as L1 η g ≤ ν."""
    nu = sp.Symbol("nu", positive=True)
    G = L0 + L1 * g
    bound = -(nu / G) * g**2 + G * sp.exp(nu) * (nu * g / G) ** 2 / 2
    assert sp.simplify((bound + nu * g**2 / (2 * G)).subs(sp.exp(nu), 1 / nu)) == 0
    nu = theory.gap_bound_gorbunov(1.0, 0.5, 0.0)
    assert nu * math.exp(nu) == pytest.approx(1, rel=2**-50)
    for value in np.logspace(-4, 4, 17):
        step = float(nu) / (1 + value)
        guaranteed = -theory.exponential_bound(value, step * value, 1.0, 1.0)
        assert guaranteed >= theory.gap_bound_gorbunov(value, 1.0, 1.0) * (1 - 1e-14)


# Along the gradient flow


def test_psi_has_the_derivative_that_the_flow_needs():
    """Ψ(0) = 0 and Ψ'(g) = g/(L0 + L1 g)."""
    assert PSI.subs(g, 0) == 0
    assert sp.simplify(sp.diff(PSI, g) - g / (L0 + L1 * g)) == 0


def test_gap_minus_psi_never_rises_along_the_gradient_flow(bounded):
    """d/ds (f - Ψ(g)) = -g - Ψ'(g) g' ≤ -g + g = 0 with s the arc length, because g' ≥ -(L0 + L1 g)."""
    ds = 0.01
    for case in bounded[:40]:

        def velocity(x, case=case):
            gradient = case.gradient(x)
            return -gradient / gradient.norm()

        x, before = case.x, None
        for _ in range(50):  # Runge-Kutta of order four
            norm = case.gradient(x).norm().item()
            if norm < 0.1:  # the direction turns fast near a stationary point
                break
            excess = case.f(x).item() - theory.gap_bound(norm, case.L0, case.L1)
            # A step of size ds errs by ds⁵ times derivatives that are below 1e3 here.
            assert before is None or excess <= before + 1e-7 * (1 + abs(before)), case.name
            before = excess
            k1 = velocity(x)
            k2 = velocity(x + ds / 2 * k1)
            k3 = velocity(x + ds / 2 * k2)
            k4 = velocity(x + ds * k3)
            x = x + ds / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def test_flow_of_finite_length_ends_where_the_gradient_vanishes():
    """Equality: on the extremal function the flow from distance ρ is over after length ρ, and f = Ψ(g)."""
    rho = sp.Symbol("rho", positive=True)
    slope = L0 / L1 * (sp.exp(L1 * rho) - 1)
    value = L0 / L1**2 * (sp.exp(L1 * rho) - L1 * rho - 1)
    assert sp.simplify(sp.expand_log(PSI.subs(g, slope) - value, force=True)) == 0


def test_gap_bound_holds_on_random_functions(bounded):
    """f(x) - f* ≥ Ψ(g) at random points of random functions."""
    rng = np.random.default_rng(11)
    for case in bounded:
        x = case.x + torch.from_numpy(rng.normal(size=(20, case.x.numel())))
        norms = case.gradient(x).norm(dim=-1).numpy()
        gap = case.f(x).numpy() - case.f_star
        excess = theory.gap_bound(norms, case.L0, case.L1) - gap
        assert excess.max() <= case.slack(case.f(x)), case.name
    assert len(bounded) >= 60


@pytest.mark.parametrize("dim", [1, 3])
def test_gap_bound_is_attained_by_the_extremal_function(dim):
    problem = problems.extremal(L0=0.7, L1=1.3, dim=dim)
    x = torch.linspace(1e-3, 6, 50, dtype=torch.float64)[:, None] * torch.ones(dim, dtype=torch.float64)
    bound = theory.gap_bound(problem.gradient(x).norm(dim=-1).numpy(), 0.7, 1.3)
    # ln(1 + u) amplifies the rounding of g by at most 2 in relative terms; φ by its argument, below 12.
    np.testing.assert_allclose(problem.f(x).numpy(), bound, rtol=1e-13)


def test_gap_bound_is_between_the_quadratic_one_and_twice_that():
    """u - ln(1+u) - u²/(2(1+u)) has the derivative u²/(2(1+u)²), u²/(1+u) - u + ln(1+u) has u/(1+u)²."""
    low = u - sp.log(1 + u) - u**2 / (2 * (1 + u))
    high = u**2 / (1 + u) - (u - sp.log(1 + u))
    assert low.subs(u, 0) == high.subs(u, 0) == 0
    assert sp.simplify(sp.diff(low, u) - u**2 / (2 * (1 + u) ** 2)) == 0
    assert sp.simplify(sp.diff(high, u) - u / (1 + u) ** 2) == 0


@checked
@given(sizes, sizes, sizes)
def test_order_of_the_gap_bounds(norm, constant, rate):
    """Li and Gorbunov below the quadratic bound, that below Ψ, and Ψ at most twice the quadratic bound."""
    sharp = theory.gap_bound(norm, constant, rate)
    quadratic = theory.gap_bound_quadratic(norm, constant, rate)
    assert theory.gap_bound_li(norm, constant, rate) <= quadratic
    assert theory.gap_bound_gorbunov(norm, constant, rate) <= quadratic
    # Relative: each is a few roundings of a positive number.
    assert quadratic <= sharp * (1 + 2**-48)
    assert sharp <= 2 * quadratic * (1 + 2**-48)


# The largest gradient that a gap allows


@checked
@given(sizes, sizes, sizes)
def test_largest_gradient_inverts_the_gap_bound(gap, constant, rate):
    """Against Lambert's W in 60 digits: 1 + u = -W₋₁(-e^{-1-δ}), δ = L1² D/L0."""
    with mpmath.workdps(60):
        delta = mpmath.mpf(rate) ** 2 * mpmath.mpf(gap) / mpmath.mpf(constant)
        # Above, e^{-1-δ} has an exponent that mpmath handles, but W needs too many steps.
        assume(1e-9 < delta < 1e4)
        exact = float(constant / mpmath.mpf(rate) * (-mpmath.lambertw(-mpmath.exp(-1 - delta), -1).real - 1))
    # Near δ = 0, u = sqrt(2δ) and the rounding of δ is halved; a few units beyond that.
    assert theory.largest_gradient(gap, constant, rate) == pytest.approx(exact, rel=1e-12)


@checked
@given(sizes, sizes, sizes)
def test_largest_gradient_solves_the_reconciliation_equation(gap, constant, rate):
    """M = L1 D + (L0/L1) ln(1 + L1 M/L0), and M is at most L0/L1 times δ + sqrt(δ² + 2δ)."""
    M = theory.largest_gradient(gap, constant, rate)
    delta = rate**2 * gap / constant
    assert theory.gap_bound(M, constant, rate) == pytest.approx(gap, rel=1e-11)
    assert rate * M / constant <= (delta + math.sqrt(delta**2 + 2 * delta)) * (1 + 1e-12)


def test_largest_gradient_has_its_limits():
    assert theory.largest_gradient(0.0, 1.0, 2.0) == 0.0
    assert theory.largest_gradient(8.0, 1.0, 0.0) == 4.0  # sqrt(2 L0 D)
    assert theory.largest_gradient(8.0, 1.0, 1e-7) == pytest.approx(4.0, rel=1e-6)
    assert theory.gap_bound(3.0, 0.0, 2.0) == 1.5
    assert theory.gap_bound(3.0, 2.0, 0.0) == 2.25
    assert theory.gap_bound(0.0, 0.0, 0.0) == 0.0
