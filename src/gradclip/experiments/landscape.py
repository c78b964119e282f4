"""Which part of "smoothness grows with the gradient norm" is the landscape? Controls on text and on images.

Three networks: ``language``, a two-layer tied LSTM; ``images``, a residual network with batch norm, and
``bare``, one without. The activation of these is smooth, because a short path does not measure the curvature
of a ReLU network. Each is trained by SGD on a grid of learning rates η and clipping thresholds γ, and without
clipping. At x_k, with d = x_{k+1} - x_k the update, and the batch of the step at both ends of a difference,

    L̂_a = ‖∇f(x_k + a d) - ∇f(x_k)‖ / (a ‖d‖)        along a fraction a of the step
    ‖∇²f(x_k) d‖ / ‖d‖                               its limit, by a Hessian-vector product
    ‖∇²f(x_k) r‖ / ‖r‖                               along a random direction, r normal
    ‖∇²f(x_k)‖                                       the sharpness                 [all in loss/parameter²]

*Swapped* steps: at the points of a clipped training L̂_a is also measured along the step that it did not take,
s = -η g, and at the points of training without clipping along s = -η min(1, γ₀/‖g‖) g. They tell the points
that clipping reaches from the length of its steps.

*Full batch*: some runs read the same batch at every step, the first of the text or the first images without
augmentation, so that training is gradient descent on one function.

With g = ∇f(x_k), the *level* of L̂_a is ‖g‖/(a ‖d‖) = max(1, ‖g‖/γ)/(a η), its value where the gradient
changes by its own length. It knows nothing of the loss, and where steps are clipped it has a slope in ‖g‖ of
1/(aηγ), which is 2/(ηγ) at the midpoint. L̂_a over the level is ρ, the relative change of the gradient.

Series, one row per probed step; NaN where something was not measured:

====================  =====================================================================================
column                meaning
====================  =====================================================================================
``network``           the network: ``language``, ``images`` or ``bare``
``lr``                learning rate η
``max_norm``          threshold γ; infinite in training without clipping
``full``              1 where every step reads the same batch, 0 elsewhere
``seed``              seed of the weights and of the random directions; all runs of a network read the same
                      batches
``iteration``         training step k, from 0
``loss``              loss of the batch at x_k, nats per word or per image
``grad_norm``         ‖∇f(x_k)‖ of the batch
``clip_factor``       min(1, γ/‖∇f(x_k)‖)
``update_length``     ‖d‖
``path_0.003``, ...   L̂_a at a = 0.003, 0.01, 0.03, 0.1, 0.25, 0.5
``swapped``           L̂_a along s, a = 0.5
``swapped_length``    ‖s‖
``along``             ‖∇²f(x_k) d‖ / ‖d‖
``random``            ‖∇²f(x_k) r‖ / ‖r‖
``fixed_grad_norm``   gradient norm on a fixed batch, the first of the validation text or of the images held
                      out
``fixed``             L̂_a on the fixed batch along the same d, a = 0.01
``hessian_norm``      ‖∇²f(x_k)‖ to 1 %, by residuals
``diverged``          1 in the last row of a run that was given up because its loss had passed ten times that
                      of guessing, and 0 everywhere else
====================  =====================================================================================

Scalars. Those of the language model have the keys below, those of the other networks have them behind
``images.`` or ``bare.``; each network is summarised by itself. EST is ``midpoint`` (a = 0.5), ``local`` (a =
0.01), ``swapped``, ``along``, ``random``, or ``fixed``, which goes with the gradient norm of the fixed batch.
SUBSET is ``grid`` (all runs with clipping that are not of the full batch), ``clipped`` or ``unclipped`` (its
steps with factor below 1, or of 1), ``late`` (its probes after the first quarter of the training),
``plain_LR`` (no clipping, learning rate LR), ``late_plain_LR``, or ``full`` (the runs on the full batch).
*Within runs* means that the mean over each run is subtracted from the logarithms first, so that differences
between runs do not count. Where there is nothing to compute from, a statistic is NaN.

Behind the key of a statistic, ``_min`` and ``_max`` are its least and greatest value over seeds, and ``_low``
and ``_high`` the ends of the 95 % interval of a block bootstrap whose blocks are whole runs.

===================================  ========================================================================
key                                  meaning
===================================  ========================================================================
``fit.slope_EST``                    L1 is fitted to each clipped run by least squares: slope of ln L1 on
                                     ln 2/(ηγ) over the runs
``fit.ratio_EST``                    geometric mean of L1 / (2/(ηγ)) over the runs
``fit.zero_EST``                     runs whose L1 is zero; they are left out of both
``fit_unclipped.slope_EST``,         the same, of fits to the unclipped steps alone; so ``ratio`` and ``zero``
``SUBSET.count``                     probed steps
``SUBSET.pearson_EST``               correlation of ln L̂ and ln ‖g‖ within runs
``SUBSET.slope_EST``                 slope of ln L̂ on ln ‖g‖ within runs
``SUBSET.shuffled_EST``              97.5 % quantile of the absolute correlation when the pairs of a run are
                                     shuffled
``SUBSET.level_EST``                 mean correlation when ρ is shuffled within runs and the level is not:
                                     what step lengths alone give. EST is ``midpoint``, ``local`` or
                                     ``swapped``
``SUBSET.level_share_EST``           that over ``SUBSET.pearson_EST``
``SUBSET.saturation_EST``            median of ρ; EST is ``midpoint``, ``local`` or ``swapped``
``grid.clipped_share``               share of probed steps that are clipped
``plain_LR.diverged``                runs that were given up
``partial.pearson_EST``              partial correlation of ln L̂ and ln ‖g‖ over the runs of the grid, given
                                     ln ‖d‖, k and ln(1 + k); EST is not ``random`` or ``swapped``
``partial_within.pearson_EST``       the same within runs
``difference.pearson_EST``           correlation of the changes of ln L̂ and ln ‖g‖ from one probe to the next
``edge.count_KIND``                  Hessian norms at KIND steps of the grid: ``clipped``, ``unclipped`` or
                                     ``late_clipped``; or of the full batch after the first quarter:
                                     ``full_clipped``, ``full_unclipped``, or ``full_settled``, unclipped in
                                     the last quarter
``edge.ratio_KIND``                  median of ‖∇²f‖ / (2/η_k), η_k = η min(1, γ/‖g‖): 1 on the edge of
                                     stability
``edge.slope_KIND``                  slope of ln ‖∇²f‖ on ln 2/η_k, over runs
``edge.offset_KIND``                 height of that line over ln 2/η_k, as a factor, at the mean of ln 2/η_k:
                                     the geometric mean of ‖∇²f‖ / (2/η_k). 1 on the edge, where the slope is
                                     1 too
``fraction.deviation_A``             median of ``|L̂_a / along - 1|`` at a = A, over the runs of the grid
``fraction.agree_A``                 share of probes where it is at most 0.05
``fraction.largest``                 largest a whose median is at most 0.05; 0 if none
``fraction_clipped.deviation_A``     the same over clipped steps alone; so ``agree`` and ``largest``
``model.parameters``                 number of parameters
``data.tokens``                      training tokens; of ``language``
``data.vocabulary``                  different words; of ``language``
``data.images``                      images to train on; of ``images`` and ``bare``
``data.sha256``                      SHA-256 of the text or of the images
===================================  ========================================================================
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradclip.experiments._probing import assign, copies
from gradclip.experiments._shell import chosen, recorded, run_tasks
from gradclip.experiments._statistics import line, partial_correlation
from gradclip.experiments._tasks import Language, Pictures, losses
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD
from gradclip.records import Record
from gradclip.smoothness import directional_smoothness, fit, hessian_norm, path_smoothness

NAME = "landscape"
#: The networks, and what their scalars' keys begin with.
NETWORKS = {"language": "", "images": "images.", "bare": "bare."}
FRACTIONS = (0.003, 0.01, 0.03, 0.1, 0.25, 0.5)
LOCAL, MIDPOINT = 0.01, 0.5
AGREEMENT = 0.05
# Estimator in a scalar's key: its column, and the column of the gradient norm that goes with it.
ESTIMATORS = {
    "midpoint": ("path_0.5", "grad_norm"),
    "local": ("path_0.01", "grad_norm"),
    "swapped": ("swapped", "grad_norm"),
    "along": ("along", "grad_norm"),
    "random": ("random", "grad_norm"),
    "fixed": ("fixed", "fixed_grad_norm"),
}
_FITTED = 8  # points that `fit` needs
_RESAMPLES, _SHUFFLES = 400, 200

Task = Language | Pictures
Series = Mapping[str, np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is trained, over which grid, for how long, and how often it is measured.

    Args:
        task: The network and its data.
        lrs: Learning rates of the grid.
        max_norms: Thresholds of the grid.
        plain_lrs: Learning rates of the runs without clipping.
        swap_max_norm: Threshold γ₀ of the steps that are tried in those.
        full_lrs: Learning rates of the runs on the full batch.
        full_max_norms: Their thresholds, one each.
        full_steps: Their training steps.
        full_every: They are measured at every so many steps, everything but the other fractions and batches.
        steps: Training steps of a run of the grid.
        probe_every: The estimates at a = 0.01 and 0.5 are measured at every so many steps.
        product_every: So are the other fractions, the Hessian-vector products and the fixed batch; a multiple
            of ``probe_every``.
        hessian_every: So is the Hessian norm, half-way between two multiples; the half is a multiple of
            ``probe_every``.
        full_images: Images of the full batch. Of text it is the first batch.

    Raises:
        ValueError: What is measured rarely would fall between two probes, ``full_max_norms`` has another
            length than ``full_lrs``, or a full batch of images has none.
    """

    task: Task
    lrs: tuple[float, ...]
    max_norms: tuple[float, ...]
    plain_lrs: tuple[float, ...]
    swap_max_norm: float
    full_lrs: tuple[float, ...]
    full_max_norms: tuple[float, ...]
    full_steps: int
    full_every: int
    steps: int
    probe_every: int
    product_every: int
    hessian_every: int
    full_images: int = 0

    def __post_init__(self) -> None:
        if len(self.full_lrs) != len(self.full_max_norms):
            raise ValueError(
                f"full_max_norms must have one threshold for each of full_lrs={self.full_lrs}, "
                f"got {self.full_max_norms}"
            )
        if isinstance(self.task, Pictures) and self.full_lrs and self.full_images < 1:
            raise ValueError(f"full_images must be at least 1, got {self.full_images}")
        for name, distance in (
            ("product_every", self.product_every),
            ("half of hessian_every", self.hessian_every / 2),
        ):
            if distance % self.probe_every:
                raise ValueError(
                    f"{name} must be a multiple of probe_every={self.probe_every}, got {distance:g}"
                )

    @property
    def cells(self) -> list[tuple[float, float, bool]]:
        """Learning rate, threshold, and whether on the full batch, of every training."""
        return [
            *((lr, max_norm, False) for lr, max_norm in product(self.lrs, self.max_norms)),
            *((lr, math.inf, False) for lr in self.plain_lrs),
            *((lr, max_norm, True) for lr, max_norm in zip(self.full_lrs, self.full_max_norms, strict=True)),
        ]


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions and hardware.

    Args:
        name: Name of the profile.
        language: The LSTM.
        images: The residual network with batch norm.
        bare: The residual network without.
        seeds: Seeds.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads during the run.
    """

    name: str
    language: Setting
    images: Setting
    bare: Setting
    seeds: tuple[int, ...]
    device: str
    threads: int = 1

    def setting(self, network: str) -> Setting:
        """The setting of a network."""
        return {"language": self.language, "images": self.images, "bare": self.bare}[network]

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run: small networks on the reference manual
        and on scikit-learn's digits. ``short`` has the Penn Treebank and CIFAR-10, for a third of an hour on
        one CPU. ``paper`` is the model and batch of the paper's released code on the Penn Treebank, and
        ResNet-20 on CIFAR-10.

        Raises:
            ValueError: There is no such profile.
        """
        cpu = Config(
            name="cpu",
            language=Setting(
                Language("reference-manual", embedding=32, hidden=64, layers=2, batch=20, bptt=15),
                lrs=(10.0, 30.0, 60.0),
                max_norms=(0.1, 0.25, 1.0),
                plain_lrs=(2.0, 30.0),
                swap_max_norm=0.25,
                full_lrs=(10.0, 30.0, 30.0),
                full_max_norms=(0.1, 0.1, 0.25),
                full_steps=300,
                full_every=15,
                steps=80,
                probe_every=2,
                product_every=8,
                hessian_every=20,
            ),
            images=Setting(
                _pictures("digits", batch_norm=True),
                lrs=(0.3, 1.0, 3.0),
                max_norms=(0.25, 0.75, 1.25),
                plain_lrs=(0.3,),
                swap_max_norm=0.75,
                full_lrs=(0.3, 0.3),
                full_max_norms=(0.125, 4.0),
                full_steps=160,
                full_every=20,
                steps=48,
                probe_every=4,
                product_every=24,
                hessian_every=16,
                full_images=128,
            ),
            bare=Setting(
                _pictures("digits", batch_norm=False),
                lrs=(0.1, 0.3, 1.0),
                max_norms=(0.25, 1.0, 2.0),
                plain_lrs=(0.1,),
                swap_max_norm=1.0,
                full_lrs=(0.05, 0.05),
                full_max_norms=(0.5, 8.0),
                full_steps=160,
                full_every=20,
                steps=48,
                probe_every=4,
                product_every=24,
                hessian_every=16,
                full_images=128,
            ),
            seeds=(0, 1, 2),
            device="cpu",
        )
        tiny = {
            "plain_lrs": (0.3,),
            "full_lrs": (0.3,),
            "full_max_norms": (0.5,),
            "full_steps": 8,
            "full_every": 4,
            "steps": 16,
            "probe_every": 2,
            "product_every": 8,
            "hessian_every": 8,
            "full_images": 16,
        }
        smoke = dataclasses.replace(
            cpu,
            name="smoke",
            language=dataclasses.replace(
                cpu.language,
                task=Language("reference-manual", embedding=8, hidden=12, layers=2, batch=4, bptt=5),
                lrs=(10.0, 30.0),
                max_norms=(0.25, 1.0),
                plain_lrs=(2.0, 30.0),
                full_lrs=(30.0,),
                full_max_norms=(0.25,),
                full_steps=20,
                full_every=4,
                steps=20,
                product_every=4,
                hessian_every=12,
            ),
            images=dataclasses.replace(
                cpu.images,
                task=_pictures("digits", width=2, batch=8, batch_norm=True),
                lrs=(1.0,),
                max_norms=(0.5, 1.5),
                **tiny,
            ),
            bare=dataclasses.replace(
                cpu.bare,
                task=_pictures("digits", width=2, batch=8, batch_norm=False),
                lrs=(0.3,),
                max_norms=(0.5, 1.5),
                **tiny,
            ),
            seeds=(0, 1),
        )
        short = dataclasses.replace(
            cpu,
            name="short",
            language=dataclasses.replace(
                cpu.language,
                task=Language("penn-treebank", embedding=64, hidden=128, layers=2, batch=20, bptt=20),
                steps=100,
            ),
            images=dataclasses.replace(
                cpu.images,
                task=_pictures("cifar10", batch_norm=True),
                max_norms=(0.25, 0.5, 0.75),
                swap_max_norm=0.5,
                full_max_norms=(0.25, 4.0),
                full_images=64,
                steps=64,
                product_every=16,
            ),
            bare=dataclasses.replace(
                cpu.bare,
                task=_pictures("cifar10", batch_norm=False),
                max_norms=(0.125, 0.25, 0.5),
                swap_max_norm=0.25,
                full_lrs=(0.03, 0.03),
                full_max_norms=(1.0, 8.0),
                full_images=64,
                steps=64,
                product_every=16,
            ),
        )
        long = {
            "full_images": 1000,
            "full_steps": 600,
            "full_every": 25,
            "steps": 300,
            "hessian_every": 80,
        }
        paper = dataclasses.replace(
            short,
            name="paper",
            language=dataclasses.replace(
                short.language,
                task=Language("penn-treebank", embedding=200, hidden=512, layers=2, batch=256, bptt=70),
                full_steps=600,
                full_every=25,
                steps=300,
                hessian_every=80,
            ),
            images=dataclasses.replace(
                short.images,
                task=_pictures("cifar10", blocks=3, width=16, batch=128, batch_norm=True),
                **long,
            ),
            bare=dataclasses.replace(
                short.bare,
                task=_pictures("cifar10", blocks=3, width=16, batch=128, batch_norm=False),
                **long,
            ),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return chosen(name, smoke, cpu, short, paper)


def _pictures(images: str, *, batch_norm: bool, blocks: int = 1, width: int = 4, batch: int = 32) -> Pictures:
    """A residual network with a smooth activation."""
    return Pictures(
        images,
        blocks=blocks,
        width=width,
        batch=batch,
        batch_norm=batch_norm,
        held_out={"digits": 237, "cifar10": 5000}[images],
        augment=images == "cifar10",
        sharpness=16.0,
    )


def run(config: Config, out: str | Path) -> Record:
    """Train, measure and save the record; go on where an earlier call was stopped.

    A finished record of the same configuration, source, data, device and versions is returned as it is.

    Args:
        config: What to run.
        out: Folder of all records.

    Returns:
        The record as read back from ``out``.

    Raises:
        DataError: A data set is missing or damaged.
    """
    hashes = "".join(_task(config, network).sha256 for network in NETWORKS)
    sha256 = hashlib.sha256(hashes.encode()).hexdigest()
    return recorded(NAME, config, out, functools.partial(_measure, config), sha256)


@functools.lru_cache(maxsize=len(NETWORKS))
def _task(config: Config, network: str) -> Task:
    return dataclasses.replace(config.setting(network).task, device=config.device)


def _measure(
    config: Config, partial: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], float]:
    tasks = [
        functools.partial(_train, config, network, *cell, seed)
        for network in NETWORKS
        for cell in config.setting(network).cells
        for seed in config.seeds
    ]
    found, seconds = run_tasks(tasks, checkpoint=partial / "tasks.pt", identity=identity, label=NAME)
    rows = [row for part in found for row in part]
    series = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    scalars: dict[str, Any] = {}
    for network, before in NETWORKS.items():
        here = summarise(of(series, network)) | _described(_task(config, network))
        scalars |= {f"{before}{key}": value for key, value in here.items()}
    return series, scalars, seconds


