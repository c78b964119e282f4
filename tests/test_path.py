"""`smoothness.path_smoothness` on functions whose curvature is known, and what it must leave alone."""

import copy
import math
import tempfile
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradclip import problems
from gradclip.smoothness import fit, path_smoothness

FRACTIONS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


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


class Bag(nn.Module):
    """Batch norm in training mode, dropout, and weights tied between the first and the last layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def bag(device="cpu") -> tuple[Bag, Callable[[], Tensor], list[Tensor]]:
    torch.manual_seed(0)
    net = Bag().double().to(device)
    x, y = normal(20, 6, seed=1).to(device), normal(20, 6, seed=2).to(device)
    step = [0.1 * normal(*p.shape, seed=10 + i).to(device) for i, p in enumerate(net.parameters())]
    return net, lambda: ((net(x) - y) ** 2).mean(), step


@pytest.mark.parametrize("device", DEVICES)
def test_batch_norm_dropout_and_tied_weights(device):
    net, loss, step = bag(device)
    params = list(net.parameters())
    assert len(params) == 5  # the tied weight once
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    before, state = bits(params), torch.get_rng_state()
    fractions = (1e-5, 0.5)
    result = path_smoothness(loss, params, step, fractions=fractions)

    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(params, before)
    assert net.training
    assert path_smoothness(loss, params, step, fractions=fractions) == result

    # Independent: separate copies of the network, one per point, each with the stream that the call found.
    def gradient(a):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), step, strict=True):
                p += a * d
        torch.set_rng_state(state)
        x, y = normal(20, 6, seed=1).to(device), normal(20, 6, seed=2).to(device)
        ((moved(x) - y) ** 2).mean().backward()
        return torch.cat([p.grad.reshape(-1) for p in moved.parameters()])

    length = torch.cat([d.reshape(-1) for d in step]).norm()
    for a, value in zip(fractions, result.values, strict=True):
        expected = ((gradient(a) - gradient(0.0)).norm() / (a * length)).item()
        # Gradients of order 1e-1 rounded to 1e-16, over a displacement of 1e-5: ten digits and a margin.
        assert value == pytest.approx(expected, rel=1e-8)


def test_a_given_gradient_must_have_the_masks_of_the_call():
    net, loss, step = bag()
    params = list(net.parameters())
    state = torch.get_rng_state()
    same = torch.autograd.grad(loss(), params)
    later = torch.autograd.grad(loss(), params)
    torch.set_rng_state(state)
    expected = path_smoothness(loss, params, step, fractions=(1e-4,))
    assert path_smoothness(loss, params, step, fractions=(1e-4,), grad=same).values == expected.values
    # With other masks what is measured is the difference of two functions, which does not shrink with a.
    assert path_smoothness(loss, params, step, fractions=(1e-4,), grad=later).value > 100 * expected.value


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_buffers_and_streams_come_back_when_the_loss_raises(error):
    net, loss, step = bag()
    params = list(net.parameters())
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    before, state = bits(params), torch.get_rng_state()
    calls = 0

    def failing():
        nonlocal calls
        calls += 1
        value = loss()
        if calls == 3:
            raise error("stop")
        return value

    with pytest.raises(error, match="stop"):
        path_smoothness(failing, params, step)
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(params, before)


def test_tied_weights_count_once():
    w = leaf([[0.5, -0.2], [0.1, 0.9]])
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    one.weight = two.weight = nn.Parameter(w.detach().clone())
    x, d = normal(5, 2, seed=1), 0.3 * normal(2, 2, seed=2)
    net = nn.Sequential(one, two)
    tied = path_smoothness(lambda: net(x).pow(2).sum(), net.parameters(), [d])
    plain = path_smoothness(lambda: (x @ w.T @ w.T).pow(2).sum(), [w], [d])
    assert tied.values == pytest.approx(plain.values, rel=1e-12)  # another order of the same operations


def test_two_parameters_in_the_same_memory_are_refused():
    x = leaf([1.0, 2.0])
    y = x.detach().requires_grad_()
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] are two tensors in the same memory"):
        path_smoothness(lambda: (x * y).sum(), [x, y], [torch.ones(2), torch.ones(2)])
    flat = torch.zeros(4, dtype=torch.float64)  # neighbours in one storage are fine
    halves = [flat[:2].requires_grad_(), flat[2:].requires_grad_()]
    step = [torch.ones(2), torch.ones(2)]
    assert path_smoothness(lambda: sum((h**2).sum() for h in halves), halves, step).value == pytest.approx(2)


def test_bfloat16_autocast_has_the_floor_that_the_docstring_states():
    exact = Network()
    mixed = Network(torch.float32)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return mixed()

    fractions = (1.0, 1e-4)
    expected = path_smoothness(exact, exact.params, exact.step, fractions=fractions)
    measured = path_smoothness(loss, mixed.params, mixed.step, fractions=fractions)
    # At a = 1 the gradient changes by its own size, of which 4e-3 are rounding; some ten roundings are made.
    assert measured.values[0] == pytest.approx(expected.values[0], rel=0.05)
    floor = 4e-3 * measured.grad_norm / (1e-4 * measured.step_norm)
    assert abs(measured.values[1] - expected.values[1]) < 3 * floor
    assert floor > 3 * expected.values[1]  # so that nothing of the truth is left there

    # A region around the call keeps bfloat16 copies of the parameters, which must not be used again: neither
    # those made inside nor those made before the parameters were last changed.
    with torch.autocast("cpu", torch.bfloat16):
        assert path_smoothness(mixed, mixed.params, mixed.step, fractions=fractions) == measured
        for p in mixed.params:
            p.data.mul_(2)
        mixed()
        for p in mixed.params:
            p.data.div_(2)
        assert path_smoothness(mixed, mixed.params, mixed.step, fractions=fractions) == measured


def test_compiled_code_is_measured():
    torch._dynamo.reset()
    network = Network()
    compiled = torch.compile(network, backend="aot_eager")
    compiled()
    expected = path_smoothness(network, network.params, network.step)
    assert path_smoothness(compiled, network.params, network.step) == expected


class PeakMemory(TorchDispatchMode):
    """Bytes in storages made by operations inside, now and at most. Unlike a process's size, exact."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.outside(args, kwargs):
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    @staticmethod
    def outside(args, kwargs) -> set[int]:
        tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        return {t.untyped_storage()._cdata for t in tensors}


