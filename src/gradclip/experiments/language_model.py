"""Gradient norm against smoothness along the training of a language model (article S3, the paper's Figure 1).

A two-layer tied LSTM is trained by SGD with learning rate η and gradients clipped at norm γ. At probed steps
the gradient on the *same* batch, from the same hidden state, is evaluated again at points between x_k and
x_{k+1}. With d = x_{k+1} - x_k the update, the estimate at fraction a of the step is

    L̂_a = ‖∇f(x_k + a d) - ∇f(x_k)‖ / (a ‖d‖)        [loss / parameter²]

a = 1/2 is the point that the paper's released code evaluates; the paper takes the largest value over a in
{1/6, 1/3, 1/2, 2/3, 5/6} (as recalled); a = 0.01 stands for the local curvature along the step.

**Bound.** If the gradient changes by its own length on the way, L̂_a = ‖∇f(x_k)‖ / (a ‖d‖), whatever f is.
This is the bound used here, the simple form; the strict one has ‖∇f(x_k + a d)‖ + ‖∇f(x_k)‖ above the line.
The estimate over the bound is the relative change of the gradient, called *saturation*. Since the update has
the length ‖d‖ = η min(‖g‖, γ), the bound at the midpoint is 2/η for an unclipped step and (2/(ηγ)) ‖g‖
for a clipped one: a line whose slope 2/(ηγ) knows nothing of the loss.

**Control.** ``path_other_batch`` is the midpoint estimate with the next batch at the midpoint, so it measures
the difference between two batches as well.

Series, one row per training step; a probe is NaN where the step was not probed:

====================  =====================================================================================
column                meaning
====================  =====================================================================================
``seed``              seed of the initial weights; all seeds read the same batches in the same order
``iteration``         training step k, from 0
``loss``              loss of the batch at x_k, nats per word
``grad_norm``         ‖∇f(x_k)‖ of the batch
``clip_factor``       min(1, γ/‖∇f(x_k)‖)
``update_length``     ‖d‖
``path_1_6``, ...     L̂_a at a = 1/6, 1/3, 1/2, 2/3, 5/6; ``path_1_2`` is the midpoint
``path_max``          the largest of these five
``local``             L̂_a at a = 0.01
``path_other_batch``  the control
``bound``             ‖∇f(x_k)‖ / (‖d‖/2)
====================  =====================================================================================

Scalars. A key as given is over all seeds' points together. Behind it, ``_min`` and ``_max`` are its least
and greatest value over seeds, ``.seed0`` is its value for seed 0, and ``_low`` and ``_high`` are the ends of
the 95 % block-bootstrap interval over all points (for an envelope a stability check, no more). EST is
``path`` (the midpoint), ``largest`` (of the five fractions), ``local`` or ``other`` (the control). SUBSET is
``late`` (probed steps after the first twentieth of the steps), ``short`` (‖g‖ < 2γ), ``unclipped`` (clip
factor 1) or ``clipped``. Where fewer than eight points remain, a statistic is NaN.

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
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip import parallel
from gradclip.data import text
from gradclip.experiments._shell import chosen, html_table, recorded, with_range
from gradclip.models.lstm import LanguageModel, State
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD
from gradclip.records import Record
from gradclip.smoothness import fit, path_smoothness
from gradclip.train import train

NAME = "language-model"
PARALLEL = True  # under torchrun
CORPORA = {"reference-manual": text.reference_manual, "penn-treebank": text.penn_treebank}
FRACTIONS = (1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6)
LOCAL_FRACTION = 0.01
EVALUATION_BATCH = 10
FEWEST = 8  # points, below which a fit says nothing

_PATHS = tuple(
    f"path_{f.numerator}_{f.denominator}" for f in (Fraction(f).limit_denominator(9) for f in FRACTIONS)
)
_PROBES = (*_PATHS, "path_max", "local", "path_other_batch")
# Estimator in a scalar's key, and its column.
_ESTIMATORS = {"path": "path_1_2", "largest": "path_max", "local": "local", "other": "path_other_batch"}


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions and hardware.

    Args:
        name: Name of the profile.
        corpus: A key of ``CORPORA``.
        embedding: Width of the embedding and of the last LSTM layer.
        hidden: Units of the other LSTM layers.
        layers: LSTM layers.
        batch: Streams of text side by side.
        bptt: Words per stream and step.
        lr: Learning rate.
        max_norm: Clipping threshold c on the gradient norm.
        steps: Training steps per seed.
        probe_every: The smoothness is measured at every so many steps.
        seeds: Seeds of the initial weights.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads during the run. They split sums, so the last bits depend on them.

    Raises:
        ValueError: A seed has fewer probed steps than a fit needs.
    """

    name: str
    corpus: str
    embedding: int
    hidden: int
    layers: int
    batch: int
    bptt: int
    lr: float
    max_norm: float
    steps: int
    probe_every: int
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

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run: a small model on the reference manual.
        ``paper`` is the model and batch of the paper's released code on the Penn Treebank, on a GPU if there
        is one; the number of steps, how often to probe and the seeds are choices made here.

        Raises:
            ValueError: There is no such profile.
        """
        smoke = Config(
            name="smoke",
            corpus="reference-manual",
            embedding=8,
            hidden=12,
            layers=2,
            batch=4,
            bptt=6,
            lr=30.0,
            max_norm=0.25,
            steps=12,
            probe_every=1,
            seeds=(0, 1),
            device="cpu",
        )
        cpu = dataclasses.replace(
            smoke,
            name="cpu",
            embedding=64,
            hidden=128,
            batch=20,
            bptt=35,
            steps=200,
            probe_every=2,
            seeds=(0, 1, 2),
        )
        paper = dataclasses.replace(
            cpu,
            name="paper",
            corpus="penn-treebank",
            embedding=200,
            hidden=512,
            batch=256,
            bptt=70,
            steps=2000,
            probe_every=5,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return chosen(name, smoke, cpu, paper)


def run(config: Config, out: str | Path) -> Record:
    """Train, measure and save the record; go on where an earlier call was stopped.

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
    return recorded(NAME, config, out, functools.partial(_measure, config, corpus), corpus.sha256)


