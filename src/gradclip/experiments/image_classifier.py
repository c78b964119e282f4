"""Smoothness along the training of residual networks on images: the paper's Figure 3, with controls.

The paper (section 5) shows three trainings of an image classifier: the default, SGD with momentum; a learning
rate of 1 without clipping; and 5 with the gradient clipped at 0.25. Its code has no part for images. The
learning rate 0.1 and momentum 0.9 of the default and the weight decay 1e-4 of all three are those of He et
al. (2016): *reconstructed*, as are batch size, schedule and network.

Each training is made with batch norm and without, and with two activations: ReLU, and a softplus ln(1 +
exp(β z))/β, which is ReLU for β → ∞. At x_k, with d = x_{k+1} - x_k and one batch at both ends,

    L̂_a = ‖∇f(x_k + a d) - ∇f(x_k)‖ / (a ‖d‖)                                     [loss/parameter²]

The gradient of a ReLU network jumps where a unit's input crosses zero. On a path that crosses N such *kinks*,
whose jumps J_i are unrelated, the jumps alone give L̂_a ≈ ‖J‖ √N / (a ‖d‖); N grows like a, so this grows
like a^(-1/2) as a falls, until N = 0. In a batch of n images N grows like n and J falls like 1/n, so the
whole is a function of n a. The Hessian of automatic differentiation has no part of it. *Gates held*: every
unit keeps passing or blocking what it passed or blocked at x_k, whatever its input becomes; f is then smooth
along d and has the same gradient and the same automatic Hessian at x_k.

Series, of two kinds of rows; NaN, 0 or "" where a column belongs to the other kind or was not measured. Rows
``training`` are the probed steps of the trainings; rows ``kinks`` are paths along one step of the default,
in float64, on the first training images instead of the batch.

=======================  ==================================================================================
column                   meaning
=======================  ==================================================================================
``kind``                 ``training`` or ``kinks``
``setting``              ``momentum`` (the default), ``plain`` or ``clipped``
``batch_norm``           1 with batch norm, 0 without
``sharpness``            β; infinite for ReLU
``seed``                 seed of the weights and of the random directions; all runs read the same batches
``iteration``            training step k, from 0
``loss``                 loss of the batch at x_k, nats
``grad_norm``            ‖∇f(x_k)‖ of the batch
``clip_factor``          min(1, γ/‖∇f(x_k)‖); 1 without clipping
``lr``                   learning rate η
``update_length``        ‖d‖
``path_1_6``, ...        L̂_a at a = 1/6, 1/3, 1/2, 2/3, 5/6
``path_max``             the largest of them: what the paper describes, as recalled
``path_1``               L̂_1
``end_grad_norm``        ‖∇f(x_k + d)‖, so that path_1 ≤ (grad_norm + end_grad_norm) / update_length
``local``                L̂_a at a = 0.01
``other_batch``          L̂_1/2 with the next batch at the midpoint
``bound``                ‖∇f(x_k)‖ / (‖d‖/2), the level of the midpoint: L̂_1/2 of a gradient that changes
                         by its own length
``along``                ‖∇²f(x_k) d‖ / ‖d‖, with the Hessian of automatic differentiation
``random``               ‖∇²f(x_k) r‖ / ‖r‖, r normal
``fixed_grad_norm``      gradient norm on a fixed batch of images that are not trained on
``fixed``                L̂_a on the fixed batch along the same d, a = 0.01
``hessian_norm``         ‖∇²f(x_k)‖ to 1 %, by residuals
``swapped``              L̂_1/2 along d made as long as the other rule would have made it: in clipped training
                         the unclipped step, elsewhere the step clipped at 0.25
``crossed``              kinks on the way from x_k to x_k + d/100: how many inputs of units change sign
``weight_norm``          ‖x_k‖: with batch norm, weights twice as long have half the gradient
``released``             the released code's scheme, carried over to images (reconstructed): midpoint only,
                         gradients over a fixed tenth of the training images, batch by batch
``released_grad_norm``   gradient norm on that tenth
``diverged``             1 from where a run was given up, 0 before
``images``               kinks: number of images n
``fraction``             kinks: a; 0 stands for the limit, ‖∇²f d‖ / ‖d‖
``held``                 kinks: 1 if the gates were held, else 0
``estimate``             kinks: L̂_a
=======================  ==================================================================================

In rows ``kinks``, ``sharpness`` is that of the activation during the measurement; training was with ReLU.

Scalars. CELL is ``SETTING_NORM_ACT``, with NORM ``norm`` or ``bare`` (without batch norm) and ACT ``relu`` or
``smooth``, as ``clipped_norm_relu``. EST is ``largest`` (path_max), ``midpoint``, ``local``, ``along``,
``random``, ``fixed``, ``other``, ``swapped``, ``released`` or ``hessian``; correlations are with the gradient
norm on the same images. Everything is computed within runs: the mean over each run is subtracted from the
logarithms first. Behind a key, ``_min`` and ``_max`` are the least and greatest value over seeds. Where there
is nothing to compute from, a statistic is NaN.

==============================  =============================================================================
key                             meaning
==============================  =============================================================================
``CELL.count``                  probed steps
``CELL.clipped_share``          share of them that are clipped
``CELL.diverged``               runs that were given up
``CELL.pearson_EST``            correlation of ln L̂ and ln ‖g‖
``CELL.slope_EST``              slope of ln L̂ on ln ‖g‖
``CELL.late_EST``               the correlation after the first quarter of the training
``CELL.partial_EST``            partial correlation given ln ‖d‖, k and ln(1 + k)
``CELL.weights_EST``            partial correlation given ln ‖x_k‖
``CELL.difference_EST``         correlation of the changes of the logarithms from one probe to the next
``CELL.shuffled_EST``           97.5 % quantile of the absolute correlation when a run's pairs are shuffled
``CELL.level_midpoint``         mean correlation of the midpoint estimate when its ratio to ``bound`` is
                                shuffled within runs and ``bound`` is not: what step lengths alone give
``CELL.level_share``            that over ``CELL.pearson_midpoint``
``CELL.saturation_midpoint``    median of path_1_2 / bound
``CELL.saturation_strict``      median of path_1 / ((‖∇f(x_k)‖ + ‖∇f(x_k + d)‖)/‖d‖), which is at most 1
``CELL.ratio_local``            median of local / along
``CELL.deviation_local``        median of ``|local / along - 1|``
``CELL.ratio_midpoint``         median of path_1_2 / along
``CELL.crossed``                median of ``crossed``
``CELL.edge``                   median of ‖∇²f‖ / (2/η_k), η_k = η min(1, γ/‖g‖)
``CELL.loss``                   mean loss of the last quarter of the probed steps, nats
``CELL.valid``                  validation loss after training, nats
``CELL.accuracy``               share of validation images with the right class
``CELL.test``                   share of lossless test images with the right class
``kinks.touched_NORM``          median of L̂_a / along over ReLU's paths with a ≤ 0.01 that cross a kink
``kinks.touched_count_NORM``    number of these paths
``kinks.untouched_NORM``        median of ``|L̂_a / along - 1|`` over those that cross none
``kinks.untouched_count_NORM``  number of these paths
``kinks.held_NORM``             median of ``|L̂_a / along - 1|`` with the gates held, a ≤ 0.01
``kinks.excess_fraction_NORM``  exponent p of E ∝ a^p n^q, where E² is the mean of L̂_a² - along² over steps,
                                ReLU; least squares of the logarithms where a ≤ 0.1 and the paths of one a
                                and n cross five kinks or more in all
``kinks.excess_images_NORM``    q, from the same fit
``kinks.crossings_NORM``        mean number of kinks on the way to x_k + d/100, for the fewest images
``kinks.units``                 inputs of units for that many images
``model.parameters``            number of parameters with batch norm
``data.images``                 images that are trained on
``data.lossless``               test images that are lossless, which ``test`` is over
``data.sha256``                 SHA-256 of the images
==============================  =============================================================================
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.experiments._probing import LOCAL, Plan, Probed, assign, copies
from gradclip.experiments._shell import chosen, recorded, run_tasks
from gradclip.experiments._statistics import line, partial_correlation
from gradclip.experiments._tasks import Pictures, losses
from gradclip.models.resnet import ResNet
from gradclip.norms import total_norm
from gradclip.optim import ClippedSGD
from gradclip.records import Record
from gradclip.smoothness import directional_smoothness, path_smoothness
from gradclip.smoothness._evaluate import undisturbed
from gradclip.train import train

NAME = "image-classifier"
WEIGHT_DECAY = 1e-4
MAX_NORM = 0.25
DROP = 10.0  # at each milestone the learning rate is divided by it


@dataclass(frozen=True)
class Setting:
    """A panel of the paper's Figure 3.

    Args:
        label: Name in figures and tables.
        lr: Learning rate.
        max_norm: Clipping threshold, infinite for none.
        momentum: Momentum.
    """

    label: str
    lr: float
    max_norm: float
    momentum: float


SETTINGS = {
    "momentum": Setting("default: 0.1, momentum 0.9", 0.1, math.inf, 0.9),
    "plain": Setting("rate 1, no clipping", 1.0, math.inf, 0.0),
    "clipped": Setting("rate 5, clipped at 0.25", 5.0, MAX_NORM, 0.0),
}
# Estimator in a scalar's key: its column, and the column of the gradient norm that goes with it.
ESTIMATORS = {
    "largest": ("path_max", "grad_norm"),
    "midpoint": ("path_1_2", "grad_norm"),
    "local": ("local", "grad_norm"),
    "along": ("along", "grad_norm"),
    "random": ("random", "grad_norm"),
    "fixed": ("fixed", "fixed_grad_norm"),
    "other": ("other_batch", "grad_norm"),
    "swapped": ("swapped", "grad_norm"),
    "released": ("released", "released_grad_norm"),
    "hessian": ("hessian_norm", "grad_norm"),
}
EXTRA = ("swapped", "crossed", "weight_norm", "released", "released_grad_norm")
KINKS = ("images", "fraction", "held", "estimate")
_SHUFFLES = 200
_ENOUGH = 5
_SHORT = 0.01  # paths at most this part of a step are called short

Series = Mapping[str, np.ndarray]
Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Everything that decides the result, apart from versions, hardware and ``SETTINGS``.

    Args:
        name: Name of the profile.
        images: A key of ``_tasks.IMAGE_SETS``.
        blocks: Blocks per stage; 3 makes ResNet-20.
        width: Channels of the first stage.
        batch: Images per step.
        held_out: Training images that make the validation loss.
        augment: Whether images are shifted and mirrored.
        sharpness: β of the smooth activation.
        steps: Training steps with ReLU and batch norm.
        control_steps: Training steps of the other cells.
        milestones: Parts of a training after which the learning rate is divided by ten.
        probe_every: Steps between two probes.
        product_every: Steps between two probes with Hessian-vector products; a multiple of ``probe_every``.
        hessian_every: The same for the norm of the Hessian.
        released_every: The same for the released scheme.
        released_images: The tenth of the training images.
        seeds: Seeds.
        kink_steps: Steps of the default along which paths are measured, in training order.
        kink_images: Numbers of images on these paths. With the first of them gates are held and β varies.
        kink_fractions: Their fractions a, rising.
        kink_sharpness: Their finite β.
        device: ``"cpu"`` or ``"cuda"``.
        workers: Runs at a time, each in a process of its own. They gain where one leaves the device
            idle. Of several, progress is shown when one has ended.
        threads: CPU threads during the run.

    Raises:
        ValueError: What is measured rarely would fall between two probes.
    """

    name: str
    images: str
    blocks: int
    width: int
    batch: int
    held_out: int
    augment: bool
    sharpness: float
    steps: int
    control_steps: int
    milestones: tuple[float, ...]
    probe_every: int
    product_every: int
    hessian_every: int
    released_every: int
    released_images: int
    seeds: tuple[int, ...]
    kink_steps: tuple[int, ...]
    kink_images: tuple[int, ...]
    kink_fractions: tuple[float, ...]
    kink_sharpness: tuple[float, ...]
    device: str
    workers: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        Plan(self.probe_every, self.product_every, self.hessian_every)
        if self.released_every % self.probe_every:
            raise ValueError(
                f"released_every must be a multiple of probe_every={self.probe_every}, "
                f"got {self.released_every}"
            )

    @staticmethod
    def profile(name: str) -> "Config":
        """The configuration of a profile.

        ``smoke`` takes seconds, for tests. ``cpu`` is the book's run: the smallest network of the family on
        scikit-learn's digits. ``short`` is such a network on CIFAR-10, minutes on one CPU thread. ``paper``
        is ResNet-20 on CIFAR-10 as in He et al. (2016, section 4.2): batches of 128, 64,000 steps, a tenth of
        the learning rate after 32,000 and 48,000, 45,000 images to train on. That takes hours on a GPU; run
        it again when it is stopped, it goes on.

        Raises:
            ValueError: There is no such profile.
        """
        smoke = Config(
            name="smoke",
            images="digits",
            blocks=1,
            width=2,
            batch=16,
            held_out=360,
            augment=False,
            sharpness=16.0,
            steps=4,
            control_steps=4,
            milestones=(),
            probe_every=2,
            product_every=4,
            hessian_every=4,
            released_every=4,
            released_images=20,
            seeds=(0, 1),
            kink_steps=(1, 3),
            kink_images=(16, 48),
            kink_fractions=(1e-4, 1e-2, 1e-1, 1.0),
            kink_sharpness=(16.0,),
            device="cpu",
        )
        cpu = dataclasses.replace(
            smoke,
            name="cpu",
            width=8,
            batch=32,
            steps=64,
            control_steps=64,
            probe_every=4,
            product_every=8,
            hessian_every=24,
            released_every=8,
            released_images=108,
            seeds=(0, 1, 2),
            kink_steps=(12, 48),
            kink_images=(32, 96, 288),
            kink_fractions=tuple(10.0**-e for e in (3.5, 3, 2.5, 2, 1.5, 1, 0.5, 0)),
            kink_sharpness=(16.0, 64.0, 256.0),
        )
        short = dataclasses.replace(
            cpu,
            name="short",
            images="cifar10",
            batch=64,
            held_out=5000,
            augment=True,
            steps=160,
            control_steps=160,
            probe_every=8,
            product_every=16,
            hessian_every=80,
            released_every=40,
            released_images=512,
            kink_steps=(60,),
            kink_images=(64, 128, 256),
            kink_fractions=tuple(10.0**-e for e in (6, 5, 4, 3.5, 3, 2.5, 2, 1.5, 1, 0.5, 0)),
        )
        paper = dataclasses.replace(
            short,
            name="paper",
            blocks=3,
            width=16,
            batch=128,
            steps=64_000,
            control_steps=8_000,
            milestones=(0.5, 0.75),
            probe_every=200,
            product_every=400,
            hessian_every=2_000,
            released_every=2_000,
            released_images=4_500,
            kink_steps=(400, 4_000),
            kink_images=(128, 384, 1_152),
            device="cuda" if torch.cuda.is_available() else "cpu",
            workers=4,
        )
        return chosen(name, smoke, cpu, short, paper)

    def task(self, *, batch_norm: bool, sharpness: float) -> Pictures:
        """What is trained."""
        return Pictures(
            self.images,
            self.blocks,
            self.width,
            self.batch,
            batch_norm,
            self.held_out,
            self.augment,
            self.device,
            sharpness,
        )

    @property
    def cells(self) -> list["Cell"]:
        """The trainings of one seed."""
        return [
            Cell(setting, batch_norm, sharpness)
            for batch_norm, sharpness, setting in product((True, False), (math.inf, self.sharpness), SETTINGS)
        ]


