"""Statement S1, the clipping rule θ ← θ - η g min{1, γ/‖g‖}: what the definition says about a step."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from gradclip.rules import clip_factor


@pytest.mark.parametrize("norm", ["0", "1/8", "1/2", "1", "3/2", "7", "1e6"])
def test_rule_is_the_minimum(norm):
    """The factor is min{1, γ/‖g‖}, here against exact rational arithmetic with γ = 1/2."""
    g, gamma = Fraction(norm), Fraction(1, 2)
    expected = min(Fraction(1), gamma / g) if g else Fraction(1)
    computed = clip_factor(torch.tensor(float(g), dtype=torch.float64), float(gamma)).item()
    # One division of exact float64 numbers: at most one rounding, 2⁻⁵³ relative; two are allowed.
    assert abs(computed - float(expected)) <= 2**-52 * float(expected)


def test_step_is_never_longer_than_eta_gamma():
    """‖η g min{1, γ/‖g‖}‖ = η min{‖g‖, γ} ≤ η γ."""
    rng = np.random.default_rng(0)
    g = torch.from_numpy(rng.normal(size=(1000, 5)) * 10 ** rng.uniform(-3, 3, size=(1000, 1)))
    norm = g.norm(dim=-1)
    step = 0.1 * (g * clip_factor(norm, 2.0)[:, None]).norm(dim=-1)
    # The two norms and three products round to 2⁻⁵³ each; 16 roundings are allowed.
    torch.testing.assert_close(step, 0.1 * norm.clamp(max=2.0), rtol=16 * 2**-53, atol=0.0)
    assert (step <= 0.1 * 2.0 * (1 + 16 * 2**-53)).all()


def test_clipped_gradient_is_the_projection_onto_the_ball():
    """The clipped gradient c is the nearest point of the ball of radius γ: ⟨g - c, b - c⟩ ≤ 0 for every b
    in it.
    """
    rng = np.random.default_rng(1)
    g = torch.from_numpy(rng.normal(size=(300, 1, 4)) * 3)
    c = g * clip_factor(g.norm(dim=-1), 2.0)[..., None]
    b = torch.from_numpy(rng.normal(size=(1, 300, 4)))
    b = 2.0 * b / b.norm(dim=-1, keepdim=True)
    # Every factor is at most 20 in size, so the rounding of the inner product is below 1e-12.
    assert ((g - c) * (b - c)).sum(-1).max().item() <= 1e-12
