"""The worst case of a gradient step in more than one dimension: straight until it turns, and what follows.

The proofs of the chapter "How tight is the descent inequality?", step by step. Units L1 = 1 and ℓ = L0 in the
symbolic tests; natural units (start (-1, 0), speed limit 1 - c + c|p|) in the numerical ones.
"""

import math

import mpmath
import numpy as np
import pytest
import sympy as sp
from scipy.integrate import quad, solve_ivp
from scipy.interpolate import CubicSpline

from gradclip import theory, tightness
from gradclip.tightness import _first_zero

t, T, ell, g, rho, x, b, mu = sp.symbols("t T ell g rho x b mu", positive=True)
SHARES = (0.2, 0.5, 0.6, 0.9, 1.0)


def one_dimension(share, step):
    return theory.exact_bound_1d(1.0, step, 1 - share, share)


# The control problem


def test_the_plane_is_enough():
    """q = (⟨p, v⟩, |p across v|) has |q| = |p| and |q′| ≤ |p′|: on random p and p′ in five dimensions."""
    rng = np.random.default_rng(0)
    p, velocity = rng.normal(size=(2, 10_000, 5))

    def fold(z):
        return np.column_stack([z[:, 0], np.linalg.norm(z[:, 1:], axis=1)])

    np.testing.assert_allclose(np.linalg.norm(fold(p), axis=1), np.linalg.norm(p, axis=1), rtol=1e-14)
    change = np.linalg.norm(fold(p + 1e-6 * velocity) - fold(p), axis=1) / 1e-6
    # A difference of numbers of size 1 over 1e-6: roundings of 1e-9.
    assert (change <= np.linalg.norm(velocity, axis=1) + 1e-8).all()


# Straight until it turns: S(p, t) = α + β⟨p, v⟩ + κ|p| with β = μb, κ = μ(b - 1), μ = 1 - e^{-(T - t)}


def test_value_function_has_equality_on_the_axis():
    """On p = -ρv: S_t + w|∇S| + ⟨p, v⟩ = 0 for every ρ, and S(-gv, 0) is the worst case of one dimension."""
    m = 1 - sp.exp(-(T - t))
    alpha = ell * sp.integrate(1 - sp.exp(-(T - sp.Symbol("s"))), (sp.Symbol("s"), t, T))
    S = alpha - m * rho  # β - κ = μ
    assert sp.simplify(sp.diff(S, t) + (ell + rho) * m - rho) == 0
    worst = -g * T + (ell + g) * (sp.exp(-T) + T - 1)
    assert sp.simplify(S.subs({t: 0, rho: g}) - worst) == 0
    assert sp.simplify(S.subs(t, T)) == 0


