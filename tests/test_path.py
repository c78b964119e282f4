"""`smoothness.path_smoothness` on functions whose curvature is known, and what it must leave alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradclip import problems
from gradclip.smoothness import path_smoothness

FRACTIONS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)


def leaf(values, dtype=torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(eigenvalues: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix with these eigenvalues, and its eigenvectors as columns."""
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return basis @ eigenvalues.diag() @ basis.T, basis


class Network:
    """tanh network with a squared loss: curved in every direction, and its derivatives are bounded."""

    def __init__(self, dtype=torch.float64):
        self.inputs, self.targets = normal(20, 3, seed=1).to(dtype), normal(20, 2, seed=2).to(dtype)
        self.params = [
            leaf(normal(*shape, seed=3 + i), dtype) for i, shape in enumerate([(3, 4), (4,), (4, 2), (2,)])
        ]
        self.step = [0.3 * normal(*p.shape, seed=20 + i).to(dtype) for i, p in enumerate(self.params)]

    def __call__(self) -> Tensor:
        w1, b1, w2, b2 = self.params
        return ((torch.tanh(self.inputs @ w1 + b1) @ w2 + b2 - self.targets) ** 2).mean()


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().view(torch.int64) for t in tensors]


def assert_same_bits(tensors: list[Tensor], before: list[Tensor]) -> None:
    assert all(torch.equal(now, then) for now, then in zip(bits(tensors), before, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    eigenvalues=st.lists(st.floats(0.01, 100.0), min_size=2, max_size=5),
    seed=st.integers(0, 10**6),
    k=st.integers(0, 4),
    length=st.floats(1e-3, 1e3),
)
def test_a_quadratic_gives_its_eigenvalue_along_an_eigenvector(eigenvalues, seed, k, length):
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    matrix, basis = spd(spectrum, seed)
    k %= len(eigenvalues)
    x = leaf(normal(len(eigenvalues), seed=seed + 1))
    result = path_smoothness(lambda: x @ matrix @ x / 2, [x], [length * basis[:, k]])
    # Gradients are rounded to some 50 eps ‖A‖ (‖x‖ + length), and divided by at least length/6.
    tolerance = 1e-14 * 100 * (1 + (x.detach().norm().item() + length) / (length / 6))
    for value in result.values:
        assert value == pytest.approx(spectrum[k].item(), abs=tolerance)
    assert result.step_norm == pytest.approx(length, rel=1e-14)


def test_a_quadratic_gives_the_length_of_the_hessian_times_the_direction_at_every_fraction():
    matrix, _ = spd(torch.tensor([0.1, 1.0, 5.0, 20.0, 3.0, 7.0], dtype=torch.float64), seed=5)
    x, d = normal(6, seed=6), normal(6, seed=7)
    # The same vector in three tensors of different shapes: the norms run over all of them together.
    params = [leaf(x[:1]), leaf(x[1:5].reshape(2, 2)), leaf(x[5])]
    step = [d[:1], d[1:5].reshape(2, 2), d[5]]

    def loss():
        flat = torch.cat([p.reshape(-1) for p in params])
        return flat @ matrix @ flat / 2

    result = path_smoothness(loss, params, step, fractions=(1e-3, 0.5, 1.0, 10.0))
    expected = ((matrix @ d).norm() / d.norm()).item()
    # Rounding 1e-15 of gradients of size 50 over a difference of 1e-3 * 20, plus a margin of ten.
    assert result.values == pytest.approx((expected,) * 4, rel=3e-11)
    assert result.value == max(result.values)
    assert result.grad_norm == pytest.approx((matrix @ x).norm().item(), rel=1e-13)
    assert result.step_norm == pytest.approx(d.norm().item(), rel=1e-14)
    assert result.fractions == (1e-3, 0.5, 1.0, 10.0)
    assert result.gradients == 5


@pytest.mark.parametrize("problem", problems.ALL, ids=lambda p: p.name)
@pytest.mark.parametrize("L1", [0.0, 0.5, 1.0, 3.0])
def test_no_estimate_exceeds_the_bound_of_the_hessian_form(problem, L1):
    L0 = problem.L0(L1)
    for seed in range(10):
        x = leaf(1.5 * normal(problem.dim, seed=seed))
        result = path_smoothness(lambda x=x: problem.f(x), [x], [normal(problem.dim, seed=100 + seed)])
        for a, value in zip(result.fractions, result.values, strict=True):
            t = L1 * a * result.step_norm
            growth = math.expm1(t) / t if t > 0 else 1.0
            # Gradients of size up to 1e3 are rounded to 1e-13 and divided by displacements above 1e-3.
            assert value <= (L0 + L1 * result.grad_norm) * growth * (1 + 1e-12) + 1e-9


@pytest.mark.parametrize(("L0", "L1"), [(1.0, 1.0), (0.2, 3.0), (10.0, 0.1)])
def test_the_extremal_function_attains_the_bound(L0, L1):
    problem = problems.extremal(L0, L1)
    x = leaf([0.7 / L1])
    result = path_smoothness(lambda: problem.f(x), [x], [torch.tensor([2.0 / L1], dtype=torch.float64)])
    for a, value in zip(result.fractions, result.values, strict=True):
        t = L1 * a * result.step_norm
        # The difference of gradients is at least a seventh of the larger one: a few roundings, times seven.
        assert value == pytest.approx((L0 + L1 * result.grad_norm) * math.expm1(t) / t, rel=2e-14)
    assert result.value == result.values[-1]


def test_small_fractions_converge_to_the_hessian_vector_product():
    network = Network()
    gradient = torch.autograd.grad(network(), network.params, create_graph=True)
    product = torch.autograd.grad(gradient, network.params, grad_outputs=network.step)

    def norm(tensors):
        return torch.cat([t.reshape(-1) for t in tensors]).norm().item()

    expected = norm(product) / norm(network.step)
    fractions = (1e-2, 1e-3, 1e-4, 1e-6)
    result = path_smoothness(network, network.params, network.step, fractions=fractions)
    errors = [abs(value / expected - 1) for value in result.values]
    # The truncation is a times a constant of order one here, so ten times less from one fraction to the next.
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)
    assert errors[2] == pytest.approx(errors[0] / 100, rel=0.1)
    assert errors[3] < 1e-5


