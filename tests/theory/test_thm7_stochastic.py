"""Theorem 7 of the paper with the step corrected: clipped descent with unbiased gradients, noise at most τ.

κ = 16 and C = κ² φ(1/κ): a step is never longer than 1/(κ L1), and on that radius φ(t) ≤ C t².
"""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradclip import theory

C = 256 * float(theory.phi(1 / 16))
sizes = st.floats(-4, 4).map(lambda e: 10.0**e)
R = sp.Rational


def test_steps_are_short_and_phi_is_nearly_quadratic_there():
    """h ‖∇̂f‖ ≤ 1/(16 L1), and C = 0.5106 < 0.511 < 5/9."""
    assert C < 0.511 < 5 / 9
    norms = np.logspace(-6, 6, 61)
    for lr in (1e-3, 1.0, 1e3):
        length = theory.stochastic_step(norms, lr, 0.3, 2.0) * norms
        assert (length <= 1 / 32 * (1 + 2**-50)).all()
    t = np.linspace(1e-6, 1 / 16, 200)
    assert (theory.phi(t) <= C * t**2 * (1 + 2**-50)).all()


def test_short_gradients_constants():
    """16 η L1 (g + 2τ) ≤ 1: the step is η. Its loss, C η G (g² + τ²) η, leaves 9/10 of η g² and adds V η² τ².

    ηG ≤ 1/20 + 1/16. Young: C L1 g η² τ² ≤ η g²/24 + 6 C² η³ L1² τ⁴, and η L1 τ ≤ 1/128.
    """
    c = R(511, 1000)
    assert c * (R(1, 20) + R(1, 16)) + R(1, 24) <= R(1, 10)
    assert 6 * c**2 / 128 <= R(1, 80)
    assert c <= R(5, 9)
    a, b = sp.symbols("a b", real=True)
    assert sp.expand(a**2 / 24 + 6 * b**2 - a * b - (a - 12 * b) ** 2 / 24) == 0


def test_long_gradients_constants():
    """16 η L1 (g + 2τ) > 1: then g > 3/(64 η L1), τ < g/6, and every step gains at least 9 g/(256 L1)."""
    c = R(511, 1000)
    assert 1 - 2 * R(16, 128) == R(3, 4)  # 16 η L1 g > 1 - 32 η L1 τ ≥ 3/4
    assert R(1, 128) / R(3, 64) == R(1, 6)  # τ ≤ 1/(128 η L1) < g/6
    assert 16 * (1 + R(2, 6)) == R(64, 3)  # h ≥ 1/(16 L1 (g + 2τ)) ≥ 3/(64 L1 g)
    # ⟨∇f, ∇̂f⟩ ≥ (5/6) g²; second order: L1 g part C/16 · 7/6, L0 part C/20 · 49/36.
    assert R(5, 6) - c / 16 * R(7, 6) - c / 20 * R(49, 36) >= R(3, 4)
    assert R(3, 4) * R(3, 64) == R(9, 256)


def test_bound_follows_from_the_decrease():
    """T m/2 < 2 D with m = min{(9/10) η ε², 9 ε/(256 L1)} and the three entries of η."""
    assert 4 / R(9, 10) * 20 <= 90
    assert 4 / R(9, 10) * 128 <= 570
    assert 4 * R(256, 9) <= 114
    assert (4 / R(9, 10)) ** 2 <= 20
    V, tau, D, T, eps = sp.symbols("V tau D T epsilon", positive=True)
    eta = sp.sqrt(D / (V * T)) / tau
    assert sp.simplify(T * V * eta**2 * tau**2 - D) == 0
    # T < 4 D/(0.9 η ε²) with this η, squared and divided by T:
    assert (
        sp.simplify((4 * D / (R(9, 10) * eta * eps**2)) ** 2 / T - (R(40, 9) ** 2) * V * D * tau**2 / eps**4)
        == 0
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, sizes, sizes)
def test_learning_rate_obeys_its_three_limits(gap, steps, noise, constant, rate):
    eta = theory.stochastic_lr(gap, steps, noise, constant, rate)
    V = 5 / 9 * constant + rate * noise / 80
    limits = (1 / (20 * constant), 1 / (128 * rate * noise), math.sqrt(gap / (V * steps)) / noise)
    assert eta == pytest.approx(min(limits), rel=2**-48)


def noises(rng, dim, tau):
    """A random unbiased noise with four values, none longer than τ: values and probabilities."""
    values = rng.normal(size=(3, dim))
    weights = rng.dirichlet(np.ones(3))
    last = rng.uniform(0.1, 0.9)
    values = np.vstack([values, -(1 - last) / last * weights @ values])
    return values * tau / np.linalg.norm(values, axis=1).max(), np.append((1 - last) * weights, last)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), seed=st.integers(0, 2**32), tau=st.floats(-2, 1), share=st.floats(0.02, 1))
