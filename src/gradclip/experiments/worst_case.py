"""Worst case of a gradient step in the plane: how tight the descent inequality is (article S5 to S7).

For sizes u = L1 g/L0 of the gradient the control value of :mod:`gradclip.tightness` is computed as a function
of the step and set beside what functions attain (one dimension, and functions of the plane whose gradient
turns) and beside the lemmas. No f changes by more than the control value; some f changes by as much as
``attained``. Everything is deterministic and in natural units: steps in units of 1/G, which is S7's step, and
changes of f in units of g²/G, with G = L0 + L1 g.

Series, one row per u and step; the columns from ``turn`` on depend on u alone and are repeated:

===============  =====================================================================================
column           meaning
===============  =====================================================================================
``u``            L1 g/L0, inf for L0 = 0
``share``        c = L1 g/G
``step``         η G
``worst``        the control value
``attained``     the largest change found among functions
``exact_1d``     the worst case in one dimension
``quadratic``    the article's parabola
``phi``          the φ lemma
``e2``           the lemma with e - 2, inf beyond r = 1/L1
``turn``         where the worst path starts to turn; up to it the worst case is ``exact_1d``
``best``         the minimiser of ``worst``
``best_most``    no longer step minimises the worst case over functions; ``turn`` is the least
``decrease``     -min ``worst``: some step guarantees this decrease
``ceiling``      -min ``attained``: no step guarantees more
``seventh``      what S7's step, 1, guarantees; exact, as ``turn`` is never less than 1
``limit``        where ``worst`` returns to 0: every shorter step decreases every f
``limit_most``   where ``attained`` does: some longer step increases some f
``half``         where ``worst`` meets the parabola: S5 holds up to it
``half_most``    where ``attained`` does: S5 fails for some f and some longer step
===============  =====================================================================================

Scalars:

=========================  ==========================================================================
key                        meaning
=========================  ==========================================================================
``at.U.NAME``              one of the last columns for one u, such as ``at.inf.limit``
``turn.critical_u``        the u up to which the worst path turns only where its slope vanishes
``turn.radius_inf``        L1 times the turning radius for L0 = 0
``half.least``             least ``half`` over all u
``limit.least``            least ``limit`` over all u
``limit.largest``          largest ``limit_most`` over all u
``limit.factor_least``     least ``limit`` over S6's limit, 2
``kept.least``             least share of ``ceiling`` that S7's step is sure to keep, over all u
``kept.most``              largest possible value of that least share: S7's decrease over ``decrease``
``gap.limit``              largest ``limit_most - limit``
``zero.R``                 the control value at L0 = 0, in units of g/L1, at radius R/L1, such as ``zero.1.5``
``check.transcribed``      largest difference from direct optimisation, extrapolated to infinitely many pieces
``check.transcribed_bar``  its error bar: the largest difference between half as many and all pieces
``check.grid``             largest difference from dynamic programming, on the finer grid
``check.grid_bar``         its error bar: the largest difference between coarser and finer grid
``check.interpolation``    largest relative difference from paths that the curves were not made from
``check.hamiltonian``      largest relative change of Pontryagin's first integral along a path
``check.cases``            number of pairs of u and step in the checks
=========================  ==========================================================================
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from tqdm import tqdm

from gradclip import theory, tightness
from gradclip.experiments._shell import chosen, recorded
from gradclip.records import Record
from gradclip.tightness import WorstCurve

NAME = "worst-case"

Array = NDArray[np.float64]

_FAR = 8.0  # beyond it, in units of 1/G, every bound here has long crossed every other


@dataclass(frozen=True)
class Config:
    """One computation.

    Args:
        name: Name of the profile.
        sizes: The values of u; ``inf`` stands for L0 = 0.
        longest: Longest step, in units of 1/G.
        points: Steps per u in the series.
        density: Paths per factor of ten of the final height (see :func:`gradclip.tightness.worst_curve`).
        checked_sizes: Values of u, among ``sizes``, at which the other solvers run.
        checked_steps: Steps at which they are compared.
        pieces: Pieces of the direct optimisation, even.
        spacing: Spacing of the finer grid of the dynamic programming, in units of g.
        device: ``cpu``; nothing here gains from a GPU.
        threads: CPU threads during the run.
    """

    name: str
    sizes: tuple[float, ...]
    longest: float
    points: int
    density: int
    checked_sizes: tuple[float, ...]
    checked_steps: tuple[float, ...]
    pieces: int
    spacing: float
    device: str = "cpu"
    threads: int = 1

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile: ``smoke`` for tests, ``cpu`` for the book, ``paper`` finer still.

        Raises:
            ValueError: There is no such profile.
        """
        smoke = Config(
            name="smoke",
            sizes=(1.0, math.inf),
            longest=5.2,
            points=30,
            density=3,
            checked_sizes=(math.inf,),
            checked_steps=(1.3, 2.0),
            pieces=32,
            spacing=0.2,
        )
        cpu = dataclasses.replace(
            smoke,
            name="cpu",
            sizes=(0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0, math.inf),
            points=105,
            density=10,
            checked_sizes=(1.0, 10.0, math.inf),
            checked_steps=(1.3, 1.8, 2.4, 3.0),
            pieces=64,
            spacing=0.05,
        )
        paper = dataclasses.replace(cpu, name="paper", density=24, pieces=256, spacing=0.025)
        return chosen(name, smoke, cpu, paper)


