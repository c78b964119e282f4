r"""Stochastic gradients: steps, bounds on iteration counts, and the bias that clipping leaves.

Notation as in :mod:`gradclip.theory.counts`; besides, ``τ`` = the largest ‖∇̂f(x) - ∇f(x)‖
(``noise``) [f/x], where ∇̂f(x) is an unbiased estimate of ∇f(x). A *count* is T(ε), the first t for which
P(‖∇f(x_s)‖ > ε for all s < t) ≤ 1/2.
"""

import numpy as np
from numpy.typing import ArrayLike

from gradclip.theory.counts import _positive
from gradclip.theory.descent import Array, _nonnegative, _reciprocal

__all__ = [
    "clip_bias",
    "sgd_iteration_bound",
    "sgd_step",
    "stochastic_iteration_bound",
    "stochastic_lr",
    "stochastic_step",
    "zhang_sgd_iteration_bound",
    "zhang_stochastic_iteration_bound",
    "zhang_stochastic_step",
]


def stochastic_step(noisy_norm: ArrayLike, lr: ArrayLike, noise: ArrayLike, L1: ArrayLike) -> Array:
    """Clipping under noise:  h = min{η, 1/(16 L1 (‖∇̂f‖ + τ))}.

    The paper's Theorem 7 as we read it; as printed the second entry has another η below the line
    (:func:`zhang_stochastic_step`), which is not unit-consistent.

    Args:
        noisy_norm: ‖∇̂f(x)‖ [f/x].
        lr: η [x²/f], positive.
        noise: τ [f/x].
        L1: [1/x], positive.

    Returns:
        h [x²/f]; the step is never longer than 1/(16 L1).

    Raises:
        ValueError: an argument is out of range.

    References:
        Zhang et al., ICLR 2020, Theorem 7, corrected.

    >>> from gradclip.theory import stochastic_step
    >>> float(stochastic_step(1.0, 0.5, 1.0, L1=1.0))
    0.03125
    """
    n, tau = _nonnegative(noisy_norm=noisy_norm, noise=noise)
    eta, L1 = _positive(lr=lr, L1=L1)
    return np.minimum(eta, _reciprocal(16 * L1 * (n + tau)))[()]


def zhang_stochastic_step(noisy_norm: ArrayLike, lr: ArrayLike, noise: ArrayLike, L1: ArrayLike) -> Array:
    """The step of Theorem 7 as printed:  h = min{1/(16 η L1 (‖∇̂f‖ + τ)), η}.

    Its longest step is 1/(16 η L1), which has not the unit of a length and grows as η falls.

    Args:
        noisy_norm: ‖∇̂f(x)‖ [f/x].
        lr: η, positive.
        noise: τ [f/x].
        L1: [1/x], positive.

    Returns:
        h.

    Raises:
        ValueError: an argument is out of range.

    References:
        Zhang et al., ICLR 2020, Theorem 7.

    >>> from gradclip.theory import zhang_stochastic_step
    >>> float(zhang_stochastic_step(1.0, 0.5, 1.0, L1=1.0))
    0.0625
    """
    eta, L1 = _positive(lr=lr, L1=L1)
    return np.minimum(eta, stochastic_step(noisy_norm, np.inf, noise, eta * L1))[()]


