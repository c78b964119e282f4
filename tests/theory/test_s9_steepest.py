"""Statement S9, "clipping approximates steepest descent": the direction exactly; the step, by how much?

With u = L1 g/L0 and hard clipping at η = 1/L0, γ = L0/L1 the step is s/(L0 + L1 g) with s = 1 + min{u, 1/u}.
"""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from scipy.optimize import minimize_scalar

from gradclip import problems, theory
from gradclip.rules import RULES, clip_factor

u, kappa, c = sp.symbols("u kappa c", positive=True)
U = np.logspace(-3, 3, 601)


def _hard_radius(value):
    """Radius of the hard-clipped step for L0 = L1 = 1, g = u: min{u, 1}."""
    return np.minimum(value, 1.0)


@pytest.mark.parametrize("rule", RULES)
def test_direction_is_exactly_that_of_steepest_descent(rule):
    """The factor is a positive number, so the direction is -g/‖g‖, the unit d that minimises ⟨g, d⟩
    (Cauchy-Schwarz).
    """
    rng = np.random.default_rng(9)
    g = torch.from_numpy(rng.normal(size=(200, 6)) * 10 ** rng.uniform(-2, 2, size=(200, 1)))
    step = -g * clip_factor(g.norm(dim=-1), 0.7, rule=rule)[:, None]
    unit = step / step.norm(dim=-1, keepdim=True)
    slope = (g * unit).sum(-1)
    torch.testing.assert_close(
        slope, -g.norm(dim=-1), rtol=1e-14, atol=0.0
    )  # six products, a norm, a quotient
    other = torch.from_numpy(rng.normal(size=(200, 6)))
    other = other / other.norm(dim=-1, keepdim=True)
    assert ((g * other).sum(-1) >= slope * (1 + 1e-14)).all()


def test_fraction_of_the_guaranteed_decrease():
    """A step s/(L0 + L1 g) guarantees s(2 - s) of S7's g²/(2(L0 + L1 g)); for hard clipping this is 1 -
    min{u, 1/u}².
    """
    L0, L1, g = sp.symbols("L0 L1 g", positive=True)
    G = L0 + L1 * g
    decrease = kappa / G * g**2 - G * (kappa / G) ** 2 * g**2 / 2
    assert sp.simplify(decrease / (g**2 / (2 * G)) - kappa * (2 - kappa)) == 0
    assert sp.simplify((kappa * (2 - kappa)).subs(kappa, 1 + u) - (1 - u**2)) == 0
    computed = theory.quadratic_bound(U, _hard_radius(U), 1.0, 1.0) / theory.quadratic_bound(
        U, theory.quadratic_step(U, 1.0, 1.0) * U, 1.0, 1.0
    )
    np.testing.assert_allclose(computed, 1 - np.minimum(U, 1 / U) ** 2, atol=1e-12)


def test_hard_clipping_never_climbs(instances):
    """s ≤ 2, so hard clipping at (1/L0, L0/L1) stays within the limit of S6: f does not increase, in any
    dimension.
    """
    checked = 0
    for case in (i for i in instances if i.L0 > 0 and i.L1 > 0):
        gradient = case.gradient(case.x)
        step = clip_factor(gradient.norm(), case.L0 / case.L1) / case.L0 * gradient
        fx, fy = case.f(case.x), case.f(case.x - step)
        assert (fy - fx).item() <= case.slack(fx, fy, gradient), case.name
        checked += 1
    assert checked >= 50


def test_guarantee_as_printed_is_refuted_by_the_phi_bound_at_the_threshold():
    """At g = γ the φ bound of the hard step is (2e - 5) L0/L1² > 0: the usual lemma does not even guarantee
    descent.
    """
    bound = theory.phi_bound(1.0, 1.0, 1.0, 1.0)
    assert bound == pytest.approx(2 * math.e - 5, rel=1e-14)
    assert bound > 0
    # ... and the parabola guarantees exactly nothing there.
    assert theory.quadratic_bound(1.0, 1.0, 1.0, 1.0) == 0.0


