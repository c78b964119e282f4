"""The functions of gradclip.theory: accuracy, limits, broadcasting, errors. What they claim is tested in
tests/theory.
"""

import inspect
import math

import mpmath
import numpy as np
import pytest

from gradclip import theory

BOUNDS = (
    theory.gradient_growth_bound,
    theory.quadratic_bound,
    theory.phi_bound,
    theory.e2_bound,
    theory.zhang_bound,
    theory.exact_bound_1d,
)
STEPS = (
    theory.quadratic_step,
    theory.quadratic_step_limit,
    theory.phi_step,
    theory.simplified_step,
    theory.clipped_step,
    theory.exact_step_1d,
    theory.exact_step_limit_1d,
)


@pytest.mark.parametrize("t", [-30.0, -0.5, -0.1, -1e-9, 1e-12, 1e-5, 0.01, 0.4999, 0.5, 0.5001, 1.0, 40.0])
def test_phi_is_accurate_everywhere(t):
    """Against 60 digits: relative error below 20 units in the last place, also across the switch at 1/2."""
    with mpmath.workdps(60):
        exact = float(mpmath.exp(t) - mpmath.mpf(t) - 1)
    assert theory.phi(t) == pytest.approx(exact, rel=20 * 2**-53)


def test_phi_at_zero():
    assert theory.phi(0.0) == 0.0


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("g", [0.0, 0.7])
def test_bounds_are_continuous_at_L1_zero(bound, g):
    """The change from L1 = 0 to 1e-9 is of first order in L1: below 1e-8 for values of size one."""
    r = np.array([0.0, 0.3, 1.0, 4.0])
    at_zero, near = bound(g, r, 1.5, 0.0), bound(g, r, 1.5, 1e-9)
    np.testing.assert_allclose(near, at_zero, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bound", [theory.quadratic_bound, theory.phi_bound, theory.exact_bound_1d])
def test_bounds_at_L1_zero_are_the_classical_parabola(bound):
    assert bound(2.0, 0.5, 3.0, 0.0) == pytest.approx(-2.0 * 0.5 + 3.0 * 0.25 / 2, rel=1e-15)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("L0", [0.0, 1.5])
def test_bounds_are_continuous_at_zero_gradient(bound, L0):
    r = np.array([0.0, 0.1, 0.5])
    np.testing.assert_allclose(bound(1e-12, r, L0, 2.0), bound(0.0, r, L0, 2.0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_are_continuous_at_L0_zero(bound):
    r = np.array([0.0, 0.1, 0.5])
    np.testing.assert_allclose(bound(1.0, r, 1e-13, 2.0), bound(1.0, r, 0.0, 2.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", STEPS)
def test_steps_have_their_limits(step):
    """L1 → 0 and g → 0 agree: the step for a Lipschitz gradient, 1/L0 times a constant of the rule."""
    constant = {
        theory.quadratic_step_limit: 2.0,
        theory.exact_step_limit_1d: 2.0,
        theory.clipped_step: 0.5,
    }.get(step, 1.0)
    assert step(3.0, 4.0, 0.0) == step(0.0, 4.0, 3.0) == constant / 4.0
    assert step(3.0, 4.0, 1e-12) == pytest.approx(constant / 4.0, rel=1e-11)
    assert step(1e-12, 4.0, 3.0) == pytest.approx(constant / 4.0, rel=1e-11)
    assert step(0.0, 0.0, 1.0) == math.inf


def test_steps_without_L0():
    """At L0 = 0 every rule of the pair (L0, L1) is a constant over L1 g, and the one-dimensional ones have
    no limit.
    """
    expected = {
        theory.quadratic_step: 1.0,
        theory.quadratic_step_limit: 2.0,
        theory.phi_step: math.log(2),
        theory.simplified_step: 2 / 3,
        theory.clipped_step: 1 / 3,
    }
    for step, constant in expected.items():
        assert step(0.5, 0.0, 4.0) == pytest.approx(constant / 2.0, rel=1e-15)
    assert theory.exact_step_1d(0.5, 0.0, 4.0) == theory.exact_step_limit_1d(0.5, 0.0, 4.0) == math.inf


def test_exact_bound_joins_smoothly_where_the_slope_vanishes():
    """Value and slope of the two pieces agree at r0; the second difference shows no jump of the slope."""
    r0 = math.log(3.0)  # L0 = L1 = 1, g = 2
    before, at, after = theory.exact_bound_1d(2.0, np.array([r0 - 1e-5, r0, r0 + 1e-5]), 1.0, 1.0)
    assert at == pytest.approx(math.log(3.0) - 2.0, rel=1e-14)  # -(u - ln(1+u))
    # The second derivative is 1 there: both differences are 1e-10/2, up to 1e-15.
    assert before - at == pytest.approx(5e-11, abs=2e-15)
    assert after - at == pytest.approx(5e-11, abs=2e-15)


def test_quadratic_forms_are_infinite_beyond_their_radius():
    r = np.array([0.5, 1.0, 1.5])
    for bound in (theory.e2_bound, theory.zhang_bound):
        assert np.isfinite(bound(1.0, r, 1.0, 1.0)).tolist() == [True, True, False]


@pytest.mark.parametrize("bound", BOUNDS)
def test_bounds_broadcast(bound):
    """Shapes broadcast, and each entry equals the scalar call."""
    g, r, L0, L1 = np.array([[0.0], [1.0]]), np.array([0.0, 0.2, 0.4]), np.array([[[1.0]], [[0.0]]]), 1.0
    table = bound(g, r, L0, L1)
    assert table.shape == (2, 2, 3)
    assert table[1, 1, 2] == bound(1.0, 0.4, 0.0, 1.0)
    assert isinstance(bound(1.0, 0.4, 0.0, 1.0), float)


@pytest.mark.parametrize("step", STEPS)
def test_steps_broadcast(step):
    table = step(np.array([[0.0], [1.0]]), np.array([0.0, 1.0, 2.0]), 1.0)
    assert table.shape == (2, 3)
    assert table[1, 2] == step(1.0, 2.0, 1.0)
    assert isinstance(step(1.0, 2.0, 1.0), float)


@pytest.mark.parametrize("name", ["grad_norm", "radius", "L0", "L1"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_bad_arguments_are_named(name, value):
    arguments = {"grad_norm": 1.0, "radius": 1.0, "L0": 1.0, "L1": 1.0, name: value}
    for bound in BOUNDS:
        with pytest.raises(ValueError, match=f"{name} must be nonnegative, got {value}"):
            bound(**arguments)
    del arguments["radius"]
    if name != "radius":
        for step in STEPS:
            with pytest.raises(ValueError, match=f"{name} must be nonnegative, got {value}"):
                step(**arguments)


# Counts and noise: every function, by its signature

COUNTS = [
    getattr(theory, name)
    for name in theory.__all__
    if getattr(theory, name).__module__ in ("gradclip.theory.counts", "gradclip.theory.noise")
]
# Values at which every function is defined; the gap is large enough for each hard function.
SENSIBLE = {"gap": 100.0, "eps": 0.5, "steps": 1000.0, "grad_bound": 3.0}


def sensible(function):
    return {
        name: SENSIBLE.get(name, 2.0)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.KEYWORD_ONLY
    }


def test_every_function_is_exported_once():
    assert len(set(theory.__all__)) == len(theory.__all__)
    assert len(COUNTS) == 31


@pytest.mark.parametrize("function", COUNTS, ids=lambda f: f.__name__)
def test_counts_broadcast(function):
    """One argument after the other becomes an array; each entry equals the scalar call, which is a float."""
    arguments = sensible(function)
    single = np.asarray(function(**arguments))
    assert isinstance(np.ravel(function(**arguments))[0], float)
    for name, value in arguments.items():
        table = np.asarray(function(**arguments | {name: np.array([[value], [1.5 * value]])}))
        assert table.shape[-2:] == (2, 1)
        np.testing.assert_array_equal(table[..., 0, 0], single)
        other = np.asarray(function(**arguments | {name: 1.5 * value}))
        np.testing.assert_array_equal(table[..., 1, 0], other)


@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize("function", COUNTS, ids=lambda f: f.__name__)
def test_bad_arguments_of_counts_are_named(function, value):
    for name in sensible(function):
        with pytest.raises(ValueError, match=rf"{name} must be (nonnegative|positive), got {value}"):
            function(**sensible(function) | {name: value})


def test_limits_of_the_arguments_that_must_be_positive():
    with pytest.raises(ValueError, match=r"eps must be positive, got 0\.0"):
        theory.iteration_bound(1.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"grad_bound must be above 1, got 0\.5"):
        theory.zhang_gd_iteration_lower_bound(1.0, 0.1, 0.5, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"gap must be above \(15/16\) eps²/L0, got 0\.1"):
        theory.gain_bounds(0.1, 1.0, 1.0, 1.0)


def test_bounds_that_need_a_gap_are_zero_without_it():
    assert theory.iteration_lower_bound(1.0, 0.1, 1.0, 1.0) == 0.0
    assert theory.gd_iteration_lower_bound(0.1, 1.0, 3.0, 1.0, 1.0) == 0.0
    assert theory.zhang_gd_iteration_lower_bound(0.1, 1.0, 3.0, 1.0, 1.0) == 0.0
