"""From a measurement to a learning rate and a threshold: where does the advice lie in the grid?

Three tasks: ``language``, a word-level LSTM, ``images``, a residual network with batch norm, and
``characters``, a small transformer, on which no part of a recipe was decided. On each, hard clipping is tuned
on a whole grid of learning rates and thresholds, and held against advice that comes from a short warm-up
alone::

    warm-up -> (‖∇f‖, smoothness) at every step -> line L0 + L1 ‖∇f‖ -> step 1/(L0 + L1 ‖∇f‖)

The plain recipe is the paper's: smoothness is the largest difference quotient along the step, the line lies
above all points, and the warm-up is ordinary training with a learning rate that somebody has guessed, clipped
at 1. Each further recipe changes one thing, and the last four are the combinations of two:

============  ======================================  ==========  ===========================  ============
recipe        smoothness                              line        warm-up                      step times
============  ======================================  ==========  ===========================  ============
``plain``     along the step,                         "envelope"  lr of the guess              1
              :func:`.path_smoothness`
``local``     Hessian times gradient over its length  "envelope"  lr of the guess              1
``median``    the same                                median      lr of the guess              1
``own``       the same                                median      :func:`.warm_up`,            1
                                                                  multiple 1
``own-2``     the same                                median      that of ``own``              2
``edge-1``    the same                                median      that of ``edge``             1
``edge``      the same                                median      :func:`.warm_up`,            2
                                                                  multiple 2
============  ======================================  ==========  ===========================  ============

The first three are run behind three guesses, ``short``, ``middle`` and ``long``, a factor of eight apart. So
a *candidate* is ``plain-short`` to ``median-long``, or one of the last four. These take apart what ``edge``
doubles together, the steps of the warm-up and the advised step; ``own`` and ``edge`` are what
``warm_up(...).recommend()`` gives. Beside the candidates stand four usual ways to choose without measuring:
``norm-1`` and ``norm-0.25``, a fixed threshold; ``none``, no threshold; and ``autoclip``, the tenth
percentile of the norms seen; each with its learning rate tuned on the axis of the grid. ``best`` is the best
cell.

Four stages. *Tuning*: the grid and AutoClip's learning rates, with one seed. *Confirmation*: the best cells,
of the grid and of each usual way, once more with another seed; the one with the least mean of both losses is
taken. *Warm-up*: every recipe's, with the evaluation seeds. *Evaluation*: what was taken, and every
candidate, with the evaluation seeds, all from the initial weights; only these runs are compared, seed by
seed. A seed decides the initial weights; all runs of a task read the same batches in the same order. A run is
given up when the mean loss of ten steps is not finite or above ten times that of guessing; its losses are
inf. So are those of a candidate without advice, because its warm-up ended before the eighth step:
a guessed one at a loss above ten times that of guessing, and any where nothing more can be measured.

Series, one row for each training run, and one for each step of a warm-up:

===================  ======================================================================================
column               meaning
===================  ======================================================================================
``task``             ``language``, ``images`` or ``characters``
``stage``            ``tuning``, ``confirmation``, ``evaluation`` or ``warm-up``
``name``             ``grid`` or ``autoclip`` in the tuning and confirmation; in the evaluation, what was
                     evaluated; of a warm-up, ``short``, ``middle``, ``long``, ``own`` or ``edge``
``seed``             seed of the initial weights
``lr``               learning rate
``max_norm``         threshold; nan for AutoClip
``L0``               of the line, loss over parameter², and 0 where :meth:`.Fit.recommend` takes it for 0;
                     nan if there is no line, and so is
``L1``               1 over parameter
``length``           length of the advised step at the warm-up's median gradient norm
``norm``             that gradient norm
``final``            mean training loss over the last tenth of the steps, nats
``valid``            validation loss after the last step, nats; measured in the evaluation only
``accuracy``         share of the held-out images with the right class, the same
``step``             of a warm-up: k, counted from 0
``loss``             its batch's loss before the step, nats
``grad_norm``        its gradient norm
``path``             largest difference quotient along the step at 1/6, 1/3, 1/2, 2/3, 5/6 of it; nan for
                     ``own`` and ``edge``
``local``            ‖∇²f g‖/‖g‖ there, g the gradient
``update_length``    length of the step
===================  ======================================================================================

Scalars. TASK is a task; NAME is ``best``, a usual way or a candidate; ADVICE is a candidate; RECIPE is
``plain``, ``local`` or ``median``; END is ``own`` or ``edge``. Behind ``train``, ``valid`` and ``accuracy``,
``_min`` and ``_max`` are the least and the greatest value over the evaluation seeds; behind ``gap``,
``gain`` to ``gain_own`` and all of ``doubling``, ``_low`` and ``_high`` are the ends of the 95 % interval,
Student's t over the seeds. Nothing is corrected for the number of comparisons.

The four numbers of a line, ``L0`` to ``max_norm``, are those of one seed: the one whose ``length`` is the
median, of an even number of seeds the shorter of the two in the middle. So they belong together; they are nan
if a seed has no advice.

============================  ==============================================================================
key                           meaning
============================  ==============================================================================
``TASK.NAME.train``           ``final``, mean over the evaluation seeds
``TASK.NAME.valid``           ``valid``, the same
``TASK.NAME.accuracy``        ``accuracy``, the same
``TASK.NAME.lost``            evaluation runs that end above the loss of guessing, or had no advice
``TASK.NAME.gap``             ``final`` minus that of ``best``, mean over seeds
``TASK.NAME.lr``              learning rate; of advice, the multiple over L0, so inf where L0 is 0
``TASK.NAME.max_norm``        threshold; of advice, L0/L1
``TASK.NAME.beaten_by``       share of the grid's cells whose ``final`` is below ``TASK.NAME.train``
``TASK.ADVICE.L0``            of the line, as in the series
``TASK.ADVICE.L1``            the same
``TASK.ADVICE.normalised``    evaluation seeds whose line has L0 = 0: all steps are equally long
``TASK.ADVICE.octaves``       log2 of the length of its step over that of the best cell's, median over seeds;
                              of a seed, both are taken at one gradient norm, the ``norm`` of ``own``
``TASK.ADVICE.clipped``       share of the warm-up's gradient norms above L0/L1, mean over seeds
``TASK.RECIPE.spread``        octaves between the greatest and the least of the median ``length`` of its
                              three guesses, each at its own warm-up's ``norm``; inf if one has no advice
``TASK.END.cost``             time of its warm-up in training steps, median over seeds
``TASK.edge.gain``            ``final`` of ``plain-middle`` minus that of ``edge``, mean over seeds
``TASK.edge.gain_short``      the same against ``plain-short``
``TASK.edge.gain_long``       the same against ``plain-long``
``TASK.edge.gain_own``        the same against ``own``; the sum of the next two
``TASK.doubling.advice``      what twice the advised step gains: ``final`` of ``own`` minus that of ``own-2``,
                              and of ``edge-1`` minus that of ``edge``, mean of the two and over seeds
``TASK.doubling.steps``       what a warm-up with twice the steps gains: ``own`` minus ``edge-1``, and
                              ``own-2`` minus ``edge``, the same
``TASK.doubling.difference``  the first minus the second, which is ``edge-1`` minus ``own-2``
``TASK.best.edge``            whether the best cell lies at an end of an axis
``TASK.grid.cost``            training steps that tuning the grid takes
``TASK.grid.spread``          between thresholds of at most 1, each at its best learning rate: greatest minus
                              least loss, one seed
``TASK.grid.unclipped``       loss of the best cell without a threshold minus that of the best cell, one seed
``TASK.tolerance``            what counts as nearly as good, nats
``TASK.guess``                loss of guessing uniformly, nats
``TASK.steps``                steps of a run
``TASK.warm_up``              steps of a warm-up
``TASK.parameters``           number of parameters
``TASK.sha256``               hash of the data
``runs``                      number of training runs
============================  ==============================================================================
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradclip.experiments._shell import chosen, html_table, paired, recorded, run_tasks, tf32, with_range
from gradclip.experiments._tasks import Characters, Language, Pictures, losses
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD
from gradclip.records import Record
from gradclip.rules import clip_factor
from gradclip.smoothness import Fit, directional_smoothness, fit, path_smoothness, warm_up
from gradclip.smoothness.hessian import NotFiniteError
from gradclip.smoothness.warmup import median_line
from gradclip.thresholds import Percentile

NAME = "threshold"
TASKS = ("language", "images", "characters")
GUESSES = ("short", "middle", "long")
GUESSED_NORM = 1.0
BLOCK = 10  # steps between two looks at the loss
FEWEST = 8  # points of a line
PERCENTILE = 10.0


@dataclass(frozen=True)
class Recipe:
    """How a warm-up becomes a step.

    Args:
        label: Name in figures and tables.
        smoothness: Column of the series.
        line: Method of the line: "envelope", or "median" for the quantile 1/2.
        multiple: Length of the advised step in units of 1/(L0 + L1 g).
    """

    label: str
    smoothness: str
    line: str
    multiple: float = 1.0


RECIPES = {
    "plain": Recipe("plain", "path", "envelope"),
    "local": Recipe("local curvature", "local", "envelope"),
    "median": Recipe("median line", "local", "median"),
    "own": Recipe("own steps", "local", "median"),
    "own-2": Recipe("own steps, advice × 2", "local", "median", multiple=2.0),
    "edge-1": Recipe("edge's steps, advice × 1", "local", "median"),
    "edge": Recipe("on the edge", "local", "median", multiple=2.0),
}
#: Behind a guessed learning rate.
GUESSED = ("plain", "local", "median")
#: Lengths of the steps of warm-ups that find their own, in units of 1/h.
MULTIPLES = {"own": 1.0, "edge": 2.0}
OWN = tuple(MULTIPLES)
#: Recipes without a guess, each with its warm-up.
FREE = {"own": "own", "own-2": "own", "edge-1": "edge", "edge": "edge"}
#: Recipe and warm-up of every candidate.
CANDIDATES: dict[str, tuple[str, str]] = {
    **{f"{name}-{guess}": (name, guess) for name in GUESSED for guess in GUESSES},
    **{name: (name, source) for name, source in FREE.items()},
}
#: Ways to choose without measuring: thresholds of the grid, or None for AutoClip.
USUAL: dict[str, float | None] = {"norm-1": 1.0, "norm-0.25": 0.25, "none": math.inf, "autoclip": None}
LABELS = {"best": "best cell", "norm-1": "max_norm 1", "norm-0.25": "max_norm 0.25"}
LABELS |= {"none": "no threshold", "autoclip": "AutoClip"}
LABELS |= {
    name: RECIPES[recipe].label + ("" if recipe in FREE else f", {source}")
    for name, (recipe, source) in CANDIDATES.items()
}

Task = Language | Pictures | Characters
Row = dict[str, Any]
Columns = Mapping[str, np.ndarray]
Job = tuple[str, str, str, int, float, float, str]  # task, stage, name, seed, lr, max_norm, rule


@dataclass(frozen=True)
class Setting:
    """What is trained, for how long, and over which grid.

    Args:
        task: The network and its data.
        steps: Training steps of each run.
        warm_up: Steps of a warm-up.
        tolerance: What counts as nearly as good as the best cell, nats; fixed before the runs.
        lrs: Learning rates of the grid.
        guesses: Learning rates that warm-ups are guessed to need, short to long.
    """

    task: Task
    steps: int
    warm_up: int
    tolerance: float
    lrs: tuple[float, ...]
    guesses: tuple[float, float, float]


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions and hardware.

    Args:
        name: Name of the profile.
        language: The LSTM.
        images: The residual network.
        characters: The transformer.
        norms: Thresholds of the grids, 1, 0.25 and inf, which is no clipping, among them.
        tuning_seeds: The seed of the grids, and that of the confirmation.
        kept: Cells that are confirmed, of the grid and of each usual way.
        seeds: Seeds of the runs that are compared; at least two.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of a run.
        workers: Runs at a time, each in a process of its own. They gain where one run leaves the device idle.
        tf32: Whether a GPU may use TF32 in runs of which nothing but losses is recorded; warm-ups never do.

    Raises:
        ValueError: A number of steps is not a multiple of ten, a threshold is missing, or a seed serves both
            purposes.
    """

    name: str
    language: Setting
    images: Setting
    characters: Setting
    norms: tuple[float, ...]
    tuning_seeds: tuple[int, int]
    kept: int
    seeds: tuple[int, ...]
    device: str
    threads: int = 1
    workers: int = 1
    tf32: bool = False

    def __post_init__(self) -> None:
        if not {1.0, 0.25, math.inf} <= set(self.norms):
            raise ValueError(f"norms must have 1, 0.25 and inf among them, got {self.norms}")
        if len(self.seeds) < 2 or len({*self.tuning_seeds, *self.seeds}) < 2 + len(self.seeds):
            raise ValueError(
                f"seeds must be two or more, and none of the tuning's {self.tuning_seeds}, got {self.seeds}"
            )
        for name in TASKS:
            if self.setting(name).steps % BLOCK:
                raise ValueError(
                    f"steps must be a multiple of {BLOCK}, got {self.setting(name).steps} for {name}"
                )

    def setting(self, task: str) -> Setting:
        """The setting of a task."""
        return {"language": self.language, "images": self.images, "characters": self.characters}[task]

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run: small networks on the reference manual
        and on scikit-learn's digits. ``short`` has the Penn Treebank and CIFAR-10, and networks that one CPU
        thread trains in a quarter of an hour. ``paper`` has the released LSTM, ResNet-20 and a transformer of
        four layers, on a GPU if there is one.

        Raises:
            ValueError: There is no such profile.
        """
        cpu = Config(
            name="cpu",
            language=Setting(
                Language("reference-manual", embedding=24, hidden=24, layers=1, batch=10, bptt=10),
                steps=120,
                warm_up=30,
                tolerance=0.2,
                lrs=_quadrupling(-1),
                guesses=(0.5, 4.0, 32.0),
            ),
            images=Setting(
                Pictures("digits", blocks=1, width=4, batch=32, batch_norm=True, held_out=237, augment=False),
                steps=50,
                warm_up=30,
                tolerance=0.2,
                lrs=_quadrupling(-2),
                guesses=(1 / 16, 0.5, 4.0),
            ),
            characters=Setting(
                Characters("reference-manual", width=32, heads=2, layers=2, context=32, batch=8),
                steps=80,
                warm_up=30,
                tolerance=0.1,
                lrs=_quadrupling(-3),
                guesses=(1 / 32, 0.25, 2.0),
            ),
            norms=(1 / 16, 0.25, 1.0, 4.0, math.inf),
            tuning_seeds=(0, 100),
            kept=2,
            seeds=(1, 2, 3, 4),
            device="cpu",
        )
        smoke = dataclasses.replace(
            cpu,
            name="smoke",
            language=dataclasses.replace(
                cpu.language,
                task=Language("reference-manual", embedding=8, hidden=12, layers=2, batch=4, bptt=4),
                steps=10,
                warm_up=8,
                lrs=(1.0, 16.0),
            ),
            images=dataclasses.replace(
                cpu.images,
                task=Pictures(
                    "digits", blocks=1, width=2, batch=8, batch_norm=True, held_out=1300, augment=False
                ),
                steps=10,
                warm_up=8,
                lrs=(0.25, 4.0),
            ),
            characters=dataclasses.replace(
                cpu.characters,
                task=Characters("reference-manual", width=8, heads=2, layers=1, context=8, batch=4),
                steps=10,
                warm_up=8,
                lrs=(0.25, 4.0),
            ),
            norms=(0.25, 1.0, math.inf),
            kept=1,
            seeds=(1, 2),
        )
        short = dataclasses.replace(
            cpu,
            name="short",
            language=dataclasses.replace(
                cpu.language,
                task=Language("penn-treebank", embedding=32, hidden=64, layers=2, batch=10, bptt=15),
                steps=150,
            ),
            images=dataclasses.replace(
                cpu.images,
                task=Pictures(
                    "cifar10", blocks=1, width=8, batch=32, batch_norm=True, held_out=2000, augment=True
                ),
                steps=90,
                tolerance=0.1,
            ),
            characters=dataclasses.replace(
                cpu.characters,
                task=Characters("penn-treebank", width=48, heads=4, layers=2, context=48, batch=8),
                steps=150,
            ),
        )
        paper = dataclasses.replace(
            cpu,
            name="paper",
            language=dataclasses.replace(
                cpu.language,
                task=Language("penn-treebank", embedding=200, hidden=512, layers=2, batch=256, bptt=70),
                steps=500,
                warm_up=40,
            ),
            images=dataclasses.replace(
                cpu.images,
                task=Pictures(
                    "cifar10", blocks=3, width=16, batch=128, batch_norm=True, held_out=5000, augment=True
                ),
                steps=1000,
                warm_up=40,
                tolerance=0.1,
            ),
            characters=dataclasses.replace(
                cpu.characters,
                task=Characters("penn-treebank", width=256, heads=8, layers=4, context=128, batch=32),
                steps=1000,
                warm_up=40,
            ),
            device="cuda" if torch.cuda.is_available() else "cpu",
            workers=4,
            tf32=True,
        )
        return chosen(name, smoke, cpu, short, paper)


def _quadrupling(first: int) -> tuple[float, ...]:
    return tuple(4.0 ** (first + k) for k in range(6))


def run(config: Config, out: str | Path) -> Record:
    """Train all runs and save the record; go on after the last finished run of a call that was stopped.

    A finished record of the same configuration, source, data, device and versions is returned as it is.

    Args:
        config: What to run.
        out: Folder of all records.

    Returns:
        The record as read back from ``out``.

    Raises:
        DataError: A data set is missing or damaged.
    """
    hashes = "".join(_task(config, task).sha256 for task in TASKS)
    sha256 = hashlib.sha256(hashes.encode()).hexdigest()
    recipes = {name: dataclasses.asdict(recipe) for name, recipe in RECIPES.items()}
    measure = functools.partial(_measure, config)
    return recorded(NAME, config, out, measure, sha256, recipes=recipes, multiples=dict(MULTIPLES))


# A worker makes the task of the configuration that it is sent, and keeps it for its next run.
@functools.lru_cache(maxsize=len(TASKS))
def _task(config: Config, task: str) -> Task:
    return dataclasses.replace(config.setting(task).task, device=config.device)


def _measure(
    config: Config, partial: Path, identity: Mapping[str, Any]
) -> tuple[Columns, dict[str, Any], float]:
    stage = functools.partial(run_tasks, identity=identity, workers=config.workers, threads=config.threads)
    rows: list[Row] = []
    seconds = 0.0
    # Each stage follows from the rows before it.
    for name, work in (
        ("tuning", _tuning),
        ("confirmation", _confirming),
        ("warm-up", _warming),
        ("evaluation", _evaluating),
    ):
        found, taken = stage(work(config, rows), checkpoint=partial / f"{name}.pt", label=f"{NAME} {name}")
        rows += itertools.chain.from_iterable(found)
        seconds += taken
    # What a clock says is no part of the series, which two runs shall have in common.
    clock = [{key: row[key] for key in ("task", "stage", "name", "seconds")} for row in rows]
    series = {name: np.asarray([row[name] for row in rows]) for name in rows[0] if name != "seconds"}
    scalars = summarise(series, config) | _costs(clock, config)
    for task in TASKS:
        here = _task(config, task)
        scalars[f"{task}.parameters"] = sum(p.numel() for p in here.model(0).parameters())
        scalars[f"{task}.sha256"] = here.sha256
    scalars["runs"] = int(np.isin(series["stage"], ("tuning", "confirmation", "evaluation")).sum())
    return series, scalars, seconds


def _row(task: str, stage: str, name: str, seed: int, **values: float) -> Row:
    numbers = ("lr", "max_norm", "L0", "L1", "length", "norm", "final", "valid", "accuracy")
    numbers += ("step", "loss", "grad_norm", "path", "local", "update_length", "seconds")
    return {
        "task": task,
        "stage": stage,
        "name": name,
        "seed": seed,
        **dict.fromkeys(numbers, math.nan),
        **values,
    }


def _tuning(config: Config, rows: Sequence[Row]) -> list[functools.partial]:
    jobs = []
    for task in TASKS:
        lrs = config.setting(task).lrs
        jobs += [(task, "tuning", "grid", lr, norm) for lr, norm in itertools.product(lrs, config.norms)]
        jobs += [(task, "tuning", "autoclip", lr, math.nan) for lr in lrs]
    return [
        functools.partial(_train, config, task, stage, name, config.tuning_seeds[0], lr, norm, "hard")
        for task, stage, name, lr, norm in jobs
    ]


def _groups(rows: Sequence[Row], task: str, stage: str) -> dict[str, dict[tuple[float, float], float]]:
    """Losses of the cells that ``best`` and each usual way can choose from, in one stage."""
    here = [row for row in rows if (row["task"], row["stage"]) == (task, stage)]
    groups = {"best": {_cell(row): row["final"] for row in here if row["name"] == "grid"}}
    for way, norm in USUAL.items():
        if norm is None:
            groups[way] = {_cell(row): row["final"] for row in here if row["name"] == way}
        else:
            groups[way] = {cell: loss for cell, loss in groups["best"].items() if cell[1] == norm}
    return groups


def _cell(row: Row) -> tuple[float, float | None]:
    # None in place of nan, which is not equal to itself and so would never be found again.
    return row["lr"], None if math.isnan(row["max_norm"]) else row["max_norm"]


def _confirming(config: Config, rows: Sequence[Row]) -> list[functools.partial]:
    """The best cells once more; a cell that two ways would have confirmed is run once."""
    jobs = {}
    for task in TASKS:
        for way, found in _groups(rows, task, "tuning").items():
            for lr, norm in sorted(found, key=found.get)[: config.kept]:
                name = "autoclip" if way == "autoclip" else "grid"
                jobs[task, "confirmation", name, config.tuning_seeds[1], lr, norm] = None
    return [functools.partial(_train, config, *job[:5], _or_nan(job[5]), "hard") for job in jobs]


def _or_nan(norm: float | None) -> float:
    return math.nan if norm is None else norm


def _warming(config: Config, rows: Sequence[Row]) -> list[functools.partial]:
    jobs = []
    for task, seed in itertools.product(TASKS, config.seeds):
        guesses = zip(GUESSES, config.setting(task).guesses, strict=True)
        jobs += [functools.partial(_guessed, config, task, name, seed, lr) for name, lr in guesses]
        jobs += [functools.partial(_own, config, task, name, seed) for name in OWN]
    return jobs


def _evaluating(config: Config, rows: Sequence[Row]) -> list[functools.partial]:
    jobs = []
    for task in TASKS:
        tuned, again = (_groups(rows, task, stage) for stage in ("tuning", "confirmation"))
        for way in tuned:
            # A cell that only another way has confirmed was not among the best of this one.
            tried = sorted(tuned[way], key=tuned[way].get)[: config.kept]
            lr, norm = min(tried, key=lambda cell: tuned[way][cell] + again[way][cell])
            jobs += [
                functools.partial(_train, config, task, "evaluation", way, s, lr, _or_nan(norm), "hard")
                for s in config.seeds
            ]
        for name, seed in itertools.product(CANDIDATES, config.seeds):
            wanted = (task, "warm-up", CANDIDATES[name][1], seed)
            points = [row for row in rows if (row["task"], row["stage"], row["name"], row["seed"]) == wanted]
            jobs.append(functools.partial(_advised, config, task, name, seed, points))
    return jobs


def line(recipe: str, norms: Sequence[float], smoothness: Sequence[float]) -> Fit:
    """The line of a recipe through eight points or more."""
    if RECIPES[recipe].line == "median":
        return median_line(norms, smoothness)
    return fit(norms, smoothness, method="envelope")


def _advised(
    config: Config, task: str, name: str, seed: int, points: Sequence[Mapping[str, float]]
) -> list[Row]:
    """One run with the advice of a candidate, whose warm-up left these rows."""
    if len(points) < FEWEST:
        lost = {"final": math.inf, "valid": math.inf, "accuracy": math.nan}
        return [_row(task, "evaluation", name, seed, **lost)]
    recipe = CANDIDATES[name][0]
    norms = [point["grad_norm"] for point in points]
    found = line(recipe, norms, [point[RECIPES[recipe].smoothness] for point in points])
    multiple, slope, norm = RECIPES[recipe].multiple, found.L1, float(np.median(norms))
    step = found.recommend(multiple)
    intercept = 0.0 if step.rule == "normalize" else found.L0
    [row] = _train(config, task, "evaluation", name, seed, step.lr, step.max_norm, step.rule)
    length = multiple * norm / (intercept + slope * norm)
    return [{**row, "L0": intercept, "L1": slope, "norm": norm, "length": length}]


def _train(config: Config, *job: Any) -> list[Row]:
    with tf32(config.tf32):
        return _trained(config, *job)


def _trained(
    config: Config, task: str, stage: str, name: str, seed: int, lr: float, max_norm: float, rule: str
) -> list[Row]:
    """One run, as a list of one row."""
    setting, work = config.setting(task), _task(config, task)
    model = work.model(seed)
    threshold = Percentile(PERCENTILE) if name == "autoclip" else max_norm
    optimizer = ClippedSGD(list(model.parameters()), lr, max_norm=threshold, rule=rule)
    values, state = [], work.start()
    start = time.perf_counter()
    lost = False
    for k in range(setting.steps):
        optimizer.zero_grad()
        value, state = work.loss(model, k, state)
        value.backward()
        optimizer.step()
        values.append(value.detach())
        # Read once a block: at every reading a GPU would wait for the CPU.
        if (k + 1) % BLOCK == 0:
            lost = not torch.stack(values[-BLOCK:]).mean().item() <= 10 * work.guess
            if lost:
                break
    seconds = (time.perf_counter() - start) / len(values)
    row = _row(task, stage, name, seed, lr=lr, max_norm=max_norm, seconds=seconds)
    if lost:
        return [{**row, "final": math.inf, "valid": math.inf if stage == "evaluation" else math.nan}]
    row["final"] = float(torch.stack(values[-(setting.steps // 10) :]).double().mean())
    return [row | (work.evaluate(model) if stage == "evaluation" else {})]


def _guessed(config: Config, task: str, name: str, seed: int, lr: float) -> list[Row]:
    """A warm-up by clipped steps, measured: one row per step, until it is given up."""
    work = _task(config, task)
    model = work.model(seed)
    params, state, rows = list(model.parameters()), work.start(), []
    for k in range(config.setting(task).warm_up):
        value, after = work.loss(model, k, state)
        if not value.item() <= 10 * work.guess:
            break
        gradient = list(torch.autograd.grad(value, params))
        norm = total_norm(gradient)
        if not 0 < norm.item() < math.inf:
            break
        step = [-lr * clip_factor(norm, GUESSED_NORM) * g for g in gradient]
        batch = losses(work, model, k, state)
        path = path_smoothness(batch, params, step, grad=gradient)
        try:
            local = directional_smoothness(batch, params, gradient)
        except NotFiniteError:
            break
        if not (local > 0 and 0 < path.value < math.inf):
            break
        rows.append(
            _row(
                task,
                "warm-up",
                name,
                seed,
                lr=lr,
                max_norm=GUESSED_NORM,
                step=k,
                loss=value.item(),
                grad_norm=path.grad_norm,
                path=path.value,
                local=local,
                update_length=path.step_norm,
            )
        )
        with torch.no_grad():
            for p, d in zip(params, step, strict=True):
                p.add_(d)
        state = after
    return rows


def _own(config: Config, task: str, name: str, seed: int) -> list[Row]:
    """A warm-up by steps that find their own length: one row per step."""
    work = _task(config, task)
    model = work.model(seed)
    batches = _batches(work, model, config.setting(task).warm_up)
    start = time.perf_counter()
    found = warm_up(batches, list(model.parameters()), multiple=MULTIPLES[name])
    seconds = time.perf_counter() - start
    columns = (found.losses, found.grad_norms, found.smoothness, found.update_lengths)
    return [
        _row(
            task,
            "warm-up",
            name,
            seed,
            step=k,
            loss=loss,
            grad_norm=norm,
            local=smoothness,
            update_length=length,
            seconds=seconds,
        )
        for k, (loss, norm, smoothness, length) in enumerate(zip(*columns, strict=True))
    ]


def _batches(work: Task, model: nn.Module, steps: int) -> Iterator[Any]:
    """The losses of a run's first batches; what one leaves for the next comes from behind its step."""
    state = work.start()
    for k in range(steps):
        yield losses(work, model, k, state)
        with torch.no_grad():
            state = work.loss(model, k, state)[1]


