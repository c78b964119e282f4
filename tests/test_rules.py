import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.rules import RULES, clip_factor

# The oracle works in exact rational arithmetic and sums a series for the logarithm; the library uses floats.
EPS = 2.0**-52


def exact_log1p(u: Fraction) -> Fraction:
    """ln(1+u) for 0 <= u <= 1 with relative error below 1e-19, from ln(1+u) = 2 artanh(u/(2+u))."""
    w = u / (2 + u)  # at most 1/3: the series gains a factor 9 per term, and 22 terms leave 9**-22 < 1e-20
    return 2 * sum(w ** (2 * k + 1) / (2 * k + 1) for k in range(22))


def oracle(norm: float, max_norm: float, rule: str) -> float:
    g, c = Fraction(norm), Fraction(max_norm)
    if g == 0:
        return 0.0 if rule == "normalize" else 1.0
    if rule == "hard":
        return float(min(Fraction(1), c / g))
    if rule == "soft":
        return float(c / (c + g))
    if rule == "normalize":
        return float(c / g)
    share = g / (c + g)
    # Short fractions keep the series fast: 160 bits leave an error of 2**-100 even for shares near 2**-60,
    # and smaller shares are their own logarithm to 2**-61.
    log = share if share < Fraction(1, 2**60) else exact_log1p(Fraction(round(share * 2**160), 2**160))
    return float(c / g * log)


