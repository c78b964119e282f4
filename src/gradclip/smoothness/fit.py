"""The line L0 + L1 ‖∇f‖ through measured smoothness, its uncertainty, and the step it suggests."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog

from gradclip.rules import check_number

__all__ = ["Fit", "Interval", "Recommendation", "fit", "recommend"]

_Array = NDArray[np.float64]
_METHODS = ("ols", "quantile", "envelope")
_FEWEST = 8
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Interval:
    """Bootstrap intervals made by :meth:`Fit.interval`, each a pair (lower, upper).

    Attributes:
        L0, L1: for the coefficients of the line, with the meaning that the method of the fit gives them.
        log_slope, log_correlation: for the slope and the correlation of the logarithms; NaN if undefined.
        level: nominal probability, such as 0.95.
        block: length of the resampled blocks, in points.
        resamples: number of bootstrap samples.
    """

    L0: tuple[float, float]
    L1: tuple[float, float]
    log_slope: tuple[float, float]
    log_correlation: tuple[float, float]
    level: float
    block: int
    resamples: int


@dataclass(frozen=True)
class Fit:
    """A line s = L0 + L1 g through gradient norms g and smoothness s, made by :func:`fit`.

    Attributes:
        L0: intercept, non-negative (unit of the smoothness: loss over parameter squared).
        L1: slope, non-negative (unit: one over parameter).
        method: "ols", "quantile" or "envelope".
        log_slope: least-squares slope of log s on log g over all points: the exponent of a power law. A line
            through 0 has 1, independence has 0.
        log_correlation: Pearson correlation of log s and log g; NaN if all s are equal.
        n: number of points.
        quantile: for the method "quantile" the quantile asked for, otherwise None.
    """

    L0: float
    L1: float
    method: str
    log_slope: float
    log_correlation: float
    n: int
    _grad_norms: _Array = field(repr=False, compare=False)
    _smoothness: _Array = field(repr=False, compare=False)
    quantile: float | None = None

    def predict(self, g: Any) -> Any:
        """Height of the line, L0 + L1 g.

        Args:
            g: gradient norm: a number, an array, a tensor, or a list of numbers.

        Returns:
            The same kind and shape as ``g``; an array for a list.
        """
        if isinstance(g, (list, tuple)):
            g = np.asarray(g, dtype=np.float64)
        return self.L0 + self.L1 * g

    def recommend(self, multiple: float = 1.0) -> Recommendation:
        """Learning rate and threshold of the step multiple/(L0 + L1 g), see the function :func:`recommend`.

        An L0 that is below a thousandth of L1 g at every point counts as 0: the steps are the same to that
        accuracy, and the learning rate, which weight decay would multiply with, does not explode.

        Args:
            multiple: length of the step in units of 1/(L0 + L1 g), positive.

        Returns:
            A :class:`Recommendation`.

        Raises:
            TypeError: if ``multiple`` is not a number.
            ValueError: if ``multiple`` is not positive and finite.

        Example:
            >>> g = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
            >>> advice = fit(g, [4.0 + 2.0 * x for x in g], method="ols").recommend(2.0)
            >>> round(advice.lr, 3), round(advice.max_norm, 3), advice.rule
            (0.5, 2.0, 'soft')
        """
        check_multiple(multiple)
        intercept = self.L0
        if intercept < _NEGLIGIBLE * self.L1 * self._grad_norms.min():
            intercept = 0.0
        return recommend(intercept / multiple, self.L1 / multiple)

    def interval(
        self, level: float = 0.95, *, block: int | None = None, resamples: int = 1000, seed: int = 0
    ) -> Interval:
        """Percentile intervals from the circular moving-block bootstrap.

        Consecutive points of a training run are correlated, so single points must not be resampled. Blocks of
        ``block`` consecutive points (in the order given to :func:`fit`, the last point followed by the first)
        are drawn with replacement until there are n points; the line is fitted again, with the same method,
        and the interval runs from the (1 − level)/2 to the (1 + level)/2 quantile of the results.

        The run is taken to be stationary: leave out a transient at its start.

        What the interval covers depends on the method. For "ols" and "quantile", and for the slope and
        correlation of the logarithms, it is the sampling variation of one run of this length; it does not
        include the variation from seed to seed. For "envelope" it is **not** a confidence interval for the
        constants of the objective. The largest of n points underestimates the supremum, a resample contains
        only a part of the
        n points, and its envelope therefore lies on or below the full one at its own mean gradient norm,
        never clearly above. Read it as a stability check: how far L0 and L1 move if other stretches of the
        run had been visited. A bound from above needs more than data.

        Args:
            level: nominal probability, in (0, 1).
            block: block length between 1 and n. The default minimises the mean squared error of the bootstrap
                variance for an autoregression of first order, b³ = (3/2) n (2ρ/(1 − ρ²))². That is
                ``b³ = (3/2) n (Σ|k|R(k) / ΣR(k))²``, the optimum of Politis and White for the circular
                bootstrap, with the autocovariances ``R(k) ∝ ρ^|k|``. Here ρ is the larger lag-one
                autocorrelation of e and x e, with x the centred log g and e the residual of the fit of the
                logarithms. At least n^(1/3), and at most n/4 so that at least four blocks are drawn.
            resamples: number of bootstrap samples.
            seed: of the generator made for this call.

        Returns:
            An :class:`Interval`.

        Raises:
            ValueError: if an argument is out of range.

        References:
            Künsch, "The jackknife and the bootstrap for general stationary observations", 1989 (moving
            blocks); Politis and Romano, "A circular block-resampling procedure for stationary data", 1992;
            Politis and White, "Automatic block-length selection for the dependent bootstrap", 2004.

        Example:
            >>> g = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
            >>> s = [3.0, 5.2, 6.9, 9.0, 11.1, 12.8, 15.0, 17.1]
            >>> low, high = fit(g, s, method="ols").interval().L1
            >>> low < 2.0 < high
            True
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        if resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {resamples}")
        g, s, n = self._grad_norms, self._smoothness, self.n
        if block is None:
            block = _block_length(np.log(g), np.log(s))
        if not 1 <= block <= n:
            raise ValueError(f"block must be between 1 and {n}, the number of points, got {block}")

        lines = {"ols": _ols, "quantile": partial(_quantiles, q=self.quantile), "envelope": _envelopes}
        generator = np.random.default_rng(seed)
        results = []
        chunk = max(1, 1_000_000 // n)  # of 8 MB arrays: long runs must not need gigabytes
        for done in range(0, resamples, chunk):
            rows = min(chunk, resamples - done)
            starts = generator.integers(n, size=(rows, -(-n // block), 1))
            index = ((starts + np.arange(block)) % n).reshape(rows, -1)[:, :n]
            results.append([*lines[self.method](g[index], s[index]), *_log_statistics(g[index], s[index])])

        bounds = []
        for values in np.concatenate(results, axis=1):
            # A resample in which all g (or all s) are equal has no slope (or correlation).
            defined = values[np.isfinite(values)]
            tails = ((1 - level) / 2, (1 + level) / 2)
            low, high = np.quantile(defined, tails) if defined.size else (math.nan, math.nan)
            bounds.append((float(low), float(high)))
        return Interval(*bounds, level=level, block=block, resamples=resamples)


def fit(
    grad_norms: Iterable, smoothness: Iterable, *, method: str = "envelope", quantile: float = 0.95
) -> Fit:
    """Fit s = L0 + L1 g with L0, L1 ≥ 0 to measured pairs of gradient norm g and smoothness s.

    * "ols": the least-squares line under the two sign constraints, minimising the sum of (s − L0 − L1 g)². It
      describes the middle of the cloud, and the points with the largest g and s dominate it.
    * "quantile": quantile regression under the two sign constraints, minimising the sum of
      max(q r, (q − 1) r) over the residuals r = s − L0 − L1 g. For q = 0.95 some 95 % of the points lie on or
      below the line: nearly an upper bound, that a few extreme points do not decide. At most n (1 − q)
      points are above it; unless L0 = 0, at least n (1 − q) are on or above it.
    * "envelope": the smallest line above every point, s ≤ L0 + L1 g. Smallest means that its mean height over
      the data, L0 + L1 mean(g), is minimal; this is a linear programme in two variables, solved by HiGHS. It
      is what the inequality of (L0, L1)-smoothness asks for, restricted to the points seen: no smaller line
      will do for the objective, a larger one may be needed. A few extreme points decide it.

    Multiplying g by c or s by c changes the coefficients accordingly, whatever the units: the data are scaled
    first.

    Args:
        grad_norms: gradient norms g, positive, in the order of the run; a list, an array or a tensor on any
            device, of shape (n,) with n ≥ 8.
        smoothness: smoothness s at the same points, positive, of shape (n,).
        method: "envelope", "quantile" or "ols".
        quantile: q in (0, 1), for the method "quantile" alone.

    Returns:
        A :class:`Fit`.

    Raises:
        ValueError: if the method is unknown, the quantile is not between 0 and 1, the lengths differ, there
            are fewer than 8 points, a value is not positive and finite, or all gradient norms are equal.

    References:
        Zhang, He, Sra and Jadbabaie, "Why gradient clipping accelerates training", ICLR 2020, Figures 1 to 3,
        show such clouds on logarithmic axes. Koenker and Bassett, "Regression quantiles", Econometrica 1978.

    Example:
        >>> g = [0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
        >>> s = [0.5, 0.9, 1.0, 2.5, 3.0, 4.4, 6.0, 8.5]
        >>> line = fit(g, s)
        >>> round(line.L0, 3), round(line.L1, 3), round(line.predict(2.0), 3)
        (0.5, 2.0, 4.5)
        >>> round(fit(g, s, method="ols").L1, 3)
        2.003
        >>> round(fit(g, s, method="quantile", quantile=0.5).L1, 3)
        2.051
    """
    if method not in _METHODS:
        raise ValueError(f"method must be 'ols', 'quantile' or 'envelope', got {method!r}")
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"quantile must be between 0 and 1, got {quantile}")
    g, s = _vector("grad_norms", grad_norms), _vector("smoothness", smoothness)
    if len(g) != len(s):
        raise ValueError(f"grad_norms and smoothness must have one length, got {len(g)} and {len(s)}")
    if len(g) < _FEWEST:
        raise ValueError(f"a fit needs at least {_FEWEST} points, got {len(g)}")
    if np.ptp(g) == 0:
        raise ValueError(f"grad_norms must not all be equal, got {len(g)} times {g[0]}")

    if method == "envelope":
        L0, L1 = _smallest_line_above(g, s)
    else:
        lines = _ols if method == "ols" else partial(_quantiles, q=quantile)
        L0, L1 = (value.item() for value in lines(g[None], s[None]))
    slope, correlation = (value.item() for value in _log_statistics(g[None], s[None]))
    return Fit(
        L0, L1, method, slope, correlation, len(g), g, s, float(quantile) if method == "quantile" else None
    )


@dataclass(frozen=True)
class Recommendation:
    """Parameters for a clipped step, made by :func:`recommend`.

    Attributes:
        lr: learning rate 1/L0 (unit: parameter squared over loss). For L0 = 0, 1/L1.
        max_norm: threshold L0/L1 for the gradient norm (unit: loss over parameter); infinite if L1 = 0. For
            L0 = 0, one unit of the gradient norm.
        rule: "soft"; for L0 = 0 "normalize". Hard clipping with the numbers of "soft" takes longer steps, by
            a factor of at most 2.
    """

    lr: float
    max_norm: float
    rule: str = "soft"


def recommend(L0: float, L1: float) -> Recommendation:
    """Learning rate and threshold for a function with ‖∇²f‖ ≤ L0 + L1 ‖∇f‖, as ``recommend(fit.L0, fit.L1)``.

    With g = ‖∇f‖, the quadratic model of f along −∇f with curvature L0 + L1 g is smallest at the step
    η = 1/(L0 + L1 g). With c = L0/L1 this is η = (1/L0) c/(c + g): soft clipping with lr = 1/L0 and
    max_norm = c. The hard rule with the same two numbers takes steps longer by a factor between 1 and 2.
    Theorem 3 of the paper, which must hold for every such function, uses lr = 1/(10 L0).

    The limit L0 → 0, in which lr grows and max_norm falls with a fixed product, is the step of length 1/L1:
    the rule "normalize" with lr = 1/L1 and max_norm = 1. Lines through measured points often end there.

    Args:
        L0: non-negative and finite.
        L1: non-negative and finite. 0 is the classical case: lr = 1/L0, and a threshold of infinity never
            clips.

    Returns:
        A :class:`Recommendation`.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of range, or both are 0: the gradient is constant then, and no step
            is too long.

    References:
        Zhang, He, Sra and Jadbabaie, "Why gradient clipping accelerates training", ICLR 2020,
        equations 5 and 6.

    Example:
        >>> recommend(4.0, 2.0)
        Recommendation(lr=0.25, max_norm=2.0, rule='soft')
        >>> recommend(4.0, 0.0)
        Recommendation(lr=0.25, max_norm=inf, rule='soft')
        >>> recommend(0.0, 2.0)
        Recommendation(lr=0.5, max_norm=1.0, rule='normalize')
    """
    for name, value in (("L0", L0), ("L1", L1)):
        check_number(name, value)
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be non-negative and finite, got {value}")
    if L0 == 0.0:
        if L1 == 0.0:
            raise ValueError(
                "L0 and L1 must not both be 0, got 0.0 and 0.0: the gradient is constant, "
                "and no step is too long"
            )
        return Recommendation(lr=1.0 / L1, max_norm=1.0, rule="normalize")
    return Recommendation(lr=1.0 / L0, max_norm=L0 / L1 if L1 > 0.0 else math.inf)


def check_multiple(multiple: float) -> None:
    check_number("multiple", multiple)
    if not 0.0 < multiple < math.inf:
        raise ValueError(f"multiple must be positive and finite, got {multiple}")


def _vector(name: str, data: Iterable) -> _Array:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().double().numpy()
    elif not isinstance(data, np.ndarray):
        data = [value.item() if isinstance(value, torch.Tensor) else value for value in data]
    vector = np.array(data, dtype=np.float64)  # a copy: the fit keeps it for the bootstrap
    if vector.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {vector.shape}")
    wrong = np.flatnonzero(~((vector > 0) & (vector < np.inf)))
    if wrong.size:
        raise ValueError(f"{name}[{wrong[0]}] must be positive and finite, got {vector[wrong[0]]}")
    vector.setflags(write=False)
    return vector


def _smallest_line_above(g: _Array, s: _Array) -> tuple[float, float]:
    """Minimise L0 + L1 mean(g) subject to L0 + L1 g ≥ s and L0, L1 ≥ 0."""
    x, y = g / g.mean(), s / s.max()
    # Every row is divided by its y, so that the solver's absolute tolerance is relative for each point. Below
    # 1e-12 of the largest smoothness the entries of the matrix would leave the range that HiGHS accepts.
    weight = 1 / np.maximum(y, 1e-12)
    result = linprog(
        (1.0, 1.0),
        A_ub=-np.column_stack((weight, weight * x)),
        b_ub=-weight * y,
        bounds=(0, None),
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if not result.success:  # the programme is feasible and bounded, so this is a failure of the solver
        raise RuntimeError(f"the linear programme was not solved: {result.message}")
    intercept, slope = result.x
    # The tolerance may leave the line below a point by some 1e-10 of its height: lift it until it touches.
    lift = (y / (intercept + slope * x)).max() * s.max()
    return float(intercept * lift), float(slope * lift / g.mean())


def _ols(g: _Array, s: _Array) -> tuple[_Array, _Array]:
    """Non-negative least squares for each row of (rows, n) arrays.

    With two variables the optimum is the free one if it is feasible, or the better one of the two on the
    edges L0 = 0 and L1 = 0, where it is positive because the data are.
    """
    g_scale, s_scale = g.max(axis=1, keepdims=True), s.max(axis=1, keepdims=True)
    x, y = g / g_scale, s / s_scale
    x_mean, y_mean = x.mean(axis=1), y.mean(axis=1)
    centred = x - x_mean[:, None]
    spread = (centred**2).sum(axis=1)
    slope = np.divide((centred * y).sum(axis=1), spread, out=np.zeros_like(spread), where=spread > 0)
    intercept = y_mean - slope * x_mean
    through_zero = (x * y).sum(axis=1) / (x * x).sum(axis=1)
    flat_loss = ((y - y_mean[:, None]) ** 2).sum(axis=1)
    flat_is_better = flat_loss < ((y - through_zero[:, None] * x) ** 2).sum(axis=1)
    free = (slope >= 0) & (intercept >= 0)
    slope = np.where(free, slope, np.where(flat_is_better, 0.0, through_zero))
    intercept = np.where(free, intercept, np.where(flat_is_better, y_mean, 0.0))
    return intercept * s_scale[:, 0], slope * (s_scale / g_scale)[:, 0]


def _quantiles(g: _Array, s: _Array, *, q: float) -> tuple[_Array, _Array]:
    """Quantile regression with non-negative coefficients for each row of (rows, n) arrays, without a solver.

    For a given slope b the best intercept is the q-quantile of s − b g, or 0 if that is negative. The
    objective that is left, h(b), is convex and piecewise linear, so that the sign of one subgradient tells on
    which side of b its minimum lies. Between 0 and the largest s/g, above which h rises, it is found by
    bisection: some 60 halvings until no float64 is left between the ends.
    """
    g_scale, s_scale = g.max(axis=1, keepdims=True), s.max(axis=1, keepdims=True)
    x, y = g / g_scale, s / s_scale
    k = max(math.ceil(q * x.shape[1] - 1e-9), 1) - 1  # the lower of two quantiles; q n may be rounded upwards

    def at(slope: _Array) -> tuple[_Array, _Array]:
        """The best intercept, and a subgradient of h."""
        residual = y - slope[:, None] * x
        intercept = np.maximum(np.partition(residual, k, axis=1)[:, k], 0.0)
        residual -= intercept[:, None]
        weight = np.where(residual > 0, q, q - 1.0)
        # The points on the line may take any weight in between. All weights add up to 0 where the intercept
        # is free.
        on = residual == 0
        weight[on] = 0.0
        share = np.clip(-weight.sum(axis=1) / np.maximum(on.sum(axis=1), 1), q - 1.0, q)
        return intercept, -((weight + share[:, None] * on) * x).sum(axis=1)

    low, high = np.zeros(len(x)), (y / x).max(axis=1)
    high[at(low)[1] >= 0] = 0.0
    # Heights are at most 1: no slope below 1e-18 can be told from 0.
    while (open_ := high - low > np.maximum(1e-18, np.spacing(low))).any():
        middle = np.where(open_, low + (high - low) / 2, low)
        rises = at(middle)[1] >= 0
        high = np.where(open_ & rises, middle, high)
        low = np.where(open_ & ~rises, middle, low)
    intercept, _ = at(low)
    # What is left of a residual that is 0 but for its rounding is no intercept.
    intercept[intercept < 1e-14] = 0.0
    return intercept * s_scale[:, 0], low * (s_scale / g_scale)[:, 0]


def _envelopes(g: _Array, s: _Array) -> tuple[_Array, _Array]:
    """The line of :func:`_smallest_line_above` for each row of (rows, n) arrays, without a solver.

    A line above all points that is lowest at abscissa mean(g) is the edge of their upper hull over mean(g).
    The sign constraints become two more points: (0, 0), and one beyond the largest g at the height of the
    largest s. Starting from these two, the point farthest above the current chord replaces the end on its
    side of mean(g) until none is above. Every such point is a vertex of the hull, so this ends after at most
    n rounds, in practice a handful.
    """
    g_scale, s_scale = g.max(axis=1, keepdims=True), s.max(axis=1, keepdims=True)
    x, y = g / g_scale, s / s_scale
    middle = x.mean(axis=1)
    rows = np.arange(len(x))
    left_x, left_y = np.zeros(len(x)), np.zeros(len(x))
    right_x, right_y = np.full(len(x), 2.0), np.ones(len(x))
    while True:
        slope = (right_y - left_y) / (right_x - left_x)
        above = y - left_y[:, None] - slope[:, None] * (x - left_x[:, None])
        top = above.argmax(axis=1)
        # Twice the rounding of `above` on numbers up to 1, so that collinear points end the loop.
        move = above[rows, top] > 1e-15
        if not move.any():
            intercept = np.maximum(left_y - slope * left_x, 0.0)
            return intercept * s_scale[:, 0], slope * (s_scale / g_scale)[:, 0]
        top_x, top_y = x[rows, top], y[rows, top]
        to_left = move & (top_x <= middle)
        to_right = move & ~to_left
        left_x, left_y = np.where(to_left, top_x, left_x), np.where(to_left, top_y, left_y)
        right_x, right_y = np.where(to_right, top_x, right_x), np.where(to_right, top_y, right_y)


def _log_statistics(g: _Array, s: _Array) -> tuple[_Array, _Array]:
    """Slope and correlation of log s on log g for each row of (rows, n) arrays; NaN where undefined."""
    x, y = np.log(g), np.log(s)
    # Exact test: the deviations of equal numbers from their rounded mean are not zero.
    x_varies, y_varies = np.ptp(x, axis=1) > 0, np.ptp(y, axis=1) > 0
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    xx, yy, xy = (x * x).sum(axis=1), (y * y).sum(axis=1), (x * y).sum(axis=1)
    undefined = np.full_like(xx, np.nan)
    slope = np.divide(xy, xx, out=undefined.copy(), where=x_varies)
    correlation = np.divide(xy, np.sqrt(xx * yy), out=undefined, where=x_varies & y_varies)
    return slope, correlation.clip(-1.0, 1.0)


def _block_length(x: _Array, y: _Array) -> int:
    """Block length for the bootstrap; the rule is stated in :meth:`Fit.interval`."""
    n = len(x)
    x, y = x - x.mean(), y - y.mean()
    residual = y - (x @ y) / (x @ x) * x
    rho = 0.0
    for series in (residual, x * residual):
        series = series - series.mean()
        power = series @ series
        if power > 0:
            rho = max(rho, float(series[1:] @ series[:-1] / power))
    persistent = (1.5 * n * (2 * rho / (1 - rho**2)) ** 2) ** (1 / 3)
    return max(1, min(math.ceil(max(persistent, n ** (1 / 3))), n // 4))
