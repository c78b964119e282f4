r"""Inequalities and step sizes of (L0, L1)-smoothness, as functions that can be plotted and tested.

Notation: ``g`` = ‖∇f(x)‖ (``grad_norm``), ``r`` = ‖y - x‖ (``radius``), ``G = L0 + L1·g``.
Units: with f in [f] and x in [x], ``g`` is in [f/x], ``r`` in [x], ``L0`` in [f/x²], ``L1`` in [1/x]
and a step size η (the update is x - η ∇f(x), so r = η g) in [x²/f]. Every formula below is unit-consistent.

"Hessian form" means ‖∇²f(x)‖ ≤ L0 + L1‖∇f(x)‖ for all x. A *bound* is an upper bound on
f(y) - f(x) for the step y = x - r ∇f(x)/‖∇f(x)‖, over every f allowed by the form that its docstring names.

Arguments are floats or NumPy arrays and broadcast; results are float64. The limits L1 → 0, L0 → 0 and g → 0
are taken, not avoided; where a step size has no finite limit it is ``inf``.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "clipped_step",
    "e2_bound",
    "exact_bound_1d",
    "exact_step_1d",
    "exact_step_limit_1d",
    "gradient_growth_bound",
    "phi",
    "phi_bound",
    "phi_step",
    "quadratic_bound",
    "quadratic_step",
    "quadratic_step_limit",
    "simplified_step",
    "zhang_bound",
]

Array = NDArray[np.float64]

# 1/2!, 1/3!, ..., 1/17!, highest power first. Below |t| = 1/2 the dropped tail is under 2⁻⁵³ of the sum.
_PHI_SERIES = [1 / math.factorial(k) for k in range(17, 1, -1)]


def _nonnegative(**values: ArrayLike) -> list[Array]:
    arrays = []
    for name, value in values.items():
        array = np.asarray(value, dtype=np.float64)
        bad = array[~(array >= 0)]
        if bad.size:
            raise ValueError(f"{name} must be nonnegative, got {bad.flat[0]}")
        arrays.append(array)
    return arrays


def _phi_over_square(t: ArrayLike) -> Array:
    """φ(t)/t², continued by 1/2 at t = 0."""
    t = np.asarray(t, dtype=np.float64)
    far = np.where(np.abs(t) < 0.5, 1.0, t)
    return np.where(np.abs(t) < 0.5, np.polyval(_PHI_SERIES, t), (np.expm1(far) - far) / far**2)[()]


def _log1p_over(t: ArrayLike) -> Array:
    """ln(1 + t)/t for t ≥ 0, continued by 1 at t = 0 and by 0 at t = inf."""
    t = np.asarray(t, dtype=np.float64)
    inner = np.where((t > 0) & np.isfinite(t), t, 1.0)
    return np.where(t > 0, np.where(np.isfinite(t), np.log1p(inner) / inner, 0.0), 1.0)[()]


def _reciprocal(x: Array) -> Array:
    return np.where(x > 0, 1 / np.where(x > 0, x, 1.0), np.inf)[()]


def phi(t: ArrayLike) -> Array:
    """φ(t) = eᵗ - t - 1, to full relative accuracy also near 0.

    Args:
        t: any real number or array (dimensionless).

    Returns:
        φ(t), float64, shape of ``t``.

    References:
        Vankov et al., ICLR 2025, Eq. (4), where it replaces the t²/2 of Lipschitz gradients.

    >>> from gradclip.theory import phi
    >>> round(float(phi(1.0)), 4), float(phi(1e-8))
    (0.7183, 5.00000001...e-17)
    """
    t = np.asarray(t, dtype=np.float64)
    return (t**2 * _phi_over_square(t))[()]


def gradient_growth_bound(grad_norm: ArrayLike, radius: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """Largest possible ‖∇f(y) - ∇f(x)‖ at distance r:  (L0 + L1 g)(e^{L1 r} - 1)/L1.

    Valid for every r under the Hessian form, to which it is equivalent; attained by exp in one dimension.

    Args:
        grad_norm: g = ‖∇f(x)‖ [f/x].
        radius: r = ‖y - x‖ [x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound [f/x].

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Vankov et al., ICLR 2025, Eq. (3); proved in the book as "Growth of the gradient".

    >>> from gradclip.theory import gradient_growth_bound
    >>> round(float(gradient_growth_bound(1.0, 1.0, L0=0.0, L1=1.0)), 4)  # e - 1
    1.7183
    """
    g, r, L0, L1 = _nonnegative(grad_norm=grad_norm, radius=radius, L0=L0, L1=L1)
    t = L1 * r
    safe = np.where(t > 0, t, 1.0)
    return ((L0 + L1 * g) * r * np.where(t > 0, np.expm1(safe) / safe, 1.0))[()]


def quadratic_bound(grad_norm: ArrayLike, radius: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The article's descent bound with the constant 1/2:  -g r + (L0 + L1 g) r²/2.

    Valid for any step and any r under the form without a radius; for r ≤ 1/L1 under the local form; and under
    the Hessian form for gradient steps with r ≤ 2g/(L0 + L1 g), in every dimension (proved in the book).
    Not valid in general beyond that.

    Args:
        grad_norm: g [f/x].
        radius: r [x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound on f(y) - f(x) [f].

    Raises:
        ValueError: an argument is negative or NaN.

    >>> from gradclip.theory import quadratic_bound
    >>> float(quadratic_bound(1.0, 0.5, L0=1.0, L1=1.0))
    -0.25
    """
    g, r, L0, L1 = _nonnegative(grad_norm=grad_norm, radius=radius, L0=L0, L1=L1)
    return (-g * r + (L0 + L1 * g) * r**2 / 2)[()]


def phi_bound(grad_norm: ArrayLike, radius: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The descent bound  -g r + (L0 + L1 g) φ(L1 r)/L1².

    Valid for every r under the Hessian form. It bounds f(y) - f(x) - ⟨∇f(x), y - x⟩ for a step in *any*
    direction, so for the direction -∇f(x) it is not the best possible.

    Args:
        grad_norm: g [f/x].
        radius: r [x].
        L0: [f/x²].
        L1: [1/x]; at L1 = 0 the bound is the usual -g r + L0 r²/2.

    Returns:
        The bound on f(y) - f(x) [f].

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Vankov et al., ICLR 2025, Eq. (4).

    >>> from gradclip.theory import phi_bound
    >>> round(float(phi_bound(1.0, 1.0, L0=0.0, L1=1.0)), 4)  # e - 3
    -0.2817
    """
    g, r, L0, L1 = _nonnegative(grad_norm=grad_norm, radius=radius, L0=L0, L1=L1)
    return (-g * r + (L0 + L1 * g) * r**2 * _phi_over_square(L1 * r))[()]


def e2_bound(grad_norm: ArrayLike, radius: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The φ bound made quadratic on the radius 1/L1:  -g r + (e - 2)(L0 + L1 g) r²  for r ≤ 1/L1.

    Valid under the Hessian form, because φ(t) ≤ (e - 2) t² for 0 ≤ t ≤ 1.

    Args:
        grad_norm: g [f/x].
        radius: r [x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound on f(y) - f(x) [f]; ``inf`` where r > 1/L1, of which the lemma says nothing.

    Raises:
        ValueError: an argument is negative or NaN.

    >>> from gradclip.theory import e2_bound
    >>> float(e2_bound(1.0, 2.0, L0=0.0, L1=1.0))
    inf
    """
    g, r, L0, L1 = _nonnegative(grad_norm=grad_norm, radius=radius, L0=L0, L1=L1)
    return np.where(L1 * r <= 1, -g * r + (math.e - 2) * (L0 + L1 * g) * r**2, np.inf)[()]


def zhang_bound(grad_norm: ArrayLike, radius: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The 2020 paper's descent lemma:  -g r + (5 L0 + 4 L1 g) r²/2  for r ≤ 1/L1.

    Valid under the Hessian form. Constants 5 and 4 as recalled from the paper's appendix; the book derives a
    smaller pair (2(e - 2) for both), so the inequality itself does not rest on memory.

    Args:
        grad_norm: g [f/x].
        radius: r [x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound on f(y) - f(x) [f]; ``inf`` where r > 1/L1.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Zhang, He, Sra and Jadbabaie, ICLR 2020, descent lemma of the appendix.

    >>> from gradclip.theory import zhang_bound
    >>> float(zhang_bound(1.0, 0.5, L0=1.0, L1=1.0))
    0.625
    """
    g, r, L0, L1 = _nonnegative(grad_norm=grad_norm, radius=radius, L0=L0, L1=L1)
    return np.where(L1 * r <= 1, -g * r + (5 * L0 + 4 * L1 * g) * r**2 / 2, np.inf)[()]


def exact_bound_1d(grad_norm: ArrayLike, radius: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The exact worst case in one dimension: the largest f(x - r sign f'(x)) - f(x) under the Hessian form.

    With r₀ = ln(1 + L1 g/L0)/L1, the distance at which the worst slope vanishes::

        -g r + (L0 + L1 g) φ(-L1 r)/L1²              for r ≤ r₀
        (L0/L1²) (φ(L1 (r - r₀)) - φ(L1 r₀))         for r ≥ r₀

    Attained for every r by the extremal function f(x) = (L0/L1²) φ(L1|x|), started at distance r₀ from 0.

    Args:
        grad_norm: g [f/x].
        radius: r [x].
        L0: [f/x²]; at L0 = 0 the slope never vanishes and the first line holds throughout.
        L1: [1/x]; at L1 = 0 both lines are -g r + L0 r²/2.

    Returns:
        The exact maximum of f(y) - f(x) [f].

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Derived in the book, "The worst case in one dimension".

    >>> from gradclip.theory import exact_bound_1d
    >>> round(float(exact_bound_1d(1.0, 2.0, L0=0.0, L1=1.0)), 4)  # -(1 - e^-2)
    -0.8647
    """
    g, r, L0, L1 = _nonnegative(grad_norm=grad_norm, radius=radius, L0=L0, L1=L1)
    step = exact_step_1d(g, L0, L1)
    # Without L0 the slope never vanishes, not even at g = 0, where 0 * inf would be nan.
    before = np.minimum(r, np.where(np.isfinite(step), g * np.where(np.isfinite(step), step, 0.0), np.inf))
    falling = -g * before + (L0 + L1 * g) * before**2 * _phi_over_square(-L1 * before)
    beyond = r - before
    return (falling + L0 * beyond**2 * _phi_over_square(L1 * beyond))[()]


def quadratic_step(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The article's step size η = 1/(L0 + L1 g): it minimises :func:`quadratic_bound` over r = η g.

    It is soft clipping with learning rate 1/L0 and threshold L0/L1.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        η [x²/f]; ``inf`` where L0 + L1 g = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    >>> from gradclip.theory import quadratic_step
    >>> float(quadratic_step(3.0, L0=1.0, L1=1.0))
    0.25
    """
    g, L0, L1 = _nonnegative(grad_norm=grad_norm, L0=L0, L1=L1)
    return _reciprocal(L0 + L1 * g)


def quadratic_step_limit(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The article's limit 2/(L0 + L1 g): every smaller gradient step decreases f, under the Hessian form.

    Sufficient in every dimension, not necessary (compare :func:`exact_step_limit_1d`).

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        η [x²/f]; ``inf`` where L0 + L1 g = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    >>> from gradclip.theory import quadratic_step_limit
    >>> float(quadratic_step_limit(3.0, L0=1.0, L1=1.0))
    0.5
    """
    return 2 * quadratic_step(grad_norm, L0, L1)


def phi_step(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The minimiser of :func:`phi_bound`:  η = ln(1 + L1 g/(L0 + L1 g))/(L1 g).

    Valid under the Hessian form, every radius; r = η g never exceeds ln(2)/L1.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x]; at L1 = 0 or g = 0 it is 1/L0.

    Returns:
        η [x²/f]; ``inf`` where L0 + L1 g = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Vankov et al., ICLR 2025, optimal step η*.

    >>> from gradclip.theory import phi_step
    >>> round(float(phi_step(1.0, L0=0.0, L1=1.0)), 4)  # ln 2
    0.6931
    """
    g, L0, L1 = _nonnegative(grad_norm=grad_norm, L0=L0, L1=L1)
    G = L0 + L1 * g
    share = L1 * g / np.where(G > 0, G, 1.0)
    return (_reciprocal(G) * _log1p_over(share))[()]


def simplified_step(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """A rational stand-in for :func:`phi_step`:  η = 1/(L0 + (3/2) L1 g).

    Under the Hessian form it guarantees f(x) - f(y) ≥ η g²/2, and it is at most :func:`phi_step`.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        η [x²/f]; ``inf`` where L0 + L1 g = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Vankov et al., ICLR 2025, simplified step.

    >>> from gradclip.theory import simplified_step
    >>> float(simplified_step(2.0, L0=1.0, L1=1.0))
    0.25
    """
    g, L0, L1 = _nonnegative(grad_norm=grad_norm, L0=L0, L1=L1)
    return _reciprocal(L0 + 1.5 * L1 * g)


def clipped_step(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """Hard clipping with a φ guarantee:  η = min{1/(2 L0), 1/(3 L1 g)}.

    Learning rate 1/(2 L0), threshold 2 L0/(3 L1). Under the Hessian form it lies between one half of
    :func:`simplified_step` and all of it.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        η [x²/f]; ``inf`` where L0 = 0 and L1 g = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Vankov et al., ICLR 2025, clipped step.

    >>> from gradclip.theory import clipped_step
    >>> float(clipped_step(0.5, L0=1.0, L1=1.0)), float(clipped_step(2.0, L0=1.0, L1=1.0))
    (0.5, 0.16666666666666666)
    """
    g, L0, L1 = _nonnegative(grad_norm=grad_norm, L0=L0, L1=L1)
    return _reciprocal(np.maximum(2 * L0, 3 * L1 * g))


def exact_step_1d(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The minimiser of :func:`exact_bound_1d`:  η = ln(1 + L1 g/L0)/(L1 g).

    The minimax step in one dimension under the Hessian form: it lands on the minimiser of the extremal
    function.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x]; at L1 = 0 or g = 0 it is 1/L0.

    Returns:
        η [x²/f]; ``inf`` where L0 = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Derived in the book, "The worst case in one dimension".

    >>> from gradclip.theory import exact_step_1d
    >>> round(float(exact_step_1d(1.0, L0=1.0, L1=1.0)), 4)  # ln 2
    0.6931
    """
    g, L0, L1 = _nonnegative(grad_norm=grad_norm, L0=L0, L1=L1)
    inverse = _reciprocal(L0)
    u = L1 * g * np.where(L0 > 0, inverse, 0.0)
    return (inverse * _log1p_over(u))[()]


def exact_step_limit_1d(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The exact limit of descent in one dimension:  η = 2 ln(1 + L1 g/L0)/(L1 g).

    Under the Hessian form f(x - η f'(x)) ≤ f(x) for every such f if and only if η is at most this.

    Args:
        grad_norm: g [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        η [x²/f]; ``inf`` where L0 = 0.

    Raises:
        ValueError: an argument is negative or NaN.

    References:
        Derived in the book, "The worst case in one dimension".

    >>> from gradclip.theory import exact_step_limit_1d
    >>> round(float(exact_step_limit_1d(1.0, L0=1.0, L1=1.0)), 4)  # 2 ln 2
    1.3863
    """
    return 2 * exact_step_1d(grad_norm, L0, L1)