@dataclass(frozen=True)
class Cell:
    """A kind of training.

    Args:
        setting: A key of ``SETTINGS``.
        batch_norm: Whether the network has batch norm.
        sharpness: Of its activation.
    """

    setting: str
    batch_norm: bool
    sharpness: float

    @property
    def name(self) -> str:
        """``SETTING_NORM_ACT``, as in the keys of the scalars."""
        activation = "relu" if math.isinf(self.sharpness) else "smooth"
        return f"{self.setting}_{norm_name(self.batch_norm)}_{activation}"


def norm_name(batch_norm: bool) -> str:
    """``norm`` with batch norm, ``bare`` without."""
    return "norm" if batch_norm else "bare"


def run(config: Config, out: str | Path) -> Record:
    """Train, measure and save the record; go on where an earlier call was stopped.

    A finished record of the same configuration, source, data, device and versions is returned as it is.

    Args:
        config: What to run.
        out: Folder of all records.

    Returns:
        The record as read back from ``out``.

    Raises:
        DataError: The images are missing or damaged.
    """
    sha256 = _task(config, True, math.inf).sha256
    return recorded(NAME, config, out, functools.partial(_measure, config), sha256)


# A worker makes the tasks of the configuration that it is sent, and keeps them for its next run.
@functools.lru_cache(maxsize=4)
def _task(config: Config, batch_norm: bool, sharpness: float) -> Pictures:
    return config.task(batch_norm=batch_norm, sharpness=sharpness)


