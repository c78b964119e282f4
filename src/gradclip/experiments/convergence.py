"""Iteration counts of gradient descent, clipped and not, against the bounds of the theory.

**The class, and two functions that stand for it.** Units are chosen so that L0 = L1 = 1; every bound used
here keeps its value when they change. M = u is the gradient norm at the start and D the gap. The *steep*
function is ``problems.extremal`` from the point with gradient M: fixed steps h ≥ 2 ln(1 + u)/u never reach
a smaller gradient. The *slow* one is ``problems.ramp`` with slope (1 + 1e-6) ε from the point with gap D:
descent crosses it at h ε per step. A *count* is the first t with ‖∇f(x_t)‖ ≤ ε, here the larger one of the
two functions. Where the slope is constant, steps of one length are taken many at a time; that is the same
recursion.

**Methods.** ``fixed`` the best fixed step in hindsight on the pair, of a grid below 2 ln(1 + u)/u;
``paper`` clipping as in Theorem 3 of the 2020 paper; ``vankov`` min{1/(2 L0), 1/(3 L1 g)}; ``soft`` 1/(L0 +
L1 g), soft clipping; ``exact`` ln(1 + L1 g/L0)/(L1 g), the best step in one dimension; ``normalized`` steps
of length ε/(L0 + L1 ε); ``polyak`` (f - f*)/g²; ``momentum`` the step of ``vankov`` with g replaced by an
average of gradients, β = 0.9.
Series, one row per result; a column that says nothing about a part is NaN or empty:

=============  ==========================================================================================
column         meaning
=============  ==========================================================================================
``part``       ``pair`` (D fixed, u grows), ``gain`` (D = Ψ(M) grows), ``accuracy`` (ε falls, on the pair),
               ``random`` (ε falls, on random functions), ``noise`` (u grows, noisy gradients), ``bias``,
               ``outside`` (functions outside the class)
``method``     the method; in ``outside`` the function
``noise``      the kind of noise
``seed``       number of the random function
``u``          L1 M/L0
``eps``        ε, in units of L0/L1; in ``random`` of the gradient norm at the start
``gap``        D, in units of L0/L1²
``count``      the count, ``inf`` if ε was not reached; in ``noise`` the first t by which half of the runs had
               reached ε
``steep``      count on the steep function
``slow``       count on the slow function
``upper``      the bound on the count that is proved for the method; in ``gain`` for the quotient
``lower``      the lower bound for the method, likewise
``recalled``   the paper's number for the method, constants as recalled
``step``       the best fixed step over 2 ln(1 + u)/u
``threshold``  clipping threshold c, in units of the noise's standard deviation
``value``      ``gain``: count of ``fixed`` over that of ``soft``; ``bias``: mean of f'(x) over the last half
               of the steps; ``outside``: the curvature; ``noise``: share of runs that left every bound
``error``      ``bias``: standard error of ``value`` over runs; ``outside``: the gradient norm
``x``          ``outside``: where
=============  ==========================================================================================

Scalars. METHOD is one of the methods, RANGE is ``fine`` (ε ≤ 0.03) or ``coarse`` (ε ≥ 3).

=====================================  ==================================================================
key                                    meaning
=====================================  ==================================================================
``pair.decades``                       decades of u
``pair.METHOD.over_upper_max``         largest count over its upper bound
``pair.METHOD.over_lower_min``         smallest count over its lower bound
``pair.METHOD.loses_up_to``            largest u at which the method needs more steps than ``fixed``; 0 if at
                                       none
``pair.METHOD.gain_most``              largest quotient of the counts of ``fixed`` and of the method
``gain.least``, ``gain.most``          range of the gain over D
``gain.over_lower_min``                smallest gain over its lower bound
``gain.over_upper_max``                largest gain over its upper bound
``gain.slope``                         slope of ln(gain) on ln(u/ln(1 + u)), u ≥ 10
``accuracy.METHOD.RANGE``              slope of -ln(count) on ln ε by least squares
``accuracy.METHOD.RANGE_low``          smallest slope between neighbouring ε in the range
``accuracy.METHOD.RANGE_high``         the largest
``random.functions``                   number of random functions
``random.METHOD.exponent``             mean over them of the slope of -ln(count) on ln ε, last two decades
``random.METHOD.exponent_low``         end of its 95 % bootstrap interval over functions
``random.METHOD.exponent_high``        the other end
``random.METHOD.exponent_most``        the largest slope of one function
``random.METHOD.over_upper_max``       largest count over its upper bound
``noise.KIND.gain``                    counts of ``fixed`` over those of ``clipped`` at the largest u
``noise.KIND.gain_first``              the same at the smallest u
``noise.KIND.lost``                    share of runs of the best ``fixed`` that left every bound, largest u
``bias.KIND.most``                     largest of \\|bias\\| less three standard errors, over the closed form
``bias.worst.least``                   smallest bias plus three standard errors over the closed form, for
                                       the noise that is worst for c
``bias.slope``                         slope of ln(bias) on ln c for that noise, c ≥ 1
``outside.FUNCTION.growth``            last over first curvature along the path; for ``reparametrised`` of
                                       curvature over gradient norm, which grows too
``outside.FUNCTION.gradient``          last gradient norm over last curvature
=====================================  ==================================================================

KIND in ``noise``: ``coin`` (± τ), ``heavy`` (Student's t with 1.5 degrees of freedom, times τ: no variance),
``skewed`` (two values, rarely 9 τ). KIND in ``bias``: ``coin``, ``heavy`` (3 degrees of freedom), ``skewed``
(exponential less its mean), ``worst`` (two values, the worst for c), all of standard deviation 1.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradclip import problems, theory
from gradclip.experiments._shell import chosen, html_table, recorded, run_tasks
from gradclip.records import Record

NAME = "convergence"
BETA = 0.9
SLACK = 1e-6  # the slope of the slow function is this much above ε, or descent would stop at once
METHODS = ("fixed", "paper", "vankov", "soft", "exact", "normalized", "polyak", "momentum")
OUTSIDE = ("sum", "reparametrised", "network-square", "network-entropy")
NOISES = ("coin", "heavy", "skewed")
BIASES = ("coin", "heavy", "skewed", "worst")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions and hardware.

    Args:
        name: Name of the profile.
        pair_decades: The parts ``pair`` and ``gain`` have u up to ten to this power.
        per_decade: Values of u, ε and c per decade.
        pair_eps: ε of the part ``pair``.
        gain_eps: ε of the part ``gain``.
        fixed_steps: Fixed steps tried.
        functions: Random functions.
        noise_u: Values of u in the part ``noise``.
        noise_runs: Runs per setting.
        bias_runs: Runs per setting.
        bias_steps: Steps of each.
        limit: Steps after which a run counts as never done.
        device: ``"cpu"``; there is nothing here for a GPU.
        threads: CPU threads during the run.

    Raises:
        ValueError: The device is not the CPU.
    """

    name: str
    pair_decades: int
    per_decade: int
    pair_eps: float
    gain_eps: float
    fixed_steps: int
    functions: int
    noise_u: tuple[float, ...]
    noise_runs: int
    bias_runs: int
    bias_steps: int
    limit: int
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.device != "cpu":
            raise ValueError(f"device must be cpu, got {self.device!r}")

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration: ``smoke`` for tests, ``cpu`` for the book, ``paper`` with more of everything.

        Raises:
            ValueError: There is no such profile.
        """
        smoke = Config(
            name="smoke",
            pair_decades=3,
            per_decade=2,
            pair_eps=0.1,
            gain_eps=0.02,
            fixed_steps=8,
            functions=6,
            noise_u=(3.0, 30.0),
            noise_runs=16,
            bias_runs=16,
            bias_steps=600,
            limit=40_000,
        )
        cpu = dataclasses.replace(
            smoke,
            name="cpu",
            pair_decades=5,
            per_decade=4,
            fixed_steps=32,
            functions=60,
            noise_u=(3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
            noise_runs=64,
            bias_runs=200,
            bias_steps=6_000,
            limit=400_000,
        )
        paper = dataclasses.replace(
            cpu,
            name="paper",
            pair_decades=6,
            per_decade=8,
            fixed_steps=64,
            functions=400,
            noise_runs=256,
            bias_runs=1_000,
            bias_steps=20_000,
            limit=2_000_000,
        )
        return chosen(name, smoke, cpu, paper)


def run(config: Config, out: str | Path) -> Record:
    """Count, and save the record; go on where an earlier call was stopped.

    A finished record of the same configuration, source and versions is returned as it is.

    Args:
        config: What to run.
        out: Folder of all records.

    Returns:
        The record as read back from ``out``.
    """
    return recorded(NAME, config, out, functools.partial(_measure, config), None)


def _measure(
    config: Config, partial: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, float], float]:
    tasks = [functools.partial(lambda part: list(part(config)), part) for part in _PARTS]
    found, seconds = run_tasks(tasks, checkpoint=partial / "parts.pt", identity=identity, label=NAME)
    series = _table([row for rows in found for row in rows])
    return series, summarise(series), seconds


_WORDS = ("part", "method", "noise")
_NUMBERS = (
    "seed",
    "u",
    "eps",
    "gap",
    "count",
    "steep",
    "slow",
    "upper",
    "lower",
    "recalled",
    "step",
    "threshold",
    "value",
    "error",
    "x",
)


def _row(**values: Any) -> dict[str, Any]:
    plain = {key: value if isinstance(value, str) else float(value) for key, value in values.items()}
    return dict.fromkeys(_WORDS, "") | dict.fromkeys(_NUMBERS, math.nan) | plain


def _table(rows: list[dict[str, Any]]) -> dict[str, Array]:
    return {name: np.asarray([row[name] for row in rows]) for name in (*_WORDS, *_NUMBERS)}


# Descent on the two functions, many runs at once


def steep_count(step: Callable[[Array, Array], Array], x: Array, eps: Array, limit: int) -> Array:
    """Counts on the extremal function with L0 = L1 = 1 from the points ``x``.

    Args:
        step: h as a function of the gradient norms and of the gaps f(x) - f*, elementwise over all runs.
        x: Starting points, shape (n,).
        eps: ε, shape (n,).
        limit: Steps after which a run is given up.

    Returns:
        First t with ‖∇f(x_t)‖ ≤ ε, shape (n,); ``inf`` if there is none up to the limit, or x leaves
        [-600, 600].
    """
    x, count = x.copy(), np.full(x.shape, np.inf)
    for t in range(limit + 1):
        size = np.minimum(np.abs(x), 600.0)
        norm = np.expm1(size)
        count[(norm <= eps) & np.isinf(count)] = t
        going = np.isinf(count) & (size < 600.0)
        if not going.any():
            break
        h = step(norm, theory.phi(size))
        x = np.where(going, x - np.sign(x) * h * norm, x)
    return count


def slow_count(
    step: Callable[[Array, Array], Array], gap: Array, eps: Array, limit: int, *, jump: bool = True
) -> Array:
    """Counts on ``problems.ramp`` with L0 = 1 and slope (1 + 1e-6) ε, from the point where the gap is D.

    Args:
        step: h as a function of the gradient norms and of the gaps.
        gap: D, shape (n,).
        eps: ε, shape (n,).
        limit: Rounds after which a run is given up; a jump across the straight part is one round.
        jump: Take all steps of the straight part at once. For rules that look at the gradient norm only.

    Returns:
        First t with ‖∇f(x_t)‖ ≤ ε, ``inf`` if there is none up to the limit, shape (n,).
    """
    slope = (1 + SLACK) * eps
    a = 1.5 * slope
    x = a + gap / slope - 5 / 8 * a
    taken, count = np.zeros(x.shape), np.full(x.shape, np.inf)
    for _ in range(limit + 1):
        z = np.minimum(np.abs(x) / a, 1.0)
        norm = slope * z * (3 - z**2) / 2
        done = (norm <= eps) & np.isinf(count)
        count[done] = taken[done]
        if not np.isinf(count).any():
            break
        value = slope * a * (np.maximum(np.abs(x) / a - 1, 0.0) + z**2 * (6 - z**2) / 8)
        length = step(norm, value) * norm
        times = np.maximum(np.ceil((np.abs(x) - a) / length), 1.0) if jump else np.ones(x.shape)
        going = np.isinf(count)
        x = np.where(going, x - np.sign(x) * times * length, x)
        taken = np.where(going, taken + times, taken)
    return count


def momentum_counts(u: Array, gap: Array, eps: Array, limit: int) -> tuple[Array, Array]:
    """Counts of momentum clipping on the two functions: m⁺ = β m + (1 - β) ∇f, x⁺ = x - h(‖m‖) m.

    h(n) = min{1/2, 1/(3 n)}, the step ``vankov``. The straight part is crossed at once when m has become the
    slope to twelve digits.

    Args:
        u: Gradient norms at the start of the steep function, shape (n,).
        gap: D for the slow function, shape (n,).
        eps: ε, shape (n,).
        limit: Rounds after which a run is given up.

    Returns:
        Counts on the steep and on the slow function.
    """
    slope = (1 + SLACK) * eps
    a = 1.5 * slope

    def gradient_steep(x: Array) -> Array:
        return np.sign(x) * np.expm1(np.minimum(np.abs(x), 600.0))

    def gradient_slow(x: Array) -> Array:
        z = np.clip(x / a, -1.0, 1.0)
        return slope * z * (3 - z**2) / 2

    counts = []
    for gradient, x, straight in (
        (gradient_steep, np.log1p(u), np.full(u.shape, np.inf)),
        (gradient_slow, a + gap / slope - 5 / 8 * a, a),
    ):
        m, taken, count = np.zeros(x.shape), np.zeros(x.shape), np.full(x.shape, np.inf)
        for _ in range(limit + 1):
            g = gradient(x)
            done = (np.abs(g) <= eps) & np.isinf(count)
            count[done] = taken[done]
            going = np.isinf(count)
            if not going.any():
                break
            m = BETA * m + (1 - BETA) * g
            move = m * np.minimum(0.5, 1 / np.maximum(3 * np.abs(m), 1e-300))
            steady = (np.abs(x) > straight) & (np.abs(m - g) <= 1e-12 * np.abs(g))
            times = np.ones(x.shape)
            if steady.any():
                ahead = np.floor((np.abs(x) - straight)[steady] / np.abs(move[steady]))
                times[steady] = np.maximum(ahead, 1.0)
            x = np.where(going, x - times * move, x)
            taken = np.where(going, taken + times, taken)
        counts.append(count)
    return counts[0], counts[1]


def rule(method: str, eps: Array) -> Callable[[Array, Array], Array]:
    """The step of a method at L0 = L1 = 1, as a function of gradient norms and gaps.

    Args:
        method: One of ``METHODS`` except ``fixed`` and ``momentum``.
        eps: ε, which ``normalized`` knows.

    Returns:
        The step; a gradient of 0, which no run uses, is read as 1e-300.
    """

    def positive(norm: Array) -> Array:
        return np.maximum(norm, 1e-300)

    return {
        "paper": lambda g, F: theory.zhang_clipped_step(g, 1.0, 1.0),
        "vankov": lambda g, F: theory.clipped_step(g, 1.0, 1.0),
        "soft": lambda g, F: theory.quadratic_step(g, 1.0, 1.0),
        "exact": lambda g, F: theory.exact_step_1d(g, 1.0, 1.0),
        "normalized": lambda g, F: theory.normalized_step(positive(g), eps, 1.0, 1.0),
        "polyak": lambda g, F: theory.polyak_step(positive(g), F),
    }[method]


def pair_counts(method: str, u: Array, gap: Array, eps: Array, config: Config) -> tuple[Array, Array, Array]:
    """Counts of a method on the steep and on the slow function.

    Args:
        method: One of ``METHODS``.
        u: L1 M/L0, shape (n,).
        gap: D ≥ Ψ(M), shape (n,).
        eps: ε < M, shape (n,).
        config: For its limit and its number of fixed steps.

    Returns:
        The two counts and, for ``fixed``, the best step over 2 ln(1 + u)/u, else NaN; all of shape (n,).
    """
    start = np.log1p(u)
    if method == "momentum":
        return *momentum_counts(u, gap, eps, config.limit), np.full(u.shape, np.nan)
    if method != "fixed":
        step = rule(method, eps)
        steep = steep_count(step, start, eps, config.limit)
        slow = slow_count(step, gap, eps, config.limit, jump=method != "polyak")
        return steep, slow, np.full(u.shape, np.nan)
    # The worst of the two is least a little below the limit, so the grid is fine there.
    factors = 1 - np.geomspace(1e-4, 0.6, config.fixed_steps)
    h = factors[:, None] * theory.exact_step_limit_1d(u, 1.0, 1.0)
    shape = h.shape
    h, starts, accuracy, gaps = (np.broadcast_to(v, shape).ravel() for v in (h, start, eps, gap))
    steep = steep_count(lambda g, F: h, starts, accuracy, config.limit).reshape(shape)
    slow = slow_count(lambda g, F: h, gaps, accuracy, config.limit).reshape(shape)
    best = np.maximum(steep, slow).argmin(axis=0), np.arange(len(u))
    return steep[best], slow[best], factors[best[0]]


def proved_bounds(method: str, u: Array, gap: Array, eps: Array) -> tuple[Array, Array, Array]:
    """Upper bound, lower bound and the paper's number for a method at L0 = L1 = 1; NaN where there is none.

    Args:
        method: One of ``METHODS``.
        u: L1 M/L0.
        gap: D.
        eps: ε.

    Returns:
        The three, of the common shape.
    """
    u, gap, eps = np.broadcast_arrays(u, gap, eps)
    none = np.full(u.shape, np.nan)

    def least(step: Array) -> Array:
        return theory.iteration_lower_bound(step, gap, eps, 1.0)

    if method == "fixed":
        recalled = none.copy()
        recalled[u > 1] = theory.zhang_gd_iteration_lower_bound(gap[u > 1], eps[u > 1], u[u > 1], 1.0, 1.0)
        return (
            theory.gd_iteration_bound(gap, eps, u, 1.0, 1.0),
            theory.gd_iteration_lower_bound(gap, eps, u, 1.0, 1.0),
            recalled,
        )
    if method == "paper":
        return (
            theory.clipped_iteration_bound(gap, eps, 1.0, 1.0),
            least(theory.zhang_clipped_step(eps, 1.0, 1.0)),
            theory.zhang_clipped_iteration_bound(gap, eps, 1.0, 1.0),
        )
    if method == "polyak":
        # From both points the minimiser is at most this far; a gap of Ψ(ε) means a gradient of at most ε.
        distance = np.maximum(np.log1p(u), gap / eps + 1.5 * (1 + SLACK) * eps)
        accuracy = theory.gap_bound(eps, 1.0, 1.0)
        return theory.polyak_iteration_bound(distance, accuracy, 1.0, 1.0), none, none
    if method == "momentum":
        return none, none, none
    step = rule(method, eps)(eps, gap)
    upper = {
        "vankov": theory.vankov_iteration_bound(gap, eps, 1.0, 1.0, fraction=0.5),
        # In one dimension this step decreases f by at least Ψ(g).
        "exact": gap / theory.gap_bound(eps, 1.0, 1.0),
    }.get(method, theory.iteration_bound(gap, eps, 1.0, 1.0))
    return upper, least(step), none


def _pair_rows(part: str, u: Array, gap: Array, eps: Array, config: Config) -> Iterator[dict[str, Any]]:
    for method in METHODS:
        steep, slow, step = pair_counts(method, u, gap, eps, config)
        upper, lower, recalled = proved_bounds(method, u, gap, eps)
        count = np.maximum(steep, slow)
        for i in range(len(u)):
            yield _row(
                part=part,
                method=method,
                u=u[i],
                eps=eps[i],
                gap=gap[i],
                count=count[i],
                steep=steep[i],
                slow=slow[i],
                upper=upper[i],
                lower=lower[i],
                recalled=recalled[i],
                step=step[i],
            )


def _pair(config: Config) -> Iterator[dict[str, Any]]:
    u = np.geomspace(1, 10.0**config.pair_decades, config.pair_decades * config.per_decade + 1)
    gap = np.full(u.shape, float(theory.gap_bound(u[-1], 1.0, 1.0)))
    return _pair_rows("pair", u, gap, np.full(u.shape, config.pair_eps), config)


def _gain(config: Config) -> Iterator[dict[str, Any]]:
    decades = config.pair_decades + 1
    u = np.geomspace(0.1, 10.0 ** (decades - 1), decades * config.per_decade + 1)
    gap = theory.gap_bound(u, 1.0, 1.0)
    eps = np.full(u.shape, config.gain_eps)
    worst = {
        method: np.maximum(*pair_counts(method, u, gap, eps, config)[:2]) for method in ("fixed", "soft")
    }
    low, high = theory.gain_bounds(gap, eps, 1.0, 1.0)
    for i in range(len(u)):
        yield _row(
            part="gain",
            method="soft",
            u=u[i],
            eps=eps[i],
            gap=gap[i],
            count=worst["soft"][i],
            value=worst["fixed"][i] / worst["soft"][i],
            upper=high[i],
            lower=low[i],
        )


def _accuracy(config: Config) -> Iterator[dict[str, Any]]:
    eps = np.geomspace(100.0, 1e-3, 5 * config.per_decade + 1)
    u = np.full(eps.shape, 1000.0)
    return _pair_rows("accuracy", u, theory.gap_bound(u, 1.0, 1.0) * 100, eps, config)


# Random functions: sums of ridge functions in orthogonal directions. A rotation changes no count of a rule
# that looks at norms only, so the directions may be the axes. Name: (f', f - f*, L0, L1) with a scale b.
_RIDGES: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "cosh": (lambda z, b: b * np.sinh(b * z), lambda z, b: np.cosh(b * z) - 1, lambda b: b**2, lambda b: b),
    "quartic": (lambda z, b: 4 * z**3, lambda z, b: z**4, lambda b: 4 / b**2, lambda b: 2 * b),
    "exp": (lambda z, b: b * np.exp(b * z), lambda z, b: np.exp(b * z), lambda b: 0 * b, lambda b: b),
    "logistic": (
        lambda z, b: -b / (1 + np.exp(b * z)),
        lambda z, b: np.logaddexp(0, -b * z),
        lambda b: 0 * b,
        lambda b: b,
    ),
    "parabola": (lambda z, b: b * z, lambda z, b: b * z**2 / 2, lambda b: b, lambda b: 0 * b),
}


def random_functions(number: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Sums of one to six ridge functions in orthogonal directions, with their constants and starting points.

    Args:
        number: How many.
        seed: Of a generator of its own.

    Returns:
        Dicts with ``names`` and ``scales`` of the summands, ``x`` (shape (summands,)), ``L0``, ``L1`` and
        ``gap``, f(x) - f*.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        names = [str(name) for name in rng.choice(list(_RIDGES), size=rng.integers(1, 7))]
        # At least one summand has curvature where its gradient vanishes, so that L0 > 0.
        names[0] = str(rng.choice(["cosh", "quartic"]))
        scales = rng.uniform(0.5, 1.5, size=len(names))
        # Not near a minimum, where the gradient at the start, the measure of ε, would be small.
        x = rng.uniform(1, 3, size=len(names)) * rng.choice([-1.0, 1.0], size=len(names))
        pieces = list(zip(names, scales, x, strict=True))
        found.append(
            {
                "names": names,
                "scales": scales,
                "x": x,
                "L0": float(max(_RIDGES[name][2](b) for name, b in zip(names, scales, strict=True))),
                "L1": float(max(_RIDGES[name][3](b) for name, b in zip(names, scales, strict=True))),
                "gap": float(sum(_RIDGES[name][1](z, b) for name, b, z in pieces)),
            }
        )
    return found


RANDOM_METHODS = ("fixed", "paper", "vankov", "soft")


def _random(config: Config) -> Iterator[dict[str, Any]]:
    functions = random_functions(config.functions)
    # One long vector of all variables, those of one kind side by side; owner is the function of each.
    variables = sorted(
        (name, i, b, z)
        for i, f in enumerate(functions)
        for name, b, z in zip(f["names"], f["scales"], f["x"], strict=True)
    )
    kinds, owner, scales, start = (np.array(column) for column in zip(*variables, strict=True))
    parts = []
    for name in _RIDGES:
        found = np.flatnonzero(kinds == name)
        if found.size:
            part = slice(found[0], found[-1] + 1)
            parts.append((_RIDGES[name][0], part, scales[part]))

    def gradient(x: Array) -> Array:
        return np.concatenate([derivative(x[part], b) for derivative, part, b in parts])

    def norms(g: Array) -> Array:
        return np.sqrt(np.bincount(owner, g * g))

    L0, L1, gap = (np.array([f[key] for f in functions]) for key in ("L0", "L1", "gap"))
    M = theory.largest_gradient(gap, L0, L1)
    rules = {
        "fixed": lambda g: theory.gd_step(M, L0, L1),
        "paper": lambda g: theory.zhang_clipped_step(g, L0, L1),
        "vankov": lambda g: theory.clipped_step(g, L0, L1),
        "soft": lambda g: theory.quadratic_step(g, L0, L1),
    }
    parts.sort(key=lambda entry: entry[1].start)
    ladder = np.geomspace(10**-0.5, 10**-2.5, 2 * config.per_decade + 1)
    first = norms(gradient(start))
    for method, step in rules.items():
        x, counts = start.copy(), np.full((len(functions), len(ladder)), np.inf)
        for t in range(config.limit + 1):
            g = gradient(x)
            norm = norms(g)
            counts[(norm[:, None] <= ladder * first[:, None]) & np.isinf(counts)] = t
            if np.isfinite(counts).all():
                break
            x = x - step(norm)[owner] * g
        for i in range(len(functions)):
            for j, share in enumerate(ladder):
                eps = share * first[i]
                upper = {
                    "fixed": theory.gd_iteration_bound(gap[i], eps, M[i], L0[i], L1[i]),
                    "paper": theory.clipped_iteration_bound(gap[i], eps, L0[i], L1[i]),
                    "vankov": theory.vankov_iteration_bound(gap[i], eps, L0[i], L1[i], fraction=0.5),
                    "soft": theory.iteration_bound(gap[i], eps, L0[i], L1[i]),
                }[method]
                yield _row(
                    part="random",
                    method=method,
                    seed=i,
                    eps=share,
                    gap=gap[i],
                    count=counts[i, j],
                    upper=upper,
                )


# Noise


def draw(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Noise of mean 0: ``coin`` ± 1, ``heavy`` Student's t with 1.5 degrees of freedom, ``skewed`` 9 or -1/9.

    ``skewed`` is 9 with probability 1/82 and has variance 1; ``heavy`` has no variance.
    """
    if kind == "coin":
        return rng.choice(np.array([-1.0, 1.0]), size=shape)
    if kind == "heavy":
        return rng.standard_t(1.5, size=shape)
    return np.where(rng.random(shape) < 1 / 82, 9.0, -1 / 9)


