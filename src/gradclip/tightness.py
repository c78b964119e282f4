r"""The exact worst case of a gradient step in the plane, as an optimal-control problem: how tight is S5?

Walk from x along v = -∇f(x)/g at speed one. The gradient p(t) = ∇f(x + t v) that is met starts at -g v, and
in the Hessian form ‖p′‖ ≤ L0 + L1‖p‖. Whatever f is, its change along a step of length r is ∫₀ʳ ⟨p, v⟩ dt, so
it is at most the *control value*: the maximum of that integral over all paths p with that start and that
speed limit. (A path in a plane is enough: turning the part across v into one direction keeps ‖p‖ and ⟨p, v⟩
and does not lengthen p′.)

**Natural units.** Only c = L1 g/(L0 + L1 g) matters. With g for gradients, g/G for lengths and g²/G for f,
where G = L0 + L1 g, the speed limit is w(‖p‖) = 1 - c + c‖p‖, the start is (-1, 0), the article's parabola is
-s + s²/2 and its step S7 is s = 1; a step of length s is η = s/G. The argument ``share`` is c, from 0 (a
Lipschitz gradient) to 1 (L0 = 0); u = L1 g/L0 = c/(1 - c).

Three solvers that share no code: :func:`worst_path` integrates Pontryagin's equations,
:func:`transcribed_value` optimises the control as it is, and :func:`grid_value` steps Bellman's equation on a
grid. They stand in a module of their own because they are solvers with tolerances; :mod:`gradclip.theory` has
formulas only.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicHermiteSpline
from scipy.ndimage import map_coordinates, spline_filter
from scipy.optimize import brentq, minimize

from gradclip import theory

__all__ = [
    "WorstCurve",
    "WorstPath",
    "critical_size",
    "grid_value",
    "rotating_bound",
    "transcribed_value",
    "turning_radius",
    "worst_curve",
    "worst_path",
]

Array = NDArray[np.float64]

# A backward path this far to the left, in units of g, has missed the start; worst paths stay right of -2.
_FAR = 5.0


def _check_share(share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return float(share)


@functools.cache
def _first_zero(ratio: float) -> float:
    """First zero τ of the transverse variation of the straight path that ends where L0/(L0 + L1‖p‖) = ratio.

    With μ = 1 - e^{-τ}, τ the distance walked back from the end in units of 1/L1, and y the displacement of p
    across the straight path, the Jacobi equation is  (μ((1 - ratio e^{-τ}) y′ - y))′ + y = 0,  y(0) = 1.
    """

    def derivative(tau: float, state: Array) -> list[float]:
        y, z = state  # z = μ((1 - ratio e^{-τ}) y′ - y)
        return [(y - z / math.expm1(-tau)) / (1 - ratio * math.exp(-tau)), -y]

    def crossing(tau: float, state: Array) -> float:
        return state[0]

    crossing.terminal = True
    # The first terms of the series at the singular point τ = 0; what they leave out is below 1e-9.
    if ratio < 1:
        start = 1e-4 * (1 - ratio)
        state = [1 - start**2 / (4 * (1 - ratio)), -start]
    else:
        start = 1e-5
        state = [1 - start, -start + start**2 / 2]
    found = solve_ivp(derivative, (start, 4.0), state, "DOP853", events=crossing, rtol=1e-11, atol=1e-13)
    return float(found.t_events[0][0])


def critical_size() -> float:
    """The u below which the straight path stays the worst one until its gradient vanishes: u ≈ 1.30.

    It is the first zero of ₂F₁(e^{2πi/3}, e^{-2πi/3}; 1; -u).

    Returns:
        u = L1 g/L0 (dimensionless).

    References:
        Derived in the book, "The worst case, until the gradient turns".

    >>> from gradclip.tightness import critical_size
    >>> round(critical_size(), 5)
    1.30477
    """
    return math.expm1(_first_zero(1.0))


def _turning(u: float) -> float:
    """L1 times the turning radius, for u = L1 g/L0."""
    if u <= critical_size():
        return math.log1p(u)
    if math.isinf(u):
        return _first_zero(0.0)
    # The path that ends at L0/(L0 + L1|p|) = ratio and turns there has started at 1 + u = e^τ/ratio.
    low, high = 0.5 / (1 + u), 1.0
    ratio = brentq(lambda ratio: math.exp(_first_zero(ratio)) / ratio - 1 - u, low, high, xtol=1e-13)
    return _first_zero(ratio)


def turning_radius(grad_norm: ArrayLike, L0: ArrayLike, L1: ArrayLike) -> Array:
    """The radius up to which one dimension is the worst case of every dimension.

    Up to it :func:`.exact_bound_1d` is the exact maximum of f(x - r ∇f(x)/g) - f(x) over all
    functions with ‖∇²f‖ ≤ L0 + L1‖∇f‖ on Rⁿ, for every n; beyond it a path that turns has a larger integral
    than the straight one.

    For u = L1 g/L0 ≤ :func:`critical_size` it is ln(1 + u)/L1, the minimiser of that bound; for larger u it
    is shorter than that, and for L0 = 0 it is ln((1 + x)/2)/L1 ≈ 1.621/L1, where x is the first zero beyond 1
    of the conical function P_{-1/2 + i√3/2}.

    Args:
        grad_norm: g = ‖∇f(x)‖ [f/x].
        L0: [f/x²].
        L1: [1/x]; at L1 = 0 it is g/L0.

    Returns:
        r [x]; ``inf`` where L0 = L1 = 0.

    Raises:
        ValueError: an argument is negative, infinite or NaN.

    References:
        Derived in the book, "The worst case, until the gradient turns".

    >>> from gradclip.tightness import turning_radius
    >>> round(float(turning_radius(1.0, L0=1.0, L1=1.0)), 4), round(float(turning_radius(1.0, 0.0, 1.0)), 4)
    (0.6931, 1.6209)
    """
    arrays = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (grad_norm, L0, L1)))
    for name, array in zip(("grad_norm", "L0", "L1"), arrays, strict=True):
        bad = array[~((array >= 0) & np.isfinite(array))]
        if bad.size:
            raise ValueError(f"{name} must be nonnegative and finite, got {bad.flat[0]}")

    def one(g: float, L0: float, L1: float) -> float:
        if L1 * g == 0:
            return g / L0 if L0 > 0 else math.inf
        return _turning(L1 * g / L0 if L0 > 0 else math.inf) / L1

    with np.errstate(over="ignore"):  # u = inf stands for L0 = 0
        return np.vectorize(one, otypes=[float])(*arrays)[()]


def rotating_bound(share: float, step: ArrayLike) -> Array:
    """A worst case that functions on the plane do attain: the best of f = Re(A e^{cdz}/(cd) + B z).

    Here z = x + iy, ‖d‖ = 1, A + B = -1 and ‖B‖ ≤ (1 - c)/c. Then ‖∇f‖ = ‖A e^{cdz} + B‖ and
    ‖∇²f‖ = c‖A e^{cdz}‖ ≤ 1 - c + c‖∇f‖, so f is in the class; ∇f(0) = (-1, 0); and the best B gives

        max over d of  -Re E + ((1 - c)/c)‖s - E‖,   E = (e^{cds} - 1)/(cd).

    d = -1 is the worst case of one dimension, up to where its slope vanishes.

    Args:
        share: c.
        step: s, in natural units (see the module).

    Returns:
        The largest change of f within this family, in units of g²/G; a lower bound of the worst case in n ≥ 2
        dimensions.

    Raises:
        ValueError: ``share`` is not in (0, 1], or a step is negative.

    >>> from gradclip.tightness import rotating_bound
    >>> float(rotating_bound(1.0, 3.0)) > 0
    True
    """
    c, s = _check_share(share), np.asarray(step, dtype=np.float64)
    if not (s >= 0).all():
        raise ValueError(f"step must be nonnegative, got {s.min()}")
    d = np.exp(1j * np.linspace(0, np.pi, 3601))  # the maximum is smooth: 1e-3 off costs below 1e-6 of s²
    moved = np.expm1(c * s[..., None] * d) / (c * d)
    change = -moved.real + (1 - c) / c * np.abs(s[..., None] - moved)
    return change.max(axis=-1)[()]


@dataclass(frozen=True, eq=False)
class WorstPath:
    """A path of Pontryagin's equations, in natural units.

    Args:
        step: length of the step, s.
        value: the change of f along it.
        end: the gradient at its end, (slope, height); the slope is also the derivative of the value in s.
        time: distances from the start, shape (n,).
        gradient: p, shape (n, 2), from (-1, 0) to ``end``.
        costate: λ, shape (n, 2), with λ = 0 at the end.
    """

    step: float
    value: float
    end: tuple[float, float]
    time: Array
    gradient: Array
    costate: Array

    def hamiltonian(self, share: float) -> Array:
        """w(‖p‖)‖λ‖ + ⟨p, v⟩ along the path, shape (n,): Pontryagin's first integral, the final slope."""
        speed = 1 - share + share * np.hypot(*self.gradient.T)
        return speed * np.hypot(*self.costate.T) + self.gradient[:, 0]


