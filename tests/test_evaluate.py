"""`smoothness._evaluate.undisturbed`: what runs inside leaves nothing behind, on any way out."""

import copy
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from gradclip.smoothness._evaluate import undisturbed

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    net(normal(8, 3, seed=9))  # running statistics that are neither zero nor one
    return net


def assert_same_buffers(module: nn.Module, before: dict[str, Tensor], contents: dict[str, Tensor]) -> None:
    now = dict(module.named_buffers())
    assert list(now) == list(before)
    assert all(now[name] is before[name] for name in before)
    assert all(torch.equal(now[name], contents[name]) for name in before)


def buffers_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    buffers = dict(module.named_buffers())
    return buffers, copy.deepcopy(buffers)


@pytest.mark.parametrize("device", DEVICES)
def test_evaluations_after_a_rewind_are_one_function_and_leave_no_trace(device):
    net, x = network().to(device), normal(8, 3).to(device)
    before = buffers_of(net)
    with undisturbed() as rewind:
        first = net(x)
        assert not torch.equal(net[1].running_mean, before[1]["1.running_mean"])
        other_masks = net(x)
        rewind()
        assert_same_buffers(net, *before)
        again = net(x)
    assert_same_buffers(net, *before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other_masks)
    # Outside the stream is where it was when the context was entered.
    assert torch.equal(net(x), first)


def draws() -> tuple:
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.normal(size=3).tolist()  # noqa: NPY002