def summarise(series: Columns, config: Config) -> dict[str, float | bool | int]:
    """The scalars that follow from the series; the module's docstring lists them.

    Args:
        series: The columns of a record.
        config: Its configuration.

    Returns:
        Key to number.
    """
    scalars: dict[str, float | bool | int] = {}
    for task in TASKS:
        here = _select(series, task=task)
        setting, guess = config.setting(task), _task(config, task).guess
        found = _evaluated(here, guess) | _grid(here, setting, config)
        for name in CANDIDATES:
            found |= _advice(here, name)
        for recipe in GUESSED:
            lengths = [found.pop(f"{recipe}-{guess}.length") for guess in GUESSES]
            found[f"{recipe}.spread"] = (
                math.inf if any(map(math.isnan, lengths)) else math.log2(max(lengths) / min(lengths))
            )
        for name in FREE:
            del found[f"{name}.length"]
        found |= _gains(here) | {
            "guess": guess,
            "tolerance": setting.tolerance,
            "steps": setting.steps,
            "warm_up": setting.warm_up,
            "grid.cost": len(setting.lrs) * len(config.norms) * setting.steps,
        }
        scalars |= {f"{task}.{key}": value for key, value in found.items()}
    return scalars


def _select(series: Columns, **where: Any) -> dict[str, np.ndarray]:
    """The rows in which the columns have these values."""
    rows = np.ones(len(series["task"]), dtype=bool)
    for key, value in where.items():
        rows &= series[key] == value
    return {name: values[rows] for name, values in series.items()}