@pytest.mark.parametrize(("with_gradient", "multiple"), [(False, 3), (True, 2)])
def test_peak_memory_in_units_of_the_parameters(with_gradient, multiple):
    layers = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)), nn.Linear(256, 1024))
    x = normal(1, 256, seed=0).float()  # a batch of one: activations are a thousandth of the parameters
    params = list(layers.parameters())
    size = sum(4 * p.numel() for p in params)
    step = [torch.full_like(p, 1e-3) for p in params]

    def loss():
        return layers(x).square().sum()

    grad = torch.autograd.grad(loss(), params) if with_gradient else None
    with PeakMemory() as alone:
        torch.autograd.grad(loss(), params)
    with PeakMemory() as memory:
        path_smoothness(loss, params, step, grad=grad)
    # The tracker sees what it should: one evaluation holds its gradient and little else.
    assert size <= alone.peak < 1.05 * size
    # No more than 2 % for activations, norms of rows of 128 and random streams.
    assert (multiple - 0.01) * size <= memory.peak <= (multiple + 0.02) * size
    assert not memory.alive


@pytest.fixture
def mesh():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


@pytest.mark.parametrize("with_gradient", [False, True])
def test_distributed_parameters(mesh, with_gradient):
    plain, spread = Network(), Network()
    for i, placement in enumerate([Shard(0), Replicate(), Shard(1), Replicate()]):
        x = distribute_tensor(plain.params[i].detach().clone(), mesh, [placement])
        spread.params[i] = x.requires_grad_()
        # The step need not be laid out as the parameter is.
        spread.step[i] = distribute_tensor(plain.step[i], mesh, [Replicate()])
    spread.inputs = distribute_tensor(plain.inputs, mesh, [Replicate()])
    spread.targets = distribute_tensor(plain.targets, mesh, [Replicate()])
    before = bits([p.to_local() for p in spread.params])
    grad = torch.autograd.grad(spread(), spread.params) if with_gradient else None
    result = path_smoothness(spread, spread.params, spread.step, grad=grad)
    expected = path_smoothness(plain, plain.params, plain.step)
    assert result.values == pytest.approx(expected.values, rel=1e-12)  # the same operations on one rank
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
    assert_same_bits([p.to_local() for p in spread.params], before)


@pytest.mark.parametrize(
    ("steps", "batches", "slope"),
    [
        ("normalised", "same", 0.0),
        ("plain", "same", 0.0),
        ("normalised", "different", 1.0),
        ("plain", "different", 0.0),
    ],
)
def test_noise_between_batches_looks_like_smoothness_that_grows_with_the_gradient(steps, batches, slope):
    # Least squares on batches of five in ten dimensions. The Hessian of every batch is constant: L1 = 0.
    # Batches of one distance from the common minimum are independent of it, so that log g = log r + e1 and
    # log L = slope · log r + e2, with scatters e of at most 0.5 and log r uniform over 13.8: its variance V
    # is 15.9. The regression of log L on log g is off by at most |e1| (|e1| + |e2|) / V < 0.04 because e1 is
    # in g, and by 4 standard errors |e| / √(300 V) < 0.03 because there are 300 points.
    generator = torch.Generator().manual_seed(4)
    x = leaf(torch.zeros(10))
    batch = torch.empty(5, 10, dtype=torch.float64)

    def draw():
        return torch.randn(5, 10, generator=generator, dtype=torch.float64)

    def loss():
        return (batch @ x).square().mean() / 2

    points = []
    for distance in torch.logspace(-1, 5, 300, dtype=torch.float64):
        direction = torch.randn(10, generator=generator, dtype=torch.float64)
        x.data.copy_(distance * direction / direction.norm())
        batch = draw()
        (gradient,) = torch.autograd.grad(loss(), [x])
        step = -1e-3 * gradient / (gradient.norm() if steps == "normalised" else 1.0)
        if batches == "different":
            batch = draw()
        result = path_smoothness(loss, [x], [step], fractions=(1 / 2,), grad=[gradient])
        points.append((result.grad_norm, result.value))
    assert fit(*zip(*points, strict=True)).log_slope == pytest.approx(slope, abs=0.07)