def test_float32_keeps_two_digits_at_the_smallest_fraction_recommended_and_none_far_below():
    exact, single = Network(), Network(torch.float32)
    fractions = (1e-2, 1e-7)
    expected = path_smoothness(exact, exact.params, exact.step, fractions=fractions).values
    measured = path_smoothness(single, single.params, single.step, fractions=fractions).values
    assert measured[0] == pytest.approx(expected[0], rel=1e-2)
    assert abs(measured[1] / expected[1] - 1) > 0.1


def test_a_rotation_of_the_coordinates_changes_nothing():
    matrix, _ = spd(torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64), seed=8)
    rotation = torch.linalg.qr(normal(3, 3, seed=9)).Q
    x, d = normal(3, seed=10), normal(3, seed=11)

    def f(z):
        return torch.cosh(matrix @ z / 10).sum()

    straight, turned = leaf(x), leaf(rotation.T @ x)
    one = path_smoothness(lambda: f(straight), [straight], [d])
    two = path_smoothness(lambda: f(rotation @ turned), [turned], [rotation.T @ d])
    assert two.values == pytest.approx(
        one.values, rel=1e-12
    )  # gradients of order one, differences of order 0.1
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-12)


def awkward() -> Tensor:
    """Numbers that arithmetic would not give back: x + d − d, or a sign of zero, or a subnormal."""
    return leaf([-0.0, 0.1, 1e-310, 1e16, math.pi])