def _interval(key: str, differences: np.ndarray) -> dict[str, float]:
    with np.errstate(invalid="ignore"):  # two runs that were given up leave no difference
        return dict(zip((key, f"{key}_low", f"{key}_high"), paired(differences), strict=True))


def _evaluated(series: Columns, guess: float) -> dict[str, float | int]:
    """Losses of what was evaluated, over the seeds and against the best cell."""
    scalars: dict[str, float | int] = {}
    cells = _select(series, stage="tuning", name="grid")["final"]
    best = _select(series, stage="evaluation", name="best")["final"]
    for name in LABELS:
        runs = _select(series, stage="evaluation", name=name)
        for key, column in (("train", "final"), ("valid", "valid"), ("accuracy", "accuracy")):
            values = runs[column]
            scalars |= {
                f"{name}.{key}": float(values.mean()),
                f"{name}.{key}_min": float(values.min()),
                f"{name}.{key}_max": float(values.max()),
            }
        with np.errstate(invalid="ignore"):
            scalars |= _interval(f"{name}.gap", runs["final"] - best)
        scalars |= {
            f"{name}.lost": int((runs["final"] > guess).sum()),
            f"{name}.lr": float(runs["lr"][0]),
            f"{name}.max_norm": float(runs["max_norm"][0]),
            f"{name}.beaten_by": float((cells < scalars[f"{name}.train"]).mean()),
        }
    return scalars


