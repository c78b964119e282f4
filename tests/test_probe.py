"""`smoothness.Probe`: that training does not feel it, and that it measures what it says."""

import copy
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip import records
from gradclip.optim import ClippedSGD
from gradclip.smoothness import Probe, path_smoothness

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
OPTIMIZERS = {
    "clipped": lambda params: ClippedSGD(params, 0.3, max_norm=0.2, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, 0.01),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


class Training:
    """Batch norm, dropout, batches from the global random streams, and gradients accumulated over two."""

    def __init__(self, optimizer, accumulate: int = 1, device: str = "cpu") -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)
        ).to(device)
        self.optimizer = optimizer(self.net.parameters())
        self.accumulate = accumulate
        self.fixed = normal(8, 4, seed=1).float().to(device)
        self.device = device

    def loss(self, x: Tensor) -> Tensor:
        return ((self.net(x) - x[:, :2]) ** 2).mean()

    def run(self, steps: int, probe: Probe | None = None) -> None:
        for _ in range(steps):
            # The streams of torch, Python and numpy all enter the training.
            batches = [
                (torch.randn(8, 4) * random.random() * np.random.random()).to(self.device)  # noqa: NPY002
                for _ in range(self.accumulate)
            ]
            self.optimizer.zero_grad()
            for batch in batches:
                self.loss(batch).backward()
            if probe is None:
                self.optimizer.step()
            else:
                with probe.step(lambda batches=batches: sum(map(self.loss, batches)), self.optimizer):
                    self.optimizer.step()

    def state(self) -> dict:
        """Everything that the next steps depend on, and global settings."""
        return {
            "net": {name: t.clone() for name, t in self.net.state_dict().items()},
            "grad": [None if p.grad is None else p.grad.clone() for p in self.net.parameters()],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
            "modes": [m.training for m in self.net.modules()],
            "requires_grad": [p.requires_grad for p in self.net.parameters()],
            "settings": [
                torch.is_grad_enabled(),
                torch.get_default_dtype(),
                torch.get_num_threads(),
                torch.backends.cudnn.enabled,
                torch.backends.mkldnn.enabled,
                torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(),
                torch.is_autocast_enabled("cpu"),
                nn.modules.module._has_any_global_hook(),
                torch.utils._python_dispatch._len_torch_dispatch_stack(),
            ],
        }


def assert_same(one, two) -> None:
    """Recursively, tensors and arrays by their bits."""
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_the_same_bit_for_bit(optimizer, every, accumulate, device):
    plain = Training(OPTIMIZERS[optimizer], accumulate, device)
    plain.run(7)
    probed = Training(OPTIMIZERS[optimizer], accumulate, device)
    params = list(probed.net.parameters())
    probe = Probe(lambda: probed.loss(probed.fixed), params, every=every, hessian=True)
    probed.run(7, probe)
    assert_same(probed.state(), plain.state())

    assert [row["step"] for row in probe.rows] == [k for k in range(0, 7, every) for _ in range(2)]
    for row in probe.rows:
        assert row["problem"] == ""
        # A Hessian stretches no direction by more than its norm, which is within the tolerance of 1 %.
        assert 0 < row["directional_smoothness"] <= 1.01 * row["hessian_norm"]


def test_the_comparison_would_notice_a_single_bit():
    one, two = (Training(OPTIMIZERS["adam"]) for _ in range(2))
    assert_same(one.state(), two.state())
    with torch.no_grad():
        two.net[0].bias[0] = -two.net[0].bias[0]
    with pytest.raises(AssertionError):
        assert_same(one.state(), two.state())


def test_what_is_measured_on_both_batches_of_a_quadratic():
    # f = Σ c x²/2 with c = (1, 2, 8) on the fixed batch and (3, 1, 5) on the training batch.
    fixed, train = (torch.tensor(c, dtype=torch.float64) for c in ((1.0, 2.0, 8.0), (3.0, 1.0, 5.0)))
    x = leaf([4.0, 0.5, -1.0])
    optimizer = ClippedSGD([x], lr=0.1, max_norm=2.0)

    def loss(c):
        return (c * x**2).sum() / 2

    probe = Probe(lambda: loss(fixed), [x], every=2, fractions=(1e-3, 0.5), hessian=True, tol=1e-6)
    for k in range(3):
        optimizer.zero_grad()
        loss(train).backward()
        before = x.detach().clone()
        with probe.step(lambda: loss(train), optimizer):
            optimizer.step()
        step = x.detach() - before
        if k == 1:
            continue
        for row, (name, c) in zip(probe.rows[-2:], (("probe", fixed), ("train", train)), strict=True):
            assert (row["step"], row["batch"], row["problem"]) == (k, name, "")
            expected = ((c * step).norm() / step.norm()).item()
            # Gradients of size ten rounded to 1e-15 and divided by 1e-3 · 0.2; a hundred times as much.
            for key in ("path_smoothness", "path[0.001]", "path[0.5]"):
                assert row[key] == pytest.approx(expected, rel=1e-8)
            assert row["directional_smoothness"] == pytest.approx(expected, rel=1e-12)
            assert row["hessian_norm"] == pytest.approx(c.max().item(), rel=1e-6)
            assert row["hessian_residual"] <= 1e-3
            assert row["grad_norm"] == pytest.approx((c * before).norm().item(), rel=1e-12)
            assert row["update_length"] == pytest.approx(step.norm().item(), rel=1e-12)
            g = (train * before).norm().item()  # the optimizer knows the training batch alone
            assert row["clipped_from"] == pytest.approx(g, rel=1e-12)
            assert row["clip_factor"] == pytest.approx(min(1, 2.0 / g), rel=1e-12)
    assert len(probe.rows) == 4