def _noise(config: Config) -> Iterator[dict[str, Any]]:
    eps, tau = 0.5, 0.5
    factors = {"fixed": np.array([0.2, 0.4, 0.6, 0.8, 0.9, 0.95]), "clipped": np.array([0.1, 0.25, 0.5, 1.0])}
    for kind in NOISES:
        for u in config.noise_u:
            gap = float(theory.gap_bound(u, 1.0, 1.0))
            for method, grid in factors.items():
                rates = grid * (theory.exact_step_limit_1d(u, 1.0, 1.0) if method == "fixed" else 1.0)
                steep, lost = noisy_counts("steep", kind, method, rates, u, gap, eps, tau, config)
                slow, _ = noisy_counts("slow", kind, method, rates, u, gap, eps, tau, config, after=steep)
                best = int(np.maximum(steep, slow).argmin())
                yield _row(
                    part="noise",
                    method=method,
                    noise=kind,
                    u=u,
                    eps=eps,
                    gap=gap,
                    count=max(steep[best], slow[best]),
                    steep=steep[best],
                    slow=slow[best],
                    step=grid[best],
                    value=lost[best],
                )


def noisy_counts(
    function: str,
    kind: str,
    method: str,
    rates: Array,
    u: float,
    gap: float,
    eps: float,
    tau: float,
    config: Config,
    *,
    after: Array | None = None,
) -> tuple[Array, Array]:
    """First step by which half of the runs have met ‖∇f‖ ≤ ε, for each learning rate.

    Args:
        function: ``steep`` or ``slow``.
        kind: One of ``NOISES``; the noise is τ times :func:`draw`.
        method: ``fixed``, or ``clipped``: the gradient clipped at L0/L1 = 1.
        rates: Learning rates, shape (n,).
        u: Gradient norm at the start of the steep function.
        gap: D, for the slow function.
        eps: ε.
        tau: τ.
        config: For the number of runs and the limit.
        after: Counts on the other function. The search ends as soon as a rate is known for which the larger
            of its two counts is least; the rates that are not done by then get ``inf``.

    Returns:
        The counts, and the share of runs that left [-600, 600], both of shape (n,).
    """
    slope = (1 + SLACK) * eps
    a = 1.5 * slope
    steep = function == "steep"
    start = math.log1p(u) if steep else a + gap / slope - 5 / 8 * a
    shape = (len(rates), config.noise_runs)
    rng = np.random.default_rng([NOISES.index(kind), int(u), int(steep)])
    x, h = np.full(shape, start), rates[:, None]
    met, lost, counts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool), np.full(len(rates), np.inf)
    block = 256
    for t in range(config.limit + 1):
        size = np.abs(x)
        if steep:
            g = np.sign(x) * np.expm1(np.minimum(size, 600.0))
            lost |= size >= 600.0
            met |= (np.abs(g) <= eps) & ~lost
            fresh = True
        else:
            fresh = bool((size < a).any())
            g = slope * np.sign(x)
            if fresh:
                z = np.clip(x / a, -1.0, 1.0)
                g = slope * z * (3 - z**2) / 2
                met |= np.abs(g) <= eps
        if fresh:
            half = (met.mean(axis=1) >= 0.5) & np.isinf(counts)
            counts[half] = t
            # Rates that can still improve: neither done nor with half of their runs lost.
            hopeless = np.isfinite(counts) | (lost.mean(axis=1) > 0.5)
            settled = after is not None and bool((np.isfinite(counts) & (counts >= after)).any())
            if hopeless.all() or settled:
                break
        if t % block == 0:
            noise = tau * draw(kind, rng, (block, *shape))
        noisy = g + noise[t % block]
        if method == "clipped":
            noisy = np.clip(noisy, -1.0, 1.0)
        x = x - h * noisy
    return counts, lost.mean(axis=1)


