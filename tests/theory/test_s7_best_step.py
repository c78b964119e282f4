"""Statement S7, "η = 1/(L0 + L1 g) is about the best": best for the parabola, and how good for the sharper
bounds.
"""

import math
from itertools import pairwise

import numpy as np
import sympy as sp

from gradclip import theory

L0, L1, g, eta, c, u = sp.symbols("L0 L1 g eta c u", positive=True)
SHARE = np.linspace(0, 1, 1001)[1:]  # c = L1 g/(L0 + L1 g); with g = L1 = 1: L0 = (1 - c)/c
CONSTANT = (1 - SHARE) / SHARE


def test_step_minimises_the_parabola():
    """d/dη(-η g² + (L0 + L1 g) η² g²/2) = 0 at η = 1/(L0 + L1 g), where the value is -g²/(2(L0 + L1 g))."""
    parabola = -eta * g**2 + (L0 + L1 * g) * eta**2 * g**2 / 2
    (best,) = sp.solve(sp.diff(parabola, eta), eta)
    assert sp.simplify(best - 1 / (L0 + L1 * g)) == 0
    assert sp.simplify(parabola.subs(eta, best) + g**2 / (2 * (L0 + L1 * g))) == 0
    assert float(best.subs({L0: 2, L1: 3, g: 5})) == theory.quadratic_step(5.0, 2.0, 3.0)


def test_step_guarantees_its_decrease(instances):
    """f(x) - f(x - ηg) ≥ g²/(2(L0 + L1 g)) in every dimension, under the Hessian form."""
    for case in instances:
        gradient = case.gradient(case.x)
        norm = gradient.norm().item()
        step = theory.quadratic_step(norm, case.L0, case.L1).item()
        fx, fy = case.f(case.x), case.f(case.x - step * gradient)
        promised = norm**2 / (2 * (case.L0 + case.L1 * norm))
        assert (fx - fy).item() >= promised - case.slack(fx, fy, gradient), case.name


def test_phi_step_minimises_the_phi_bound():
    """In units G/L1²: -cτ + e^τ - τ - 1 is convex with its minimum at τ = ln(1 + c), of value c - (1 + c)
    ln(1 + c).
    """
    tau = sp.Symbol("tau", positive=True)
    bound = -c * tau + sp.exp(tau) - tau - 1
    assert sp.solve(sp.diff(bound, tau), tau) == [sp.log(c + 1)]
    assert sp.diff(bound, tau, 2) == sp.exp(tau)
    assert sp.simplify(bound.subs(tau, sp.log(1 + c)) - c + (1 + c) * sp.log(1 + c)) == 0
    np.testing.assert_allclose(theory.phi_step(1.0, CONSTANT, 1.0), np.log1p(SHARE), rtol=1e-14)


def test_step_is_longer_than_the_phi_step_by_at_most_one_over_ln_2():
    """c/ln(1+c) runs from 1 (c → 0) up to 1/ln 2 (c = 1), increasing because ln(1+c) > c/(1+c)."""
    ratio = c / sp.log(1 + c)
    assert sp.limit(ratio, c, 0) == 1
    assert sp.simplify(ratio.subs(c, 1) - 1 / sp.log(2)) == 0
    assert sp.simplify(sp.diff(ratio, c) * sp.log(1 + c) ** 2 - (sp.log(1 + c) - c / (1 + c))) == 0
    computed = theory.quadratic_step(1.0, CONSTANT, 1.0) / theory.phi_step(1.0, CONSTANT, 1.0)
    assert computed.min() >= 1 - 2**-50
    assert computed.max() <= 1 / math.log(2) + 2**-50


def test_step_keeps_most_of_the_decrease_that_phi_guarantees():
    """Under φ alone it keeps (c² + c + 1 - e^c)/((1+c) ln(1+c) - c) of the best, from 1 down to (3 - e)/(2
    ln 2 - 1).
    """
    best = theory.phi_bound(1.0, theory.phi_step(1.0, CONSTANT, 1.0), CONSTANT, 1.0)
    kept = theory.phi_bound(1.0, theory.quadratic_step(1.0, CONSTANT, 1.0), CONSTANT, 1.0) / best
    worst = (3 - math.e) / (2 * math.log(2) - 1)
    # Both bounds are differences of numbers 1/c times larger: c ≥ 1e-3, so 1e-12 covers the rounding.
    assert (np.diff(kept) < 1e-12).all()
    assert abs(kept[-1] - worst) <= 1e-12
    assert kept.max() <= 1 + 1e-12