def _backward(share: float, slope: float, height: float, samples: int = 0):
    """Integrate Pontryagin's equations back from p = (slope, height), λ = 0, to the axis or far away."""
    c, q = share, math.hypot(slope, height)
    w, cos, sin = 1 - c + c * q, slope / q, height / q

    def derivative(_: float, state: Array) -> tuple[float, ...]:
        a, b, l, m, _ = state
        size, pull = math.hypot(a, b), math.hypot(l, m)
        speed = 1 - c + c * size
        drag = c * pull / size
        return -speed * l / pull, -speed * m / pull, drag * a + 1, drag * b, a

    def axis(_: float, state: Array) -> float:
        return state[1]

    def far(_: float, state: Array) -> float:
        return state[0] + _FAR

    axis.terminal = far.terminal = True
    axis.direction = -1
    # λ = t v to first order, so its direction is not defined at the end: two terms of the series, error t³.
    t = 1e-5 * min(1.0, q)
    start = (
        slope - w * t + c * w * cos * t**2 / 2,
        height - c * w * sin * t**2 / 4,
        t + c * cos * t**2 / 2,
        c * sin * t**2 / 2,
        slope * t - w * t**2 / 2,
    )
    options = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-13, "events": (axis, far)}
    return solve_ivp(derivative, (t, 20.0), start, dense_output=samples > 0, **options)