def test_value_function_decreases_off_the_axis():
    """At angle x = cos of the angle to v, S_t + w|∇S| + ⟨p, v⟩ is concave in x; its derivative at x = -1 is
    ℓμb(b - 1)(1 - ρ/ρ_t).
    """
    m = sp.Function("m")(t)
    bb = sp.Function("b")(t)
    beta, kappa = m * bb, m * (bb - 1)
    norm = sp.sqrt(beta**2 + kappa**2 + 2 * beta * kappa * x)  # |∇S|
    F = sp.diff(beta, t) * rho * x + sp.diff(kappa, t) * rho + (ell + rho) * norm + rho * x
    # |βv + κp/|p||² from components.
    assert sp.expand((beta * x + kappa) ** 2 + beta**2 * (1 - x**2) - norm**2) == 0
    # The square root of an affine function is concave.
    second = sp.diff(norm, x, 2)
    assert sp.simplify(second + beta**2 * kappa**2 / norm**3) == 0
    slope = sp.diff(F, x).subs(x, -1)
    rho_t = sp.Symbol("rho_t", positive=True)
    riccati = {sp.diff(bb, t): (bb - 1 - m * bb**2 - ell * m * bb * (bb - 1) / rho_t) / m}
    slope = slope.subs(riccati).subs(sp.diff(m, t), m - 1)
    # |β - κ| = μ at x = -1.
    slope = slope.subs({m: mu, bb: b})
    assert sp.simplify(slope - ell * mu * b * (b - 1) * (1 - rho / rho_t)) == 0


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9, 1.0])
def test_riccati_solution_starts_at_one_and_stays_above(ratio):
    """b = 1 - (1 - ηe^{-τ}) y′/y, y as in the library, is ≥ 1 until y vanishes and solves
    μ db/dτ = 1 - b + μb² + μηb(b - 1)/(e^τ - η).

    ℓ/ρ at distance τ from the end is η/(e^τ - η), with η = ℓ/(ℓ + ρ_T).
    """
    end = 0.98 * _first_zero(ratio)

    def derivative(tau, state):
        [value] = state
        m, e = -math.expm1(-tau), math.exp(tau)
        drag = 0.0 if ratio == 0 else ratio / (e - ratio)
        return [(1 - value + m * value**2 + m * drag * value * (value - 1)) / m]

    def system(tau, state):  # the linear equation for y
        y, z = state
        return [(y + z / -math.expm1(-tau)) / (1 - ratio * math.exp(-tau)), -y]

    start = 1e-5 if ratio == 1 else 1e-4 * (1 - ratio)
    first = [1 - start, -start + start**2 / 2] if ratio == 1 else [1 - start**2 / (4 * (1 - ratio)), -start]
    options = {"method": "Radau", "rtol": 1e-9, "atol": 1e-11, "dense_output": True}
    linear = solve_ivp(system, (start, end), first, **options)
    tau = np.linspace(0.05, end, 200)
    y, z = linear.sol(tau)
    value = 1 - (y + z / -np.expm1(-tau)) / y
    assert (value >= 1).all()
    nonlinear = solve_ivp(derivative, (0.05, end), [value[0]], **options)
    # b grows to about 50 near the zero of y, where errors of 1e-9 grow with it.
    np.testing.assert_allclose(nonlinear.sol(tau)[0], value, rtol=1e-4)


def test_straight_path_has_the_smallest_norm():
    """|p|′ ≥ -(ℓ + |p|) gives |p(t)| ≥ (ℓ + g)e^{-t} - ℓ = ρ_t, the norm on the straight path."""
    r_t = (ell + g) * sp.exp(-t) - ell
    assert sp.simplify(sp.diff(r_t, t) + ell + r_t) == 0
    assert r_t.subs(t, 0) == g


def admissible_values(share, step, paths, rng):
    """∫⟨p, v⟩ for random admissible paths: directions are smooth random functions of time."""
    n = 400
    delta = step / n
    time = np.linspace(0, 1, n)
    knots = rng.normal(scale=rng.uniform(0.05, 3, size=(paths, 1)), size=(paths, 6)).cumsum(axis=1)
    angles = CubicSpline(np.linspace(0, 1, 6), knots, axis=1)(time) + rng.uniform(-1, 1, (paths, 1))
    speed = 1 - rng.uniform(0, 0.2, (paths, 1)) * rng.integers(0, 2, (paths, 1))
    p, value = np.tile([-1.0, 0.0], (paths, 1)), np.zeros(paths)
    for k in range(n):
        e = np.column_stack([np.cos(angles[:, k]), np.sin(angles[:, k])]) * speed
        middle = p + delta / 2 * (1 - share + share * np.hypot(*p.T))[:, None] * e
        p = p + delta * (1 - share + share * np.hypot(*middle.T))[:, None] * e
        value += delta * middle[:, 0]
    return value


@pytest.mark.parametrize("share", SHARES)
def test_no_path_beats_the_straight_one_before_the_turning_radius(share):
    """Random paths, and the optimised one, at the turning step and below it."""
    turning = tightness.turning_radius(1.0, 1 - share, share)  # G = g = 1: natural units
    rng = np.random.default_rng(1)
    for fraction in (0.4, 0.8, 1.0):
        step = fraction * turning
        exact = one_dimension(share, step)
        # Midpoint rule with 400 pieces: (1.6/400)² times derivatives of size 1.
        assert admissible_values(share, step, 500, rng).max() <= exact + 2e-5
        found = tightness.transcribed_value(share, step, pieces=64)
        # 64 pieces, (1.7/64)² · 1/4; near the origin the kink of the speed limit costs as much again.
        assert exact - 5e-4 <= found <= exact + 5e-4