def test_both_ends_see_the_same_masks():
    training = Training(OPTIMIZERS["adam"])
    params = list(training.net.parameters())
    probe = Probe(lambda: training.loss(training.fixed), params, fractions=(1e-2, 0.5))
    before = [p.detach().clone() for p in params]
    training.run(1, probe)
    after = [p.detach().clone() for p in params]
    buffers = copy.deepcopy(dict(training.net.named_buffers()))
    step = [b - a for a, b in zip(before, after, strict=True)]
    with torch.no_grad():
        for p, a in zip(params, before, strict=True):
            p.copy_(a)
    expected = path_smoothness(
        lambda: training.loss(training.fixed), params, step, fractions=(1e-2, 0.5)
    )  # the streams are where the probe found them
    row = probe.rows[0]
    assert (row["path[0.01]"], row["path[0.5]"]) == expected.values
    assert all(torch.equal(b, buffers[name]) for name, b in training.net.named_buffers())


def test_the_training_batch_and_the_optimizer_are_optional():
    x = leaf([1.0, 2.0])
    optimizer = torch.optim.SGD([x], 0.1)
    probe = Probe(lambda: (x**2).sum(), [x], directional=False)
    (x**2).sum().backward()
    with probe.step():
        optimizer.step()
    (row,) = probe.rows
    assert row["batch"] == "probe"
    assert row["path_smoothness"] == pytest.approx(2.0, rel=1e-12)
    for name in ("directional_smoothness", "hessian_norm", "hessian_residual", "clip_factor", "clipped_from"):
        assert math.isnan(row[name])


def test_the_number_of_evaluations_is_the_one_promised():
    x = leaf([1.0, 2.0])
    calls = {"probe": 0, "train": 0}

    def loss(batch):
        calls[batch] += 1
        return (x**4).sum()

    optimizer = torch.optim.SGD([x], 1e-3)
    probe = Probe(lambda: loss("probe"), [x], every=2, fractions=(0.1, 0.5, 1.0))
    for _ in range(3):
        (x.grad,) = torch.autograd.grad((x**4).sum(), [x])
        with probe.step(lambda: loss("train"), optimizer, grad=[x.grad]):
            optimizer.step()
    # Two steps are due; one gradient per fraction, one for x_k, one for the Hessian-vector product.
    assert calls == {"probe": 2 * 5, "train": 2 * 4}
    for probe_row, train_row in zip(probe.rows[::2], probe.rows[1::2], strict=True):
        assert {**probe_row, "batch": "train"} == pytest.approx(train_row, nan_ok=True)


def test_steps_that_are_not_due_do_nothing():
    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations += 1
            return func(*args, **(kwargs or {}))

    x = leaf([1.0])
    optimizer = torch.optim.SGD([x], 0.1)
    probe = Probe(lambda: (x**2).sum(), [x], every=100)
    x.grad = torch.ones_like(x)
    with probe.step(optimizer=optimizer):
        optimizer.step()
    with Count() as count:
        for _ in range(5):
            with probe.step(lambda: (x**2).sum(), optimizer):
                pass
    assert count.operations == 0
    assert len(probe.rows) == 1


@pytest.mark.parametrize(
    ("lr", "gradient", "nonfinite", "problem"),
    [
        (0.0, 1.0, "propagate", "the update is zero"),
        (0.1, math.nan, "skip", "the update is zero"),
        (0.1, math.inf, "propagate", "the update has length nan"),
    ],
)
def test_updates_that_say_nothing_do_not_stop_training(lr, gradient, nonfinite, problem):
    x = leaf([1.0, 2.0])
    optimizer = ClippedSGD([x], lr, max_norm=1.0, nonfinite=nonfinite)
    probe = Probe(lambda: (x**2).sum(), [x], hessian=True)
    x.grad = torch.full_like(x, gradient)
    with probe.step(lambda: (x**2).sum(), optimizer):
        optimizer.step()
    for row in probe.rows:
        assert row["problem"] == problem
        for name in ("grad_norm", "path_smoothness", "path[0.5]", "directional_smoothness", "hessian_norm"):
            assert math.isnan(row[name])
    assert len(probe.rows) == 2
    assert x.isnan().all() == (problem == "the update has length nan")


