"""Gradient norm against smoothness along the training of a language model (S3, the paper's Figures 1 and 2).

LSTMs are trained by SGD with learning rate η and gradients clipped at norm γ, in several settings. At probed
steps the gradient on the *same* batch, from the same hidden state, is evaluated again at points between x_k
and x_{k+1}. With d = x_{k+1} - x_k the update, the estimate at fraction a of the step is

    L̂_a = ‖∇f(x_k + a d) - ∇f(x_k)‖ / (a ‖d‖)        [loss / parameter²]

a = 1/2 is the point that the paper's released code evaluates; the paper takes the largest value over a in
{1/6, 1/3, 1/2, 2/3, 5/6} (as recalled); a = 0.01 stands for the local curvature along the step.

**Settings.** ``lr30_clip``, ``lr2`` and ``lr2_clip`` are the paper's Figure 2: learning rate 30 clipped at
0.25, 2 without clipping, 2 clipped at 0.25, on the network of the released code, a two-layer tied LSTM.
``awd`` is the AWD-LSTM that the paper names (:mod:`gradclip.models.awd_lstm`), at learning rate 30 clipped
at 0.25, its Figure 1: f has dropout, whose masks are a function of seed and k alone and so the same at both
ends of a difference, and the penalties of activations. Its weights are averaged by NT-ASGD, with the n = 5 of
Merity et al.; but they validate once an epoch, which in a run of one or two epochs would never trigger it, so
that ``cpu`` and ``short`` validate twenty times a run.

**Bound.** If the gradient changes by its own length on the way, L̂_a = ‖∇f(x_k)‖ / (a ‖d‖), whatever f is.
This is the bound used here, the simple form; the strict one has ‖∇f(x_k + a d)‖ + ‖∇f(x_k)‖ above the line.
The estimate over the bound is the relative change of the gradient, called *saturation*. Since the update has
the length ‖d‖ = η min(‖g‖, γ), the bound at the midpoint is 2/η for an unclipped step and (2/(ηγ)) ‖g‖
for a clipped one: a line whose slope 2/(ηγ) knows nothing of the loss.

**Control.** ``other_batch`` is the midpoint estimate with the next batch at the midpoint, so it measures
the difference between two batches as well.

**The released code's estimate** is :func:`.estimators.released_estimate`: at the midpoint, on the first tenth
of a text cut into random segments that differ from one end to the other, as a sum over segments, against the
gradient norm of their mean. Its random numbers are its own here, so that it does not change the training.
Without dropout, also for ``awd``.

Series, one row per training step; NaN where something was not measured:

=======================  ==================================================================================
column                   meaning
=======================  ==================================================================================
``setting``              see above
``seed``                 seed of the weights and masks; all runs read the same batches in the same order
``iteration``            training step k, from 0
``loss``                 f(x_k) on the batch, nats per word
``grad_norm``            ‖∇f(x_k)‖ of the batch
``clip_factor``          min(1, γ/‖∇f(x_k)‖)
``lr``                   η
``update_length``        ‖d‖
``path_1_6``, ...        L̂_a at a = 1/6, 1/3, 1/2, 2/3, 5/6; ``path_1_2`` is the midpoint
``path_max``             the largest of these five
``path_1``               L̂_a at a = 1
``end_grad_norm``        ‖∇f(x_k + d)‖
``local``                L̂_a at a = 0.01
``other_batch``          the control
``bound``                ‖∇f(x_k)‖ / (‖d‖/2)
``along``                ‖∇²f(x_k) d‖ / ‖d‖, by a Hessian-vector product
``random``               the same in a random direction
``fixed_grad_norm``      gradient norm on a fixed batch of validation text, without dropout
``fixed``                L̂_a on it along the same d, a = 0.01
``hessian_norm``         ‖∇²f(x_k)‖ to 1 %, by residuals
``released``             the released code's estimate
``released_grad_norm``   and its gradient norm
``released_segments``    and how many segments it summed at x_k
``valid``                validation loss of x_{k+1}, nats per word; before the last step only for ``awd``
``valid_average``        that of the average of the iterates, once it has begun
``diverged``             1 once the loss has passed ten times that of guessing, where a run is given up
=======================  ==================================================================================

Scalars. A key as given is over all seeds' points together. Behind it, ``_min`` and ``_max`` are its least
and greatest value over seeds, ``.seed0`` is its value for seed 0, and ``_low`` and ``_high`` are the ends of
the 95 % block-bootstrap interval over all points (for an envelope a stability check, no more). EST is
``path`` (the midpoint), ``largest`` (of the five fractions), ``local`` or ``other`` (the control). SUBSET is
``late`` (probed steps after the first twentieth of the steps), ``short`` (‖g‖ < 2γ), ``unclipped`` (clip
factor 1) or ``clipped``. Where fewer than eight points remain, a statistic is NaN.

Of the first setting, ``lr30_clip``:

=========================================  ================================================================
key                                        meaning
=========================================  ================================================================
``probe.count``                            number of probed steps, over all seeds
``probe.pearson_EST``                      Pearson correlation of ln L̂ and ln ‖g‖
``probe.slope_EST``                        slope of the least-squares line of ln L̂ on ln ‖g‖
``probe.saturation_EST``                   median of L̂_a / (‖g‖/(a ‖d‖)), a where the estimate was taken
``probe.saturation_median``                the same as ``probe.saturation_path``
``probe.l0_ols_EST``                       L0 of the least-squares line L0 + L1 ‖g‖, loss/parameter²
``probe.l1_ols_EST``                       its L1, 1/parameter
``probe.l1_ols_over_mechanical``           ``probe.l1_ols_path`` / (2/(ηγ))
``probe.l1_ols_over_mechanical_EST``       ``probe.l1_ols_EST`` / (2/(ηγ))
``probe.radius_EST``                       1/``probe.l1_ols_EST``, in units of a parameter: the distance up to
                                           which the local form of the condition says anything
``probe.l0_envelope_EST``                  L0 of the smallest line with L0, L1 ≥ 0 above all points
``probe.l1_envelope_EST``                  its L1
``probe.leverage_clipped``                 share of Σ(‖g‖ - mean)² that clipped steps carry: their weight in
                                           the slope of a least-squares line
``probe.leverage_long``                    the same share for steps with ‖g‖ ≥ 2γ
``long.count``                             number of probed steps with ‖g‖ ≥ 2γ
``long.saturation_path_least``             range over these steps of L̂_a/(‖g‖/(a ‖d‖)) at a = 1/2
``long.saturation_path_most``              its upper end
``clipped.saturation_path_least``          the same range over all clipped steps
``clipped.saturation_path_most``           its upper end
``probe.step_length``                      median of ‖d‖, in units of a parameter
``probe.step_curvature``                   median of η min(1, γ/‖g‖) L̂ at a = 0.01, curvature along the step
                                           times the factor of the gradient; S6 proves descent below 2
``probe.step_curvature_above_2``           share of probed steps where it is above 2
``probe.largest_at_first``                 share of probed steps whose largest estimate is the one at a = 1/6
``SUBSET.count``, ``SUBSET.pearson_EST``   as above, over the points of a subset; so for ``slope``,
                                           ``saturation``, ``l1_ols`` and ``l1_ols_over_mechanical``
``mechanical.l1``                          2/(ηγ), 1/parameter
``mechanical.flat``                        2/η, loss/parameter²
``mechanical.step``                        ηγ, the length of every clipped step, in units of a parameter
``train.loss_initial``                     loss of the first step, nats per word
``train.loss_final``                       mean loss of the last tenth of the steps
``train.clipped_share``                    share of all steps with clip factor below 1
``train.grad_norm_least``, ``..._most``    range of ‖g‖ over all steps
``valid.loss``                             validation loss after the last step, nats per word
``valid.loss_unigram``                     validation loss of the training text's word frequencies alone
``model.parameters``                       number of parameters
``data.tokens``, ``data.vocabulary``       training tokens, different words
``data.sha256``                            SHA-256 of the text
=========================================  ================================================================

Of each SETTING, over its probed steps. ANY is one of EST, ``along``, ``fixed`` (against the gradient norm of
the fixed batch) or ``released`` (against its own). Correlations have ``_min``, ``_max``, ``_low``, ``_high``.

=========================================  ================================================================
key                                        meaning
=========================================  ================================================================
``SETTING.count_ANY``                      points
``SETTING.pearson_ANY``                    Pearson correlation of the logarithms
``SETTING.slope_ANY``                      slope of the logarithms
``SETTING.late_pearson_ANY``               correlation without the first twentieth of the steps
``SETTING.saturation_EST``                 median of L̂_a over its mechanical level
``SETTING.saturation_strict``              median of ``path_1`` over (‖∇f(x_k)‖ + ``end_grad_norm``) / ‖d‖, at
                                           most 1; with ``_min`` and ``_max``
``SETTING.contrast_ANY``                   mean over seeds of the correlation, over that of the first setting
``SETTING.along_over_local``               median of ``along``/``local``
``SETTING.hessian_count``                  points where the norm of the Hessian was measured
``SETTING.hessian_norm``                   its median, loss/parameter²; with ``_least`` and ``_most`` of them
``SETTING.local_over_hessian``             median of ``local``/``hessian_norm``, with ``_least``, ``_most``
``SETTING.step_hessian``                   median of η min(1, γ/‖g‖) ``hessian_norm``, with ``_least`` and
                                           ``_most``; as ``probe.step_curvature``
``SETTING.l1_over_mechanical_EST``         least-squares L1 over 2/(ηγ); NaN without clipping
``SETTING.clipped_share``                  share of all steps with clip factor below 1
``SETTING.loss_final``                     mean loss of the last tenth of the steps
``SETTING.valid``                          validation loss after the last step, mean over seeds
``SETTING.valid_average``                  the same of the averaged iterates, where averaging began; else NaN
``SETTING.averaged``                       share of seeds in which averaging began
``SETTING.diverged``                       runs that were given up
``SETTING.parameters``                     number of parameters
=========================================  ================================================================
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradclip import parallel
from gradclip.data import text
from gradclip.experiments._probing import FRACTIONS, LOCAL, PATHS, Plan, Probed
from gradclip.experiments._shell import chosen, html_table, recorded, with_range
from gradclip.experiments._tasks import Language, State, described
from gradclip.experiments.estimators import released_estimate, segment_lengths
from gradclip.models.awd_lstm import AWDLSTM, Masks, NonMonotoneAverage
from gradclip.optim import ClippedSGD
from gradclip.records import Record
from gradclip.smoothness import fit
from gradclip.train import train

NAME = "language-model"
SHARED = "batches"  # of several processes
FEWEST = 8  # points, below which a fit says nothing
RELEASED = ("released", "released_grad_norm", "released_segments")

# Estimator in a scalar's key, and its column.
_ESTIMATORS = {"path": "path_1_2", "largest": "path_max", "local": "local", "other": "other_batch"}
# And those that go with a gradient norm of their own or are measured rarely.
_ALL = {
    **{name: (column, "grad_norm") for name, column in _ESTIMATORS.items()},
    "along": ("along", "grad_norm"),
    "fixed": ("fixed", "fixed_grad_norm"),
    "released": ("released", "released_grad_norm"),
}


@dataclass(frozen=True)
class Regularised(Language):
    """The AWD-LSTM on a text.

    Its loss on a batch of training text has dropout and penalties, with masks that are a function of ``seed``
    and k; on the fixed batch and in validation it has neither.

    Args:
        seed: Of the masks.
    """

    seed: int = 0

    _network = AWDLSTM

    def _value(
        self, model: AWDLSTM, k: int, words: Tensor, targets: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return model.training_loss(words, targets, state, self.masks(model, k))

    def masks(self, model: AWDLSTM, k: int) -> Masks:
        """The masks of batch k for this process's streams."""
        found = self._drawn.get(k)
        if found is None:
            # For the whole batch, whoever has which part of it, and on the device, where that is fast.
            generator = torch.Generator(self.device).manual_seed(1_000_003 * (self.seed + 1) + k)
            count = self.batch // parallel.size()
            found = model.masks(self.batch, generator).streams(parallel.rank() * count, count)
            self._drawn.clear()  # one draw serves all evaluations of a probe but the next batch's
            self._drawn[k] = found
        return found

    @functools.cached_property
    def _drawn(self) -> dict[int, Masks]:
        return {}


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Args:
        name: Its name in the series and in the scalars.
        lr: Learning rate η.
        max_norm: Clipping threshold γ on the gradient norm; infinite for none.
        embedding: Width of the embedding and of the last LSTM layer.
        hidden: Units of the other LSTM layers.
        layers: LSTM layers.
        batch: Streams of text side by side.
        bptt: Words per stream and step.
        awd: Whether the network is the AWD-LSTM, whose iterates are averaged too.
    """

    name: str
    lr: float
    max_norm: float
    embedding: int
    hidden: int
    layers: int
    batch: int
    bptt: int
    awd: bool = False

    def task(self, corpus: str, device: str, seed: int) -> Language:
        """What is trained, with the masks of a seed."""
        sizes = {key: getattr(self, key) for key in ("embedding", "hidden", "layers", "batch", "bptt")}
        if self.awd:
            return Regularised(corpus, **sizes, device=device, seed=seed)
        return Language(corpus, **sizes, device=device)


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions and hardware.

    Args:
        name: Name of the profile.
        corpus: A key of ``_tasks.CORPORA``.
        settings: What is trained; the first is the one that the others are compared with.
        steps: Training steps of a run.
        probe_every: The smoothness is measured at every so many steps.
        product_every: Hessian-vector products and the fixed batch, a multiple of ``probe_every``.
        hessian_every: The norm of the Hessian, a multiple of ``probe_every``; 0 for never.
        released_every: The released code's estimate, a multiple of ``probe_every``; 0 for never.
        released_tokens: Of so many training words from the first it takes a tenth; None for all.
        valid_every: L of NT-ASGD: where iterates are averaged, the validation loss is taken at every so many
            steps. Everywhere it is taken after the last one.
        patience: n of NT-ASGD, in validations.
        seeds: Seeds.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads during the run. They split sums, so the last bits depend on them.

    Raises:
        ValueError: A seed has fewer probed steps than a fit needs, or settings share a name.
    """

    name: str
    corpus: str
    settings: tuple[Setting, ...]
    steps: int
    probe_every: int
    product_every: int
    hessian_every: int
    released_every: int
    released_tokens: int | None
    valid_every: int
    patience: int
    seeds: tuple[int, ...]
    device: str
    threads: int = 1

    def __post_init__(self) -> None:
        probed = len(range(0, self.steps, self.probe_every))
        if probed < FEWEST:
            raise ValueError(
                f"a fit needs {FEWEST} probed steps per seed, got {probed} "
                f"from steps={self.steps} and probe_every={self.probe_every}"
            )
        if self.released_every % self.probe_every:
            raise ValueError(
                f"released_every must be a multiple of probe_every={self.probe_every}, or 0, "
                f"got {self.released_every}"
            )
        names = [setting.name for setting in self.settings]
        if len(set(names)) < len(names):
            raise ValueError(f"settings must have different names, got {names}")

    @property
    def plan(self) -> Plan:
        """How often to measure."""
        return Plan(self.probe_every, self.product_every, self.hessian_every)

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run: small networks on the reference manual.
        ``short`` has the text of the paper, the Penn Treebank, and small networks, for one CPU thread or a
        small GPU. ``paper`` has the network and batch of the paper's released code, and the AWD-LSTM at its
        own size, on a GPU if there is one; the number of steps, how often to measure and the seeds are
        choices made here.

        Raises:
            ValueError: There is no such profile.
        """
        smoke = Config(
            name="smoke",
            corpus="reference-manual",
            settings=settings(embedding=8, hidden=12, batch=4, bptt=6),
            steps=12,
            probe_every=1,
            product_every=6,
            hessian_every=12,
            released_every=6,
            released_tokens=1200,
            valid_every=6,
            patience=1,
            seeds=(0, 1),
            device="cpu",
        )
        cpu = dataclasses.replace(
            smoke,
            name="cpu",
            settings=settings(embedding=48, hidden=96, batch=20, bptt=35),
            steps=200,
            probe_every=5,
            product_every=70,
            hessian_every=80,
            released_every=25,
            released_tokens=30_000,
            valid_every=10,
            patience=5,
            seeds=(0, 1, 2),
        )
        short = dataclasses.replace(
            cpu,
            name="short",
            corpus="penn-treebank",
            settings=settings(embedding=64, hidden=128, batch=20, bptt=35),
            steps=400,
            probe_every=10,
            product_every=80,
            hessian_every=200,
            released_every=50,
            valid_every=20,
        )
        paper = dataclasses.replace(
            short,
            name="paper",
            settings=(
                *settings(embedding=200, hidden=512, batch=256, bptt=70)[:3],
                Setting("awd", 30.0, 0.25, 400, 1150, 3, batch=80, bptt=70, awd=True),
            ),
            steps=1500,
            product_every=50,
            hessian_every=300,
            released_every=150,  # each reads the whole text twice, the arithmetic of a hundred steps
            released_tokens=None,
            valid_every=150,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return chosen(name, smoke, cpu, short, paper)


def settings(*, embedding: int, hidden: int, batch: int, bptt: int) -> tuple[Setting, ...]:
    """The settings of the paper's Figure 2 on a two-layer LSTM, and an AWD-LSTM of the same width.

    Args:
        embedding: Width of the embedding and of the last LSTM layer.
        hidden: Units of the other LSTM layers.
        batch: Streams of text side by side.
        bptt: Words per stream and step.
    """
    sizes = {"embedding": embedding, "hidden": hidden, "batch": batch, "bptt": bptt}
    return (
        Setting("lr30_clip", 30.0, 0.25, **sizes, layers=2),
        Setting("lr2", 2.0, math.inf, **sizes, layers=2),
        Setting("lr2_clip", 2.0, 0.25, **sizes, layers=2),
        Setting("awd", 30.0, 0.25, **sizes, layers=3, awd=True),
    )


def run(config: Config, out: str | Path) -> Record:
    """Train, measure and save the record; go on where an earlier call was stopped.

    A finished record of the same configuration, source, data, device and versions is returned as it is.
    Under ``torchrun`` the processes share every batch.

    Args:
        config: What to run.
        out: Folder of all records.

    Returns:
        The record as read back from ``out``.

    Raises:
        DataError: The corpus is missing or damaged.
        ParallelError: A batch cannot be divided among the processes.
    """
    tasks = [setting.task(config.corpus, config.device, 0) for setting in config.settings]
    corpus = tasks[0].text
    return recorded(
        NAME,
        config,
        out,
        functools.partial(_measure, config, corpus),
        corpus.sha256,
        settings=[
            dataclasses.asdict(setting) | described(task)
            for setting, task in zip(config.settings, tasks, strict=True)
        ],
    )


def _measure(
    config: Config, corpus: text.Corpus, partial: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], float]:
    columns: dict[str, list[float | str]] = {"setting": [], "seed": []}
    sizes, seconds = {}, 0.0
    for setting in config.settings:
        for seed in config.seeds:
            training = _Training(config, corpus, setting, seed)
            result = train(
                training,
                config.steps,
                checkpoint=partial / f"{setting.name}-seed-{seed}.pt",
                identity={**identity, "setting": setting.name, "seed": seed},
                label=f"{NAME} seed {seed} {setting.name}",
            )
            columns["setting"] += [setting.name] * config.steps
            columns["seed"] += [seed] * config.steps
            for name, values in result.series.items():
                columns.setdefault(name, []).extend(values)
            seconds += result.seconds
        sizes[setting.name] = sum(p.numel() for p in training.probed.params)
    series = {name: np.asarray(values) for name, values in columns.items()}
    first = config.settings[0]
    rows = of_setting(series, first.name)
    valid = rows["valid"][rows["iteration"] == config.steps - 1]
    scalars = {
        **summarise(rows, lr=first.lr, max_norm=first.max_norm),
        **compare(series, config.settings),
        **_spread("valid.loss", float(np.mean(valid)), config.seeds, valid),
        "valid.loss_unigram": text.unigram_loss(corpus),
        "model.parameters": sizes[first.name],
        **{f"{name}.parameters": size for name, size in sizes.items()},
        "data.tokens": len(corpus.train),
        "data.vocabulary": len(corpus.vocabulary),
        "data.sha256": corpus.sha256,
    }
    return series, scalars, seconds


class _Training:
    """One run, as :func:`gradclip.train.train` wants it: measured training, validation, averaging."""

    def __init__(self, config: Config, corpus: text.Corpus, setting: Setting, seed: int) -> None:
        self.config, self.seed = config, seed
        self.task = setting.task(config.corpus, config.device, seed)
        vars(self.task)["text"] = corpus  # its cached property: read once, not once a run
        self.probed = Probed(
            self.task,
            seed,
            lambda params: ClippedSGD(params, setting.lr, max_norm=setting.max_norm),
            config.plan,
            extra=self._released,
            extra_columns=RELEASED,
        )
        tokens = self.task.text.train[: config.released_tokens].to(config.device)
        self.streams = parallel.own(text.batchify(tokens, setting.batch), 1)
        self.average = (
            NonMonotoneAverage(self.probed.model, patience=config.patience) if setting.awd else None
        )

    def step(self, iteration: int) -> dict[str, float]:
        row = self.probed.step(iteration) | {"valid": math.nan, "valid_average": math.nan}
        model, steps = self.probed.model, iteration + 1
        if self.average is not None:
            self.average.after_step(model)
        due = self.average is not None and steps % self.config.valid_every == 0
        if (due or steps == self.config.steps) and not row["diverged"]:
            row["valid"] = self.task.evaluate(model)["valid"]
            if (
                self.average is not None
                and self.average.after_validation(row["valid"])
                and self.average.steps
            ):
                with self.average.applied(model):
                    row["valid_average"] = self.task.evaluate(model)["valid"]
        return row

    def _released(self, model: nn.Module, k: int, update: list[Tensor]) -> dict[str, float]:
        every = self.config.released_every
        if not every or k % every:
            return {}
        # A stream of its own: in the released code it is the trainer's, which measuring then changes.
        own = np.random.RandomState((1_000_003 * (self.seed + 1) + k) % 2**32)
        tenth = len(self.streams) // 10
        ends = tuple(segment_lengths(own, tenth, self.task.bptt) for _ in range(2))
        value, norm = released_estimate(model, self.streams, update, ends)
        return {"released": value, "released_grad_norm": norm, "released_segments": len(ends[0])}

    def state_dict(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {"probed": self.probed.state_dict(), "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.probed.load_state_dict(state["probed"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def of_setting(series: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The rows of one setting."""
    rows = series["setting"] == name
    return {key: column[rows] for key, column in series.items()}