def test_phi_fraction_is_proved_by_the_sign_of_a_third_derivative():
    """P(c) = decrease - ρ·best, ρ = (3 - e)/(2 ln 2 - 1): P(0) = P(1) = P′(0) = 0, P″(0) > 0, P‴ < 0, so
    P ≥ 0.

    P′ is concave from P′(0) = 0, hence first positive, then negative, and P rises from 0 and falls back to 0.
    """
    rho = (3 - sp.E) / (2 * sp.log(2) - 1)
    P = c**2 - sp.exp(c) + c + 1 - rho * ((1 + c) * sp.log(1 + c) - c)
    assert P.subs(c, 0) == 0
    assert sp.simplify(P.subs(c, 1)) == 0
    assert sp.diff(P, c).subs(c, 0) == 0
    assert sp.simplify(sp.diff(P, c, 2).subs(c, 0) - (1 - rho)) == 0
    # P‴ ≤ -1 + ρ on [0, 1], because e^c ≥ 1 and ρ/(1+c)² ≤ ρ.
    assert sp.simplify(sp.diff(P, c, 3) + sp.exp(c) - rho / (1 + c) ** 2) == 0
    assert 0 < rho < 1
    # P is what it says it is, in units of G/L1², which is 1/c for g = L1 = 1.
    own = theory.phi_bound(1.0, theory.quadratic_step(1.0, CONSTANT, 1.0), CONSTANT, 1.0)
    best = theory.phi_bound(1.0, theory.phi_step(1.0, CONSTANT, 1.0), CONSTANT, 1.0)
    values = sp.lambdify(c, P)(SHARE)
    # P is a sum of terms up to e, each exact to 2⁻⁵²; own and best, times c, likewise.
    np.testing.assert_allclose(SHARE * (float(rho) * best - own), values, rtol=0, atol=1e-14)
    assert values.min() >= -1e-14


def test_order_of_the_steps():
    """clipped ≤ simplified ≤ φ-optimal ≤ S7; clipped ≥ 1/2 of simplified, simplified ≥ 2/(3 ln 2) of
    φ-optimal.
    """
    steps = [
        step(1.0, CONSTANT, 1.0)
        for step in (theory.clipped_step, theory.simplified_step, theory.phi_step, theory.quadratic_step)
    ]
    for shorter, longer in pairwise(steps):
        assert (shorter <= longer * (1 + 2**-50)).all()
    assert (steps[0] >= steps[1] / 2 * (1 - 2**-50)).all()
    assert (steps[1] / steps[2] >= 2 / (3 * math.log(2)) - 2**-50).all()
    # ln(1+c) ≥ 2c/(2+c): the derivative of the difference is c²/((1+c)(2+c)²).
    gap = sp.log(1 + c) - 2 * c / (2 + c)
    assert sp.simplify(sp.diff(gap, c) - c**2 / ((1 + c) * (2 + c) ** 2)) == 0
    assert (
        sp.simplify(2 / (2 + L1 * g / (L0 + L1 * g)) / (L0 + L1 * g) - 1 / (L0 + sp.Rational(3, 2) * L1 * g))
        == 0
    )
    # The ratio falls to its value at c = 1: its derivative has the sign of 2 ln x - (x - 1/x), x = 1 + c,
    # which vanishes at x = 1 and falls.
    ratio = 2 * c / ((2 + c) * sp.log(1 + c))
    sign = 2 * sp.log(1 + c) - (1 + c - 1 / (1 + c))
    positive = 2 / ((2 + c) ** 2 * sp.log(1 + c) ** 2)
    assert sp.simplify(sp.diff(ratio, c) - positive * sign) == 0
    assert sign.subs(c, 0) == 0
    assert sp.simplify(sp.diff(sign, c) + c**2 / (1 + c) ** 2) == 0
    assert sp.simplify(ratio.subs(c, 1) - 2 / (3 * sp.log(2))) == 0


def test_simplified_step_guarantees_half_of_its_first_order_decrease():
    """φ(τ) ≤ τ²/(2 - τ) on [0, 2/3]: the series are Σ τᵏ/(k+2)! against Σ (τ/2)ᵏ/2, term by term 2/(k+2)! ≤
    2⁻ᵏ.
    """
    assert all(2 / math.factorial(k + 2) <= 2.0**-k for k in range(20))
    simplified = theory.simplified_step(1.0, CONSTANT, 1.0)
    assert (theory.phi_bound(1.0, simplified, CONSTANT, 1.0) <= -simplified / 2 + 2**-50).all()


