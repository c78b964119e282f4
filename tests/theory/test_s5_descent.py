"""Statement S5, the descent inequality f(x+d) ≤ f(x) + ⟨∇f(x), d⟩ + (L0 + L1 g)‖d‖²/2: when does 1/2 hold?

Always under the form without a radius; not for every step under the Hessian form, where φ replaces t²/2; but
for every *gradient* step with η ≤ 2/(L0 + L1 g), in every dimension. The last group of tests follows that
proof line by line.
"""

import math

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch
from scipy.integrate import solve_ivp
from scipy.special import fresnel

from gradclip import problems, theory

L0, L1, g = sp.symbols("L0 L1 g", positive=True)
r, t, u = sp.symbols("r t u", positive=True)
U = np.concatenate([[0.0], np.logspace(-3, 4, 71)])  # u = L1 g/L0, with L0 = L1 = 1 and g = u


# Under the form without a radius, and the classical lemma under the Hessian form


def test_half_follows_from_the_form_without_radius():
    """∫₀¹ (L0 + L1 g) t‖d‖ · ‖d‖ dt = (L0 + L1 g)‖d‖²/2: the article's integration, right under its own
    definition.
    """
    integral = sp.integrate((L0 + L1 * g) * t * r * r, (t, 0, 1))
    assert sp.simplify(integral - (L0 + L1 * g) * r**2 / 2) == 0


def test_half_holds_for_any_step_of_a_function_in_the_form_without_radius():
    """f = y²/2 + ∫ sin s² ds, constants (4, 2), steps of either sign and any length."""
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 4000)) * 10 ** rng.uniform(-2, 1.5, size=(2, 4000))

    def f(z):
        return z**2 / 2 + math.sqrt(math.pi / 2) * fresnel(z * math.sqrt(2 / math.pi))[0]

    slope = a + np.sin(a**2)
    excess = f(b) - f(a) - slope * (b - a) - (4 + 2 * np.abs(slope)) * (b - a) ** 2 / 2
    # Values up to 1e4, slopes times lengths up to 1e4: roundings below 1e-11.
    assert excess.max() <= 1e-10


def test_phi_bound_is_the_integral_of_the_growth_bound():
    """∫₀ʳ (L0 + L1 g)(e^{L1 s} - 1)/L1 ds = (L0 + L1 g) φ(L1 r)/L1²."""
    s = sp.Symbol("s", positive=True)
    integral = sp.integrate((L0 + L1 * g) * (sp.exp(L1 * s) - 1) / L1, (s, 0, r))
    assert sp.simplify(integral - (L0 + L1 * g) * (sp.exp(L1 * r) - L1 * r - 1) / L1**2) == 0


def test_phi_bound_holds_in_every_direction(instances):
    """|f(y) - f(x) - ⟨∇f(x), y - x⟩| ≤ (L0 + L1 g) φ(L1 r)/L1² for random directions and r ≤ 3/L1."""
    rng = np.random.default_rng(6)
    for case in instances:
        d = torch.from_numpy(rng.normal(size=(20, case.x.numel())))
        d = d / d.norm(dim=-1, keepdim=True) * torch.from_numpy(rng.uniform(0, 3 / max(case.L1, 1), (20, 1)))
        gradient, fx, fy = case.gradient(case.x), case.f(case.x), case.f(case.x + d)
        radius, norm = d.norm(dim=-1).numpy(), gradient.norm().item()
        remainder = (fy - fx - d @ gradient).abs().numpy()
        bound = theory.phi_bound(norm, radius, case.L0, case.L1) + norm * radius
        assert (remainder - bound).max() <= case.slack(fx, fy, gradient), case.name


def test_phi_bound_is_attained_by_exp_going_up():
    """Sharp over all directions: e^{x+r} - e^x - r e^x = e^x φ(r)."""
    radius = np.linspace(0.1, 5, 50)
    remainder = math.exp(0.3) * (np.expm1(radius) - radius)
    bound = theory.phi_bound(math.exp(0.3), radius, 0.0, 1.0) + math.exp(0.3) * radius
    # expm1(r) - r loses at most a factor 20 of relative accuracy at r = 0.1.
    np.testing.assert_allclose(remainder, bound, rtol=1e-13)


