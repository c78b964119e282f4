"""`smoothness.warm_up` against closed forms, and what it leaves behind: nothing."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradclip import clip_factor, recommend
from gradclip.smoothness import WarmUp, directional_smoothness, fit, warm_up

CURVATURES = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("multiple", [0.5, 1.0, 2.0])
def test_the_steps_on_a_quadratic_are_those_of_the_formula(multiple):
    w = vector(1.0, -2.0, 0.5)
    found = warm_up([lambda: (CURVATURES * w**2).sum() / 2] * 10, [w], multiple=multiple)
    x, c = np.array([1.0, -2.0, 0.5]), CURVATURES.numpy()
    for k in range(10):
        g = c * x
        h = np.linalg.norm(c * g) / np.linalg.norm(g)
        # Ten steps of a dozen roundings each; no step grows an error by more than |1 - 2 · 10/h| < 20, h > 1.
        close = {"rel": 1e-9}
        assert found.losses[k] == pytest.approx((c * x**2).sum() / 2, **close)
        assert found.grad_norms[k] == pytest.approx(np.linalg.norm(g), **close)
        assert found.smoothness[k] == pytest.approx(h, **close)
        assert found.update_lengths[k] == pytest.approx(multiple / h * np.linalg.norm(g), **close)
        x = x - multiple / h * g
    assert found.stopped == ""
    assert w.tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize("multiple", [0.25, 0.5])
def test_the_constants_of_the_extremal_function_come_back(multiple):
    # f'' = L0 + L1 |f'| everywhere, so every line through the points is that one.
    intercept, slope = 3.0, 2.0
    x = vector(2.0)

    def loss():
        return (intercept / slope**2) * (torch.exp(slope * x.abs()) - slope * x.abs() - 1).sum()

    found = warm_up([loss] * 12, [x], multiple=multiple)
    line = found.fit()
    # The solver of the quantile line stops at a relative 1e-7.
    found_line = [line.L0, line.L1]
    assert found_line == pytest.approx([intercept, slope], rel=1e-5)
    advice = found.recommend()
    assert advice.lr == pytest.approx(multiple / intercept, rel=1e-5)
    assert advice.max_norm == pytest.approx(intercept / slope, rel=1e-5)
    assert advice.rule == "soft"


def test_the_line_is_the_median_one_and_the_step_a_multiple_of_its_step():
    w = vector(1.0, -2.0, 0.5)
    found = warm_up([lambda: (w**4).sum() + (CURVATURES * w**2).sum()] * 12, [w], multiple=2.0)
    line = fit(found.grad_norms, found.smoothness, method="quantile", quantile=0.5)
    assert (found.fit().L0, found.fit().L1) == (line.L0, line.L1)
    assert found.recommend() == recommend(line.L0 / 2, line.L1 / 2)


def test_the_advised_step_can_have_another_multiple_than_the_warm_up():
    w = vector(1.0, -2.0, 0.5)
    found = warm_up([lambda: (w**4).sum() + (CURVATURES * w**2).sum()] * 12, [w], multiple=2.0)
    single, double = found.recommend(1.0), found.recommend()
    # A power of two, so exact. The threshold L0/L1 is of the line, not of the step.
    assert (double.lr, double.max_norm, double.rule) == (2 * single.lr, single.max_norm, single.rule)
    assert found.recommend(2.0) == double


@pytest.fixture
def network():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    batches = [
        (torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator))
        for _ in range(9)
    ]
    return model, batches


def test_every_batch_is_measured_where_the_steps_before_have_led(network):
    model, batches = network
    model.eval()  # without masks and batch statistics, so that the loop below can be written out
    params = list(model.parameters())
    losses = [lambda x=x, y=y: cross_entropy(model(x), y) for x, y in batches]
    found = warm_up(losses, params, multiple=1.0)
    for k, loss in enumerate(losses):
        gradient = torch.autograd.grad(loss(), params)
        h = directional_smoothness(loss, params, gradient)
        # float32, and steps that amplify its rounding of 6e-8 a few times each.
        assert found.smoothness[k] == pytest.approx(h, rel=1e-3)
        with torch.no_grad():
            for p, g in zip(params, gradient, strict=True):
                p -= g / h


def test_it_leaves_no_trace(network):
    model, batches = network
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    warm_up([lambda x=x, y=y: cross_entropy(model(x), y) for x, y in batches], model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad.eq(1).all() for p in model.parameters())
    assert model.training


def test_parameters_are_put_back_behind_an_error():
    w = vector(1.0, -2.0, 0.5)

    def losses():
        yield lambda: (CURVATURES * w**2).sum()
        assert w.tolist() != [1.0, -2.0, 0.5]  # an iterator sees where the steps have led
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(losses(), [w])
    assert w.tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize(
    ("loss", "start", "steps", "reason"),
    [
        (lambda w: (w**2).sum(), 1.0, 1, "the gradient is zero"),  # its own minimum after one step
        (lambda w: w.sum(), 1.0, 0, "there is no curvature along the gradient"),
        (lambda w: w.log().sum(), 0.0, 0, "the loss is -inf"),
        (lambda w: w.sqrt().sum(), 0.0, 0, "the gradient has the element inf for params[0]"),
    ],
)
def test_it_ends_where_no_next_step_exists_and_says_why(loss, start, steps, reason):
    w = vector(start)
    found = warm_up([lambda: loss(w)] * 3, [w], multiple=1.0)
    assert (len(found.losses), found.stopped) == (steps, reason)
    assert w.item() == start
    message = f"at least 8 points, got {steps}; the warm-up ended early: {reason}"
    with pytest.raises(ValueError, match=re.escape(message)):
        found.recommend()


def test_too_few_losses_are_said_to_be_too_few():
    w = vector(1.0, -2.0, 0.5)
    with pytest.raises(ValueError, match=r"at least 8 points, got 3$"):
        warm_up([lambda: (w**4).sum()] * 3, [w]).recommend()


@pytest.mark.parametrize(("intercept", "rule"), [(1e-2, "soft"), (1e-9, "normalize")])
def test_a_negligible_intercept_is_none(intercept, rule):
    # f'' = L0 + L1 |f'| with L1 = 1, at gradients from 1 to 8: the line comes back, or its limit for L0 = 0.
    norms = tuple(float(g) for g in range(1, 9))
    found = WarmUp(norms, tuple(intercept + g for g in norms), norms, norms, multiple=2.0)
    advice = found.recommend()
    assert advice.rule == rule
    g = torch.tensor(norms, dtype=torch.float64)
    lengths = advice.lr * clip_factor(g, advice.max_norm, rule=advice.rule) * g
    assert lengths.tolist() == pytest.approx((2 * g / (intercept + g)).tolist(), rel=1e-6)


@pytest.mark.parametrize("multiple", [0.0, -1.0, math.nan, math.inf])
def test_a_wrong_multiple_is_named(multiple):
    w = vector(1.0)
    message = f"multiple must be positive and finite, got {multiple}"
    with pytest.raises(ValueError, match=message):
        warm_up([lambda: (w**2).sum()], [w], multiple=multiple)
    norms = tuple(float(g) for g in range(1, 9))
    with pytest.raises(ValueError, match=message):
        WarmUp(norms, norms, norms, norms, multiple=2.0).recommend(multiple)


def test_a_frozen_parameter_is_named_and_the_way_around_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    message = "params[0] must be a leaf that requires a gradient, got is_leaf=True, requires_grad=False; "
    message += "list [p for p in model.parameters() if p.requires_grad]"
    with pytest.raises(ValueError, match=re.escape(message)):
        warm_up([], model.parameters())


def test_wrong_kinds_are_named():
    w = vector(1.0)
    with pytest.raises(TypeError, match="multiple must be a number, got '2'"):
        warm_up([], [w], multiple="2")
    with pytest.raises(TypeError, match="loss must be callable without arguments, got Tensor"):
        warm_up([(w**2).sum()], [w])
    with pytest.raises(TypeError, match="params must be a list of tensors, got one tensor"):
        warm_up([lambda: (w**2).sum()], w)
    with pytest.raises(ValueError, match="params must not be empty"):
        warm_up([lambda: (w**2).sum()], [])
