import copy
import functools
import io
import math
import pickle
import re
import tempfile
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._C._profiler import _ExperimentalConfig
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from gradclip.norms import clip_grad_, total_norm
from gradclip.optim import ClippedSGD, MixedClippedSGD, ParameterAgnosticLR, PolyakClippedSGD
from gradclip.rules import RULES, clip_factor
from gradclip.thresholds import Percentile, ZScore

EPS = 2.0**-52


def make_parameters(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def set_gradients(parameters, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, dtype=p.dtype, generator=generator)


def values(parameters):
    return [p.detach().clone() for p in parameters]


def bits(tensors):
    return [t.detach().numpy().tobytes() for t in tensors]


@pytest.fixture(params=["eager", "compiled"])
def run_step(request):
    """optimizer.step as Python runs it, and as torch.compile traces it: the path of accelerators, too."""

    def run(optimizer):
        if request.param == "compiled":
            torch._dynamo.reset()
            torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
        else:
            optimizer.step()

    return run


options = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.01, 0.3, 1.0]),
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "weight_decay": st.sampled_from([0.0, 1e-3, 0.1]),
        "dampening": st.sampled_from([0.0, 0.25]),
        "maximize": st.booleans(),
        "nesterov": st.booleans(),
    }
).map(lambda o: {**o, "nesterov": o["nesterov"] and o["momentum"] > 0 and o["dampening"] == 0})
shapes = st.lists(st.sampled_from([(), (1,), (7,), (3, 5), (130, 2)]), min_size=1, max_size=4)


def torch_step(optimizer, parameters, max_norm, offset):
    """clip_grad_norm_ by its documented formula, with torch's offset or without it, then torch's SGD."""
    gradients = [p.grad for p in parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    for p in parameters:
        p.grad = p.grad * torch.clamp(max_norm / (norm + offset), max=1.0)
    optimizer.step()
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


@pytest.mark.usefixtures("both_ways")
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the way is the same for all examples
)
@given(
    shapes=shapes,
    options=options,
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 8),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_hard_rule_is_clip_grad_norm_then_sgd_step_for_step(shapes, options, seed, steps, dtype):
    ours, theirs = make_parameters(shapes, seed, dtype), make_parameters(shapes, seed, dtype)
    optimizer, reference = ClippedSGD(ours, max_norm=2.0, **options), torch.optim.SGD(theirs, **options)
    for step in range(steps):
        for parameters in (ours, theirs):
            set_gradients(
                parameters, seed + step, scale=10.0 ** (step % 3 - 1)
            )  # below and above the threshold
        optimizer.step()
        torch_step(reference, theirs, 2.0, offset=0.0)
        # Both round about ten times a step, and sums of up to 1000 squares add 250 units to the factor.
        # Clipped gradients are at most 2 long, momentum 0.9 adds at most 10 of them, lr is at most 1 and
        # nesterov at most doubles: errors of (260 * 2 * 10 * 2 + 10 * size of x) units a step, which weight
        # decay grows by at most (1 + lr * decay)^8 < 2.2.
        size = max(1.0, *(p.detach().abs().max().item() for p in theirs))
        tolerance = 2.2 * (step + 1) * (10_400 + 10 * size) * torch.finfo(dtype).eps
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_differs_from_torch_itself_by_its_offset_only(scale):
    ours, theirs = make_parameters([(7,), (3, 5)]), make_parameters([(7,), (3, 5)])
    optimizer, reference = ClippedSGD(ours, lr=0.5, max_norm=1.0), torch.optim.SGD(theirs, lr=0.5)
    for step in range(5):
        for parameters in (ours, theirs):
            set_gradients(parameters, step, scale)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
    # c/(g + 1e-6) is smaller than c/g by less than 1e-6/c of itself where it clips, so that each of five
    # steps of length at most lr * c = 0.5 differs by at most 0.5e-6.
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=5 * 0.5e-6)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
def test_goes_on_with_the_momentum_of_sgd(dtype, nesterov):
    shapes, options = [(7,), (3, 5)], {"momentum": 0.9, "nesterov": nesterov}
    ours, theirs = (make_parameters(shapes, dtype=dtype) for _ in range(2))
    frozen = torch.ones(2)
    before = torch.optim.SGD([*ours, frozen], lr=0.5, **options)
    after = torch.optim.SGD(theirs, lr=0.5, **options)
    optimizer = ClippedSGD([*ours, frozen], lr=0.5, max_norm=math.inf, **options)
    for step in range(6):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        if step == 3:
            for p, state in before.state.items():
                optimizer.state[p]["momentum_buffer"] = state["momentum_buffer"]
        (before if step < 3 else optimizer).step()
        after.step()
    # These gradients are below 4, so that momenta are below 24, steps below 13 and parameters below 82; each
    # step rounds a parameter once and a momentum three times.
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=6 * (82 + 3 * 24) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"weight_decay": 0.1, "maximize": True}, {"momentum": 0.9, "maximize": True}],
)
def test_below_the_threshold_it_is_fused_sgd_bit_for_bit(without_kernels, dtype, options):
    ours, theirs = (make_parameters([(7,), (3, 50)], dtype=dtype) for _ in range(2))
    optimizer = ClippedSGD(ours, lr=0.1, max_norm=1e3, **options)
    # Without numba the step is by torch's fused kernel, which differs from torch's plain one in the last bit
    # of what does not fill a vector register.
    reference = torch.optim.SGD(theirs, lr=0.1, fused=True, **options)
    for step in range(5):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        optimizer.step()
        reference.step()
        if not options.get("weight_decay"):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        # The decay is added to the gradient in the other order: one rounding of numbers of size 5 a step.
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=(step + 1) * 5 * torch.finfo(dtype).eps)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shapes=shapes,
    rule=st.sampled_from(RULES),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3, 1e30]),
    lr=st.sampled_from([0.01, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_step_is_along_the_gradient_and_of_the_length_of_the_rule(shapes, rule, scale, lr, seed):
    parameters = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    set_gradients(parameters, seed, scale)
    optimizer = ClippedSGD(parameters, lr, max_norm=0.5, rule=rule)
    optimizer.step()
    length, g = total_norm(parameters).item(), total_norm([p.grad for p in parameters]).item()
    # The length that the four formulas give, written as lengths instead of factors.
    if g == 0:
        assert length == 0
    else:
        expected = {
            "hard": min(g, 0.5),
            "soft": 0.5 * g / (0.5 + g),
            "normalize": 0.5,
            "log": 0.5 * math.log1p(g / (0.5 + g)),
        }[rule]
        # Two norms with up to 300 roundings each, and about ten more.
        assert length == pytest.approx(lr * expected, rel=610 * EPS)
        assert length <= lr * 0.5 * (1 + 610 * EPS)
    for p in parameters:
        torch.testing.assert_close(p.detach(), -lr * optimizer.last_factor * p.grad, rtol=4 * EPS, atol=0.0)
    assert optimizer.last_norm.item() == g


def test_gradients_are_not_written_to():
    parameters = make_parameters([(5,), (200,)])
    set_gradients(parameters, 1, scale=100.0)
    before = bits(p.grad for p in parameters)
    optimizer = ClippedSGD(
        parameters, 0.1, max_norm=1.0, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True
    )
    optimizer.step()
    optimizer.step()
    assert bits(p.grad for p in parameters) == before


@pytest.mark.parametrize("scope", ["global", "tensor", "unit"])
def test_nothing_but_the_momentum_is_kept_between_steps(scope):
    parameters = make_parameters([(30, 40), (200,)])
    optimizer = ClippedSGD(parameters, 0.1, max_norm=1.0, scope=scope, momentum=0.9)
    set_gradients(parameters, 0)
    optimizer.step()
    kept = [t for t in vars(optimizer).values() if isinstance(t, torch.Tensor)]
    kept += [t for state in optimizer.state.values() for t in state.values()]
    assert sum(t.numel() for t in kept) == 1400 + 3  # one momentum, and norm, factor and count


def test_norm_is_over_all_groups_and_options_are_per_group():
    a, b = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a.grad, b.grad = torch.full_like(a, 3.0), torch.full_like(b, 4.0)
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "maximize": True}]
    optimizer = ClippedSGD(groups, lr=1.0, max_norm=1.0)
    optimizer.step()
    assert optimizer.last_norm.item() == 5.0
    assert a.item() == pytest.approx(-0.1 * 3 / 5, rel=8 * EPS)
    assert b.item() == pytest.approx(1.0 * 4 / 5, rel=8 * EPS)


