"""Statement S4, the definition: the form without a radius, the local form, the Hessian form, and what
implies what.
"""

import math

import numpy as np
import pytest
import sympy as sp
import torch

from gradclip import problems, theory

r, x, y = sp.symbols("r x y", real=True)
L0, L1, g = sp.symbols("L0 L1 g", positive=True)


def test_growth_bound_solves_the_comparison_equation():
    """Growth lemma, step 2: m' = (L0 + L1 g) + L1 m, m(0) = 0 has the solution (L0 + L1 g)(e^{L1 r} -
    1)/L1.
    """
    m = (L0 + L1 * g) * (sp.exp(L1 * r) - 1) / L1
    assert m.subs(r, 0) == 0
    assert sp.simplify(sp.diff(m, r) - (L0 + L1 * g) - L1 * m) == 0


def test_hessian_form_implies_exponential_growth(instances):
    """Growth lemma: ‖∇f(y) - ∇f(x)‖ ≤ (L0 + L1 g)(e^{L1 r} - 1)/L1 in random directions, radii up to 3/L1."""
    rng = np.random.default_rng(2)
    for case in instances:
        d = torch.from_numpy(rng.normal(size=(20, case.x.numel())))
        radius = rng.uniform(0, 3 / max(case.L1, 1), size=20)
        at_x = case.gradient(case.x)
        at_y = case.gradient(case.x + d * torch.from_numpy(radius / d.norm(dim=-1).numpy())[:, None])
        bound = theory.gradient_growth_bound(at_x.norm().item(), radius, case.L0, case.L1)
        excess = (at_y - at_x).norm(dim=-1).numpy() - bound
        assert excess.max() <= case.slack(at_x, at_y), case.name


def test_growth_bound_is_attained_by_exp():
    """The bound is sharp: for f = eˣ, L0 = 0, L1 = 1 the gradient grows by exactly e^x (e^r - 1)."""
    radius = np.linspace(0, 5, 21)
    bound = theory.gradient_growth_bound(math.exp(0.3), radius, 0.0, 1.0)
    # exp and expm1 round to about one unit in the last place each.
    np.testing.assert_allclose(bound, np.exp(0.3 + radius) - math.exp(0.3), rtol=1e-13, atol=1e-15)


def test_growth_form_implies_hessian_form():
    """Dividing the growth bound by r and letting r → 0 gives L0 + L1 g back: the two forms are equivalent."""
    assert sp.simplify(sp.limit((L0 + L1 * g) * (sp.exp(L1 * r) - 1) / (L1 * r), r, 0) - L0 - L1 * g) == 0


def test_local_form_follows_with_the_factor_e_minus_1(instances):
    """For r ≤ 1/L1, (e^t - 1)/t ≤ e - 1 at t = L1 r, so ‖∇f(y) - ∇f(x)‖ ≤ (e - 1)(L0 + L1 g) r."""
    t = np.linspace(1e-3, 1, 1000)
    ratio = np.expm1(t) / t
    assert (np.diff(ratio) > 0).all()
    assert ratio[-1] == pytest.approx(math.e - 1, rel=2**-50)  # a few roundings
    rng = np.random.default_rng(3)
    for case in instances:
        d = torch.from_numpy(rng.normal(size=(20, case.x.numel())))
        radius = torch.from_numpy(rng.uniform(0, 1 / max(case.L1, 1), size=20))
        at_x = case.gradient(case.x)
        at_y = case.gradient(case.x + d * (radius / d.norm(dim=-1))[:, None])
        bound = (math.e - 1) * (case.L0 + case.L1 * at_x.norm()) * radius
        assert ((at_y - at_x).norm(dim=-1) - bound).max() <= case.slack(at_x, at_y), case.name


def test_local_form_with_factor_1_is_refuted_by_exp():
    """The factor cannot be dropped: eˣ is (0, 1)-smooth in the Hessian form, yet e^{x+1} - e^x = (e - 1) eˣ
    > eˣ.
    """
    change = math.exp(1.0) - math.exp(0.0)
    assert change == math.e - 1 > 1.0  # (L0 + L1 g) r = 1 at x = 0, r = 1
    assert problems.exp().L0(1.0) == 0.0


def test_local_form_with_its_own_radius_costs_one_over_ln_2():
    """With constants A·(L0, L1) *and* radius 1/(A L1), A(e^{1/A} - 1) = A exactly when A = 1/ln 2."""
    A = 1 / sp.log(2)
    assert sp.simplify(A * (sp.exp(1 / A) - 1) - A) == 0


def test_hessian_form_of_the_example_without_radius():
    """The limit d → 0 of the printed form is the Hessian form: here |f''| ≤ 4 + 2|f'| for f' = y + sin y²."""
    z = np.linspace(-60, 60, 200_001)
    second, first = 1 + 2 * z * np.cos(z**2), z + np.sin(z**2)
    # z² up to 3600 loses 3600 · 2⁻⁵² absolutely, times 2z: below 1e-9.
    assert (np.abs(second) - 4 - 2 * np.abs(first)).max() <= 1e-9


@pytest.mark.parametrize("f", [sp.exp(x), x**4, sp.cosh(x)], ids=["exp", "quartic", "cosh"])
def test_form_without_radius_as_printed_is_refuted_by_unbounded_slope_of_the_gradient(f):
    """From a fixed x it forces |f'(x+d) - f'(x)|/|d| ≤ L0 + L1|f'(x)| < ∞; for exp, x⁴ and cosh that ratio
    is unbounded.
    """
    df = sp.diff(f, x)
    at = sp.Integer(1)
    assert sp.limit((df.subs(x, at + r) - df.subs(x, at)) / r, r, sp.oo) == sp.oo