def _described(task: Task) -> dict[str, Any]:
    if isinstance(task, Language):
        data = {"data.tokens": len(task.text.train), "data.vocabulary": len(task.text.vocabulary)}
    else:
        data = {"data.images": len(task.data.train) - task.held_out}
    parameters = sum(p.numel() for p in task.model(0).parameters())
    return {"model.parameters": parameters, **data, "data.sha256": task.sha256}


def _train(config: Config, network: str, lr: float, max_norm: float, full: bool, seed: int) -> list[Row]:
    setting, task = config.setting(network), _task(config, network)
    model = task.model(seed)
    params = list(model.parameters())
    optimizer = ClippedSGD(params, lr, max_norm=max_norm)
    directions = torch.Generator().manual_seed(seed + 1)
    whole = functools.partial(_full_batch, setting, task, model)
    state, rows = task.start(), []
    for k in range(setting.full_steps if full else setting.steps):
        batch = whole if full else losses(task, model, k, state)
        loss, state = (whole(), None) if full else task.loss(model, k, state)
        if not loss.item() <= 10 * task.guess:
            if rows:
                rows[-1]["diverged"] = 1.0
            break
        optimizer.zero_grad()
        loss.backward()
        gradient, here = [p.grad for p in params], copies(params)
        optimizer.step()
        if k % (setting.full_every if full else setting.probe_every):
            continue
        ahead = copies(params)
        update = [b - a for a, b in zip(here, ahead, strict=True)]
        norm = optimizer.last_norm.item()
        factor = 1.0 if math.isfinite(max_norm) else min(1.0, setting.swap_max_norm / norm)
        swapped = [-lr * factor * g for g in gradient]
        assign(params, here)
        rows.append(
            {
                "network": network,
                "lr": lr,
                "max_norm": max_norm,
                "full": float(full),
                "seed": seed,
                "iteration": k,
                "loss": loss.item(),
                "grad_norm": norm,
                "clip_factor": optimizer.last_factor.item(),
                "update_length": total_norm(update).item(),
                "swapped_length": lr * factor * norm,
                **_probe(
                    _due(setting, k, full),
                    batch,
                    lambda: task.fixed(model),
                    params,
                    gradient,
                    update,
                    swapped,
                    directions,
                ),
                "diverged": 0.0,
            }
        )
        assign(params, ahead)
    return rows