@pytest.mark.parametrize("share", SHARES)
def test_a_turned_path_is_better_beyond_the_turning_radius(share):
    """At 1.3 times the turning step the optimised path is better than the straight one, by a margin."""
    step = 1.3 * tightness.turning_radius(1.0, 1 - share, share)
    coarse, fine = (tightness.transcribed_value(share, step, pieces=n) for n in (64, 128))
    curve = tightness.worst_curve(share, longest=step, density=4)
    margin = float(curve(step)) - one_dimension(share, step)
    assert margin > 1e-7
    # At small shares the paths pass the origin closely, and only the curve sees the small margin.
    if share >= 0.5:
        assert (4 * fine - coarse) / 3 - one_dimension(share, step) > margin / 2 > 1e-4


def test_jacobi_equation_is_that_of_the_second_variation():
    """With ψ the angle of p to -v, δJ = -½∫(Kψ′² - ρψ²), K = ρ²μ/w. In y = ρψ and the distance τ from the end
    the Jacobi equation (Kψ′)′ + ρψ = 0 is (μ((1 - ηe^{-τ})y′ - y))′ + y = 0, the one of the library.
    """
    tau, eta, omega = sp.symbols("tau eta omega", positive=True)
    y = sp.Function("y")(tau)
    w = omega * sp.exp(tau)  # ℓ = 1, w = 1 + ρ, η = 1/ω
    radius, m = w - 1, 1 - sp.exp(-tau)
    psi = y / radius
    K = radius**2 * m / w
    jacobi = sp.diff(K * sp.diff(psi, tau), tau) + radius * psi
    library = sp.diff(m * ((1 - eta * sp.exp(-tau)) * sp.diff(y, tau) - y), tau) + y
    assert sp.simplify(jacobi - library.subs(eta, 1 / omega)) == 0


def test_second_variation_is_that_of_the_value():
    """The true change of ∫⟨p, v⟩ along ρ′ = -√(w² - ρ²ψ′²) with ψ = εf(t), against -½ε²∫(Kf′² - ρf²)."""
    length, epsilon, share = 1.2, 1e-3, 0.8

    def f(s):
        return math.sin(s) * s, math.cos(s) * s + math.sin(s)

    def derivative(s, state):
        size, _ = state
        angle, rate = (epsilon * part for part in f(s))
        w = 1 - share + share * size
        return [-math.sqrt(w**2 - (size * rate) ** 2), -size * math.cos(angle)]

    bent = solve_ivp(derivative, (0, length), [1.0, 0.0], method="DOP853", rtol=1e-13, atol=1e-15).y[1, -1]
    change = bent - one_dimension(share, length)

    def integrand(s):
        angle, rate = f(s)
        w = math.exp(-share * s)
        size = (w - 1 + share) / share
        K = size**2 / w * -math.expm1(-share * (length - s)) / share
        return K * rate**2 - size * angle**2

    # Terms of fourth order: ε² relative; the integration's 1e-13 over ε² = 1e-6 is 1e-7.
    assert change == pytest.approx(-(epsilon**2) / 2 * quad(integrand, 0, length)[0], rel=1e-4)


def test_first_zero_comes_earlier_the_closer_the_end_is_to_the_origin():
    """τ*(η) decreases, and so 1 + u = e^{τ*}/η does: each u > u_c has one turning radius, below ln(1 + u)."""
    ratio = np.linspace(0.02, 1, 50)
    zeros = np.array([_first_zero(float(r)) for r in ratio])
    assert (np.diff(zeros) < 0).all()
    assert (zeros[:-1] < np.log(np.exp(zeros[:-1]) / ratio[:-1])).all()
    # The Riccati equation depends on η through η/(e^τ - η) alone, which increases, times b(b - 1) ≥ 0.
    eta, tau = sp.symbols("eta tau", positive=True)
    drag = eta / (sp.exp(tau) - eta)
    assert sp.simplify(sp.diff(drag, eta) - sp.exp(tau) / (sp.exp(tau) - eta) ** 2) == 0


