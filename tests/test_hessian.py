"""`smoothness.hessian`: against closed forms, dense Hessians and scipy; what it must leave alone."""

import gc
import math
import warnings
import weakref

import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from gradclip import problems
from gradclip.models.lstm import LanguageModel
from gradclip.models.resnet import ResNet
from gradclip.smoothness import directional_smoothness, hessian_norm, path_smoothness, top_eigenvalues

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def leaf(values, dtype=torch.float64) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).clone().requires_grad_()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def rotated(spectrum: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with this spectrum, and its eigenvectors as columns."""
    basis = torch.linalg.qr(normal(len(spectrum), len(spectrum), seed=seed)).Q
    matrix = basis @ spectrum.diag() @ basis.T
    return (matrix + matrix.T) / 2, basis


def quadratic(matrix: Tensor, x: Tensor):
    return lambda: x @ matrix @ x / 2


def dense(loss, params: list[Tensor]) -> Tensor:
    """The Hessian as a matrix: torch's own, row by row on a fresh graph, with nothing of the library."""
    sizes = [p.numel() for p in params]
    blocks = []
    for i, p in enumerate(params):
        gradient = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)[i].reshape(
            -1
        )
        for entry in gradient:
            row = torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True)
            blocks.append(torch.cat([r.reshape(-1) for r in row]))
        assert len(gradient) == sizes[i] == p.numel()
    return torch.stack(blocks)


# Closed forms


@pytest.mark.parametrize("problem", problems.ALL, ids=lambda p: p.name)
@pytest.mark.parametrize("tol", [1e-2, 1e-8])
def test_problems_have_the_norm_of_their_closed_form(problem, tol):
    for seed in range(5):
        x = leaf(problem.x0 + normal(problem.dim, seed=seed))
        result = hessian_norm(lambda x=x: problem.f(x), [x], tol=tol)
        # At most two variables: the Krylov space is the whole space, and only rounding is left.
        assert result.value == pytest.approx(problem.hessian_norm(x.detach()).item(), rel=1e-9)
        assert result.converged
        assert result.hvps == problem.dim


@pytest.mark.parametrize(
    "problem",
    [problems.power(4, dim=30), problems.power(3, dim=30), problems.extremal(0.5, 2.0, dim=30)],
    ids=lambda p: p.name,
)
def test_radial_problems_in_many_variables(problem):
    x = leaf(normal(30, seed=0))
    result = hessian_norm(lambda: problem.f(x), [x])
    # Two different eigenvalues, along x and across it: two products span an invariant subspace.
    assert result.value == pytest.approx(problem.hessian_norm(x.detach()).item(), rel=1e-9)
    assert result.converged
    assert result.residual < 1e-9
    assert result.hvps == 2


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("seed", range(3))
def test_rotated_quadratics_to_the_tolerance_asked(tol, seed):
    spectrum = torch.linspace(1, 10, 40, dtype=torch.float64) ** 2
    problem = problems.quadratic(spectrum.tolist(), seed=seed)
    x = leaf(problem.x0)
    result = hessian_norm(lambda: problem.f(x), [x], tol=tol)
    assert result.converged
    assert 100.0 * (1 - tol) <= result.value <= 100.0 * (1 + 1e-13)


# The spectra that make or break the stopping rule.
def spectra(n: int, seed: int) -> dict[str, Tensor]:
    uniform = 2 * torch.rand(n, generator=seeded(seed), dtype=torch.float64) - 1
    bulk = 0.1 * uniform
    signs = torch.where(torch.rand(n, generator=seeded(seed + 1)) < 0.2, -1.0, 1.0).double()

    def outliers(*values: float) -> Tensor:
        return torch.cat([torch.tensor(values, dtype=torch.float64), bulk[len(values) :]])

    return {
        "bulk": uniform,
        "one": outliers(1.0),
        "two": outliers(1.0, 0.5),
        "negative": outliers(-1.0, 0.7),
        "both ends": outliers(1.0, -0.95),
        "like a classifier": outliers(1.0, 0.72, 0.6, 0.55, 0.4, 0.33, 0.3, -0.15),
        "fast": signs * 0.5 ** torch.arange(n),
        "slow": signs * 0.9 ** torch.arange(n),
        "power": signs / torch.arange(1, n + 1),
        "close": outliers(1.0, 0.97),
        "cluster": outliers(1.0, 0.97, 0.94),
        "double": outliers(1.0, 1.0, 0.6),
    }


# All others have a second eigenvalue within 10 % of the first, of the same sign.
SEPARATED = ["one", "two", "negative", "both ends", "like a classifier", "fast", "power", "double"]