def test_hard_clipping_keeps_at_least_1_minus_1_over_e_in_one_dimension():
    """Against the minimax decrease u - ln(1+u) of one dimension hard clipping keeps a fraction in [1 - 1/e,
    1].
    """
    values = np.concatenate([np.logspace(-2, 8, 2001), [1.0, math.e - 1]])
    own = theory.exact_bound_1d(values, _hard_radius(values), 1.0, 1.0)
    best = theory.exact_bound_1d(values, theory.exact_step_1d(values, 1.0, 1.0) * values, 1.0, 1.0)
    kept = own / best
    assert kept.min() >= 1 - 1 / math.e
    assert kept.max() <= 1 + 1e-11
    # For u ≥ e - 1 the slope has not vanished at radius 1: -w = (1+u)(1 - 1/e) - 1, and the fraction tends
    # to 1 - 1/e.
    formula = ((1 + u) * (1 - sp.exp(-1)) - 1) / (u - sp.log(1 + u))
    assert sp.simplify(sp.limit(formula, u, sp.oo) - (1 - sp.exp(-1))) == 0
    assert sp.simplify(formula.subs(u, sp.E - 1) - 1) == 0


def test_one_dimensional_fraction_of_hard_clipping_is_proved_piece_by_piece():
    """D(u) = decrease - (1 - 1/e)(u - ln(1+u)) in units of L0/L1² rises throughout: from 0, from D(1) > 0,
    from D(e - 1) = 1 - 2/e > 0.
    """

    def phi(t):
        return sp.exp(t) - t - 1

    rho, log = 1 - sp.exp(-1), sp.log(1 + u)
    # -W at radius min{u, 1}/L1; the slope has vanished there if log ≤ radius, that is for u ≤ e - 1.
    low = phi(log) - phi(u - log) - rho * (u - log)
    middle = phi(log) - phi(1 - log) - rho * (u - log)
    high = u - (1 + u) * phi(-sp.Integer(1)) - rho * (u - log)

    assert low.subs(u, 0) == 0
    bracket = 1 + sp.exp(-1) - sp.exp(u) / (1 + u)
    assert sp.simplify(sp.diff(low, u) - u / (1 + u) * bracket) == 0
    assert sp.simplify(sp.diff(bracket, u) + u * sp.exp(u) / (1 + u) ** 2) == 0  # falling on [0, 1] ...
    assert bracket.subs(u, 1) > 0  # ... to a positive value

    assert sp.simplify(middle - ((u - log) / sp.E - log + 2 - sp.E / (1 + u))) == 0
    assert sp.simplify(middle.subs(u, 1) - low.subs(u, 1)) == 0
    assert middle.subs(u, 1) > 0
    # Both summands of the numerator are nonnegative while 1 + u ≤ e.
    assert sp.simplify(sp.diff(middle, u) * (1 + u) ** 2 - (u * (1 + u) / sp.E + (sp.E - (1 + u)))) == 0

    assert sp.simplify(high - (rho * (1 + log) - 1)) == 0
    assert sp.simplify(high.subs(u, sp.E - 1) - middle.subs(u, sp.E - 1)) == 0
    assert sp.simplify(high.subs(u, sp.E - 1) - (1 - 2 * sp.exp(-1))) == 0
    assert 1 - 2 * sp.exp(-1) > 0

    for piece, a, b in [(low, 0.01, 1), (middle, 1, math.e - 1), (high, math.e - 1, 100)]:
        values = np.linspace(a, b, 50)
        own = theory.exact_bound_1d(values, _hard_radius(values), 1.0, 1.0)
        best = theory.exact_bound_1d(values, theory.exact_step_1d(values, 1.0, 1.0) * values, 1.0, 1.0)
        # Terms up to 100, each exact to 2⁻⁵².
        expected = sp.lambdify(u, piece)(values)
        np.testing.assert_allclose(float(rho) * best - own, expected, rtol=0, atol=1e-13)