def test_all_global_random_streams_go_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    draws()  # an odd number of normal numbers: both generators keep a second one for later
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    expected = draws()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    with undisturbed() as rewind:
        assert draws() == expected
        assert draws() != expected
        rewind()
        assert draws() == expected
    assert draws() == expected


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("inside_a_forward", [False, True])
def test_buffers_and_streams_come_back_when_something_is_raised(error, inside_a_forward):
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            y = self.net(x)
            if inside_a_forward:
                raise error("stop")
            return y

    module = Replacing()
    before = buffers_of(module)
    state = torch.get_rng_state()

    def fail():
        with undisturbed():
            module(normal(8, 3))
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert_same_buffers(module, *before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not nn_module._has_any_global_hook()


class Unruly(nn.Module):
    """Replaces, adds and removes buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.tensor(0.3))
        self.register_buffer("first", None)
        self.register_buffer("temporary", torch.tensor(-0.0), persistent=False)

    def forward(self, x):
        if hasattr(self, "temporary"):
            del self.temporary
        self.average = 0.9 * self.average + 0.1 * x.mean()
        self.first = x[0].clone()
        if "last" not in self._buffers:
            self.register_buffer("last", x[-1].clone())
        return x * self.average


def test_buffers_that_are_replaced_added_or_removed():
    module, x = Unruly(), normal(5)
    before = buffers_of(module)
    with undisturbed() as rewind:
        first = module(x)
        rewind()
        assert torch.equal(module(x), first)
    assert_same_buffers(module, *before)
    assert module.first is None
    assert list(module._buffers) == ["average", "first", "temporary"]
    assert torch.signbit(module.temporary)


def test_a_buffer_that_two_modules_share():
    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    two.running_mean = one.running_mean
    before = buffers_of(one)
    with undisturbed():
        one(normal(4, 3))  # changes it before the other module is seen
        two(normal(4, 3, seed=1))
    assert_same_buffers(one, *before)


def test_buffers_of_a_submodule_that_is_used_without_being_called():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.inner.forward(x)  # runs no hook

    module = Outer()
    before = buffers_of(module)
    with undisturbed():
        module(normal(4, 3))
    assert_same_buffers(module, *before)


def test_buffers_lent_by_functional_call_do_not_stay():
    net, x = network(), normal(8, 3)
    before = buffers_of(net)
    lent = copy.deepcopy(before[1])
    with undisturbed() as rewind:
        torch.func.functional_call(net, lent, (x,))
        assert not torch.equal(lent["1.running_mean"], before[1]["1.running_mean"])
        rewind()
        assert all(torch.equal(lent[name], before[1][name]) for name in lent)
        torch.func.functional_call(net, lent, (x,))
    assert_same_buffers(net, *before)
    assert all(torch.equal(lent[name], before[1][name]) for name in lent)


def test_functions_of_torch_func_run_inside():
    net, x = network().eval(), normal(8, 3)
    before = buffers_of(net)
    stacked = {name: torch.stack([b, b]) for name, b in before[0].items()}
    params = dict(net.named_parameters())
    with undisturbed() as rewind:
        both = torch.func.vmap(lambda b: torch.func.functional_call(net, (params, b), (x,)))(stacked)
        rewind()
    assert torch.allclose(both[0], net(x), atol=1e-6)  # float32, other kernels
    assert_same_buffers(net, *before)


def test_contexts_may_be_nested():
    net, x = network(), normal(8, 3)
    before = buffers_of(net)
    with undisturbed() as rewind:
        first = net(x)
        between = copy.deepcopy(dict(net.named_buffers())), torch.get_rng_state()
        with undisturbed():
            net(x)
        assert all(torch.equal(b, between[0][name]) for name, b in net.named_buffers())
        assert torch.equal(torch.get_rng_state(), between[1])
        rewind()
        assert torch.equal(net(x), first)
    assert_same_buffers(net, *before)


def test_modules_that_another_thread_calls_keep_their_changes():
    mine, theirs = network().eval(), network()
    before = copy.deepcopy(theirs[1].running_mean)
    with undisturbed():
        mine(normal(8, 3))
        thread = threading.Thread(target=lambda: theirs(normal(8, 3)))
        thread.start()
        thread.join()
    expected = copy.deepcopy(network())
    expected[1](expected[0](normal(8, 3)))
    assert torch.equal(theirs[1].running_mean, expected[1].running_mean)
    assert not torch.equal(theirs[1].running_mean, before)


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_from_before_can_be_differentiated_after(training):
    net, x = network().train(training), normal(8, 3)
    torch.manual_seed(0)
    pending = (net(x) ** 2).sum()
    with undisturbed():
        net(x)
        net.train()(x)
    net.train(training)
    pending.backward()
    gradient = net[0].weight.grad.clone()
    net.zero_grad()
    torch.manual_seed(0)
    (net(x) ** 2).sum().backward()
    assert torch.equal(net[0].weight.grad, gradient)


def test_scripted_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still used
        net = torch.jit.script(network())
    before = {name: b.clone() for name, b in net.named_buffers()}
    with undisturbed() as rewind:
        net(normal(8, 3))
        rewind()
        net(normal(8, 3))
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
def test_compiled_code_is_seen_and_not_compiled_again(how):
    graphs = 0

    def backend(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    class Model(nn.Module):  # of our own: torch does not compile nn.Sequential in place
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            return self.layers(x)

    torch._dynamo.reset()
    net, x = Model(), normal(8, 3)
    if how == "wrapped":
        call = torch.compile(net, backend=backend)
    elif how == "in place":
        net.compile(backend=backend)
        call = net
    else:

        @torch.compile(backend=backend)
        def call(x):
            return net(x).square()

    call(x)
    compiled = graphs
    assert compiled >= 1
    before = buffers_of(net)
    for _ in range(10):  # more than the eight recompilations after which torch gives up
        with undisturbed() as rewind:
            first = call(x)
            rewind()
            assert torch.equal(call(x), first)
        assert_same_buffers(net, *before)
    call(x)
    assert graphs == compiled


def test_an_outer_autocast_region_notices_changed_parameters():
    weight = torch.ones(4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with undisturbed() as rewind:
            first = (torch.ones(4, 4) @ weight).sum().item()
            weight.data.mul_(2)
            rewind()
            assert (torch.ones(4, 4) @ weight).sum().item() == 2 * first
            weight.data.div_(2)
        assert (torch.ones(4, 4) @ weight).sum().item() == first


def test_no_setting_stays_changed_and_no_warning_is_shown_twice():
    torch._dynamo.reset()  # so that it is loaded

    def warn():
        warnings.warn("once per place", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        filters = list(warnings.filters)
        for _ in range(3):
            warn()
            with undisturbed():
                warn()
        assert warnings.filters == filters
    assert len(shown) == 1
    assert not nn_module._has_any_global_hook()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_modules_without_buffers_are_not_copied():
    net = nn.Linear(1000, 100)
    copies = 0

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal copies
            copies += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
            return func(*args, **(kwargs or {}))

    with undisturbed(), Counting():
        net(torch.zeros(1000))
    assert copies == 0
