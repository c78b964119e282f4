"""Polyak's step (f - f*)/g² clips by itself, and on convex functions it has a count without M."""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import problems, theory

sizes = st.floats(-4, 4).map(lambda e: 10.0**e)
CONVEX = [
    (problems.quadratic((0.3, 5.0), seed=1), 0.0),
    (problems.quartic(), 1.0),
    (problems.cosh(), 1.0),
    (problems.extremal(L0=0.5, L1=2.0, dim=2), 2.0),
    (problems.power(6, dim=3), 0.7),
    (problems.ramp(0.2, 1.5), 0.0),
]


def test_step_is_at_least_half_the_step_of_S7(bounded):
    """(f - f*)/g² ≥ Ψ(g)/g² ≥ 1/(2(L0 + L1 g)), at random points of random functions."""
    rng = np.random.default_rng(2)
    seen = 0
    for case in bounded:
        x = case.x + torch.from_numpy(rng.normal(size=(10, case.x.numel())))
        norms = case.gradient(x).norm(dim=-1).numpy()
        keep = norms > 1e-2
        gap = np.maximum(case.f(x).numpy() - case.f_star, 0.0)[keep]
        step = theory.polyak_step(norms[keep], gap)
        least = theory.quadratic_step(norms[keep], case.L0, case.L1) / 2
        # The gap is a difference of values; divided by g² ≥ 1e-4.
        assert (step - least >= -case.slack(case.f(x)) / norms[keep] ** 2).all(), case.name
        seen += keep.sum()
    assert seen > 500


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes, sizes, sizes)
def test_half_of_S7_is_at_least_the_published_minimum(norm, constant, rate):
    """1/(2(L0 + L1 g)) ≥ 1/(4 max{L0, L1 g}) = min{1/(4 L0), 1/(4 L1 g)}."""
    ours = theory.quadratic_step(norm, constant, rate) / 2
    assert ours >= min(1 / (4 * constant), 1 / (4 * rate * norm)) * (1 - 2**-50)


def test_gap_over_gradient_is_bounded_below_by_the_gap():
    """g² ≤ 2F(L0 + L1 g) solved for g: g ≤ L1 F + sqrt(L1² F² + 2 L0 F) ≤ 2 L1 F + sqrt(2 L0 F)."""
    F, L0, L1, g = sp.symbols("F L0 L1 g", positive=True)
    root = L1 * F + sp.sqrt(L1**2 * F**2 + 2 * L0 * F)
    assert sp.simplify((g**2 - 2 * F * (L0 + L1 * g)).subs(g, root)) == 0
    # sqrt(a² + b) ≤ a + sqrt(b), squared.
    a, b = sp.symbols("a b", positive=True)
    assert sp.expand((a + sp.sqrt(b)) ** 2 - a**2 - b) == 2 * a * sp.sqrt(b)


def test_distance_shrinks_by_the_square_of_gap_over_gradient():
    """‖x⁺ - x*‖² = ‖x - x*‖² - 2h⟨∇f, x - x*⟩ + h² g² ≤ ‖x - x*‖² - F²/g² with ⟨∇f, x - x*⟩ ≥ F, h = F/g²."""
    F, g, inner = sp.symbols("F g inner", positive=True)
    h = F / g**2
    change = -2 * h * inner + h**2 * g**2
    assert sp.simplify(change.subs(inner, F) + F**2 / g**2) == 0
    assert sp.diff(change, inner) == -2 * h  # falls as the inner product grows


@pytest.mark.parametrize(("problem", "rate"), CONVEX, ids=lambda value: getattr(value, "name", None))
def test_counts_stay_below_the_bound(problem, rate):
    """From x0 down to a hundredth of the gap; each iterate is closer to the minimiser."""
    x, minimiser = problem.x0, problem.minimiser
    distance = (x - minimiser).norm().item()
    accuracy = (problem.f(x).item() - problem.f_star) / 100
    limit = theory.polyak_iteration_bound(distance, accuracy, problem.L0(rate), rate)
    t, before = 0, distance
    while (gap := problem.f(x).item() - problem.f_star) > accuracy:
        gradient = problem.gradient(x)
        x = x - float(theory.polyak_step(gradient.norm().item(), gap)) * gradient
        distance = (x - minimiser).norm().item()
        assert distance <= before * (1 + 1e-14)
        t, before = t + 1, distance
        assert t <= limit


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, sizes)
def test_bound_is_at_most_the_sum_of_its_parts(distance, accuracy, constant, rate):
    """(a + b)² ≤ 2a² + 2b²."""
    bound = theory.polyak_iteration_bound(distance, accuracy, constant, rate)
    assert bound <= (4 * constant * distance**2 / accuracy + 8 * (rate * distance) ** 2) * (1 + 1e-14)
    assert math.isfinite(bound)
