"""Closed forms of `gradclip.problems` against autograd, linear algebra, scans and 60-digit arithmetic."""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from scipy.optimize import minimize_scalar

from gradclip import problems
from gradclip.problems import Problem

INSTANCES = [
    *problems.ALL,
    problems.quadratic((0.0, 0.3, 5.0), seed=3),
    problems.power(2, dim=3),
    problems.power(3),
    problems.power(3.5, dim=2),
    problems.power(6, dim=3),
    problems.extremal(L0=2.0, L1=0.5, dim=3),
    problems.ramp(slope=0.7, L0=2.0),
]
every_problem = pytest.mark.parametrize("problem", INSTANCES, ids=lambda p: f"{p.name}-dim{p.dim}")
SCANNABLE = [
    p for p in INSTANCES if p.name != "product"
]  # its supremum lies on a curve, not on rays: see below
EXPONENTIAL = {"exp", "cosh", "logistic", "extremal"}


EPS = torch.finfo(torch.float64).eps


def points(problem: Problem, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(*shape, problem.dim, generator=generator, dtype=torch.float64)


@every_problem
def test_gradient_is_the_derivative_of_f(problem):
    x = points(problem, 40).requires_grad_()
    (expected,) = torch.autograd.grad(problem.f(x).sum(), x)
    # Both are a handful of float64 operations on numbers below 1e5: 1e-13 relative is some hundred roundings.
    torch.testing.assert_close(problem.gradient(x.detach()), expected, rtol=1e-13, atol=1e-13)


@every_problem
def test_hessian_norm_is_the_largest_singular_value_of_the_hessian(problem):
    for x in (*points(problem, 10), torch.zeros(problem.dim, dtype=torch.float64)):
        expected = torch.linalg.matrix_norm(torch.autograd.functional.hessian(problem.f, x), ord=2)
        torch.testing.assert_close(problem.hessian_norm(x), expected, rtol=1e-12, atol=1e-13)


@every_problem
def test_functions_broadcast_over_leading_dimensions(problem):
    x = points(problem, 3, 2)
    value, gradient, norm = problem.f(x), problem.gradient(x), problem.hessian_norm(x)
    assert value.shape == norm.shape == (3, 2)
    assert gradient.shape == x.shape
    for i in range(3):
        for j in range(2):
            # A batched matrix product may sum in another order: a few roundings.
            torch.testing.assert_close(problem.f(x[i, j]), value[i, j], rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(problem.gradient(x[i, j]), gradient[i, j], rtol=1e-14, atol=1e-15)
            torch.testing.assert_close(problem.hessian_norm(x[i, j]), norm[i, j], rtol=1e-14, atol=1e-15)


@every_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_keep_the_dtype_of_their_argument(problem, dtype):
    x = points(problem, 5).to(dtype)
    assert {problem.f(x).dtype, problem.gradient(x).dtype, problem.hessian_norm(x).dtype} == {dtype}


@every_problem
def test_f_star_is_the_infimum(problem):
    assert problem.f(points(problem, 500)).min() >= problem.f_star
    if problem.minimiser is None:
        # exp and logistic fall towards their infimum in one direction, and e^-700 = 1e-304.
        far = torch.tensor([-700.0 if problem.name == "exp" else 700.0], dtype=torch.float64)
        assert 0 < problem.f(far) - problem.f_star < 1e-300
    else:
        assert problem.f(problem.minimiser).item() == problem.f_star
        assert problem.gradient(problem.minimiser).norm().item() == 0.0
    assert problem.f(problem.x0) > problem.f_star


def excess(problem: Problem, L1: float) -> float:
    """Largest ‖∇²f‖ − L1 ‖∇f‖ found by a scan along rays, polished by a bounded one-dimensional search.

    Four roundings of the larger term are subtracted, so that the result is a lower bound on the true supremum
    even where two numbers near e^30 cancel.
    """
    reach = 30.0 if problem.name in EXPONENTIAL else 1e4  # e^30 is large enough, e^1e4 would overflow
    radii = torch.logspace(-9, math.log10(reach), 2000, dtype=torch.float64)
    directions = torch.cat([torch.eye(problem.dim, dtype=torch.float64), points(problem, 5)])
    best = -math.inf
    for u in torch.cat([directions, -directions]):
        u = u / u.norm()

        def value(x):
            curvature = problem.hessian_norm(x)
            return curvature * (1 - 4 * EPS * max(L1, 1.0)) - L1 * problem.gradient(x).norm(dim=-1)

        scan = value(radii[:, None] * u)
        k = int(scan.argmax())
        bounds = (radii[max(k - 1, 0)].item(), radii[min(k + 1, len(radii) - 1)].item())
        polished = minimize_scalar(
            lambda r, u=u: -value(r * u).item(), bounds=bounds, method="bounded", options={"xatol": 1e-12}
        )
        best = max(best, scan[k].item(), -polished.fun)
    return best


@pytest.mark.parametrize("problem", SCANNABLE, ids=lambda p: f"{p.name}-dim{p.dim}")
@pytest.mark.parametrize("L1", [0.0, 0.25, 0.5, 0.99, 1.0, 1.5, 6.0])
def test_L0_is_the_smallest_constant(problem, L1):
    L0, found = problem.L0(L1), excess(problem, L1)
    if math.isinf(L0):
        assert found > 1e4  # larger than every finite L0 met here, and still growing with the range scanned
    else:
        assert found <= L0 + 1e-12 * max(L0, 1.0)
        assert found >= L0 - 1e-6 * max(L0, 1.0)  # so a constant smaller by 1e-6 is violated


@every_problem
def test_without_L1_the_smallest_constant_is_the_lipschitz_constant_of_the_gradient(problem):
    assert problem.L0(0.0) == problem.smooth


@pytest.mark.parametrize("L1", [0.0, 1.0, 1e6])
def test_no_constants_work_for_the_product(L1):
    problem = problems.product()
    assert problem.L0(L1) == math.inf
    # Powers of two, so that w1 w2 = 1 holds exactly and the gradient is exactly zero.
    w1 = 2.0 ** torch.arange(0, 40, dtype=torch.float64)
    witness = torch.stack([w1, 1 / w1], dim=-1)
    assert problem.gradient(witness).norm(dim=-1).max().item() == 0.0
    expected = w1**2 + w1**-2  # eigenvalues of [[w2², 1], [1, w1²]] with w1 w2 = 1 are 0 and the trace
    torch.testing.assert_close(problem.hessian_norm(witness), expected, rtol=1e-14, atol=0)
    assert problem.hessian_norm(witness).max() > 1e20


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize(("L0", "L1"), [(1.0, 1.0), (0.1, 3.0), (20.0, 0.2)])
def test_extremal_meets_its_bound_everywhere(L0, L1, dim):
    problem = problems.extremal(L0, L1, dim)
    x = points(problem, 200) / L1
    bound = L0 + L1 * problem.gradient(x).norm(dim=-1)
    torch.testing.assert_close(problem.hessian_norm(x), bound, rtol=1e-13, atol=0)


def test_extremal_keeps_its_digits_near_the_minimum():
    getcontext().prec = 60
    problem = problems.extremal(L0=1.0, L1=1.0)
    for t in torch.logspace(-14, 2, 400, dtype=torch.float64).tolist():
        exact = Decimal(t).exp() - Decimal(t) - 1  # independent: correctly rounded decimal arithmetic
        value = Decimal(problem.f(torch.tensor([t], dtype=torch.float64)).item())
        # 2e-15 is ten roundings; e^t also amplifies the rounding of its argument, by a relative t 1e-16.
        assert abs(value / exact - 1) < Decimal(2e-15 + t * 2e-16)


def test_logistic_keeps_its_digits_in_the_tail():
    z = torch.tensor([[-800.0], [-30.0], [0.0], [19.0], [21.0], [40.0], [700.0]], dtype=torch.float64)
    problem = problems.logistic()
    expected = [math.log1p(math.exp(-v)) if v > 0 else -v + math.log1p(math.exp(v)) for v in z[:, 0].tolist()]
    torch.testing.assert_close(problem.f(z), torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_rotated_quadratic_has_the_requested_spectrum_and_leaves_the_global_generator_alone():
    spectrum = (0.5, 2.0, 3.0, 8.0)
    before = torch.get_rng_state()
    rotated, again, other = (problems.quadratic(spectrum, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    hessian = torch.autograd.functional.hessian(rotated.f, rotated.x0)
    expected = torch.tensor(spectrum, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.eigvalsh(hessian), expected, rtol=1e-13, atol=1e-13)
    assert (hessian - hessian.diag().diag()).norm() > 0.1
    assert torch.equal(rotated.x0, again.x0)
    assert not torch.equal(rotated.x0, other.x0)
    # All coordinates of x0 are 1 in the eigenbasis, so the value there does not depend on the rotation.
    for problem in (rotated, other, problems.quadratic(spectrum)):
        assert problem.f(problem.x0).item() == pytest.approx(sum(spectrum) / 2, rel=1e-14)


def test_points_handed_out_are_copies():
    problem = problems.cosh()
    problem.x0.zero_()
    problem.minimiser.add_(1.0)
    assert problem.x0.item() == 3.0
    assert problem.minimiser.item() == 0.0


def test_ALL_has_one_instance_of_each_with_distinct_names_and_formulas():
    names = [problem.name for problem in problems.ALL]
    assert names == ["quadratic", "quartic", "exp", "cosh", "logistic", "extremal", "product"]
    for text in ("formula", "L0_formula", "summary"):
        values = [getattr(problem, text) for problem in problems.ALL]
        assert all(values)
        assert not any("\n" in value or "$" in value for value in values)
    assert len({problem.formula for problem in problems.ALL}) == len(problems.ALL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: problems.quadratic(()), "eigenvalues must not be empty, got"),
        (lambda: problems.quadratic((1.0, -2.0)), "eigenvalues must be non-negative and finite, got -2.0"),
        (lambda: problems.quadratic((math.nan,)), "eigenvalues must be non-negative and finite, got nan"),
        (lambda: problems.power(1.5), "p must be at least 2 and finite, got 1.5"),
        (lambda: problems.power(math.inf), "p must be at least 2 and finite, got inf"),
        (lambda: problems.power(3, dim=0), "dim must be at least 1, got 0"),
        (lambda: problems.extremal(L0=0.0), "L0 must be positive and finite, got 0.0"),
        (lambda: problems.extremal(L1=math.nan), "L1 must be positive and finite, got nan"),
        (lambda: problems.extremal(dim=-1), "dim must be at least 1, got -1"),
        (lambda: problems.exp().L0(-0.5), "L1 must be non-negative and finite, got -0.5"),
        (lambda: problems.exp().L0(math.inf), "L1 must be non-negative and finite, got inf"),
        (
            lambda: problems.exp().f(torch.zeros(100)),
            r"x must have shape \(\.\.\., 1\) for exp, got \(100,\)",
        ),
        (lambda: problems.product().gradient(torch.tensor(1.0)), r"\(\.\.\., 2\) for product, got \(\)"),
        (lambda: problems.exp().hessian_norm(torch.tensor([1])), "real floating point, got torch.int64"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