def _full_batch(setting: Setting, task: Task, model: nn.Module) -> Tensor:
    if isinstance(task, Pictures):
        return task.leading(model, 0, setting.full_images)
    return task.loss(model, 0, None)[0]


def _due(setting: Setting, k: int, full: bool) -> tuple[bool, bool, bool]:
    """Whether the Hessian-vector product, the other fractions and batches, and the Hessian norm are due."""
    if full:
        return True, False, True
    products = k % setting.product_every == 0
    return products, products, k % setting.hessian_every == setting.hessian_every // 2


def _probe(
    due: tuple[bool, bool, bool],
    batch: Callable[[], Tensor],
    fixed: Callable[[], Tensor],
    params: list[Tensor],
    gradient: list[Tensor],
    update: list[Tensor],
    swapped: list[Tensor],
    directions: torch.Generator,
) -> Row:
    """Measure at x_k, where the parameters are."""
    rare = ("swapped", "along", "random", "fixed_grad_norm", "fixed", "hessian_norm")
    row = dict.fromkeys((*(f"path_{a:g}" for a in FRACTIONS), *rare), math.nan)
    product_due, others_due, hessian_due = due
    fractions = FRACTIONS if others_due else (LOCAL, MIDPOINT)
    path = path_smoothness(batch, params, update, fractions=fractions, grad=gradient)
    row |= {f"path_{a:g}": value for a, value in zip(fractions, path.values, strict=True)}
    row["swapped"] = path_smoothness(batch, params, swapped, fractions=(MIDPOINT,), grad=gradient).value
    if product_due:
        row["along"] = directional_smoothness(batch, params, update)
    if others_due:
        # Drawn on the CPU, so that a seed gives the same directions on every device.
        draws = [torch.randn(p.shape, generator=directions).to(p) for p in params]
        row["random"] = directional_smoothness(batch, params, draws)
        other = path_smoothness(fixed, params, update, fractions=(LOCAL,))
        row |= {"fixed_grad_norm": other.grad_norm, "fixed": other.value}
    if hessian_due:
        row["hessian_norm"] = hessian_norm(batch, params).value
    return row


