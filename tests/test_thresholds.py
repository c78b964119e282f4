import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import clip_grad_
from gradclip.optim import ClippedSGD, MixedClippedSGD
from gradclip.thresholds import Percentile, ZScore

EPS = 2.0**-52
norms = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60)


def thresholds(policy, values):
    return [policy(torch.tensor(value, dtype=torch.float64)).item() for value in values]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=norms, percentile=st.sampled_from([0.0, 10.0, 50.0, 99.5, 100.0]), window=st.integers(1, 30))
def test_percentile_is_that_of_numpy_over_the_window(values, percentile, window):
    got = thresholds(Percentile(percentile, window=window), values)
    for i, threshold in enumerate(got):
        history = values[max(0, i + 1 - window) : i + 1]
        # Both interpolate between two order statistics; the place between them has an error of some EPS * 60.
        expected = np.percentile(history, percentile)
        assert threshold == pytest.approx(expected, rel=4 * EPS, abs=200 * EPS * max(history))


def published_zclip(values, z, alpha, warmup, eps):
    """The algorithm as the authors' class has it, in plain Python: a buffer, then two running averages."""
    buffer, mean, var, result = [], None, None, []
    for g in values:
        if mean is None:
            buffer.append(g)
            result.append(math.inf)
            if len(buffer) == warmup:
                mean = sum(buffer) / warmup
                var = sum((x - mean) ** 2 for x in buffer) / warmup
            continue
        score = (g - mean) / (math.sqrt(var) + eps)
        threshold = mean + z * math.sqrt(var) / (score / z) if score > z else math.inf
        result.append(threshold)
        seen = min(g, threshold)
        mean = alpha * mean + (1 - alpha) * seen
        var = alpha * var + (1 - alpha) * (seen - mean) ** 2
    return result


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=60),
    warmup=st.integers(1, 10),
    alpha=st.sampled_from([0.0, 0.5, 0.97]),
    z=st.sampled_from([0.5, 2.5]),
)
def test_z_score_is_the_published_algorithm(values, warmup, alpha, z):
    eps = 1e-3
    got = thresholds(ZScore(z, alpha=alpha, warmup=warmup, eps=eps), values)
    # Variances are differences: an error of 60 roundings of 100 squared, seen through a root, and carried on
    # for 60 steps.
    noise = math.sqrt(60 * EPS) * 100 * 60
    for g, e in zip(got, published_zclip(values, z, alpha, warmup, eps), strict=True):
        if math.isinf(g) != math.isinf(e):
            # A score that is z to within the noise may fall on either side.
            assert min(g, e) < math.inf
            continue
        assert g == e or g == pytest.approx(e, abs=noise)


def test_z_score_numbers_worked_by_hand():
    # After 1 and 3: mean 2, variance 1. The norm 4 has z = 2 and passes; then mean 2.06, variance 1.0829.
    # 12 has z = 9.94/1.04063 = 9.5519, and the threshold is 2.06 + 2.5^2 * 1.04063/9.5519.
    policy = ZScore(warmup=2, eps=1e-15)
    assert thresholds(policy, [1.0, 3.0, 4.0]) == [math.inf] * 3
    deviation = math.sqrt(0.97 * 1.0 + 0.03 * 1.94**2)
    z = (12 - 2.06) / deviation
    assert thresholds(policy, [12.0])[0] == pytest.approx(2.06 + 6.25 * deviation / z, rel=1e-12)


@pytest.mark.parametrize("make", [lambda: Percentile(50.0), lambda: ZScore(warmup=3)])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_norms_that_are_not_finite_are_not_remembered(make, bad):
    values = [1.0, 2.0, 4.0, 3.0, 8.0]
    clean, disturbed = make(), make()
    expected = thresholds(clean, values)
    got = []
    for value in values:
        disturbed(torch.tensor(bad, dtype=torch.float64))
        got += thresholds(disturbed, [value])
    assert got == expected


@pytest.mark.parametrize("make", [lambda: Percentile(50.0, window=4), lambda: ZScore(1.0, warmup=3)])
def test_state_round_trip_and_zero_norms(make):
    policy = make()
    thresholds(policy, [0.0, 0.0, 1.0, 2.0, 5.0])
    resumed = Percentile() if isinstance(policy, Percentile) else ZScore()
    state = policy.state_dict()
    resumed.load_state_dict(state)
    values = [3.0, 50.0, 0.0, 2.0]
    assert thresholds(resumed, values) == thresholds(policy, values)
    with pytest.raises(KeyError):
        (ZScore() if isinstance(policy, Percentile) else Percentile()).load_state_dict(state)


@pytest.mark.parametrize("make", [lambda: Percentile(50.0, window=4), lambda: ZScore(1.0, warmup=3)])
def test_policies_compile(make):
    torch._dynamo.reset()
    values = [1.0, 5.0, 2.0, 9.0, 9.0, 1.0]
    policy = make()
    compiled = torch.compile(lambda norm: policy(norm), backend="eager", fullgraph=True)
    got = [compiled(torch.tensor(value, dtype=torch.float64)).item() for value in values]
    assert got == thresholds(make(), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_has_dtype_and_shape_of_the_norm(dtype):
    for policy in (Percentile(), ZScore()):
        threshold = policy(torch.tensor(2.0, dtype=dtype))
        assert (threshold.dtype, threshold.shape) == (dtype, ())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Percentile(101.0), r"percentile must be between 0 and 100, got 101\.0"),
        (lambda: Percentile(math.nan), "percentile must be between 0 and 100, got nan"),
        (lambda: Percentile(window=0), "window must be at least 1, got 0"),
        (lambda: Percentile(window=2.5), r"window must be a whole number, got 2\.5"),
        (lambda: Percentile(window=math.inf), "window must be a whole number, got inf"),
        (lambda: ZScore(0.0), r"z must be positive and finite, got 0\.0"),
        (lambda: ZScore(alpha=1.0), r"alpha must be at least 0 and below 1, got 1\.0"),
        (lambda: ZScore(warmup=0), "warmup must be at least 1, got 0"),
        (lambda: ZScore(warmup=math.nan), "warmup must be a whole number, got nan"),
        (lambda: ZScore(eps=0.0), r"eps must be positive and finite, got 0\.0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_class_in_place_of_a_policy_is_refused_at_once():
    x = torch.zeros(2, requires_grad=True)
    for make in (
        lambda: ClippedSGD([x], 0.1, max_norm=Percentile),
        lambda: MixedClippedSGD([x], 0.1, max_norm=Percentile, momentum=0.9, mix=0.5),
        lambda: clip_grad_([x], Percentile),
    ):
        with pytest.raises(TypeError, match=r"got the class; make one: Percentile\(\)"):
            make()


def test_a_policy_that_an_optimizer_cannot_save_is_refused_at_once():
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(TypeError, match="as a policy, needs state_dict and load_state_dict"):
        ClippedSGD([x], 0.1, max_norm=lambda norm: norm / 2)
    # Without an optimizer there is nothing to save.
    x.grad = torch.tensor([3.0, 4.0])
    clip_grad_([x], lambda norm: norm / 2)
    torch.testing.assert_close(x.grad, torch.tensor([1.5, 2.0]))