def test_expected_decrease_of_one_step_on_random_functions(instances, data, seed, tau, share):
    """E f(x⁺) ≤ f(x) - min{(9/10) η g², 9 g/(256 L1)} + V η² τ², the expectation summed over the noise."""
    case = data.draw(st.sampled_from([case for case in instances if case.L1 > 0]))
    rng = np.random.default_rng(seed)
    tau, L0, L1 = 10**tau, max(case.L0, 1e-3), case.L1
    eta = share * min(1 / (20 * L0), 1 / (128 * L1 * tau))
    values, weights = noises(rng, case.x.numel(), tau)
    assert weights @ values == pytest.approx(np.zeros(case.x.numel()), abs=1e-12 * tau)
    gradient = case.gradient(case.x)
    noisy = gradient + torch.from_numpy(values)
    step = theory.stochastic_step(noisy.norm(dim=-1).numpy(), eta, tau, L1)
    after = case.f(case.x - torch.from_numpy(step)[:, None] * noisy)
    g = gradient.norm().item()
    V = 5 / 9 * L0 + L1 * tau / 80
    bound = case.f(case.x).item() - min(0.9 * eta * g**2, 9 * g / (256 * L1)) + V * eta**2 * tau**2
    assert weights @ after.numpy() <= bound + case.slack(after, case.f(case.x))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0.3, 3), st.floats(0.3, 3), st.floats(0.01, 3), st.floats(0.1, 1), st.integers(0, 2**32))
def test_half_of_the_runs_meet_the_count(L0, L1, tau, share, seed):
    """Extremal function, noise ± τ, 200 runs of the guaranteed length: half see a gradient ≤ ε."""
    eps = share * L0 / L1
    x = np.full(200, 3.0 / L1)
    gap = float(theory.gap_bound(L0 / L1 * math.expm1(3.0), L0, L1))
    steps = math.ceil(theory.stochastic_iteration_bound(gap, eps, tau, L0, L1))
    eta = float(theory.stochastic_lr(gap, steps, tau, L0, L1))
    rng = np.random.default_rng(seed)
    done = np.zeros(200, dtype=bool)
    for _ in range(min(steps, 3000)):
        slope = np.sign(x) * L0 / L1 * np.expm1(L1 * np.abs(x))
        done |= np.abs(slope) <= eps
        if done.mean() > 0.5:
            break
        noisy = slope + rng.choice([-tau, tau], size=200)
        x = x - np.minimum(eta, 1 / (16 * L1 * (np.abs(noisy) + tau))) * noisy
    assume(steps <= 3000 or done.mean() > 0.5)
    assert done.mean() > 0.5


def test_printed_step_is_refuted_by_a_run_that_never_ends():
    """h = min{1/(16 η L1 (‖∇̂f‖ + τ)), η} for T = 10⁶, L0 = L1 = 1, τ = 0.01, from gradient 1/(16 η² L1) on.

    η = 1/sqrt(T) = 0.001, so a step may be 62 units long where 1/L1 = 1: the first one overshoots to a slope
    of e⁵⁰ or so, and the next ones jump back and forth.
    """
    T, tau = 10**6, 0.01
    eta = min(1 / 20, 1 / (128 * tau), 1 / math.sqrt(T))
    rng = np.random.default_rng(0)
    least = {}
    for rule in (theory.zhang_stochastic_step, theory.stochastic_step):
        x = math.log1p(1 / (16 * eta**2))
        slopes = []
        for _ in range(20_000):
            slope = math.copysign(math.expm1(abs(x)), x)
            slopes.append(abs(slope))
            noisy = slope + rng.choice([-tau, tau])
            x -= float(rule(abs(noisy), eta, tau, 1.0)) * noisy
        least[rule] = min(slopes)
    assert least[theory.zhang_stochastic_step] > 1e3
    assert least[theory.stochastic_step] < 0.02


@pytest.mark.parametrize(("alpha", "lam"), [(0.1, 0.2), (0.1, 5.0), (10.0, 0.2), (10.0, 5.0)])
def test_units_of_the_printed_step_are_refuted_and_those_of_the_corrected_one_hold(alpha, lam):
    """f = α F, x = λ y: gradients times α λ, L0 times α λ², L1 times λ, steps divided by α λ²."""
    noisy, tau, L1, eta = 3.0, 0.2, 1.5, 0.4
    scaled = (alpha * lam * noisy, eta / (alpha * lam**2), alpha * lam * tau, lam * L1)
    right = theory.stochastic_step(noisy, eta, tau, L1) / (alpha * lam**2)
    assert theory.stochastic_step(*scaled) == pytest.approx(right, rel=2**-48)
    printed = theory.zhang_stochastic_step(noisy, eta, tau, L1) / (alpha * lam**2)
    assert abs(theory.zhang_stochastic_step(*scaled) / printed - 1) > 0.1
    bound = theory.stochastic_iteration_bound(2.0, 0.1, tau, 0.7, L1)
    scaled = (2.0 * alpha, 0.1 * alpha * lam, tau * alpha * lam, 0.7 * alpha * lam**2, L1 * lam)
    assert theory.stochastic_iteration_bound(*scaled) == pytest.approx(bound, rel=1e-13)


def test_M_does_not_enter():
    """The leading term of clipped descent has V = (5/9) L0 + L1 τ/80 where SGD's has L0 + L1 M."""
    clipped = theory.stochastic_iteration_bound(1.0, 1e-6, 1.0, 1.0, 1.0)
    plain = [theory.sgd_iteration_bound(1.0, 1e-6, 1.0, M, 1.0, 1.0) for M in (1.0, 1e3)]
    assert clipped < plain[0] < plain[1] / 400
