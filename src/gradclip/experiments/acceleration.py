"""Does clipping accelerate training? Losses against steps and time, each method tuned on a grid of its own.

Two tasks: ``language``, a word-level LSTM, and ``images``, a residual network with batch norm. Ten methods:

=================  ============================================================  ===============
method             optimizer                                                     grid of nine
=================  ============================================================  ===============
``sgd``            torch.optim.SGD                                               lr
``momentum``       torch.optim.SGD, momentum 0.9                                 lr
``hard``           ClippedSGD                                                    lr x max_norm
``soft``           ClippedSGD, rule "soft"                                       lr x max_norm
``hard-momentum``  ClippedSGD, momentum 0.9                                      lr x max_norm
``normalize``      ClippedSGD, rule "normalize", max_norm 1: every step is lr    lr
                   long
``adam``           torch.optim.Adam                                              lr
``adamw``          torch.optim.AdamW, weight decay 0.01                          lr
``adam-hard``      clip_grad_, then Adam                                         lr x max_norm
``adamw-hard``     clip_grad_, then AdamW                                        lr x max_norm
=================  ============================================================  ===============

Five stages. *Tuning*: every method in every cell of its grid, with one seed. *Confirmation*: its three best
cells once more, with another seed, because the best of nine is partly chosen by its luck; the cell with the
least mean of both training losses at the end is taken. *Evaluation*: that cell with the evaluation seeds,
which were used for nothing before; only these runs are reported and compared. *Sweep*: a method without
clipping and its clipped form over the same nine learning rates, the threshold being that of the cell taken,
with the evaluation seeds. *Cost*: the time of a step, all methods in turns, so that noise hits them alike.

A seed decides the initial weights; all runs of a task read the same batches in the same order, so that
methods are compared seed by seed. A run is given up when a block's mean loss is not finite or above ten
times that of guessing: the rest of its losses is inf.

Series, one row for each block of steps of an evaluation run, and one for each other run, its last block:

============  =============================================================================================
column        meaning
============  =============================================================================================
``task``      ``language`` or ``images``
``method``    name of the method
``stage``     ``tuning``, ``confirmation``, ``evaluation`` or ``sweep``
``cell``      0 to 8: number of the cell, row by row, lr changing slowest; in a sweep, of the learning rate
``seed``      seed of the initial weights
``lr``        learning rate
``max_norm``  threshold, nan if there is none
``final``     of the whole run: mean training loss over the last tenth of its steps, nats
``reach``     of the whole run: steps at which ``probe`` first was at most ``level``, interpolated between two
              blocks; inf if it never was; nan where ``probe`` was not measured
``step``      steps done at the end of the block
``train``     mean training loss of the block's batches, each before its step, nats
``clipped``   share of the block's steps whose gradient is longer than the threshold, nan without one
``probe``     loss at the end of the block, on the batches that would follow the last step, in training mode
``valid``     validation loss at the end of the block, nats; nan where it was not measured
``accuracy``  share of the held-out images with the right class; nan where it was not measured
============  =============================================================================================

Scalars. TASK and METHOD are names from above; A and B are two methods of ``PAIRS``. Behind ``train``,
``valid`` and ``accuracy``, ``_min`` and ``_max`` are the least and the greatest value over the evaluation
seeds. A difference is A minus B, seed by seed; its key is the mean, and ``_low`` and ``_high`` behind it are
the ends of the 95 % interval, Student's t over the seeds. Nothing is corrected for the number of comparisons.

=================================  =========================================================================
key                                meaning
=================================  =========================================================================
``TASK.METHOD.train``              ``final``, mean over the evaluation seeds
``TASK.METHOD.valid``              validation loss after the last step, mean over them
``TASK.METHOD.accuracy``           accuracy after the last step, mean over them
``TASK.METHOD.lr``                 learning rate of the cell taken
``TASK.METHOD.max_norm``           its threshold, nan if there is none
``TASK.METHOD.edge``               whether one of them is the least or the greatest of its values in the grid
``TASK.METHOD.tuned``              ``final`` of that cell, mean over the two seeds of the tuning
``TASK.METHOD.diverged``           cells of the grid whose ``final`` is above the loss of guessing
``TASK.METHOD.lost``               evaluation runs of which this is true
``TASK.METHOD.clipped``            mean over the evaluation runs of the share of clipped steps
``TASK.METHOD.reached``            evaluation runs that reach ``level``
``TASK.METHOD.reach``              upper median over all of them of the steps to it, inf if it is never
``TASK.METHOD.cost``               time of a step over that of ``sgd``: median over rounds
``TASK.METHOD.cost_low``           its lower quartile
``TASK.METHOD.cost_high``          its upper quartile
``TASK.METHOD.reach_cost``         ``reach`` times ``cost``: the time to the level, in steps of ``sgd``
``TASK.A_vs_B.train``              difference of ``final``
``TASK.A_vs_B.valid``              difference of the validation loss
``TASK.A_vs_B.accuracy``           difference of the accuracy
``TASK.A_vs_B.train_differs``      whether the interval is without 0
``TASK.A_vs_B.valid_differs``      the same
``TASK.A_vs_B.accuracy_differs``   the same
``TASK.A_vs_B.speedup``            steps of B to the level over those of A, geometric mean over seeds, with
                                   ``_low`` and ``_high``; a run that never does counts as if at its end
``TASK.A_vs_B.speedup_time``       that times the cost of B over that of A
``TASK.A_vs_B.width_A``            width of the learning rates whose ``final`` is within ``tolerance`` of A's
                                   own best in the sweep, octaves, mean over seeds
``TASK.A_vs_B.width_B``            the same of B
``TASK.A_vs_B.width``              difference of the two
``TASK.A_vs_B.width_cut``          sweeps of either method in which that range meets an end of the axis
``TASK.A_vs_B.width_common_A``     the four again, within ``tolerance`` of the better one's best, seed by seed
``TASK.A_vs_B.width_common_B``     of B
``TASK.A_vs_B.width_common``       difference of the two
``TASK.A_vs_B.width_common_cut``   as above
``TASK.sgd.seconds``               median time of a step of ``sgd``, seconds
``TASK.steps``                     steps of a run
``TASK.level``                     the loss of ``reach``, nats
``TASK.tolerance``                 that of ``width``, nats
``TASK.guess``                     loss of guessing uniformly, nats
``TASK.optimism``                  mean over methods of ``train`` minus ``tuned``
``TASK.parameters``                number of parameters
``TASK.sha256``                    hash of the data
``runs``                           number of training runs
=================================  =========================================================================
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradclip.experiments._shell import chosen, html_table, paired, recorded, run_tasks, tf32, with_range
from gradclip.experiments._tasks import Language, Pictures
from gradclip.norms import clip_grad_
from gradclip.optim import ClippedSGD
from gradclip.records import Record
from gradclip.smoothness._evaluate import undisturbed

NAME = "acceleration"
#: What is reported of a run: its name in a scalar's key, and its column.
QUALITIES = {"train": "final", "valid": "valid", "accuracy": "accuracy"}
WARM_UP = 2  # rounds before the timed ones
TASKS = ("language", "images")
#: Compared seed by seed, the first minus the second.
PAIRS = (
    ("hard", "sgd"),
    ("soft", "sgd"),
    ("normalize", "sgd"),
    ("momentum", "sgd"),
    ("soft", "hard"),
    ("normalize", "hard"),
    ("hard", "momentum"),
    ("hard-momentum", "momentum"),
    ("hard-momentum", "hard"),
    ("hard-momentum", "adam"),
    ("adam-hard", "adam"),
    ("adamw-hard", "adamw"),
)

Params = list[Tensor]
Cell = tuple[float, float]
Job = tuple[str, str, str, int, int, float, float]  # task, method, stage, cell, seed, lr, max_norm
Row = dict[str, Any]
Run = tuple[Row, list[Row]]  # what is common to a run's rows, and what each block adds
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        label: Name in figures and tables.
        make: Optimizer from parameters, learning rate and threshold.
        clips: Whether it has a threshold.
        before: Whether the gradient is clipped before the optimizer sees it.
    """

    label: str
    make: Callable[[Params, float, float], torch.optim.Optimizer]
    clips: bool = False
    before: bool = False