def _measure(
    config: Config, corpus: text.Corpus, partial: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], float]:
    columns: dict[str, list[float]] = {"seed": []}
    valid, seconds = [], 0.0
    for seed in config.seeds:
        training = _Training(config, corpus, seed)
        result = train(
            training,
            config.steps,
            checkpoint=partial / f"seed-{seed}.pt",
            identity={**identity, "seed": seed},
            label=f"{NAME} seed {seed}",
        )
        columns["seed"] += [seed] * config.steps
        for name, values in result.series.items():
            columns.setdefault(name, []).extend(values)
        valid.append(training.validation_loss())
        seconds += result.seconds
    series = {name: np.asarray(values) for name, values in columns.items()}
    scalars = {
        **summarise(series, lr=config.lr, max_norm=config.max_norm),
        **_spread("valid.loss", float(np.mean(valid)), config.seeds, valid),
        "valid.loss_unigram": text.unigram_loss(corpus),
        "model.parameters": sum(p.numel() for p in training.params),
        "data.tokens": len(corpus.train),
        "data.vocabulary": len(corpus.vocabulary),
        "data.sha256": corpus.sha256,
    }
    return series, scalars, seconds


class _Training:
    """One seed's training, as :func:`gradclip.train.train` wants it."""

    def __init__(self, config: Config, corpus: text.Corpus, seed: int) -> None:
        self.config = config
        self.model = LanguageModel(
            len(corpus.vocabulary),
            embedding=config.embedding,
            hidden=config.hidden,
            layers=config.layers,
            generator=torch.Generator().manual_seed(seed),
        ).to(config.device)
        self.params = list(self.model.parameters())
        parallel.average_gradients(self.params)
        self.optimizer = ClippedSGD(self.params, config.lr, max_norm=config.max_norm)
        streams = parallel.own(text.batchify(corpus.train.to(config.device), config.batch), 1)
        self.streams = streams.shape[1]
        self.state = self.model.initial_state(self.streams)
        self.segments = text.segments(streams, config.bptt)
        self.valid = corpus.valid.to(config.device)

    def step(self, iteration: int) -> dict[str, float]:
        position = iteration % len(self.segments)
        if position == 0:
            self.state = self.model.initial_state(self.streams)
        words, targets = self.segments[position]
        loss, after = self.model.loss(words, targets, self.state)
        loss = parallel.mean(loss)
        self.optimizer.zero_grad()
        loss.backward()
        before = _copies(self.params)
        gradient = [p.grad for p in self.params]
        self.optimizer.step()
        update = [p.detach() - x for p, x in zip(self.params, before, strict=True)]
        row = {
            "iteration": iteration,
            "loss": loss.item(),
            "grad_norm": self.optimizer.last_norm.item(),
            "clip_factor": self.optimizer.last_factor.item(),
            "update_length": total_norm(update).item(),
            **dict.fromkeys((*_PROBES, "bound"), math.nan),
        }
        if iteration % self.config.probe_every == 0:
            ahead = _copies(self.params)
            _assign(self.params, before)
            row |= self._probe(position, after, gradient, update)
            _assign(self.params, ahead)
        self.state = after
        return row

    def _probe(
        self, position: int, after: State, gradient: list[Tensor], update: list[Tensor]
    ) -> dict[str, float]:
        """Measure at x_k, where the parameters are; ``after`` is the hidden state behind the batch."""
        words, targets = self.segments[position]
        same = path_smoothness(
            lambda: self.model.loss(words, targets, self.state)[0],
            self.params,
            update,
            fractions=(*FRACTIONS, LOCAL_FRACTION),
            grad=gradient,
        )
        last = position + 1 == len(self.segments)
        next_words, next_targets = self.segments[0 if last else position + 1]
        next_state = self.model.initial_state(self.streams) if last else after
        # With the gradient of this batch as the start, the two ends of the difference see different batches.
        other = path_smoothness(
            lambda: self.model.loss(next_words, next_targets, next_state)[0],
            self.params,
            update,
            fractions=(1 / 2,),
            grad=gradient,
        )
        *path, local = same.values
        return {
            **dict(zip(_PATHS, path, strict=True)),
            "path_max": max(path),
            "local": local,
            "path_other_batch": other.value,
            "bound": same.grad_norm / (same.step_norm / 2),
        }

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over the validation text, hidden state carried from segment to segment."""
        state = self.model.initial_state(EVALUATION_BATCH)
        losses = []
        for words, targets in text.segments(text.batchify(self.valid, EVALUATION_BATCH), self.config.bptt):
            loss, state = self.model.loss(words, targets, state)
            losses.append(loss.item())
        return float(np.mean(losses))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hidden": [(parallel.whole(h, 1), parallel.whole(c, 1)) for h, c in self.state],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.state = [
            tuple(parallel.own(part, 1).to(self.config.device) for part in pair) for pair in state["hidden"]
        ]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@torch.no_grad()
def _assign(params: list[Tensor], values: list[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def summarise(series: Mapping[str, np.ndarray], *, lr: float, max_norm: float) -> dict[str, float | int]:
    """The scalars that follow from the series; the module's docstring lists them.

    Args:
        series: The columns of a record.
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
    largest_at = np.asarray(FRACTIONS)[np.stack([series[name] for name in _PATHS]).argmax(axis=0)]
    fractions = {"path": 1 / 2, "largest": largest_at, "local": LOCAL_FRACTION, "other": 1 / 2}
    # bound = ‖g‖/(‖d‖/2), so ‖g‖/(a ‖d‖) = bound/(2a).
    saturation = {
        name: series[column] / (series["bound"] / (2 * fractions[name]))
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
    fractions = np.array([LOCAL_FRACTION, *FRACTIONS])
    estimates = np.stack([series[name][probed] for name in ("local", *_PATHS)], axis=1)
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