def summarise(series: Mapping[str, np.ndarray], *, lr: float, max_norm: float) -> dict[str, float | int]:
    """The scalars that follow from the series; the module's docstring lists them.

    Args:
        series: The columns of a record, the rows of one setting.
        lr: Learning rate.
        max_norm: Clipping threshold.

    Returns:
        Key to number.
    """
    iteration, clip_factor, loss, grad_norm = (
        series[name] for name in ("iteration", "clip_factor", "loss", "grad_norm")
    )
    seeds, steps = np.unique(series["seed"]), int(iteration.max()) + 1
    probed = ~np.isnan(series["bound"])
    subsets = {
        "probe": probed,
        "late": probed & (iteration >= steps // 20),
        "short": probed & (grad_norm < 2 * max_norm),
        "unclipped": probed & (clip_factor == 1.0),
        "clipped": probed & (clip_factor < 1.0),
    }
    mechanical = 2 / (lr * max_norm)
    largest_at = _fraction(series, "largest")
    # bound = ‖g‖/(‖d‖/2), so ‖g‖/(a ‖d‖) = bound/(2a).
    saturation = {
        name: series[column] / (series["bound"] / (2 * _fraction(series, name)))
        for name, column in _ESTIMATORS.items()
    }
    first, last = loss[iteration == 0], loss[iteration >= steps - max(1, steps // 10)].reshape(len(seeds), -1)
    scalars = {
        **_spread("train.loss_initial", float(first.mean()), seeds, first),
        **_spread("train.loss_final", float(last.mean()), seeds, last.mean(axis=1)),
        "train.clipped_share": float((clip_factor < 1).mean()),
        "train.grad_norm_least": float(grad_norm.min()),
        "train.grad_norm_most": float(grad_norm.max()),
        "mechanical.l1": mechanical,
        "mechanical.flat": 2 / lr,
        "mechanical.step": lr * max_norm,
    }
    for subset, rows in subsets.items():
        parts = [rows & (series["seed"] == seed) for seed in seeds]
        scalars[f"{subset}.count"] = int(rows.sum())
        for name, column in _ESTIMATORS.items():
            pooled, *per_seed = (
                _statistics(grad_norm[r], series[column][r], saturation[name][r], mechanical)
                for r in (rows, *parts)
            )
            for key in pooled if subset == "probe" else _SUBSET_STATISTICS:
                spread = _spread(f"{subset}.{key}_{name}", pooled[key], seeds, [one[key] for one in per_seed])
                scalars |= (
                    spread if subset == "probe" else {k: v for k, v in spread.items() if ".seed" not in k}
                )
    for name, column in _ESTIMATORS.items():
        scalars |= _intervals(grad_norm[probed], series[column][probed], name)
    step_curvature = lr * clip_factor * series["local"]
    for key, values in (("step_length", series["update_length"]), ("step_curvature", step_curvature)):
        medians = [np.median(values[probed & (series["seed"] == seed)]) for seed in seeds]
        scalars |= _spread(f"probe.{key}", np.median(values[probed]), seeds, medians)
    scalars["probe.step_curvature_above_2"] = float((step_curvature[probed] > 2).mean())
    weight = np.where(probed, (grad_norm - grad_norm[probed].mean()) ** 2, 0.0)
    long = probed & ~subsets["short"]
    scalars["long.count"] = int(long.sum())
    for name, rows in (("clipped", subsets["clipped"]), ("long", long)):
        scalars[f"probe.leverage_{name}"] = float(weight[rows].sum() / weight.sum())
        for end, extreme in (("least", np.min), ("most", np.max)):
            value = float(extreme(saturation["path"][rows])) if rows.any() else math.nan
            scalars[f"{name}.saturation_path_{end}"] = value
    scalars["probe.largest_at_first"] = float((largest_at[probed] == FRACTIONS[0]).mean())
    # The names that the claims use.
    scalars["probe.saturation_median"] = scalars["probe.saturation_path"]
    for suffix in ("", "_min", "_max"):
        long = f"probe.l1_ols_over_mechanical_path{suffix}"
        scalars[f"probe.l1_ols_over_mechanical{suffix}"] = scalars[long]
    return scalars


def compare(series: Mapping[str, np.ndarray], settings: Sequence[Setting]) -> dict[str, float | int]:
    """The scalars of each setting; the module's docstring lists them.

    Args:
        series: The columns of a record.
        settings: Of its configuration; contrasts are with the first.

    Returns:
        Key to number.
    """
    scalars: dict[str, float | int] = {}
    means: dict[str, list[float]] = {}
    for setting in settings:
        rows, prefix = of_setting(series, setting.name), setting.name
        seeds, steps = np.unique(rows["seed"]), int(rows["iteration"].max()) + 1
        for name, (column, against) in _ALL.items():
            there = ~np.isnan(rows[column])
            parts = [there & (rows["seed"] == seed) for seed in seeds]
            per_seed = [_logarithms(rows[against][part], rows[column][part]) for part in parts]
            pooled = _logarithms(rows[against][there], rows[column][there])
            late = there & (rows["iteration"] >= steps // 20)
            means.setdefault(name, []).append(float(np.mean([pearson for pearson, _ in per_seed])))
            scalars[f"{prefix}.count_{name}"] = int(there.sum())
            for i, key in enumerate(("pearson", "slope")):
                values = [one[i] for one in per_seed]
                scalars[f"{prefix}.{key}_{name}"] = pooled[i]
                scalars[f"{prefix}.{key}_{name}_min"] = float(np.min(values))
                scalars[f"{prefix}.{key}_{name}_max"] = float(np.max(values))
            if there.sum() >= FEWEST:
                interval = fit(rows[against][there], rows[column][there], method="ols").interval()
                low, high = interval.log_correlation
            else:
                low = high = math.nan
            scalars[f"{prefix}.pearson_{name}_low"], scalars[f"{prefix}.pearson_{name}_high"] = low, high
            scalars[f"{prefix}.late_pearson_{name}"] = _logarithms(rows[against][late], rows[column][late])[0]
            scalars[f"{prefix}.contrast_{name}"] = means[name][-1] / means[name][0]
        for name in _ESTIMATORS:
            there = ~np.isnan(rows["bound"])
            level = rows["bound"][there] / (2 * _fraction(rows, name)[there])
            estimate = rows[_ESTIMATORS[name]][there]
            scalars[f"{prefix}.saturation_{name}"] = float(np.median(estimate / level))
            line = fit(rows["grad_norm"][there], estimate, method="ols")
            scalars[f"{prefix}.l1_over_mechanical_{name}"] = (
                line.L1 * setting.lr * setting.max_norm / 2 if setting.max_norm < math.inf else math.nan
            )
        strict = (rows["grad_norm"] + rows["end_grad_norm"]) / rows["update_length"]
        shares = rows["path_1"] / strict
        medians = [np.nanmedian(shares[rows["seed"] == seed]) for seed in seeds]
        for end, value in (("", np.nanmedian(shares)), ("_min", min(medians)), ("_max", max(medians))):
            scalars[f"{prefix}.saturation_strict{end}"] = float(value)
        scalars[f"{prefix}.along_over_local"] = float(np.nanmedian(rows["along"] / rows["local"]))
        there = ~np.isnan(rows["hessian_norm"])
        scalars[f"{prefix}.hessian_count"] = int(there.sum())
        for key, values in (
            ("hessian_norm", rows["hessian_norm"]),
            ("local_over_hessian", rows["local"] / rows["hessian_norm"]),
            ("step_hessian", rows["lr"] * rows["clip_factor"] * rows["hessian_norm"]),
        ):
            for end, extreme in (("", np.median), ("_least", np.min), ("_most", np.max)):
                scalars[f"{prefix}.{key}{end}"] = float(extreme(values[there])) if there.any() else math.nan
        ends = rows["iteration"] == steps - 1
        last = rows["iteration"] >= steps - max(1, steps // 10)
        average = rows["valid_average"][ends]
        begun = average[~np.isnan(average)]
        scalars |= {
            f"{prefix}.clipped_share": float((rows["clip_factor"] < 1).mean()),
            f"{prefix}.loss_final": float(rows["loss"][last].mean()),
            f"{prefix}.valid": float(rows["valid"][ends].mean()),
            f"{prefix}.valid_average": float(begun.mean()) if len(begun) else math.nan,
            f"{prefix}.averaged": len(begun) / len(average),
            f"{prefix}.diverged": int(rows["diverged"][ends].sum()),
        }
    return scalars


def _fraction(series: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The fraction a of the step at which each row of an estimator was taken."""
    if name == "largest":
        return np.asarray(FRACTIONS)[np.stack([series[path] for path in PATHS]).argmax(axis=0)]
    return np.full(len(series["bound"]), LOCAL if name == "local" else 1 / 2)


def _logarithms(grad_norm: np.ndarray, estimate: np.ndarray) -> tuple[float, float]:
    """Correlation and slope of the logarithms."""
    if len(grad_norm) < FEWEST:
        return math.nan, math.nan
    line = fit(grad_norm, estimate, method="ols")
    return line.log_correlation, line.log_slope


_SUBSET_STATISTICS = ("pearson", "slope", "saturation", "l1_ols", "l1_ols_over_mechanical")
_STATISTICS = (*_SUBSET_STATISTICS, "radius", "l0_ols", "l0_envelope", "l1_envelope")


def _statistics(
    grad_norm: np.ndarray, estimate: np.ndarray, saturation: np.ndarray, mechanical: float
) -> dict[str, float]:
    if len(grad_norm) < FEWEST:
        return dict.fromkeys(_STATISTICS, math.nan)
    ols, envelope = (fit(grad_norm, estimate, method=method) for method in ("ols", "envelope"))
    values = (
        ols.log_correlation,
        ols.log_slope,
        float(np.median(saturation)),
        ols.L1,
        ols.L1 / mechanical,
        1 / ols.L1 if ols.L1 > 0 else math.inf,
        ols.L0,
        envelope.L0,
        envelope.L1,
    )
    return dict(zip(_STATISTICS, values, strict=True))


def _intervals(grad_norm: np.ndarray, estimate: np.ndarray, name: str) -> dict[str, float]:
    """95 % block-bootstrap intervals; the seeds follow one another, so few blocks straddle two of them."""
    ols, envelope = (fit(grad_norm, estimate, method=method).interval() for method in ("ols", "envelope"))
    pairs = {
        f"pearson_{name}": ols.log_correlation,
        f"slope_{name}": ols.log_slope,
        f"l0_ols_{name}": ols.L0,
        f"l1_ols_{name}": ols.L1,
        f"l0_envelope_{name}": envelope.L0,
        f"l1_envelope_{name}": envelope.L1,
    }
    return {
        f"probe.{key}_{end}": pair[i] for key, pair in pairs.items() for i, end in enumerate(("low", "high"))
    }


def _spread(key: str, value: float, seeds: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    spread = {key: float(value), f"{key}_min": float(np.min(values)), f"{key}_max": float(np.max(values))}
    return spread | {f"{key}.seed{seed}": float(one) for seed, one in zip(seeds, values, strict=True)}


def relative_change(series: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """How much the gradient has changed on the way to x_{k+1}, relative to its length at x_k.

    ::

        ‖∇f(x_k + a d) - ∇f(x_k)‖ / ‖∇f(x_k)‖ = L̂_a · a ‖d‖ / ‖∇f(x_k)‖

    Args:
        series: The columns of a record.

    Returns:
        The fractions a in rising order, shape (6,), and the changes, shape (probed steps, 6).
    """
    probed = ~np.isnan(series["bound"])
    fractions = np.array([LOCAL, *FRACTIONS])
    estimates = np.stack([series[name][probed] for name in ("local", *PATHS)], axis=1)
    length = (series["update_length"] / series["grad_norm"])[probed, None]
    return fractions, estimates * fractions * length


_TABLE = (
    ("Pearson correlation of the logarithms", "pearson", ".2f"),
    ("slope of the logarithms", "slope", ".2f"),
    ("over its mechanical level, median", "saturation", ".3f"),
    ("least-squares L₁", "l1_ols", ".2f"),
    ("least-squares L₁ over 2/(ηγ)", "l1_ols_over_mechanical", ".2f"),
    ("envelope L₁", "l1_envelope", ".2f"),
)


def table(record: Record) -> str:
    """The statistics of a record as a table in HTML: over all points, and the range over seeds."""
    names = {"path": "midpoint", "largest": "largest of five", "local": "local", "other": "other batch"}
    rows = {
        label: [with_range(record.scalars, f"probe.{key}_{name}", form) for name in names]
        for label, key, form in _TABLE
    }
    return html_table(("estimate", *names.values()), rows)


_REFITS = {
    "probe": "all steps",
    "short": "gradient norm below 2γ",
    "late": "without the first twentieth of the steps",
    "unclipped": "unclipped steps",
}


def refit_table(record: Record) -> str:
    """Least-squares L1 over 2/(ηγ) when points are left out, as a table in HTML; in brackets, over seeds."""
    rows = {
        label: [
            str(record.scalars[f"{subset}.count"]),
            *(
                with_range(record.scalars, f"{subset}.l1_ols_over_mechanical_{name}", ".2f")
                for name in ("path", "local")
            ),
        ]
        for subset, label in _REFITS.items()
    }
    return html_table(("least-squares L₁ over 2/(ηγ)", "points", "midpoint", "local"), rows)