def stochastic_lr(gap: ArrayLike, steps: ArrayLike, noise: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """η = min{1/(20 L0), 1/(128 L1 τ), sqrt(D/(V T))/τ}  with V = (5/9) L0 + L1 τ/80, for T steps.

    Args:
        gap: D [f], positive.
        steps: T, positive.
        noise: τ [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x], positive.

    Returns:
        η [x²/f].

    Raises:
        ValueError: an argument is not positive.

    References:
        Proved in the book, "Theorem 7 of the paper, corrected"; the paper has 1/sqrt(T) as the third entry.

    >>> from gradclip.theory import stochastic_lr
    >>> float(stochastic_lr(1.0, 1.0, 0.01, L0=1.0, L1=1.0))
    0.05
    """
    D, T, tau, L0, L1 = _positive(gap=gap, steps=steps, noise=noise, L0=L0, L1=L1)
    V = 5 / 9 * L0 + L1 * tau / 80
    noisy = np.sqrt(D / (V * T)) / tau
    return np.minimum(np.minimum(1 / (20 * L0), 1 / (128 * L1 * tau)), noisy)[()]


def stochastic_iteration_bound(
    gap: ArrayLike, eps: ArrayLike, noise: ArrayLike, L0: ArrayLike, L1: ArrayLike
) -> Array:
    """T(ε) ≤ max{20 V τ² D/ε⁴, (90 L0 + 570 L1 τ) D/ε², 114 L1 D/ε}  with V = (5/9) L0 + L1 τ/80.

    For :func:`stochastic_step` with :func:`stochastic_lr`. M does not enter.

    Args:
        gap: D [f], positive.
        eps: ε [f/x], positive.
        noise: τ [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x], positive.

    Returns:
        The bound.

    Raises:
        ValueError: an argument is not positive.

    References:
        Proved in the book, "Theorem 7 of the paper, corrected".

    >>> from gradclip.theory import stochastic_iteration_bound
    >>> float(stochastic_iteration_bound(1.0, 1.0, 0.1, L0=1.0, L1=1.0))
    147.0
    """
    D, eps, tau, L0, L1 = _positive(gap=gap, eps=eps, noise=noise, L0=L0, L1=L1)
    V = 5 / 9 * L0 + L1 * tau / 80
    near = (90 * L0 + 570 * L1 * tau) * D / eps**2
    return np.maximum(np.maximum(20 * V * tau**2 * D / eps**4, near), 114 * L1 * D / eps)[()]


def zhang_stochastic_iteration_bound(
    gap: ArrayLike, eps: ArrayLike, noise: ArrayLike, L0: ArrayLike, L1: ArrayLike
) -> Array:
    """D' max{128 L1/ε, 4 D'/ε⁴, (80 L0 + 512 L1 τ)/ε²},  D' = D + (5 L0 + 2 L1 τ) τ² + 9 τ L0²/L1.

    The paper's number for its Theorem 7 (constants as recalled); the entries have different units.

    Args:
        gap: D [f], positive.
        eps: ε [f/x], positive.
        noise: τ [f/x], positive.
        L0: [f/x²], positive.
        L1: [1/x], positive.

    Returns:
        The bound.

    Raises:
        ValueError: an argument is not positive.

    References:
        Zhang et al., ICLR 2020, Theorem 7.

    >>> from gradclip.theory import zhang_stochastic_iteration_bound
    >>> float(zhang_stochastic_iteration_bound(3.0, 1.0, 1.0, L0=1.0, L1=1.0))  # D' = 19
    11248.0
    """
    D, eps, tau, L0, L1 = _positive(gap=gap, eps=eps, noise=noise, L0=L0, L1=L1)
    more = D + (5 * L0 + 2 * L1 * tau) * tau**2 + 9 * tau * L0**2 / L1
    near = (80 * L0 + 512 * L1 * tau) / eps**2
    return (more * np.maximum(np.maximum(128 * L1 / eps, 4 * more / eps**4), near))[()]


def sgd_step(
    gap: ArrayLike,
    steps: ArrayLike,
    noise: ArrayLike,
    grad_bound: ArrayLike,
    L0: ArrayLike,
    L1: ArrayLike,
) -> Array:
    """The fixed step h = min{1/L, sqrt(2 D/(L T))/τ}  with L = L0 + L1 M, for T steps of SGD.

    Args:
        gap: D [f], positive.
        steps: T, positive.
        noise: τ [f/x], positive.
        grad_bound: M [f/x], on the whole space.
        L0: [f/x²], positive.
        L1: [1/x].

    Returns:
        h [x²/f].

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "Theorem 8 of the paper"; the paper has min{1/sqrt(T), 1/(L1 (M + τ))}.

    >>> from gradclip.theory import sgd_step
    >>> float(sgd_step(1.0, 1.0, 0.1, 3.0, L0=1.0, L1=1.0))
    0.25
    """
    M, L1 = _nonnegative(grad_bound=grad_bound, L1=L1)
    D, T, tau, L0 = _positive(gap=gap, steps=steps, noise=noise, L0=L0)
    L = L0 + L1 * M
    return np.minimum(1 / L, np.sqrt(2 * D / (L * T)) / tau)[()]


def sgd_iteration_bound(
    gap: ArrayLike,
    eps: ArrayLike,
    noise: ArrayLike,
    grad_bound: ArrayLike,
    L0: ArrayLike,
    L1: ArrayLike,
) -> Array:
    """T(ε) ≤ max{8 L D/ε², 32 L τ² D/ε⁴}  with L = L0 + L1 M, for SGD with :func:`sgd_step`.

    Args:
        gap: D [f], positive.
        eps: ε [f/x], positive.
        noise: τ [f/x].
        grad_bound: M [f/x], on the whole space.
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "Theorem 8 of the paper".

    >>> from gradclip.theory import sgd_iteration_bound
    >>> float(sgd_iteration_bound(1.0, 1.0, 1.0, 3.0, L0=1.0, L1=1.0))
    128.0
    """
    tau, M, L0, L1 = _nonnegative(noise=noise, grad_bound=grad_bound, L0=L0, L1=L1)
    D, eps = _positive(gap=gap, eps=eps)
    L = L0 + L1 * M
    return np.maximum(8 * L * D / eps**2, 32 * L * tau**2 * D / eps**4)[()]


def zhang_sgd_iteration_bound(
    gap: ArrayLike,
    eps: ArrayLike,
    noise: ArrayLike,
    grad_bound: ArrayLike,
    L0: ArrayLike,
    L1: ArrayLike,
) -> Array:
    """(D + (5 L0 + 4 L1 M)(M + τ)²)²/ε⁴, the paper's number for SGD (constants as recalled).

    Args:
        gap: D [f], positive.
        eps: ε [f/x], positive.
        noise: τ [f/x].
        grad_bound: M [f/x].
        L0: [f/x²].
        L1: [1/x].

    Returns:
        The bound.

    Raises:
        ValueError: an argument is out of range.

    References:
        Zhang et al., ICLR 2020, Theorem 8.

    >>> from gradclip.theory import zhang_sgd_iteration_bound
    >>> float(zhang_sgd_iteration_bound(1.0, 1.0, 0.0, 1.0, L0=1.0, L1=1.0))
    100.0
    """
    tau, M, L0, L1 = _nonnegative(noise=noise, grad_bound=grad_bound, L0=L0, L1=L1)
    D, eps = _positive(gap=gap, eps=eps)
    return ((D + (5 * L0 + 4 * L1 * M) * (M + tau) ** 2) ** 2 / eps**4)[()]


def clip_bias(deviation: ArrayLike, threshold: ArrayLike) -> Array:
    """The largest ‖∇f(x)‖ at which the clipped stochastic gradient can have mean zero, in one dimension::

        s²/(4c)   for c ≥ s/2,        s - c   for c ≤ s/2

    The maximum over all unbiased noise of standard deviation s; attained by noise with two values.

    Args:
        deviation: s [f/x].
        threshold: c [f/x], positive.

    Returns:
        The bias [f/x].

    Raises:
        ValueError: an argument is out of range.

    References:
        Proved in the book, "What noise leaves"; Koloskova et al., ICML 2023, have its order, min{s, s²/c}.

    >>> from gradclip.theory import clip_bias
    >>> float(clip_bias(1.0, 1.0)), float(clip_bias(1.0, 0.25))
    (0.25, 0.75)
    """
    (s,) = _nonnegative(deviation=deviation)
    (c,) = _positive(threshold=threshold)
    return np.where(2 * c >= s, s**2 / (4 * c), s - c)[()]