# Statistics


def of(series: Series, network: str) -> dict[str, np.ndarray]:
    """The rows of one network.

    Args:
        series: The columns of a record.
        network: A key of ``NETWORKS``.
    """
    rows = series["network"] == network
    return {name: column[rows] for name, column in series.items()}


def subsets(series: Series) -> dict[str, np.ndarray]:
    """Which rows belong to each SUBSET of the scalars, as masks.

    Args:
        series: The columns of one network.
    """
    lr, max_norm, factor, k = (series[name] for name in ("lr", "max_norm", "clip_factor", "iteration"))
    full = series["full"] == 1
    grid = np.isfinite(max_norm) & ~full
    late = k >= np.where(full, k.max(initial=0), k[~full].max(initial=0)) / 4
    plain = {}
    for value in np.unique(lr[~grid & ~full]):
        rows = ~grid & ~full & (lr == value)
        plain |= {f"plain_{value:g}": rows, f"late_plain_{value:g}": rows & late}
    parts = {"clipped": factor < 1, "unclipped": factor == 1, "late": late}
    return {"grid": grid, **{name: grid & part for name, part in parts.items()}, **plain, "full": full}


def fits(series: Series, estimator: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The least-squares L1 of each run with a threshold, beside what the step length suggests.

    Args:
        series: The columns of one network.
        estimator: A key of ``ESTIMATORS``.
        rows: Mask of the rows to use. Runs with fewer than eight of them, or with equal gradient norms, are
            left out.

    Returns:
        ``mechanical`` (2/(ηγ)), ``l1`` and ``seed``, one element per run.
    """
    column, norm = ESTIMATORS[estimator]
    found = []
    for run in _runs(series, rows & np.isfinite(series[column]) & np.isfinite(series["max_norm"])):
        if len(run) >= _FITTED and np.ptp(series[norm][run]) > 0:
            first = run[0]
            mechanical = 2 / (series["lr"][first] * series["max_norm"][first])
            fitted = fit(series[norm][run], series[column][run], method="ols")
            found.append((mechanical, fitted.L1, series["seed"][first]))
    return dict(zip(("mechanical", "l1", "seed"), np.array(found).reshape(-1, 3).T, strict=True))


def level(series: Series, fraction: float) -> np.ndarray:
    """‖g‖ / (a ‖d‖), the estimate of a gradient that changes by its own length.

    Args:
        series: The columns of a record.
        fraction: a.
    """
    return series["grad_norm"] / (fraction * series["update_length"])


def edge(series: Series) -> np.ndarray:
    """2/η_k with η_k = η min(1, γ/‖g‖): the sharpness on the edge of stability.

    Args:
        series: The columns of a record.
    """
    return 2 / (series["lr"] * series["clip_factor"])


def summarise(series: Series) -> dict[str, float | int]:
    """The scalars that follow from the series of one network; the module's docstring lists them.

    Args:
        series: The columns of one network.
    """
    scalars: dict[str, float | int] = {}
    masks = subsets(series)
    for name, mask in (("fit", masks["grid"]), ("fit_unclipped", masks["unclipped"])):
        for estimator in ("midpoint", "local", "along", "fixed"):
            found = fits(series, estimator, mask)
            positive = found["l1"] > 0
            scalars[f"{name}.zero_{estimator}"] = int((~positive).sum())
            x, y = np.log(found["mechanical"][positive]), np.log(found["l1"][positive])
            pairs = [np.array([[a, b]]) for a, b in zip(x, y, strict=True)]
            seeds = found["seed"][positive]
            scalars |= _intervals(f"{name}.slope_{estimator}", lambda p: line(p)[0], pairs, seeds)
            scalars |= _intervals(f"{name}.ratio_{estimator}", _ratio, pairs, seeds)
    for name, mask in masks.items():
        scalars[f"{name}.count"] = int(mask.sum())
        for estimator in ESTIMATORS:
            pairs, seeds = _pairs(series, estimator, mask)
            pairs = [pair - pair.mean(axis=0) for pair in pairs]
            scalars |= _intervals(f"{name}.slope_{estimator}", lambda p: line(p)[0], pairs, seeds)
            scalars |= _intervals(f"{name}.pearson_{estimator}", lambda p: line(p)[1], pairs, seeds)
            scalars[f"{name}.shuffled_{estimator}"] = float(np.quantile(np.abs(_shuffled(pairs)), 0.975))
        for estimator, height in (
            ("midpoint", level(series, MIDPOINT)),
            ("local", level(series, LOCAL)),
            ("swapped", series["grad_norm"] / (MIDPOINT * series["swapped_length"])),
        ):
            scalars |= _mechanical(series, name, estimator, height, mask)
            left, pearson = (scalars[f"{name}.{key}_{estimator}"] for key in ("level", "pearson"))
            scalars[f"{name}.level_share_{estimator}"] = left / pearson
    scalars["grid.clipped_share"] = scalars["clipped.count"] / scalars["grid.count"]
    for name, mask in masks.items():
        if name.startswith("plain"):
            scalars[f"{name}.diverged"] = int(series["diverged"][mask].sum())
    scalars |= _partial(series, masks["grid"])
    k, unclipped = series["iteration"], series["clip_factor"] == 1
    full = masks["full"] & (k >= k[masks["full"]].max(initial=0) / 4)
    settled = masks["full"] & (k >= k[masks["full"]].max(initial=0) * 3 / 4)
    kinds = {
        "clipped": masks["clipped"],
        "unclipped": masks["unclipped"],
        "late_clipped": masks["late"] & masks["clipped"],
        "full_clipped": full & ~unclipped,
        "full_unclipped": full & unclipped,
        "full_settled": settled & unclipped,
    }
    for kind, chosen_rows in kinds.items():
        rows = chosen_rows & np.isfinite(series["hessian_norm"])
        scalars[f"edge.count_{kind}"] = int(rows.sum())
        runs = list(_runs(series, rows))
        seeds = np.array([series["seed"][run[0]] for run in runs])
        pairs = [np.log(np.stack([edge(series)[r], series["hessian_norm"][r]], axis=1)) for r in runs]
        scalars |= _intervals(f"edge.ratio_{kind}", _median_ratio, pairs, seeds)
        scalars |= _intervals(f"edge.slope_{kind}", lambda p: line(p)[0], pairs, seeds)
        scalars |= _intervals(f"edge.offset_{kind}", _ratio, pairs, seeds)
    return (
        scalars
        | _fractions(series, "fraction", masks["grid"])
        | _fractions(series, "fraction_clipped", masks["clipped"])
    )


def deviations(series: Series, rows: np.ndarray) -> np.ndarray:
    """``|L̂_a / along - 1|`` of the probes with a Hessian-vector product, shape (probes, fractions).

    Args:
        series: The columns of a record.
        rows: Mask of the rows to use.
    """
    rows = rows & np.isfinite(series["along"])
    estimates = np.stack([series[f"path_{a:g}"][rows] for a in FRACTIONS], axis=1)
    return np.abs(estimates / series["along"][rows, None] - 1)


def _fractions(series: Series, name: str, mask: np.ndarray) -> dict[str, float]:
    scalars, good = {}, [0.0]
    rows = mask & np.isfinite(series["along"])
    runs = [np.flatnonzero(rows).searchsorted(run) for run in _runs(series, rows)]
    found = deviations(series, mask)
    seeds = np.array([series["seed"][rows][run[0]] for run in runs])
    for i, a in enumerate(FRACTIONS):
        values = [found[run, i, None] for run in runs]
        scalars |= _intervals(f"{name}.deviation_{a:g}", lambda v: float(np.median(v)), values, seeds)
        scalars |= _intervals(f"{name}.agree_{a:g}", lambda v: float((v <= AGREEMENT).mean()), values, seeds)
        if scalars[f"{name}.deviation_{a:g}"] <= AGREEMENT:
            good.append(a)
    return scalars | {f"{name}.largest": max(good)}


def _partial(series: Series, mask: np.ndarray) -> dict[str, float]:
    scalars = {}
    k, length = series["iteration"], series["update_length"]
    controls = np.stack([np.log(length), k, np.log1p(k)], axis=1)
    for estimator in ("midpoint", "local", "along", "fixed"):
        runs, seeds = _pairs(series, estimator, mask, controls)
        scalars |= _intervals(f"partial.pearson_{estimator}", partial_correlation, runs, seeds)
        within = [run - run.mean(axis=0) for run in runs]
        scalars |= _intervals(f"partial_within.pearson_{estimator}", partial_correlation, within, seeds)
        changes = [np.diff(run[:, :2], axis=0) for run in runs]
        scalars |= _intervals(f"difference.pearson_{estimator}", lambda p: line(p)[1], changes, seeds)
    return scalars


def _mechanical(
    series: Series, subset: str, estimator: str, height: np.ndarray, mask: np.ndarray
) -> dict[str, float]:
    """Saturation, and the correlation that is left when ρ is shuffled and the level is not."""
    column, _ = ESTIMATORS[estimator]
    change = (series[column] / height)[mask]
    scalars = {f"{subset}.saturation_{estimator}": float(np.median(change)) if change.size else math.nan}
    generator, draws = np.random.default_rng(0), []
    runs = [run for run in _runs(series, mask) if len(run) > 1]
    logs = [(np.log(series["grad_norm"][r]), np.log(height[r]), np.log(series[column][r])) for r in runs]
    for _ in range(_SHUFFLES):
        pairs = [np.stack([g, h + generator.permutation(s - h)], axis=1) for g, h, s in logs]
        draws.append(line(_joined([pair - pair.mean(axis=0) for pair in pairs]))[1])
    return scalars | {f"{subset}.level_{estimator}": float(np.mean(draws))}


def _shuffled(pairs: list[np.ndarray]) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.array(
        [
            line(_joined([np.stack([p[:, 0], generator.permutation(p[:, 1])], axis=1) for p in pairs]))[1]
            for _ in range(_SHUFFLES)
        ]
    )


def _runs(series: Series, mask: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers of each run under the mask, in the order of the rows."""
    keys = np.stack([series[name] for name in ("lr", "max_norm", "full", "seed")], axis=1)
    chosen = np.flatnonzero(mask)
    for key in np.unique(keys[chosen], axis=0):
        yield chosen[(keys[chosen] == key).all(axis=1)]


def _pairs(
    series: Series, estimator: str, mask: np.ndarray, extra: np.ndarray | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Per run the columns ln ‖g‖, ln L̂ and ``extra``, and the run's seed; runs of one point are left out."""
    column, norm = ESTIMATORS[estimator]
    runs = [run for run in _runs(series, mask & np.isfinite(series[column])) if len(run) > 1]
    seeds = np.array([series["seed"][run[0]] for run in runs])
    parts = [np.log(np.stack([series[norm][run], series[column][run]], axis=1)) for run in runs]
    if extra is not None:
        parts = [np.concatenate([part, extra[run]], axis=1) for part, run in zip(parts, runs, strict=True)]
    return parts, seeds


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty((0, 2))


def _ratio(pairs: np.ndarray) -> float:
    return float(np.exp((pairs[:, 1] - pairs[:, 0]).mean())) if len(pairs) else math.nan


def _median_ratio(pairs: np.ndarray) -> float:
    return float(np.exp(np.median(pairs[:, 1] - pairs[:, 0]))) if len(pairs) else math.nan


def _intervals(
    key: str, statistic: Callable[[np.ndarray], float], runs: list[np.ndarray], seeds: np.ndarray
) -> dict[str, float]:
    """The statistic over all runs, its range over seeds, and a bootstrap over runs."""
    if not runs:
        return {f"{key}{end}": math.nan for end in ("", "_min", "_max", "_low", "_high")}
    chosen = [[run for run, of in zip(runs, seeds, strict=True) if of == seed] for seed in np.unique(seeds)]
    per_seed = [statistic(np.concatenate(part)) for part in chosen]
    generator = np.random.default_rng(0)
    draws = generator.integers(len(runs), size=(_RESAMPLES, len(runs)))
    values = np.array([statistic(np.concatenate([runs[i] for i in draw])) for draw in draws])
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, (0.025, 0.975)) if values.size else (math.nan, math.nan)
    return {
        key: float(statistic(np.concatenate(runs))),
        f"{key}_min": float(min(per_seed)),
        f"{key}_max": float(max(per_seed)),
        f"{key}_low": float(low),
        f"{key}_high": float(high),
    }