def test_best_as_printed_is_refuted_in_one_dimension():
    """The minimax step there is ln(1+u)/(L1 g), longer by (1+u)ln(1+u)/u, without bound; it guarantees
    strictly more.
    """
    ratio = (1 + u) * sp.log(1 + u) / u
    assert sp.limit(ratio, u, 0) == 1
    assert sp.limit(ratio, u, sp.oo) == sp.oo
    for value in np.logspace(-2, 4, 25):
        own = theory.exact_bound_1d(value, theory.quadratic_step(value, 1.0, 1.0) * value, 1.0, 1.0)
        best = theory.exact_bound_1d(value, theory.exact_step_1d(value, 1.0, 1.0) * value, 1.0, 1.0)
        assert best < own < 0


def test_step_keeps_at_least_1_minus_1_over_e_in_one_dimension():
    """About the best: it keeps ((1+u)(1 - e^{-u/(1+u)}) - u/(1+u))/(u - ln(1+u)) of the minimax decrease,
    in [1 - 1/e, 1].
    """
    values = np.logspace(-2, 8, 401)
    own = theory.exact_bound_1d(values, theory.quadratic_step(values, 1.0, 1.0) * values, 1.0, 1.0)
    best = theory.exact_bound_1d(values, theory.exact_step_1d(values, 1.0, 1.0) * values, 1.0, 1.0)
    kept = own / best
    # u - ln(1+u) ≥ 5e-5 in units where the roundings are 2⁻⁵²: 1e-11 relative.
    assert kept.min() >= 1 - 1 / math.e
    assert kept.max() <= 1 + 1e-11
    formula = ((1 + u) * (1 - sp.exp(-u / (1 + u))) - u / (1 + u)) / (u - sp.log(1 + u))
    assert sp.simplify(sp.limit(formula, u, sp.oo) - (1 - sp.exp(-1))) == 0


def test_one_dimensional_fraction_is_proved_by_the_sign_of_a_second_derivative():
    """N(z) = (decrease - ρ·best)·z, z = 1/(1+u), ρ = 1 - 1/e: N(0) = N(1) = N′(1) = 0, N′(0+) = ∞, N″ is
    first < 0, then > 0.

    So N′ falls from +∞ below 0 and rises to 0, N rises from 0 and falls back to 0, and N ≥ 0.
    """
    z = sp.Symbol("z", positive=True)
    rho = 1 - sp.exp(-1)
    decrease = (1 + u) * (1 - sp.exp(-u / (1 + u))) - u / (1 + u)  # -W(c/L1) in units of L0/L1²
    N = 1 - sp.exp(z - 1) - z * (1 - z) - rho * (1 - z + z * sp.log(z))
    defined = z * (decrease - rho * (u - sp.log(1 + u))).subs(u, 1 / z - 1)
    assert sp.simplify(sp.expand_log(defined - N)) == 0
    assert sp.limit(N, z, 0, "+") == 0
    assert N.subs(z, 1) == sp.diff(N, z).subs(z, 1) == 0
    assert sp.limit(sp.diff(N, z), z, 0, "+") == sp.oo
    # z N″ = z(2 - e^{z-1}) - ρ runs from -ρ to 1 - ρ, increasing: its derivative 2 - (1+z) e^{z-1} falls, to
    # 0 at z = 1.
    curvature = sp.expand(z * sp.diff(N, z, 2))
    assert sp.simplify(curvature - (z * (2 - sp.exp(z - 1)) - rho)) == 0
    assert sp.limit(curvature, z, 0) == -rho
    assert sp.simplify(curvature.subs(z, 1) - (1 - rho)) == 0
    assert sp.diff(curvature, z).subs(z, 1) == 0
    assert sp.simplify(sp.diff(curvature, z, 2) + (2 + z) * sp.exp(z - 1)) == 0
    # The decrease is that of the library's exact worst case, L0 = L1 = 1.
    values = np.logspace(-2, 2, 41)
    own = theory.exact_bound_1d(values, theory.quadratic_step(values, 1.0, 1.0) * values, 1.0, 1.0)
    # Terms up to 100, each exact to 2⁻⁵².
    np.testing.assert_allclose(-own, sp.lambdify(u, decrease)(values), rtol=0, atol=1e-13)


def test_guarantee_is_never_less_than_half_of_the_1d_optimum():
    """g²/(2(L0 + L1 g)) ≥ half of u - ln(1+u) (in L0/L1²): u²/(1+u) - u + ln(1+u) = ln(1+u) - u/(1+u) ≥ 0."""
    gap = u**2 / (1 + u) - (u - sp.log(1 + u))
    assert sp.simplify(gap - (sp.log(1 + u) - u / (1 + u))) == 0
    assert gap.subs(u, 0) == 0
    assert sp.simplify(sp.diff(gap, u) - u / (1 + u) ** 2) == 0  # ≥ 0
    assert sp.limit(u**2 / (1 + u) / (u - sp.log(1 + u)), u, sp.oo) == 1  # no fraction above the half will do