METHODS: dict[str, Method] = {
    "sgd": Method("SGD", lambda p, lr, _: torch.optim.SGD(p, lr)),
    "momentum": Method("SGD, momentum", lambda p, lr, _: torch.optim.SGD(p, lr, momentum=0.9)),
    "hard": Method("hard clipping", lambda p, lr, c: ClippedSGD(p, lr, max_norm=c), clips=True),
    "soft": Method("soft clipping", lambda p, lr, c: ClippedSGD(p, lr, max_norm=c, rule="soft"), clips=True),
    "hard-momentum": Method(
        "hard, momentum", lambda p, lr, c: ClippedSGD(p, lr, max_norm=c, momentum=0.9), clips=True
    ),
    "normalize": Method("normalised", lambda p, lr, _: ClippedSGD(p, lr, max_norm=1.0, rule="normalize")),
    "adam": Method("Adam", lambda p, lr, _: torch.optim.Adam(p, lr)),
    "adamw": Method("AdamW", lambda p, lr, _: torch.optim.AdamW(p, lr)),
    "adam-hard": Method("Adam, clipped", lambda p, lr, _: torch.optim.Adam(p, lr), clips=True, before=True),
    "adamw-hard": Method(
        "AdamW, clipped", lambda p, lr, _: torch.optim.AdamW(p, lr), clips=True, before=True
    ),
}


def _doubling(first: float) -> tuple[float, ...]:
    return tuple(first * 2.0**k for k in range(9))