def test_e_minus_2_on_the_radius_one_over_L1():
    """φ(t)/t² = Σ tᵏ/(k+2)! increases and is e - 2 at t = 1, so φ(t) ≤ (e - 2) t² up to t = 1."""
    z = np.linspace(1e-6, 1, 10_001)
    ratio = theory.phi(z) / z**2
    assert (np.diff(ratio) > 0).all()
    assert ratio[-1] == pytest.approx(math.e - 2, rel=2**-50)  # a few roundings
    assert (theory.phi_bound(1.0, z, 0.5, 1.0) <= theory.e2_bound(1.0, z, 0.5, 1.0) + 2**-50).all()


def test_2020_descent_lemma_is_implied():
    """2(e - 2) < 4 < 5 gives (5 L0 + 4 L1 g)/2; and g + (e - 1)(L0/L1 + g) ≤ 4(L0/L1 + g), its gradient
    bound.
    """
    assert 2 * (math.e - 2) < 4
    ratio = sp.Symbol("ratio", positive=True)  # L0/L1
    slack = sp.expand(4 * (ratio + g) - g - (sp.E - 1) * (ratio + g))
    assert all(float(slack.coeff(s)) >= 0 for s in (ratio, g))
    z = np.linspace(0, 1, 101)
    for norm in (0.0, 0.1, 1.0, 100.0):
        assert (theory.e2_bound(norm, z, 0.7, 1.0) <= theory.zhang_bound(norm, z, 0.7, 1.0)).all()
        assert theory.gradient_growth_bound(norm, 1.0, 0.7, 1.0) + norm <= 4 * (0.7 + norm)


# The statement as printed, under the Hessian form


def test_half_as_printed_is_refuted_by_exp_in_every_ascent_step():
    """eˣ is (0, 1)-smooth; going up by any r > 0, φ(r) > r²/2: the constant 1/2 fails at every radius."""
    radius = np.logspace(-6, 1, 50)
    assert (theory.phi(radius) > radius**2 / 2 * (1 + radius / 4)).all()  # φ(r) = r²/2 (1 + r/3 + ...)


@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0])
def test_half_as_printed_is_refuted_by_the_extremal_function_in_a_long_gradient_step(norm):
    """L0 = L1 = 1: a gradient step that overshoots far enough climbs exponentially, above any parabola."""
    problem = problems.extremal(L0=1.0, L1=1.0)
    x = torch.tensor([math.log1p(norm)], dtype=torch.float64)
    radius = 3 * math.log1p(norm) + 3
    change = (problem.f(x - radius) - problem.f(x)).item()
    assert change > 1.1 * max(theory.quadratic_bound(norm, radius, 1.0, 1.0), 0.0)


def test_half_as_printed_is_refuted_by_a_rotating_gradient():
    """eˣ cos y is (0, 1)-smooth (Hessian eigenvalues ± eˣ); some gradient step of radius 4/L1 ends above
    the parabola.
    """
    y0 = 2.2
    z0, norm, radius = complex(0.0, y0), 1.0, 4.0
    gradient = complex(math.cos(y0), -math.sin(y0))  # ∂ₓ, ∂ᵧ of Re e^z at x = 0
    moved = z0 - radius * gradient
    change = math.exp(moved.real) * math.cos(moved.imag) - math.cos(y0)
    assert abs(gradient) == pytest.approx(1.0)
    assert change > theory.quadratic_bound(norm, radius, 0.0, 1.0) + 1.0


# One dimension: the exact worst case