@pytest.mark.parametrize("name", list(spectra(4, 0)))
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_converged_means_within_the_tolerance(name, tol):
    wrong, seeds = 0, 20
    for seed in range(seeds):
        spectrum = spectra(100, seed)[name]
        x = leaf(normal(100, seed=seed + 50))
        result = hessian_norm(
            lambda x=x, spectrum=spectrum: (spectrum * x**2).sum() / 2, [x], tol=tol, generator=seeded(seed)
        )
        assert result.converged
        norm = spectrum.abs().max().item()
        # Without exception: a lower bound, and an eigenvalue within the residual.
        assert result.value <= norm * (1 + 1e-12)
        distance = (spectrum.abs() - result.value).abs().min().item()
        assert distance <= result.residual * result.value + 1e-12
        error = 1 - result.value / norm
        wrong += error > tol
        # A start that hardly has the first eigenvector gives one of its neighbours instead.
        assert error <= (tol if name in SEPARATED else 0.105)
    assert wrong <= seeds / 5


def test_a_small_residual_after_one_product_is_not_believed():
    # The gradient is the eigenvector of 1, and 10 is not in it. Of the random part nearly all belongs to 1:
    # after one product the residual would be below 1 %.
    spectrum = torch.ones(400, dtype=torch.float64)
    spectrum[0] = 10.0
    x = leaf(torch.eye(400, dtype=torch.float64)[1])
    result = hessian_norm(lambda: (spectrum * x**2).sum() / 2, [x])
    assert result.value == pytest.approx(10.0, rel=1e-6)


def test_a_gradient_without_the_leading_eigenvector_is_no_obstacle():
    spectrum = spectra(300, 3)["two"]
    matrix, basis = rotated(spectrum, 4)
    x = normal(300, seed=5)
    x = leaf(x - basis[:, 0] * (basis[:, 0] @ x))  # no component of the leading eigenvector, nor has A x
    loss = quadratic(matrix, x)
    gradient = torch.autograd.grad(loss(), [x])[0]
    assert abs(gradient @ basis[:, 0]) < 1e-14
    for seed in range(10):
        result = hessian_norm(loss, [x], generator=seeded(seed))
        assert result.value == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_norm_is_of_either_sign(sign):
    spectrum = sign * torch.cat([torch.tensor([-2.0, 1.9]), torch.linspace(-0.5, 0.5, 100)]).double()
    matrix, _ = rotated(spectrum, 1)
    x = leaf(normal(102, seed=2))
    assert hessian_norm(quadratic(matrix, x), [x], tol=1e-3).value == pytest.approx(2.0, rel=1e-3)
    values = top_eigenvalues(quadratic(matrix, x), [x], 2, tol=1e-3).values
    assert values == pytest.approx((-2.0 * sign, 1.9 * sign), rel=1e-3)


def test_at_a_stationary_point_the_start_is_random():
    x = leaf(torch.zeros(30))
    matrix, _ = rotated(torch.linspace(-3, 5, 30, dtype=torch.float64), 2)
    assert hessian_norm(quadratic(matrix, x), [x]).value == pytest.approx(5.0, rel=1e-2)


def test_a_rotation_of_the_coordinates_changes_nothing():
    spectrum = spectra(60, 1)["like a classifier"]
    rotation = torch.linalg.qr(normal(60, 60, seed=9)).Q
    x = normal(60, seed=10)
    straight, turned = leaf(x), leaf(rotation.T @ x)

    def f(z):
        return (spectrum * (z.cosh() - 1)).sum()

    one = hessian_norm(lambda: f(straight), [straight], tol=1e-6)
    two = hessian_norm(lambda: f(rotation @ turned), [turned], tol=1e-6)
    exact = (spectrum * x.cosh()).abs().max().item()
    # The random part of the start is another one relative to the function: equal to the tolerance only.
    assert one.value == pytest.approx(exact, rel=1e-6)
    assert two.value == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_units_do_not_matter(scale):
    matrix, _ = rotated(spectra(50, 0)["power"], 0)
    x = leaf(normal(50, seed=1))
    one = hessian_norm(quadratic(matrix, x), [x])
    scaled = hessian_norm(lambda: scale * quadratic(matrix, x)(), [x])
    assert scaled.value == pytest.approx(scale * one.value, rel=1e-12)
    assert (scaled.hvps, scaled.converged) == (one.hvps, True)


# The bound from above