_NONE = (math.nan,)
_ADAM_LRS = _doubling(0.0005)
#: Learning rates and thresholds of each method, by data: nine cells, whatever it has to choose.
GRIDS: dict[str, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "reference-manual": {
        "sgd": (_doubling(0.5), _NONE),
        "momentum": (_doubling(1 / 16), _NONE),
        "hard": ((10.0, 30.0, 90.0), (0.05, 0.15, 0.5)),
        "soft": ((10.0, 30.0, 90.0), (0.05, 0.15, 0.5)),
        "hard-momentum": ((1.0, 3.0, 9.0), (0.1, 0.3, 1.0)),
        "normalize": (_doubling(1 / 16), _NONE),
        "adam": (_ADAM_LRS, _NONE),
        "adamw": (_ADAM_LRS, _NONE),
        "adam-hard": ((0.02, 0.06, 0.18), (0.1, 0.3, 1.0)),
        "adamw-hard": ((0.02, 0.06, 0.18), (0.1, 0.3, 1.0)),
    },
    "digits": {
        "sgd": (_doubling(1 / 64), _NONE),
        "momentum": (_doubling(1 / 512), _NONE),
        "hard": ((0.25, 0.75, 2.25), (0.3, 1.0, 3.0)),
        "soft": ((0.25, 0.75, 2.25), (0.3, 1.0, 3.0)),
        "hard-momentum": ((0.03, 0.09, 0.27), (0.3, 1.0, 3.0)),
        "normalize": (_doubling(1 / 64), _NONE),
        "adam": (_ADAM_LRS, _NONE),
        "adamw": (_ADAM_LRS, _NONE),
        "adam-hard": ((0.01, 0.03, 0.09), (0.3, 1.0, 3.0)),
        "adamw-hard": ((0.01, 0.03, 0.09), (0.3, 1.0, 3.0)),
    },
}
GRIDS["cifar10"] = GRIDS["digits"]
# On the larger vocabulary Adam is best at a learning rate that the grid above begins far beyond.
GRIDS["penn-treebank"] = GRIDS["reference-manual"] | dict.fromkeys(
    ("adam-hard", "adamw-hard"), ((0.001, 0.003, 0.009), (0.1, 0.3, 1.0))
)


def cells(data: str, method: str) -> list[Cell]:
    """Learning rate and threshold of every cell of a grid, row by row; nan where there is no threshold."""
    return list(itertools.product(*GRIDS[data][method]))