def _measure(
    config: Config, partial: Path, identity: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any], float]:
    jobs = list(product(config.cells, config.seeds))
    found, seconds = run_tasks(
        [
            *(functools.partial(_train, config, cell, seed, partial, identity) for cell, seed in jobs),
            *(functools.partial(_kinks, config, *job) for job in product((True, False), config.seeds)),
        ],
        checkpoint=partial / "runs.pt",
        identity=identity,
        label=NAME,
        workers=config.workers,
        threads=config.threads,
    )
    rows = [row for part, _ in found for row in part]
    outcomes: dict[str, list[dict[str, float]]] = {}
    for (cell, _), (_, outcome) in zip(jobs, found, strict=False):
        outcomes.setdefault(cell.name, []).append(outcome)
    series = _table(rows)
    primary = _task(config, True, math.inf)
    scalars = {
        **summarise(series),
        **{
            key: value
            for name, each in outcomes.items()
            for what in ("valid", "accuracy", "test")
            for key, value in _spread(f"{name}.{what}", [one[what] for one in each], np.mean).items()
        },
        "kinks.units": _units(primary, config.kink_images[0]),
        "model.parameters": sum(p.numel() for p in primary.model(0).parameters()),
        "data.images": len(primary.data.train_labels) - config.held_out,
        "data.lossless": int(primary.data.lossless.sum()),
        "data.sha256": primary.sha256,
    }
    return series, scalars, seconds