@pytest.mark.parametrize("name", list(spectra(4, 0)))
def test_upper_holds_with_the_probability_stated(name):
    # Stopped early, so that eigenvalues are hidden; the oracle is the spectrum. Half of the gradients have
    # nothing of the leading eigenvector.
    confidence, seeds, below = 0.9, 100, 0
    for seed in range(seeds):
        spectrum = spectra(100, seed)[name]
        x = leaf(normal(100, seed=seed + 50))
        if seed % 2:
            x = leaf(torch.where(spectrum.abs() == spectrum.abs().max(), 0.0, x.detach()))
        result = hessian_norm(
            lambda x=x, spectrum=spectrum: (spectrum * x**2).sum() / 2,
            [x],
            tol=1e-8,
            max_iter=3 + seed % 4,
            generator=seeded(seed),
            confidence=confidence,
        )
        assert result.upper >= result.value
        below += result.upper < spectrum.abs().max().item() * (1 - 1e-12)
    # Three standard deviations of the binomial above its mean of 10.
    assert below <= seeds * (1 - confidence) + 3 * math.sqrt(seeds * confidence * (1 - confidence))


def test_upper_is_not_vacuous():
    # How far above: from 4,000 normal numbers, at most √(8000 / 0.004) = 1,400 must be made up for.
    spectrum = torch.cat([torch.tensor([1.0]).double(), 0.02 * normal(4000, seed=1)])
    x = leaf(normal(4001, seed=2))
    ups = [
        hessian_norm(lambda: (spectrum * x**2).sum() / 2, [x], tol=1e-12, max_iter=m).upper
        for m in range(1, 9)
    ]
    assert ups == sorted(ups, reverse=True)
    assert ups[-1] <= 1.001


@pytest.mark.parametrize("name", ["close", "cluster", "bulk", "like a classifier"])
def test_with_confidence_the_norm_is_within_the_tolerance(name):
    wrong, seeds = 0, 40
    for seed in range(seeds):
        spectrum = spectra(100, seed)[name]
        x = leaf(normal(100, seed=seed + 50))
        result = hessian_norm(
            lambda x=x, spectrum=spectrum: (spectrum * x**2).sum() / 2,
            [x],
            generator=seeded(seed),
            confidence=0.95,
        )
        assert result.converged
        assert result.upper <= 1.01 * result.value * (1 + 1e-12)
        wrong += result.value < 0.99 * spectrum.abs().max().item()
    assert wrong <= 6  # the mean is at most 2, its standard deviation 1.4


def test_a_hidden_eigenvalue_is_found_when_confidence_is_asked_for():
    # The gradient has nothing of the eigenvalue 1.2, and of the random part one of 100,000 is along it.
    spectrum = torch.cat([torch.tensor([1.2, 1.0]).double(), 0.3 * normal(100_000, seed=1).tanh()])
    x = torch.zeros(100_002).double()
    x[1] = 1.0
    x = leaf(x)

    def loss():
        return (spectrum * x**2).sum() / 2

    fast = hessian_norm(loss, [x])
    assert fast.converged
    assert fast.value == pytest.approx(1.0, rel=1e-2)  # wrong, and this is what `upper` is for
    assert fast.upper > 1.2
    certain = hessian_norm(loss, [x], confidence=0.95)
    assert certain.value == pytest.approx(1.2, rel=1e-2)
    assert 1.2 <= certain.upper <= 1.01 * certain.value
    assert certain.hvps > fast.hvps


def test_nothing_is_hidden_once_the_krylov_space_is_exhausted():
    matrix, _ = rotated(torch.linspace(-3, 5, 6, dtype=torch.float64), 2)
    x = leaf(normal(6, seed=1))
    result = hessian_norm(quadratic(matrix, x), [x], confidence=0.999)
    assert (result.hvps, result.converged) == (6, True)
    assert 5.0 * (1 - 1e-12) <= result.upper <= 5.0 * (1 + 2e-4)  # it is searched for to 1e-4


# Several eigenvalues


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("name", ["bulk", "like a classifier", "slow", "double"])
def test_top_eigenvalues_are_those_of_scipy(name, k):
    matrix, _ = rotated(spectra(80, 7)[name], 8)
    x = leaf(normal(80, seed=9))
    result = top_eigenvalues(quadratic(matrix, x), [x], k, tol=1e-7)
    expected = eigsh(matrix.numpy(), k=k, which="LM", return_eigenvectors=False, tol=1e-12)
    expected = sorted(expected.tolist(), key=abs, reverse=True)
    assert result.converged
    assert result.values == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert max(result.residuals) < 1e-2


def test_multiple_eigenvalues_are_all_counted():
    spectrum = torch.tensor([5.0] * 3 + [-4.0] * 2 + [1.0] * 20, dtype=torch.float64)
    matrix, _ = rotated(spectrum, 3)
    x = leaf(normal(25, seed=4))
    result = top_eigenvalues(quadratic(matrix, x), [x], 6, tol=1e-6)
    assert result.values == pytest.approx((5.0, 5.0, 5.0, -4.0, -4.0, 1.0), rel=1e-6)
    assert result.converged


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_eigenvalues_of_a_small_matrix(n):
    spectrum = torch.linspace(1, n, n, dtype=torch.float64)
    matrix, _ = rotated(spectrum, 1)
    x = leaf(normal(n, seed=2))
    result = top_eigenvalues(quadratic(matrix, x), [x], n)
    assert result.values == pytest.approx(spectrum.flip(0).tolist(), rel=1e-12)
    assert result.converged
    assert result.hvps == n