def test_gradients_that_are_not_finite_do_not_stop_training():
    x = leaf([1.0])
    optimizer = torch.optim.SGD([x], 0.1)
    probe = Probe(lambda: (math.nan * x).sum(), [x], hessian=True)
    x.grad = torch.ones_like(x)
    with probe.step(lambda: (x**2).sum(), optimizer):
        optimizer.step()
    broken, fine = probe.rows
    assert broken["problem"] == "the gradient has norm nan"
    assert math.isnan(broken["directional_smoothness"])
    assert fine["problem"] == ""
    assert fine["hessian_norm"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: torch.cdist(x[None], 1 + torch.ones_like(x[None]), p=1.5).sum(), "not implemented"),
        # |x|^(3/2) has the gradient 0 and an infinite second derivative where x is 0.
        (lambda x: (x[0] ** 2).sum() + x[1].clamp(min=0).pow(1.5), "has the element inf"),
    ],
)
def test_second_derivatives_that_do_not_exist_do_not_stop_training(loss, message):
    x = leaf([1.0, 0.0])
    optimizer = torch.optim.SGD([x], 0.1)
    probe = Probe(lambda: loss(x), [x], hessian=True)
    x.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
    with probe.step(optimizer=optimizer):
        optimizer.step()
    (row,) = probe.rows
    assert message in row["problem"]
    assert math.isfinite(row["path_smoothness"])
    assert math.isnan(row["hessian_norm"])
    assert x.tolist() == [0.9, 0.1]
    probe.record("broken", "smoke")  # the message has no line break, which a record would refuse


def test_a_hessian_norm_that_has_not_converged_is_marked():
    # Eigenvalues so dense that 100 products leave e^(−4 · 100/√5000) = 0.3 % of what is not the largest.
    x = leaf(np.linspace(-1, 1, 5000).tolist())
    weights = torch.linspace(1, 2, 5000, dtype=torch.float64)
    optimizer = torch.optim.SGD([x], 0.1)
    probe = Probe(lambda: (weights * x**2).sum(), [x], hessian=True, tol=1e-9)
    x.grad = torch.ones_like(x)
    with probe.step(optimizer=optimizer):
        optimizer.step()
    (row,) = probe.rows
    assert row["problem"] == "the Hessian norm has not converged in 100 products"
    assert row["hessian_residual"] > 1e-9
    assert row["path_smoothness"] < 4.0


def test_an_exception_in_the_block_is_passed_on_and_nothing_is_measured():
    x = leaf([1.0])
    probe = Probe(lambda: (x**2).sum(), [x])

    def fail():
        with probe.step():
            raise KeyError("from training")

    with pytest.raises(KeyError, match="from training"):
        fail()
    assert probe.rows == []
    assert x.tolist() == [1.0]


@pytest.mark.parametrize("call", [1, 3, 8])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_parameters_are_where_the_optimizer_put_them_when_a_measurement_raises(error, call):
    x = leaf([1.0, -0.0])
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("stop")
        return (x**2).sum()

    optimizer = torch.optim.SGD([x], 0.1)
    x.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    probe = Probe(loss, [x], hessian=True)

    def step():
        with probe.step(loss, optimizer):
            optimizer.step()

    with pytest.raises(error, match="stop"):
        step()
    assert x.tolist() == [0.9, 0.0]
    assert torch.signbit(x).tolist() == [False, True]


def test_the_version_of_a_parameter_grows_by_the_optimizer_alone():
    x = leaf([1.0])
    optimizer = torch.optim.SGD([x], 0.1)
    probe = Probe(lambda: (x**2).sum(), [x], hessian=True)
    x.grad = torch.ones_like(x)
    with probe.step(optimizer=optimizer):
        optimizer.step()
        version = x._version
    assert x._version == version


def measured() -> Probe:
    x = leaf([1.0, 2.0])
    optimizer = ClippedSGD([x], 0.1, max_norm=1.0)
    probe = Probe(lambda: (x**4).sum(), [x], every=2, fractions=(1 / 6, 0.5))
    for k in range(4):
        optimizer.zero_grad()
        (x**4).sum().backward()
        optimizer.param_groups[0]["lr"] = 0.1 if k == 0 else 0.0
        with probe.step(lambda: (x**4).sum(), optimizer):
            optimizer.step()
    return probe