positive = st.floats(min_value=1e-30, max_value=1e30)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(norm=st.just(0.0) | positive, max_norm=positive, rule=st.sampled_from(RULES))
def test_factor_is_exact_to_a_few_roundings(norm, max_norm, rule):
    # The longest formula (log) rounds five times before log1p, which is well conditioned and itself good to a
    # unit in the last place, and once more in a division: 8 units cover them.
    assert clip_factor(norm, max_norm, rule) == pytest.approx(
        oracle(norm, max_norm, rule), rel=8 * EPS, abs=0
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-8, 0.3, 1.0, 7.0, 1e8, 1e30, 3e38])
@pytest.mark.parametrize("max_norm", [1e-10, 0.25, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_factor_is_rounded_once(rule, norm, max_norm, dtype):
    norms = torch.tensor([norm], dtype=dtype)
    got = clip_factor(norms, max_norm, rule)
    info = torch.finfo(dtype)
    expected = min(oracle(norms.item(), max_norm, rule), info.max)
    assert got.dtype == dtype
    assert got.shape == (1,)
    # One rounding to the dtype (half a unit, and half the smallest subnormal), on top of float64's 8 units.
    assert got.item() == pytest.approx(
        expected, rel=info.eps / 2 + 8 * EPS, abs=info.smallest_normal * info.eps
    )


@pytest.mark.parametrize("rule", RULES)
def test_elementwise_on_any_shape(rule):
    norms = torch.tensor([[0.0, 0.5], [1.0, 4.0]], dtype=torch.float64)
    got = clip_factor(norms, 2.0, rule)
    assert got.tolist() == [[clip_factor(g, 2.0, rule) for g in row] for row in norms.tolist()]
    assert clip_factor(norms[0, 1], 2.0, rule).shape == ()


def test_type_in_is_type_out():
    assert type(clip_factor(2, 1.0)) is float
    assert clip_factor(torch.tensor(2.0, dtype=torch.bfloat16), 1.0).dtype == torch.bfloat16
    assert not clip_factor(torch.tensor(2.0, requires_grad=True), 1.0).requires_grad


@settings(max_examples=300, deadline=None, derandomize=True)
@given(norm=positive, max_norm=positive)
def test_soft_is_between_half_of_hard_and_hard(norm, max_norm):
    hard, soft = clip_factor(norm, max_norm, "hard"), clip_factor(norm, max_norm, "soft")
    # Rounding is monotone, and soft's two extra roundings cost at most two units.
    assert hard * (0.5 - 2 * EPS) <= soft <= hard * (1 + 2 * EPS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(max_norm=positive, other=st.floats(min_value=1e-5, max_value=1e5))
def test_soft_is_exactly_half_of_hard_at_the_threshold_and_more_elsewhere(max_norm, other):
    assert clip_factor(max_norm, max_norm, "hard") == 1.0
    assert clip_factor(max_norm, max_norm, "soft") == 0.5
    # soft/hard = 1/2 + |1-r|/(2(1+r)) with r = g/c: above 1/2 by more than rounding unless r is 1.
    ratio = clip_factor(max_norm * other, max_norm, "soft") / clip_factor(max_norm * other, max_norm, "hard")
    excess = abs(1 - other) / (2 * (1 + other))
    assert ratio == pytest.approx(0.5 + excess, rel=8 * EPS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(norm=positive, max_norm=positive)
def test_log_is_between_ln2_of_soft_and_soft(norm, max_norm):
    # ln(1+u) lies between u ln 2 and u for u in [0, 1] (concavity), and soft is (c/g) u.
    soft, log = clip_factor(norm, max_norm, "soft"), clip_factor(norm, max_norm, "log")
    assert math.log(2) * soft * (1 - 10 * EPS) <= log <= soft * (1 + 10 * EPS)


def test_log_minimises_the_sharp_descent_bound():
    # With lr = 1/L0, c = L0/L1, the bound -t g^2 + (L0 + L1 g) phi(L1 t g)/L1^2 with phi(s) = e^s - s - 1 has
    # the derivative -g^2 + (L0 + L1 g) g (e^(L1 t g) - 1)/L1 in the step t: zero at the factor's t.
    L0, L1 = 3.0, 0.7
    for g in (1e-3, 0.5, 4.0, 100.0):
        t = clip_factor(g, L0 / L1, "log") / L0
        slope = (L0 + L1 * g) * g * math.expm1(L1 * t * g) / L1
        assert slope == pytest.approx(g**2, rel=16 * EPS)  # about a dozen roundings in the two formulas


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(norm=positive, max_norm=positive, power=st.integers(-20, 20))
def test_factor_depends_on_the_ratio_only(rule, norm, max_norm, power):
    scale = 2.0**power  # a power of two scales floats exactly, so the factors agree to the last bit
    assert clip_factor(norm * scale, max_norm * scale, rule) == clip_factor(norm, max_norm, rule)


@pytest.mark.parametrize("rule", RULES)
def test_step_length_grows_with_the_norm_and_stays_below_the_threshold(rule):
    norms = torch.logspace(-30, 30, 2001, dtype=torch.float64)
    lengths = clip_factor(norms, 0.25, rule) * norms
    limit = math.log(2) if rule == "log" else 1.0
    assert lengths.max().item() <= 0.25 * limit * (1 + 4 * EPS)
    assert lengths[-1].item() == pytest.approx(0.25 * limit, rel=8 * EPS)
    assert bool((lengths.diff() >= -4 * EPS * 0.25).all())


@pytest.mark.parametrize("rule", ["hard", "soft", "log"])
def test_tiny_norms_are_not_clipped(rule):
    norms = torch.tensor([0.0, 5e-324, 1e-300, 1e-30], dtype=torch.float64)
    # The exact factors are 1 - O(g/c), and g/c is below 1e-29 here.
    assert clip_factor(norms, 1.0, rule).tolist() == [1.0] * 4


@pytest.mark.parametrize("rule", RULES)
def test_infinite_and_nan_norms(rule):
    factor = clip_factor(torch.tensor([math.inf, math.nan]), 1.0, rule)
    assert factor[0].item() == 0.0
    assert math.isnan(factor[1].item())
    assert clip_factor(math.inf, 1.0, rule) == 0.0
    assert math.isnan(clip_factor(math.nan, 1.0, rule))


@pytest.mark.parametrize("rule", ["hard", "soft", "log"])
def test_infinite_threshold_never_clips(rule):
    factor = clip_factor(torch.tensor([0.0, 1e-30, 1e30, math.inf, math.nan]), math.inf, rule)
    np.testing.assert_array_equal(factor.numpy(), [1.0, 1.0, 1.0, 1.0, math.nan])


def test_normalize_saturates_instead_of_overflowing():
    tiny = torch.tensor(1e-44)
    assert clip_factor(tiny, 1.0, "normalize").item() == torch.finfo(torch.float32).max


@pytest.mark.parametrize("max_norm", [0.0, -1.0, -math.inf, math.nan])
def test_bad_threshold(max_norm):
    with pytest.raises(ValueError, match=f"max_norm must be positive, got {max_norm}"):
        clip_factor(1.0, max_norm)


def test_bad_rule_and_norm():
    with pytest.raises(
        ValueError, match="rule must be one of 'hard', 'soft', 'normalize', 'log', got 'firm'"
    ):
        clip_factor(1.0, 1.0, "firm")
    with pytest.raises(ValueError, match="max_norm must be finite for rule='normalize', got inf"):
        clip_factor(1.0, math.inf, "normalize")
    with pytest.raises(
        TypeError, match=r"norm must be a float or a floating-point tensor, got dtype torch\.int64"
    ):
        clip_factor(torch.tensor([1, 2]), 1.0)


@pytest.mark.parametrize("value", [None, "1", [1.0], 1j, torch.tensor(1.0), np.array([1.0, 2.0])])
def test_wrong_types_are_named_with_their_value(value):
    message = f"must be a number, got {value!r} of type {type(value).__name__}"
    with pytest.raises(TypeError, match=re.escape(f"max_norm {message}")):
        clip_factor(1.0, value)
    if not isinstance(value, torch.Tensor):
        with pytest.raises(TypeError, match=re.escape(f"norm {message}")):
            clip_factor(value, 1.0)


def test_scalars_of_numpy_are_numbers():
    for kind in (np.float32, np.float64, np.int64):
        factor = clip_factor(kind(4), kind(1))
        assert type(factor) is float
        assert factor == 0.25


@pytest.mark.parametrize("rule", [["hard"], None, np.array(["hard", "soft"])])
def test_a_rule_that_is_no_string(rule):
    with pytest.raises(ValueError, match="rule must be one of 'hard', 'soft', 'normalize', 'log', got "):
        clip_factor(1.0, 1.0, rule)


@pytest.mark.parametrize("rule", RULES)
def test_compiles_without_graph_breaks(rule):
    norms = torch.tensor([0.0, 0.5, 4.0])
    torch._dynamo.reset()
    compiled = torch.compile(clip_factor, backend="eager", fullgraph=True)
    assert torch.equal(compiled(norms, 1.0, rule), clip_factor(norms, 1.0, rule))
