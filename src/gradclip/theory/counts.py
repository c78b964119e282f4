r"""How many steps: bounds on iteration counts with exact gradients, and the steps they are for.

Notation: ``D`` = f(x₀) - f* (``gap``), ``ε`` = the gradient norm asked for (``eps``), ``g`` = ‖∇f(x)‖
(``grad_norm``), ``M`` = the largest ‖∇f‖ on {f ≤ f(x₀)} (``grad_bound``), ``c`` = a threshold on g.
Units: D in [f], ε, g, M and c in [f/x], L0 in [f/x²], L1 in [1/x]; steps in [x²/f], counts without a unit.

A *count* is T(ε), the first t with ‖∇f(x_t)‖ ≤ ε. An *iteration bound* is a number that no count exceeds; a
*lower bound* is one that the worst function of the class reaches. All assume the Hessian form everywhere.

Functions whose docstring says "as recalled" have constants quoted from memory of a paper; beside each stands
one that is proved in the book, "Iteration counts".
"""

import numpy as np
from numpy.typing import ArrayLike

from gradclip.theory.descent import Array, _nonnegative, _phi_over_square, _reciprocal, exact_step_1d, phi

__all__ = [
    "clipped_iteration_bound",
    "exponential_bound",
    "gain_bounds",
    "gap_bound",
    "gap_bound_gorbunov",
    "gap_bound_li",
    "gap_bound_quadratic",
    "gd_iteration_bound",
    "gd_iteration_lower_bound",
    "gd_step",
    "iteration_bound",
    "iteration_lower_bound",
    "largest_gradient",
    "normalized_step",
    "polyak_iteration_bound",
    "polyak_step",
    "threshold_step",
    "vankov_iteration_bound",
    "zhang_clipped_iteration_bound",
    "zhang_clipped_step",
    "zhang_gd_iteration_bound",
    "zhang_gd_iteration_lower_bound",
]


def _positive(**values: ArrayLike) -> list[Array]:
    arrays = []
    for name, value in values.items():
        array = np.asarray(value, dtype=np.float64)
        bad = array[~(array > 0)]
        if bad.size:
            raise ValueError(f"{name} must be positive, got {bad.flat[0]}")
        arrays.append(array)
    return arrays


# How the gap bounds the gradient


