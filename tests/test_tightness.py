"""The solvers of the worst case against each other, and their arguments. The theory has its own tests."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import theory, tightness


@pytest.fixture(scope="module")
def curve():
    return tightness.worst_curve(1.0, density=8)


@given(st.floats(1e-3, 1e4), st.just(0.0) | st.floats(1e-6, 1e3), st.floats(1e-3, 1e3), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_turning_radius_is_unit_consistent(g, L0, L1, scale):
    """x in other units: g → g/s, L0 → L0/s², L1 → L1/s and r → r s; f in other units: g and L0 alike."""
    radius = tightness.turning_radius(g, L0, L1)
    rescaled = tightness.turning_radius(3 * g / scale, 3 * L0 / scale**2, L1 / scale)
    assert rescaled == pytest.approx(radius * scale, rel=1e-8)
    # Never beyond the minimiser of the one-dimensional worst case, never beyond the limit without L0.
    assert radius <= theory.exact_step_1d(g, L0, L1) * g * (1 + 1e-9)
    assert radius * L1 <= 1.6209182144


def test_turning_radius_joins_its_limits():
    critical = tightness.critical_size()
    below, above = tightness.turning_radius([critical - 1e-6, critical + 1e-6], 1.0, 1.0)
    assert below == pytest.approx(above, abs=1e-5)
    assert tightness.turning_radius(1e9, 1.0, 1.0) == pytest.approx(
        tightness.turning_radius(1.0, 0.0, 1.0), abs=1e-7
    )
    assert tightness.turning_radius(2.0, 4.0, 0.0) == 0.5
    assert tightness.turning_radius(0.0, 4.0, 1.0) == 0.0
    assert tightness.turning_radius(1.0, 0.0, 0.0) == math.inf
    assert tightness.turning_radius([[1.0], [2.0]], [1.0, 2.0, 3.0], 1.0).shape == (2, 3)


def test_turning_step_is_never_shorter_than_that_of_s7():
    """In natural units it is at least 1: up to S7's step one dimension is the worst case of all."""
    u = np.logspace(-4, 6, 60)
    assert (tightness.turning_radius(u, 1.0, 1.0) * (1 + u) / u >= 1).all()
    # The proof's two numbers: it grows with u, from the critical size on, and c = u/(1 + u) is below both.
    assert tightness._first_zero(1.0) > 5 / 6
    assert tightness.turning_radius(5.0, 1.0, 1.0) > 1


@pytest.mark.parametrize(
    ("share", "steps"), [(0.5, (1.3, 2.0, 3.0)), (0.9, (1.8, 2.5)), (1.0, (1.3, 2.0, 3.0))]
)
def test_three_solvers_agree(share, steps):
    shot = tightness.worst_curve(share, longest=3.0)(steps)
    coarse, fine = (
        np.array([tightness.transcribed_value(share, s, pieces=n) for s in steps]) for n in (32, 64)
    )
    # Extrapolated in 1/pieces²; what remains is of the next order, times values that grow to 1.
    np.testing.assert_allclose((4 * fine - coarse) / 3, shot, atol=1e-3)
    grid = tightness.grid_value(share, steps, spacing=0.1)
    # First order in the spacing: halving it from 0.1 to 0.05 halves this error (see the record).
    np.testing.assert_allclose(grid, shot, atol=0.04)


def test_grid_converges():
    """Of a finer grid the error is smaller, at steps where the path has turned."""
    exact = tightness.worst_curve(1.0, longest=2.6)(2.5)
    errors = [abs(tightness.grid_value(1.0, 2.5, spacing=h) - exact) for h in (0.2, 0.1)]
    assert errors[1] < 0.7 * errors[0]


def test_curve_interpolates_between_its_paths(curve):
    for height in (0.03, 0.2, 0.9, 2.3):
        path = tightness.worst_path(1.0, height, samples=2)
        # Cubic between paths a factor 10^(1/8) apart.
        assert curve(path.step) == pytest.approx(path.value, abs=2e-4)


def test_curve_is_one_dimensional_first_and_ends(curve):
    steps = np.linspace(0, curve.turning, 20)
    np.testing.assert_array_equal(curve(steps), theory.exact_bound_1d(1.0, steps, 0.0, 1.0))
    assert math.isnan(curve(curve.longest + 1))
    assert curve(curve.turning + 1e-7) == pytest.approx(float(curve(curve.turning)), abs=1e-6)


def test_landmarks_are_where_they_say(curve):
    best, limit, half = curve.best_step(), curve.descent_limit(), curve.half_limit()
    assert curve.turning < best < limit < half
    assert curve(best) < min(curve(best - 0.01), curve(best + 0.01))
    assert curve(limit) == pytest.approx(0, abs=1e-9)
    assert curve(half) == pytest.approx(half**2 / 2 - half, abs=1e-9)
    path = tightness.worst_path(1.0, slope=0.0)
    assert path.step == pytest.approx(best, abs=1e-4)
    assert path.end[0] == 0.0
    np.testing.assert_allclose(path.gradient[0], [-1, 0], atol=1e-7)


def test_small_gradients_have_the_one_dimensional_best_step():
    curve = tightness.worst_curve(0.4, density=3)
    assert curve.best_step() == curve.turning == pytest.approx(math.log(1 / 0.6) / 0.4)


def test_a_curve_that_ends_too_early_says_so():
    with pytest.raises(ValueError, match="before the crossing"):
        tightness.worst_curve(1.0, longest=2.0, density=3).half_limit()


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, math.nan])
def test_bad_shares_are_named(share):
    for call in (
        lambda: tightness.rotating_bound(share, 1.0),
        lambda: tightness.worst_path(share, 1.0),
        lambda: tightness.worst_curve(share),
        lambda: tightness.transcribed_value(share, 1.0),
        lambda: tightness.grid_value(share, 1.0),
    ):
        with pytest.raises(ValueError, match=f"share must be in .*, got {share}"):
            call()


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="step must be nonnegative, got -1"):
        tightness.rotating_bound(0.5, [1.0, -1.0])
    with pytest.raises(ValueError, match="height must be positive, got 0"):
        tightness.worst_path(0.5, 0.0)
    with pytest.raises(ValueError, match="height or slope, got height=None and slope=None"):
        tightness.worst_path(0.5)
    with pytest.raises(ValueError, match="no such path"):
        tightness.worst_path(0.5, slope=-2.0)  # no path ends below where it started
    with pytest.raises(ValueError, match=r"share must be at least 0\.05, got 0\.01"):
        tightness.worst_curve(0.01)
    for name, arguments in (("grad_norm", (-1, 1, 1)), ("L0", (1, -1, 1)), ("L1", (1, 1, math.inf))):
        with pytest.raises(ValueError, match=f"{name} must be nonnegative and finite"):
            tightness.turning_radius(*arguments)