@dataclass(frozen=True)
class Setting:
    """What is trained, and for how long.

    Args:
        task: The network and its data.
        steps: Training steps of each run.
        level: Loss whose first time is noted, nats; fixed before the runs.
        tolerance: What counts as nearly as good as the best learning rate, nats.
    """

    task: Language | Pictures
    steps: int
    level: float
    tolerance: float

    @property
    def data(self) -> str:
        """The key of its grids in ``GRIDS``."""
        return self.task.corpus if isinstance(self.task, Language) else self.task.images


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions, hardware and the grids of ``GRIDS``.

    Args:
        name: Name of the profile.
        language: The language model.
        images: The image classifier.
        methods: Keys of ``METHODS``, ``"sgd"`` among them.
        sweeps: Pairs of ``PAIRS`` whose learning rates are swept; the first has a threshold, the second none.
        blocks: How many blocks of steps a run's losses are averaged over.
        validations: How often an evaluation run is validated, at equal distances.
        probes: Batches whose loss is held against the level.
        tuning_seeds: The seed of the grids, and that of the confirmation.
        kept: Cells of each method that are confirmed.
        seeds: Seeds of the runs that are compared; at least two.
        rounds: How often each method's step is timed.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of a run.
        workers: Runs at a time, each in a process of its own. They gain where one run leaves the device idle.
        tf32: Whether a GPU may use TF32.

    Raises:
        ValueError: A method or a pair is unknown, the blocks do not fit, or a seed serves both purposes.
    """

    name: str
    language: Setting
    images: Setting
    methods: tuple[str, ...]
    sweeps: tuple[tuple[str, str], ...]
    blocks: int
    validations: int
    probes: int
    tuning_seeds: tuple[int, int]
    kept: int
    seeds: tuple[int, ...]
    rounds: int
    device: str
    threads: int = 1
    workers: int = 1
    tf32: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or "sgd" not in self.methods:
            raise ValueError(f"methods must be of {tuple(METHODS)}, 'sgd' among them, got {self.methods}")
        for pair in self.sweeps:
            if pair not in PAIRS or not set(pair) <= set(self.methods):
                raise ValueError(f"sweeps must be of PAIRS and of the methods, got {pair}")
            if not METHODS[pair[0]].clips or METHODS[pair[1]].clips:
                raise ValueError(f"a sweep compares a clipped method with one without clipping, got {pair}")
        if len(self.seeds) < 2 or len({*self.tuning_seeds, *self.seeds}) < 2 + len(self.seeds):
            raise ValueError(
                f"seeds must be two or more, and none of the tuning's {self.tuning_seeds}, got {self.seeds}"
            )
        for name in TASKS:
            steps = self.setting(name).steps
            if steps % self.blocks:
                raise ValueError(f"steps must be a multiple of blocks={self.blocks}, got {steps} for {name}")
        if self.blocks % self.validations:
            raise ValueError(
                f"blocks must be a multiple of validations={self.validations}, got {self.blocks}"
            )

    def setting(self, task: str) -> Setting:
        """The setting of a task."""
        return {"language": self.language, "images": self.images}[task]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of ``PAIRS`` that can be compared."""
        return [pair for pair in PAIRS if set(pair) <= set(self.methods)]

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run: small models on the reference manual
        and on scikit-learn's digits. ``short`` has the paper's data, the Penn Treebank and CIFAR-10, and
        models that one CPU thread trains in 20 minutes. ``paper`` has the released LSTM and ResNet-20, on a
        GPU if there is one; steps, seeds and levels are choices made here.

        Raises:
            ValueError: There is no such profile.
        """
        cpu = Config(
            name="cpu",
            language=Setting(
                Language("reference-manual", embedding=24, hidden=24, layers=1, batch=10, bptt=10),
                steps=120,
                level=5.4,
                tolerance=0.2,
            ),
            images=Setting(
                Pictures("digits", blocks=1, width=4, batch=32, batch_norm=True, held_out=237, augment=False),
                steps=40,
                level=0.6,
                tolerance=0.2,
            ),
            methods=tuple(METHODS),
            sweeps=(("hard", "sgd"),),
            blocks=10,
            validations=5,
            probes=4,
            tuning_seeds=(0, 100),
            kept=3,
            seeds=(1, 2, 3, 4),
            rounds=40,
            device="cpu",
        )
        smoke = dataclasses.replace(
            cpu,
            name="smoke",
            language=Setting(
                Language("reference-manual", embedding=8, hidden=12, layers=2, batch=4, bptt=4),
                steps=4,
                level=7.0,
                tolerance=0.2,
            ),
            images=Setting(
                Pictures("digits", blocks=1, width=2, batch=8, batch_norm=True, held_out=1300, augment=False),
                steps=4,
                level=1.9,
                tolerance=0.2,
            ),
            methods=("sgd", "hard", "adam", "adam-hard"),
            blocks=2,
            validations=1,
            probes=2,
            kept=2,
            seeds=(1, 2),
            rounds=3,
        )
        short = dataclasses.replace(
            cpu,
            name="short",
            language=Setting(
                Language("penn-treebank", embedding=32, hidden=64, layers=2, batch=10, bptt=15),
                steps=150,
                level=7.0,
                tolerance=0.2,
            ),
            images=Setting(
                Pictures(
                    "cifar10", blocks=1, width=8, batch=32, batch_norm=True, held_out=2000, augment=True
                ),
                steps=90,
                level=2.05,
                tolerance=0.1,
            ),
            validations=1,
        )
        paper = dataclasses.replace(
            cpu,
            name="paper",
            language=Setting(
                Language("penn-treebank", embedding=200, hidden=512, layers=2, batch=256, bptt=70),
                steps=400,
                level=6.0,
                tolerance=0.2,
            ),
            images=Setting(
                Pictures(
                    "cifar10", blocks=3, width=16, batch=128, batch_norm=True, held_out=5000, augment=True
                ),
                steps=1000,
                level=0.8,
                tolerance=0.1,
            ),
            sweeps=(("hard", "sgd"), ("adam-hard", "adam")),
            blocks=20,
            validations=10,
            device="cuda" if torch.cuda.is_available() else "cpu",
            workers=4,
            tf32=True,
        )
        return chosen(name, smoke, cpu, short, paper)


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
    grids = {
        task: {name: [list(v) for v in GRIDS[config.setting(task).data][name]] for name in config.methods}
        for task in TASKS
    }
    return recorded(NAME, config, out, functools.partial(_measure, config), sha256, grids=grids)


# A worker makes the task of the configuration that it is sent, and keeps it for its next run.
@functools.lru_cache(maxsize=2)
def _task(config: Config, task: str) -> Language | Pictures:
    return dataclasses.replace(config.setting(task).task, device=config.device)


def _measure(
    config: Config, partial: Path, identity: Mapping[str, Any]
) -> tuple[Columns, dict[str, Any], float]:
    stage = functools.partial(run_tasks, identity=identity, workers=config.workers, threads=config.threads)
    runs: list[Run] = []
    seconds = 0.0
    # Each stage follows from the runs before it.
    for name, jobs in (("tuning", _tuning), ("confirmation", _confirming), ("evaluation", _evaluating)):
        found, taken = stage(
            [functools.partial(_train, config, *job) for job in jobs(config, runs)],
            checkpoint=partial / f"{name}.pt",
            label=f"{NAME} {name}",
        )
        runs, seconds = runs + found, seconds + taken
    # Alone on the device, whatever the number of workers.
    costs, taken = run_tasks(
        [functools.partial(_cost, config, task) for task in TASKS],
        checkpoint=partial / "cost.pt",
        identity=identity,
        label=f"{NAME} cost",
    )
    rows = [{**head, **block} for head, blocks in runs for block in blocks]
    series = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    scalars = {**summarise(series, config, dict(zip(TASKS, costs, strict=True))), "runs": len(runs)}
    for task in TASKS:
        here = _task(config, task)
        model = here.model(0)
        scalars[f"{task}.parameters"] = sum(p.numel() for p in model.parameters())
        scalars[f"{task}.sha256"] = here.sha256
    return series, scalars, seconds + taken


def _tuning(config: Config, runs: Sequence[Run]) -> list[Job]:
    return [
        (task, name, "tuning", i, config.tuning_seeds[0], *cell)
        for task in TASKS
        for name in config.methods
        for i, cell in enumerate(cells(config.setting(task).data, name))
    ]


def _confirming(config: Config, runs: Sequence[Run]) -> list[Job]:
    """The best cells of each grid once more."""
    jobs = []
    for task, name in itertools.product(TASKS, config.methods):
        losses = _losses(runs, task, name)["tuning"]
        for i in sorted(losses, key=losses.get)[: config.kept]:
            cell = cells(config.setting(task).data, name)[i]
            jobs.append((task, name, "confirmation", i, config.tuning_seeds[1], *cell))
    return jobs


def _best(config: Config, runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """Number of the cell with the least mean of both losses, by task and method."""
    best: dict[str, dict[str, int]] = {task: {} for task in TASKS}
    for task, name in itertools.product(TASKS, config.methods):
        losses = _losses(runs, task, name)
        twice = {cell: loss + losses["tuning"][cell] for cell, loss in losses["confirmation"].items()}
        best[task][name] = min(twice, key=twice.get)
    return best


def _losses(runs: Sequence[Run], task: str, method: str) -> dict[str, dict[int, float]]:
    """Last training loss, by stage and cell."""
    losses: dict[str, dict[int, float]] = {"tuning": {}, "confirmation": {}}
    for head, _ in runs:
        if (head["task"], head["method"]) == (task, method) and head["stage"] in losses:
            losses[head["stage"]][head["cell"]] = head["final"]
    return losses


def _evaluating(config: Config, runs: Sequence[Run]) -> list[Job]:
    """The runs at the cells taken, and those of the sweeps."""
    jobs = []
    for task, best in _best(config, runs).items():
        data = config.setting(task).data
        for name, i in best.items():
            jobs += [(task, name, "evaluation", i, seed, *cells(data, name)[i]) for seed in config.seeds]
        for pair in config.sweeps:
            for name in pair:
                max_norm = cells(data, name)[best[name]][1]
                jobs += [
                    (task, name, "sweep", i, seed, lr, max_norm)
                    for i, lr in enumerate(GRIDS[data][pair[1]][0])
                    for seed in config.seeds
                ]
    return jobs


def _train(config: Config, *job: Any) -> Run:
    with tf32(config.tf32):
        return _trained(config, *job)


def _trained(
    config: Config, task: str, name: str, stage: str, cell: int, seed: int, lr: float, max_norm: float
) -> Run:
    setting, work, method = config.setting(task), _task(config, task), METHODS[name]
    model = work.model(seed)
    params = list(model.parameters())
    optimizer = method.make(params, lr, max_norm)
    length, evaluating = setting.steps // config.blocks, stage == "evaluation"
    state, losses, blocks = work.start(), np.full(setting.steps, math.inf), []
    steps, probes = [0], [_probe(config, task, model)] if evaluating else []
    lost = False
    for b in range(config.blocks):
        block = {
            "step": (b + 1) * length,
            "train": math.inf,
            **dict.fromkeys(("clipped", "probe", "valid", "accuracy"), math.nan),
        }
        blocks.append(block)
        if lost:
            continue
        values, norms = [], []
        for k in range(b * length, (b + 1) * length):
            value, norm, state = _step(method, model, params, optimizer, max_norm, work, k, state)
            # Read once a block: at every reading a GPU would wait for the CPU.
            values.append(value)
            norms.append(norm)
        found = torch.stack(values).double().cpu().numpy()
        lost = not found.mean() <= 10 * work.guess
        if lost:
            continue
        losses[b * length : (b + 1) * length] = found
        block["train"] = float(found.mean())
        if method.clips:
            block["clipped"] = float((torch.stack(norms) > max_norm).double().mean())
        if evaluating:
            block["probe"] = _probe(config, task, model)
            steps.append(block["step"])
            probes.append(block["probe"])
            if (b + 1) % (config.blocks // config.validations) == 0:
                block |= work.evaluate(model)
    head = {"task": task, "method": name, "stage": stage, "cell": cell, "seed": seed, "lr": lr}
    head["max_norm"] = max_norm
    head["final"] = float(losses[-(setting.steps // 10) :].mean())
    head["reach"] = reach(steps, probes, setting.level) if evaluating else math.nan
    return head, blocks if evaluating else blocks[-1:]


@torch.no_grad()
def _probe(config: Config, task: str, model: nn.Module) -> float:
    """Mean loss of the batches that would follow the last step; the model is left as it was."""
    work, first = _task(config, task), config.setting(task).steps
    state, values = work.start(), []
    with undisturbed():
        for k in range(first, first + config.probes):
            value, state = work.loss(model, k, state)
            values.append(value)
    return float(torch.stack(values).mean())


def _step(
    method: Method,
    model: nn.Module,
    params: Params,
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    work: Language | Pictures,
    k: int,
    state: Any,
) -> tuple[Tensor, Tensor | None, Any]:
    """One training step: the loss before it, the gradient's norm where it is known, the state after it."""
    optimizer.zero_grad()
    value, state = work.loss(model, k, state)
    value.backward()
    norm = clip_grad_(params, max_norm) if method.before else None
    optimizer.step()
    return value.detach(), optimizer.last_norm if isinstance(optimizer, ClippedSGD) else norm, state


