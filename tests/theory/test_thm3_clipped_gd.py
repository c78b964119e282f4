"""Theorem 3 of the paper: clipped descent with η = 1/(10 L0) and γη = min{1, 1/(10 L1)}."""

import math

import numpy as np
import pytest
import sympy as sp
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradclip import theory

checked = settings(max_examples=300, deadline=None, derandomize=True)
sizes = st.floats(-6, 6).map(lambda e: 10.0**e)


@checked
@given(sizes, sizes, sizes)
def test_step_is_at_most_a_fifth_of_one_over_G(norm, constant, rate):
    """h L0 ≤ 1/10 and h L1 g ≤ L1 γη ≤ 1/10."""
    step = theory.zhang_clipped_step(norm, constant, rate)
    assert step * constant <= 0.1 * (1 + 2**-50)
    assert step * rate * norm <= 0.1 * (1 + 2**-50)


@checked
@given(sizes, sizes, sizes)
def test_step_is_the_papers_minimum(norm, constant, rate):
    """min{η, γη/g} with the paper's η and γ, written as it is printed."""
    eta = 1 / (10 * constant)
    gamma = min(1 / eta, 1 / (10 * rate * eta))
    expected = min(eta, gamma * eta / norm)
    assert theory.zhang_clipped_step(norm, constant, rate) == pytest.approx(expected, rel=2**-48)


def test_decrease_of_both_kinds_of_steps():
    """h G ≤ 1/5 keeps 9/10 of h g²: (9/100) g²/L0 unclipped; clipped, h g = ρ and g ≥ 10 L0 ρ: 9 L0 ρ²."""
    h, g, G, L0, rho = sp.symbols("h g G L0 rho", positive=True)
    kept = 1 - h * G / 2
    assert kept.subs(h, 1 / (5 * G)) == sp.Rational(9, 10)
    assert sp.Rational(9, 10) * (1 / (10 * L0)) * g**2 == sp.Rational(9, 100) * g**2 / L0
    assert sp.simplify(sp.Rational(9, 10) * rho * (10 * L0 * rho) - 9 * L0 * rho**2) == 0


@checked
@given(sizes, sizes, sizes, st.floats(1e-6, 1))
def test_decrease_is_at_least_what_the_bound_divides_by(norm, constant, rate, share):
    """For g > ε, h g²(1 - hG/2) is at least min{9 ε²/(100 L0), 9 L0/max{1, 100 L1²}}."""
    eps = share * norm
    step = theory.zhang_clipped_step(norm, constant, rate)
    decrease = step * norm**2 * (1 - step * (constant + rate * norm) / 2)
    least = 1 / theory.clipped_iteration_bound(1.0, eps, constant, rate)
    assert decrease >= least * (1 - 2**-48)
    expected = min(9 * eps**2 / (100 * constant), 9 * constant / max(1, 100 * rate**2))
    assert least == pytest.approx(expected, rel=2**-48)


@checked
@given(sizes, sizes, sizes, sizes)
def test_bound_is_below_the_recalled_one(gap, eps, constant, rate):
    """100/9 < 20, the maximum of two is below their sum, and max{1/100, L1²} ≤ max{1, L1²}."""
    ours = theory.clipped_iteration_bound(gap, eps, constant, rate)
    recalled = theory.zhang_clipped_iteration_bound(gap, eps, constant, rate)
    assert ours <= 100 / 9 / 20 * recalled * (1 + 2**-48)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_counts_stay_below_the_bound_on_random_functions(bounded, data):
    case = data.draw(st.sampled_from([case for case in bounded if case.L0 > 0]))
    x, start = case.x, case.gradient(case.x).norm().item()
    assume(start > 0)
    eps = start * 10 ** data.draw(st.floats(-1, -0.1))
    limit = float(theory.clipped_iteration_bound(case.f(x).item() - case.f_star, eps, case.L0, case.L1))
    assume(limit <= 800)
    t, gradient = 0, case.gradient(x)
    while (norm := gradient.norm().item()) > eps:
        x = x - float(theory.zhang_clipped_step(norm, case.L0, case.L1)) * gradient
        t, gradient = t + 1, case.gradient(x)
        assert t < limit


def test_units_of_the_recalled_bound_are_refuted_by_a_change_of_scale():
    """x = λ y turns (L0, L1, ε) into (λ² L0, λ L1, λ ε) and D into D, and a count stays what it is.

    The bound for S7 is invariant. The paper's is not: max{1, L1²} compares a squared inverse length with 1.
    """
    for scale in (0.01, 100.0):
        scaled = (3.0, scale * 0.2, scale**2 * 0.5, scale * 0.7)
        assert theory.iteration_bound(*scaled) == pytest.approx(
            theory.iteration_bound(3.0, 0.2, 0.5, 0.7), rel=1e-13
        )
    small = theory.zhang_clipped_iteration_bound(3.0, 0.01 * 0.2, 0.01**2 * 0.5, 0.01 * 0.7)
    assert small > 100 * theory.zhang_clipped_iteration_bound(3.0, 0.2, 0.5, 0.7)


def test_fewer_steps_than_any_fixed_step_as_printed_is_refuted_for_small_gradients():
    """With the paper's constants, L0 = L1 = 1 and M = 50: on the slow function clipping steps by 1/(10 L0).

    Some fixed step, 0.99 of the largest that does not diverge, needs fewer on both hard functions.
    """
    L0 = L1 = 1.0
    M, eps = 50.0, 0.1
    gap = float(theory.gap_bound(M, L0, L1))
    slope = 1.001 * eps
    fixed = 0.99 * 2 * float(theory.exact_step_1d(M, L0, L1))
    a = 1.5 * slope / L0
    length = gap / slope - 5 / 8 * a  # from a to the start, where the gap is D

    def slow(h):
        return math.ceil(length / (h * slope))

    clipped = slow(float(theory.zhang_clipped_step(slope, L0, L1)))
    x, t = math.log1p(M), 0
    while abs(math.expm1(abs(x))) > eps:  # the extremal function, fixed step
        x -= fixed * math.copysign(math.expm1(abs(x)), x)
        t += 1
    # The slow function needs a few steps more below a, at most 20 with this step.
    assert max(t, slow(fixed) + 20) < 0.7 * clipped


def test_printed_minimum_is_below_the_certified_step_everywhere():
    """The paper's step is shorter than the guaranteed-best 1/(L0 + L1 g) by a factor from 5 upwards."""
    norms = np.logspace(-4, 4, 81)
    ratio = theory.quadratic_step(norms, 1.0, 1.0) / theory.zhang_clipped_step(norms, 1.0, 1.0)
    assert ratio.min() == pytest.approx(5.0, rel=1e-3)
    assert ratio.max() == pytest.approx(10.0, rel=1e-3)