def worst_noise(threshold: Array) -> tuple[Array, Array, Array]:
    """The two-valued noise of standard deviation 1 that is worst for a threshold c: values and probability.

    For c ≥ 1/2 it is 2c with probability q/(1 + q), q = 1/(4c²), and -2qc otherwise. For c < 1/2 the worst is
    the limit q → 1, a fair coin, at which nothing pulls the iterate to the bias; q = 0.97 does.

    Args:
        threshold: c, in units of the standard deviation.

    Returns:
        Upper value, lower value, probability of the upper one.
    """
    q = np.minimum(1 / (4 * threshold**2), 0.97)
    return 1 / np.sqrt(q), -np.sqrt(q), q / (1 + q)


def _bias(config: Config) -> Iterator[dict[str, Any]]:
    """Clipped SGD with learning rate 0.01 on x²/2, whose gradient is x."""
    thresholds = np.geomspace(0.1, 10.0, 2 * config.per_decade + 1)
    rng = np.random.default_rng(11)
    shape = (len(thresholds), config.bias_runs)
    c = thresholds[:, None]
    high, low, p = worst_noise(c)
    for kind in BIASES:
        x, total = np.full(shape, 1.0), np.zeros(shape)
        for t in range(config.bias_steps):
            if kind == "coin":
                noise = draw("coin", rng, shape)
            elif kind == "heavy":
                noise = rng.standard_t(3, size=shape) / math.sqrt(3)
            elif kind == "skewed":
                noise = rng.standard_exponential(size=shape) - 1
            else:
                noise = np.where(rng.random(shape) < p, high, low)
            x = x - 0.01 * np.clip(x + noise, -c, c)
            if t >= config.bias_steps // 2:
                total += x
        means = total / (config.bias_steps - config.bias_steps // 2)
        for i, threshold in enumerate(thresholds):
            yield _row(
                part="bias",
                method="clipped",
                noise=kind,
                threshold=threshold,
                value=means[i].mean(),
                error=means[i].std(ddof=1) / math.sqrt(config.bias_runs),
                upper=theory.clip_bias(1.0, threshold),
            )


# Outside the class


def outside(function: str, x: float) -> tuple[float, float]:
    """Gradient norm and curvature, at a point of a path, of a function that is in the class for no constants.

    ``sum``: cosh's walls cancel in (2 cosh x + sin x²) + (-2 cosh x), two functions of the class; the path is
    the stationary points of sin x², the one closest to x, curvature 4x². ``reparametrised``: exp(sinh y),
    which is eˣ, of the class, in another variable; curvature over gradient is cosh y + tanh y; at y = x.
    ``network-square`` and ``network-entropy``: two samples with input 1 and opposite labels, output
    w₂ tanh(w₁), square or logistic loss; at w₁ = 0, w₂ = x, where the gradient is zero for every x.

    Args:
        function: One of ``OUTSIDE``.
        x: The point.

    Returns:
        ‖∇f‖ and ‖∇²f‖, by automatic differentiation.

    Raises:
        ValueError: There is no such function.
    """
    if function not in OUTSIDE:
        raise ValueError(f"function must be one of {OUTSIDE}, got {function!r}")
    if function == "sum":
        x = math.sqrt(math.pi / 2 + 2 * math.pi * max(0, round((x**2 - math.pi / 2) / (2 * math.pi))))

    def f(v: torch.Tensor) -> torch.Tensor:
        if function == "sum":
            return (2 * torch.cosh(v[0]) + torch.sin(v[0] ** 2)) + (-2 * torch.cosh(v[0]))
        if function == "reparametrised":
            return torch.exp(torch.sinh(v[0]))
        output = v[1] * torch.tanh(v[0])
        if function == "network-square":
            return ((output - 1) ** 2 + (output + 1) ** 2) / 4
        return (torch.nn.functional.softplus(-output) + torch.nn.functional.softplus(output)) / 2

    point = torch.tensor([0.0, x] if function.startswith("network") else [x], dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(f, point)
    hessian = torch.autograd.functional.hessian(f, point)
    return gradient.norm().item(), torch.linalg.matrix_norm(hessian, ord=2).item()


def _outside(config: Config) -> Iterator[dict[str, Any]]:
    for function in OUTSIDE:
        # The stationary points up to 12: cosh 12 is 8e4, and beyond it the cancellation would cost digits.
        path = np.sqrt(np.pi / 2 + 2 * np.pi * np.arange(23))
        if function != "sum":
            path = np.geomspace(1.0, 4.0 if function == "reparametrised" else 100.0, 4 * config.per_decade)
        for x in path:
            gradient, curvature = outside(function, float(x))
            yield _row(part="outside", method=function, x=x, value=curvature, error=gradient)


_PARTS: tuple[Callable[[Config], Iterator[dict[str, Any]]], ...] = (
    _pair,
    _gain,
    _accuracy,
    _random,
    _noise,
    _bias,
    _outside,
)


# Statistics


def select(series: Mapping[str, Array], part: str, method: str = "", noise: str = "") -> dict[str, Array]:
    """The rows of a part, of a method and of a kind of noise; an empty word selects all."""
    keep = series["part"] == part
    for name, word in (("method", method), ("noise", noise)):
        if word:
            keep &= series[name] == word
    return {name: column[keep] for name, column in series.items()}


def _slope(x: Array, y: Array) -> float:
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 and np.isfinite(y).all() else math.nan


def summarise(series: Mapping[str, Array]) -> dict[str, float | int]:
    """The scalars that follow from the series; the module's docstring lists them.

    Args:
        series: The columns of a record.

    Returns:
        Key to number.
    """
    fixed = select(series, "pair", "fixed")
    scalars: dict[str, float | int] = {"pair.decades": float(np.log10(fixed["u"].max() / fixed["u"].min()))}
    for method in METHODS:
        rows = select(series, "pair", method)
        loses = rows["u"][rows["count"] > fixed["count"]]
        scalars |= {
            f"pair.{method}.over_upper_max": float(np.max(rows["count"] / rows["upper"])),
            f"pair.{method}.over_lower_min": float(np.min(rows["count"] / rows["lower"])),
            f"pair.{method}.loses_up_to": float(loses.max(initial=0.0)),
            f"pair.{method}.gain_most": float(np.max(fixed["count"] / rows["count"])),
        }
        rows = select(series, "accuracy", method)
        for name, keep in (("fine", rows["eps"] <= 0.0301), ("coarse", rows["eps"] >= 2.99)):
            x, y = np.log(rows["eps"][keep]), -np.log(rows["count"][keep])
            local = np.diff(y) / np.diff(x)
            scalars |= {
                f"accuracy.{method}.{name}": _slope(x, y),
                f"accuracy.{method}.{name}_low": float(local.min()),
                f"accuracy.{method}.{name}_high": float(local.max()),
            }
    gain = select(series, "gain")
    large = gain["u"] >= 10
    scalars |= {
        "gain.least": float(gain["value"].min()),
        "gain.most": float(gain["value"].max()),
        "gain.over_lower_min": float(np.min(gain["value"] / gain["lower"])),
        "gain.over_upper_max": float(np.max(gain["value"] / gain["upper"])),
        "gain.slope": _slope(np.log(gain["u"] / np.log1p(gain["u"]))[large], np.log(gain["value"])[large]),
    }
    scalars["random.functions"] = len(np.unique(select(series, "random")["seed"]))
    for method in RANDOM_METHODS:
        rows = select(series, "random", method)
        slopes = np.array(
            [
                _slope(np.log(rows["eps"][rows["seed"] == i]), -np.log(rows["count"][rows["seed"] == i]))
                for i in np.unique(rows["seed"])
            ]
        )
        low, high = bootstrap_interval(slopes)
        scalars |= {
            f"random.{method}.exponent": float(slopes.mean()),
            f"random.{method}.exponent_low": low,
            f"random.{method}.exponent_high": high,
            f"random.{method}.exponent_most": float(slopes.max()),
            f"random.{method}.over_upper_max": float(np.max(rows["count"] / rows["upper"])),
        }
    for kind in NOISES:
        plain, clipped = (select(series, "noise", method, kind) for method in ("fixed", "clipped"))
        gains = plain["count"] / clipped["count"]
        scalars |= {
            f"noise.{kind}.gain": float(gains[-1]),
            f"noise.{kind}.gain_first": float(gains[0]),
            f"noise.{kind}.lost": float(plain["value"][-1]),
        }
    for kind in BIASES:
        rows = select(series, "bias", noise=kind)
        beyond = np.abs(rows["value"]) - 3 * rows["error"]
        scalars[f"bias.{kind}.most"] = float(np.max(beyond / rows["upper"]))
    rows = select(series, "bias", noise="worst")
    scalars["bias.worst.least"] = float(np.min((rows["value"] + 3 * rows["error"]) / rows["upper"]))
    large = rows["threshold"] >= 0.999
    scalars["bias.slope"] = _slope(np.log(rows["threshold"][large]), np.log(rows["value"][large]))
    for function in OUTSIDE:
        rows = select(series, "outside", function)
        curvature = rows["value"] / (rows["error"] if function == "reparametrised" else 1.0)
        scalars |= {
            f"outside.{function}.growth": float(curvature[-1] / curvature[0]),
            f"outside.{function}.gradient": float(rows["error"][-1] / rows["value"][-1]),
        }
    return scalars


def bootstrap_interval(values: Array, *, samples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over independent values.

    Args:
        values: Shape (n,).
        samples: Resamples.
        seed: Of a generator of its own.

    Returns:
        The two ends.
    """
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), size=(samples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def hard_problems(
    u: float, gap: float, eps: float
) -> tuple[problems.Problem, float, problems.Problem, float]:
    """The steep and the slow function at L0 = L1 = 1 as problems, each followed by its starting point.

    Args:
        u: L1 M/L0.
        gap: D, for the slow one.
        eps: ε.

    Returns:
        Steep problem, start, slow problem, start.
    """
    slope = (1 + SLACK) * eps
    slow = problems.ramp(slope, 1.0)
    return problems.extremal(), math.log1p(u), slow, 1.5 * slope + gap / slope - 15 / 16 * slope


def line(low: float, high: float, points: int = 400) -> torch.Tensor:
    """Evenly spaced points of the real line, as a problem takes them: shape (points, 1), float64."""
    return torch.linspace(low, high, points, dtype=torch.float64)[:, None]


def iterates(problem: problems.Problem, start: float, h: float, steps: int) -> torch.Tensor:
    """Gradient descent with a fixed step in one variable: x_0, ..., x_steps, shape (steps + 1, 1)."""
    found = [torch.tensor([start], dtype=torch.float64)]
    for _ in range(steps):
        found.append(found[-1] - h * problem.gradient(found[-1]))
    return torch.stack(found)


_LABELS = {
    "fixed": "best fixed step",
    "paper": "clipped, the paper's constants",
    "vankov": "clipped, those of Vankov et al.",
    "soft": "soft clipping, 1/(L₀ + L₁g)",
    "exact": "best step in one dimension",
    "normalized": "normalised, length ε/(L₀ + L₁ε)",
    "momentum": "momentum, clipped",
    "polyak": "Polyak",
}


def table(record: Record) -> str:
    """Counts of the part ``pair`` at its two ends, with their relation to the bounds, as a table in HTML."""
    head = ("method", "first count", "last count", "loses up to U", "most of its upper bound")
    rows = {}
    for method, label in _LABELS.items():
        counts = select(record.series, "pair", method)["count"]
        loses, share = (record.scalars[f"pair.{method}.{key}"] for key in ("loses_up_to", "over_upper_max"))
        bound = "no bound" if math.isnan(share) else f"{share:.2g}"
        lost = "" if method == "fixed" else f"{loses:.2g}" if loses > 0 else "never"
        rows[label] = (f"{counts[0]:.3g}", f"{counts[-1]:.3g}", lost, bound)
    return html_table(head, rows)
