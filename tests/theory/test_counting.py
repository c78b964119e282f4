"""From a decrease per step to a number of steps, for every rule whose step never exceeds 1/(L0 + L1 g).

The decrease h g² (1 - h G/2), G = L0 + L1 g, for h ≤ 2/G is the theorem of the derivation, tested there.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradclip import theory

L0, L1, g, h, eps, c = sp.symbols("L0 L1 g h epsilon c", positive=True)
checked = settings(max_examples=200, deadline=None, derandomize=True)
sizes = st.floats(-6, 6).map(lambda e: 10.0**e)


def descend(case, step, accuracy, limit):
    """First t with ‖∇f(x_t)‖ ≤ ε under x⁺ = x - step(‖∇f‖) ∇f, None if that is beyond the limit."""
    x = case.x
    for t in range(limit + 1):
        gradient = case.gradient(x)
        norm = gradient.norm().item()
        if norm <= accuracy:
            return t
        x = x - float(step(norm)) * gradient
    return None


def test_decrease_of_a_step_below_one_over_G_is_at_least_half_its_first_order():
    """h g²(1 - hG/2) ≥ h g²/2 if and only if hG ≤ 1."""
    G = L0 + L1 * g
    decrease = h * g**2 - G * h**2 * g**2 / 2
    assert sp.simplify(decrease - h * g**2 / 2 - h * g**2 * (1 - h * G) / 2) == 0


def test_decrease_of_the_step_grows_with_the_gradient():
    """g²/(2(L0 + L1 g)) has the derivative g(2 L0 + L1 g)/(2(L0 + L1 g)²) > 0: the least is at g = ε."""
    derivative = sp.diff(g**2 / (2 * (L0 + L1 * g)), g)
    assert sp.simplify(derivative - g * (2 * L0 + L1 * g) / (2 * (L0 + L1 * g) ** 2)) == 0


@checked
@given(sizes, sizes, sizes, sizes)
def test_any_threshold_is_safe(norm, threshold, constant, rate):
    """threshold_step ≤ 1/(L0 + L1 g): 1/(L0 + L1 c) below c; above it c/g (L0 + L1 g) ≤ L0 + L1 c."""
    step = theory.threshold_step(norm, threshold, constant, rate)
    assert step <= theory.quadratic_step(norm, constant, rate) * (1 + 2**-50)
    # Both ends: h g² = g min(g, c)/(L0 + L1 c), which grows with g.
    expected = min(norm, threshold) * norm / (constant + rate * threshold)
    assert step * norm**2 == pytest.approx(expected, rel=2**-50)


def test_any_threshold_needs_its_count():
    """Least of h g²/2 over g > ε is ε min(ε, c)/(2(L0 + L1 c)); the count's bound is best at c = ε."""
    below = 2 * (L0 + L1 * c) / (eps * c)  # c ≤ ε
    above = 2 * (L0 + L1 * c) / eps**2  # c ≥ ε
    assert sp.simplify(sp.diff(below, c) + 2 * L0 / (eps * c**2)) == 0  # falls in c
    assert sp.simplify(sp.diff(above, c) - 2 * L1 / eps**2) == 0  # rises in c
    assert sp.simplify(above.subs(c, eps) - 2 * (L0 + L1 * eps) / eps**2) == 0


def test_normalised_step_is_clipping_at_the_accuracy():
    norms = np.logspace(-1, 3, 41)
    normalised = theory.normalized_step(norms, 0.1, 2.0, 3.0)
    # The same three roundings in another order.
    np.testing.assert_allclose(normalised, theory.threshold_step(norms, 0.1, 2.0, 3.0), rtol=2**-50)
    np.testing.assert_allclose(normalised * norms, 0.1 / 2.3, rtol=2**-50)  # one length


def test_phi_decrease_of_a_shorter_step_is_at_least_in_proportion():
    """The φ bound is convex in the step and 0 at 0, so λ h keeps the fraction λ of the decrease of h."""
    r = sp.Symbol("r", positive=True)
    bound = -g * r + (L0 + L1 * g) / L1**2 * (sp.exp(L1 * r) - L1 * r - 1)
    assert sp.simplify(sp.diff(bound, r, 2) - (L0 + L1 * g) * sp.exp(L1 * r)) == 0
    shares = np.linspace(0.5, 1, 11)
    for value in np.logspace(-3, 3, 13):
        simplified, clipped = (
            step(value, 1.0, 1.0) for step in (theory.simplified_step, theory.clipped_step)
        )
        assert clipped >= simplified / 2 * (1 - 2**-50)
        whole = theory.phi_bound(value, simplified * value, 1.0, 1.0)
        parts = theory.phi_bound(value, shares * simplified * value, 1.0, 1.0)
        assert (parts <= shares * whole * (1 - 1e-12)).all()
        assert theory.phi_bound(value, clipped * value, 1.0, 1.0) <= whole / 2 * (1 - 1e-12)


RULES = {
    "S7": (theory.quadratic_step, theory.iteration_bound),
    "φ": (theory.phi_step, theory.vankov_iteration_bound),
    "simplified": (theory.simplified_step, theory.vankov_iteration_bound),
    "clipped": (theory.clipped_step, lambda *a: theory.vankov_iteration_bound(*a, fraction=0.5)),
}


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_counts_stay_below_their_bounds_on_random_functions(bounded, rule, data):
    """First hitting times of ε on random functions of the class, from random points."""
    case = data.draw(st.sampled_from(bounded))
    step, bound = RULES[rule]
    start = case.gradient(case.x).norm().item()
    assume(start > 0)
    eps = start * 10 ** data.draw(st.floats(-1.5, -0.1))
    gap = case.f(case.x).item() - case.f_star
    limit = float(bound(gap, eps, case.L0, case.L1))
    assume(limit <= 800)
    count = descend(case, lambda norm: step(norm, case.L0, case.L1), eps, math.ceil(limit))
    assert count is not None, (case.name, limit)
    assert count < limit or count == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), exponent=st.floats(-1, 1))
def test_normalised_descent_and_any_threshold_stay_below_their_bounds(bounded, data, exponent):
    case = data.draw(st.sampled_from([case for case in bounded if case.L0 > 0]))
    eps = 0.3 * case.gradient(case.x).norm().item()
    gap = case.f(case.x).item() - case.f_star
    assume(eps > 0)
    limit = float(theory.iteration_bound(gap, eps, case.L0, case.L1))
    threshold = eps * 10**exponent
    looser = 2 * (case.L0 + case.L1 * threshold) * gap / (eps * min(eps, threshold))
    assume(looser <= 800)
    for step, most in (
        (lambda norm: theory.normalized_step(norm, eps, case.L0, case.L1), limit),
        (lambda norm: theory.threshold_step(norm, threshold, case.L0, case.L1), looser),
    ):
        count = descend(case, step, eps, math.ceil(most))
        assert count is not None
        assert count < most


def test_the_count_of_one_fixed_function_grows_slower_than_the_bound():
    """Σ h g² converges along the run, so T(ε) ε² → 0 for every single f, not uniformly over the class."""
    x = torch.tensor([2.0], dtype=torch.float64)
    products, eps = [], [1.0, 1e-1, 1e-2, 1e-3]
    for accuracy in eps:
        y, t = x.item(), 0
        while 4 * abs(y) ** 3 > accuracy:
            y -= 4 * y**3 / (16 + 4 * abs(y) ** 3)
            t += 1
        products.append(t * accuracy**2)
    # x⁴: T grows like ε^(-2/3), so each tenth of ε divides the product by about 10^(4/3) = 21.
    assert all(later < earlier / 10 for earlier, later in pairwise(products))