def worst_path(
    share: float, height: float | None = None, *, slope: float | None = None, samples: int = 200
) -> WorstPath:
    """The path of Pontryagin's equations that starts at (-1, 0) and ends with the given height or slope.

    The maximum principle: p′ = w(‖p‖) λ/‖λ‖, λ′ = -c‖λ‖ p/‖p‖ - v, λ(s) = 0. Each turned path has a height
    b > 0 of its own. With ``slope=0`` it is the path of the best step, as the slope is the derivative of the
    value.

    Args:
        share: c.
        height: component of the last gradient across the step, in units of g.
        slope: component along the step, in units of g; give one of the two.
        samples: number of points kept, at least 2.

    Returns:
        The path.

    Raises:
        ValueError: ``share`` is not in (0, 1], ``height`` is not positive, not exactly one of the two is
            given, or there is no such path.

    >>> from gradclip.tightness import worst_path
    >>> path = worst_path(1.0, slope=0.0)  # L0 = 0
    >>> round(path.step, 3), round(path.value, 3)
    (1.835, -0.825)
    """
    c = _check_share(share)
    if (height is None) == (slope is None):
        raise ValueError(f"give height or slope, got height={height} and slope={slope}")
    if height is not None:
        if not height > 0:
            raise ValueError(f"height must be positive, got {height}")
        slope = _slope_at(c, height, -1 + 1e-9, 0.5)
    else:
        # The higher the end, the further back the path meets the axis.
        height = math.exp(_root(lambda b: -_miss(c, slope, math.exp(b)), -16.0, 0.0))
    found = _backward(c, slope, height, samples)
    time = np.linspace(found.t[0], found.t[-1], samples)
    a, b, l, m, _ = found.sol(time)
    return WorstPath(
        step=float(found.t[-1]),
        value=float(found.y[4, -1]),
        end=(float(slope), float(height)),
        time=(found.t[-1] - time)[::-1],
        gradient=np.column_stack([a, b])[::-1],
        costate=np.column_stack([l, m])[::-1],
    )


def _miss(share: float, slope: float, height: float) -> float:
    # Where neither event came, the path was still on its way, close to the origin.
    return _backward(share, slope, height).y[0, -1] + 1