def test_eigenvalues_beyond_the_rank_are_zero():
    x = leaf(normal(20, seed=2))
    d = normal(20, seed=3)
    result = top_eigenvalues(lambda: (d @ x) ** 2 / 2, [x], 3)
    assert result.values[0] == pytest.approx((d @ d).item(), rel=1e-12)
    assert result.values[1:] == pytest.approx((0.0, 0.0), abs=1e-12)
    assert result.converged


# Networks, against dense Hessians


class Model:
    """A loss in float64 that can be called, and its parameters."""

    def __init__(self, module: nn.Module, forward):
        self.module, self.forward = module.double(), forward
        self.params = list(module.parameters())

    def __call__(self) -> Tensor:
        return self.forward(self.module)


def build(seed: int, make) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def mlp() -> Model:
    net = build(0, lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    return Model(net, lambda net: cross_entropy(net(normal(12, 4, seed=1)), torch.arange(12) % 3))


def batch_norm() -> Model:
    net = build(
        0,
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(27, 2)
        ),
    )
    return Model(net, lambda net: cross_entropy(net(normal(6, 1, 5, 5, seed=1)), torch.arange(6) % 2))


def resnet() -> Model:
    net = ResNet(2, blocks=1, width=1, channels=1, generator=seeded(3))
    return Model(net, lambda net: cross_entropy(net(normal(8, 1, 8, 8, seed=1)), torch.arange(8) % 2))


def lstm() -> Model:
    net = LanguageModel(5, embedding=3, hidden=4, generator=seeded(0))
    words = torch.randint(5, (5, 3), generator=seeded(1))
    return Model(net, lambda net: net.loss(words[:-1], words[1:], net.initial_state(3))[0])


def gru() -> Model:
    net = build(0, lambda: nn.GRU(3, 4))
    return Model(net, lambda net: net(normal(5, 2, 3, seed=1))[0].square().sum())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True))


def attention() -> Model:
    net = build(0, Attention)
    return Model(net, lambda net: net(normal(2, 1, 5, 4, seed=1)).square().mean())


def multihead() -> Model:
    net = build(0, lambda: nn.MultiheadAttention(4, 2))
    x = normal(5, 2, 4, seed=1)
    return Model(net, lambda net: net(x, x, x, need_weights=False)[0].square().mean())


def tied() -> Model:
    net = build(0, lambda: nn.Linear(5, 5))
    x = normal(7, 5, seed=1)
    return Model(net, lambda net: (net(net(x).tanh()) @ net.weight).square().mean())


MODELS = [mlp, batch_norm, resnet, lstm, gru, attention, multihead, tied]


def unfused(model: Model):
    """The same loss for the dense Hessian, by the plain kernels."""

    def loss():
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return model()
        finally:
            torch.backends.mkldnn.enabled = before

    return loss


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_networks_have_the_norm_of_their_dense_hessian(make):
    model = make()
    matrix = dense(unfused(model), model.params)
    exact = torch.linalg.eigvalsh(matrix).abs().max().item()
    other = abs(eigsh(matrix.numpy(), k=1, which="LM", return_eigenvectors=False, tol=1e-10)[0])
    assert other == pytest.approx(exact, rel=1e-9)
    assert hessian_norm(model, model.params).value == pytest.approx(exact, rel=1e-2)
    tight = hessian_norm(model, model.params, tol=1e-8, max_iter=400)
    assert tight.value == pytest.approx(exact, rel=1e-8)
    assert tight.converged

    step = [normal(*p.shape, seed=i) for i, p in enumerate(model.params)]
    flat = torch.cat([d.reshape(-1) for d in step])
    along = ((matrix @ flat).norm() / flat.norm()).item()
    assert directional_smoothness(model, model.params, step) == pytest.approx(along, rel=1e-10)


def test_the_dense_hessian_of_torch_func_agrees():
    model = mlp()
    sizes = [p.numel() for p in model.params]

    def f(flat):
        named = zip(dict(model.module.named_parameters()), flat.split(sizes), model.params, strict=True)
        values = {name: piece.view(p.shape) for name, piece, p in named}
        logits = torch.func.functional_call(model.module, values, normal(12, 4, seed=1))
        return cross_entropy(logits, torch.arange(12) % 3)

    matrix = torch.func.jacrev(torch.func.grad(f))(torch.cat([p.detach().reshape(-1) for p in model.params]))
    exact = torch.linalg.eigvalsh(matrix).abs().max().item()
    assert hessian_norm(model, model.params, tol=1e-8).value == pytest.approx(exact, rel=1e-8)