def _grid(series: Columns, setting: Setting, config: Config) -> dict[str, float | bool]:
    cells = _select(series, stage="tuning", name="grid")["final"].reshape(len(setting.lrs), -1)
    at_best_lr = dict(zip(config.norms, cells.min(axis=0), strict=True))
    finite = [loss for norm, loss in at_best_lr.items() if norm <= 1]
    best = _select(series, stage="evaluation", name="best")
    ends = best["lr"][0] in (min(setting.lrs), max(setting.lrs))
    return {
        "best.edge": bool(ends or best["max_norm"][0] in (min(config.norms), max(config.norms))),
        "grid.spread": float(max(finite) - min(finite)),
        "grid.unclipped": float(at_best_lr[math.inf] - cells.min()),
    }


def _gains(series: Columns) -> dict[str, float]:
    """What the recipe on the edge gains, and which of its two doublings does it."""
    final = {name: _select(series, stage="evaluation", name=name)["final"] for name in CANDIDATES}
    own, advice, steps, both = (final[name] for name in ("own", "own-2", "edge-1", "edge"))
    with np.errstate(invalid="ignore"):
        differences = {
            "edge.gain": final["plain-middle"] - both,
            "edge.gain_short": final["plain-short"] - both,
            "edge.gain_long": final["plain-long"] - both,
            "edge.gain_own": own - both,
            "doubling.advice": ((own - advice) + (steps - both)) / 2,
            "doubling.steps": ((own - steps) + (advice - both)) / 2,
            "doubling.difference": steps - advice,
        }
    scalars = {}
    for key, values in differences.items():
        scalars |= _interval(key, values)
    return scalars


