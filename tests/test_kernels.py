import copy
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradclip import kernels, norms
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD
from gradclip.thresholds import Percentile

CHUNK = kernels._CHUNK
# Nothing, one element, less than a vector register, and the ends of chunks.
SIZES = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def normals(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_sum_of_squares_against_an_exact_sum(sizes, seed):
    tensors = normals(sizes, seed)
    # Squares of float32 numbers are exact in float64, and so is fsum.
    exact = math.fsum(x * x for t in tensors for x in t.tolist())
    assert kernels.sum_of_squares(kernels.memory(tensors)) == pytest.approx(exact, rel=2e-11, abs=0)


def test_every_element_counts_once(threads):
    sizes = [*SIZES, 5 * CHUNK]
    for tensor, size in enumerate(sizes):
        for element in {0, size // 2, CHUNK - 1, CHUNK, size - 1}:
            if not 0 <= element < size:
                continue
            tensors = [torch.zeros(n) for n in sizes]
            tensors[tensor][element] = 3.0
            assert kernels.sum_of_squares(kernels.memory(tensors)) == 9.0


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-25, 1e25, 3e38])
def test_squares_stay_in_range(scale):
    tensors = [torch.full((CHUNK + 3,), scale)]
    element = tensors[0][0].item()
    exact = (CHUNK + 3) * element * element
    assert kernels.sum_of_squares(kernels.memory(tensors)) == pytest.approx(exact, rel=2e-11, abs=0)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ([math.inf], math.inf),
        ([-math.inf, 1.0], math.inf),
        ([math.nan], math.nan),
        ([math.inf, math.nan], math.nan),
    ],
)
def test_sums_of_what_is_not_finite(elements, expected):
    tensors = [*normals([CHUNK + 9]), torch.tensor(elements)]
    np.testing.assert_equal(kernels.sum_of_squares(kernels.memory(tensors)), expected)