def test_parameters_get_their_bits_back():
    x = awkward()
    before = bits([x])
    path_smoothness(lambda: (x**2).sum(), [x], [torch.full((5,), 0.1, dtype=torch.float64)])
    assert_same_bits([x], before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_parameters_get_their_bits_back_when_the_loss_raises(error, call):
    x, y = awkward(), leaf([3.0])
    before = bits([x, y])
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        if calls == call:
            # From the second call on the parameters are really displaced when the error strikes.
            assert torch.equal(y.detach(), torch.tensor([3.0], dtype=torch.float64)) == (call == 1)
            raise error("stop")
        return (x**2).sum() + (y**2).sum()

    step = [torch.full((5,), 0.1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    with pytest.raises(error, match="stop"):
        path_smoothness(loss, [x, y], step)
    assert calls == call
    assert_same_bits([x, y], before)


def test_measuring_does_not_disturb_training():
    network = Network()
    network().backward()
    kept = [p.grad.clone() for p in network.params]
    versions = [p._version for p in network.params]
    before, random_state = bits(network.params), torch.get_rng_state()
    pending = network()  # a graph that is differentiated only after the measurement

    path_smoothness(network, network.params, network.step)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_bits(network.params, before)
    assert [p._version for p in network.params] == versions
    assert all(p.requires_grad for p in network.params)
    assert all(torch.equal(p.grad, g) for p, g in zip(network.params, kept, strict=True))
    pending.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(network.params, kept, strict=True))


def test_it_works_where_gradients_are_switched_off():
    network = Network()
    expected = path_smoothness(network, network.params, network.step)
    with torch.no_grad():
        assert path_smoothness(network, network.params, network.step) == expected
        assert not torch.is_grad_enabled()


def test_a_given_gradient_is_used_instead_of_evaluated():
    network = Network()
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        return network()

    fresh = path_smoothness(loss, network.params, network.step)
    assert (calls, fresh.gradients) == (6, 6)
    assert fresh.fractions == FRACTIONS
    network().backward()
    calls = 0
    reused = path_smoothness(loss, network.params, network.step, grad=[p.grad for p in network.params])
    assert (calls, reused.gradients) == (5, 5)
    assert reused.values == fresh.values
    assert reused.grad_norm == fresh.grad_norm


def test_unused_parameters_count_with_gradient_zero():
    x, unused = leaf([1.0, 2.0]), leaf([5.0])
    step = [torch.tensor([0.3, -0.4], dtype=torch.float64), torch.tensor([1.2], dtype=torch.float64)]
    result = path_smoothness(lambda: (x**2).sum(), [x, unused], step)
    # ‖H d‖ = 2 * 0.5 and ‖d‖ = 1.3: the unused coordinate lengthens the step but has no curvature.
    assert result.values == pytest.approx((1.0 / 1.3,) * 5, rel=1e-14)
    (x**2).sum().backward()
    given_gradient = path_smoothness(lambda: (x**2).sum(), [x, unused], step, grad=[x.grad, unused.grad])
    assert unused.grad is None
    assert given_gradient.values == result.values


def test_parameters_that_share_one_gradient_tensor():
    x, y = leaf([1.0, 2.0]), leaf([0.5, -1.0])
    step = [torch.tensor([0.3, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.4], dtype=torch.float64)]
    # H = 2 [[I, I], [I, I]]: H d = 2 (0.3, 0.4, 0.3, 0.4), so ‖H d‖/‖d‖ = 2 √0.5 / 0.5.
    result = path_smoothness(lambda: ((x + y) ** 2).sum(), [x, y], step)
    assert result.values == pytest.approx((2 * math.sqrt(2),) * 5, rel=1e-14)
    # A linear loss has an expanded gradient of one stored number, and no curvature.
    assert path_smoothness(lambda: (x + y).sum(), [x, y], step).value == 0.0


def test_parameters_and_step_may_have_different_floating_dtypes():
    x, y = leaf([1.0, 2.0]), leaf([3.0], dtype=torch.float32)
    step = [torch.tensor([0.5, 0.25]), torch.tensor([0.5], dtype=torch.bfloat16)]  # exact in every dtype
    result = path_smoothness(lambda: (x**2).sum() + (y.double() ** 2).sum(), [x, y], step, fractions=(0.5, 1))
    assert result.values == pytest.approx((2.0, 2.0), rel=1e-6)  # float32 norms
    assert (x.dtype, y.dtype) == (torch.float64, torch.float32)


def test_overflow_and_nan_are_reported_and_do_not_raise():
    x = leaf([1.0])
    step = [torch.tensor([3.0], dtype=torch.float64)]
    # 1e307 e^x overflows beyond x = 2.9: the first fractions are finite, the last is not.
    result = path_smoothness(lambda: (1e307 * x.exp()).sum(), [x], step)
    assert math.isfinite(result.values[0])
    assert result.value == result.values[-1] == math.inf
    result = path_smoothness(lambda: (math.nan * x).sum(), [x], step)
    assert math.isnan(result.value)
    assert math.isnan(result.grad_norm)


def test_nan_at_one_fraction_makes_the_value_nan():
    x = leaf([1.0])
    step = [torch.tensor([-2.0], dtype=torch.float64)]  # log(x) leaves its domain half way
    result = path_smoothness(lambda: (x * x.log()).sum(), [x], step, fractions=(0.25, 0.75, 0.1))
    assert [math.isnan(value) for value in result.values] == [False, True, False]
    assert math.isnan(result.value)


X = leaf([1.0, 2.0])
Y = leaf([3.0])
STEP = [torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)]


def quadratic_loss() -> Tensor:
    return (X**2).sum() + (Y**2).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": []}, r"params must not be empty, got \[\]"),
        ({"params": [X, X]}, r"params\[0\] and params\[1\] are the same tensor: list it once"),
        (
            {"params": [X, torch.ones(1)]},
            r"params\[1\] must be a leaf that requires a gradient.*requires_grad=F",
        ),
        ({"params": [X, Y * 2]}, r"params\[1\] must be a leaf that requires a gradient, got is_leaf=False"),
        ({"params": [X, torch.ones(1, dtype=torch.complex64)]}, r"params\[1\] must be real.*complex64"),
        ({"step": STEP[:1]}, "step must have one tensor per parameter, got 1 for 2"),
        ({"step": [STEP[0], torch.ones(1, 1)]}, r"step\[1\] has shape \(1, 1\), params\[1\] has \(1,\)"),
        ({"step": [STEP[0].to_sparse(), STEP[1]]}, r"step\[0\] must be dense.*torch.sparse_coo"),
        ({"step": [STEP[0], torch.ones(1, dtype=torch.int64)]}, r"step\[1\] must be dense.*torch.int64"),
        ({"step": [STEP[0], torch.ones(1, device="meta")]}, r"step\[1\] is on meta, params\[1\] on cpu"),
        ({"step": [0 * STEP[0], 0 * STEP[1]]}, "the norm of step must be positive and finite, got 0.0"),
        ({"step": [STEP[0], math.nan * STEP[1]]}, r"got nan \(step\[1\] is not finite\)"),
        ({"step": [math.inf * STEP[0], STEP[1]]}, r"got inf \(step\[0\] is not finite\)"),
        ({"fractions": ()}, r"fractions must not be empty, got \(\)"),
        ({"fractions": (0.5, 0.0)}, "fractions must be positive and finite, got 0.0"),
        ({"fractions": (-0.5,)}, "fractions must be positive and finite, got -0.5"),
        ({"fractions": (math.inf,)}, "fractions must be positive and finite, got inf"),
        ({"grad": STEP[:1]}, "grad must have one tensor per parameter, got 1 for 2"),
        ({"grad": [STEP[1], STEP[1]]}, r"grad\[0\] has shape \(1,\), params\[0\] has \(2,\)"),
        ({"loss": lambda: X * 2}, r"loss must return one element, got shape \(2,\)"),
        ({"loss": lambda: 1.0}, "loss must return a tensor, got float"),
        ({"loss": lambda: torch.tensor(1.0)}, "loss must depend on params"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"loss": quadratic_loss, "params": [X, Y], "step": STEP} | change
    with pytest.raises(ValueError, match=message):
        path_smoothness(arguments.pop("loss"), arguments.pop("params"), arguments.pop("step"), **arguments)


@pytest.mark.parametrize(
    ("params", "step", "grad", "message"),
    [
        (X, [STEP[0]], None, r"params must be a list of tensors, got one tensor of shape \(2,\)"),
        ([X], STEP[0], None, r"step must be a list of tensors, got one tensor of shape \(2,\)"),
        ([X], [STEP[0]], STEP[0], r"grad must be a list of tensors, got one tensor of shape \(2,\)"),
        ([X], [None], None, r"step\[0\] must be a tensor, got NoneType"),
        ([X], [STEP[0].numpy()], None, r"step\[0\] must be a tensor, got ndarray"),
        ([X], [STEP[0]], [1.0], r"grad\[0\] must be a tensor, got float"),
    ],
)
def test_things_that_are_not_lists_of_tensors_are_named(params, step, grad, message):
    with pytest.raises(TypeError, match=message):
        path_smoothness(quadratic_loss, params, step, grad=grad)


def test_sparse_gradients_are_refused():
    weight = leaf([[1.0], [2.0], [3.0]])

    def loss():
        rows = torch.nn.functional.embedding(torch.tensor([0, 2]), weight, sparse=True)
        return (rows**2).sum()

    with pytest.raises(
        ValueError, match=r"the gradient of params\[0\] must be dense, got layout torch.sparse_coo"
    ):
        path_smoothness(loss, [weight], [torch.ones_like(weight)])