def test_batch_norm_in_training_mode_couples_the_batch():
    # The trap: products that treat the statistics of the batch as constants are of another function.
    model = batch_norm()
    norm = hessian_norm(model, model.params, tol=1e-6).value
    statistics = {}
    hook = model.module[1].register_forward_pre_hook(lambda m, args: statistics.update(x=args[0].detach()))
    model()
    hook.remove()
    layer = model.module[1]
    layer.running_mean.copy_(statistics["x"].mean((0, 2, 3)))
    layer.running_var.copy_(statistics["x"].var((0, 2, 3), unbiased=False))
    model.module.eval()
    same_value = model().item()
    frozen = hessian_norm(model, model.params, tol=1e-6).value
    model.module.train()
    assert model().item() == pytest.approx(same_value, rel=1e-12)
    assert abs(frozen / norm - 1) > 0.03  # and the norm itself is compared with the dense Hessian above


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.BatchNorm1d(3), (7, 3)),
        (lambda: nn.BatchNorm1d(3, eps=0.5), (4, 3, 5)),
        (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
        (lambda: nn.BatchNorm3d(3), (2, 3, 2, 2, 3)),
        (lambda: nn.BatchNorm1d(3, track_running_stats=False), (7, 3)),
        (lambda: nn.BatchNorm1d(3, affine=False), (7, 3)),
        (lambda: nn.BatchNorm1d(3).eval(), (7, 3)),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_batch_norm_in_all_its_forms(layer, shape, last):
    # Its second derivative is the library's own where scale and shift are learned; torch's is the reference.
    layer = layer().double()
    x, scale = leaf(3.0 + normal(*shape, seed=1)), leaf(1.0 + 0.3 * normal(3, seed=2))
    target = normal(*shape, seed=3)
    if last and len(shape) == 4:
        target = target.contiguous(memory_format=torch.channels_last)
    params = [x, scale, *layer.parameters()]
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.3 * normal(3, seed=4 + i))

    def loss():
        z = layer(x * scale.view(-1, *(1,) * (len(shape) - 2)))
        # Linear in z or not: the two parts of the second derivative.
        return ((z * target) if last else (z + target).exp()).sum()

    matrix = dense(loss, params)
    for seed in range(3):
        d = [normal(*p.shape, seed=10 * seed + i) for i, p in enumerate(params)]
        flat = torch.cat([t.reshape(-1) for t in d])
        along = ((matrix @ flat).norm() / flat.norm()).item()
        assert directional_smoothness(loss, params, d) == pytest.approx(along, rel=1e-10)
    exact = torch.linalg.eigvalsh(matrix).abs().max().item()
    assert hessian_norm(loss, params, tol=1e-8, max_iter=300).value == pytest.approx(exact, rel=1e-8)


def test_batch_norm_keeps_torchs_errors():
    layer = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        hessian_norm(lambda: layer(torch.ones(1, 3)).sum(), layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_on_every_device_and_in_single_precision(dtype, device):
    model = resnet()
    exact = hessian_norm(model, model.params, tol=1e-8).value
    net = model.module.to(device, dtype)
    images, labels = normal(8, 1, 8, 8, seed=1).to(device, dtype), (torch.arange(8) % 2).to(device)

    def loss():
        return cross_entropy(net(images), labels)

    result = hessian_norm(loss, net.parameters(), tol=1e-4)
    # float32 products of this net are right to about 1e-6.
    assert result.value == pytest.approx(exact, rel=1.1e-4)
    assert result.converged
    generator = torch.Generator(device).manual_seed(3)
    assert hessian_norm(loss, net.parameters(), generator=generator).value == pytest.approx(exact, rel=1e-2)


def test_a_tolerance_below_the_rounding_of_the_products_is_not_claimed():
    weights = normal(60, 60, seed=1).float()
    x = leaf(normal(60, seed=2), torch.float32)
    result = hessian_norm(lambda: (weights @ x).sin().square().sum(), [x], tol=1e-13)
    assert not result.converged
    assert 1e-8 < result.residual < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_autocast_inside_and_around_the_loss(device):
    net = build(0, lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))).to(device)
    x, y = normal(64, 16, seed=1).float().to(device), (torch.arange(64) % 4).to(device)
    exact = hessian_norm(lambda: cross_entropy(net(x), y), net.parameters(), tol=1e-4).value

    def inside():
        with torch.autocast(device, torch.bfloat16):
            return cross_entropy(net(x), y)

    # Eight bits: some 4e-3 per operation.
    one = hessian_norm(inside, net.parameters(), tol=3e-2)
    assert one.value == pytest.approx(exact, rel=3e-2)
    with torch.autocast(device, torch.bfloat16):
        two = hessian_norm(lambda: cross_entropy(net(x), y), net.parameters(), tol=3e-2)
    assert two == one