def _train(
    config: Config, cell: Cell, seed: int, partial: Path, identity: Mapping[str, Any]
) -> tuple[list[Row], dict[str, float]]:
    """The probed steps of a training, which goes on where it was stopped, and how well the network does."""
    task = _task(config, cell.batch_norm, cell.sharpness)
    primary = cell.batch_norm and math.isinf(cell.sharpness)
    steps = config.steps if primary else config.control_steps
    training = _Training(config, task, cell.setting, seed, steps)
    label = f"{cell.name} seed {seed}"
    result = train(
        training,
        steps,
        checkpoint=partial / f"{cell.name}-{seed}.pt",
        identity={**identity, "run": label},
        label=label,
    )
    named = {
        "kind": "training",
        "setting": cell.setting,
        "batch_norm": int(cell.batch_norm),
        "sharpness": cell.sharpness,
        "seed": seed,
    }
    rows = [
        named | {name: values[k] for name, values in result.series.items()}
        for k in range(0, steps, config.probe_every)
    ]
    return rows, {**task.evaluate(training.model), "test": task.test_accuracy(training.model)}


def _table(rows: list[Row]) -> dict[str, np.ndarray]:
    """The rows as columns, filled up where a kind of row lacks a column."""
    empty = {name: math.nan for row in rows for name in row}
    empty |= {"kind": "", "setting": "", "images": 0, "held": 0, "batch_norm": 0}
    return {name: np.asarray([row.get(name, fill) for row in rows]) for name, fill in empty.items()}