def reach(steps: Sequence[float], losses: Sequence[float], level: float) -> float:
    """First step at which the line through the losses is at most the level; inf if it never is.

    >>> reach([0, 10, 20], [3.0, 2.0, 0.0], level=1.5)
    12.5
    """
    below = np.flatnonzero(np.asarray(losses) <= level)
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0:
        return float(steps[0])
    drop = losses[i - 1] - losses[i]
    return float(steps[i - 1] + (steps[i] - steps[i - 1]) * (losses[i - 1] - level) / drop)


def _cost(config: Config, task: str) -> dict[str, list[float]]:
    """Seconds of a step in each round, by method; all methods take their turn in every round.

    The learning rate is next to nothing, so that all compute with the same numbers: how long a processor
    takes depends on them a little, and would depend on how a method trains.
    """
    work = _task(config, task)

    def steps(name: str) -> Iterator[float]:
        method = METHODS[name]
        model = work.model(config.seeds[0])
        params = list(model.parameters())
        optimizer = method.make(params, 1e-9, 1.0)
        state = work.start()
        for k in itertools.count():
            _wait(config.device)
            start = time.perf_counter()
            _, _, state = _step(method, model, params, optimizer, 1.0, work, k, state)
            _wait(config.device)
            yield time.perf_counter() - start

    turns = {name: steps(name) for name in config.methods}
    found: dict[str, list[float]] = {name: [] for name in config.methods}
    with tf32(config.tf32):
        for r in range(-WARM_UP, config.rounds):
            # Every other round backwards: what follows a slow method is not always the same one.
            for name in turns if r % 2 else reversed(turns):
                seconds = next(turns[name])
                if r >= 0:
                    found[name].append(seconds)
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summarise(
    series: Columns, config: Config, costs: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, float | bool | int]:
    """The scalars that follow from the series and the timings; the module's docstring lists them.

    Args:
        series: The columns of a record.
        config: Its configuration.
        costs: Seconds of a step in each round, by task and method.

    Returns:
        Key to number.
    """
    scalars: dict[str, float | bool | int] = {}
    for task in TASKS:
        here = _select(series, series["task"] == task)
        setting, guess = config.setting(task), _task(config, task).guess
        found = _methods(here, config, task, guess) | _costs(config, costs[task])
        for name in config.methods:
            found[f"{name}.reach_cost"] = found[f"{name}.reach"] * found[f"{name}.cost"]
        for pair in config.pairs:
            found |= _compared(here, setting, pair, found, pair in config.sweeps, guess)
        found["optimism"] = float(
            np.mean([found[f"{n}.train"] - found[f"{n}.tuned"] for n in config.methods])
        )
        found |= {
            "guess": guess,
            "steps": setting.steps,
            "level": setting.level,
            "tolerance": setting.tolerance,
        }
        scalars |= {f"{task}.{key}": value for key, value in found.items()}
    return scalars