def test_turning_radius_without_L0_is_a_zero_of_a_conical_function():
    """L0 = 0: with x = 2e^τ - 1 the Jacobi equation is Legendre's of degree -1/2 + i√3/2."""
    z = sp.Symbol("z", positive=True)
    psi = sp.Function("psi")
    tau = sp.Symbol("tau", positive=True)
    value = psi(2 * sp.exp(tau) - 1)
    jacobi = sp.diff((sp.exp(tau) - 1) * sp.diff(value, tau), tau) + sp.exp(tau) * value
    legendre = sp.diff((z**2 - 1) * sp.diff(psi(z), z), z) + psi(z)
    assert (
        sp.simplify(jacobi.doit().subs(tau, sp.log((z + 1) / 2)).doit() - (z + 1) / 2 * legendre).simplify()
        == 0
    )
    degree = sp.Rational(-1, 2) + sp.sqrt(3) / 2 * sp.I
    assert sp.simplify(degree * (degree + 1) + 1) == 0
    # mpmath's Legendre function is the oracle.
    order = mpmath.mpc(-0.5, mpmath.sqrt(3) / 2)
    zero = mpmath.findroot(
        lambda s: mpmath.re(mpmath.legenp(order, 0, s, type=3)), (8, 10), solver="anderson"
    )
    assert all(
        mpmath.re(mpmath.legenp(order, 0, s, type=3)) > 0 for s in np.linspace(1.01, float(zero) - 0.01, 60)
    )
    assert tightness.turning_radius(1.0, 0.0, 1.0) == pytest.approx(
        float(mpmath.log((1 + zero) / 2)), rel=1e-9
    )


def test_critical_size_is_a_zero_of_a_hypergeometric_function():
    """A path that ends at the origin: y = Σ aₖ(-ξ)ᵏ, ξ = w - 1, a_{k+1}/aₖ = (k² - k + 1)/(k + 1)²."""
    xi = sp.Symbol("xi")
    a = [sp.Integer(1)]
    for k in range(12):
        a.append(a[-1] * sp.Rational(k**2 - k + 1, (k + 1) ** 2))
    y = sum(coefficient * (-xi) ** k for k, coefficient in enumerate(a))
    # w d/dw[((w - 1)/w)((w - 1)y′ - y)] + y = 0, multiplied out by w.
    inner = xi * (xi * sp.diff(y, xi) - y)
    left = sp.expand((1 + xi) * sp.diff(inner, xi) - inner + (1 + xi) * y)
    assert all(left.coeff(xi, k) == 0 for k in range(12))
    # (k + e^{2πi/3})(k + e^{-2πi/3}) = k² - k + 1.
    k = sp.Symbol("k")
    third = sp.exp(2 * sp.pi * sp.I / 3)
    assert sp.simplify(sp.expand_complex((k + third) * (k + sp.conjugate(third)) - (k**2 - k + 1))) == 0
    root = mpmath.expjpi(mpmath.mpf(2) / 3)
    value = mpmath.findroot(
        lambda s: mpmath.re(mpmath.hyp2f1(root, root.conjugate(), 1, -s)), (1, 2), solver="anderson"
    )
    assert tightness.critical_size() == pytest.approx(float(value), rel=1e-8)


def test_a_detour_around_the_origin_saves_time():
    """From (-1, 0) to (1, 0) with speed 1 + |p|: for small k, over (0, k) is faster than over the origin."""

    def duration(k):
        def pace(s):
            return math.sqrt(1 + k**2) / (1 + math.hypot(s, k * (1 - s)))

        return 2 * quad(pace, 0, 1, points=[k], epsabs=1e-14, epsrel=1e-13, limit=200)[0]

    straight = 2 * math.log(2)
    saved = [straight - duration(k) for k in (1e-2, 1e-3, 1e-4)]
    assert min(saved) > 0
    # Per k² the saving grows like ln(1/k), without bound: for ten times smaller k by ln 10.
    per_square = [s / k**2 for s, k in zip(saved[:2], (1e-2, 1e-3), strict=True)]
    assert per_square[1] - per_square[0] == pytest.approx(math.log(10), rel=0.05)


