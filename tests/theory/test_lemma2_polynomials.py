"""Lemma 2 of the paper, on polynomials of one variable, and why it stops there."""

import numpy as np
import pytest
import sympy as sp
from numpy.polynomial import Polynomial

RNG = np.random.default_rng(20)
POLYNOMIALS = [Polynomial(RNG.normal(size=degree + 1)) for degree in range(3, 9) for _ in range(20)]


def constants(f, L1):
    """L0 as in the proof: the largest |f''| on the interval outside which |f''| <= L1|f'|."""
    first, second = f.deriv(), f.deriv(2)
    crossings = [*(second - L1 * first).roots(), *(second + L1 * first).roots()]
    radius = max(abs(root.real) for root in crossings) + 1.0
    extremes = [
        root.real for root in f.deriv(3).roots() if abs(root.imag) < 1e-9 and abs(root.real) <= radius
    ]
    return max(abs(second(point)) for point in [-radius, radius, *extremes]), radius


@pytest.mark.parametrize("L1", [0.1, 1.0, 10.0])
def test_every_polynomial_of_degree_three_or_more_has_constants(L1):
    """|f''| <= L0 + L1|f'| for 120 random polynomials of degree 3 to 8, near their roots and far outside."""
    for f in POLYNOMIALS:
        L0, radius = constants(f, L1)
        x = np.concatenate(
            [np.linspace(-radius, radius, 2001), *np.outer([-1, 1], radius * np.logspace(0, 4, 400))]
        )
        bound = L0 + L1 * abs(f.deriv()(x))
        # Rounding of a polynomial's value is relative to its terms, which the bound's second part dominates.
        assert np.all(abs(f.deriv(2)(x)) <= bound * (1 + 1e-9))


def test_no_such_polynomial_has_a_lipschitz_gradient():
    """f'' has degree at least 1, so it passes any bound: here 10^6 times its value's scale at the origin."""
    for f in POLYNOMIALS:
        scale = 1 + abs(f.deriv(2).coef).max()
        # At |x| = X > 1 the leading term c X^k of f'' beats the others once X > sum of their sizes / |c|.
        far = 2 * (1e6 * scale + abs(f.deriv(2).coef[:-1]).sum()) / abs(f.deriv(2).coef[-1]) + 1
        assert abs(f.deriv(2)(far)) > 1e6 * scale


def test_a_square_has_a_lipschitz_gradient():
    """The degree matters: for degree 2 the second derivative is constant."""
    assert Polynomial([1.0, -2.0, 3.0]).deriv(2).degree() == 0


def test_polynomials_of_two_variables_are_refuted_by_a_product_of_squares():
    """x²y² on the axis y = 0: gradient zero, second derivative across it 2x², unbounded."""
    x, y = sp.symbols("x y", real=True)
    f = x**2 * y**2
    assert [sp.diff(f, z).subs(y, 0) for z in (x, y)] == [0, 0]
    assert sp.diff(f, y, 2).subs(y, 0) == 2 * x**2


def test_weight_decay_does_not_repair_the_product():
    """(w₁w₂ - 1)²/2 + λ‖w‖²/2 along w₂ = w₁/(w₁² + λ): curvature over gradient grows without bound."""
    w1, w2, decay = sp.symbols("w1 w2 lambda", positive=True)
    f = (w1 * w2 - 1) ** 2 / 2 + decay * (w1**2 + w2**2) / 2
    walk = {w2: w1 / (w1**2 + decay)}
    assert sp.simplify(sp.diff(f, w2).subs(walk)) == 0
    along = sp.diff(f, w1).subs(walk)
    assert sp.simplify(along - (decay * w1 - decay * w1 / (w1**2 + decay) ** 2)) == 0
    assert sp.simplify(sp.diff(f, w2, 2) - (w1**2 + decay)) == 0
    assert sp.limit((w1**2 + decay) / along, w1, sp.oo) == sp.oo


def test_rescaling_keeps_the_gradient_zero_and_lets_the_curvature_grow():
    """A loss of w₁w₂ at a stationary point, moved along (w₁a, w₂/a): gradient zero, ∂²/∂w₂² grows like a²."""
    w1, w2, a = sp.symbols("w1 w2 a", positive=True)
    loss = sp.Function("loss")
    f = loss(w1 * w2)
    z = sp.Symbol("z", positive=True)
    moved = {w1: w1 * a, w2: w2 / a}
    slope, curvature = sp.symbols("slope curvature")

    def at(expression):
        # The symmetry leaves the product, and with it the loss's own derivatives, unchanged.
        expression = expression.doit().subs(moved, simultaneous=True).doit()
        derivatives = {sp.Derivative(loss(z), (z, 2)): curvature, sp.Derivative(loss(z), z): slope}
        return expression.replace(
            lambda node: isinstance(node, sp.Subs),
            lambda node: derivatives[sp.Derivative(loss(z), (z, node.expr.derivative_count))],
        )

    assert at(sp.diff(f, w2)).subs(slope, 0) == 0
    assert at(sp.diff(f, w1)).subs(slope, 0) == 0
    assert sp.simplify(at(sp.diff(f, w2, 2)) - a**2 * w1**2 * curvature) == 0
