"""Statement S6, "η < 2/(L0 + L1 g) should be satisfied": sufficient for descent in every dimension, not
necessary.
"""

import math

import numpy as np
import pytest
import sympy as sp
import torch

from gradclip import problems, theory

L0, L1, g, eta, u = sp.symbols("L0 L1 g eta u", positive=True)


def test_limit_is_where_the_parabola_returns_to_zero():
    """-η g² + (L0 + L1 g) η² g²/2 < 0 exactly for 0 < η < 2/(L0 + L1 g)."""
    parabola = -eta * g**2 + (L0 + L1 * g) * eta**2 * g**2 / 2
    roots = sp.solve(sp.Eq(parabola, 0), eta)
    assert len(roots) == 1  # η = 0 is excluded by positivity
    assert sp.simplify(roots[0] - 2 / (L0 + L1 * g)) == 0
    assert (
        sp.simplify(sp.diff(parabola, eta, 2) - (L0 + L1 * g) * g**2) == 0
    )  # convex: negative between the roots


def test_every_step_below_the_limit_decreases_f(instances):
    """Sufficient: f(x - η∇f) ≤ f(x) for η up to and including the limit, on every instance, 1 to 6
    variables.
    """
    for case in instances:
        gradient = case.gradient(case.x)
        norm = gradient.norm().item()
        steps = theory.quadratic_step_limit(norm, case.L0, case.L1) * np.linspace(0.01, 1, 40)
        fx, fy = case.f(case.x), case.f(case.x - torch.from_numpy(steps)[:, None] * gradient)
        assert (fy - fx).max().item() <= case.slack(fx, fy, gradient), case.name


def test_exact_limit_in_one_dimension_is_attained_by_the_extremal_function():
    """From x = ln(1+u)/L1 the step 2 ln(1+u)/(L1 g) lands on -x, where f is the same; 0.1 % less descends,
    more climbs.
    """
    for constant, rate, norm in [(1.0, 1.0, 1.0), (0.2, 3.0, 5.0), (4.0, 0.5, 0.1)]:
        problem = problems.extremal(L0=constant, L1=rate)
        x = torch.tensor([math.log1p(rate * norm / constant) / rate], dtype=torch.float64)
        limit = theory.exact_step_limit_1d(norm, constant, rate)
        change = [
            (problem.f(x - factor * limit * norm) - problem.f(x)).item() for factor in (0.999, 1.0, 1.001)
        ]
        assert change[1] == pytest.approx(0.0, abs=1e-13 * problem.f(x).item() + 1e-16)
        assert change[0] < 0 < change[2]


def test_exact_limit_is_the_zero_of_the_exact_worst_case():
    """No function of one variable fails to descend before it: exact_bound_1d is negative below the limit
    and 0 at it.
    """
    for value in np.logspace(-3, 3, 25):
        limit = theory.exact_step_limit_1d(value, 1.0, 1.0) * value
        inside = theory.exact_bound_1d(value, limit * np.linspace(0.001, 0.999, 200), 1.0, 1.0)
        assert (inside < 0).all()
        # Two terms of size u cancel.
        assert abs(theory.exact_bound_1d(value, limit, 1.0, 1.0)) <= 1e-14 * (1 + value)


def test_limit_is_below_the_exact_limit_in_one_dimension():
    """ln(1+u) ≥ u/(1+u): the difference vanishes at 0 and has the derivative u/(1+u)² ≥ 0."""
    gap = sp.log(1 + u) - u / (1 + u)
    assert gap.subs(u, 0) == 0
    assert sp.simplify(sp.diff(gap, u) - u / (1 + u) ** 2) == 0
    assert sp.simplify(2 * u / (1 + u) / (L1 * g) - (2 / (L0 + L1 * g)).subs(L0, L1 * g / u)) == 0


def test_necessity_as_printed_is_refuted_in_one_dimension(instances):
    """With 0 < η = 0.999 · exact limit > S6's limit every function of one variable still descends."""
    longer = 0
    for case in (c for c in instances if c.x.numel() == 1 and c.L0 > 0 and c.L1 > 0):
        gradient = case.gradient(case.x)
        norm = gradient.norm().item()
        step = 0.999 * theory.exact_step_limit_1d(norm, case.L0, case.L1)
        fx, fy = case.f(case.x), case.f(case.x - step * gradient)
        assert (fy - fx).item() <= case.slack(fx, fy), case.name
        longer += step > 1.05 * theory.quadratic_step_limit(norm, case.L0, case.L1)
    assert longer >= 20


def test_necessity_as_printed_is_refuted_without_bound_by_exp():
    """L0 = 0: for eˣ every step descends, however long; S6 stops at 2/(L1 g)."""
    problem = problems.exp()
    x = torch.zeros(1, dtype=torch.float64)
    for step in (2.0, 10.0, 100.0):
        assert problem.f(x - step * problem.gradient(x)).item() < problem.f(x).item()
    assert theory.exact_step_limit_1d(1.0, 0.0, 1.0) == math.inf


def test_two_dimensions_descend_less_far_than_one():
    """L0 = 0, L1 = g = 1: no limit on the line, but eˣ cos y climbs in some gradient step of radius 3."""
    y0 = 1.9
    moved = 1j * y0 - 3.0 * np.exp(-1j * y0)
    assert math.exp(moved.real) * math.cos(moved.imag) - math.cos(y0) > 0.1


def test_phi_bound_alone_does_not_prove_it():
    """At η = 2/(L0 + L1 g) the φ bound is positive: φ(2c) > 2c² for c = L1 g/(L0 + L1 g) > 0, as φ(t) >
    t²/2.
    """
    for value in np.logspace(-3, 3, 25):
        assert theory.phi_bound(value, 2 * value / (1 + value), 1.0, 1.0) > 0