class _Training(Probed):
    """One training, with the schedule and the columns of this experiment."""

    def __init__(self, config: Config, task: Pictures, setting: str, seed: int, steps: int) -> None:
        self.config, self.setting, self.steps = config, SETTINGS[setting], steps
        super().__init__(
            task,
            seed,
            self._optimizer,
            Plan(config.probe_every, config.product_every, config.hessian_every),
            extra=self._extra,
            extra_columns=EXTRA,
        )

    def _optimizer(self, params: list[Tensor]) -> ClippedSGD:
        return ClippedSGD(
            params,
            self.setting.lr,
            max_norm=self.setting.max_norm,
            momentum=self.setting.momentum,
            weight_decay=WEIGHT_DECAY,
        )

    def step(self, iteration: int) -> dict[str, float]:
        passed = sum(iteration >= part * self.steps for part in self.config.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.lr / DROP**passed
        return super().step(iteration)

    def _extra(self, model: ResNet, k: int, update: list[Tensor]) -> dict[str, float]:
        batch = losses(self.task, model, k, None)
        clipped = min(1.0, MAX_NORM / self.optimizer.last_norm.item())
        longer = 1 / clipped if math.isfinite(self.setting.max_norm) else clipped
        gradient = [p.grad for p in self.params]
        step = [longer * d for d in update]
        other = path_smoothness(batch, self.params, step, fractions=(1 / 2,), grad=gradient)
        row = {
            "weight_norm": total_norm(self.params).item(),
            "swapped": other.value,
            "crossed": float(crossings(model, batch, update, (LOCAL,))[0]),
        }
        if k % self.config.released_every == 0:
            row |= _released(self.task, model, update, self.config.released_images)
        return row


def _released(task: Pictures, model: ResNet, update: list[Tensor], count: int) -> dict[str, float]:
    """Midpoint estimate from gradients over the first training images, a mean over batches."""
    params = list(model.parameters())
    pieces = [(start, min(start + task.batch, count)) for start in range(0, count, task.batch)]

    def gradient() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in params]
        for start, stop in pieces:
            with undisturbed():
                parts = torch.autograd.grad(task.leading(model, start, stop), params)
            for t, g in zip(total, parts, strict=True):
                t.add_(g, alpha=1 / len(pieces))
        return total

    here = copies(params)
    before = gradient()
    assign(params, [x + d / 2 for x, d in zip(here, update, strict=True)])
    after = gradient()
    assign(params, here)
    change = total_norm([b - a for a, b in zip(before, after, strict=True)])
    return {
        "released": (change / (total_norm(update) / 2)).item(),
        "released_grad_norm": total_norm(before).item(),
    }


# Kinks