@pytest.mark.parametrize("norm", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_exact_1d_solves_the_worst_slope_equation(norm, constant):
    """The slope s(t) along the step obeys |s'| ≤ L0 + L1|s|; the largest solution of s' = L0 + L1|s|
    integrates to it.
    """
    radius = np.linspace(0, 4, 41)
    solution = solve_ivp(
        lambda _, state: [state[1], constant + 1.5 * abs(state[1])],
        (0, 4),
        [0.0, -norm],
        t_eval=radius,
        method="DOP853",
        rtol=1e-11,
        atol=1e-12,
        max_step=0.02,
    )
    exact = theory.exact_bound_1d(norm, radius, constant, 1.5)
    # The kink at s = 0 costs the solver order: step 0.02, kink in the third derivative of f, below 1e-5
    # relative.
    np.testing.assert_allclose(solution.y[0], exact, rtol=1e-5, atol=1e-7)


def test_exact_1d_is_attained_by_the_extremal_function():
    """From distance ln(1 + u)/L1 of its minimiser, f(x) = (L0/L1²) φ(L1|x|) realises the worst case at
    every radius.
    """
    for constant, rate, norm in [(1.0, 1.0, 2.0), (0.3, 2.0, 1.0), (5.0, 0.5, 40.0)]:
        problem = problems.extremal(L0=constant, L1=rate)
        x = torch.tensor([math.log1p(rate * norm / constant) / rate], dtype=torch.float64)
        assert problem.gradient(x).item() == pytest.approx(norm, rel=1e-13)
        radius = torch.linspace(0, 3 * x.item(), 100, dtype=torch.float64)
        change = problem.f((x - radius)[:, None]) - problem.f(x)
        exact = theory.exact_bound_1d(norm, radius.numpy(), constant, rate)
        scale = problem.f(2 * x).item() + problem.f(x).item()
        np.testing.assert_allclose(change.numpy(), exact, atol=1e-13 * scale, rtol=0)


def test_exact_1d_bounds_every_function_of_one_variable(instances):
    """No one-dimensional function of the class exceeds it, up to radius 3/L1."""
    checked = 0
    for case in (c for c in instances if c.x.numel() == 1):
        norm = case.gradient(case.x)
        radius = torch.linspace(0, 3 / max(case.L1, 1), 61, dtype=torch.float64)
        change = case.f(case.x - radius[:, None] * norm.sign()) - case.f(case.x)
        exact = theory.exact_bound_1d(norm.abs().item(), radius.numpy(), case.L0, case.L1)
        assert (change.numpy() - exact).max() <= case.slack(change, case.f(case.x)), case.name
        checked += 1
    assert checked >= 50


def test_1d_before_the_slope_vanishes():
    """There the exact value is -g r + (L0 + L1 g) φ(-t)/L1², t = L1 r, and φ(-t) ≤ t²/2 since 1 - e^{-t} ≤
    t.
    """
    worst = (L0 / L1) * r - (L0 / L1 + g) * (1 - sp.exp(-L1 * r)) / L1
    phi_form = -g * r + (L0 + L1 * g) * (sp.exp(-L1 * r) + L1 * r - 1) / L1**2
    assert sp.simplify(worst - phi_form) == 0
    gap = t**2 / 2 - (sp.exp(-t) + t - 1)
    assert gap.subs(t, 0) == 0
    assert sp.diff(gap, t).subs(t, 0) == 0
    assert sp.simplify(sp.diff(gap, t, 2) - (1 - sp.exp(-t))) == 0  # ≥ 0 for t ≥ 0


def test_1d_reflection_carries_the_half_to_twice_the_radius():
    """Units L0 = L1 = 1, T = ln(1+u): W(τ) = W(2T - τ), while Q(τ) - Q(2T - τ) = 2(τ - T)((1+u)T - u) ≥ 0
    for τ ≥ T.
    """
    tau, T = sp.symbols("tau T", positive=True)
    Q = -u * tau + (1 + u) * tau**2 / 2
    assert sp.simplify(Q - Q.subs(tau, 2 * T - tau) - 2 * (tau - T) * ((1 + u) * T - u)) == 0
    excess = (1 + u) * sp.log(1 + u) - u
    assert excess.subs(u, 0) == 0
    assert sp.simplify(sp.diff(excess, u) - sp.log(1 + u)) == 0  # ≥ 0
    for value in U[1:]:
        T_value = math.log1p(value)
        beyond = np.linspace(0, T_value, 20)
        right = theory.exact_bound_1d(value, T_value + beyond, 1.0, 1.0)
        left = theory.exact_bound_1d(value, T_value - beyond, 1.0, 1.0)
        # Values of size u and radii with relative rounding 2⁻⁵³, slopes at most u.
        np.testing.assert_allclose(right, left, rtol=0, atol=1e-13 * (1 + value))


def test_half_holds_in_one_dimension_up_to_the_exact_descent_limit():
    """exact_bound_1d ≤ quadratic_bound for η ≤ 2 ln(1+u)/(L1 g), on a grid of u and radii."""
    for value in U[1:]:
        radius = np.linspace(0, 2 * math.log1p(value), 401)
        gap = theory.quadratic_bound(value, radius, 1.0, 1.0) - theory.exact_bound_1d(value, radius, 1.0, 1.0)
        assert gap.min() >= -1e-13 * (1 + value)


@pytest.mark.parametrize("value", [0.01, 0.1, 1.0, 10.0, 1000.0])
def test_half_fails_in_one_dimension_at_a_finite_radius(value):
    """For every L0 > 0 the exact worst case crosses the parabola once, beyond twice ln(1+u)/L1, and stays
    above.
    """
    radius = np.linspace(0, 4 * math.log1p(value) + 4, 4001)[1:]
    above = theory.exact_bound_1d(value, radius, 1.0, 1.0) > theory.quadratic_bound(value, radius, 1.0, 1.0)
    first = int(np.argmax(above & (radius > 2 * math.log1p(value))))
    assert radius[first] > 2 * math.log1p(value)
    assert above[first:].all()


def test_half_fails_in_one_dimension_from_one_crossing_on():
    """Beyond r₀ the second derivative of W - Q is L0 e^{L1(r - r₀)} - G, which is 0 at 2r₀ and rises: from
    there on W - Q is convex.

    It is negative at 2r₀, where W = 0 < Q, and exponential growth wins in the end: one crossing, then above.
    """
    r0 = sp.log(1 + L1 * g / L0) / L1

    def phi(z):
        return sp.exp(z) - z - 1

    gap = L0 / L1**2 * (phi(L1 * (r - r0)) - phi(L1 * r0)) + g * r - (L0 + L1 * g) * r**2 / 2
    second = sp.diff(gap, r, 2)
    assert sp.simplify(second - (L0 * sp.exp(L1 * (r - r0)) - L0 - L1 * g)) == 0
    assert sp.simplify(second.subs(r, 2 * r0)) == 0
    assert sp.simplify(sp.diff(second, r) - L0 * L1 * sp.exp(L1 * (r - r0))) == 0  # > 0
    # Q(2r₀) = 2r₀(G r₀ - g) > 0, because L1 r₀ = ln(1+u) > u/(1+u) = L1 g/G, see S6.
    assert sp.simplify(gap.subs(r, 2 * r0) + 2 * r0 * ((L0 + L1 * g) * r0 - g)) == 0


# Every dimension: the constant 1/2 for gradient steps with η ≤ 2/(L0 + L1 g)
# v = -∇f(x)/g, p(t) = ∇f(x + tv), |p'| ≤ L0 + L1|p|, G = L0 + L1 g, R = g/G, c = L1 R, a = ⟨p, v⟩. Claim:
# a(t) ≤ -g + G t.


def test_retracted_path_moves_at_most_at_speed_G():
    """Step 1. q = p min(1, g/|p|) obeys |q'| ≤ L0 + L1 g: outside the ball only the tangential part counts,
    times g/|p|.
    """
    rho = sp.Symbol("rho", positive=True)
    outside = (g / (g + rho)) * (L0 + L1 * (g + rho))  # |p| = g + rho
    assert sp.simplify(L0 + L1 * g - outside - L0 * rho / (g + rho)) == 0  # a nonnegative difference
    # The derivative of the retraction, by finite differences on random paths.
    rng = np.random.default_rng(7)
    p, velocity = rng.normal(size=(2, 20_000, 3))
    p *= 10 ** rng.uniform(-1, 1, size=(20_000, 1))
    size = np.linalg.norm(p, axis=1)
    velocity *= ((0.5 + 2 * size) / np.linalg.norm(velocity, axis=1))[:, None]  # L0 + L1|p|, (1/2, 2)

    def retract(z):
        return z * np.minimum(1, 1 / np.linalg.norm(z, axis=1))[:, None]  # g = 1

    speed = np.linalg.norm(retract(p + 1e-7 * velocity) - retract(p), axis=1) / 1e-7
    # The path is straight for 1e-7: second-order error 1e-7 · speed² / |p|, at most 1e-7 · 100² near |p| = 1.
    assert speed.max() <= 0.5 + 2 * 1 + 1e-3


def test_path_inside_the_ball_or_with_negative_slope_obeys_the_claim():
    """Step 2. If |p| ≤ g then p = q; if a ≤ 0 then a ≤ a·g/|p| = ⟨q, v⟩; either way a ≤ ⟨q, v⟩ ≤ -g + G t."""
    rng = np.random.default_rng(8)
    p = rng.normal(size=(10_000, 3)) * 10 ** rng.uniform(-1, 1, size=(10_000, 1))
    q = p * np.minimum(1, 1 / np.linalg.norm(p, axis=1))[:, None]
    covered = (np.linalg.norm(p, axis=1) <= 1) | (p[:, 0] <= 0)
    assert covered.any()
    assert (p[covered, 0] <= q[covered, 0]).all()


def test_outside_the_ball_height_and_angle_cost_time():
    """Step 3. λ = ln((L0 + L1|p|)/G)/c has Rλ' = |p|'/(L0 + L1|p|), and |p|/(L0 + L1|p|) ≥ R: so λ'² + |ω'|²
    ≤ 1/R².
    """
    rho = sp.Symbol("rho", positive=True)
    R = g / (L0 + L1 * g)
    c = L1 * R
    height = sp.log((L0 + L1 * rho) / (L0 + L1 * g)) / c
    assert sp.simplify(R * sp.diff(height, rho) - 1 / (L0 + L1 * rho)) == 0
    assert sp.simplify(sp.diff(rho / (L0 + L1 * rho), rho) - L0 / (L0 + L1 * rho) ** 2) == 0  # increasing
    # Inverting the height: |p| = g (1 + (e^{cλ} - 1)/c).
    lam = sp.Symbol("lambda", positive=True)
    size = g * (1 + (sp.exp(c * lam) - 1) / c)
    assert sp.simplify(L0 + L1 * size - (L0 + L1 * g) * sp.exp(c * lam)) == 0


def test_height_is_worst_when_L0_is_zero():
    """Step 4. (e^{cλ} - 1)/c = Σ cᵏ⁻¹λᵏ/k! increases in c, so for c ≤ 1 it is at most e^λ - 1, the value
    for L0 = 0.
    """
    c, lam = np.meshgrid(np.linspace(1e-3, 1, 200), np.linspace(0, 3, 200))
    assert (np.expm1(c * lam) / c <= np.expm1(lam) * (1 + 2**-50)).all()


def test_cup_lemma_trigonometry():
    """Cup lemma, ψ = α/2, b = -cos α: 1 + b = 2 sin²ψ and 1 - b = 2 cos²ψ; both ends in α₁ give 2 sin ψ + λ
    sin χ.
    """
    psi, alpha1, b = sp.symbols("psi alpha1 b", positive=True)
    cosine = -sp.cos(2 * psi)
    assert sp.simplify(1 + cosine - 2 * sp.sin(psi) ** 2) == 0
    assert sp.simplify(1 - cosine - 2 * sp.cos(psi) ** 2) == 0
    cos_chi = sp.sin(psi) / psi
    chord_then_wall = 2 * sp.sin(alpha1 / 2) + (2 * psi - alpha1) * cos_chi  # concave in α₁
    assert sp.simplify(chord_then_wall.subs(alpha1, 0) - 2 * sp.sin(psi)) == 0
    assert sp.simplify(chord_then_wall.subs(alpha1, 2 * psi) - 2 * sp.sin(psi)) == 0
    assert sp.simplify(sp.diff(chord_then_wall, alpha1, 2) + sp.sin(alpha1 / 2) / 2) == 0
    # At λ = ln(1/b), with ln(1/b) ≥ 2(1 - b)/(1 + b), it remains to see that sin χ (1 + sin ψ) ≥ sin²ψ.
    assert sp.simplify(2 * (1 - cosine) / (1 + cosine) - 2 / sp.tan(psi) ** 2) == 0
    assert sp.simplify((2 - 2 * sp.sin(psi)) * (1 + sp.sin(psi)) - 2 * sp.cos(psi) ** 2) == 0
    # ln(1/b) - 2(1 - b)/(1 + b) vanishes at b = 1 and falls towards it.
    slope = sp.diff(-sp.log(b) - 2 * (1 - b) / (1 + b), b)
    assert sp.simplify(slope + (1 - b) ** 2 / (b * (1 + b) ** 2)) == 0


def test_cup_lemma_scalar_inequality_in_interval_arithmetic():
    """Cup lemma, last step: √(1 - (sin ψ/ψ)²)(1 + sin ψ) > sin²ψ on all of [π/4, π/2], with outward
    rounding.
    """
    low, high = 0.7853, 1.5708  # π/4 = 0.78539..., π/2 = 1.570796...
    iv = mpmath.iv
    cells = 200
    for i in range(cells):
        cell = iv.mpf([low + (high - low) * i / cells, low + (high - low) * (i + 1) / cells])
        sine = iv.sin(cell)
        assert (iv.sqrt(1 - (sine / cell) ** 2) * (1 + sine) - sine**2).a > 0


def test_cup_lemma_scalar_inequality_by_hand():
    """The same without a computer: the root increases in ψ, (1 + sin ψ)/sin²ψ decreases, and two products are
    above 1.
    """
    psi, sine = sp.symbols("psi s", positive=True)
    # sin ψ/ψ falls: ψ² times its derivative is ψ cos ψ - sin ψ, 0 at 0 with the derivative -ψ sin ψ.
    numerator = sp.simplify(psi**2 * sp.diff(sp.sin(psi) / psi, psi))
    assert numerator.subs(psi, 0) == 0
    assert sp.simplify(sp.diff(numerator, psi) + psi * sp.sin(psi)) == 0
    assert sp.simplify(sp.diff((1 + sine) / sine**2, sine) + (2 + sine) / sine**3) == 0
    # The root's value at the left end times the quotient's at the right end, on [π/4, 1] and on [1, π/2].
    root = sp.sqrt(1 - (sp.sin(psi) / psi) ** 2)
    quotient = (1 + sp.sin(psi)) / sp.sin(psi) ** 2
    assert sp.simplify(root.subs(psi, sp.pi / 4) - sp.sqrt(1 - 8 / sp.pi**2)) == 0
    assert root.subs(psi, sp.pi / 4) * quotient.subs(psi, 1) > sp.Rational(11, 10)
    assert sp.simplify(root.subs(psi, 1) - sp.cos(1)) == 0
    assert quotient.subs(psi, sp.pi / 2) == 2
    assert 2 * sp.cos(1) > 1


def test_cup_lemma_on_a_grid():
    """2 sin(α₁/2) + √((α-α₁)² + λ²) ≥ 1 + min(1, -cos α e^λ) for π/2 ≤ α ≤ π, 0 ≤ α₁ ≤ α, λ ≥ 0 (λ ≥ 2 is
    trivial).
    """
    alpha = np.linspace(math.pi / 2, math.pi, 121)[:, None, None]
    share = np.linspace(0, 1, 121)[None, :, None]
    lam = np.linspace(0, 2, 121)[None, None, :]
    left = 2 * np.sin(share * alpha / 2) + np.hypot((1 - share) * alpha, lam)
    right = 1 + np.minimum(1, -np.cos(alpha) * np.exp(lam))
    assert (left - right).min() >= -1e-15  # equality at α = α₁ = π, λ = 0


def test_integral_of_the_slope_bound_is_the_parabola():
    """Last step. ∫₀ʳ (-g + G t) dt = -g r + G r²/2."""
    assert sp.expand(sp.integrate(-g + (L0 + L1 * g) * t, (t, 0, r)) + g * r - (L0 + L1 * g) * r**2 / 2) == 0


def _highest_slope(constant: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Times, and at each the largest a(t) over all paths |p'| ≤ L0 + |p| from (-1, 0), for g = L1 = 1.

    The paths that reach furthest obey Pontryagin's condition: p' = (L0 + |p|) k/|k|, k' = -|k| p/|p|. They
    are integrated by Runge-Kutta from 2001 initial directions of k.
    """
    steps = 800
    h = radius / steps
    # Not exactly 0: that path runs through p = 0, where p/|p| has no value.
    directions = np.linspace(1e-4, math.pi, 2001)
    state = np.stack([-np.ones(2001), np.zeros(2001), np.cos(directions), np.sin(directions)])

    def speed(z):
        p, k = z[:2], z[2:]
        length, costate = np.linalg.norm(p, axis=0), np.linalg.norm(k, axis=0)
        return np.concatenate([(constant + length) * k / costate, -costate * p / length])

    highest = [-1.0]
    for _ in range(steps):
        k1 = speed(state)
        k2 = speed(state + h / 2 * k1)
        k3 = speed(state + h / 2 * k2)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + speed(state + h * k3))
        highest.append(state[0].max())
    return np.linspace(0, radius, steps + 1), np.array(highest)


@pytest.mark.parametrize("time", [1.7, 2.0, 2.5, 3.0])
def test_steepest_paths_have_their_closed_form_without_L0(time):
    """L0 = 0: ln|p| and the angle move at unit speed, so the largest slope is max -cos θ e^{√(t² - θ²)}."""
    angle = np.linspace(0, min(time, math.pi), 100_001)
    exact = (-np.cos(angle) * np.exp(np.sqrt(time**2 - angle**2))).max()
    # 2001 directions are π/2000 apart; a maximum is missed by at most its curvature times the square of that.
    assert _highest_slope(0.0, time)[1][-1] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0, 10.0])
def test_slope_bound_survives_the_steepest_paths(constant):
    """No path |p'| ≤ L0 + L1|p| in the plane has a(t) above -g + G t for t ≤ 2g/G, at any time."""
    G = constant + 1.0
    times, highest = _highest_slope(constant, 2 / G)
    assert (highest - (-1 + G * times)).max() <= 1e-9  # both are -1 at t = 0; Runge-Kutta errs by about h⁵
    assert highest[-1] - 1.0 <= -0.05


@pytest.mark.parametrize(
    ("constant", "factor", "excess"), [(0.0, 2.4, 0.2), (0.1, 2.6, 0.3), (1.0, 3.3, 0.1)]
)
def test_the_steepest_paths_break_the_slope_bound_soon_after(constant, factor, excess):
    """Given a little more time they do: the test above would see a violation of this size."""
    G = constant + 1.0
    times, highest = _highest_slope(constant, factor / G)
    assert highest[-1] - (-1 + G * times[-1]) > excess


def test_half_holds_for_gradient_steps_up_to_the_limit(instances):
    """f(x - ηg) ≤ f(x) - η‖g‖² + (L0 + L1‖g‖) η²‖g‖²/2 for η ≤ 2/(L0 + L1‖g‖), on every instance, from 1 to
    6 variables.
    """
    checked = set()
    for case in instances:
        gradient = case.gradient(case.x)
        norm = gradient.norm().item()
        eta = theory.quadratic_step_limit(norm, case.L0, case.L1) * np.linspace(0, 1, 41)
        fx, fy = case.f(case.x), case.f(case.x - torch.from_numpy(eta)[:, None] * gradient)
        excess = (fy - fx).numpy() - theory.quadratic_bound(norm, eta * norm, case.L0, case.L1)
        assert excess.max() <= case.slack(fx, fy, gradient), case.name
        checked.add(case.x.numel())
    assert checked >= {1, 2, 3, 4}


def test_half_holds_for_a_rotating_gradient():
    """eˣ cos y, whose gradient turns by up to one radian per 1/L1: every starting angle, up to radius 2/L1
    = 2g/G.
    """
    y0 = np.linspace(-math.pi, math.pi, 721)[:, None]
    radius = np.linspace(0, 2, 201)[None, :]
    moved = 1j * y0 - radius * np.exp(-1j * y0)
    change = np.exp(moved.real) * np.cos(moved.imag) - np.cos(y0)
    # All terms are below 10 in size: 1e-14 covers the rounding.
    assert (change - theory.quadratic_bound(1.0, radius, 0.0, 1.0)).max() <= 1e-14
