"""The class is closed neither under sums nor under changes of variables, and small networks leave it."""

import math

import numpy as np
import pytest
import sympy as sp

from gradclip.experiments.convergence import OUTSIDE, outside


@pytest.mark.parametrize(("function", "curvature"), [("network-square", 1.0), ("network-entropy", 0.25)])
def test_curvature_has_no_bound_where_the_gradient_is_zero(function, curvature):
    """At w₁ = 0 the output is 0 whatever w₂ is, and the second derivative in w₁ is w₂² ℓ''.

    (ℓ(z) + ℓ(-z))/2 has slope 0 and curvature ℓ'' at z = 0, which is 1 for half the square and 1/4 for the
    logistic loss; the output w₂ tanh(w₁) has slope w₂ and curvature 0 there.
    """
    for w2 in (1.0, 10.0, 1e3, 1e6):
        gradient, norm = outside(function, w2)
        assert gradient == 0.0
        assert norm == pytest.approx(curvature * w2**2, rel=1e-12)


def test_stationary_points_of_the_sum_are_sharper_and_sharper():
    """sin x² at x² = π/2 + 2πk: the gradient is rounding, 2x times 1e-16 x², the curvature 4x²."""
    for target in (5.0, 8.0, 12.0):
        gradient, norm = outside("sum", target)
        x = math.sqrt(math.pi / 2 + 2 * math.pi * round((target**2 - math.pi / 2) / (2 * math.pi)))
        # cosh 12 = 8e4 appears and cancels, in the function and in its derivatives.
        assert gradient <= 1e-10
        assert norm == pytest.approx(4 * x**2, rel=1e-9)


def test_change_of_variables_lets_curvature_outgrow_the_gradient():
    """f(y) = e^{sinh y}: f' = f cosh y, f'' = f(sinh y + cosh² y), f''/f' = tanh y + cosh y: no bound."""
    y = sp.Symbol("y", real=True)
    f = sp.exp(sp.sinh(y))
    ratio = sp.diff(f, y, 2) / sp.diff(f, y)
    assert sp.simplify((ratio - sp.tanh(y) - sp.cosh(y)).rewrite(sp.exp)) == 0
    for value in (1.0, 2.0, 4.0):
        gradient, norm = outside("reparametrised", value)
        assert gradient == pytest.approx(math.exp(math.sinh(value)) * math.cosh(value), rel=1e-12)
        assert norm / gradient == pytest.approx(math.tanh(value) + math.cosh(value), rel=1e-12)
    # While eˣ itself, in its own variable, is (0, 1)-smooth; sinh is a bijection with a positive derivative.
    assert (np.cosh(np.linspace(-9, 9, 99)) >= 1).all()


def test_linear_change_of_variables_only_changes_the_constants():
    """f(λ y): the gradient is λ times, the Hessian λ² times that of f, so (L0, L1) becomes (λ² L0, λ L1)."""
    lam, L0, L1, g = sp.symbols("lambda L0 L1 g", positive=True)
    assert sp.expand(lam**2 * (L0 + L1 * g) - (lam**2 * L0 + lam * L1 * (lam * g))) == 0


def test_unknown_functions_are_named():
    with pytest.raises(ValueError, match=r"function must be one of .*, got 'cubic'"):
        outside("cubic", 1.0)
    assert len(OUTSIDE) == 4