def gates(model: ResNet, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Which units pass: for each use of the activation a mask, true where its input is above zero.

    Args:
        model: The network that ``loss`` calls.
        loss: Evaluates it.
    """
    found: list[Tensor] = []
    handle = model.activation.register_forward_hook(lambda _, inputs, __: found.append(inputs[0] > 0))
    try:
        with torch.no_grad(), undisturbed():
            loss()
    finally:
        handle.remove()
    return found


def with_gates_held(model: ResNet, loss: Callable[[], Tensor], masks: list[Tensor]) -> Callable[[], Tensor]:
    """The loss when units pass or block what ``masks`` say, whatever their input is.

    Args:
        model: The network that ``loss`` calls, with ReLU.
        loss: Evaluates it.
        masks: Of :func:`gates`, for the same images.

    Returns:
        A loss with the same value, gradient and automatic Hessian where the masks are those of the network,
        and without kinks.
    """

    def evaluate() -> Tensor:
        left = iter(masks)
        handle = model.activation.register_forward_hook(lambda _, inputs, __: inputs[0] * next(left))
        try:
            return loss()
        finally:
            handle.remove()

    return evaluate


def crossings(
    model: ResNet, loss: Callable[[], Tensor], update: list[Tensor], fractions: tuple[float, ...]
) -> list[int]:
    """How many inputs of units have another sign at x + a d than at x.

    Args:
        model: The network, at x.
        loss: Evaluates it.
        update: d, one tensor per parameter.
        fractions: Values of a.
    """
    params = list(model.parameters())
    here, start = copies(params), gates(model, loss)
    counts = []
    for a in fractions:
        assign(params, [x + a * d for x, d in zip(here, update, strict=True)])
        counts.append(sum(int((m != s).sum()) for m, s in zip(gates(model, loss), start, strict=True)))
    assign(params, here)
    return counts


def _units(task: Pictures, images: int) -> int:
    model = task.model(0)
    return sum(mask.numel() for mask in gates(model, lambda: task.leading(model, 0, images)))


def _kinks(config: Config, batch_norm: bool, seed: int) -> tuple[list[Row], dict[str, float]]:
    """Train with the default setting, and measure along some of its steps."""
    task = _task(config, batch_norm, math.inf)
    model = task.model(seed)
    params = list(model.parameters())
    default = SETTINGS["momentum"]
    optimizer = torch.optim.SGD(params, default.lr, momentum=default.momentum, weight_decay=WEIGHT_DECAY)
    rows: list[Row] = []
    for k in range(max(config.kink_steps) + 1):
        optimizer.zero_grad()
        loss, _ = task.loss(model, k, None)
        loss.backward()
        before = copies(params)
        optimizer.step()
        if k not in config.kink_steps:
            continue
        # In float32 a ten-thousandth of a step would change the gradient by little more than its rounding.
        double = copy.deepcopy(model).double()
        assign(list(double.parameters()), [x.double() for x in before])
        update = [(p.detach() - x).double() for p, x in zip(params, before, strict=True)]
        named = {
            "kind": "kinks",
            "setting": "momentum",
            "batch_norm": int(task.batch_norm),
            "seed": seed,
            "iteration": k,
            "update_length": total_norm(update).item(),
        }
        rows += [named | row for row in _paths(config, task, double, update)]
    return rows, {}


def _paths(config: Config, task: Pictures, model: ResNet, update: list[Tensor]) -> list[Row]:
    fractions = config.kink_fractions
    rows: list[Row] = []

    def add(loss: Callable[[], Tensor], n: int, sharpness: float, held: bool, crossed: list[int]) -> None:
        path = path_smoothness(loss, model.parameters(), update, fractions=fractions)
        limit = directional_smoothness(loss, model.parameters(), update)
        named = {"images": n, "sharpness": sharpness, "held": int(held), "grad_norm": path.grad_norm}
        for a, value, count in zip((0.0, *fractions), (limit, *path.values), [0, *crossed], strict=True):
            rows.append(named | {"fraction": a, "estimate": value, "crossed": float(count)})

    for n in config.kink_images:
        loss = functools.partial(task.leading, model, 0, n)
        add(loss, n, math.inf, False, crossings(model, loss, update, fractions))
    few = config.kink_images[0]
    loss = functools.partial(task.leading, model, 0, few)
    none = [0] * len(fractions)
    add(with_gates_held(model, loss, gates(model, loss)), few, math.inf, True, none)
    for sharpness in config.kink_sharpness:
        model.activation.sharpness = sharpness
        add(loss, few, sharpness, False, none)
    model.activation.sharpness = math.inf
    return rows


# Statistics


def cell_rows(series: Series, cell: Cell) -> np.ndarray:
    """Mask of a cell's probed steps, without those after a run was given up.

    Args:
        series: The columns of a record.
        cell: The cell.
    """
    return (
        (series["kind"] == "training")
        & (series["setting"] == cell.setting)
        & (series["batch_norm"] == int(cell.batch_norm))
        & (series["sharpness"] == cell.sharpness)
        & np.isfinite(series["update_length"])
    )


def cells(series: Series) -> list[Cell]:
    """The cells of a record, in the order of its rows.

    Args:
        series: The columns of a record.
    """
    rows = series["kind"] == "training"
    columns = (series[name][rows].tolist() for name in ("setting", "batch_norm", "sharpness"))
    return [Cell(s, bool(n), b) for s, n, b in dict.fromkeys(zip(*columns, strict=True))]


def summarise(series: Series) -> dict[str, float | int]:
    """The scalars that follow from the series; the module's docstring lists them.

    Args:
        series: The columns of a record.
    """
    scalars: dict[str, float | int] = {}
    for cell in cells(series):
        scalars |= _cell(series, cell)
    for batch_norm in (True, False):
        scalars |= _kink_scalars(series, batch_norm)
    return scalars


def _cell(series: Series, cell: Cell) -> dict[str, float | int]:
    mask = cell_rows(series, cell)
    all_rows = (
        (series["kind"] == "training")
        & (series["setting"] == cell.setting)
        & (series["batch_norm"] == int(cell.batch_norm))
        & (series["sharpness"] == cell.sharpness)
    )
    seeds = np.unique(series["seed"][all_rows])
    runs = [np.flatnonzero(mask & (series["seed"] == seed)) for seed in seeds]
    given_up = [all_rows & (series["seed"] == seed) & (series["diverged"] == 1) for seed in seeds]
    name, rows = cell.name, np.concatenate(runs)
    scalars: dict[str, float | int] = {
        f"{name}.count": int(mask.sum()),
        f"{name}.clipped_share": float((series["clip_factor"][rows] < 1).mean()) if rows.size else math.nan,
        f"{name}.diverged": int(sum(part.any() for part in given_up)),
    }
    k = series["iteration"]
    start = series["iteration"][all_rows].max() / 4
    for estimator, (column, norm) in ESTIMATORS.items():
        usable = [run[series[column][run] > 0] for run in runs]  # NaN is not above 0

        def table(run: np.ndarray, column: str = column, norm: str = norm) -> np.ndarray:
            x, y, d, w = (np.log(series[c][run]) for c in (norm, column, "update_length", "weight_norm"))
            full = np.stack([x, y, d, k[run], np.log1p(k[run]), w], axis=1)
            return full - full.mean(axis=0) if len(run) else full

        whole = [table(run) for run in usable]
        late = [table(run[k[run] >= start]) for run in usable]
        changes = [np.diff(part[:, :2], axis=0) for part in whole]
        for key, parts, statistic in (
            ("pearson", whole, _correlation),
            ("slope", whole, _slope),
            ("late", late, _correlation),
            ("partial", [part[:, :5] for part in whole], partial_correlation),
            ("weights", [part[:, [0, 1, 5]] for part in whole], partial_correlation),
            ("difference", changes, _correlation),
        ):
            scalars |= _pooled(f"{name}.{key}_{estimator}", parts, statistic)
        scalars[f"{name}.shuffled_{estimator}"] = _shuffled(whole)
    scalars |= _pooled(f"{name}.level_midpoint", [_ratios(series, run) for run in runs], _level)
    pearson = scalars[f"{name}.pearson_midpoint"]
    scalars[f"{name}.level_share"] = scalars[f"{name}.level_midpoint"] / pearson
    edge = 2 / (series["lr"] * series["clip_factor"])
    strict = (series["grad_norm"] + series["end_grad_norm"]) / series["update_length"]
    for key, values in (
        ("saturation_midpoint", series["path_1_2"] / series["bound"]),
        ("saturation_strict", series["path_1"] / strict),
        ("ratio_local", series["local"] / series["along"]),
        ("ratio_midpoint", series["path_1_2"] / series["along"]),
        ("deviation_local", np.abs(series["local"] / series["along"] - 1)),
        ("crossed", series["crossed"]),
        ("edge", series["hessian_norm"] / edge),
    ):
        scalars |= _pooled(f"{name}.{key}", [values[run][np.isfinite(values[run])] for run in runs], _median)
    ends = [run[k[run] >= 3 * start] for run in runs]
    scalars |= _pooled(f"{name}.loss", [series["loss"][run] for run in ends], _mean)
    return scalars


def _correlation(pairs: np.ndarray) -> float:
    return line(pairs)[1]


def _slope(pairs: np.ndarray) -> float:
    return line(pairs)[0]


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _ratios(series: Series, run: np.ndarray) -> np.ndarray:
    """Columns ln ‖g‖, ln of the level of the midpoint, ln of the estimate over its level; and the run."""
    g, level, estimate = (np.log(series[name][run]) for name in ("grad_norm", "bound", "path_1_2"))
    return np.stack([g, level, estimate - level, np.full(len(run), run[0] if len(run) else 0)], axis=1)


def _level(table: np.ndarray) -> float:
    generator = np.random.default_rng(0)
    parts = [table[table[:, 3] == run] for run in np.unique(table[:, 3])]
    draws = []
    for _ in range(_SHUFFLES):
        pairs = [np.stack([p[:, 0], p[:, 1] + generator.permutation(p[:, 2])], axis=1) for p in parts]
        draws.append(line(np.concatenate([pair - pair.mean(axis=0) for pair in pairs]))[1])
    return float(np.mean(draws))


def _shuffled(parts: list[np.ndarray]) -> float:
    generator = np.random.default_rng(0)
    draws = [
        line(np.concatenate([np.stack([p[:, 0], generator.permutation(p[:, 1])], axis=1) for p in parts]))[1]
        for _ in range(_SHUFFLES)
    ]
    return float(np.quantile(np.abs(draws), 0.975))


def _pooled(key: str, parts: list[np.ndarray], statistic: Callable[[np.ndarray], float]) -> dict[str, float]:
    """A statistic of all runs' points together, and its least and greatest value over runs."""
    return _spread(key, [statistic(part) for part in parts], lambda _: statistic(np.concatenate(parts)))


def _spread(key: str, values: list[float], pool: Callable[[list[float]], float]) -> dict[str, float]:
    # A seed without a value makes the range NaN, so that no claim for every seed can rest on the others.
    return {
        key: float(pool(values)),
        f"{key}_min": float(np.min(values)),
        f"{key}_max": float(np.max(values)),
    }


def kink_paths(series: Series, batch_norm: bool) -> dict[str, np.ndarray]:
    """The paths of rows ``kinks``, each with its limit.

    Args:
        series: The columns of a record.
        batch_norm: With or without batch norm.

    Returns:
        ``seed``, ``iteration``, ``images``, ``sharpness``, ``held``, ``fraction``, ``estimate``, ``crossed``,
        and ``along``, which is the estimate at fraction 0 of the same path.
    """
    names = ("seed", "iteration", "images", "sharpness", "held", "fraction", "estimate", "crossed")
    rows = (series["kind"] == "kinks") & (series["batch_norm"] == int(batch_norm))
    part = {name: series[name][rows] for name in names}
    keys = list(zip(*(part[name].tolist() for name in names[:5]), strict=True))
    limits = {
        key: value for key, a, value in zip(keys, part["fraction"], part["estimate"], strict=True) if a == 0
    }
    part["along"] = np.array([limits[key] for key in keys])
    return {name: values[part["fraction"] > 0] for name, values in part.items()}


def excess(paths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """E = sqrt(mean of L̂_a² - along²) over the steps, by number of images and fraction.

    The mean of squares, because that is what adds up over kinks. Negative means count as 0.

    Args:
        paths: Of :func:`kink_paths`, with ReLU and free gates.

    Returns:
        ``images``, ``fraction``, ``excess`` and ``crossed``, the number of kinks in all, one element per pair
        of the first two.
    """
    pairs = sorted(set(zip(paths["images"].tolist(), paths["fraction"].tolist(), strict=True)))
    found = []
    for n, a in pairs:
        these = (paths["images"] == n) & (paths["fraction"] == a)
        mean = np.mean(paths["estimate"][these] ** 2 - paths["along"][these] ** 2)
        found.append((n, a, math.sqrt(max(mean, 0.0)), paths["crossed"][these].sum()))
    names = ("images", "fraction", "excess", "crossed")
    return dict(zip(names, np.array(found).reshape(-1, 4).T, strict=True))


def _exponents(paths: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """p and q of E ∝ a^p n^q."""
    found = excess(paths)
    # Below five kinks a mean over steps hangs on one of them, or there is none.
    inside = (found["fraction"] < 0.11) & (found["crossed"] >= _ENOUGH) & (found["excess"] > 0)
    n, a, e = (np.log(found[name][inside]) for name in ("images", "fraction", "excess"))
    if len(e) < 4 or np.ptp(n) == 0 or np.ptp(a) == 0:
        return math.nan, math.nan
    _, p, q = np.linalg.lstsq(np.stack([np.ones(len(e)), a, n], axis=1), e, rcond=None)[0]
    return float(p), float(q)


def _kink_scalars(series: Series, batch_norm: bool) -> dict[str, float | int]:
    paths = kink_paths(series, batch_norm)
    name = norm_name(batch_norm)
    seeds = np.unique(paths["seed"])
    deviation = np.abs(paths["estimate"] / paths["along"] - 1)
    relu = np.isinf(paths["sharpness"]) & (paths["held"] == 0)
    short = paths["fraction"] <= _SHORT * 1.001
    touched, untouched = (relu & short & part for part in (paths["crossed"] > 0, paths["crossed"] == 0))
    scalars: dict[str, float | int] = {
        f"kinks.touched_count_{name}": int(touched.sum()),
        f"kinks.untouched_count_{name}": int(untouched.sum()),
    }
    for key, values, mask in (
        ("touched", paths["estimate"] / paths["along"], touched),
        ("untouched", deviation, untouched),
        ("held", deviation, short & (paths["held"] == 1)),
    ):
        parts = [values[mask & (paths["seed"] == seed)] for seed in seeds]
        scalars |= _pooled(f"kinks.{key}_{name}", parts, _median)
    few = paths["images"].min()
    one = relu & (paths["images"] == few) & (np.abs(paths["fraction"] / LOCAL - 1) < 1e-6)
    counts = [paths["crossed"][one & (paths["seed"] == seed)] for seed in seeds]
    scalars |= _pooled(f"kinks.crossings_{name}", counts, _mean)
    each = [_exponents({k: v[relu & (paths["seed"] == seed)] for k, v in paths.items()}) for seed in seeds]
    together = _exponents({k: v[relu] for k, v in paths.items()})
    for i, key in enumerate(("excess_fraction", "excess_images")):
        values = [pair[i] for pair in each]
        scalars |= _spread(f"kinks.{key}_{name}", values, lambda _, i=i: together[i])
    return scalars
