"""The same language model under each clipping method, tuned on grids of the same size.

Each method has two numbers to choose. It is trained in nine cells of a grid, with one seed that is used for
nothing else; the cell with the least validation loss is then trained with the evaluation seeds. A seed
decides the initial weights; all runs read the same batches in the same order, so that methods can be compared
seed by seed.

===============  ====================================================  ==================  ================
method           optimizer                                             first number        second number
===============  ====================================================  ==================  ================
``sgd``          torch.optim.SGD                                       lr, nine values     none
``hard``         ClippedSGD, the reference                             lr                  max_norm
``soft``         rule "soft"                                           lr                  max_norm
``log``          rule "log"                                            lr                  max_norm
``normalize``    rule "normalize", max_norm 1                          lr, nine values     none
``tensor``       scope "tensor"                                        lr                  max_norm
``unit``         scope "unit" (AGC)                                    lr                  max_norm, a ratio
``momentum``     momentum 0.9                                          lr                  max_norm
``mixed``        MixedClippedSGD, momentum 0.9, mix 0.7                lr                  max_norm
``nsgd``         MixedClippedSGD, mix 1, rule "normalize", under       lr, nine values     none
                 ParameterAgnosticLR
``polyak``       PolyakClippedSGD                                      max_lr              f_star, nats
``percentile``   threshold Percentile (AutoClip)                       lr                  percentile
``z-score``      threshold ZScore (ZClip), warm-up of 10 steps         lr                  z
===============  ====================================================  ==================  ================

Where a method has one number only, its grid has nine values of that one: what counts as fair is the number of
trials. The grids were moved after first runs, so that few of the chosen cells lie on an edge.

Series, one row per training run:

===========  ==============================================================================================
column       meaning
===========  ==============================================================================================
``method``   name of the method
``cell``     0 to 8, row by row: the first number changes slowest
``seed``     seed of the initial weights
``tuning``   whether the run belongs to the grid
``first``    first number of the cell
``second``   its second number, nan if there is none
``valid``    validation loss after the last step, nats per word; inf if it is not finite
``train``    mean training loss over the last tenth of the steps; inf if it is not finite
===========  ==============================================================================================

Scalars. METHOD is a name of the first table. ``_min`` and ``_max`` behind a key are the least and the
greatest value over the evaluation seeds.

=========================  ================================================================================
key                        meaning
=========================  ================================================================================
``METHOD.valid``           mean validation loss over the evaluation seeds, nats per word
``METHOD.train``           the same for the training loss
``METHOD.first``           first number of the chosen cell
``METHOD.second``          its second number
``METHOD.edge``            whether one of them is the least or the greatest of its values in the grid
``METHOD.diverged``        cells of the grid with a validation loss above that of the untrained model
``METHOD.cells_median``    median validation loss over the grid
``METHOD.over_hard``       mean over seeds of the validation loss minus that of ``hard`` with the same seed
``METHOD.over_hard_low``   lower end of its 95 % interval: Student's t over the seeds' differences
``METHOD.over_hard_high``  upper end
``METHOD.differs``         whether that interval is without 0; it is one of many comparisons
``valid.untrained``        validation loss of the untrained model with the tuning seed
``valid.unigram``          validation loss of the training text's word frequencies alone
``runs``                   number of training runs
``model.parameters``       number of parameters
=========================  ================================================================================
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.data import text
from gradclip.experiments._shell import chosen, html_table, paired, recorded, run_tasks, with_range
from gradclip.experiments._tasks import CORPORA, EVALUATION_BATCH
from gradclip.models.lstm import LanguageModel
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD, MixedClippedSGD, ParameterAgnosticLR, PolyakClippedSGD
from gradclip.records import Record
from gradclip.thresholds import Percentile, ZScore

NAME = "optimizers"
REFERENCE = "hard"


@dataclass(frozen=True)
class Method:
    """A method and its grid.

    Args:
        label: Name in figures and tables.
        make: Optimizer from parameters and the cell's two numbers.
        first: Values of the first number.
        second: Values of the second number; nan if there is none.
        scheduled: Whether the schedule of NSGD-M drives it.
    """

    label: str
    make: Callable[[list[Tensor], float, float], torch.optim.Optimizer]
    first: tuple[float, ...]
    second: tuple[float, ...]
    scheduled: bool = False

    @property
    def cells(self) -> list[tuple[float, float]]:
        """The pairs of numbers, row by row."""
        return list(itertools.product(self.first, self.second))


_NONE = (math.nan,)
_RATES = (5.0, 15.0, 45.0)
_NORMS = (0.3, 1.0, 3.0)


def _clipped(label: str, first=_RATES, second=_NORMS, **options: Any) -> Method:
    return Method(label, lambda p, lr, c: ClippedSGD(p, lr, max_norm=c, **options), first, second)


METHODS: dict[str, Method] = {
    "sgd": Method(
        "SGD, no clipping",
        lambda p, lr, _: torch.optim.SGD(p, lr),
        (0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
        _NONE,
    ),
    "hard": _clipped("hard"),
    "soft": _clipped("soft", rule="soft"),
    "log": _clipped("log", rule="log"),
    "normalize": Method(
        "normalize",
        lambda p, lr, _: ClippedSGD(p, lr, max_norm=1.0, rule="normalize"),
        (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        _NONE,
    ),
    "tensor": _clipped("per tensor", scope="tensor"),
    "unit": _clipped("per unit (AGC)", second=(0.1, 0.3, 1.0), scope="unit"),
    "momentum": _clipped("hard, momentum 0.9", first=(1.0, 3.0, 9.0), momentum=0.9),
    "mixed": Method(
        "mixed, mix 0.7",
        lambda p, lr, c: MixedClippedSGD(p, lr, max_norm=c, momentum=0.9, mix=0.7),
        _RATES,
        (0.1, 0.3, 1.0),
    ),
    "nsgd": Method(
        "NSGD-M, scheduled",
        lambda p, lr, _: MixedClippedSGD(p, lr, max_norm=1.0, momentum=0.0, mix=1.0, rule="normalize"),
        (1 / 7, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
        _NONE,
        scheduled=True,
    ),
    "polyak": Method(
        "Polyak",
        lambda p, lr, f_star: PolyakClippedSGD(p, f_star=f_star, max_lr=lr),
        _RATES,
        (0.0, 2.0, 4.0),
    ),
    "percentile": Method(
        "percentile (AutoClip)",
        lambda p, lr, q: ClippedSGD(p, lr, max_norm=Percentile(q)),
        _RATES,
        (10.0, 50.0, 90.0),
    ),
    "z-score": Method(
        "z-score (ZClip)",
        lambda p, lr, z: ClippedSGD(p, lr, max_norm=ZScore(z, warmup=10)),
        _RATES,
        (0.5, 1.0, 2.5),
    ),
}


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions, hardware and the grids of ``METHODS``.

    Args:
        name: Name of the profile.
        corpus: A key of ``_tasks.CORPORA``.
        embedding: Width of the embedding and of the last LSTM layer.
        hidden: Units of the other LSTM layers.
        layers: LSTM layers.
        batch: Streams of text side by side.
        bptt: Words per stream and step.
        steps: Training steps of each run.
        methods: Keys of ``METHODS``, the reference among them.
        tuning_seed: Seed of the runs that choose a cell.
        seeds: Seeds of the runs that are compared; at least two.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads during the run.

    Raises:
        ValueError: A method is unknown, the reference is missing, or a seed serves both purposes.
    """

    name: str
    corpus: str
    embedding: int
    hidden: int
    layers: int
    batch: int
    bptt: int
    steps: int
    methods: tuple[str, ...]
    tuning_seed: int
    seeds: tuple[int, ...]
    device: str
    threads: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or REFERENCE not in self.methods:
            raise ValueError(
                f"methods must be of {tuple(METHODS)}, {REFERENCE!r} among them, got {self.methods}"
            )
        if len(self.seeds) < 2 or self.tuning_seed in self.seeds:
            raise ValueError(
                f"seeds must be at least two, without the tuning seed {self.tuning_seed}, got {self.seeds}"
            )

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run: every method on a small model and the
        reference manual. ``paper`` is the model of the 2020 paper's released code on the Penn Treebank.

        Raises:
            ValueError: There is no such profile.
        """
        cpu = Config(
            name="cpu",
            corpus="reference-manual",
            embedding=32,
            hidden=64,
            layers=2,
            batch=10,
            bptt=20,
            steps=100,
            methods=tuple(METHODS),
            tuning_seed=0,
            seeds=(1, 2, 3),
            device="cpu",
        )
        smoke = dataclasses.replace(
            cpu,
            name="smoke",
            embedding=8,
            hidden=12,
            batch=4,
            bptt=6,
            steps=4,
            methods=("sgd", "hard", "nsgd"),
            seeds=(1, 2),
        )
        paper = dataclasses.replace(
            cpu,
            name="paper",
            corpus="penn-treebank",
            embedding=200,
            hidden=512,
            batch=20,
            bptt=35,
            steps=2000,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return chosen(name, smoke, cpu, paper)


def run(config: Config, out: str | Path) -> Record:
    """Train all runs and save the record; go on after the last finished run of a call that was stopped.

    A finished record of the same configuration, source, data, device and versions is returned as it is.

    Args:
        config: What to run.
        out: Folder of all records.

    Returns:
        The record as read back from ``out``.

    Raises:
        DataError: The corpus is missing or damaged.
    """
    corpus = CORPORA[config.corpus]()
    grids = {
        name: {"first": list(METHODS[name].first), "second": list(METHODS[name].second)}
        for name in config.methods
    }
    return recorded(
        NAME, config, out, functools.partial(_measure, config, corpus), corpus.sha256, grids=grids
    )


def _measure(
    config: Config, corpus: text.Corpus, partial: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], float]:
    runs = _Runs(config, corpus)
    stage = functools.partial(run_tasks, identity=identity)
    tuned, seconds = stage(
        [
            functools.partial(runs.row, name, cell, config.tuning_seed, True)
            for name in config.methods
            for cell in range(len(METHODS[name].cells))
        ],
        checkpoint=partial / "tuning.pt",
        label=f"{NAME} tuning",
    )
    # The first of the cells with the least loss.
    best = {
        name: min((row for row in tuned if row["method"] == name), key=lambda row: row["valid"])["cell"]
        for name in config.methods
    }
    evaluated, more = stage(
        [
            functools.partial(runs.row, name, best[name], seed, False)
            for name in config.methods
            for seed in config.seeds
        ],
        checkpoint=partial / "evaluation.pt",
        label=f"{NAME} evaluation",
    )
    rows = tuned + evaluated
    series = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    scalars = {
        **summarise(series, untrained=runs.untrained),
        "valid.untrained": runs.untrained,
        "valid.unigram": text.unigram_loss(corpus),
        "runs": len(rows),
        "model.parameters": sum(p.numel() for p in runs.model(config.tuning_seed).parameters()),
    }
    return series, scalars, seconds + more


class _Runs:
    """The training runs."""

    def __init__(self, config: Config, corpus: text.Corpus) -> None:
        self.config, self.corpus = config, corpus
        streams = text.batchify(corpus.train.to(config.device), config.batch)
        self.segments = text.segments(streams, config.bptt)
        valid = text.batchify(corpus.valid.to(config.device), EVALUATION_BATCH)
        self.valid = text.segments(valid, 35)
        self.untrained = self.validation_loss(self.model(config.tuning_seed))

    def row(self, name: str, cell: int, seed: int, tuning: bool) -> dict[str, Any]:
        """One run's row of the series."""
        first, second = METHODS[name].cells[cell]
        train_loss, valid_loss = self.train(METHODS[name], first, second, seed)
        return {
            "method": name,
            "cell": cell,
            "seed": seed,
            "tuning": tuning,
            "first": first,
            "second": second,
            "valid": valid_loss,
            "train": train_loss,
        }

    def model(self, seed: int) -> LanguageModel:
        config = self.config
        return LanguageModel(
            len(self.corpus.vocabulary),
            embedding=config.embedding,
            hidden=config.hidden,
            layers=config.layers,
            generator=torch.Generator().manual_seed(seed),
        ).to(config.device)

    def train(self, method: Method, first: float, second: float, seed: int) -> tuple[float, float]:
        """Training and validation loss of one run, inf where they are not finite."""
        model = self.model(seed)
        optimizer = method.make(list(model.parameters()), first, second)
        scheduler = ParameterAgnosticLR(optimizer) if method.scheduled else None
        losses = []
        for iteration in range(self.config.steps):
            position = iteration % len(self.segments)
            if position == 0:
                state = model.initial_state(self.config.batch)
            words, targets = self.segments[position]
            optimizer.zero_grad()
            loss, state = model.loss(words, targets, state)
            loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return math.inf, math.inf
            if isinstance(optimizer, PolyakClippedSGD):
                optimizer.step(lambda loss=loss: loss)
            else:
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
        last = float(np.mean(losses[-max(1, self.config.steps // 10) :]))
        valid = self.validation_loss(model)
        return last, valid if math.isfinite(valid) else math.inf

    @torch.no_grad()
    def validation_loss(self, model: LanguageModel) -> float:
        """Mean loss over the validation text, hidden state carried from segment to segment."""
        state, losses = model.initial_state(EVALUATION_BATCH), []
        for words, targets in self.valid:
            loss, state = model.loss(words, targets, state)
            losses.append(loss.item())
        return float(np.mean(losses))


def summarise(series: Mapping[str, np.ndarray], *, untrained: float) -> dict[str, float | bool | int]:
    """The scalars that follow from the series; the module's docstring lists them.

    Args:
        series: The columns of a record.
        untrained: Validation loss of the untrained model, nats per word.

    Returns:
        Key to number.
    """
    scalars: dict[str, float | bool | int] = {}
    tuning = series["tuning"]
    reference = series["valid"][(series["method"] == REFERENCE) & ~tuning]
    for name in dict.fromkeys(series["method"].tolist()):
        grid, chosen = ((series["method"] == name) & part for part in (tuning, ~tuning))
        for key in ("valid", "train"):
            values = series[key][chosen]
            scalars[f"{name}.{key}"] = float(values.mean())
            scalars[f"{name}.{key}_min"], scalars[f"{name}.{key}_max"] = (
                float(values.min()),
                float(values.max()),
            )
        edge = False
        for key in ("first", "second"):
            value, options = float(series[key][chosen][0]), series[key][grid]
            scalars[f"{name}.{key}"] = value
            edge |= not math.isnan(value) and value in (float(options.min()), float(options.max()))
        scalars[f"{name}.edge"] = edge
        scalars[f"{name}.diverged"] = int((series["valid"][grid] > untrained).sum())
        scalars[f"{name}.cells_median"] = float(np.median(series["valid"][grid]))
        with np.errstate(invalid="ignore"):  # a run that diverged leaves no interval
            mean, low, high = paired(series["valid"][chosen] - reference)
        scalars[f"{name}.over_hard"] = mean
        scalars[f"{name}.over_hard_low"], scalars[f"{name}.over_hard_high"] = low, high
        scalars[f"{name}.differs"] = low > 0 or high < 0
    return scalars


def norm_errors(sizes: Sequence[int], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Relative errors of two norms of float32 normal numbers on a CPU, against numpy in float64.

    Args:
        sizes: How many numbers, each time the first so many of one sequence.
        seed: Seed of the sequence.

    Returns:
        ``"torch"``: the errors of :func:`torch.linalg.vector_norm`; ``"gradclip"``: those of
        :func:`~gradclip.norms.total_norm`; both of the length of ``sizes``, positive where the result is too
        large.
    """
    numbers = torch.randn(max(sizes), generator=torch.Generator().manual_seed(seed))
    exact = [math.sqrt(np.square(numbers[:n].numpy(), dtype=np.float64).sum()) for n in sizes]
    norms = {"torch": torch.linalg.vector_norm, "gradclip": total_norm}
    return {
        name: np.array([norm(numbers[:n]).item() / e - 1 for n, e in zip(sizes, exact, strict=True)])
        for name, norm in norms.items()
    }


def table(record: Record) -> str:
    """The methods of a record as a table in HTML: chosen cell, losses, and the difference from ``hard``."""
    rows = {}
    for name in record.config["methods"]:
        value = {key: record.scalars[f"{name}.{key}"] for key in ("first", "second", "over_hard", "edge")}
        low, high = (record.scalars[f"{name}.over_hard_{end}"] for end in ("low", "high"))
        cell = f"{value['first']:.3g}"
        cell += "" if math.isnan(value["second"]) else f", {value['second']:.3g}"
        difference = f"{value['over_hard']:+.3f} ({low:+.3f} to {high:+.3f})"
        verdict = "differs" if record.scalars[f"{name}.differs"] else "not significant"
        rows[METHODS[name].label] = [
            f"{cell} (edge)" if value["edge"] else cell,
            with_range(record.scalars, f"{name}.valid", ".3f"),
            "" if name == REFERENCE else difference,
            "" if name == REFERENCE else verdict,
        ]
    seeds = f"n = {len(record.config['seeds'])} seeds"
    return html_table(("method", "chosen cell", "validation loss", "minus hard, 95 %", seeds), rows)