# What functions attain


def family(share, d, B):
    """f, its gradient (as a complex number) and Hessian norm, for f = Re(A e^{cdz}/(cd) + Bz)."""
    A = -1 - B

    def f(z):
        return (A * np.exp(share * d * z) / (share * d) + B * z).real

    return (
        f,
        lambda z: np.conj(A * np.exp(share * d * z) + B),
        lambda z: share * np.abs(A * np.exp(share * d * z)),
    )


@pytest.mark.parametrize("share", SHARES)
def test_rotating_functions_are_in_the_class_and_attain_the_bound(share):
    rng = np.random.default_rng(2)
    most = (1 - share) / share
    for step in (1.0, 2.0, 3.0):
        best = -math.inf
        for phase in np.linspace(0, np.pi, 721):
            d = np.exp(1j * phase)
            moved = np.expm1(share * step * d) / (share * d)
            B = most * np.exp(-1j * np.angle(step - moved))
            f, gradient, hessian = family(share, d, B)
            assert gradient(0.0) == pytest.approx(-1)
            z = rng.normal(size=20) + 1j * rng.normal(size=20)
            # Equality is possible, so roundings of numbers up to e⁴ remain.
            assert (hessian(z) <= 1 - share + share * np.abs(gradient(z)) + 1e-12).all()
            best = max(best, f(step) - f(0.0))  # the step goes against the gradient, to the right
        # 721 angles instead of 3601: 4e-3 off the maximum costs (4e-3)² times curvatures up to 20.
        assert tightness.rotating_bound(share, step) == pytest.approx(best, abs=5e-4)


def test_gradient_and_hessian_of_the_family_are_what_they_say():
    """Finite differences of f, which share nothing with the formulas."""
    f, gradient, hessian = family(0.7, np.exp(2.2j), 0.3 - 0.2j)
    z, h = 0.4 - 0.3j, 1e-4
    assert (f(z + h) - f(z - h)) / (2 * h) == pytest.approx(gradient(z).real, abs=1e-7)
    assert (f(z + 1j * h) - f(z - 1j * h)) / (2 * h) == pytest.approx(gradient(z).imag, abs=1e-7)
    xx = (f(z + h) - 2 * f(z) + f(z - h)) / h**2
    yy = (f(z + 1j * h) - 2 * f(z) + f(z - 1j * h)) / h**2
    xy = (f(z + h + 1j * h) - f(z + h - 1j * h) - f(z - h + 1j * h) + f(z - h - 1j * h)) / (4 * h**2)
    # Roundings of 1e-16/h² = 1e-8, and h².
    assert np.linalg.norm([[xx, xy], [xy, yy]], 2) == pytest.approx(hessian(z), abs=1e-6)


@pytest.mark.parametrize("share", SHARES)
def test_family_has_the_one_dimensional_worst_case_before_the_slope_vanishes(share):
    vanishes = -math.log1p(-share) / share if share < 1 else 3.0
    steps = np.linspace(0.1, min(0.99 * vanishes, 1.2), 12)
    np.testing.assert_allclose(
        tightness.rotating_bound(share, steps), one_dimension(share, steps), rtol=1e-12
    )


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_no_function_exceeds_the_control_value(share):
    """The two bounds are made by different means: attained ≤ worst."""
    curve = tightness.worst_curve(share, longest=4.0, density=6)
    steps = np.linspace(0, 4, 81)
    assert (tightness.rotating_bound(share, steps) <= curve(steps) + 1e-3).all()


