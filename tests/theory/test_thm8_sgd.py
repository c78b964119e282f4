"""Theorem 8 of the paper: SGD with a fixed step, gradients at most M everywhere, noise at most τ."""

import math

import numpy as np
import pytest
import sympy as sp

from gradclip import theory


def test_bounded_gradients_make_the_gradient_lipschitz():
    """‖∇²f‖ ≤ L0 + L1‖∇f‖ ≤ L0 + L1 M, on the extremal function up to gradient M."""
    t = np.linspace(0, 5, 100)
    gradient, curvature = np.expm1(t), np.exp(t)
    assert (curvature <= 1 + gradient.max() + 1e-12).all()


def test_expected_decrease_of_one_step():
    """E f(x⁺) ≤ f - h g² + (L/2) h²(g² + τ²); h ≤ 1/L leaves h g²/2. Equality on a parabola, noise ± τ."""
    x, h, L, tau = sp.symbols("x h L tau", positive=True)
    f = lambda z: L * z**2 / 2  # noqa: E731
    g = L * x
    mean = (f(x - h * (g + tau)) + f(x - h * (g - tau))) / 2
    assert sp.simplify(mean - (f(x) - h * g**2 + L * h**2 * (g**2 + tau**2) / 2)) == 0
    assert sp.simplify(-h * g**2 + L * h**2 * g**2 / 2 + h * g**2 / 2 - h * g**2 * (L * h - 1) / 2) == 0


def test_bound_follows_from_the_decrease():
    """T h ε²/4 < 2 D, with h = 1/L or h = sqrt(2D/(LT))/τ, for which T L h² τ²/2 = D."""
    D, T, L, tau, eps = sp.symbols("D T L tau epsilon", positive=True)
    h = sp.sqrt(2 * D / (L * T)) / tau
    assert sp.simplify(T * L * h**2 * tau**2 / 2 - D) == 0
    assert sp.simplify((8 * D / (h * eps**2)) ** 2 / T - 32 * L * D * tau**2 / eps**4) == 0
    assert 8 * D / (1 / L * eps**2) == 8 * L * D / eps**2


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_half_of_the_runs_meet_the_count(tau):
    """A function with gradients below M = 1: sqrt(1 + x²), L0 = 1; 400 runs with noise ± τ."""
    gap, eps = math.sqrt(10.0) - 1, 0.3
    steps = math.ceil(theory.sgd_iteration_bound(gap, eps, tau, 1.0, 1.0, 0.0))
    h = float(theory.sgd_step(gap, steps, tau, 1.0, 1.0, 0.0))
    rng = np.random.default_rng(3)
    x, done = np.full(400, 3.0), np.zeros(400, dtype=bool)
    for _ in range(steps):
        slope = x / np.sqrt(1 + x**2)
        done |= np.abs(slope) <= eps
        if done.mean() > 0.5:
            break
        x = x - h * (slope + rng.choice([-tau, tau], size=400))
    assert done.mean() > 0.5


def test_units():
    """f = α F, x = λ y leave our bound as it is; the recalled one adds [f] to [f]³/[x]⁴ and changes."""
    D, eps, tau, M, L0, L1 = 2.0, 0.1, 0.3, 4.0, 0.5, 1.5
    ours = theory.sgd_iteration_bound(D, eps, tau, M, L0, L1)
    recalled = theory.zhang_sgd_iteration_bound(D, eps, tau, M, L0, L1)
    for alpha, lam in ((10.0, 1.0), (1.0, 0.1)):
        scaled = (
            alpha * D,
            alpha * lam * eps,
            alpha * lam * tau,
            alpha * lam * M,
            alpha * lam**2 * L0,
            lam * L1,
        )
        assert theory.sgd_iteration_bound(*scaled) == pytest.approx(ours, rel=1e-13)
        assert abs(theory.zhang_sgd_iteration_bound(*scaled) / recalled - 1) > 0.5