def test_threads_change_no_bit():
    sizes, results = [*SIZES, 20 * CHUNK + 1], []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, g, m = (normals(sizes, seed) for seed in range(3))
            lists = [kernels.memory(tensors) for tensors in (x, g, m)]
            square = kernels.sum_of_squares(lists[1])
            kernels.sgd_(*lists, scale=0.3, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, keep=0.99)
            results.append((square, [t.numpy().tobytes() for t in (*x, *m)]))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_without_a_team_the_kernels_run_alone(monkeypatch):
    tensors = normals([20 * CHUNK])
    expected = kernels.sum_of_squares(kernels.memory(tensors))
    monkeypatch.setattr(kernels, "_PARALLEL", None)
    assert kernels.sum_of_squares(kernels.memory(tensors)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP is what torch brings on Linux")
def test_the_team_is_that_of_torch():
    # The threads of a process, before and after: torch has started them all when the kernels come.
    code = """
import os, torch
from gradclip import kernels
torch.set_num_threads(3)
torch.ones(10**6).add_(1)
before = os.listdir("/proc/self/task")
numbers = torch.ones(10**6)
assert kernels.sum_of_squares(kernels.memory([numbers])) == 10**6
assert kernels._PARALLEL and len(before) >= 3
assert os.listdir("/proc/self/task") == before
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_step_against_its_formula_in_float64(threads, momentum, nesterov, weight_decay, keep):
    if nesterov and momentum is None:
        return
    x, g, m = (normals(SIZES, seed) for seed in range(3))
    old = [[t.double() for t in tensors] for tensors in (x, g, m)]
    lists = [kernels.memory(tensors) for tensors in (x, g, m)]
    if momentum is None:
        lists[2] = None
    options = {"momentum": momentum or 0.0, "nesterov": nesterov, "weight_decay": weight_decay, "keep": keep}
    kernels.sgd_(*lists, scale=-0.3, lr=0.5, **options)
    for now, moved, a, b, c in zip(x, m, *old, strict=True):
        d = -0.3 * b + weight_decay * a
        step = d if momentum is None else momentum * c + d
        # Options and results are rounded to float32, at most six times in numbers below 2 · 6: the largest
        # of some 300,000 normal numbers is below 6.
        if momentum is not None:
            torch.testing.assert_close(moved.double(), step, rtol=0.0, atol=6 * 12 * 2.0**-24)
        if nesterov:
            step = d + momentum * step
        torch.testing.assert_close(now.double(), keep * a - 0.5 * step, rtol=0.0, atol=6 * 12 * 2.0**-24)


def test_no_decay_leaves_the_parameter_out_of_the_step():
    x, g = torch.tensor([math.inf, 1.0]), torch.ones(2)
    options = {"lr": 0.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "keep": 1.0}
    kernels.sgd_(kernels.memory([x]), kernels.memory([g]), None, scale=1.0, **options)
    assert x.tolist() == [math.inf, 0.5]


def negative_view():
    return torch.ones(3, dtype=torch.complex64).conj().imag[:1]


def without_memory():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def without_memory_behind_an_offset():
    tensor = torch.ones(6)[3:]
    tensor.untyped_storage().resize_(0)
    return tensor


class Subclass(torch.Tensor):
    pass


UNFIT = {
    "float64": lambda: torch.ones(3, dtype=torch.float64),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "gaps": lambda: torch.ones(6)[::2],
    "transposed": lambda: torch.ones(2, 3).t(),
    "expanded": lambda: torch.ones(1).expand(3),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "sparse rows": lambda: torch.ones(3, 3).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "meta": lambda: torch.ones(3, device="meta"),
    "negative view": negative_view,
    "without memory": without_memory,
    "without memory, offset": without_memory_behind_an_offset,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "subclass": lambda: torch.ones(3).as_subclass(Subclass),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_what_the_kernels_cannot_take(kind):
    assert kernels.memory([torch.ones(2)])
    tensor = UNFIT[kind]()
    assert kernels.memory([torch.ones(2), tensor]) is None
    assert kernels.memory([tensor]) is None
    place, fit = kernels.Place(lasting=True), torch.ones(3)
    assert place([fit])
    assert place([tensor]) is None
    assert place([fit])


def test_nothing_and_parameters_are_fit():
    assert kernels.memory([]).total == 0
    assert kernels.memory([nn.Parameter(torch.ones(3)), torch.ones(()), torch.ones(2, 0)]).total == 4


@pytest.fixture(params=["guards", "none"])
def guards(request, monkeypatch):
    """With the guards of torch, and where it has none."""
    if request.param == "none":
        monkeypatch.setattr(kernels, "_guard", lambda tensors: kernels._never)
    return request.param == "guards"


def test_a_place_is_looked_at_again_when_something_has_changed(guards):
    tensors, place = [torch.ones(3), torch.ones(4)], kernels.Place(lasting=True)
    assert place(tensors) == place(tensors)
    assert (place(tensors) is place(tensors)) == guards
    tensors[1] = torch.ones(5)
    assert place(tensors).sizes.tolist() == [3, 5]
    tensors[0].data = torch.ones(6)
    assert place(tensors).sizes.tolist() == [6, 5]
    tensors[0].data = torch.ones(6, dtype=torch.float64)
    assert place(tensors) is None
    assert place(tensors) is None
    tensors[0] = torch.ones(2)
    assert place(tensors).addresses.tolist() == [t.data_ptr() for t in tensors]
    assert place(tensors[:1]).sizes.tolist() == [2]
    tensors = [torch.ones(3, 3)]
    assert place(tensors)
    tensors[0].data = tensors[0].data.t()  # the same numbers at the same address, in another order
    assert place(tensors) is None
    assert place([torch.ones(3)])
    assert place([torch.ones(3).to_mkldnn()]) is None


def taken(optimizer, step=lambda optimizer: optimizer.step()):
    """Whether a step goes by the kernels."""
    calls = []

    class Watched:
        def __getattr__(self, name):
            if name == "sgd_":
                calls.append(name)
            return getattr(kernels, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradclip.optim.compiled", Watched)
        step(optimizer)
    return bool(calls)


OPTIONS = [
    dict(zip(("momentum", "nesterov", "weight_decay", "maximize"), values, strict=True))
    for values in itertools.product((0.0, 0.9), (False, True), (0.0, 0.1), (False, True))
    if values[0] or not values[1]
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_unclipped_steps_are_those_of_sgd_bit_for_bit(threads, options):
    ours, theirs = ([t.requires_grad_() for t in normals([(7,), (), (300, 301), (0,)])] for _ in range(2))
    optimizer = ClippedSGD(ours, 0.1, max_norm=math.inf, **options)
    reference = torch.optim.SGD(theirs, 0.1, **options)
    for step in range(4):
        for a, b, g in zip(ours, theirs, normals([p.shape for p in ours], 10 + step), strict=True):
            a.grad, b.grad = g, g.clone()
        assert taken(optimizer)
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_groups_have_their_own_options_and_one_norm():
    x = [t.requires_grad_() for t in normals([(5,), (6,), (7,)])]
    for p in x:
        p.grad = torch.ones_like(p)
    groups = [{"params": x[:2], "lr": 0.1, "momentum": 0.9}, {"params": x[2:], "lr": 0.2}]
    optimizer = ClippedSGD(groups, 1.0, max_norm=1.0)
    before = [p.detach().clone() for p in x]
    assert taken(optimizer)
    assert optimizer.last_norm.item() == pytest.approx(math.sqrt(18), rel=1e-7)
    for p, old, lr in zip(x, before, (0.1, 0.1, 0.2), strict=True):
        # Two roundings of the parameter, below 4, and of the step.
        torch.testing.assert_close(p.detach(), old - lr / math.sqrt(18), rtol=0.0, atol=2 * 4 * 2.0**-24)


@pytest.mark.parametrize(
    "change",
    [
        {"scope": "tensor"},
        {"momentum": 0.9, "dampening": 0.5},
    ],
    ids=str,
)
def test_other_steps_are_left_to_torch(change):
    x = torch.ones(3, requires_grad=True)
    x.grad = torch.ones(3)
    assert taken(ClippedSGD([x], 0.1, max_norm=1.0))
    assert not taken(ClippedSGD([x], 0.1, max_norm=1.0, **change))


def test_autograd_notices_the_step():
    x = torch.ones(3, requires_grad=True)
    loss = x.square().sum()
    x.grad = torch.ones(3)
    assert taken(ClippedSGD([x], 0.1, max_norm=1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("both_ways")
def test_a_gradient_that_waits_to_be_negated_is_negated():
    # The imaginary part of a conjugate, in one element without gaps, is how autograd leaves such a gradient.
    x = torch.ones(1, requires_grad=True)
    x.grad = negative_view()
    assert (x.grad.is_neg(), x.grad.is_contiguous()) == (True, True)
    x.grad = torch._neg_view(torch.ones(1))
    optimizer = ClippedSGD([x], 0.25, max_norm=math.inf)
    optimizer.step()
    assert x.item() == 1.25


@pytest.mark.usefixtures("both_ways")
def test_a_momentum_of_another_size_is_an_error_and_no_reading_beyond_it():
    x = torch.ones(3, requires_grad=True)
    x.grad = torch.ones(3)
    optimizer = ClippedSGD([x], 0.1, max_norm=1.0, momentum=0.9)
    optimizer.step()
    x.data, x.grad = torch.ones(50_000), None
    x.grad = torch.ones(50_000)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


@pytest.mark.usefixtures("both_ways")
def test_a_gradient_of_another_size_is_an_error_and_no_reading_beyond_it():
    x = torch.ones(3, requires_grad=True)
    x.grad = torch.ones(3)
    optimizer = ClippedSGD([x], 0.1, max_norm=1.0)
    optimizer.step()
    x.data = torch.ones(50_000)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


@pytest.mark.usefixtures("both_ways")
def test_a_norm_beyond_float32_is_infinite():
    x = torch.ones(4, requires_grad=True)
    x.grad = torch.full((4,), 3e38)
    optimizer = ClippedSGD([x], 0.1, max_norm=1.0, nonfinite="raise")
    with pytest.raises(RuntimeError, match=r"exceeds the range of torch\.float32"):
        optimizer.step()
    assert x.tolist() == [1.0] * 4


def test_moved_parameters_and_new_momenta_are_followed():
    x = torch.zeros(3, requires_grad=True)
    x.grad = torch.ones(3)
    optimizer = ClippedSGD([x], 1.0, max_norm=math.inf, momentum=0.5)
    optimizer.step()
    assert x.tolist() == [-1.0] * 3
    left = x.data
    x.data = torch.full((3,), 10.0)
    optimizer.state[x]["momentum_buffer"] = torch.full((3,), 4.0)
    assert taken(optimizer)
    assert (x.tolist(), left.tolist()) == ([7.0] * 3, [-1.0] * 3)  # m = 0.5 · 4 + 1


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.usefixtures("both_ways")
def test_a_parameter_transposed_in_place_is_followed():
    x, y = (torch.arange(9.0).reshape(3, 3).requires_grad_() for _ in range(2))
    # Where the gradient is kept, autograd keeps its layout too.
    for p, optimizer in (
        (x, ClippedSGD([x], 0.1, max_norm=math.inf, momentum=0.9)),
        (y, torch.optim.SGD([y], 0.1, momentum=0.9)),
    ):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            (p * torch.arange(9.0).reshape(3, 3)).sum().backward()
            optimizer.step()
            with torch.no_grad():
                p.t_()
            optimizer.state[p]["momentum_buffer"].t_()
    # Three steps of about five roundings, in numbers below 32.
    torch.testing.assert_close(x, y, rtol=0.0, atol=3 * 5 * 32 * 2.0**-24)


@pytest.mark.usefixtures("both_ways")
def test_nothing_is_written_beyond_a_parameter_that_has_shrunk():
    memory = torch.zeros(10)
    x = memory[:10].requires_grad_()
    x.grad = torch.ones(10)
    optimizer = ClippedSGD([x], 1.0, max_norm=math.inf)
    optimizer.step()
    x.data = memory[:5]  # at the same address, and the gradient is still the longer one
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    assert memory.tolist() == [-1.0] * 10


@pytest.mark.usefixtures("both_ways")
def test_a_momentum_that_has_shrunk_is_an_error():
    x = torch.zeros(8, requires_grad=True)
    x.grad = torch.ones(8)
    optimizer = ClippedSGD([x], 1.0, max_norm=math.inf, momentum=0.9)
    optimizer.step()
    optimizer.state[x]["momentum_buffer"].resize_(4)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


def test_parameters_that_share_memory_are_left_to_torch(guards):
    memory, place = torch.zeros(2 * CHUNK + 10), kernels.Place(lasting=True)
    assert place([memory[:CHUNK], memory[CHUNK:], torch.zeros(0), torch.zeros(0)])
    assert place([memory[: CHUNK + 1], memory[CHUNK:]]) is None
    assert place([memory, torch.ones(3), memory]) is None
    assert place([memory[:CHUNK], memory[CHUNK:-10]])
    assert place([memory[:CHUNK], memory[10:][:CHUNK]]) is None  # of the same sizes as before
    assert kernels.Place(lasting=False)([memory, torch.ones(3), memory])
    halves = [memory[:CHUNK].requires_grad_(), memory[:CHUNK].requires_grad_()]
    for p in halves:
        p.grad = torch.ones(CHUNK)
    optimizer = ClippedSGD(halves, 1.0, max_norm=math.inf)
    assert not taken(optimizer)
    assert memory[:CHUNK].eq(-2.0).all()


class Meddling:
    """A threshold policy that changes tensors when a norm is large."""

    def __init__(self, meddle):
        self.meddle, self.optimizer, self.others = meddle, None, []

    def __call__(self, norm):
        if norm > 1e3:
            self.meddle(self.optimizer)
            # Takes the place of memory that was given back.
            self.others = [torch.full((4096,), 7.0) for _ in range(8)]
        return torch.tensor(math.inf)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def replace_parameter(optimizer):
    [x] = optimizer.param_groups[0]["params"]
    x.data = torch.ones(4096)


def replace_gradient(optimizer):
    [x] = optimizer.param_groups[0]["params"]
    x.grad.data = torch.ones(4096)


def load_early_state(optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for of_one in state["state"].values():
        of_one["momentum_buffer"].fill_(0.5)
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "meddle",
    [lambda o: o.state.clear(), replace_parameter, replace_gradient, load_early_state],
    ids=["clear", "replace", "gradient", "load"],
)
def test_a_policy_that_changes_tensors_changes_the_step(meddle, momentum):
    def steps():
        policy = Meddling(meddle)
        x = torch.zeros(4096, requires_grad=True)
        policy.optimizer = ClippedSGD([x], 1.0, max_norm=policy, momentum=momentum)
        for size in (1.0, 2.0, 100.0, 3.0):
            x.grad = torch.full((4096,), size)
            policy.optimizer.step()
            assert {value for other in policy.others for value in other.tolist()} <= {7.0}
        return x.detach()

    ours = steps()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("norms", "optim"):
            patch.setattr(f"gradclip.{module}.compiled", lambda: None)
        assert torch.equal(ours, steps())


def test_a_policy_that_puts_what_the_kernels_cannot_take_is_asked_once():
    asked = []
    x = torch.zeros(4096, requires_grad=True)
    x.grad = torch.full((4096,), 100.0)
    policy = Meddling(lambda o: asked.append(setattr(x, "data", torch.zeros(8192)[::2])))
    policy.optimizer = ClippedSGD([x], 1.0, max_norm=policy, momentum=0.9)
    policy.optimizer.step()
    assert len(asked) == 1
    assert x.eq(-100.0).all()
    assert policy.optimizer.last_norm == 6400.0


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("max_norm", [0.3, math.inf])
def test_a_momentum_of_another_dtype_is_added_to(max_norm):
    x = torch.ones(2, 3, requires_grad=True)
    x.grad = torch.ones(2, 3)
    optimizer = ClippedSGD([x], 1.0, max_norm=max_norm, momentum=0.5)
    optimizer.step()
    before, momentum = x.detach().double(), optimizer.state[x]["momentum_buffer"].clone()
    x.data = before.clone()
    x.grad = torch.ones(2, 3, dtype=torch.float64)
    optimizer.step()
    expected = before - 0.5 * momentum - optimizer.last_factor
    # The momentum is still float32.
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=4 * 2**-24)


@pytest.mark.usefixtures("both_ways")
def test_a_momentum_of_another_shape_is_refused():
    x = torch.ones(2, 3, requires_grad=True)
    x.grad = torch.ones(2, 3)
    optimizer = ClippedSGD([x], 1.0, max_norm=math.inf, momentum=0.9, nesterov=True, weight_decay=0.1)
    optimizer.step()
    optimizer.state[x]["momentum_buffer"] = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("max_norm", [1.0, Percentile(10)], ids=["number", "policy"])
def test_another_default_device_changes_nothing(max_norm):
    x = torch.ones(4, requires_grad=True)
    x.grad = torch.ones(4)
    optimizer = ClippedSGD([x], 1.0, max_norm=max_norm, rule="log")
    torch.set_default_device("meta")
    try:
        optimizer.step()
        norm = total_norm([x.grad])
    finally:
        torch.set_default_device(None)
    assert optimizer.last_norm.item() == norm.item() == 2.0
    assert x.isfinite().all()
    assert not x.eq(1.0).any()


def test_steps_without_numba_agree(without_kernels):
    def train():
        x = normals([(300,), (20, 30)])
        for p in x:
            p.requires_grad_()
        optimizer = ClippedSGD(x, 0.1, max_norm=2.0, momentum=0.9, weight_decay=0.1)
        for step in range(5):
            for p, g in zip(x, normals([p.shape for p in x], 10 + step), strict=True):
                p.grad = g
            optimizer.step()
        return x, optimizer.last_norm

    theirs, norm = train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradclip.optim.compiled", lambda: kernels)
        ours, own = train()
    torch.testing.assert_close(own, norm, rtol=1e-6, atol=0.0)
    for a, b in zip(ours, theirs, strict=True):
        # Five steps, each with some ten roundings of numbers below 5, and within 1e-6 of 0.1 · 2 · 10.
        torch.testing.assert_close(a, b, rtol=0.0, atol=5 * (10 * 5 * 2.0**-24 + 2e-6))


def test_the_library_works_where_numba_is_missing():
    code = """
import sys
sys.modules["numba"] = None
import torch
from gradclip import norms, optim
x = torch.ones(4, requires_grad=True)
x.grad = torch.ones(4)
optimizer = optim.ClippedSGD([x], 1.0, max_norm=1.0)
optimizer.step()
assert norms.compiled() is None and x.tolist() == [0.5] * 4 and optimizer.last_norm == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


STEP = """
import torch
from gradclip import norms, optim
x = torch.ones(4, requires_grad=True)
x.grad = torch.ones(4)
optim.ClippedSGD([x], 1.0, max_norm=1.0).step()
assert x.tolist() == [0.5] * 4
print(norms.compiled() is not None)
"""


def run(code, **variables):
    """What a process prints."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_where_numba_is_told_not_to_compile_the_steps_are_those_of_torch():
    assert run(STEP, NUMBA_DISABLE_JIT="1") == "False"


def test_where_numba_fails_a_warning_says_so(monkeypatch):
    def broken(name):
        raise ValueError("no such processor")

    monkeypatch.setattr("gradclip.norms.importlib.import_module", broken)
    norms.compiled.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no such processor"):
            assert norms.compiled() is None
    finally:
        norms.compiled.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have():
    code = """
import os, signal, torch
from gradclip import kernels
torch.set_num_threads(2)
tensors = [torch.ones(30_000) for _ in range(5)]
where = kernels.memory(tensors)
assert kernels.sum_of_squares(where) == 150_000
child = os.fork()
if not child:
    signal.alarm(20)  # ends a process that hangs
    os._exit(kernels.sum_of_squares(where) != 150_000)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot cache function: no locator available"),
        OSError(28, "No space left on device"),
        EOFError("Ran out of input"),  # a file that was cut short
    ],
    ids=repr,
)
def test_kernels_that_cannot_be_kept_are_compiled_all_the_same(monkeypatch, error):
    compile_ = kernels.numba.cfunc

    def without_cache(signature, cache=False):
        if cache:
            raise error
        return compile_(signature)

    monkeypatch.setattr(kernels.numba, "cfunc", without_cache)

    def nothing(address):
        pass

    assert kernels._kernel(nothing).address


def test_importing_the_library_does_not_load_numba():
    code = "import sys, gradclip, gradclip.optim, gradclip.norms; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