def test_random_functions_stay_below_the_control_value(instances):
    """The functions of the other chapters, with steps up to 4/G."""
    curves = {share: tightness.worst_curve(share, longest=4.0, density=4) for share in (0.3, 0.6, 0.9, 1.0)}
    checked = 0
    for case in instances:
        gradient = case.gradient(case.x)
        norm = gradient.norm().item()
        own = case.L1 * norm / (case.L0 + case.L1 * norm)
        if own < 0.3:
            continue
        # A larger L0 is a constant of the same function: it lowers the share to one that has a curve.
        share = max(s for s in curves if s <= own + 1e-12)
        G = case.L1 * norm / share
        for step in (1.0, 1.7, 2.5, 4.0):
            change = (case.f(case.x - step / G * gradient) - case.f(case.x)).item()
            slack = case.slack(case.f(case.x)) * G / norm**2
            # density 4 interpolates to 1e-2 where the value is 9.
            assert change * G / norm**2 <= float(curves[share](step)) + 0.02 + slack, case.name
            checked += 1
    assert checked >= 200


def test_a_constant_bend_helps_from_1_793_on():
    """L0 = 0: straight lines ζ at a small angle to the axis beat the axis if e^{-t}(t² + t + 1) < 1."""
    z = sp.Symbol("z", positive=True)
    bend = sp.Symbol("epsilon", positive=True)
    d = -sp.exp(sp.I * bend)
    change = -(sp.exp(z * d) - 1) / d
    second = sp.diff(change, bend, 2).subs(bend, 0)
    assert sp.simplify(sp.re(second) - (1 - sp.exp(-z) * (z**2 + z + 1))) == 0
    for length, helps in ((1.75, False), (1.84, True)):
        assert (tightness.rotating_bound(1.0, length) > one_dimension(1.0, length) + 1e-9) == helps


# Why no function attains it: along a whole segment at full speed, the gradient of a function is a geodesic


def test_hessian_along_a_path_of_full_speed_is_a_reflection():
    """|H v| = w = ‖H‖ forces H e = w v for the direction e of H v: H² v = w² v, as w² is the largest
    eigenvalue of H². Then H moves the normal n = (0, 1) to w(sin θ, -cos θ), across the path, at full speed.
    """
    theta, w, h = sp.symbols("theta w h", real=True)
    e = sp.Matrix([sp.cos(theta), sp.sin(theta)])
    H = sp.Matrix([[w * sp.cos(theta), w * sp.sin(theta)], [w * sp.sin(theta), h]])
    [solution] = sp.solve((H * e)[1], h)  # H e ∥ v
    assert sp.simplify(solution + w * sp.cos(theta)) == 0
    H = H.subs(h, solution)
    assert sp.simplify(H * e - sp.Matrix([w, 0])) == sp.zeros(2, 1)
    normal = H * sp.Matrix([0, 1])
    assert sp.simplify(normal.dot(e)) == 0
    assert sp.simplify(normal.dot(normal) - w**2) == 0


def test_pontryagin_paths_are_not_geodesics():
    """In the metric |dp|/w a path has curvature θ′ + c⟨e⊥, p/|p|⟩; for Pontryagin's it is sin θ/|λ| > 0."""
    for share, height in ((1.0, 0.5), (0.7, 0.3), (0.5, 1.0)):
        path = tightness.worst_path(share, height, samples=4001)
        inner = slice(200, -200)  # θ is a difference quotient, and |λ| vanishes at the end
        theta = np.arctan2(path.costate[:, 1], path.costate[:, 0])
        p = path.gradient
        across = (-np.sin(theta) * p[:, 0] + np.cos(theta) * p[:, 1]) / np.hypot(*p.T)
        curvature = np.gradient(theta, path.time) + share * across
        expected = np.sin(theta) / np.hypot(*path.costate.T)
        # Central differences with 1e-3 between samples.
        np.testing.assert_allclose(curvature[inner], expected[inner], atol=1e-4)
        assert expected[:-1].min() > 0