def test_parameters_of_several_dtypes_and_half_precision():
    matrix, _ = rotated(torch.linspace(1, 3, 8, dtype=torch.float64), 1)
    matrix = matrix.bfloat16()
    x, y = leaf(normal(5, seed=1), torch.bfloat16), leaf(normal(3, seed=2), torch.float32)
    exact = torch.linalg.eigvalsh(matrix.double())[-1].item()

    def loss():
        z = torch.cat([x.double(), y.double()])
        return z @ matrix.double() @ z / 2

    # The products for x are rounded to bfloat16.
    assert hessian_norm(loss, [x, y], tol=2e-2).value == pytest.approx(exact, rel=2e-2)


def test_unused_and_linear_parameters():
    x, unused, linear = leaf([1.0, 2.0]), leaf([5.0]), leaf([3.0])
    result = hessian_norm(lambda: x[0] * x[1] + 7 * linear.sum(), [x, unused, linear])
    assert result.value == pytest.approx(1.0, rel=1e-12)
    assert result.converged
    params = [x, unused, linear]
    direction = [torch.tensor([3.0, 0.0]), torch.tensor([4.0]), torch.tensor([0.0])]
    along = directional_smoothness(lambda: x[0] * x[1] + 7 * linear.sum(), params, direction)
    assert along == pytest.approx(3 / 5, rel=1e-12)


@pytest.mark.parametrize("used", [True, False])
def test_a_linear_loss_has_no_curvature(used):
    x, other = leaf([1.0, 2.0]), leaf([3.0])
    loss = x.sum if used else (other**2).sum
    result = hessian_norm(loss, [x])
    assert (result.value, result.residual, result.converged, result.hvps) == (0.0, 0.0, True, 0)
    assert top_eigenvalues(loss, [x], 2).values == (0.0, 0.0)
    assert directional_smoothness(loss, [x], [torch.ones(2)]) == 0.0


def test_a_hessian_of_zeros():
    x = leaf([0.0, 0.0])
    result = hessian_norm(lambda: (x**4).sum(), [x])
    assert (result.value, result.residual, result.converged) == (0.0, 0.0, True)


# Cost


def test_one_evaluation_and_one_backward_pass_per_product():
    x = leaf(normal(50, seed=1))
    spectrum = spectra(50, 0)["like a classifier"]
    forward, backward = 0, 0

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal forward
            forward += 1
            ctx.save_for_backward(x)
            return x**2 / 2

        @staticmethod
        def backward(ctx, g):
            return Slope.apply(ctx.saved_tensors[0], g)

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, g):
            ctx.save_for_backward(x, g)
            return x * g

        @staticmethod
        def backward(ctx, v):
            nonlocal backward
            backward += 1
            x, g = ctx.saved_tensors
            return v * g, v * x

    result = hessian_norm(lambda: (spectrum * Square.apply(x)).sum(), [x])
    assert forward == 1
    assert backward == result.hvps > 3
    backward = 0
    assert top_eigenvalues(lambda: (spectrum * Square.apply(x)).sum(), [x], 3).hvps == backward
    forward = backward = 0
    directional_smoothness(lambda: (spectrum * Square.apply(x)).sum(), [x], [torch.ones(50)])
    assert (forward, backward) == (1, 1)


def test_the_gradient_start_saves_products():
    # As in a classifier: the gradient is mostly in the leading eigenvectors, one of 30,000 parameters is not.
    bulk = 0.07 * normal(30_000, seed=1)
    spectrum = torch.cat([torch.tensor([1.0, 0.7, 0.5, 0.4, 0.3]).double(), bulk])
    products = []
    for x in (leaf(torch.ones(30_005)), leaf(torch.zeros(30_005))):
        results = [
            hessian_norm(lambda x=x: (spectrum * x**2).sum() / 2, [x], generator=seeded(s)) for s in range(5)
        ]
        assert [r.value for r in results] == pytest.approx([1.0] * 5, rel=1e-2)
        products.append(sum(r.hvps for r in results))
    with_gradient, without = products
    assert with_gradient < without


def test_it_stops_at_max_iter_and_says_so():
    spectrum = spectra(200, 0)["bulk"]
    x = leaf(normal(200, seed=1))
    result = hessian_norm(lambda: (spectrum * x**2).sum() / 2, [x], tol=1e-6, max_iter=7)
    assert (result.converged, result.hvps) == (False, 7)
    assert 0.5 * spectrum.abs().max() < result.value < spectrum.abs().max()
    assert result.residual > 1e-6
    # Four products are the fewest that can converge; one product is allowed.
    assert hessian_norm(lambda: (spectrum * x**2).sum() / 2, [x], max_iter=1).hvps == 1