def run(config: Config, out: str | Path) -> Record:
    """Compute and save the record; a finished one made under the same conditions is returned as it is.

    Args:
        config: What to compute.
        out: Folder of all records.

    Returns:
        The record as read back from ``out``.
    """
    return recorded(NAME, config, out, functools.partial(_measure, config), None)


def _measure(
    config: Config, partial: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, float], float]:
    started = time.perf_counter()
    with tqdm(total=len(config.sizes) + len(config.checked_sizes), desc=NAME, unit="size") as bar:
        curves = {}
        for u in config.sizes:
            curves[u] = tightness.worst_curve(_share(u), longest=config.longest, density=config.density)
            bar.update()
        series, scalars = _tabulate(curves, config)
        scalars |= _check(curves, config, bar)
    return series, scalars, time.perf_counter() - started


def _share(u: float) -> float:
    return u / (1 + u) if math.isfinite(u) else 1.0


def _attained(share: float, step: Array) -> Array:
    one = theory.exact_bound_1d(1.0, step, 1 - share, share)
    return np.maximum(one, tightness.rotating_bound(share, step))


def landmarks(curve: WorstCurve) -> dict[str, float]:
    """The columns of the series that depend on u alone, for one curve.

    Args:
        curve: of :func:`gradclip.tightness.worst_curve`.

    Returns:
        name -> value, in natural units.
    """
    c, best = curve.share, curve.best_step()
    decrease = -float(curve(best))
    steps = np.linspace(0, _FAR, 4001)
    attained = _attained(c, steps)

    def at(s: float) -> float:
        return float(_attained(c, np.asarray(s)))

    def parabola(s: float | Array) -> float | Array:
        return s**2 / 2 - s

    def last_crossing(gap: Array, function: Callable[[float], float]) -> float:
        """The zero of ``function`` after the last step at which ``gap``, its values, is not positive."""
        index = int(np.flatnonzero(gap <= 0)[-1])
        return float(brentq(function, steps[index], steps[index + 1]))

    if best == curve.turning:  # the worst case is known up to here, and rises from here on in one dimension
        best_most, ceiling = best, decrease
    else:
        lowest = int(np.argmin(attained))
        around = (steps[lowest - 1], steps[lowest + 1])
        ceiling = -float(minimize_scalar(at, bounds=around, method="bounded").fun)
        best_most = last_crossing(attained + decrease, lambda s: at(s) + decrease)
    return {
        "turn": curve.turning,
        "best": best,
        "best_most": best_most,
        "decrease": decrease,
        "ceiling": ceiling,
        "seventh": -float(theory.exact_bound_1d(1.0, 1.0, 1 - c, c)),
        "limit": curve.descent_limit(),
        "limit_most": last_crossing(attained, at),
        "half": curve.half_limit(),
        "half_most": last_crossing(attained - parabola(steps), lambda s: at(s) - parabola(s)),
    }


