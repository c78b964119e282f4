"""Estimators of smoothness put to the test: where the truth is known, and against the paper's released code.

Five studies, each a part of the series.

``batches``: two ends, two batches. Least squares on batches of five in ten dimensions; the Hessian of every
batch is constant, so that L1 = 0 and no slope is real. Points at distances from 0.1 to 1e5 of the minimum;
the midpoint estimate on one batch, and with another batch at the midpoint; steps of constant length
(normalised), with a threshold half-way (clipped), or proportional to the gradient (plain).

``trajectory``: the released scheme along a training run of a small LSTM. The trainer is the released one, as
described: segments of random length, the learning rate in proportion to the length, the threshold not. At
every measured step the gradient is summed over the segments of the first tenth of the text, at x_k and at
the midpoint of the step, **with new random segments each time**, from the random stream that the trainer
uses too:

    L̂ = ‖Σ_B' ∇f(x_k + d/2) - Σ_B ∇f(x_k)‖ / (‖d‖/2)   against   ‖Σ_B ∇f(x_k)‖ / B

with B segments at x_k and B' at the midpoint. The objective has the penalties 2 mean(h²) and mean((Δh)²) of
the outputs h. Beside it the same on identical segments, as means.

``floor``: the same scheme at one point of the run while the step shrinks, in float64: what it adds when there
is nothing to see. Beside it identical segments (:func:`.path_smoothness`), the
Hessian-vector product, and different dropout masks at the two ends.

``stream``: the training loss with the released scheme measuring, without it, and with a
:class:`.Probe`. The first differs because measuring draws from the trainer's stream.

``hessian``: :func:`.hessian_norm` to 1 % on training batches of the run, without and with
``confidence``, against a tight reference; and how value and bound approach it, product by product, before the
first step and at the last measured one.

Series, in long form:

==========  ==============================================================================================
column      meaning
==========  ==============================================================================================
``study``   one of the five, or ``convergence`` for the product-by-product part of the last
``seed``    seed of the weights, the batches and the segments
``point``   number of the point, or training step
``method``  what was measured
``x``       ``batches``, ``trajectory``: gradient norm. ``floor``: scale of the step. ``stream``: training
            step. ``hessian``: the reference. ``convergence``: number of products. NaN where there is none
``value``   the estimate, loss, norm or number
==========  ==============================================================================================

Methods of ``batches`` are RULE-same and RULE-other with RULE ``normalised``, ``clipped``, ``plain``; of
``trajectory`` ``released`` and ``identical``, and ``segments`` (B), ``segments-changed`` (B' - B),
``clip-factor``; of ``floor`` ``released``, ``masks``, ``identical``, ``directional``, ``plain`` (identical
segments without the penalties); of ``stream`` ``released``, ``unmeasured``, ``probe``; of ``hessian``
``fast``, ``confident`` and each with ``-upper`` and ``-products``; of ``convergence`` ``value``, ``upper``,
``reference``.

Scalars. ``_min`` and ``_max`` behind a key are over seeds.

=====================================  =====================================================================
key                                    meaning
=====================================  =====================================================================
``batches.slope_METHOD``               slope of ln L̂ on ln ‖g‖
``trajectory.count``                   measured steps, over all seeds
``trajectory.segments``                mean number of segments B
``trajectory.l1_METHOD``               least-squares L1 of ``released`` and of ``identical``
``trajectory.l1_ratio``                the first over the second
``trajectory.l1_ratio_per_segment``    that over ``trajectory.segments``
``trajectory.pearson_METHOD``          Pearson correlation of the logarithms
``trajectory.slope_METHOD``            slope of the logarithms
``trajectory.difference``              median over points of ``|released/(B identical) - 1|``: what random
                                       segments change at the full step, apart from the factor B
``trajectory.changed``                 share of points where the two ends had different numbers of segments
``trajectory.difference_changed``      the same median over those points alone; NaN if there are none
``floor.directional``                  ‖∇²f d‖/‖d‖, mean over seeds
``floor.METHOD_at_S``                  estimate at the scale S of the step over B ‖∇²f d‖/‖d‖ (over
                                       ‖∇²f d‖/‖d‖ for ``identical``), median over seeds and repetitions; S is
                                       1, 0.1, 0.01, 0.001
``floor.penalties``                    estimate with the penalties over the estimate without, at the full step
``stream.steps``                       training steps compared
``stream.released``                    root mean square difference of the loss from the unmeasured run
``stream.probe``                       the same for the probe
``cost.released``                      segments of gradient work per measured point, two calls
``hessian.count``                      points
``hessian.METHOD_wrong``               share of points where the value is more than 1 % below the reference
``hessian.METHOD_error``               largest relative error
``hessian.METHOD_products``            mean number of products
``hessian.METHOD_upper_broken``        share of points where ``upper`` is below the reference
``model.parameters``                   number of parameters of the LSTM
``data.sha256``                        SHA-256 of the text
=====================================  =====================================================================
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from gradclip.data import text
from gradclip.experiments._probing import assign, copies
from gradclip.experiments._shell import chosen, recorded, run_tasks
from gradclip.experiments._tasks import CORPORA
from gradclip.models.lstm import LanguageModel
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD
from gradclip.records import Record
from gradclip.smoothness import Probe, directional_smoothness, fit, hessian_norm, path_smoothness

NAME = "estimators"
RULES = ("normalised", "clipped", "plain")
SCALES = (1.0, 0.1, 0.01, 0.001)
TOLERANCE = 1e-2
CONFIDENCE = 0.95
# Weights of the penalties in the released code's defaults, and the dropout of its ancestor's output.
ACTIVATION, SLOWNESS, DROPOUT = 2.0, 1.0, 0.4

Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions and hardware.

    Args:
        name: Name of the profile.
        corpus: A key of ``_tasks.CORPORA``.
        tokens: How many of its training tokens, from the first; None for all.
        embedding: Width of the embedding and of the last LSTM layer.
        hidden: Units of the other LSTM layers.
        layers: LSTM layers.
        batch: Streams of text side by side.
        bptt: Words per stream and step, in the mean.
        lr: Learning rate for a segment of length ``bptt``.
        max_norm: Clipping threshold.
        steps: Training steps per seed.
        measure_every: The released scheme measures at every so many steps.
        hessian_every: The Hessian norm is measured at every so many steps.
        repeats: Draws of segments for each scale of the step.
        products: Longest Krylov space in ``convergence``.
        points: Points of ``batches``, per rule and seed.
        seeds: Seeds.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads during the run.
    """

    name: str
    corpus: str
    tokens: int | None
    embedding: int
    hidden: int
    layers: int
    batch: int
    bptt: int
    lr: float
    max_norm: float
    steps: int
    measure_every: int
    hessian_every: int
    repeats: int
    products: int
    points: int
    seeds: tuple[int, ...]
    device: str
    threads: int = 1

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run, with a batch that gives the released
        scheme as many segments per call as it has at its own size. ``paper`` is the released model and batch
        on the Penn Treebank.

        Raises:
            ValueError: There is no such profile.
        """
        smoke = Config(
            name="smoke",
            corpus="reference-manual",
            tokens=4000,
            embedding=4,
            hidden=6,
            layers=2,
            batch=10,
            bptt=8,
            lr=30.0,
            max_norm=0.25,
            steps=16,
            measure_every=2,
            hessian_every=8,
            repeats=2,
            products=3,
            points=12,
            seeds=(0, 1),
            device="cpu",
        )
        cpu = dataclasses.replace(
            smoke,
            name="cpu",
            tokens=30_000,
            embedding=32,
            hidden=64,
            batch=15,
            bptt=35,
            steps=48,
            measure_every=3,
            hessian_every=12,
            products=25,
            points=200,
            seeds=(0, 1, 2),
        )
        paper = dataclasses.replace(
            cpu,
            name="paper",
            corpus="penn-treebank",
            tokens=None,
            embedding=200,
            hidden=512,
            batch=256,
            bptt=70,
            steps=320,
            measure_every=2,
            hessian_every=40,
            products=30,
            repeats=5,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return chosen(name, smoke, cpu, paper)


def run(config: Config, out: str | Path) -> Record:
    """Make the studies and save the record; go on where an earlier call was stopped.

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
    tasks = [
        functools.partial(task, config, corpus, seed)
        for seed in config.seeds
        for task in (_batches, _released_run, _stream, _hessian_run)
    ]
    found, seconds = run_tasks(tasks, checkpoint=partial / "tasks.pt", identity=identity, label=NAME)
    rows = [row for part in found for row in part]
    columns = ("study", "seed", "point", "method", "x", "value")
    series = {name: np.asarray([row[name] for row in rows]) for name in columns}
    scalars = {
        **summarise(series),
        "model.parameters": sum(p.numel() for p in _model(config, corpus, 0).parameters()),
        "data.sha256": corpus.sha256,
    }
    return series, scalars, seconds


