"""Statement S8, "(L0, L1)-smoothness and clipping are equivalent": the step of S7 *is* soft clipping; no
more than that.
"""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import problems, theory
from gradclip.rules import clip_factor

L0, L1, g, eta, gamma = sp.symbols("L0 L1 g eta gamma", positive=True)


def test_step_is_soft_clipping():
    """η γ/(γ + g) with η = 1/L0 and γ = L0/L1 is 1/(L0 + L1 g), identically."""
    soft = eta * gamma / (gamma + g)
    assert sp.simplify(soft.subs({eta: 1 / L0, gamma: L0 / L1}) - 1 / (L0 + L1 * g)) == 0


def test_soft_clipping_is_the_step():
    """Conversely soft clipping with (η, γ) is the step of L0 = 1/η, L1 = 1/(ηγ): a bijection of positive
    pairs.
    """
    step = 1 / (L0 + L1 * g)
    assert sp.simplify(step.subs({L0: 1 / eta, L1: 1 / (eta * gamma)}) - eta * gamma / (gamma + g)) == 0
    assert sp.simplify((1 / (eta * gamma)).subs({eta: 1 / L0, gamma: L0 / L1}) - L1) == 0


positive = st.floats(1e-6, 1e6)


@given(norm=positive, constant=positive, rate=positive)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_library_rules_are_the_steps(norm, constant, rate):
    """With lr = 1/L0, max_norm = L0/L1: "soft" is S7's step, "log" the φ-optimal one, "hard" between S7's
    and twice it.
    """
    factors = {
        rule: clip_factor(torch.tensor(norm, dtype=torch.float64), constant / rate, rule=rule).item()
        / constant
        for rule in ("soft", "hard", "log")
    }
    step = theory.quadratic_step(norm, constant, rate)
    # Each side rounds at most ten times.
    assert factors["soft"] == pytest.approx(step, rel=10 * 2**-52)
    assert factors["log"] == pytest.approx(theory.phi_step(norm, constant, rate), rel=10 * 2**-52)
    assert step * (1 - 2**-49) <= factors["hard"] <= 2 * step * (1 + 2**-49)


def test_hard_over_step_is_one_plus_the_smaller_ratio():
    """min{1/L0, 1/(L1 g)}·(L0 + L1 g) = 1 + min{u, 1/u}, u = L1 g/L0: in [1, 2], and 2 exactly at g = γ =
    L0/L1.
    """
    u = sp.Symbol("u", positive=True)
    inside, outside = (L0 + L1 * g) / L0, (L0 + L1 * g) / (L1 * g)
    assert sp.simplify(inside.subs(g, u * L0 / L1) - (1 + u)) == 0
    assert sp.simplify(outside.subs(g, u * L0 / L1) - (1 + 1 / u)) == 0


def test_hard_clipping_as_the_step_is_refuted_at_the_threshold():
    """At g = γ = L0/L1 the hard step is 1/L0 and the step of S7 is half of it."""
    norm = torch.tensor(1.0, dtype=torch.float64)
    assert clip_factor(norm, 1.0, rule="hard").item() == 2 * theory.quadratic_step(1.0, 1.0, 1.0)


def test_equivalence_as_printed_is_refuted_by_the_product():
    """Clipped descent converges on (w₁w₂ - 1)²/2, which is (L0, L1)-smooth for no constants: it does not
    imply the class.
    """
    problem = problems.product()
    assert problem.L0(10.0) == math.inf
    w = torch.tensor([3.0, 0.5], dtype=torch.float64)
    for _ in range(500):
        gradient = problem.gradient(w)
        w = w - 0.1 * gradient * clip_factor(gradient.norm(), 1.0)
    assert problem.f(w).item() < 1e-20


def test_equivalence_as_printed_is_refuted_by_a_badly_chosen_threshold():
    """Nor does the class imply that clipping works: with η = 1/L0 and γ ten times L0/L1 it climbs on an
    extremal function.
    """
    problem = problems.extremal(L0=1.0, L1=1.0)
    x = torch.tensor([math.log1p(10.0)], dtype=torch.float64)  # gradient 10
    gradient = problem.gradient(x)
    after = problem.f(x - gradient * clip_factor(gradient.norm(), 10.0 * (1 + 1e-9))).item()
    assert after > 10 * problem.f(x).item()
    np.testing.assert_allclose(gradient.item(), 10.0, rtol=1e-13)