def test_halved_hard_clipping_keeps_three_quarters():
    """With η = 1/(2 L0), γ = L0/L1: s in [1/2, 1] and s(2 - s) ≥ 3/4 of S7's guaranteed decrease, in every
    dimension.
    """
    fraction = theory.quadratic_bound(U, _hard_radius(U) / 2, 1.0, 1.0) / theory.quadratic_bound(
        U, theory.quadratic_step(U, 1.0, 1.0) * U, 1.0, 1.0
    )
    assert fraction.min() >= 0.75
    assert fraction[np.argmin(np.abs(U - 1))] == pytest.approx(1.0, abs=1e-4)
    assert (kappa * (2 - kappa)).subs(kappa, sp.Rational(1, 2)) == sp.Rational(3, 4)


def test_clipped_step_keeps_seventy_percent_under_the_phi_bound():
    """min{1/(2 L0), 1/(3 L1 g)} keeps at least (1/3 - φ(1/3))/(2 ln 2 - 1) of the best φ decrease, the
    value at c = 1.
    """
    share = np.linspace(1e-3, 1, 2001)
    constant = (1 - share) / share  # g = L1 = 1
    own = theory.phi_bound(1.0, theory.clipped_step(1.0, constant, 1.0), constant, 1.0)
    best = theory.phi_bound(1.0, theory.phi_step(1.0, constant, 1.0), constant, 1.0)
    worst = (1 / 3 - theory.phi(1 / 3)) / (2 * math.log(2) - 1)
    assert (own / best).min() == pytest.approx(worst, abs=1e-12)
    assert np.argmin(own / best) == len(share) - 1
    # Against the guarantee g²/(2 L0 + 3 L1 g) of the simplified step it keeps at least 3/4.
    assert (own / (-theory.simplified_step(1.0, constant, 1.0) / 2)).min() >= 0.75


def test_seventy_percent_is_proved_by_concavity():
    """ρ = (1/3 - φ(1/3))/(2 ln 2 - 1). For c ≥ 2/5 the radius is 1/3 and c/3 - φ(1/3) - ρ·best is concave;
    for c ≤ 2/5, φ(t) ≤ 9 φ(1/3) t².
    """
    third, two_fifths = sp.Rational(1, 3), sp.Rational(2, 5)
    at_third = sp.exp(third) - sp.Rational(4, 3)
    rho = (third - at_third) / (2 * sp.log(2) - 1)
    best = (1 + c) * sp.log(1 + c) - c
    # L1 r = min{L1 g/(2 L0), 1/3} and L1 g/L0 = c/(1 - c): the corner is at c = 2/5.
    assert sp.solve(c / (2 * (1 - c)) - third, c) == [two_fifths]
    above = c * third - at_third - rho * best
    assert sp.simplify(sp.diff(above, c, 2) + rho / (1 + c)) == 0
    assert above.subs(c, two_fifths) > 0
    assert sp.simplify(above.subs(c, 1)) == 0
    # Below: best ≤ c²/2, since its derivative is ln(1+c) ≤ c. With s = L1 r/c = 1/(2(1 - c)) in [1/2, 5/6]
    # the decrease is at least c²(s - 9 φ(1/3) s²), concave in s.
    assert sp.simplify(sp.diff(best, c) - sp.log(1 + c)) == 0
    for s in (sp.Rational(1, 2), sp.Rational(5, 6)):
        assert s - 9 * at_third * s**2 > rho / 2
    t = np.linspace(1e-3, 1 / 3, 1000)
    assert (
        theory.phi(t) <= 9 * float(at_third) * t**2 * (1 + 1e-13)
    ).all()  # φ(t)/t² = Σ tᵏ/(k+2)! increases


def test_steepest_step_as_printed_is_refuted_by_line_search_on_a_flat_parabola():
    """f = x²/20 is in the class with L0 = L1 = 1; its best step is 10, clipping takes less than 1: best for
    the bound only.
    """
    problem = problems.quadratic(eigenvalues=(0.1,))
    x = torch.ones(1, dtype=torch.float64)
    gradient = problem.gradient(x)
    best = minimize_scalar(lambda s: problem.f(x - s * gradient).item(), bounds=(0, 100), method="bounded").x
    assert best == pytest.approx(10.0, abs=1e-3)
    assert theory.quadratic_step(gradient.norm().item(), 1.0, 1.0) < 1.0