def test_the_frame_is_tidy():
    frame = measured().frame()
    assert list(frame.columns) == [
        "step",
        "batch",
        "grad_norm",
        "path_smoothness",
        "path[0.1667]",
        "path[0.5]",
        "directional_smoothness",
        "hessian_norm",
        "hessian_residual",
        "hessian_upper",
        "update_length",
        "clip_factor",
        "clipped_from",
        "problem",
    ]
    assert frame["step"].tolist() == [0, 0, 2, 2]
    assert frame["batch"].tolist() == ["probe", "train"] * 2
    assert frame["problem"].tolist() == ["", "", "the update is zero", "the update is zero"]
    assert frame["path_smoothness"].isna().tolist() == [False, False, True, True]
    assert frame["update_length"].tolist() == pytest.approx([0.1, 0.1, 0.0, 0.0])
    assert (frame.drop(columns=["step", "batch", "problem"]).dtypes == np.float64).all()


def test_a_probe_without_measurements_has_an_empty_frame():
    x = leaf([1.0])
    probe = Probe(lambda: (x**2).sum(), [x])
    assert len(probe.frame()) == 0
    assert "path_smoothness" in probe.frame().columns
    assert probe.record("nothing", "smoke").scalars["probe.measured"] == 0


def test_the_frame_says_that_it_needs_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ImportError, match=r"Probe.frame\(\) needs pandas; Probe.rows and Probe.record\(\) do"
    ):
        measured().frame()


def test_the_record_survives_a_file(tmp_path):
    probe = measured()
    record = probe.record(
        "toy", "smoke", config={"lr": 0.1}, scalars={"loss.final": 3.0}, data_sha256="0" * 64
    )
    loaded = records.load(records.save(record, tmp_path))
    assert loaded.config["lr"] == 0.1
    assert loaded.config["probe"]["every"] == 2
    assert loaded.config["probe"]["fractions"] == [1 / 6, 0.5]
    counts = {name: loaded.scalars[f"probe.{name}"] for name in ("steps", "measured", "skipped")}
    assert counts == {"steps": 4, "measured": 2, "skipped": 1}
    assert loaded.scalars["loss.final"] == 3.0
    assert 0 < loaded.scalars["probe.seconds"] <= loaded.provenance["wall_time_s"]
    assert loaded.provenance["data_sha256"] == "0" * 64
    frame = probe.frame()
    assert list(loaded.series) == list(frame.columns)
    for name, column in loaded.series.items():
        assert frame[name].tolist() == pytest.approx(column.tolist(), nan_ok=True)


X = leaf([1.0, 2.0])


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([], {}, r"params must not be empty, got \[\]"),
        ([X, X], {}, "are the same tensor: list it once"),
        ([torch.ones(2)], {}, r"params\[0\] must be a leaf that requires a gradient"),
        ([X], {"every": 0}, "every must be a whole number of at least 1, got 0"),
        ([X], {"every": 2.5}, "every must be a whole number of at least 1, got 2.5"),
        ([X], {"fractions": ()}, "fractions must not be empty"),
        ([X], {"fractions": (0.5, -1.0)}, "fractions must be positive and finite, got -1.0"),
        ([X], {"fractions": (0.5, 0.50001)}, r"fractions must differ in four digits, got \(0.5, 0.50001\)"),
    ],
)
def test_wrong_options_are_named(params, options, message):
    with pytest.raises(ValueError, match=message):
        Probe(lambda: (X**2).sum(), params, **options)


def test_parameters_of_another_model_are_an_error():
    probe = Probe(lambda: (X**2).sum(), [X])
    optimizer = torch.optim.SGD([leaf([1.0, 2.0])], 0.1)
    with pytest.raises(
        ValueError, match=r"params\[0\] of shape \(2,\) is not among the parameters of the opt"
    ):
        probe.step(optimizer=optimizer).__enter__()


def test_a_gradient_of_nothing_is_an_error():
    probe = Probe(lambda: (X**2).sum(), [X])
    with pytest.raises(
        ValueError, match="grad is the gradient of the training batch's loss, and loss is None"
    ):
        probe.step(grad=[X]).__enter__()


def test_a_loss_of_other_parameters_is_an_error():
    other = leaf([1.0])
    x = leaf([1.0])
    probe = Probe(lambda: other.detach().sum(), [x])
    optimizer = torch.optim.SGD([x], 0.1)
    x.grad = torch.ones_like(x)

    def step():
        with probe.step(optimizer=optimizer):
            optimizer.step()

    with pytest.raises(ValueError, match="loss must depend on params"):
        step()
    assert x.tolist() == [0.9]