def _rows(study: str, seed: int, point: int, x: float, values: Mapping[str, float]) -> list[Row]:
    common = {"study": study, "seed": seed, "point": point, "x": float(x)}
    return [{**common, "method": method, "value": float(value)} for method, value in values.items()]


# Two batches


def _batches(config: Config, corpus: text.Corpus, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    rows = []
    for point, distance in enumerate(torch.logspace(-1, 5, config.points, dtype=torch.float64)):
        direction = draw(10)
        x.data.copy_(distance * direction / direction.norm())
        one, other = draw(5, 10), draw(5, 10)
        (gradient,) = torch.autograd.grad(_squares(one, x), [x])
        norm = gradient.norm().item()
        # The threshold of the clipped steps is the gradient's size in the middle of the range, about 1e2.
        lengths = {"normalised": 1e-3, "clipped": 1e-5 * min(norm, 1e2), "plain": 1e-5 * norm}
        for rule, length in lengths.items():
            step = [-length / norm * gradient]
            for name, batch in (("same", one), ("other", other)):
                result = path_smoothness(
                    functools.partial(_squares, batch, x), [x], step, fractions=(1 / 2,), grad=[gradient]
                )
                rows += _rows("batches", seed, point, result.grad_norm, {f"{rule}-{name}": result.value})
    return rows


def _squares(batch: Tensor, x: Tensor) -> Tensor:
    return (batch @ x).square().mean() / 2


# The released scheme


def segment_lengths(stream: np.random.RandomState, rows: int, bptt: int) -> list[int]:
    """Lengths of random segments that cover ``rows`` rows of text, as the released code draws them.

    ``bptt``, or half of it once in twenty, plus a normal number of standard deviation 5; at least 5. The last
    segment reaches over the end.

    Args:
        stream: Where the numbers come from: the trainer's own stream, in the released code.
        rows: Rows to cover.
        bptt: Mean length.
    """
    lengths: list[int] = []
    while sum(lengths) < rows:
        lengths.append(_segment_length(stream, bptt))
    return lengths


def _segment_length(stream: np.random.RandomState, bptt: int) -> int:
    mean = bptt if stream.random_sample() < 0.95 else bptt / 2
    return max(5, int(stream.normal(mean, 5)))


def objective(
    model: LanguageModel,
    streams: Tensor,
    lengths: Sequence[int],
    *,
    penalties: bool = True,
    masks: torch.Generator | None = None,
) -> Tensor:
    """Mean over segments of the loss on the first rows of the text; the state is carried on, no gradient is.

    Args:
        model: The network.
        streams: Word numbers, shape (rows, batch).
        lengths: Rows of each segment; what is beyond the text is left out.
        penalties: Whether to add 2 mean(h²) + mean((h_t - h_{t-1})²) of the outputs h.
        masks: Draws dropout masks for the outputs, with probability 0.4; None for no dropout.
    """
    state, start, losses = model.initial_state(streams.shape[1]), 0, []
    for length in lengths:
        length = min(length, len(streams) - 1 - start)
        if length <= 0:
            break
        h, state = model.outputs(streams[start : start + length], state)
        if masks is not None:
            kept = torch.rand(h.shape, generator=masks, dtype=h.dtype).to(h.device) >= DROPOUT
            h = h * kept / (1 - DROPOUT)
        logits = linear(h, model.embedding, model.bias)
        loss = cross_entropy(logits.flatten(0, 1), streams[start + 1 : start + 1 + length].flatten())
        if penalties:
            loss = loss + ACTIVATION * h.square().mean() + SLOWNESS * h.diff(dim=0).square().mean()
        losses.append(loss)
        state = [(a.detach(), b.detach()) for a, b in state]
        start += length
    return torch.stack(losses).mean()


def released_estimate(
    model: LanguageModel,
    streams: Tensor,
    step: Sequence[Tensor],
    lengths: tuple[Sequence[int], Sequence[int]],
    *,
    masks: torch.Generator | None = None,
) -> tuple[float, float]:
    """The released code's estimate and gradient norm, with the segments of each end given.

    The gradient is summed over segments for the first, and averaged for the second.

    Args:
        model: At x_k.
        streams: The text.
        step: d.
        lengths: Segments at x_k, and at x_k + d/2.
        masks: As for :func:`objective`; it goes on drawing from one end to the other.
    """
    params = list(model.parameters())

    def summed(segments: Sequence[int]) -> list[Tensor]:
        count = len(segments)
        value = count * objective(model, streams, segments, masks=masks)
        return list(torch.autograd.grad(value, params))

    saved = copies(params)
    here = summed(lengths[0])
    with torch.no_grad():
        for p, d in zip(params, step, strict=True):
            p.add_(d, alpha=0.5)
    there = summed(lengths[1])
    assign(params, saved)
    change = total_norm([b - a for a, b in zip(here, there, strict=True)])
    norm = total_norm(here).item() / len(lengths[0])
    return (change / (total_norm(step) / 2)).item(), norm


def _model(config: Config, corpus: text.Corpus, seed: int) -> LanguageModel:
    return LanguageModel(
        len(corpus.vocabulary),
        embedding=config.embedding,
        hidden=config.hidden,
        layers=config.layers,
        generator=torch.Generator().manual_seed(seed),
    ).to(config.device)


class _Trainer:
    """The released trainer: one numpy stream decides the lengths of segments, whoever asks for them."""

    def __init__(self, config: Config, corpus: text.Corpus, seed: int) -> None:
        self.config = config
        self.model = _model(config, corpus, seed)
        self.params = list(self.model.parameters())
        self.streams = text.batchify(corpus.train[: config.tokens].to(config.device), config.batch)
        self.optimizer = ClippedSGD(self.params, config.lr, max_norm=config.max_norm)
        self.stream = np.random.RandomState(seed)
        self.tenth = len(self.streams) // 10

    def lengths(self, stream: np.random.RandomState | None = None) -> list[int]:
        return segment_lengths(stream or self.stream, self.tenth, self.config.bptt)

    def steps(self) -> Iterator[tuple[int, Callable[[], Tensor], float]]:
        """At each step: its number, the loss on its batch, and that loss; then the optimizer takes it."""
        state, start = self.model.initial_state(self.config.batch), 0
        for number in range(self.config.steps):
            if start + 5 >= len(self.streams):
                state, start = self.model.initial_state(self.config.batch), 0
            length = min(_segment_length(self.stream, self.config.bptt), len(self.streams) - 1 - start)
            words, targets = (self.streams[start + i : start + i + length] for i in (0, 1))
            before = state
            value, state = self.model.loss(words, targets, before)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.param_groups[0]["lr"] = self.config.lr * length / self.config.bptt
            yield number, lambda w=words, t=targets, s=before: self.model.loss(w, t, s)[0], value.item()
            start += length


def _released_run(config: Config, corpus: text.Corpus, seed: int) -> list[Row]:
    trainer = _Trainer(config, corpus, seed)
    own = np.random.RandomState(seed + 1)
    rows = []
    last = (config.steps - 1) // config.measure_every * config.measure_every
    for number, _, loss in trainer.steps():
        rows += _rows("stream", seed, number, number, {"released": loss})
        before = copies(trainer.params)
        trainer.optimizer.step()
        if number % config.measure_every:
            continue
        after = copies(trainer.params)
        step = [b - a for a, b in zip(before, after, strict=True)]
        assign(trainer.params, before)
        ends = trainer.lengths(), trainer.lengths()
        value, norm = released_estimate(trainer.model, trainer.streams, step, ends)
        same = path_smoothness(
            functools.partial(objective, trainer.model, trainer.streams, trainer.lengths(own)),
            trainer.params,
            step,
            fractions=(1 / 2,),
        )
        counts = {
            "segments": len(ends[0]),
            "segments-changed": len(ends[1]) - len(ends[0]),
            "clip-factor": trainer.optimizer.last_factor.item(),
        }
        rows += _rows("trajectory", seed, number, norm, {"released": value})
        rows += _rows("trajectory", seed, number, same.grad_norm, {"identical": same.value})
        rows += _rows("trajectory", seed, number, math.nan, counts)
        if number == last:
            rows += _floor(config, trainer, step, seed)
        assign(trainer.params, after)
    return rows


def _floor(config: Config, trainer: _Trainer, step: list[Tensor], seed: int) -> list[Row]:
    """At the trainer's current point, in float64."""
    model = copy.deepcopy(trainer.model).double()
    params, step = list(model.parameters()), [d.double() for d in step]
    own, masks = np.random.RandomState(seed + 2), torch.Generator().manual_seed(seed)
    lengths = trainer.lengths(own)
    same = functools.partial(objective, model, trainer.streams, lengths)
    along = directional_smoothness(same, params, step)
    rows = _rows("floor", seed, 0, 0.0, {"directional": along})
    result = path_smoothness(same, params, step, fractions=[scale / 2 for scale in SCALES])
    for scale, value in zip(SCALES, result.values, strict=True):
        rows += _rows("floor", seed, 0, scale, {"identical": value})
        shorter = [scale * d for d in step]
        for repeat in range(config.repeats):
            ends = trainer.lengths(own), trainer.lengths(own)
            value, _ = released_estimate(model, trainer.streams, shorter, ends)
            rows += _rows("floor", seed, repeat, scale, {"released": value / len(ends[0])})
            value, _ = released_estimate(model, trainer.streams, shorter, (lengths, lengths), masks=masks)
            rows += _rows("floor", seed, repeat, scale, {"masks": value / len(lengths)})
    plain = functools.partial(objective, model, trainer.streams, lengths, penalties=False)
    result = path_smoothness(plain, params, step, fractions=(1 / 2,))
    return rows + _rows("floor", seed, 0, 1.0, {"plain": result.value})


def _stream(config: Config, corpus: text.Corpus, seed: int) -> list[Row]:
    rows = []
    for method in ("unmeasured", "probe"):
        trainer = _Trainer(config, corpus, seed)
        fixed = functools.partial(
            objective, trainer.model, trainer.streams, trainer.lengths(np.random.RandomState(seed + 1))
        )
        probe = Probe(fixed, trainer.params, every=max(1, config.steps // 4), fractions=(1 / 2,))
        for number, batch, loss in trainer.steps():
            rows += _rows("stream", seed, number, number, {method: loss})
            if method == "probe":
                with probe.step(batch, trainer.optimizer):
                    trainer.optimizer.step()
            else:
                trainer.optimizer.step()
    return rows


# The Hessian's norm


def _hessian_run(config: Config, corpus: text.Corpus, seed: int) -> list[Row]:
    trainer = _Trainer(config, corpus, seed)
    rows = []
    last = (config.steps - 1) // config.hessian_every * config.hessian_every
    for number, batch, _ in trainer.steps():
        if number % config.hessian_every == 0:
            measure = functools.partial(hessian_norm, batch, trainer.params)
            # A start of its own, so that it cannot share what the others have missed.
            other = torch.Generator().manual_seed(seed + 1)
            reference = measure(tol=1e-3, confidence=0.999, generator=other).value
            for method, confidence in (("fast", None), ("confident", CONFIDENCE)):
                found = measure(tol=TOLERANCE, confidence=confidence)
                values = {"": found.value, "-upper": found.upper, "-products": found.hvps}
                values = {method + end: value for end, value in values.items()}
                rows += _rows("hessian", seed, number, reference, values)
            if number in (0, last) and seed == config.seeds[0]:
                rows += _rows("convergence", seed, number, math.nan, {"reference": reference})
                for products in range(1, config.products + 1, 1 if config.products < 10 else 3):
                    found = measure(tol=1e-12, max_iter=products)
                    both = {"value": found.value, "upper": found.upper}
                    rows += _rows("convergence", seed, number, products, both)
        trainer.optimizer.step()
    return rows


# Scalars


def summarise(series: Mapping[str, np.ndarray]) -> dict[str, float | int]:
    """The scalars that follow from the series; the module's docstring lists them.

    Args:
        series: The columns of a record.
    """
    seeds = np.unique(series["seed"])

    def pick(study: str, method: str, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        rows = (series["study"] == study) & (series["method"] == method)
        if seed is not None:
            rows &= series["seed"] == seed
        return series["x"][rows], series["value"][rows]

    scalars: dict[str, float | int] = {}

    def spread(key: str, statistic: Callable[[int | None], float]) -> None:
        per_seed = [statistic(seed) for seed in seeds]
        scalars[key] = float(statistic(None))
        scalars[f"{key}_min"], scalars[f"{key}_max"] = float(min(per_seed)), float(max(per_seed))

    for rule in RULES:
        for name in (f"{rule}-same", f"{rule}-other"):
            spread(f"batches.slope_{name}", lambda seed, m=name: fit(*pick("batches", m, seed)).log_slope)

    count = pick("trajectory", "segments")[1]
    scalars["trajectory.count"], scalars["trajectory.segments"] = len(count), float(count.mean())
    for name in ("released", "identical"):
        line = functools.partial(lambda seed, m: fit(*pick("trajectory", m, seed), method="ols"), m=name)
        spread(f"trajectory.l1_{name}", lambda seed, line=line: line(seed).L1)
        spread(f"trajectory.pearson_{name}", lambda seed, line=line: line(seed).log_correlation)
        spread(f"trajectory.slope_{name}", lambda seed, line=line: line(seed).log_slope)
    scalars["trajectory.l1_ratio"] = scalars["trajectory.l1_released"] / scalars["trajectory.l1_identical"]
    scalars["trajectory.l1_ratio_per_segment"] = (
        scalars["trajectory.l1_ratio"] / scalars["trajectory.segments"]
    )
    changed = pick("trajectory", "segments-changed")[1] != 0
    released, identical = (pick("trajectory", name)[1] for name in ("released", "identical"))
    difference = np.abs(released / count / identical - 1)
    scalars["trajectory.difference"] = float(np.median(difference))
    scalars["trajectory.changed"] = float(changed.mean())
    scalars["trajectory.difference_changed"] = (
        float(np.median(difference[changed])) if changed.any() else math.nan
    )

    along = {seed: pick("floor", "directional", seed)[1].item() for seed in seeds}
    scalars["floor.directional"] = float(np.mean(list(along.values())))
    for name in ("released", "masks", "identical"):
        for scale in SCALES:
            ratios = []
            for seed in seeds:
                x, value = pick("floor", name, seed)
                ratios += (value[x == scale] / along[seed]).tolist()
            scalars[f"floor.{name}_at_{scale:g}"] = float(np.median(ratios))
    x, value = pick("floor", "identical")
    scalars["floor.penalties"] = float(np.median(value[x == 1.0] / pick("floor", "plain")[1]))

    unmeasured = pick("stream", "unmeasured")[1]
    scalars["stream.steps"] = len(unmeasured) // len(seeds)
    for name in ("released", "probe"):
        scalars[f"stream.{name}"] = float(np.sqrt(np.mean((pick("stream", name)[1] - unmeasured) ** 2)))
    scalars["cost.released"] = float((2 * count + pick("trajectory", "segments-changed")[1]).mean())

    for name in ("fast", "confident"):
        reference, value = pick("hessian", name)
        error = 1 - value / reference
        scalars["hessian.count"] = len(value)
        scalars[f"hessian.{name}_wrong"] = float((error > TOLERANCE).mean())
        scalars[f"hessian.{name}_error"] = float(error.max())
        scalars[f"hessian.{name}_products"] = float(pick("hessian", f"{name}-products")[1].mean())
        upper = pick("hessian", f"{name}-upper")[1]
        scalars[f"hessian.{name}_upper_broken"] = float((upper < reference).mean())
    return scalars