def test_shared_options_must_agree():
    a, b = make_parameters([(1,), (1,)])
    message = r"max_norm must be the same in all parameter groups, .* got \[1\.0, 2\.0\]"
    with pytest.raises(ValueError, match=message):
        ClippedSGD([{"params": [a]}, {"params": [b], "max_norm": 2.0}], lr=1.0, max_norm=1.0)
    optimizer = ClippedSGD([{"params": [a]}, {"params": [b]}], lr=1.0, max_norm=1.0)
    optimizer.param_groups[1]["max_norm"] = 2.0
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.param_groups[0]["max_norm"] = 2.0
    set_gradients([a, b], 0, scale=100.0)
    optimizer.step()
    assert (optimizer.last_norm * optimizer.last_factor).item() == pytest.approx(2.0, rel=8 * EPS)


def test_rejected_group_is_not_added():
    a, b = make_parameters([(1,), (1,)])
    optimizer = ClippedSGD([a], lr=1.0, max_norm=1.0)
    with pytest.raises(ValueError, match=r"lr must be finite and at least 0, got -1\.0"):
        optimizer.add_param_group({"params": [b], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [b], "lr": 2.0})
    assert optimizer.param_groups[1]["lr"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr must be finite and at least 0, got -0\.1"),
        ({"lr": math.nan}, "lr must be finite and at least 0, got nan"),
        ({"max_norm": 0.0}, r"max_norm must be positive, got 0\.0"),
        ({"momentum": -0.5}, r"momentum must be finite and at least 0, got -0\.5"),
        ({"weight_decay": -1.0}, r"weight_decay must be finite and at least 0, got -1\.0"),
        ({"nesterov": True}, r"nesterov needs a positive momentum, got momentum=0\.0"),
        ({"dampening": -0.1}, r"dampening must be finite and at least 0, got -0\.1"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
            r"nesterov needs dampening=0, got dampening=0\.5",
        ),
        (
            {"scope": "unit", "max_norm": Percentile(10.0)},
            "a threshold policy sees the norm of all gradients",
        ),
        ({"rule": "firm"}, "rule must be one of 'hard', 'soft', 'normalize', 'log', got 'firm'"),
        (
            {"rule": "normalize", "max_norm": math.inf},
            "max_norm must be finite for rule='normalize', got inf",
        ),
        ({"scope": "layer"}, "scope must be one of 'global', 'tensor', 'unit', got 'layer'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'propagate', 'skip', 'raise', got 'ignore'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ClippedSGD(make_parameters([(1,)]), **{"lr": 0.1, "max_norm": 1.0, **options})


@pytest.mark.parametrize("value", [None, "1", [1.0], torch.tensor([1.0]), np.array([1.0])])
def test_wrong_types_are_named_with_their_value(value):
    for name in ("lr", "max_norm", "momentum", "weight_decay"):
        with pytest.raises(TypeError, match=rf"{name} must be a number.*, got {re.escape(repr(value))}"):
            ClippedSGD(make_parameters([(1,)]), **{"lr": 0.1, "max_norm": 1.0, name: value})
    for name in ("rule", "scope", "nonfinite"):
        with pytest.raises(ValueError, match=f"{name} must be one of "):
            ClippedSGD(make_parameters([(1,)]), **{"lr": 0.1, "max_norm": 1.0, name: value})


def test_parameters_without_gradients_are_left_alone():
    a, b = make_parameters([(3,), (3,)])
    set_gradients([a], 0)
    before = values([a, b])
    optimizer = ClippedSGD([a, b], lr=0.1, max_norm=1.0, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(b, before[1])
    assert not torch.equal(a, before[0])
    assert b not in optimizer.state
    a.grad = None
    before = values([a, b])
    optimizer.step()
    assert all(torch.equal(p, v) for p, v in zip([a, b], before, strict=True))
    assert optimizer.last_norm.item() == 0.0


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_leaves_the_gradients_alone_and_keeps_none(momentum):
    parameters = make_parameters([(7,), (30, 40)], dtype=torch.float32)
    optimizer = ClippedSGD(parameters, lr=0.1, max_norm=0.5, momentum=momentum)
    for step in range(2):
        set_gradients(parameters, step)
        before = bits(p.grad for p in parameters)
        optimizer.step()
        assert bits(p.grad for p in parameters) == before
        gone = [weakref.ref(p.grad) for p in parameters]
        optimizer.zero_grad()
        assert [reference() for reference in gone] == [None, None]
    kept = [t for state in optimizer.state.values() for t in state.values()]
    assert [t.shape for t in kept] == [p.shape for p in parameters if momentum]


@pytest.mark.usefixtures("both_ways")
def test_measurements_before_and_after_a_step():
    parameters = make_parameters([(2,)], dtype=torch.float32)
    optimizer = ClippedSGD(parameters, lr=0.1, max_norm=1.0)
    assert math.isnan(optimizer.last_norm.item())
    parameters[0].grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    kept = optimizer.last_norm
    assert (kept.shape, kept.dtype, kept.device) == ((), torch.float32, parameters[0].device)
    parameters[0].grad = torch.tensor([0.3, 0.4])
    optimizer.step()
    assert kept.item() == 5.0
    assert optimizer.last_norm.item() == pytest.approx(0.5, rel=1e-6)
    assert optimizer.last_factor.item() == 1.0


def quadratic_closure(optimizer, parameters):
    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in parameters)
        loss.backward()
        return loss

    return closure


def test_closure_is_called_with_gradients_enabled_and_its_loss_returned():
    parameters = make_parameters([(4,)])
    optimizer = ClippedSGD(parameters, lr=0.1, max_norm=100.0)
    expected = parameters[0].square().sum().item()
    before = values(parameters)
    with torch.no_grad():
        loss = optimizer.step(quadratic_closure(optimizer, parameters))
    assert loss.item() == expected
    torch.testing.assert_close(parameters[0].detach(), 0.8 * before[0], rtol=4 * EPS, atol=0.0)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_state_dict_round_trip_is_bit_for_bit(nonfinite):
    options = {"lr": 0.3, "max_norm": 0.7, "momentum": 0.9, "weight_decay": 0.01, "nonfinite": nonfinite}
    first, second = make_parameters([(7,), (3, 5)]), make_parameters([(7,), (3, 5)], seed=9)
    optimizer, resumed = ClippedSGD(first, **options), ClippedSGD(second, lr=1.0, max_norm=1.0)
    for step in range(6):
        set_gradients(first, step)
        if nonfinite == "skip" and step == 1:
            first[0].grad[0] = math.nan
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            with torch.no_grad():
                for a, b in zip(first, second, strict=True):
                    b.copy_(a)
        optimizer.step()
        if step >= 3:
            set_gradients(second, step)
            resumed.step()
            assert bits(first) == bits(second)
    assert resumed.skipped_steps.item() == optimizer.skipped_steps.item() == (nonfinite == "skip")
    assert bits(s["momentum_buffer"] for s in optimizer.state.values()) == bits(
        s["momentum_buffer"] for s in resumed.state.values()
    )


def test_skipped_steps_are_not_shared_with_saved_and_loaded_states(run_step):
    a, b = make_parameters([(2,)]), make_parameters([(2,)])
    optimizer = ClippedSGD(a, lr=0.1, max_norm=1.0, nonfinite="skip")
    saved = optimizer.state_dict()
    a[0].grad = torch.full_like(a[0], math.inf)
    run_step(optimizer)
    assert saved["param_groups"][0]["skipped_steps"].item() == 0
    saved = optimizer.state_dict()
    other = ClippedSGD(b, lr=0.1, max_norm=1.0)
    other.load_state_dict(saved)
    b[0].grad = torch.full_like(b[0], math.inf)
    run_step(other)
    assert (saved["param_groups"][0]["skipped_steps"].item(), other.skipped_steps.item()) == (1, 2)
    assert optimizer.skipped_steps.item() == 1


def changed(state, **options):
    """The state dict with other options in its groups; None takes one out."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group.update(options)
        for name in [name for name, value in options.items() if value is None]:
            del group[name]
    return state


def test_a_state_that_cannot_be_loaded_changes_nothing():
    parameters = make_parameters([(3,)])
    optimizer = ClippedSGD(parameters, lr=0.1, max_norm=1.0, momentum=0.9)
    set_gradients(parameters, 0)
    optimizer.step()
    own = optimizer.state_dict()
    foreign = torch.optim.SGD(make_parameters([(3,)]), lr=0.3, momentum=0.9).state_dict()
    two_groups = ClippedSGD([{"params": [p]} for p in make_parameters([(3,), (2,)])], lr=0.3, max_norm=2.0)
    for state, error, message in [
        (
            foreign,
            ValueError,
            "no state of ClippedSGD: its parameter group 0 lacks max_norm, rule, scope, nonfin",
        ),
        (changed(own, momentum=None), ValueError, "parameter group 0 lacks momentum"),
        (changed(own, lr=0.3, max_norm=-1.0), ValueError, r"max_norm must be positive, got -1\.0"),
        (changed(own, max_norm=2.0, lr="1"), TypeError, "lr must be a number, got '1'"),
        (changed(own, lr=0.3, rule="firm"), ValueError, "rule must be one of .* got 'firm'"),
        (two_groups.state_dict(), ValueError, "different number of parameter groups"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(state)
        now = optimizer.state_dict()
        assert now["param_groups"] == own["param_groups"]
        assert bits([now["state"][0]["momentum_buffer"]]) == bits([own["state"][0]["momentum_buffer"]])
    set_gradients(parameters, 1)
    optimizer.step()  # it still works
    assert optimizer.last_norm.item() == total_norm([p.grad for p in parameters]).item()


def test_hooks_change_what_is_loaded_and_checked():
    optimizer = ClippedSGD(make_parameters([(3,)]), lr=0.1, max_norm=1.0)
    state = optimizer.state_dict()
    hook = optimizer.register_load_state_dict_pre_hook(
        lambda _, state: changed(state, skipped_steps=torch.tensor(7), lr=0.5)
    )
    optimizer.load_state_dict(changed(state, lr=None))
    assert optimizer.skipped_steps.item() == 7
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert "skipped_steps" not in optimizer.param_groups[0]
    hook.remove()
    optimizer.load_state_dict(changed(state, skipped_steps=None))
    assert optimizer.skipped_steps.item() == 0
    optimizer.register_load_state_dict_pre_hook(lambda _, state: changed(state, lr=-1.0))
    with pytest.raises(ValueError, match=r"lr must be finite and at least 0, got -1\.0"):
        optimizer.load_state_dict(state)


def itself(base):
    return base


def calling(base):
    """A subclass whose step calls that of the base."""

    class Calling(base):
        def step(self, closure=None):
            return super().step(closure)

    return Calling


def copying(base):
    """A subclass whose step is taken for that of the base, and calls it twice."""

    class Copying(base):
        @functools.wraps(base.step)
        def step(self, closure=None):
            super().step(closure)
            return super().step(closure)

    return Copying


def replacing(base):
    """A subclass with a step of its own, and another argument."""

    class Replacing(base):
        def step(self, closure=None, *, scale=1):
            return scale

    return Replacing


def observed(kind, **options):
    """An optimizer of this kind that can take a step."""
    parameters = make_parameters([(3,)], dtype=torch.float32)
    set_gradients(parameters, 1)
    return kind(parameters, **options)


OPTIONS = {
    ClippedSGD: {"lr": 0.1, "max_norm": 1.0},
    MixedClippedSGD: {"lr": 0.1, "max_norm": 1.0, "momentum": 0.9, "mix": 0.5},
    PolyakClippedSGD: {},
}


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_each_hook_is_called_once_a_step(kind):
    optimizer, called = observed(kind, **OPTIONS[kind]), []
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: called.append("before")),
        optimizer.register_step_post_hook(lambda *_: called.append("after")),
        register_optimizer_step_pre_hook(lambda *_: called.append("before any")),
        register_optimizer_step_post_hook(lambda *_: called.append("after any")),
    ]
    try:
        optimizer.step(lambda: called.append("closure") or torch.tensor(1.0))
        assert called == ["before any", "before", "closure", "after", "after any"]
    finally:
        for hook in hooks:
            hook.remove()


def observations(way, base, options):
    """What hooks and profilers see of an optimizer, one after the other."""
    observed(base, **options)  # torch wraps the step of a class when the first optimizer is made
    optimizer, seen = observed(way(base), **options), []
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        name = register.__name__
        hook = register(lambda _, args, kwargs, name=name: seen.append((name, len(args), dict(kwargs))))
        optimizer.step()
        if way is replacing:
            optimizer.step(scale=3)
        hook.remove()
        seen.append("removed")
        optimizer.step()
    # A hook that comes while a step is taken.
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda *_: seen.append("late")) and None)
    for everywhere in (False, True):
        config = _ExperimentalConfig(profile_all_threads=everywhere)
        with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiler:
            optimizer.step()
        names = {event.key: event.count for event in profiler.key_averages() if "Optimizer" in event.key}
        seen.append({name.replace(base.__name__, "base"): count for name, count in names.items()})
    return seen


@pytest.mark.parametrize("way", [itself, calling, copying, replacing])
def test_hooks_and_profilers_see_what_they_see_of_torch_s_own_optimizer(way):
    ours = observations(way, ClippedSGD, OPTIONS[ClippedSGD])
    assert ours == observations(way, torch.optim.SGD, {"lr": 0.1})
    assert {type(event) for event in ours} == {tuple, str, dict}


def test_a_hook_changes_what_a_step_is_given():
    optimizer = observed(ClippedSGD, **OPTIONS[ClippedSGD])
    optimizer.register_step_pre_hook(lambda *_: ((optimizer, lambda: "another"), {}))
    assert optimizer.step() == "another"


def test_a_hook_that_comes_after_a_step_was_compiled_is_called():
    optimizer, called = observed(ClippedSGD, **OPTIONS[ClippedSGD]), []
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    step()
    hook = optimizer.register_step_post_hook(lambda *_: called.append("one"))
    step()
    hook.remove()
    everywhere = register_optimizer_step_pre_hook(lambda *_: called.append("all"))
    try:
        step()
    finally:
        everywhere.remove()
    assert called == ["one", "all"]


def test_nothing_is_wrapped_around_a_step_that_nobody_observes(monkeypatch):
    optimizer = observed(ClippedSGD, **OPTIONS[ClippedSGD])
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)
    optimizer.step()
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(TypeError):
        optimizer.step()


def test_distributed_checkpoint_round_trip(mesh):
    def model_and_optimizer(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}]
        return model, ClippedSGD(groups, lr=0.1, max_norm=1.0, momentum=0.9, nonfinite="skip")

    with torch.random.fork_rng():
        first, optimizer = model_and_optimizer(0)
        second, resumed = model_and_optimizer(1)
    set_gradients(first.parameters(), 0)
    optimizer.step()
    first.bias.grad[0] = math.nan
    optimizer.step()
    # A copy, as a file would be: torch hands out the momentum itself, and keeps what it is given.
    set_optimizer_state_dict(second, resumed, copy.deepcopy(get_optimizer_state_dict(first, optimizer)))
    second.load_state_dict(first.state_dict())
    assert resumed.skipped_steps.item() == 1
    for model, each in ((first, optimizer), (second, resumed)):
        set_gradients(model.parameters(), 1)
        each.step()
    assert bits(first.parameters()) == bits(second.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles(duplicate):
    parameters = make_parameters([(3,)])
    optimizer = ClippedSGD(parameters, lr=0.1, max_norm=1.0, momentum=0.9, nonfinite="skip")
    parameters[0].grad = torch.full_like(parameters[0], math.nan)
    optimizer.step()
    set_gradients(parameters, 0)
    optimizer.step()
    twin = duplicate(optimizer)
    assert twin.last_norm.item() == optimizer.last_norm.item()
    assert twin.skipped_steps.item() == 1
    twin_parameters = twin.param_groups[0]["params"]
    set_gradients(parameters, 1)
    set_gradients(twin_parameters, 1)
    optimizer.step()
    twin.step()
    assert bits(parameters) == bits(twin_parameters)


def test_learning_rate_schedule():
    parameters = [torch.zeros(1, dtype=torch.float64, requires_grad=True)]
    optimizer = ClippedSGD(parameters, lr=1.0, max_norm=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        parameters[0].grad = torch.full_like(parameters[0], -7.0)
        optimizer.step()
        scheduler.step()
    assert parameters[0].item() == 1 + 0.5 + 0.25  # steps of length lr * max_norm, exact in binary


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}])
def test_tensor_learning_rate(options):
    ours, theirs = make_parameters([(5,)]), make_parameters([(5,)])
    lr = torch.tensor(0.25, dtype=torch.float64)
    tensor, number = (
        ClippedSGD(ours, lr, max_norm=1.0, **options),
        ClippedSGD(theirs, 0.25, max_norm=1.0, **options),
    )
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        tensor.step()
        number.step()
    assert bits(ours) == bits(theirs)


def test_grad_scaler_unscales_before_clipping_and_skips_infinities():
    parameters = [torch.tensor([3.0, 4.0], requires_grad=True)]
    optimizer = ClippedSGD(parameters, lr=1.0, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(0.5 * parameters[0].square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.last_norm.item() == 5.0
    torch.testing.assert_close(parameters[0].detach(), torch.tensor([2.4, 3.2]))

    before = values(parameters)
    optimizer.zero_grad()
    scaler.scale((parameters[0] * math.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameters[0], before[0])
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_accuracy_of_the_factor(dtype):
    parameters = [torch.zeros(1000, dtype=dtype, requires_grad=True)]
    set_gradients(parameters, 0)
    ClippedSGD(parameters, lr=1.0, max_norm=1.0).step()
    # Each element is rounded by up to eps/2 with either sign: over 1000 elements the errors of the norm
    # cancel to about eps/2/sqrt(1000). A factor rounded to half precision would be off by up to eps/2 itself.
    length = total_norm([parameters[0].double()]).item()
    assert length == pytest.approx(1.0, rel=4 * torch.finfo(dtype).eps / 2 / math.sqrt(1000))


def test_mixed_dtypes_step_together():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)
    optimizer = ClippedSGD([a, b], lr=1.0, max_norm=1.0, momentum=0.5)
    optimizer.step()
    assert optimizer.last_norm.dtype == torch.float64
    assert (a.item(), b.item()) == (pytest.approx(-0.6, rel=1e-7), pytest.approx(-0.8, rel=4 * EPS))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("rule", ["hard", "normalize"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}]
)
def test_skip_leaves_parameters_and_momentum_bit_for_bit(run_step, bad, rule, options):
    parameters = make_parameters([(5,), (3, 4)])
    with torch.no_grad():
        parameters[0][0] = -0.0  # adding zero would turn it into +0.0
    optimizer = ClippedSGD(parameters, lr=0.1, max_norm=1.0, rule=rule, nonfinite="skip", **options)
    parameters[1].grad = torch.zeros_like(parameters[1])
    parameters[0].grad = torch.zeros_like(parameters[0])
    parameters[0].grad[1] = 5.0
    optimizer.step()
    parameters[1].grad[2, 1] = bad
    before = bits(parameters), bits(s["momentum_buffer"] for s in optimizer.state.values())
    run_step(optimizer)
    assert (bits(parameters), bits(s["momentum_buffer"] for s in optimizer.state.values())) == before
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.last_factor.item() == 0.0
    assert not optimizer.last_norm.isfinite().item()

    parameters[1].grad.zero_()
    run_step(optimizer)
    assert bits(parameters) != before[0]
    assert (optimizer.skipped_steps.item(), optimizer.last_norm.item()) == (1, 5.0)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_compiled_step_is_the_eager_step(options):
    eager, compiled = make_parameters([(5,), (30, 40)]), make_parameters([(5,), (30, 40)])
    first = ClippedSGD(eager, lr=0.1, max_norm=1.0, **options)
    second = ClippedSGD(compiled, lr=0.1, max_norm=1.0, **options)
    torch._dynamo.reset()
    step = torch.compile(lambda: second.step(), backend="aot_eager", fullgraph=True)
    kept = []
    for i in range(3):
        set_gradients(eager, i)
        set_gradients(compiled, i)
        first.step()
        step()
        # The norm of 1205 elements is summed in another order: at most 1205 units, on steps of 0.1 * 20.
        for a, b in zip(eager, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=(i + 1) * 2 * 1205 * EPS)
        assert second.last_norm.item() == pytest.approx(first.last_norm.item(), rel=1205 * EPS)
        assert second.last_factor.item() == pytest.approx(first.last_factor.item(), rel=1205 * EPS)
        kept.append(second.last_norm)
    assert len({norm.item() for norm in kept}) == 3  # each is a tensor of its own


def test_propagate_does_as_torch_does():
    for bad in (math.inf, math.nan):
        ours, theirs = make_parameters([(2,), (3,)]), make_parameters([(2,), (3,)])
        for parameters in (ours, theirs):
            set_gradients(parameters, 0)
            parameters[0].grad[0] = bad
        ClippedSGD(ours, lr=0.1, max_norm=1.0).step()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.optim.SGD(theirs, lr=0.1).step()
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.detach().numpy(), b.detach().numpy())


@pytest.mark.parametrize(("named", "label"), [(False, "parameter 1"), (True, r"parameter 1 \(bias\)")])
def test_raise_names_the_parameter_and_changes_nothing(named, label):
    model = nn.Linear(2, 3)
    optimizer = ClippedSGD(
        model.named_parameters() if named else model.parameters(),
        lr=0.1,
        max_norm=1.0,
        momentum=0.9,
        nonfinite="raise",
    )
    parameters = list(model.parameters())
    set_gradients(parameters, 0)
    optimizer.step()
    parameters[1].grad[2] = -math.inf
    before = bits(parameters), bits(s["momentum_buffer"] for s in optimizer.state.values())
    with pytest.raises(RuntimeError, match=rf"the gradient of {label} is -inf at index \(2,\)"):
        optimizer.step()
    assert (bits(parameters), bits(s["momentum_buffer"] for s in optimizer.state.values())) == before


def test_sparse_and_complex_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = ClippedSGD(embedding.named_parameters(), lr=0.1, max_norm=1.0)
    with pytest.raises(TypeError, match=r"the gradient of parameter 0 \(weight\) must be dense, got layout"):
        optimizer.step()
    phase = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    phase.abs().sum().backward()
    with pytest.raises(
        TypeError, match=r"parameter 0 must be real and floating-point, got dtype torch\.complex64"
    ):
        ClippedSGD([phase], lr=0.1, max_norm=1.0).step()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    L0=st.floats(1e-3, 1e3),
    L1=st.floats(1e-3, 1e3),
    gradient=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5).filter(any),
)
def test_from_smoothness_takes_the_step_of_the_theory(L0, L1, gradient):
    x = torch.zeros(len(gradient), dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor(gradient, dtype=torch.float64)
    ClippedSGD.from_smoothness([x], L0, L1).step()
    norm = math.hypot(*gradient)
    # About a dozen roundings, two of them in the norm of five elements.
    for got, g in zip(x.tolist(), gradient, strict=True):
        assert got == pytest.approx(-g / (L0 + L1 * norm), rel=16 * EPS, abs=0)


def test_from_smoothness_passes_options_on():
    optimizer = ClippedSGD.from_smoothness(make_parameters([(1,)]), 4.0, 2.0, rule="log", momentum=0.5)
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["max_norm"], defaults["rule"], defaults["momentum"]) == (
        0.25,
        2.0,
        "log",
        0.5,
    )


@pytest.mark.parametrize(
    ("L0", "L1"), [(0.0, 0.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, -1.0), (1.0, math.inf), (1e-320, 1.0)]
)
def test_from_smoothness_refuses_what_has_no_step(L0, L1):
    with pytest.raises(ValueError, match=r"must (not both )?be .*, got"):
        ClippedSGD.from_smoothness(make_parameters([(1,)]), L0, L1)


@pytest.mark.parametrize("value", [None, "1", [1.0], torch.tensor(1.0)])
def test_from_smoothness_names_wrong_types(value):
    message = re.escape(f"must be a number, got {value!r} of type")
    with pytest.raises(TypeError, match=f"L0 {message}"):
        ClippedSGD.from_smoothness(make_parameters([(1,)]), value, 1.0)
    with pytest.raises(TypeError, match=f"L1 {message}"):
        ClippedSGD.from_smoothness(make_parameters([(1,)]), 1.0, value)


def test_without_growth_from_smoothness_is_gradient_descent():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    ClippedSGD.from_smoothness([x], 8.0, 0.0).step()
    assert x.tolist() == [-3 / 8, -4 / 8]


@pytest.mark.parametrize("rule", RULES)
def test_without_an_intercept_from_smoothness_takes_the_limit_of_its_rule(rule):
    limit, near = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    limit.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    near.grad = limit.grad.clone()
    ClippedSGD.from_smoothness([limit], 0.0, 2.0, rule=rule).step()
    ClippedSGD.from_smoothness([near], 1e-9, 2.0, rule=rule).step()
    assert total_norm(limit).item() == pytest.approx((math.log(2) if rule == "log" else 1) / 2.0, rel=8 * EPS)
    # c/g is 1e-10 there, and the rules differ from their limits by at most as much.
    assert limit.tolist() == pytest.approx(near.tolist(), rel=1e-9)


@pytest.fixture
def mesh():
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


# Older torch warns about random numbers, of which there are none here.
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_distributed_parameters_step_like_plain_ones(mesh, options):
    plain = make_parameters([(4, 3), (5,)])
    spread = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    optimizers = [ClippedSGD(p, lr=0.1, max_norm=1.0, **options) for p in (plain, spread)]
    for step in range(2):
        set_gradients(plain, step)
        for p, d, placement in zip(plain, spread, (Shard(0), Replicate()), strict=True):
            d.grad = distribute_tensor(p.grad, mesh, [placement])
        for optimizer in optimizers:
            optimizer.step()
    for p, d in zip(plain, spread, strict=True):
        torch.testing.assert_close(d.to_local(), p, rtol=8 * EPS, atol=0.0)
    buffers = [state["momentum_buffer"] for state in optimizers[1].state.values()]
    assert all(isinstance(buffer, DTensor) for buffer in buffers)
    assert len(buffers) == (2 if options else 0)


def test_decoupled_weight_decay_is_that_of_adamw():
    # AdamW's decay alone: with a zero gradient its step is x = (1 - lr * decay) * x and nothing else.
    ours, theirs = make_parameters([(5,), (3, 4)]), make_parameters([(5,), (3, 4)])
    optimizer = ClippedSGD(
        ours, 0.1, max_norm=1.0, momentum=0.9, weight_decay=0.3, decoupled_weight_decay=True
    )
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    for _ in range(3):
        for parameters in (ours, theirs):
            for p in parameters:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        reference.step()
    assert bits(ours) == bits(theirs)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoupled_weight_decay_stays_out_of_the_momentum(dtype):
    ours, theirs = make_parameters([(5,), (3, 4)], dtype=dtype), make_parameters([(5,), (3, 4)], dtype=dtype)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}
    optimizer = ClippedSGD(ours, max_norm=1.0, decoupled_weight_decay=True, **options)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for step in range(4):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        optimizer.step()
        with torch.no_grad():
            for p in theirs:
                p.mul_(1 - 0.1 * 0.3)
        torch_step(reference, theirs, 1.0, offset=0.0)
        # Sums of 17 squares, a factor and some ten roundings a step, of numbers below 5.
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=(step + 1) * 5 * 30 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scope", ["tensor", "unit"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}])
def test_other_scopes_are_clipping_in_place_then_sgd(scope, rule, options):
    ours, theirs = (make_parameters([(4, 3), (5,), (), (2, 3, 2)]) for _ in range(2))
    optimizer = ClippedSGD(ours, 0.1, max_norm=0.5, rule=rule, scope=scope, **options)
    reference = torch.optim.SGD(theirs, 0.1, **options)
    for step in range(4):
        for parameters in (ours, theirs):
            set_gradients(parameters, step, scale=10.0 ** (step - 2))
        before = bits(p.grad for p in ours)
        optimizer.step()
        assert bits(p.grad for p in ours) == before
        norm = clip_grad_(theirs, 0.5, rule=rule, scope=scope)
        reference.step()
        assert optimizer.last_norm.item() == norm.item()
        clipped = total_norm([p.grad for p in theirs])
        # Two sums of up to 30 squares.
        assert optimizer.last_factor.item() == pytest.approx((clipped / norm).item(), rel=40 * EPS)
        for a, b in zip(
            ours, theirs, strict=True
        ):  # the same operations, but for the order of a few products
            torch.testing.assert_close(a, b, rtol=0.0, atol=(step + 1) * 40 * EPS)


def test_groups_may_have_thresholds_of_their_own_unless_the_norm_is_global():
    a, b = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a.grad = b.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def groups():
        return [{"params": [a]}, {"params": [b], "max_norm": math.inf}]

    ClippedSGD(groups(), lr=1.0, max_norm=1.0, scope="tensor").step()
    assert a.tolist() == pytest.approx([-3 / 5, -4 / 5], rel=4 * EPS)
    assert b.tolist() == [-3.0, -4.0]
    with pytest.raises(ValueError, match="max_norm must be the same in all parameter groups"):
        ClippedSGD(groups(), lr=1.0, max_norm=1.0)


@pytest.mark.parametrize("scope", ["tensor", "unit"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_other_scopes_skip_and_compile(scope, nonfinite):
    eager, compiled = (make_parameters([(4, 3), (5,)]) for _ in range(2))
    options = {"lr": 0.1, "max_norm": 0.5, "scope": scope, "momentum": 0.9, "nonfinite": nonfinite}
    first, second = ClippedSGD(eager, **options), ClippedSGD(compiled, **options)
    torch._dynamo.reset()
    step = torch.compile(lambda: second.step(), backend="eager", fullgraph=True)
    for i in range(3):
        for parameters in (eager, compiled):
            set_gradients(parameters, i)
            if nonfinite == "skip" and i == 1:
                parameters[1].grad[2] = math.inf
        before = bits(eager)
        first.step()
        step()
        assert (bits(eager) == before) == (nonfinite == "skip" and i == 1)
        for a, b in zip(eager, compiled, strict=True):  # sums of 12 squares in another order
            torch.testing.assert_close(a, b, rtol=0.0, atol=(i + 1) * 40 * EPS)
    assert first.skipped_steps.item() == second.skipped_steps.item() == (nonfinite == "skip")


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("norm", [1e-30, 3.0, 1e30])
def test_fused_step_agrees_with_the_formula_in_float32(rule, momentum, nesterov, norm):
    if nesterov and not momentum:
        return
    x = make_parameters([(300,), (20, 30)], dtype=torch.float32)
    y = [p.detach().double() for p in x]
    m = [torch.zeros_like(p) for p in y]
    optimizer = ClippedSGD(x, 0.1, max_norm=2.0, rule=rule, momentum=momentum, nesterov=nesterov)
    for step in range(4):
        set_gradients(x, step, scale=norm / 30)  # 900 normal numbers have a norm of about 30
        optimizer.step()
        g = total_norm([p.grad.double() for p in x]).item()
        f = clip_factor(g, 2.0, rule)
        for i, p in enumerate(x):
            d = f * p.grad.double()
            m[i] = momentum * m[i] + d
            y[i] = y[i] - 0.1 * (d + momentum * m[i] if nesterov else m[i])
            # A norm within 1e-6 and about ten roundings of float32, in steps of at most 0.1 * 2 * 10 * 1.9
            # and in parameters below 5.
            torch.testing.assert_close(p.double(), y[i], rtol=0.0, atol=(step + 1) * (3.8e-6 + 10 * 5 * 6e-8))


def test_half_precision_takes_the_step_of_sgd_and_not_of_the_fused_kernel():
    # In half precision on a CPU torch's fused kernel steps elsewhere than torch's plain SGD does.
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = (make_parameters([(1000,)], dtype=dtype) for _ in range(2))
        optimizer = ClippedSGD(ours, 0.1, max_norm=math.inf, momentum=0.9)
        reference = torch.optim.SGD(theirs, 0.1, momentum=0.9)
        for step in range(3):
            for parameters in (ours, theirs):
                set_gradients(parameters, step)
            optimizer.step()
            reference.step()
            # Each step rounds a few times: lr to half precision in torch, and parameters below 5.
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0.0, atol=(step + 1) * 5 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}, {}],
)
def test_memory_formats_and_views(options):
    # The fused kernel reads memory in order: layouts that differ must not reach it.
    def layouts():
        x = make_parameters([(2, 3, 4, 5), (6, 7), (8,)], dtype=torch.float32)
        x[0] = x[0].detach().to(memory_format=torch.channels_last).requires_grad_()
        x[1] = x[1].detach().t().requires_grad_()
        return x

    ours, theirs = layouts(), layouts()
    optimizer = ClippedSGD(ours, 0.1, max_norm=1.0, **options)
    reference = torch.optim.SGD(theirs, 0.1, **options)
    for step in range(3):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
            parameters[2].grad = torch.tensor(0.25 * step).expand(8)
        optimizer.step()
        torch_step(reference, theirs, 1.0, offset=0.0)
        for a, b in zip(ours, theirs, strict=True):  # some ten roundings of numbers below 5
            torch.testing.assert_close(a, b, rtol=0.0, atol=(step + 1) * 50 * 6e-8)


def test_gradient_accumulation_and_autocast():
    torch.manual_seed(0)
    models = [nn.Linear(6, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    data = torch.randn(4, 8, 6)
    optimizer = ClippedSGD(models[0].parameters(), 0.5, max_norm=0.1)
    for model in models:
        for batch in data:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch).float().square().mean() / len(data)
            loss.backward()
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.1)
    torch.optim.SGD(models[1].parameters(), 0.5).step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert a.dtype == torch.float32
        # The norm is above 0.1, so that torch's factor is smaller by less than 1e-6/0.1; and the rounding.
        assert optimizer.last_norm.item() > 0.1
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.5 * 0.1 * 1e-5 + 6e-8)


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 4},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 10},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 2},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.8**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.8},
    "ReduceLROnPlateau": {"patience": 0},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_it_as_it_drives_sgd(name):
    ours, theirs = make_parameters([(3,)]), make_parameters([(3,)])
    optimizers = [
        ClippedSGD(ours, lr=0.1, max_norm=1.0, momentum=0.9),
        torch.optim.SGD(theirs, lr=0.1, momentum=0.9),
    ]
    schedulers = [getattr(torch.optim.lr_scheduler, name)(o, **SCHEDULERS[name]) for o in optimizers]
    for step in range(6):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        optimizers[0].step()
        torch_step(optimizers[1], theirs, 1.0, offset=0.0)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        groups = [optimizer.param_groups[0] for optimizer in optimizers]
        assert groups[0]["lr"] == groups[1]["lr"]
        assert groups[0]["momentum"] == groups[1]["momentum"]  # cycles change the momentum, too
        # Some fifteen roundings a step of numbers below 5.
        torch.testing.assert_close(ours[0], theirs[0], rtol=0.0, atol=(step + 1) * 75 * EPS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mix", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
def test_mixed_clipping_follows_its_formula(rule, mix, options):
    x = make_parameters([(4, 3), (5,)])
    y, m = torch.cat([p.detach().reshape(-1) for p in x]), torch.zeros(17, dtype=torch.float64)
    optimizer = MixedClippedSGD(x, 0.1, max_norm=0.5, momentum=0.9, mix=mix, rule=rule, **options)
    sign, decay = (-1 if options.get("maximize") else 1), options.get("weight_decay", 0.0)
    for step in range(5):
        set_gradients(x, step, scale=10.0 ** (step - 2))
        optimizer.step()
        g = sign * torch.cat([p.grad.reshape(-1) for p in x])
        m = 0.9 * m + 0.1 * g
        parts = mix * clip_factor(m.norm(), 0.5, rule) * m + (1 - mix) * clip_factor(g.norm(), 0.5, rule) * g
        y = y - 0.1 * (parts + decay * y)
        # Two norms of 17 squares and ten roundings a step, of numbers below 5.
        flat = torch.cat([p.detach().reshape(-1) for p in x])
        torch.testing.assert_close(flat, y, rtol=0.0, atol=(step + 1) * 5 * 50 * EPS)
        assert optimizer.last_norm.item() == pytest.approx(g.norm().item(), rel=20 * EPS)
        assert optimizer.last_momentum_norm.item() == pytest.approx(m.norm().item(), rel=60 * EPS)


def test_mixing_only_the_gradient_is_clipped_sgd():
    ours, theirs = make_parameters([(7,), (3, 5)]), make_parameters([(7,), (3, 5)])
    mixed = MixedClippedSGD(ours, 0.1, max_norm=1.0, momentum=0.9, mix=0.0, weight_decay=0.1)
    plain = ClippedSGD(theirs, 0.1, max_norm=1.0, weight_decay=0.1)
    for step in range(4):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        mixed.step()
        plain.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=(step + 1) * 25 * EPS)


def test_normalised_momentum_with_its_schedule():
    # Hübler et al.: beta_t = 1 - t^(-1/2), eta_t = t^(-3/4)/7, and a step of length eta_t along the momentum.
    x = make_parameters([(4,), (3, 2)])
    optimizer = MixedClippedSGD(x, lr=1 / 7, max_norm=1.0, momentum=0.0, mix=1.0, rule="normalize")
    scheduler = ParameterAgnosticLR(optimizer)
    m = torch.zeros(10, dtype=torch.float64)
    for t in range(1, 8):
        set_gradients(x, t)
        before = torch.cat([p.detach().reshape(-1) for p in x])
        optimizer.step()
        scheduler.step()
        beta, eta = 1 - t ** (-1 / 2), t ** (-3 / 4) / 7
        m = beta * m + (1 - beta) * torch.cat([p.grad.reshape(-1) for p in x])
        step = torch.cat([p.detach().reshape(-1) for p in x]) - before
        # Differences of parameters below 4.
        torch.testing.assert_close(step, -eta * m / m.norm(), rtol=0.0, atol=8 * EPS)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(8**-0.75 / 7, rel=4 * EPS)


def test_the_schedule_resumes_where_it_was():
    optimizer = MixedClippedSGD(make_parameters([(2,)]), lr=1 / 7, max_norm=1.0, momentum=0.0, mix=1.0)
    scheduler = ParameterAgnosticLR(optimizer)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    other = MixedClippedSGD(make_parameters([(2,)]), lr=1 / 7, max_norm=1.0, momentum=0.0, mix=1.0)
    resumed = ParameterAgnosticLR(other)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for each in (optimizer, other):
        each.step()
    scheduler.step()
    resumed.step()
    for name in ("lr", "momentum"):
        assert other.param_groups[0][name] == optimizer.param_groups[0][name]


def polyak_run(f, x0, steps, **options):
    x = torch.tensor(x0, dtype=torch.float64, requires_grad=True)
    optimizer = PolyakClippedSGD([x], **options)

    def closure():
        optimizer.zero_grad()
        loss = f(x)
        loss.backward()
        return loss

    return x, optimizer, [optimizer.step(closure).item() for _ in range(steps)]


def test_polyak_step_on_a_quadratic_and_with_a_limit():
    # For f = a x^2/2 + f_star the step is (f - f_star)/(a x)^2 * a x = x/2, whatever a.
    for a in (1e-3, 1.0, 1e3):
        x, optimizer, _ = polyak_run(lambda x, a=a: a * x.square() / 2 + 5, 8.0, 3, f_star=5.0)
        # f - 5 loses digits where a x^2 is small against 5.
        assert x.item() == pytest.approx(1.0, rel=30 * EPS * (1 + 5 / (a / 2)))
        assert optimizer.last_factor.item() == pytest.approx(1 / (2 * a), rel=30 * EPS * (1 + 5 / (a / 2)))
    x, optimizer, _ = polyak_run(lambda x: x.square() / 2, 8.0, 1, max_lr=0.25)
    assert (x.item(), optimizer.last_factor.item()) == (6.0, 0.25)


def test_polyak_step_is_at_least_the_clipped_step_of_the_theory():
    # cosh is (1, 1)-smooth with f_star = 1: the size is at least min(1/(4 L0), 1/(4 L1 |g|)) everywhere.
    for x0 in np.linspace(0.01, 20.0, 60):
        _, optimizer, _ = polyak_run(torch.cosh, float(x0), 1, f_star=1.0)
        assert optimizer.last_factor.item() >= 0.25 * min(1.0, 1 / math.sinh(x0))


def test_polyak_step_never_leaves_the_minimiser():
    # On a convex function no Polyak step increases the distance to the minimiser (here 0), nor does f rise to
    # more than it was on cosh.
    x, _, losses = polyak_run(torch.cosh, 15.0, 60, f_star=1.0)
    assert abs(x.item()) < 1e-6
    assert losses == sorted(losses, reverse=True)


def test_polyak_without_gradient_or_gap_stays(run_step):
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = PolyakClippedSGD([x], f_star=2.0)
    x.grad = torch.zeros_like(x)
    assert optimizer.step(lambda: 7.0) == 7.0  # no gradient
    x.grad = torch.ones_like(x)
    optimizer.step(lambda: torch.tensor([1.0]))  # below f_star
    assert x.tolist() == [1.0] * 3
    x.grad = torch.full_like(x, 1e-200)
    optimizer.step(lambda: 2.0 + 1e-12)
    assert x.isfinite().all()
    with pytest.raises(ValueError, match="needs a closure that returns the loss, got None"):
        optimizer.step(None)


def test_polyak_skips_a_loss_that_is_not_finite():
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = PolyakClippedSGD([x], nonfinite="skip")
    x.grad = torch.ones_like(x)
    optimizer.step(lambda: math.nan)
    assert (x.tolist(), optimizer.skipped_steps.item()) == ([1.0] * 3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_star": math.nan}, "f_star must be finite, got nan"),
        ({"max_lr": 0.0}, r"max_lr must be positive, got 0\.0"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
    ],
)
def test_bad_polyak_options(options, message):
    with pytest.raises(ValueError, match=message):
        PolyakClippedSGD(make_parameters([(1,)]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": 1.5}, r"mix must be at most 1, got 1\.5"),
        ({"mix": -0.5}, r"mix must be finite and at least 0, got -0\.5"),
        ({"momentum": 1.0}, r"momentum must be below 1, got 1\.0"),
        ({"max_norm": 0.0}, r"max_norm must be positive, got 0\.0"),
    ],
)
def test_bad_mixed_options(options, message):
    with pytest.raises(ValueError, match=message):
        MixedClippedSGD(
            make_parameters([(1,)]), 0.1, **{"max_norm": 1.0, "momentum": 0.9, "mix": 0.7, **options}
        )


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_mixed_compiles_skips_and_round_trips(nonfinite):
    options = {"lr": 0.1, "max_norm": 0.5, "momentum": 0.9, "mix": 0.7, "nonfinite": nonfinite}
    eager, compiled, resumed = (make_parameters([(4, 3), (5,)]) for _ in range(3))
    first, second, third = (MixedClippedSGD(p, **options) for p in (eager, compiled, resumed))
    torch._dynamo.reset()
    step = torch.compile(lambda: second.step(), backend="eager", fullgraph=True)
    for i in range(3):
        for parameters in (eager, compiled, resumed):
            set_gradients(parameters, i)
            if nonfinite == "skip" and i == 1:
                parameters[1].grad[2] = math.nan
        before = bits(eager), bits(s["momentum_buffer"] for s in first.state.values())
        third.load_state_dict(copy.deepcopy(first.state_dict()))
        first.step()
        step()
        third.step()
        assert bits(eager) == bits(resumed)
        after = bits(eager), bits(s["momentum_buffer"] for s in first.state.values())
        assert (before == after) == (nonfinite == "skip" and i == 1)
        for a, b in zip(eager, compiled, strict=True):  # sums of 17 squares in another order
            torch.testing.assert_close(a, b, rtol=0.0, atol=(i + 1) * 40 * EPS)
    assert second.last_momentum_norm.item() == pytest.approx(first.last_momentum_norm.item(), rel=40 * EPS)
    assert first.skipped_steps.item() == second.skipped_steps.item() == (nonfinite == "skip")


@pytest.mark.parametrize("policy", [lambda: Percentile(50.0, window=4), lambda: ZScore(1.0, warmup=2)])
@pytest.mark.parametrize("kind", ["clipped", "mixed"])
def test_a_policy_is_its_threshold_step_for_step(policy, kind):
    def make(parameters, max_norm):
        if kind == "clipped":
            return ClippedSGD(parameters, 0.1, max_norm=max_norm, momentum=0.9)
        return MixedClippedSGD(parameters, 0.1, max_norm=max_norm, momentum=0.9, mix=0.7)

    ours, theirs = make_parameters([(7,), (3, 5)]), make_parameters([(7,), (3, 5)])
    optimizer, reference, thresholds = make(ours, policy()), make(theirs, 1.0), policy()
    for step in range(8):
        for parameters in (ours, theirs):
            set_gradients(parameters, step, scale=1 + step % 3)
        reference.param_groups[0]["max_norm"] = thresholds(total_norm([p.grad for p in theirs])).item()
        optimizer.step()
        reference.step()
        assert bits(ours) == bits(theirs)


def test_policy_state_travels_with_the_optimizer():
    x, y = make_parameters([(5,)]), make_parameters([(5,)])
    optimizer = ClippedSGD(x, 0.1, max_norm=Percentile(30.0, window=4))
    for step in range(6):
        set_gradients(x, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = ClippedSGD(y, 0.1, max_norm=Percentile(10.0))
    resumed.load_state_dict(state)
    with torch.no_grad():
        y[0].copy_(x[0])
    for step in range(6, 9):
        for parameters, each in ((x, optimizer), (y, resumed)):
            set_gradients(parameters, step)
            each.step()
        assert bits(x) == bits(y)
    with pytest.raises(ValueError, match=r"the state has a threshold policy, but max_norm is 1\.0 here"):
        ClippedSGD(y, 0.1, max_norm=1.0).load_state_dict(state)
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["max_norm"].state_dict()["window"] == 4


def test_a_skipped_norm_is_not_remembered():
    x = make_parameters([(3,)])
    policy = Percentile(50.0)
    optimizer = ClippedSGD(x, 0.1, max_norm=policy, nonfinite="skip")
    x[0].grad = torch.full_like(x[0], math.inf)
    optimizer.step()
    assert policy.state_dict()["count"].item() == 0
    assert optimizer.skipped_steps.item() == 1


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
@pytest.mark.parametrize("scope", ["global", "tensor", "unit"])
def test_empty_and_zero_dimensional_parameters(shape, scope):
    x = [*make_parameters([shape]), *make_parameters([(2,)])]
    set_gradients(x, 0)
    before = values(x)
    optimizer = ClippedSGD(x, 0.1, max_norm=math.inf, scope=scope, momentum=0.9)
    optimizer.step()
    for p, old in zip(x, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad, rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scope", ["global", "tensor", "unit"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_step_on_a_gpu_agrees_and_does_not_wait(scope, options, nonfinite):
    host = make_parameters([(7,), (30, 40)])
    device = [p.detach().cuda().requires_grad_() for p in host]
    settings = {"lr": 0.1, "max_norm": 0.5, "scope": scope, "nonfinite": nonfinite, **options}
    optimizers = [ClippedSGD(p, **settings) for p in (host, device)]
    for step in range(3):
        set_gradients(host, step)
        for p, q in zip(host, device, strict=True):
            q.grad = p.grad.cuda()
        optimizers[0].step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for p, q in zip(host, device, strict=True):  # norms of 1207 squares in another order
            torch.testing.assert_close(p, q.cpu(), rtol=0.0, atol=(step + 1) * 2 * 1207 * EPS)