def test_the_same_call_gives_the_same_result():
    model = mlp()
    torch.manual_seed(1)
    one = hessian_norm(model, model.params)
    torch.manual_seed(2)
    assert hessian_norm(model, model.params) == one
    with_generators = [hessian_norm(model, model.params, generator=seeded(s)) for s in (5, 5, 6)]
    assert with_generators[0] == with_generators[1] != with_generators[2]


# What it must leave alone


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


@pytest.mark.parametrize("measure", [hessian_norm, directional_smoothness, top_eigenvalues])
def test_measuring_does_not_disturb_training(measure):
    net = build(0, Everything).double()
    x = normal(10, 3, seed=1)
    params = list(net.parameters())
    net(x).backward()
    pending = net(x)  # differentiated only after the measurement
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gradients = [p.grad.clone() for p in params]
    versions = [p._version for p in params]
    random_state = torch.get_rng_state()
    flags = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    extra = {hessian_norm: (), directional_smoothness: (params,), top_eigenvalues: (2,)}[measure]

    with torch.no_grad():
        measure(lambda: net(x), params, *extra)
        assert not torch.is_grad_enabled()

    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))
    assert [p._version for p in params] == versions
    assert all(p.requires_grad for p in params)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == flags
    pending.backward()


def test_dropout_has_the_masks_of_the_one_evaluation():
    net = build(
        0, lambda: nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1))
    ).double()
    x = normal(10, 6, seed=1)
    params = list(net.parameters())
    torch.manual_seed(3)
    value = hessian_norm(lambda: net(x).square().mean(), params, tol=1e-8).value
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones(10, 20).double(), 0.5)

    def fixed():
        return net[3](net[1](net[0](x)) * mask).square().mean()

    assert value == pytest.approx(torch.linalg.eigvalsh(dense(fixed, params)).abs().max().item(), rel=1e-8)


def test_switches_are_back_when_the_loss_raises():
    layer = build(0, lambda: nn.LSTM(2, 3))

    def loss():
        layer(torch.zeros(1, 1, 5))  # wrong width, refused inside the recurrent layer

    before = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    with pytest.raises(RuntimeError):
        hessian_norm(loss, layer.parameters())
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == before


def test_single_precision_recurrent_layers_have_second_derivatives():
    # In float32 an nn.LSTM runs by a fused kernel on the CPU, too, and torch cannot differentiate it twice.
    net = LanguageModel(50, embedding=8, hidden=12, generator=seeded(0))
    words = torch.randint(50, (6, 4), generator=seeded(1))

    def loss():
        return net.loss(words[:-1], words[1:], net.initial_state(4))[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = hessian_norm(loss, net.parameters(), tol=1e-3)
    double = net.double()
    exact = hessian_norm(loss, double.parameters(), tol=1e-8).value
    assert result.value == pytest.approx(exact, rel=1e-3)


def test_checkpointed_losses():
    layer = build(0, lambda: nn.LSTM(3, 4)).double()
    x, params = normal(5, 2, 3, seed=1), list(layer.parameters())

    def whole():
        return layer(x)[0].square().sum()

    def saved():
        return checkpoint(lambda: layer(x)[0].square().sum(), use_reentrant=False)

    expected = hessian_norm(whole, params).value
    assert hessian_norm(saved, params).value == pytest.approx(expected, rel=1e-12)


def test_the_graph_is_freed():
    x = leaf(normal(5, seed=1))
    graphs = []

    def loss():
        y = x**4
        graphs.append(weakref.ref(y))
        return y.sum()

    gc.disable()
    try:
        hessian_norm(loss, [x])
        directional_smoothness(loss, [x], [torch.ones(5)])
        assert [graph() for graph in graphs] == [None, None]
    finally:
        gc.enable()


# Directions


def test_directional_smoothness_is_the_limit_of_path_smoothness():
    model = mlp()
    step = [normal(*p.shape, seed=i) for i, p in enumerate(model.params)]
    limit = path_smoothness(model, model.params, step, fractions=(1e-7,)).value
    # Truncation of order 1e-7, and rounding 1e-16 over 1e-7.
    assert directional_smoothness(model, model.params, step) == pytest.approx(limit, rel=1e-5)


@pytest.mark.parametrize("length", [1e-300, 1e-12, 1e12, 1e300])
def test_the_length_of_the_direction_does_not_matter(length):
    matrix, basis = rotated(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), 1)
    x = leaf(normal(3, seed=2))
    for i, eigenvalue in enumerate((1.0, 4.0, 9.0)):
        along = directional_smoothness(quadratic(matrix, x), [x], [length * basis[:, i]])
        assert along == pytest.approx(eigenvalue, rel=1e-12)