def _slope_at(share: float, height: float, low: float, high: float) -> float:
    """The final slope of the path with this final height: above ``low``, and probably below ``high``."""
    return _root(lambda slope: _miss(share, slope, height), low, high)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The zero of a function that is negative at ``low``; ``high`` is moved up until it is positive."""
    if function(low) < 0:
        width = high - low
        for _ in range(60):
            if function(high) >= 0:
                return float(brentq(function, low, high, xtol=1e-12))
            low, width = high, 2 * width
            high = low + width
    raise ValueError("there is no such path")


@dataclass(frozen=True, eq=False)
class WorstCurve:
    """The control value as a function of the step, for one c, in natural units.

    Up to ``turning`` it is the closed form of one dimension; beyond, a cubic through computed paths, whose
    slopes are known as well.

    Args:
        share: c.
        turning: the step at which the worst path starts to turn.
        step: steps of the computed paths, from ``turning`` on, increasing.
        value: their values.
        slope: their final slopes, the derivative of the value.
        height: their final heights.
    """

    share: float
    turning: float
    step: Array
    value: Array
    slope: Array
    height: Array

    @property
    def longest(self) -> float:
        """The longest step that the curve covers."""
        return float(self.step[-1])

    def __call__(self, step: ArrayLike) -> Array:
        """The control value at ``step``, in units of g²/G; NaN beyond :attr:`longest`."""
        s = np.asarray(step, dtype=np.float64)
        turned = CubicHermiteSpline(self.step, self.value, self.slope, extrapolate=False)
        straight = theory.exact_bound_1d(1.0, np.minimum(s, self.turning), 1 - self.share, self.share)
        return np.where(s <= self.turning, straight, turned(s))[()]

    def best_step(self) -> float:
        """The step that minimises the control value."""
        index = int(np.argmax(self.slope >= 0))
        if index == 0:  # the straight path turns exactly where its slope vanishes
            return self.turning
        slope = CubicHermiteSpline(self.step, self.value, self.slope).derivative()
        return float(brentq(slope, self.step[index - 1], self.step[index]))

    def descent_limit(self) -> float:
        """The step at which the control value returns to 0: every shorter one decreases every f."""
        return self._crossing(self.value)

    def half_limit(self) -> float:
        """The step at which the control value meets the article's parabola: S5 holds up to it."""
        return self._crossing(self.value - (self.step**2 / 2 - self.step), lambda s: s**2 / 2 - s)

    def _crossing(self, gap: Array, other=lambda s: 0.0) -> float:
        index = int(np.argmax(gap > 0))
        if gap[index] <= 0:
            raise ValueError(f"the curve ends at the step {self.longest:.3g}, before the crossing")
        return float(brentq(lambda s: self(s) - other(s), self.step[index - 1], self.step[index], xtol=1e-12))


def worst_curve(share: float, *, longest: float = 5.2, density: int = 12) -> WorstCurve:
    """Compute the control value for all steps up to ``longest``.

    Args:
        share: c. Below 0.05 the paths pass the origin so closely that they differ from the straight one by
            less than rounding, and this function refuses.
        longest: the curve ends beyond this step (natural units).
        density: paths per factor of ten in the final height.

    Returns:
        The curve.

    Raises:
        ValueError: ``share`` is not in [0.05, 1].

    >>> from gradclip.tightness import worst_curve
    >>> curve = worst_curve(1.0, longest=4.0, density=6)
    >>> [round(float(curve(s)), 2) for s in (1.0, 2.0, 3.0)]
    [-0.63, -0.81, 0.7]
    """
    c = _check_share(share)
    if c < 0.05:
        raise ValueError(f"share must be at least 0.05, got {share}")
    u = c / (1 - c) if c < 1 else math.inf
    turning = _turning(u) / c
    straight = (
        turning,
        float(theory.exact_bound_1d(1.0, turning, 1 - c, c)),
        _straight_slope(c, turning),
        0.0,
    )
    rows = [straight]
    # The final slope increases with the final height: each path starts the search for the next.
    low, width, exponent = -1 + 1e-9, 0.5, -6.0
    while rows[-1][0] <= longest:
        height = 10**exponent
        slope = _slope_at(c, height, low, low + width)
        found = _backward(c, slope, height)
        if found.t[-1] > rows[-1][0]:
            rows.append((found.t[-1], found.y[4, -1], slope, height))
        width = max(2 * (slope - low), 1e-6)
        low = slope - 1e-7
        exponent += 1 / density
    step, value, slope, height = np.array(rows).T
    return WorstCurve(c, turning, step, value, slope, height)


def _straight_slope(c: float, step: float) -> float:
    """The slope met at distance s on the straight path, before it vanishes: -(1 - (1 - e^{-cs})/c)."""
    return -math.expm1(-c * step) / c - 1