def _tabulate(
    curves: Mapping[float, WorstCurve], config: Config
) -> tuple[dict[str, Array], dict[str, float]]:
    steps = np.linspace(0, config.longest, config.points)
    blocks, scalars, found = [], {}, []
    for u, curve in curves.items():
        c = curve.share
        row = landmarks(curve)
        found.append(row)
        bounds = {"exact_1d": theory.exact_bound_1d, "quadratic": theory.quadratic_bound}
        bounds |= {"phi": theory.phi_bound, "e2": theory.e2_bound}
        block = {"u": u, "share": c, "step": steps, "worst": curve(steps), "attained": _attained(c, steps)}
        block |= {name: bound(1.0, steps, 1 - c, c) for name, bound in bounds.items()}
        block |= row
        blocks.append({name: np.broadcast_to(values, steps.shape) for name, values in block.items()})
        label = f"{u:g}"
        scalars |= {f"at.{label}.{name}": value for name, value in row.items()}
    series = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    scalars |= {
        "turn.critical_u": tightness.critical_size(),
        "turn.radius_inf": float(tightness.turning_radius(1.0, 0.0, 1.0)),
        "half.least": min(row["half"] for row in found),
        "limit.least": min(row["limit"] for row in found),
        "limit.largest": max(row["limit_most"] for row in found),
        "limit.factor_least": min(row["limit"] for row in found) / 2,
        "kept.least": min(row["seventh"] / row["ceiling"] for row in found),
        "kept.most": min(row["seventh"] / row["decrease"] for row in found),
        "gap.limit": max(row["limit_most"] - row["limit"] for row in found),
    }
    if math.inf in curves:
        scalars |= {f"zero.{r:g}": float(curves[math.inf](r)) for r in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}
    return series, scalars


def _check(curves: Mapping[float, WorstCurve], config: Config, bar: tqdm) -> dict[str, float | int]:
    steps = np.array(config.checked_steps)
    worst = dict.fromkeys(
        ("transcribed", "transcribed_bar", "grid", "grid_bar", "interpolation", "hamiltonian"), 0.0
    )

    def note(name: str, difference: Array) -> None:
        worst[name] = max(worst[name], float(np.max(np.abs(difference))))

    for u in config.checked_sizes:
        curve, c = curves[u], _share(u)
        values = curve(steps)
        coarse, fine = (
            np.array([tightness.transcribed_value(c, s, pieces=n) for s in steps])
            for n in (config.pieces // 2, config.pieces)
        )
        note("transcribed", (4 * fine - coarse) / 3 - values)  # the midpoint rule has an error of 1/pieces²
        note("transcribed_bar", fine - coarse)
        coarse, fine = (
            tightness.grid_value(c, steps, spacing=h) for h in (2 * config.spacing, config.spacing)
        )
        note("grid", fine - values)
        note("grid_bar", fine - coarse)
        for height in np.sqrt(curve.height[1:-1] * curve.height[2:])[-18::2]:
            path = tightness.worst_path(c, height, samples=50)
            note("interpolation", (curve(path.step) - path.value) / (1 + abs(path.value)))
            drift = path.hamiltonian(c) - path.end[0]
            note("hamiltonian", drift / (1 + abs(path.end[0])))
        bar.update()
    scalars: dict[str, float | int] = {f"check.{name}": value for name, value in worst.items()}
    return scalars | {"check.cases": len(config.checked_sizes) * len(steps)}
