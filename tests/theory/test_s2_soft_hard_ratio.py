"""Statement S2: is γ/(‖g‖ + γ) "equivalent" to min{1, γ/‖g‖}? Equal up to a factor between 1/2 and 1, not
the same.
"""

import pytest
import sympy as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.rules import clip_factor


def test_ratio_below_and_above_the_threshold():
    """Soft over hard is γ/(g+γ) below the threshold and g/(g+γ) above: falling, then rising, both 1/2 at g
    = γ.
    """
    g, gamma = sp.symbols("g gamma", positive=True)
    soft = gamma / (g + gamma)
    below, above = sp.simplify(soft / 1), sp.simplify(soft / (gamma / g))
    assert sp.simplify(sp.diff(below, g) + gamma / (g + gamma) ** 2) == 0  # negative derivative
    assert sp.simplify(sp.diff(above, g) - gamma / (g + gamma) ** 2) == 0  # positive derivative
    assert below.subs(g, gamma) == above.subs(g, gamma) == sp.Rational(1, 2)
    assert sp.limit(below, g, 0) == 1
    assert sp.limit(above, g, sp.oo) == 1


@given(norm=st.floats(1e-100, 1e100), gamma=st.floats(1e-100, 1e100))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ratio_is_between_one_half_and_one(norm, gamma):
    """1/2 ≤ soft/hard ≤ 1 for every norm and threshold."""
    norm = torch.tensor(norm, dtype=torch.float64)
    ratio = (clip_factor(norm, gamma, rule="soft") / clip_factor(norm, gamma, rule="hard")).item()
    # Four roundings of 2⁻⁵³ relative.
    assert 0.5 * (1 - 2**-51) <= ratio <= 1 + 2**-51


@pytest.mark.parametrize("gamma", [0.25, 1.0, 3.0])
def test_ratio_is_exactly_one_half_at_the_threshold(gamma):
    """The worst case 1/2 is attained at ‖g‖ = γ and, by the strict monotonicity above, only there."""
    norm = torch.tensor([0.5, 0.99, 1.0, 1.01, 2.0], dtype=torch.float64) * gamma
    ratio = clip_factor(norm, gamma, rule="soft") / clip_factor(norm, gamma, rule="hard")
    assert ratio[2].item() == 0.5
    # At 0.99 γ the ratio is 1/1.99 = 0.50251, so 0.502 separates it from 1/2.
    assert (ratio[[0, 1, 3, 4]] > 0.502).all()


def test_equivalence_as_printed_is_refuted_by_one_step_on_a_parabola():
    """On f = x²/2 from x = 1 with η = γ = 1 the hard rule reaches the minimiser at once, the soft rule
    stops half way.
    """
    x = torch.tensor(1.0, dtype=torch.float64)
    assert (x - x * clip_factor(x.abs(), 1.0, rule="hard")).item() == 0.0
    assert (x - x * clip_factor(x.abs(), 1.0, rule="soft")).item() == 0.5