# Errors

X = leaf([1.0, 2.0])


def square() -> Tensor:
    return (X**2).sum()


def test_a_fused_kernel_that_the_loss_insists_on_is_named_with_the_way_around_it():
    q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def loss(backend):
        with torch.nn.attention.sdpa_kernel(backend):
            return scaled_dot_product_attention(q, q, q).square().sum()

    backends = torch.nn.attention.SDPBackend
    message = r"the loss has no second derivative: .*attention.* is not implemented; .*SDPBackend\.MATH\):`$"
    with pytest.raises(RuntimeError, match=message) as caught:
        hessian_norm(lambda: loss(backends.FLASH_ATTENTION), [q])
    assert "is not implemented" in str(caught.value.__cause__)  # torch's own words
    # What the message says helps.
    assert hessian_norm(lambda: loss(backends.MATH), [q]).value > 0
    # Another operation has another way around it.
    with pytest.raises(RuntimeError, match=r"that of _cdist_backward is not implemented; write it out by"):
        hessian_norm(lambda: torch.cdist(q[0, 0], 1 + q[0, 0], p=1.5).sum(), [q])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tol": 0.0}, "tol must be positive and finite, got 0.0"),
        ({"tol": -1e-3}, "tol must be positive and finite, got -0.001"),
        ({"tol": math.nan}, "tol must be positive and finite, got nan"),
        ({"confidence": 0.0}, "confidence must be between 0 and 1, got 0.0"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1, got 1.0"),
        ({"confidence": math.nan}, "confidence must be between 0 and 1, got nan"),
        ({"max_iter": 0}, "max_iter must be at least 1, one product per eigenvalue, got 0"),
        ({"params": []}, r"params must not be empty, got \[\]"),
        ({"params": [X, X]}, r"params\[0\] and params\[1\] are the same tensor"),
        ({"params": [torch.ones(2)]}, r"params\[0\] must be a leaf that requires a gradient"),
        ({"loss": lambda: X * 2}, r"loss must return one element, got shape \(2,\)"),
        ({"loss": lambda: 1.0}, "loss must return a tensor, got float"),
        ({"loss": lambda: torch.tensor(1.0)}, "loss must depend on params"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"loss": square, "params": [X]} | change
    with pytest.raises(ValueError, match=message):
        hessian_norm(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": square()}, "loss must be callable without arguments, got Tensor; pass lambda: ..."),
        ({"tol": "1e-2"}, "tol must be a number, got '1e-2' of type str"),
        ({"confidence": "high"}, "confidence must be a number, got 'high' of type str"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(change, message):
    arguments = {"loss": square, "params": [X]} | change
    with pytest.raises(TypeError, match=message):
        hessian_norm(**arguments)


@pytest.mark.parametrize(
    ("k", "max_iter", "message"),
    [
        (0, 100, "k must be between 1 and 2, the number of parameters, got 0"),
        (3, 100, "k must be between 1 and 2, the number of parameters, got 3"),
        (2, 1, "max_iter must be at least 2, one product per eigenvalue, got 1"),
    ],
)
def test_wrong_numbers_of_eigenvalues_are_named(k, max_iter, message):
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(square, [X], k, max_iter=max_iter)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ([torch.zeros(2)], "the norm of direction must be positive and finite, got 0.0"),
        ([torch.tensor([1.0, math.inf])], "the norm of direction must be positive and finite, got inf"),
        ([torch.ones(3)], r"direction\[0\] has shape \(3,\), params\[0\] has \(2,\)"),
        ([], "direction must have one tensor per parameter, got 0 for 1"),
    ],
)
def test_wrong_directions_are_named(direction, message):
    with pytest.raises(ValueError, match=message):
        directional_smoothness(square, [X], direction)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: (x - 2).log().sum(), "the loss is nan"),
        (lambda x: (x - 1).sqrt().sum(), r"the gradient has the element inf for params\[0\]"),
        (lambda x: ((x - 1) ** 1.5).sum(), "the product of the Hessian with a unit vector has the element"),
    ],
)
def test_what_is_not_finite_is_an_error(f, message):
    with pytest.raises(RuntimeError, match=message):
        hessian_norm(lambda: f(X), [X])


def test_sparse_gradients_are_refused():
    weight = leaf([[1.0], [2.0], [3.0]])

    def loss():
        rows = torch.nn.functional.embedding(torch.tensor([0, 2]), weight, sparse=True)
        return (rows**2).sum()

    with pytest.raises(ValueError, match=r"the gradient of params\[0\] must be dense, got layout"):
        hessian_norm(loss, [weight])