def _lengths(series: Columns, name: str) -> np.ndarray:
    """Length of the step of what was evaluated at the median gradient norm of ``own``, one per seed."""
    norms = _select(series, stage="evaluation", name="own")["norm"]
    runs = _select(series, stage="evaluation", name=name)
    if name in CANDIDATES:
        return RECIPES[CANDIDATES[name][0]].multiple * norms / (runs["L0"] + runs["L1"] * norms)
    return runs["lr"] * np.minimum(norms, runs["max_norm"])


def _advice(series: Columns, name: str) -> dict[str, float | int]:
    """What a candidate's lines say."""
    recipe, source = CANDIDATES[name]
    runs = _select(series, stage="evaluation", name=name)
    shares = []
    for seed, intercept, slope in zip(runs["seed"], runs["L0"], runs["L1"], strict=True):
        norms = _select(series, stage="warm-up", name=source, seed=seed)["grad_norm"]
        if not math.isnan(intercept):
            shares.append((norms * slope > intercept).mean())
    octaves = np.log2(_lengths(series, name) / _lengths(series, "best"))
    octaves = octaves[~np.isnan(octaves)]
    intercept = slope = math.nan
    if not np.isnan(runs["length"]).any():
        middle = np.argsort(runs["length"], kind="stable")[(len(runs["length"]) - 1) // 2]
        intercept, slope = float(runs["L0"][middle]), float(runs["L1"][middle])
    multiple = RECIPES[recipe].multiple
    return {
        f"{name}.L0": intercept,
        f"{name}.L1": slope,
        f"{name}.lr": multiple / intercept if intercept else math.inf,
        f"{name}.max_norm": intercept / slope if slope else math.inf,
        f"{name}.length": float(np.median(runs["length"])),
        f"{name}.normalised": int((runs["L0"] == 0).sum()),
        f"{name}.clipped": float(np.mean(shares)) if shares else math.nan,
        f"{name}.octaves": float(np.median(octaves)) if len(octaves) else math.nan,
    }


def _costs(clock: Sequence[Row], config: Config) -> dict[str, float]:
    """Time of the warm-ups that find their own steps, in training steps of the grid."""
    scalars = {}
    for task in TASKS:
        here = [row for row in clock if row["task"] == task]
        step = np.median([row["seconds"] for row in here if row["stage"] == "tuning"])
        for name in OWN:
            taken = [row["seconds"] for row in here if (row["stage"], row["name"]) == ("warm-up", name)]
            scalars[f"{task}.{name}.cost"] = float(np.median(taken) / step) if taken else math.nan
    return scalars


def grid(record: Record, task: str) -> np.ndarray:
    """Last training loss of each cell with the seed of the grids, shape (lrs, thresholds)."""
    cells = _select(record.series, task=task, stage="tuning", name="grid")["final"]
    return cells.reshape(len(record.config[task]["lrs"]), len(record.config["norms"]))


def points(record: Record, task: str, warm_up: str) -> dict[str, np.ndarray]:
    """The rows of the series that belong to a warm-up, of all seeds."""
    return _select(record.series, task=task, stage="warm-up", name=warm_up)


def advised(record: Record, task: str, name: str) -> dict[str, np.ndarray]:
    """The evaluation runs of a candidate, one row per seed."""
    return _select(record.series, task=task, stage="evaluation", name=name)


def lengths(record: Record, task: str, name: str) -> np.ndarray:
    """Length of the step of what was evaluated, one per seed, all at one gradient norm.

    Args:
        record: The record.
        task: A task.
        name: A candidate, ``best`` or a usual way; AutoClip's threshold moves, and its lengths are nan.

    Returns:
        Lengths at the median gradient norm of the warm-up ``own`` of that seed; nan if one of the two has no
        advice.
    """
    return _lengths(_select(record.series, task=task), name)


def table(record: Record, task: str) -> str:
    """What was evaluated as a table in HTML: the step, losses, distance from the best cell."""
    scalars = record.scalars
    rows = {}
    for name in LABELS:
        key = f"{task}.{name}"
        gap, low, high = (scalars[f"{key}.gap{end}"] for end in ("", "_low", "_high"))
        beside = math.isnan(low) or low > 0 or high < 0
        rows[LABELS[name]] = [
            _step(scalars, key, name),
            with_range(scalars, f"{key}.train", ".3f"),
            with_range(scalars, f"{key}.valid", ".3f"),
            ""
            if name == "best"
            else f"{gap:+.3f} ({low:+.3f} to {high:+.3f}){'' if beside else ', not significant'}",
            f"{scalars[f'{key}.beaten_by']:.0%}",
        ]
    n = len(record.config["seeds"])
    head = ("choice", "lr, max_norm", f"training loss (n = {n})", "validation loss", "gap", "better cells")
    return html_table(head, rows)


def _step(scalars: Mapping[str, Any], key: str, name: str) -> str:
    lr, norm = scalars[f"{key}.lr"], scalars[f"{key}.max_norm"]
    if name == "autoclip":
        return f"{lr:.3g}, percentile {PERCENTILE:g}"
    if name not in CANDIDATES:
        return f"{lr:.3g}, {norm:.3g}"
    if math.isnan(lr):
        return "no advice"
    if math.isinf(lr):
        multiple = RECIPES[CANDIDATES[name][0]].multiple
        return f"steps of length {multiple / scalars[f'{key}.L1']:.3g}"
    return f"{lr:.3g}, {norm:.3g}, soft"