def transcribed_value(share: float, step: float, *, pieces: int = 64) -> float:
    """The control value by direct optimisation: piecewise constant directions, improved by L-BFGS.

    The path is integrated by the midpoint rule and differentiated by its adjoint; two starts, one that turns
    late and one that turns widely. The error is O(1/pieces²).

    Args:
        share: c.
        step: s, in natural units.
        pieces: number of constant directions.

    Returns:
        The largest value found, in units of g²/G: without the discretisation error a lower bound of the
        control value.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    c, n = _check_share(share), pieces
    delta = step / n

    def loss(angles: Array) -> tuple[float, Array]:
        e = np.column_stack([np.cos(angles), np.sin(angles)])
        p, m = np.empty((n + 1, 2)), np.empty((n, 2))
        p[0] = -1, 0
        for k in range(n):
            m[k] = p[k] + delta / 2 * (1 - c + c * math.hypot(*p[k])) * e[k]
            p[k + 1] = p[k] + delta * (1 - c + c * math.hypot(*m[k])) * e[k]
        size = np.hypot(*p.T)
        middle = np.hypot(*m.T)
        tiny = 1e-300  # a midpoint may hit the origin, where the speed limit has no derivative
        lam, gradient = np.zeros(2), np.empty(n)
        for k in reversed(range(n)):
            pull = lam @ e[k]
            mu = delta * (pull * c * m[k] / (middle[k] + tiny))
            mu[0] += delta
            by_e = delta * (1 - c + c * middle[k]) * lam + delta / 2 * (1 - c + c * size[k]) * mu
            gradient[k] = by_e[1] * e[k, 0] - by_e[0] * e[k, 1]
            lam = lam + mu + delta / 2 * (mu @ e[k]) * c * p[k] / (size[k] + tiny)
        return -delta * m[:, 0].sum(), -gradient

    starts = (np.linspace(first, 0, n) for first in (0.3, 1.8))
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-9}
    return -min(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).fun for start in starts)


def grid_value(share: float, steps: ArrayLike, *, spacing: float = 0.1, directions: int = 12) -> Array:
    """The control value by dynamic programming on a grid of gradients, which looks at all paths at once.

    Semi-Lagrangian: U(p, t + δ) = max over directions of δ·(slope halfway) + U(p moved by δ, t), with cubic
    interpolation, δ equal to the spacing, and the directions a fixed fan and that of the gradient of U.

    Args:
        share: c.
        steps: the steps at which to read the value off, in natural units.
        spacing: of the grid, in units of g, and of time.
        directions: in the fan over the full circle.

    Returns:
        The values, shape of ``steps``, in units of g²/G.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    c, steps = _check_share(share), np.asarray(steps, dtype=np.float64)
    left, right, top = -3.0, 8.0, 6.0
    x = np.arange(round((right - left) / spacing) + 1) * spacing + left
    y = np.arange(round(top / spacing) + 1) * spacing
    p = np.stack(np.meshgrid(x, y, indexing="ij"))
    fan = 2 * np.pi * np.arange(directions) / directions
    count = math.ceil(float(steps.max()) / spacing)
    U = np.zeros(p.shape[1:])
    start = np.array([[(-1 - left) / spacing], [0.0]])
    history = [0.0]
    for _ in range(count):
        slopes = np.stack(np.gradient(U, spacing))
        slopes[1, :, 0] = 0  # symmetric about the axis
        size = np.hypot(*slopes)
        ascent = np.where(size > 0, slopes / np.where(size > 0, size, 1), np.array([1.0, 0.0])[:, None, None])
        filtered = spline_filter(U, order=3, mode="mirror")
        best = np.full(U.shape, -np.inf)
        for e in (ascent, *(np.array([math.cos(a), math.sin(a)])[:, None, None] for a in fan)):
            middle = p + spacing / 2 * (1 - c + c * np.hypot(*p)) * e
            moved = p + spacing * (1 - c + c * np.hypot(*middle)) * e
            index = [(moved[0] - left) / spacing, np.abs(moved[1]) / spacing]
            ahead = map_coordinates(filtered, index, order=3, mode="mirror", prefilter=False)
            np.maximum(best, spacing * middle[0] + ahead, out=best)
        U = best
        history.append(float(map_coordinates(U, start, order=3, mode="mirror")[0]))
    return CubicHermiteSpline(
        np.arange(count + 1) * spacing, history, np.gradient(history, spacing, edge_order=2)
    )(steps)