def _select(series: Columns, rows: np.ndarray) -> Columns:
    return {name: values[rows] for name, values in series.items()}


def _runs(series: Columns, stage: str, method: str) -> Columns:
    """The rows of a method's runs in a stage."""
    return _select(series, (series["stage"] == stage) & (series["method"] == method))


def _last(series: Columns) -> Columns:
    """The last row of each run, in the order of the series: seeds or cells, as they were planned."""
    return _select(series, series["step"] == series["step"].max())


def _methods(series: Columns, config: Config, task: str, guess: float) -> dict[str, float | bool | int]:
    scalars: dict[str, float | bool | int] = {}
    for name in config.methods:
        runs = _runs(series, "evaluation", name)
        tried, again, last = (
            _last(part) for part in (_runs(series, "tuning", name), _runs(series, "confirmation", name), runs)
        )
        for key, column in QUALITIES.items():
            values = last[column]
            with np.errstate(invalid="ignore"):
                scalars |= {
                    f"{name}.{key}": float(values.mean()),
                    f"{name}.{key}_min": float(values.min()),
                    f"{name}.{key}_max": float(values.max()),
                }
        cell = int(last["cell"][0])
        data = config.setting(task).data
        lr, max_norm = cells(data, name)[cell]
        lrs, norms = GRIDS[data][name]
        scalars |= {
            f"{name}.lr": lr,
            f"{name}.max_norm": max_norm,
            f"{name}.edge": lr in (min(lrs), max(lrs))
            or (len(norms) > 1 and max_norm in (min(norms), max(norms))),
            f"{name}.tuned": float(tried["final"][cell] + again["final"][again["cell"] == cell][0]) / 2,
            f"{name}.diverged": int((tried["final"] > guess).sum()),
            f"{name}.lost": int((last["final"] > guess).sum()),
            f"{name}.clipped": float(runs["clipped"].mean()),
            f"{name}.reached": int(np.isfinite(last["reach"]).sum()),
            f"{name}.reach": float(np.sort(last["reach"])[len(last["reach"]) // 2]),
        }
    return scalars


def _costs(config: Config, costs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    scalars = {"sgd.seconds": float(np.median(costs["sgd"]))}
    for name in config.methods:
        low, middle, high = np.quantile(np.divide(costs[name], costs["sgd"]), (0.25, 0.5, 0.75))
        scalars |= {f"{name}.cost": middle, f"{name}.cost_low": low, f"{name}.cost_high": high}
    return {key: float(value) for key, value in scalars.items()}


def _compared(
    series: Columns,
    setting: Setting,
    pair: tuple[str, str],
    found: Mapping[str, float],
    swept: bool,
    guess: float,
) -> dict[str, float | bool | int]:
    first, second = (_last(_runs(series, "evaluation", name)) for name in pair)
    label = f"{pair[0]}_vs_{pair[1]}"
    scalars: dict[str, float | bool | int] = {}
    for key, column in QUALITIES.items():
        with np.errstate(invalid="ignore"):  # runs that were given up leave no difference
            mean, low, high = paired(first[column] - second[column])
        scalars |= {f"{label}.{key}": mean, f"{label}.{key}_low": low, f"{label}.{key}_high": high}
        scalars[f"{label}.{key}_differs"] = low > 0 or high < 0
    steps = [np.log(np.clip(part["reach"], 1, setting.steps)) for part in (first, second)]
    ratio = dict(zip(("", "_low", "_high"), np.exp(paired(steps[1] - steps[0])), strict=True))
    scalars |= {f"{label}.speedup{end}": float(value) for end, value in ratio.items()}
    scalars[f"{label}.speedup_time"] = float(ratio[""] * found[f"{pair[1]}.cost"] / found[f"{pair[0]}.cost"])
    if swept:
        scalars |= _widths(series, setting, pair, label, guess)
    return scalars


def _widths(
    series: Columns, setting: Setting, pair: tuple[str, str], label: str, guess: float
) -> dict[str, float | int]:
    losses = {}
    for name in pair:
        runs = _last(_runs(series, "sweep", name))
        lrs = np.unique(runs["lr"])
        losses[name] = np.minimum(runs["final"], guess).reshape(len(lrs), -1).T
    scalars: dict[str, float | int] = {}
    own = {name: found.min(axis=1) + setting.tolerance for name, found in losses.items()}
    both = np.minimum(*own.values())
    for key, levels in (("width", own), ("width_common", dict.fromkeys(pair, both))):
        first, second = (
            [width(lrs, *part) for part in zip(losses[name], levels[name], strict=True)] for name in pair
        )
        octaves = [np.array([value for value, _ in part]) for part in (first, second)]
        mean, low, high = paired(octaves[0] - octaves[1])
        scalars |= {
            f"{label}.{key}_A": float(octaves[0].mean()),
            f"{label}.{key}_B": float(octaves[1].mean()),
            f"{label}.{key}": mean,
            f"{label}.{key}_low": low,
            f"{label}.{key}_high": high,
            f"{label}.{key}_cut": sum(cut for _, cut in first + second),
        }
    return scalars


def width(lrs: np.ndarray, losses: np.ndarray, level: float) -> tuple[float, bool]:
    """How far a learning rate can be from the best one, in octaves.

    Args:
        lrs: Learning rates, rising.
        losses: Finite losses at them; between two they are taken as linear in log2 lr.
        level: What counts as good.

    Returns:
        Length of the set of log2 lr with a loss of at most the level, and whether that set holds an end of
        the axis, where it is only known in part.

    >>> width(np.array([1.0, 2.0, 4.0, 8.0]), np.array([3.0, 1.0, 1.0, 5.0]), 2.0)
    (1.75, False)
    """
    above = np.asarray(losses, dtype=float) - level
    below, over = np.maximum(-above, 0.0), np.maximum(above, 0.0)
    # Of a piece whose ends lie on both sides, the share below is the lower end's part of the whole drop. A
    # piece that lies on the level is as good as one below it.
    low, high = below[:-1] + below[1:], over[:-1] + over[1:]
    share = np.divide(low, low + high, out=np.ones_like(low), where=low + high > 0)
    return float((share * np.diff(np.log2(lrs))).sum()), bool(above[0] <= 0 or above[-1] <= 0)


def grid(record: Record, task: str, method: str) -> np.ndarray:
    """Last training loss of each cell with the seed of the grids, shape (lrs, thresholds)."""
    series = _select(record.series, record.series["task"] == task)
    lrs, norms = record.config["grids"][task][method]
    return _last(_runs(series, "tuning", method))["final"].reshape(len(lrs), len(norms))


def curve(record: Record, task: str, method: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of the series along the evaluation runs of a method.

    Returns:
        Steps at which it was measured, shape (n,), and its values, shape (seeds, n).
    """
    runs = _runs(_select(record.series, record.series["task"] == task), "evaluation", method)
    values = runs[column].reshape(len(record.config["seeds"]), -1)
    steps = runs["step"].reshape(values.shape)[0]
    measured = ~np.isnan(values).all(axis=0)
    return steps[measured], values[:, measured]


def sweep(record: Record, task: str, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Learning rates of a sweep, shape (n,), and the last training losses at them, shape (n, seeds)."""
    runs = _last(_runs(_select(record.series, record.series["task"] == task), "sweep", method))
    losses = runs["final"].reshape(-1, len(record.config["seeds"]))
    return runs["lr"].reshape(losses.shape)[:, 0], losses


def table(record: Record, task: str) -> str:
    """The methods of a record as a table in HTML: chosen cell, losses, clipped steps, cost."""
    scalars, n = record.scalars, len(record.config["seeds"])
    images = task == "images"
    rows = {}
    for name in record.config["methods"]:
        key = f"{task}.{name}"
        cell = f"{scalars[f'{key}.lr']:.3g}"
        if METHODS[name].clips:
            cell += f", {scalars[f'{key}.max_norm']:.3g}"
        rows[METHODS[name].label] = [
            cell + (" (edge)" if scalars[f"{key}.edge"] else ""),
            with_range(scalars, f"{key}.train", ".3f"),
            with_range(scalars, f"{key}.accuracy", ".1%")
            if images
            else with_range(scalars, f"{key}.valid", ".3f"),
            f"{scalars[f'{key}.clipped']:.0%}" if METHODS[name].clips else "",
            f"{scalars[f'{key}.diverged']} of 9",
            "never" if math.isinf(scalars[f"{key}.reach"]) else f"{scalars[f'{key}.reach']:.0f}",
            f"{scalars[f'{key}.cost']:.2f}",
        ]
    quality = "validation accuracy" if images else "validation loss"
    level = f"steps to {record.config[task]['level']:g} nats"
    head = (
        "method",
        "chosen cell",
        f"training loss (n = {n})",
        quality,
        "clipped",
        "diverged",
        level,
        "cost",
    )
    return html_table(head, rows)


def comparisons(record: Record, task: str) -> str:
    """The pairs of a record as a table in HTML: differences with their intervals, and what they decide."""
    scalars, pairs = record.scalars, [pair for pair in PAIRS if set(pair) <= set(record.config["methods"])]
    quality = "accuracy" if task == "images" else "valid"
    rows = {}
    for a, b in pairs:
        key = f"{task}.{a}_vs_{b}"

        def interval(name: str, form: str, key: str = key) -> str:
            value, low, high = (scalars[f"{key}.{name}{end}"] for end in ("", "_low", "_high"))
            return f"{value:{form}} ({low:{form}} to {high:{form}})"

        def verdict(name: str, key: str = key) -> str:
            return "" if scalars[f"{key}.{name}_differs"] else ", not significant"

        form = "+.1%" if quality == "accuracy" else "+.3f"
        rows[f"{METHODS[a].label} minus {METHODS[b].label}"] = [
            interval("train", "+.3f") + verdict("train"),
            interval(quality, form) + verdict(quality),
            interval("speedup", ".2f"),
            f"{scalars[f'{key}.speedup_time']:.2f}",
        ]
    n = len(record.config["seeds"])
    second = "validation accuracy" if quality == "accuracy" else "validation loss"
    head = (f"n = {n} seeds, 95 %", "training loss", second, "times fewer steps", "times less time")
    return html_table(head, rows)