@pytest.mark.parametrize("name", ["quartic", "exp", "cosh", "extremal"])
def test_excluded_functions_satisfy_the_hessian_form(name):
    """The functions that the printed form excludes are in the class of the 2020 paper, with the constants
    of `problems`.
    """
    problem = next(p for p in problems.ALL if p.name == name)
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64)[:, None]
    assert math.isfinite(problem.L0(1.0))
    excess = problem.hessian_norm(z) - problem.L0(1.0) - problem.gradient(z).norm(dim=-1)
    # Relative rounding of exp at 20 is 2⁻⁵³ · 20.
    assert (excess / problem.hessian_norm(z)).max().item() <= 1e-14


def test_form_without_radius_is_wider_than_lipschitz_gradients():
    """f = y²/2 + ∫ sin s² ds satisfies it with (4, 2), though f'' = 1 + 2y cos y² is unbounded."""
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 200_000)) * 10 ** rng.uniform(-2, 2, size=(2, 200_000))
    near = rng.random(200_000) < 0.5
    b = np.where(near, a + b * 1e-3, b)
    fa, fb = a + np.sin(a**2), b + np.sin(b**2)
    excess = np.abs(fb - fa) - (4 + 2 * np.abs(fa)) * np.abs(b - a)
    # The arguments a² go up to about 1e5, so the sine is known to 1e5 · 2⁻⁵² ≈ 2e-11.
    assert excess.max() <= 1e-10
    k = sp.Symbol("k", integer=True, positive=True)
    second = sp.diff(y + sp.sin(y**2), y)
    assert sp.limit(sp.simplify(second.subs(y, sp.sqrt(2 * sp.pi * k))), k, sp.oo) == sp.oo


def test_orthogonal_sums_stay_in_the_class(instances):
    """Functions of orthogonal blocks of variables add up: ‖∇²f‖ ≤ max L0ᵢ + (max L1ᵢ)‖∇f‖, against
    autograd's Hessian.
    """
    for case in instances:
        hessian = torch.autograd.functional.hessian(case.f, case.x)
        excess = torch.linalg.matrix_norm(hessian, 2) - case.L0 - case.L1 * case.gradient(case.x).norm()
        assert excess.item() <= case.slack(hessian), case.name


def test_class_closed_under_sums_is_refuted_by_cosh_plus_sine():
    """f₁ = 2 cosh x + sin x² and f₂ = -2 cosh x are in the class, f₁ + f₂ = sin x² is not, for any
    constants.
    """
    f1, f2 = 2 * sp.cosh(x) + sp.sin(x**2), -2 * sp.cosh(x)
    # f₂: 2 cosh x ≤ 2 + 2|sinh x|, since cosh² = 1 + sinh² ≤ (1 + |sinh|)².
    assert sp.simplify(sp.cosh(x) ** 2 - 1 - sp.sinh(x) ** 2) == 0
    # f₁ on [0, 5], (4.75, 3): grid plus Lipschitz constant times half the spacing. There |f₁'''| ≤ 1210 and
    # |f₁''| ≤ 251, so |f₁''| - 3|f₁'| changes by at most 1963 per unit and by 0.005 per half cell.
    z = np.linspace(0, 5, 1_000_001)
    first = 2 * np.sinh(z) + 2 * z * np.cos(z**2)
    second = 2 * np.cosh(z) + 2 * np.cos(z**2) - 4 * z**2 * np.sin(z**2)
    assert (np.abs(second) - 3 * np.abs(first)).max() + 0.005 <= 4.75
    # Beyond 5: |f₁''| ≤ 2cosh + 2 + 4x² and 3|f₁'| ≥ 6 sinh - 6x; the difference falls, and is negative at 5.
    gap = 2 * sp.cosh(x) + 2 + 4 * x**2 - 6 * sp.sinh(x) + 6 * x
    assert gap.subs(x, 5).evalf() < 0
    # Its second derivative 2cosh - 6sinh + 8 is negative there, and so is its first derivative at 5.
    assert sp.diff(gap, x).subs(x, 5).evalf() < 0
    assert sp.diff(gap, x, 2).subs(x, 5).evalf() < 0
    assert sp.simplify(sp.diff(gap, x, 3) - (2 * sp.sinh(x) - 6 * sp.cosh(x))) == 0  # < 0 since sinh < cosh
    # The sum: where x² = π/2 + 2πk the gradient is 0 and the Hessian 4x² unbounded.
    total = sp.simplify(f1 + f2)
    k = sp.Symbol("k", integer=True, nonnegative=True)
    point = sp.sqrt(sp.pi / 2 + 2 * sp.pi * k)
    assert sp.simplify(sp.diff(total, x).subs(x, point)) == 0
    assert sp.limit(sp.simplify(-sp.diff(total, x, 2).subs(x, point)), k, sp.oo) == sp.oo


def test_any_constants_are_refuted_by_a_product_of_two_weights():
    """f = (w₁w₂ - 1)²/2 is in no class: on w₁w₂ = 1 the gradient is 0 and the Hessian has the eigenvalue
    w₁² + w₂².
    """
    w1, w2 = sp.symbols("w1 w2", positive=True)
    f = (w1 * w2 - 1) ** 2 / 2
    on_curve = {w2: 1 / w1}
    assert all(sp.simplify(sp.diff(f, w).subs(on_curve)) == 0 for w in (w1, w2))
    eigenvalues = sp.hessian(f, (w1, w2)).subs(on_curve).eigenvals()
    assert {sp.simplify(e) for e in eigenvalues} == {0, sp.simplify(w1**2 + 1 / w1**2)}
    assert problems.product().L0(100.0) == math.inf