def test_the_path_of_a_rotating_exponential_is_a_geodesic():
    """L0 = 0: p = -e^{ζ} with ζ linear, a straight line in the logarithm, has curvature 0."""
    time = np.linspace(0, 2, 2001)
    p = -np.exp(time * np.exp(2.0j))
    velocity = np.gradient(p, time)
    theta = np.unwrap(np.angle(velocity))
    e = velocity / np.abs(velocity)
    across = (np.conj(1j * e) * p).real / np.abs(p)
    curvature = np.gradient(theta, time) + across
    np.testing.assert_allclose(curvature[5:-5], 0, atol=1e-5)


def test_curved_paths_break_the_two_point_inequality_of_lipschitz_gradients():
    """An independent oracle, for L1 = 0: every f with an L-Lipschitz gradient obeys
    f(y) - f(x) - ½⟨p(x) + p(y), y - x⟩ ≤ (L/4)|y - x|² - |p(y) - p(x)|²/(4L).

    Paths of full speed obey it if they are straight, and only then.
    """

    def excess(curvature, turn, length=0.5):
        def angle(s):
            return turn + curvature * s

        a, b = (
            quad(lambda s: math.cos(angle(s)), 0, length)[0],
            quad(lambda s: math.sin(angle(s)), 0, length)[0],
        )
        # ∫(slope) - length·(mean of its ends) = ∫ slope′ (length/2 - s) ds
        left = quad(lambda s: math.cos(angle(s)) * (length / 2 - s), 0, length, epsabs=1e-15)[0]
        return abs(left) - (length**2 - a**2 - b**2) / 4  # from either end

    for turn in (0.3, 1.2, 2.5):
        assert excess(0.0, turn) <= 1e-15
        assert excess(0.3, turn) > 1e-4
        assert excess(-0.3, turn) > 1e-4


# Small gradients


def test_parabola_is_crossed_at_2_plus_cube_roots_for_small_gradients():
    """L0 = L1 = 1, radius xu, u → 0: (W - Q)/u³ → (x³ - 6x² + 6x - 2)/6, zero at 2 + ∛2 + ∛4."""
    u, s = sp.symbols("u s", positive=True)
    r0 = sp.log(1 + u)

    def phi(z):
        return sp.exp(z) - z - 1

    gap = phi(s * u - r0) - phi(r0) + u * (s * u) - (1 + u) * (s * u) ** 2 / 2
    leading = sp.series(gap, u, 0, 4).removeO().coeff(u, 3)
    assert sp.simplify(leading - (s**3 - 6 * s**2 + 6 * s - 2) / 6) == 0
    assert all(sp.simplify(sp.series(gap, u, 0, 4).removeO().coeff(u, k)) == 0 for k in (0, 1, 2))
    zero = 2 + sp.cbrt(2) + sp.cbrt(4)
    assert sp.simplify(sp.expand(zero**3 - 6 * zero**2 + 6 * zero - 2)) == 0
    # In the plane as well, as far as the solver goes: u = 1/19.
    assert tightness.worst_curve(0.05, density=4).half_limit() == pytest.approx(float(zero), abs=0.1)


# Exactness, first integrals


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_first_integral_and_value_of_pontryagin_paths(share):
    """w|λ| + ⟨p, v⟩ is constant; ⟨λ, p⟩′ = (1 - c)|λ| - ⟨p, v⟩ gives the value ⟨λ(0), p(0)⟩ + (1 - c)∫|λ|."""
    path = tightness.worst_path(share, 0.6, samples=2001)
    np.testing.assert_allclose(path.hamiltonian(share), path.end[0], atol=1e-8)
    pull = np.hypot(*path.costate.T)
    integral = np.trapezoid(pull, path.time)
    value = path.costate[0] @ path.gradient[0] + (1 - share) * integral
    assert value == pytest.approx(path.value, abs=1e-5)  # trapezoids of width 1e-3


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_final_slope_is_the_derivative_of_the_value(share):
    """The Hamiltonian is the derivative of the value in the length: from neighbouring paths."""
    first, second = (tightness.worst_path(share, height, samples=2) for height in (0.500, 0.501))
    quotient = (second.value - first.value) / (second.step - first.step)
    mean = (first.end[0] + second.end[0]) / 2
    assert quotient == pytest.approx(mean, abs=1e-5)  # second order in a difference of 1e-3