def exponential_bound(grad_norm: ArrayLike, radius: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The descent bound  -g r + (L0 + L1 g) e^{L1 r} r²/2,  valid for every r and every direction.

    Weaker than :func:`~gradclip.theory.descent.phi_bound`, because φ(t) ≤ eᵗ t²/2.

    Args:
        grad_norm: g [f/x].
        radius: r [x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound on f(y) - f(x) [f] for the step y = x - r ∇f(x)/g.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Gorbunov et al., ICLR 2025, descent lemma (as recalled); proved in the book.

    >>> from gradclip.theory import exponential_bound
    >>> round(float(exponential_bound(1.0, 1.0, L0=0.0, L1=1.0)), 4)  # e/2 - 1
    0.3591
    """
    g, r, L0, L1 = _nonnegative(grad_norm=grad_norm, radius=radius, L0=L0, L1=L1)
    return (-g * r + (L0 + L1 * g) * np.exp(L1 * r) * r**2 / 2)[()]


def gap_bound(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The least gap that a gradient needs:  f(x) - f* ≥ Ψ(g) = g/L1 - (L0/L1²) ln(1 + L1 g/L0).

    Sharp in every dimension: the extremal function has equality at every point.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²]; at L0 = 0 it is g/L1.
        L1: [1/x]; at L1 = 0 it is g²/(2 L0).

    Returns:
        Ψ(g) [f]; ``inf`` where L0 = L1 = 0 < g.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Proved in the book, "What a gradient costs"; :func:`gap_bound_li` is the form published first.

    >>> from gradclip.theory import gap_bound
    >>> round(float(gap_bound(1.0, L0=1.0, L1=1.0)), 4)  # 1 - ln 2
    0.3069
    """
    g, L0, L1 = np.broadcast_arrays(*_nonnegative(grad_norm=grad_norm, L0=L0, L1=L1))
    r0 = g * exact_step_1d(g, np.where(L0 > 0, L0, 1.0), L1)
    # u - ln(1+u) = φ(ln(1+u)), and this way nothing cancels.
    curved = L0 * r0**2 * _phi_over_square(L1 * r0)
    straight = np.where(g > 0, g * _reciprocal(L1), 0.0) if (g > 0).any() else np.zeros(g.shape)
    return np.where(L0 > 0, curved, straight)[()]


def gap_bound_quadratic(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """f(x) - f* ≥ g²/(2 (L0 + L1 g)), between one half of :func:`gap_bound` and all of it.

    It is the decrease that the step 1/(L0 + L1 g) guarantees.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound [f]; 0 at g = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    >>> from gradclip.theory import gap_bound_quadratic
    >>> float(gap_bound_quadratic(1.0, L0=1.0, L1=1.0))
    0.25
    """
    g, L0, L1 = _nonnegative(grad_norm=grad_norm, L0=L0, L1=L1)
    return np.where(g > 0, g**2 / 2 * _reciprocal(np.where(g > 0, L0 + L1 * g, 1.0)), 0.0)[()]


def gap_bound_li(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """f(x) - f* ≥ g²/(2 (L0 + 2 L1 g)): the reconciliation bound as published.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound [f].

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Li et al., NeurIPS 2023, Lemma 3.5 with ℓ(u) = L0 + L1 u.

    >>> from gradclip.theory import gap_bound_li
    >>> round(float(gap_bound_li(1.0, L0=1.0, L1=1.0)), 4)
    0.1667
    """
    (L1,) = _nonnegative(L1=L1)
    return gap_bound_quadratic(grad_norm, L0, 2 * L1)


def gap_bound_gorbunov(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """f(x) - f* ≥ ν g²/(2 (L0 + L1 g)) with ν = e^{-ν} = 0.567...: what :func:`exponential_bound` gives.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound [f].

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Gorbunov et al., ICLR 2025 (as recalled); proved in the book.

    >>> from gradclip.theory import gap_bound_gorbunov
    >>> round(float(gap_bound_gorbunov(1.0, L0=0.5, L1=0.0)), 4)
    0.5671
    """
    return _OMEGA * gap_bound_quadratic(grad_norm, L0, L1)


_OMEGA = 0.5671432904097838  # the solution of ν = e^{-ν}


def largest_gradient(gap: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The largest gradient norm that a gap allows: the M with Ψ(M) = D, Ψ being :func:`gap_bound`.

    M ≤ L1 D + (L0/L1) ln(1 + L1 M/L0), with equality. Attained by the extremal function.

    Args:
        gap: D [f].
        L0: [f/x²], positive.
        L1: [1/x]; at L1 = 0 it is sqrt(2 L0 D).

    Returns:
        M [f/x], to about 12 digits.

    Raises:
        ValueError: ``L0`` is not positive, or another argument is negative or NaN.

    References:
        Proved in the book, "What a gradient costs".

    >>> from gradclip.theory import gap_bound, largest_gradient
    >>> round(float(largest_gradient(gap_bound(5.0, 1.0, 2.0), 1.0, 2.0)), 12)
    5.0
    """
    D, L1 = _nonnegative(gap=gap, L1=L1)
    (L0,) = _positive(L0=L0)
    delta = L1**2 * D / L0
    # φ(v) = δ by Newton's method from above, where it is monotone since φ is convex. The start is the u that
    # gap_bound_quadratic allows.
    v = np.log1p(delta + np.sqrt(delta * (delta + 2)))
    for _ in range(60):
        slope = np.expm1(v)
        v = v - np.where(slope > 0, (phi(v) - delta) / np.where(slope > 0, slope, 1.0), 0.0)
    safe = np.where(L1 > 0, L1, 1.0)
    return np.where(delta > 0, L0 / safe * np.expm1(v), np.sqrt(2 * L0 * D))[()]


# Deterministic descent: steps


def zhang_clipped_step(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """Clipping with the paper's numbers:  h = min{η, γη/g},  η = 1/(10 L0),  γη = min{1, 1/(10 L1)}.

    Not unit-consistent: the 1 in γη is a length, the radius around the sublevel set on which the paper
    assumes smoothness.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²], positive.
        L1: [1/x].

    Returns:
        h [x²/f].

    Raises:
        ValueError: ``L0`` is not positive, or another argument is negative or NaN.

    References:
        Zhang et al., ICLR 2020, Theorem 3.

    >>> from gradclip.theory import zhang_clipped_step
    >>> float(zhang_clipped_step(0.5, L0=1.0, L1=1.0)), float(zhang_clipped_step(4.0, L0=1.0, L1=1.0))
    (0.1, 0.025)
    """
    g, L1 = _nonnegative(grad_norm=grad_norm, L1=L1)
    (L0,) = _positive(L0=L0)
    return (1 / np.maximum(10 * L0, g * np.maximum(1.0, 10 * L1)))[()]


def threshold_step(grad_norm: ArrayLike, threshold: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """Hard clipping at any threshold c:  h = min{1, c/g}/(L0 + L1 c),  never longer than 1/(L0 + L1 g).

    Args:
        grad_norm: g [f/x].
        threshold: c [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x].

    Returns:
        h [x²/f].

    Raises:
        ValueError: ``threshold`` or ``L0`` is not positive, or another argument is negative or NaN.

    References:
        The book, "Any threshold"; Koloskova et al., ICML 2023, have 1/9 of this learning rate.

    >>> from gradclip.theory import threshold_step
    >>> float(threshold_step(4.0, 1.0, L0=1.0, L1=1.0))
    0.125
    """
    g, L1 = _nonnegative(grad_norm=grad_norm, L1=L1)
    c, L0 = _positive(threshold=threshold, L0=L0)
    return (c / np.maximum(g, c) / (L0 + L1 * c))[()]


def normalized_step(grad_norm: ArrayLike, eps: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """Steps of one length, ε/(L0 + L1 ε):  h = ε/((L0 + L1 ε) g).

    For g ≥ ε it is :func:`threshold_step` at c = ε; it knows the accuracy that is asked for.

    Args:
        grad_norm: g [f/x], positive.
        eps: ε [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x].

    Returns:
        h [x²/f].

    Raises:
        ValueError: an argument is out of range.

    >>> from gradclip.theory import normalized_step
    >>> float(normalized_step(2.0, 0.5, L0=1.0, L1=2.0))
    0.125
    """
    (L1,) = _nonnegative(L1=L1)
    g, eps, L0 = _positive(grad_norm=grad_norm, eps=eps, L0=L0)
    return (eps / ((L0 + L1 * eps) * g))[()]


def polyak_step(grad_norm: ArrayLike, gap: ArrayLike) -> Array:
    """Polyak's step h = (f(x) - f*)/g². It clips by itself: h ≥ 1/(2 (L0 + L1 g)) for every such f.

    Args:
        grad_norm: g [f/x], positive.
        gap: f(x) - f* [f].

    Returns:
        h [x²/f].

    Raises:
        ValueError: an argument is out of range.

    References:
        Takezawa et al., NeurIPS 2024, show h ≥ min{1/(4 L0), 1/(4 L1 g)}; the book proves the sharper form.

    >>> from gradclip.theory import polyak_step
    >>> float(polyak_step(2.0, 1.0))
    0.25
    """
    (D,) = _nonnegative(gap=gap)
    (g,) = _positive(grad_norm=grad_norm)
    return (D / g**2)[()]


def gd_step(grad_bound: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The fixed step h = 1/(L0 + L1 M). The paper's Theorem 6 has one half of it.

    Args:
        grad_bound: M [f/x].
        L0: [f/x²], positive.
        L1: [1/x].

    Returns:
        h [x²/f].

    Raises:
        ValueError: ``L0`` is not positive, or another argument is negative or NaN.

    >>> from gradclip.theory import gd_step
    >>> float(gd_step(9.0, L0=1.0, L1=1.0))
    0.1
    """
    M, L1 = _nonnegative(grad_bound=grad_bound, L1=L1)
    (L0,) = _positive(L0=L0)
    return (1 / (L0 + L1 * M))[()]


# Deterministic descent: counts


def iteration_bound(gap: ArrayLike, eps: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """T(ε) < 2 (L0 + L1 ε) D/ε²  for the step 1/(L0 + L1 g), and for :func:`normalized_step`.

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "Counting steps"; Vankov et al. have 3 where this has the second 2.

    >>> from gradclip.theory import iteration_bound
    >>> float(iteration_bound(1.0, 0.5, L0=1.0, L1=2.0))
    16.0
    """
    D, L0, L1 = _nonnegative(gap=gap, L0=L0, L1=L1)
    (eps,) = _positive(eps=eps)
    return (2 * (L0 + L1 * eps) * D / eps**2)[()]


def vankov_iteration_bound(
    gap: ArrayLike, eps: ArrayLike, L0: ArrayLike, L1: ArrayLike, *, fraction: float = 1.0
) -> Array:
    """T(ε) < (2 L0 + 3 L1 ε) D/(a ε²): what the lemma with φ alone gives.

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        L0: [f/x²].
        L1: [1/x].
        fraction: a, 1 for ``phi_step`` and ``simplified_step``, 1/2 for ``clipped_step``.

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of range.

    References:
        Vankov et al., ICLR 2025, nonconvex rate.

    >>> from gradclip.theory import vankov_iteration_bound
    >>> float(vankov_iteration_bound(1.0, 0.5, L0=1.0, L1=2.0, fraction=0.5))
    40.0
    """
    D, L0, L1 = _nonnegative(gap=gap, L0=L0, L1=L1)
    eps, a = _positive(eps=eps, fraction=fraction)
    return ((2 * L0 + 3 * L1 * eps) * D / (a * eps**2))[()]


def clipped_iteration_bound(gap: ArrayLike, eps: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """T(ε) < (100/9) D max{L0/ε², max{1/100, L1²}/L0}  for :func:`zhang_clipped_step`.

    Not unit-consistent where :func:`zhang_clipped_step` is not.

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x].

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "Theorem 3 of the paper, with smaller constants".

    >>> from gradclip.theory import clipped_iteration_bound
    >>> round(float(clipped_iteration_bound(9.0, 0.1, L0=1.0, L1=1.0)), 6)
    10000.0
    """
    D, L1 = _nonnegative(gap=gap, L1=L1)
    eps, L0 = _positive(eps=eps, L0=L0)
    return (100 / 9 * D * np.maximum(L0 / eps**2, np.maximum(1 / 100, L1**2) / L0))[()]


def zhang_clipped_iteration_bound(gap: ArrayLike, eps: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """T(ε) ≤ 20 L0 D/ε² + 20 max{1, L1²} D/L0, the paper's number for its clipping (as recalled).

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x].

    Returns:
        The bound; never below :func:`clipped_iteration_bound`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Zhang et al., ICLR 2020, Theorem 3.

    >>> from gradclip.theory import zhang_clipped_iteration_bound
    >>> float(zhang_clipped_iteration_bound(1.0, 1.0, L0=1.0, L1=2.0))
    100.0
    """
    D, L1 = _nonnegative(gap=gap, L1=L1)
    eps, L0 = _positive(eps=eps, L0=L0)
    return (20 * L0 * D / eps**2 + 20 * np.maximum(1.0, L1**2) * D / L0)[()]


def gd_iteration_bound(
    gap: ArrayLike, eps: ArrayLike, grad_bound: ArrayLike, L0: ArrayLike, L1: ArrayLike
) -> Array:
    """T(ε) < 2 (L0 + L1 M) D/ε²  for descent with the fixed step 1/(L0 + L1 M).

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        grad_bound: M [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "Theorem 6 of the paper, with a smaller constant".

    >>> from gradclip.theory import gd_iteration_bound
    >>> float(gd_iteration_bound(1.0, 0.5, 9.0, L0=1.0, L1=1.0))
    80.0
    """
    D, M, L0, L1 = _nonnegative(gap=gap, grad_bound=grad_bound, L0=L0, L1=L1)
    (eps,) = _positive(eps=eps)
    return (2 * (L0 + L1 * M) * D / eps**2)[()]


def zhang_gd_iteration_bound(
    gap: ArrayLike, eps: ArrayLike, grad_bound: ArrayLike, L0: ArrayLike, L1: ArrayLike
) -> Array:
    """T(ε) ≤ 4 (M L1 + L0) D/ε², the paper's number for the step 1/(2 (M L1 + L0)) (constant as recalled).

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        grad_bound: M [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound, twice :func:`gd_iteration_bound`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Zhang et al., ICLR 2020, Theorem 6.

    >>> from gradclip.theory import zhang_gd_iteration_bound
    >>> float(zhang_gd_iteration_bound(1.0, 0.5, 9.0, L0=1.0, L1=1.0))
    160.0
    """
    return 2 * gd_iteration_bound(gap, eps, grad_bound, L0, L1)


def iteration_lower_bound(step_at_eps: ArrayLike, gap: ArrayLike, eps: ArrayLike, L0: ArrayLike) -> Array:
    """(D - (15/16) ε²/L0)/(h ε²): no rule whose step at gradient norm ε is h does better on the whole class.

    Args:
        step_at_eps: h, the limit of the rule's step as g falls to ε [x²/f].
        gap: D [f].
        eps: ε [f/x], positive.
        L0: [f/x²], positive.

    Returns:
        The bound; 0 where the gap is too small for the function it needs.

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "The slow function", on :func:`gradclip.problems.ramp`.

    >>> from gradclip.theory import iteration_lower_bound
    >>> float(iteration_lower_bound(0.5, 10 + 15 / 16, 1.0, L0=1.0))
    20.0
    """
    (D,) = _nonnegative(gap=gap)
    h, eps, L0 = _positive(step_at_eps=step_at_eps, eps=eps, L0=L0)
    return (np.maximum(D - 15 / 16 * eps**2 / L0, 0.0) / (h * eps**2))[()]


def gd_iteration_lower_bound(
    gap: ArrayLike, eps: ArrayLike, grad_bound: ArrayLike, L0: ArrayLike, L1: ArrayLike
) -> Array:
    """No fixed step needs fewer than  L1 M (D - (15/16) ε²/L0)/(2 ε² ln(1 + L1 M/L0))  steps over the class.

    The class: all (L0, L1)-smooth f with f(x₀) - f* ≤ D and ‖∇f‖ ≤ M on {f ≤ f(x₀)}. Valid for all
    L0, L1 > 0, ε < M and D ≥ Ψ(M) (:func:`gap_bound`); a smaller D allows no gradient M anyway.

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        grad_bound: M [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x]; at L1 = 0 it is L0 (D - (15/16) ε²/L0)/(2 ε²).

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "Theorem 4 of the paper, for all constants"; its leading constant is four times
        the recalled one.

    >>> import math
    >>> from gradclip.theory import gd_iteration_lower_bound
    >>> round(float(gd_iteration_lower_bound(10 + 15 / 16, 1.0, math.e - 1, L0=1.0, L1=1.0)), 4)  # 5 (e - 1)
    8.5914
    """
    (M,) = _positive(grad_bound=grad_bound)
    return iteration_lower_bound(2 * exact_step_1d(M, L0, L1), gap, eps, L0)


def zhang_gd_iteration_lower_bound(
    gap: ArrayLike, eps: ArrayLike, grad_bound: ArrayLike, L0: ArrayLike, L1: ArrayLike
) -> Array:
    """L1 M (D - 5 ε/8)/(8 ε² (ln M + 1)), the paper's lower bound (as recalled), for L0, L1 ≥ 1 and M > 1.

    Not unit-consistent, and its first hard function is in the class only if L0 ≥ L1.

    Args:
        gap: D [f].
        eps: ε [f/x], positive.
        grad_bound: M [f/x], above 1.
        L0: [f/x²]; does not enter.
        L1: [1/x].

    Returns:
        The bound; 0 where it would be negative.

    Raises:
        ValueError: an argument is out of range.

    References:
        Zhang et al., ICLR 2020, Theorem 4.

    >>> import math
    >>> from gradclip.theory import zhang_gd_iteration_lower_bound
    >>> round(float(zhang_gd_iteration_lower_bound(16.625, 1.0, math.e, L0=1.0, L1=1.0)), 4)  # e
    2.7183
    """
    D, L0, L1 = _nonnegative(gap=gap, L0=L0, L1=L1)
    eps, M = _positive(eps=eps, grad_bound=grad_bound)
    if (M <= 1).any():
        raise ValueError(f"grad_bound must be above 1, got {M[M <= 1].flat[0]}")
    bound = L1 * M * np.maximum(D - 5 * eps / 8, 0.0) / (8 * eps**2 * (np.log(M) + 1))
    return np.broadcast_arrays(bound, L0)[0][()].copy()[()]


def gain_bounds(gap: ArrayLike, eps: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> tuple[Array, Array]:
    """How much the best fixed step can lose against the step 1/(L0 + L1 g), over the class with gap D.

    With u = L1 M/L0 at the M of :func:`largest_gradient` and κ = 1 - (15/16) ε²/(L0 D), the quotient of the
    worst counts lies between ::

        κ u/(4 (1 + L1 ε/L0) ln(1 + u))    and    2 (1 + u)/(κ (1 + L1 ε/L0))

    Args:
        gap: D [f], above (15/16) ε²/L0.
        eps: ε [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x], positive.

    Returns:
        The two ends.

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "How much faster".

    >>> from gradclip.theory import gain_bounds
    >>> [round(float(end)) for end in gain_bounds(1e6, 0.01, L0=1.0, L1=1.0)]
    [17917, 1980227]
    """
    D, eps, L0, L1 = _positive(gap=gap, eps=eps, L0=L0, L1=L1)
    kappa = 1 - 15 / 16 * eps**2 / (L0 * D)
    if (kappa <= 0).any():
        raise ValueError(f"gap must be above (15/16) eps²/L0, got {D.flat[0]}")
    u = L1 * largest_gradient(D, L0, L1) / L0
    share = 1 + L1 * eps / L0
    return (kappa * u / (4 * share * np.log1p(u)))[()], (2 * (1 + u) / (kappa * share))[()]


def polyak_iteration_bound(distance: ArrayLike, accuracy: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """Convex f, Polyak's step: f(x_t) - f* ≤ δ for some t ≤ R² (2 L1 + sqrt(2 L0/δ))².

    Args:
        distance: R = ‖x₀ - x*‖ [x].
        accuracy: δ [f], positive.
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound; at most 4 L0 R²/δ + 8 (L1 R)².

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "Polyak's step"; Vankov et al., ICLR 2025, have max{4 L0 R²/δ, (6 L1 R)²}.

    >>> from gradclip.theory import polyak_iteration_bound
    >>> float(polyak_iteration_bound(1.0, 0.5, L0=1.0, L1=1.0))
    16.0
    """
    R, L0, L1 = _nonnegative(distance=distance, L0=L0, L1=L1)
    (accuracy,) = _positive(accuracy=accuracy)
    return (R**2 * (2 * L1 + np.sqrt(2 * L0 / accuracy)) ** 2)[()]
